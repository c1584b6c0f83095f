"""Change the structure in a run of several processes (DistributedDataParallel)."""

import gc
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@contextmanager
def unwrap(trainer: L.Trainer) -> Iterator[None]:
    """Take the model out of its wrapper for a change, and wrap it anew.

    The wrapper's buckets and hooks are made for the parameters it has seen: it would go on with those. With
    the new one the first process's parameters and buffers go to all others.
    """
    strategy: Any = trainer.strategy
    is_wrapped = isinstance(strategy.model, DistributedDataParallel)
    if is_wrapped:
        strategy.model = strategy.lightning_module
        gc.collect()  # the old one holds on to an autograd graph
    yield
    if is_wrapped:
        strategy.configure_ddp()


def find_differing_processes(
    trainer: L.Trainer, net: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> list[int]:
    """List the processes whose network or optimizer state is not, bit for bit, that of the first.

    Args:
        optimizers: beside those of the trainer.
    """
    if trainer.world_size == 1:
        return []
    digests: list[str] = [""] * trainer.world_size
    torch.distributed.all_gather_object(digests, _compute_digest(net, (*trainer.optimizers, *optimizers)))
    return [rank for rank, digest in enumerate(digests) if digest != digests[0]]


def _compute_digest(net: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> str:
    """Compute the digest of all tensors of a network and of what optimizers hold about its parameters."""
    digest = hashlib.sha256()
    for name, value in (*net.state_dict().items(), *_iterate_states(optimizers)):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _iterate_states(optimizers: Iterable[torch.optim.Optimizer]) -> Iterator[tuple[str, Any]]:
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            yield from optimizer.state.get(parameter, {}).items()
