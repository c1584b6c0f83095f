"""Weights that weight norm, spectral norm or a constraint computes, parametrized or by a hook."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import StructureError
from elastic.levels import Levels
from elastic.pruning import compact
from elastic.pruning.dead import find_removable_channels
from elastic.pruning.gates import Grain, attach_gates, iterate_gates
from elastic.pruning.hiding import HiddenGates
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import grow_index, reindex
from elastic.surgery.residual import find_last_tensors
from elastic.widths.copying import copy_module
from elastic.widths.discovery import discover
from elastic.widths.parameters import compute_weight, get_weight
from tests.elastic.zoo import conv, head, randomised

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
Norm = Callable[[nn.Module], nn.Module]


def hook(layer: nn.Module, dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


class MaxNorm(nn.Module):
    """Keep rows, or other slices, from being longer than a bound."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        return weight.renorm(2, self.dim, 0.5)


class Causal(nn.Module):
    """Let a kernel see what comes before alone, as PixelCNN's do."""

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.arange(kernel**2) <= kernel**2 // 2).float().view(kernel, kernel))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.clamp(min=0)


class Standard(nn.Module):
    """Standardise rows, which halves of some of their entries would change."""

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        return ((rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)).view_as(weight)


def constrain(constraint: nn.Module, layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", constraint)


def bound_rows(layer: nn.Module) -> nn.Module:
    return constrain(MaxNorm(int(isinstance(layer, nn.ConvTranspose2d))), layer)


SPECTRAL: dict[str, Norm] = {
    "spectral": parametrizations.spectral_norm,
    "spectral by a hook": nn.utils.spectral_norm,
}
NORMS: dict[str, Norm] = {
    **SPECTRAL,
    "by rows": parametrizations.weight_norm,
    "by columns": partial(parametrizations.weight_norm, dim=1),
    "whole": partial(parametrizations.weight_norm, dim=None),
    "by a hook": hook,
    "whole by a hook": partial(hook, dim=None),
    "max norm": bound_rows,
    "positive": partial(constrain, Positive()),
}
PARAMETRIZED = {name: norm for name, norm in NORMS.items() if "hook" not in name}
LAYERS: dict[str, Callable[[Norm], nn.Module]] = {
    "convolution": lambda norm: norm(conv(8, 6, 3)),
    "transposed": lambda norm: norm(nn.ConvTranspose2d(8, 6, 3, padding=1)),
    "in groups": lambda norm: norm(conv(8, 6, 3, groups=2)),
    "depthwise": lambda norm: nn.Sequential(norm(conv(8, 8, 3, groups=8)), norm(conv(8, 6))),
}
every_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def make(norm: Norm, layer: Callable[[Norm], nn.Module] = LAYERS["convolution"]) -> nn.Sequential:
    """Make a network whose weights are no longer what weight norm made them of."""
    torch.manual_seed(0)
    features = [norm(conv(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), layer(norm), nn.ReLU()]
    classifier = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(6, 7)), nn.Linear(7, 5)]
    net = randomised(nn.Sequential(*features, *classifier))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))
    net(X)  # a hook computes its weight in each forward
    return net


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.detach().abs().max()))


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        net.train()(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    net.eval()


@pytest.mark.sampled(6)
@every_norm
@every_layer
def test_a_network_and_its_copy_keep_their_functions(norm: Norm, layer: Callable[[Norm], nn.Module]) -> None:
    net = make(norm, layer)
    widths, twin = discover(net, X), copy_module(net).eval()
    assert set(widths) == set(discover(net, X, check=True)) and len(widths) == 3
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    train(net, optimizer)
    expected, of_twin = net(X).detach(), twin(X).detach()
    for index in (lambda n: grow_index(n, n), lambda n: list(range(n))[::-1]):
        changes = {name: index(width.size) for name, width in widths.items()}
        reindex(net, widths, changes, optimizers=[optimizer], copies=[twin])
        close(net(X), expected)
        close(twin(X), of_twin)
    fresh = {name: width.size // 2 - 1 for name, width in widths.items()}  # the first of them, after reversal
    train(net, optimizer)
    assert all(parameter.isfinite().all() for parameter in net.parameters())
    moved = net(X).detach()
    reindex(net, widths, {name: [c for c in range(w.size) if c != fresh[name]] for name, w in widths.items()})
    assert not torch.allclose(net(X), moved, rtol=1e-5), "a fresh channel has been learnt"


@every_norm
def test_what_an_optimizer_keeps_follows_entry_by_entry(norm: Norm) -> None:
    net = make(norm)
    widths = discover(net, X)
    optimizer = torch.optim.SGD(net.parameters(), 1e-2, momentum=0.9)
    train(net, optimizer)
    names = {parameter: name for name, parameter in net.named_parameters()}
    before = {names[p]: state["momentum_buffer"].clone() for p, state in optimizer.state.items()}
    reindex(net, widths, {"0": [5, -1, 2]}, optimizers=[optimizer])
    for parameter, state in optimizer.state.items():
        own, found = before[names[parameter]], state["momentum_buffer"]
        assert found.shape == parameter.shape
        if names[parameter].startswith("0.") and own.dim() and len(own) == 8:
            assert torch.equal(found[[0, 2]], own[[5, 2]]) and not found[1].any()


def test_norms_that_fresh_readers_leave_change_no_bit() -> None:
    net = make(parametrizations.weight_norm)
    widths = discover(net, X)
    before, sizes = {n: p.detach().clone() for n, p in net.named_parameters()}, widths.sizes()
    for _ in range(3):
        reindex(net, widths, {name: grow_index(size, 3) for name, size in sizes.items()})
        reindex(net, widths, {name: range(size) for name, size in sizes.items()})
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.sampled(8)
@pytest.mark.parametrize("norm", PARAMETRIZED.values(), ids=PARAMETRIZED)
@every_layer
@pytest.mark.parametrize("grain", ["weight", "channel"])
def test_gates_lie_behind_weight_norm(norm: Norm, layer: Callable[[Norm], nn.Module], grain: Grain) -> None:
    net = make(norm, layer).eval()
    widths = discover(net, X)
    attach_gates(net, widths, grain)
    generator = torch.Generator().manual_seed(0)
    for _, _, gate in iterate_gates(net):
        gate.score.data = torch.randn(gate.score.shape, generator=generator) + 0.2
    expected = net(X).detach()
    plain = compact(net, X)
    close(plain(X), expected)
    assert not any("parametrizations" in name for name, _ in plain.named_parameters())
    reindex(net, widths, find_removable_channels(net, widths, X))  # in the middle of training
    close(net(X), expected)


def test_a_weight_that_a_hook_computes_has_no_gates() -> None:
    net = make(hook).eval()
    expected = net(X).detach()
    attach_gates(net, discover(net, X), "weight")
    assert [path for path, _, _ in iterate_gates(net)] == ["8"]
    plain = compact(net, X)
    close(plain(X), expected)
    assert "0.weight" in plain.state_dict() and "0.weight_v" in net.state_dict()
    remedy = (
        r"a hook computes weights: use weight_norm or spectral_norm of torch\.nn\.utils\.parametrizations"
    )
    with pytest.raises(StructureError, match=f"no layer can have gates: {remedy}"):
        attach_gates(make(hook), discover(make(hook), X), "channel")


@pytest.mark.parametrize("grain", ["weight", "channel"])
def test_gates_that_are_hidden_leave_weight_norm_in_its_place(grain: Grain) -> None:
    net = make(parametrizations.weight_norm).eval()
    order = list(net.state_dict())
    attach_gates(net, discover(net, X), grain)
    for _, _, gate in iterate_gates(net):
        gate.score.data[:2] = -1
    gated, expected, twin = list(net.state_dict()), net(X).detach(), copy_module(net)
    hidden = HiddenGates()
    hidden.hide(net)
    assert list(net.state_dict()) == order and [n for n, _ in net.named_parameters()] == [
        name for name in order if "running" not in name and "num_batches" not in name
    ]
    assert not torch.allclose(net(X), expected) and torch.equal(twin(X), expected)
    hidden.show()
    assert list(net.state_dict()) == gated and torch.equal(net(X), expected)


@every_norm
@every_layer
def test_a_network_takes_the_shapes_of_a_state(norm: Norm, layer: Callable[[Norm], nn.Module]) -> None:
    net, other = make(norm, layer), make(norm, layer)
    widths = discover(net, X)
    reindex(net, widths, {name: grow_index(width.size, 3) for name, width in widths.items()})
    rebuild(other, discover(other, X), net.state_dict())
    other.load_state_dict(net.state_dict())
    close(other.eval()(X), net.eval()(X))


@every_norm
def test_levels_leave_it_whole(norm: Norm) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(norm(conv(3, 4, 3)), nn.ReLU(), conv(4, 6), nn.ReLU(), conv(6, 5), head(5)).eval()
    widths = discover(net, X)
    with pytest.raises(
        StructureError, match=r"'0' is of weights that a norm or a constraint .* \(remove it first\)"
    ):
        Levels(net, widths, [{"0": 2}])
    smaller = copy_module(net)
    reindex(smaller, discover(smaller, X), {"2": range(3)})
    close(Levels(net, widths, [{"2": 3}])[0](X), smaller(X))


@pytest.mark.parametrize("norm", [norm for name, norm in NORMS.items() if name not in SPECTRAL])
def test_its_kernels_are_switched_off(norm: Norm) -> None:
    net = make(norm).eval()
    dynamic = attach_modules(net, discover(net, X)).eval()
    close(make_skipping(dynamic)(X), dynamic(X))


def test_frozen_directions_are_frozen_weights() -> None:
    net = make(parametrizations.weight_norm)
    chain: Any = net[0].parametrizations
    chain.weight.original1.requires_grad_(False)
    attach_gates(net, discover(net, X), "weight")
    assert [path for path, _, _ in iterate_gates(net)] == ["3", "7", "8"]


@every_norm
def test_what_is_computed_of_it_is_the_layer_s_weight(norm: Norm) -> None:
    """By which magnitude pruning compares the entries of all layers."""
    net = make(norm, LAYERS["transposed"]).eval()
    net(X)
    for layer in (net[0], net[3], net[7]):
        torch.testing.assert_close(compute_weight(layer), layer.weight)


every_spectral = pytest.mark.parametrize("norm", SPECTRAL.values(), ids=SPECTRAL)


@every_spectral
def test_a_discriminator_of_one_score_is_followed(norm: Norm) -> None:
    net = nn.Sequential(
        norm(conv(3, 8, 3)), nn.LeakyReLU(), norm(conv(8, 6)), head(6)[:2], norm(nn.Linear(6, 1))
    )
    assert discover(net, X, check=True).sizes() == {"0": 8, "2": 6}


@every_spectral
@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_fresh_rows_do_not_tell_what_spectral_norm_divides_by(norm: Norm, scale: float) -> None:
    """How long a weight's rows are says nothing of a layer that divides by its largest singular value."""
    net = make(norm)
    stored = get_weight(net[0])
    stored.data *= scale
    widths, before = discover(net, X), torch.linalg.matrix_norm(stored.detach().flatten(1), 2)
    reindex(net, widths, {"0": grow_index(8, 4)})
    after = torch.linalg.matrix_norm(get_weight(net[0]).detach().flatten(1), 2)
    assert 1 <= after / before < 1.5


@every_spectral
def test_spectral_norm_says_why_its_kernels_are_not_switched_off(norm: Norm) -> None:
    net = make(norm).eval()
    with pytest.raises(StructureError, match=r"spectral norm divides 0\.weight by what all its rows tell"):
        attach_modules(net, discover(net, X))


@every_spectral
def test_a_block_with_spectral_norm_is_not_repeated(norm: Norm) -> None:
    class Block(nn.Module):
        def __init__(self, norm: Norm) -> None:
            super().__init__()
            self.one, self.norm = norm(conv(8, 8, 3)), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = x + self.norm(self.one(x))
            return y

    assert find_last_tensors(Block(parametrizations.weight_norm)) == ("norm.weight", "norm.bias")
    assert not find_last_tensors(Block(norm))


def test_a_constraint_fixes_what_it_would_change_in_other_sizes() -> None:
    layers = [conv(3, 8, 3), nn.ReLU(), conv(8, 6, 3), nn.ReLU(), conv(6, 5, 3), head(5)]

    def follow(constraint: nn.Module) -> tuple[set[str], dict[str, str]]:
        net = copy_module(nn.Sequential(*layers))
        constrain(constraint, net[2])
        widths = discover(net, X)
        return set(widths), {name: reason for name, reason in widths.fixed.items() if "2.weight" in reason}

    for constraint in (MaxNorm(0), Causal()):
        assert follow(constraint) == ({"0", "2", "4"}, {})
    for constraint, fixed in ((MaxNorm(1), "2"), (Standard(), "0")):
        name = type(constraint).__name__
        reason = f"{name} would change 2.weight, were its size another: remove it first"
        assert follow(constraint) == ({"0", "2", "4"} - {fixed}, {fixed: reason})
    for other in (nn.Softplus(), nn.Dropout()):
        reason = f"2.weight is parametrized by {type(other).__name__}: remove it first"
        assert follow(other) == ({"4"}, dict.fromkeys(("0", "2"), reason))


def test_gates_on_a_copy_leave_the_original_its_bias() -> None:
    """torch has all copies of a parametrized layer share a class, which says what is computed."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), head(4)).eval()
    expected, twin = net(X), copy_module(net)
    attach_gates(twin, discover(twin, X), "channel")
    assert {"weight", "bias"} == set(twin[0].parametrizations)
    assert torch.equal(net(X), expected) and torch.equal(twin(X), expected)
