"""Tell a program of networks that it may keep in step with the one that changes."""

import logging
from collections.abc import Iterator

import torch
from torch import nn

from elastic.training.locating import have_same_shapes
from elastic.training.structure import Structure

LOG = logging.getLogger(__name__)


def look_for_copies(structure: Structure, module: nn.Module) -> None:
    """Note networks that are like the one that changes, and do not follow it; warn of those with its weights.

    Momentum encoders and target networks begin as such. A program that keeps them in step pairs their
    parameters with the network's, one by one: once the network's are others, the pairs are wrong. Teachers
    begin as such, too, and may stay as they are.
    """
    alike = dict(_iterate_alike(structure, module))
    structure.alike = list(alike)
    copies = [path for path, net in alike.items() if _has_weights(net, structure.net)]
    if copies:
        LOG.warning(
            "%s has the weights of '%s', but will not follow its changes: if the program keeps it in step, "
            "name it by FollowNetwork('%s', copies=%s)",
            *(", ".join(f"'{path}'" for path in copies), structure.path, structure.path, copies),
        )


def _iterate_alike(structure: Structure, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    followed = {part for net in (structure.net, *structure.copies) for part in net.modules()}
    for path, net in module.named_modules():
        if type(net) is type(structure.net) and net not in followed and have_same_shapes(net, structure.net):
            yield path, net


def _has_weights(net: nn.Module, other: nn.Module) -> bool:
    pairs = zip(net.parameters(), other.parameters(), strict=True)
    return all(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
