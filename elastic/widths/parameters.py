"""Read what a layer stores: the tensor behind a name, whether it is parametrized or not."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.spectral_norm import SpectralNorm as HookedSpectralNorm
from torch.nn.utils.weight_norm import WeightNorm as HookedWeightNorm

from elastic.widths.constraints import allows, is_constraint

WEIGHT = "weight"  # the name of what torch's layers multiply their input by


class ChannelParametrization(nn.Module):
    """Carry tensors of one's own that follow the channels of the tensor that is parametrized.

    Surgery re-indexes them with it. Any other parametrization fixes the width, but torch's weight and
    spectral norm, and constraints.

    Attributes:
        dims: the dimensions of the parametrized tensor on which its tensors have an entry a channel.
        fresh: by the name of each of its tensors, what a fresh entry starts with.
    """

    dims: frozenset[int]
    fresh: Mapping[str, float]

    def get_dims(self, name: str) -> frozenset[int]:
        """Get the dimensions on which one of its tensors has an entry a channel, where it lacks some."""
        return self.dims


def get_kind(module: nn.Module) -> type[nn.Module]:
    """Get a module's class, as it was before anything parametrized its tensors."""
    is_parametrized = "parametrizations" in module._modules
    return parametrize.type_before_parametrizations(module) if is_parametrized else type(module)


def own_class(module: nn.Module, without: Collection[str] = ()) -> None:
    """Give a parametrized module a class of its own, without the properties that compute some tensors.

    Copies of a module share the class that torch made for it, where what computes tensors is known by name.
    """
    kind = type(module)
    left_out = {*without, "__dict__", "__weakref__"}
    contents = {name: value for name, value in vars(kind).items() if name not in left_out}
    module.__class__ = type(kind.__name__, kind.__bases__, contents)


def list_chains(module: nn.Module) -> dict[str, nn.Module]:
    """List what parametrizes the tensors of a module, by their names."""
    chains = module._modules.get("parametrizations") if parametrize.is_parametrized(module) else None
    return dict(chains.named_children()) if chains is not None else {}


def get_parametrizations(module: nn.Module, tensor: str) -> parametrize.ParametrizationList | None:
    """Get the chain of parametrizations of a tensor, if it has any."""
    if "parametrizations" not in module._modules or not parametrize.is_parametrized(module, tensor):
        return None  # of most, found at once
    return cast(parametrize.ParametrizationList, cast(nn.ModuleDict, module.parametrizations)[tensor])


def list_parametrizations(module: nn.Module, tensor: str) -> Iterator[nn.Module]:
    """List the parametrizations of a tensor, in order."""
    yield from get_parametrizations(module, tensor) or ()


def list_gates(module: nn.Module, tensor: str) -> list[ChannelParametrization]:
    """List the parametrizations of a tensor that have tensors a channel, in order."""
    return [p for p in list_parametrizations(module, tensor) if isinstance(p, ChannelParametrization)]


def list_foreign(module: nn.Module, tensor: str) -> list[nn.Module]:
    """List the parametrizations of a tensor that fix its channels."""
    chain = list(list_parametrizations(module, tensor))
    followed = chain[:1] if find_computation(module, tensor) else []
    return [p for p in chain if not isinstance(p, ChannelParametrization) and p not in followed]


@dataclass(frozen=True)
class WeightNorm:
    """Hold what torch computes a weight of, its `direction` and its `norms` (arXiv 1602.07868).

    The norms are of slices along `dim`, or one of all entries where that is -1.
    """

    direction: nn.Parameter
    norms: nn.Parameter
    dim: int

    def compute_weight(self) -> Tensor:
        """Compute the weight."""
        return torch._weight_norm(self.direction, self.norms, self.dim)

    def compute_scale(self) -> Tensor:
        """Compute what the direction is scaled by, in the shape of the norms."""
        return self.norms / self.compute_norms(self.direction)

    def compute_norms(self, direction: Tensor) -> Tensor:
        """Compute the norms of a direction, in the shape of those that are held."""
        return torch.norm_except_dim(direction, 2, self.dim)


def find_weight_norm(module: nn.Module, tensor: str) -> WeightNorm | None:
    """Find what a tensor is computed of if torch's weight norm does it, by a parametrization or a hook."""
    chain = get_parametrizations(module, tensor)
    if chain is not None and isinstance(chain[0], _WeightNorm):
        direction, norms = (cast(nn.Parameter, getattr(chain, f"original{i}")) for i in (1, 0))
        return WeightNorm(direction, norms, chain[0].dim)
    for hook in list_weight_norms(module):
        if hook.name == tensor:
            direction, norms = (cast(nn.Parameter, getattr(module, f"{tensor}_{part}")) for part in "vg")
            return WeightNorm(direction, norms, hook.dim)
    return None


@dataclass(frozen=True)
class SpectralNorm:
    """Hold what torch divides by its largest singular value, and the vectors that tell it (arXiv 1802.05957).

    The matrix has a row for each entry of the weight's dimension `dim`; `left` and `right` are the singular
    vectors, of rows and of columns.
    """

    weight: nn.Parameter
    left: Tensor
    right: Tensor
    dim: int

    def compute_weight(self) -> Tensor:
        """Compute the weight."""
        matrix = self.weight.movedim(self.dim, 0).flatten(1)
        return self.weight / torch.dot(self.left, matrix @ self.right)


def find_spectral_norm(module: nn.Module, tensor: str) -> SpectralNorm | None:
    """Find what a tensor is computed of if torch's spectral norm does it, by a parametrization or a hook."""
    chain = get_parametrizations(module, tensor)
    if chain is not None and isinstance(chain[0], _SpectralNorm) and hasattr(chain[0], "_u"):
        norm = chain[0]
        return SpectralNorm(cast(nn.Parameter, chain.original), norm._u, norm._v, norm.dim)
    for hook in list_spectral_norms(module):
        if hook.name == tensor:
            weight, left, right = (getattr(module, f"{tensor}_{part}") for part in ("orig", "u", "v"))
            return SpectralNorm(weight, left, right, hook.dim)
    return None


@dataclass(frozen=True)
class Constraint:
    """Hold what a parametrization keeps within bounds, see `elastic.widths.constraints`."""

    weight: nn.Parameter
    project: nn.Module

    def compute_weight(self) -> Tensor:
        """Compute the weight."""
        return cast(Tensor, self.project(self.weight))

    def allows(self, dim: int, reads: bool) -> bool:
        """Tell whether surgery may change a dimension of the weight: that of what it reads, or it writes."""
        return allows(self.project, self.weight.shape, dim, reads)


def find_constraint(module: nn.Module, tensor: str) -> Constraint | None:
    """Find what keeps a tensor within bounds, if the first parametrization of it does so."""
    chain = get_parametrizations(module, tensor)
    if chain is None or isinstance(chain[0], ChannelParametrization) or not hasattr(chain, "original"):
        return None
    original = cast(nn.Parameter, chain.original)
    return Constraint(original, chain[0]) if is_constraint(chain[0], original.shape) else None


def find_computation(module: nn.Module, tensor: str) -> WeightNorm | SpectralNorm | Constraint | None:
    """Find what computes a tensor, where surgery follows it: weight norm, spectral norm or a constraint."""
    norm = find_weight_norm(module, tensor) or find_spectral_norm(module, tensor)
    return norm or find_constraint(module, tensor)


def computes_weight(hook: object) -> bool:
    """Tell whether a hook computes a tensor by weight norm or spectral norm, and does nothing else."""
    return isinstance(hook, HookedWeightNorm | HookedSpectralNorm)


def list_weight_norms(module: nn.Module) -> list[HookedWeightNorm]:
    """List the hooks that compute a module's tensors by weight norm, as torch did before it parametrized."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, HookedWeightNorm)]


def list_spectral_norms(module: nn.Module) -> list[HookedSpectralNorm]:
    """List the hooks that compute a module's tensors by spectral norm, likewise."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, HookedSpectralNorm)]


@torch.no_grad()
def recompute_weights(module: nn.Module) -> None:
    """Let the hooks of weight and spectral norm compute a module's tensors again, without a graph."""
    for hook in list_weight_norms(module):
        hook(module, None)
    for spectral in list_spectral_norms(module):
        setattr(module, spectral.name, spectral.compute_weight(module, do_power_iteration=False))


def try_constraints(model: nn.Module) -> None:
    """Find out which parametrizations are constraints while a model has its data: its copies know it then."""
    for module in model.modules():
        for name in list_chains(module):
            find_constraint(module, name)


@torch.no_grad()
def apply_constraints(module: nn.Module) -> None:
    """Store tensors as they are within their bounds, which changes nothing of what is computed."""
    for name in list_chains(module):
        if (constraint := find_constraint(module, name)) is not None:
            constraint.weight.data = constraint.compute_weight()


def get_original(module: nn.Module, tensor: str) -> Tensor | None:
    """Get what is stored for a tensor, entry by entry, gated or not: of weight norm's, the direction."""
    if tensor in module._parameters:
        return module._parameters[tensor]
    if (norm := find_weight_norm(module, tensor)) is not None:
        return norm.direction
    if (spectral := find_spectral_norm(module, tensor)) is not None:
        return spectral.weight
    chain = get_parametrizations(module, tensor)
    if chain is None or not hasattr(chain, "original"):  # what is computed of several is computed
        return cast(Tensor | None, getattr(module, tensor, None))
    return chain.original


def get_weight_name(layer: nn.Module) -> str:
    """Get the name of what a layer multiplies its input by: the only matrix that it has, or `weight`."""
    weight = layer._parameters.get(WEIGHT)
    if WEIGHT in vars(layer) or (weight is not None and weight.dim() > 1):  # of most, found at once
        return WEIGHT  # which a hook may compute
    names = [name for name in (*layer._parameters, *list_chains(layer)) if _is_matrix(layer, name)]
    return names[0] if len(names) == 1 else WEIGHT


def _is_matrix(layer: nn.Module, tensor: str) -> bool:
    """Tell whether a tensor has several entries on several dimensions, as a kernel has."""
    value = get_original(layer, tensor)
    return value is not None and value.dim() > 1 and value.numel() > max(value.shape)


def get_weight(layer: nn.Module) -> Tensor:
    """Get what a convolution or linear layer stores for its weight, before any gate, see `get_original`."""
    weight = get_original(layer, get_weight_name(layer))
    assert weight is not None
    return weight


def compute_weight(layer: nn.Module) -> Tensor:
    """Compute a layer's weight before any gate."""
    tensor = get_weight_name(layer)
    computation = find_computation(layer, tensor)
    return get_weight(layer) if computation is None else computation.compute_weight()
