"""Find out whether a parametrization is a constraint, such as max norm, and what it lets surgery do.

A constraint leaves alone what is within its bounds. What surgery makes of such weights has to be within them,
too: with max norm rows may be copied or left out, and columns shared out among copies.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SIZE = 8  # channels of the weights that it is tried on, whose kernels are those of its own
SCALES = (0.03, 1.0, 30.0)  # of their entries: within most bounds, and out of them
TOLERANCE = 1e-6  # of the largest entry

# The dimensions that surgery may change, as what is written (False) or what is read (True).
Allowed = frozenset[tuple[int, bool]]
FOUND = "_elastic_allowed"  # of a parametrization: its copies have it, too, which may lack its data


def is_constraint(parametrization: nn.Module, shape: Sequence[int]) -> bool:
    """Tell whether a parametrization leaves alone what it has made, of this shape and of some others."""
    return _find_allowed(parametrization, shape) is not None


def allows(parametrization: nn.Module, shape: Sequence[int], dim: int, reads: bool) -> bool:
    """Tell whether what surgery makes along a dimension of weights within the bounds is so, too.

    Args:
        shape: that of the tensor.
        reads: the dimension is that of what the tensor reads: copies share the entries, fresh ones are zero.
    """
    return (dim, reads) in (_find_allowed(parametrization, shape) or ())


def _find_allowed(parametrization: nn.Module, shape: Sequence[int]) -> Allowed | None:
    """Find what surgery may change; None if that is nothing, or it is no constraint."""
    found: dict[tuple[int, ...], Allowed | None] = vars(parametrization).setdefault(FOUND, {})
    tried = (*[SIZE] * len(shape[:2]), *shape[2:])
    if tried not in found:
        with torch.random.fork_rng(devices=()), torch.no_grad():
            try:
                found[tried] = _try(copy.deepcopy(parametrization).cpu(), tried)
            except Exception:  # whatever a function says of weights that are not its own
                found[tried] = None
    return found[tried]


def _try(project: nn.Module, shape: tuple[int, ...]) -> Allowed | None:
    """Find the same by trial, on weights of several scales, in training and in evaluation."""
    found = {(dim, reads) for dim in range(len(shape[:2])) for reads in (False, True)}
    generator = torch.Generator().manual_seed(0)
    for scale in SCALES:
        for mode in (True, False):
            project.train(mode)
            weight = project(scale * torch.randn(shape, generator=generator))
            if not _is_close(project(weight), weight):
                return None
            found = {change for change in found if _leaves_alone(project, weight, *change, generator)}
    return frozenset(found) or None


def _leaves_alone(
    project: nn.Module, weight: Tensor, dim: int, reads: bool, generator: torch.Generator
) -> bool:
    """Tell whether a constraint leaves alone what surgery makes of a weight along a dimension."""
    fresh = torch.zeros_like(weight) if reads else torch.randn(weight.shape, generator=generator)
    copies = torch.cat([weight, weight], dim) / (2 if reads else 1)
    for changed in (weight.flip(dim), weight.narrow(dim, 0, SIZE // 2), copies):
        if not _is_close(project(changed), changed):
            return False
    grown = project(torch.cat([weight, fresh], dim))
    return _is_close(grown.narrow(dim, 0, SIZE), weight) and not (
        reads and grown.narrow(dim, SIZE, SIZE).any()
    )


def _is_close(found: Tensor, expected: Tensor) -> bool:
    same = found.shape == expected.shape and found.dtype == expected.dtype
    return same and torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
