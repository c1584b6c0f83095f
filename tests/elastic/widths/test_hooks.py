"""Hooks of layers, and weights that are computed: followed where they only look, else refused."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from elastic.surgery.checking import fix_wrong_widths
from elastic.widths.copying import copy_module
from elastic.widths.discovery import discover, find_widths
from tests.elastic.widths.odd import between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def hooked(hook: Callable[..., Any], before: bool = False, with_kwargs: bool = False) -> nn.Module:
    model = between(lambda m, x: m.one(x), one=conv(8, 8))
    register = model.one.register_forward_pre_hook if before else model.one.register_forward_hook
    register(hook, with_kwargs=with_kwargs)
    return model


def overwrite(module: nn.Module, args: Any, output: Tensor) -> None:
    output[:, 0] = 0


CHANGES: dict[str, Callable[[], nn.Module]] = {
    "output flipped": lambda: hooked(lambda m, a, y: y.flip(1)),
    "input flipped": lambda: hooked(lambda m, a: a[0].flip(1), before=True),
    "input in place of the output": lambda: hooked(lambda m, a, y: a[0]),
    "output written to": lambda: hooked(overwrite),
    "numbers looked at": lambda: hooked(lambda m, a, y: print(y.mean().item())),
    "output flipped, with keywords": lambda: hooked(lambda m, a, k, y: y.flip(1), with_kwargs=True),
}


@pytest.mark.parametrize("build", CHANGES.values(), ids=CHANGES)
def test_a_hook_that_may_change_a_layer_fixes_what_it_reads_and_writes(
    build: Callable[[], nn.Module],
) -> None:
    widths = find_widths(build(), X)
    assert widths.sizes() == {"last": 5}
    for name in ("stem", "one"):
        assert widths.fixed[name] == "one (Conv2d) has a hook that may change them"


def test_a_hook_that_looks_on_is_let_be() -> None:
    shapes = []
    model = hooked(lambda m, a, y: shapes.append(y.shape))
    assert discover(model, X).sizes() == {"stem": 8, "one": 8, "last": 5}
    shapes.clear()
    model(X)
    assert shapes == [(2, 8, 8, 8)], "the model's own hook is as it was"


@pytest.mark.parametrize(
    ("hook", "before"),
    [(lambda m, a: a, True), (lambda m, a: a[0], True), (lambda m, a, y: y, False)],
    ids=["all inputs", "the only input", "the output"],
)
def test_a_hook_that_gives_back_what_it_is_given_is_let_be(hook: Callable[..., Any], before: bool) -> None:
    """As those do by which Lightning's PyTorchProfiler names modules."""
    model = hooked(hook, before=before)
    assert discover(model, X).sizes() == {"stem": 8, "one": 8, "last": 5}


def test_a_hook_on_a_block_is_followed() -> None:
    model = between(lambda m, x: m.block(x), block=nn.Sequential(conv(8, 4), nn.ReLU()), reads=8)
    model.block.register_forward_hook(lambda m, a, y: torch.cat([y, y], 1))
    assert discover(model, X).sizes() == {"stem": 8, "block.0": 4, "last": 5}


def recomputed(name: str) -> nn.Module:
    model = between(lambda m, x: m.one(x), one=conv(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if name == "pruned":
            prune.l1_unstructured(model.one, "weight", 0.5)
        elif name == "new weight_norm":
            parametrizations.weight_norm(model.one)
        else:
            getattr(nn.utils, name)(model.one)
    return model


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm", "pruned", "new weight_norm"])
def test_a_weight_that_is_computed_fixes_its_channels(name: str) -> None:
    model = recomputed(name)
    reason = "is parametrized by _WeightNorm" if name == "new weight_norm" else "is computed by a hook"
    for _ in range(2):
        widths = find_widths(model, X)
        assert widths.sizes() == {"last": 5}
        assert widths.fixed == {
            "stem": f"one.weight {reason}: remove it first",
            "one": f"one.weight {reason}: remove it first",
            "head.2": "it is the model's output",
        }
        expected = model(X)  # the hook has computed it once
    replica = copy_module(model)
    torch.testing.assert_close(replica.eval()(X), expected)
    fix_wrong_widths(model, widths)
    assert set(widths) == {"last"}
