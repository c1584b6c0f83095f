"""Hooks of layers, and weights that are computed: followed where they only look, else refused."""

import warnings
from collections.abc import Callable
from functools import partial
from threading import Lock
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from elastic import attach_modules, compact
from elastic.errors import StructureError
from elastic.levels import score_channels
from elastic.measure.counts import count_macs
from elastic.surgery.checking import discover_checked, fix_wrong_widths
from elastic.widths.copying import copy_module
from elastic.widths.discovery import discover, find_widths
from elastic.widths.tracing import trace_both_modes
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


class Keeper:
    """Hold what a hook keeps, in whatever way."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.by_name: dict[str, list[Tensor]] = {"block": []}
        self.latest: Tensor | None = None
        self.shapes: set[torch.Size] = set()

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs.append(output)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.latest = output

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keeper) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def append_to(outputs: list[Tensor], module: nn.Module, args: Any, output: Tensor) -> None:
    outputs.append(output)


HOOKS: dict[str, Callable[[Keeper], Callable[..., Any]]] = {
    "method": lambda keeper: keeper.keep,
    "object": lambda keeper: keeper,
    "partial": lambda keeper: partial(append_to, keeper.outputs),
    "closure": lambda keeper: lambda m, a, y: keeper.by_name["block"].append(y),
    "set": lambda keeper: lambda m, a, y: keeper.shapes.add(y.shape),
    "global": lambda keeper: lambda m, a, y: KEPT.append(y),
}
KEPT: list[Tensor] = []


def make_hooked_block(hook: Callable[..., Any], part: str) -> nn.Module:
    block = nn.Sequential(conv(8, 4), nn.ReLU(), conv(4, 8))
    model = between(lambda m, x: m.block(x), block=block)
    model.get_submodule(part).register_forward_hook(hook)
    return model


@pytest.mark.parametrize("part", ["block", "block.0"])
@pytest.mark.parametrize("kind", HOOKS)
def test_what_hooks_keep_is_not_of_runs_that_the_program_does_not_make(kind: str, part: str) -> None:
    """Of a block, which is traced through, or of a layer; a program finds what its own calls have left."""
    keeper = Keeper()
    model = make_hooked_block(HOOKS[kind](keeper), part)
    widths = discover_checked(model, X)
    count_macs(model, X)
    score_channels(model, widths, "taylor", [(X, torch.zeros(2, dtype=torch.long))], lambda y, _: y.sum())
    compact(model, X)
    attach_modules(model, widths)
    assert keeper == Keeper() and not KEPT
    model(X)
    assert keeper != Keeper() or len(KEPT) == 1
    KEPT.clear()


def test_a_traced_network_calls_hooks_of_blocks() -> None:
    """Once a call, with what goes in and comes out, for as long as the block has them."""
    seen: list[Any] = []
    model = make_hooked_block(lambda m, a, y: seen.append((m, *a, 2 * y.mean())), "block")
    handle = model.block.register_forward_pre_hook(lambda m, a: seen.append((m, *a)))
    traced = trace_both_modes(model, X.to("meta"))
    assert not seen
    expected = model(X)
    by_model = seen.copy()
    seen.clear()
    assert torch.equal(traced(X), expected)
    assert not traced.graph.find_nodes(op="call_method", target="mean"), "what it computes, it computes once"
    assert len(seen) == len(by_model) == 2
    for values, others in zip(seen, by_model, strict=True):
        assert values[0] is others[0] is model.block
        assert all(map(torch.equal, values[1:], others[1:]))
    handle.remove()
    traced(X)
    assert len(seen) == 3


def test_what_a_hook_computes_for_the_forward_is_traced() -> None:
    """It may look on beside."""
    calls = []

    def weigh(module: nn.Module, args: Any) -> None:
        calls.append(len(args))
        module.gain = args[0].mean((1, 2, 3), keepdim=True)

    class Weighed(nn.Module):
        gain: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    model = between(lambda m, x: m.one(x), one=Weighed())
    model.one.register_forward_pre_hook(weigh)
    traced = trace_both_modes(model, X.to("meta"))
    x = torch.randn_like(X)
    torch.testing.assert_close(traced(x), model(x))


def test_a_traced_network_keeps_tensors_in_attributes() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mean, self.maps = conv(8, 8), None, ()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(x)
            self.mean, self.maps = y.mean(), (x, y)
            return y.relu()

    model = between(lambda m, x: m.one(x), one=Keeping())
    traced = trace_both_modes(model, X.to("meta"))
    assert model.one.mean is None and model.one.maps == ()
    traced(X)
    mean, maps = model.one.mean, model.one.maps
    model(X)
    assert torch.equal(mean, model.one.mean) and all(map(torch.equal, maps, model.one.maps))
    assert mean.requires_grad


def test_a_copy_does_not_take_the_program_around_it_along() -> None:
    program = nn.Module()
    program.net, program.seen = nn.Sequential(conv(3, 4)), []  # type: ignore[assignment]
    program.unlike = (each for each in ())  # type: ignore[assignment]  # which nothing can copy
    hook = MethodType(lambda self, m, a, y: self.seen.append(y), program)
    program.net[0].register_forward_hook(hook)
    copy_module(program.net)(X)
    assert len(program.seen) == 1


class Watch:
    """Note what modules of a program say, as a profiler does that knows all of it."""

    def __init__(self, program: nn.Module) -> None:
        self.program, self.seen = program, list[str]()
        self.lock = Lock()  # which nothing can copy

    def note(self, module: nn.Module, args: Any, output: Tensor, name: str) -> None:
        self.seen.append(name)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append("called")


def test_a_copy_is_watched_by_what_watches_the_program() -> None:
    program = nn.Module()
    program.net = nn.Sequential(conv(3, 4))
    watch = Watch(program)
    program.net[0].register_forward_hook(partial(watch.note, name="noted"))
    program.net.register_forward_hook(watch)
    copy_module(program.net)(X)
    assert watch.seen == ["noted", "called"]


def test_a_hook_on_a_block_is_followed() -> None:
    model = between(lambda m, x: m.block(x), block=nn.Sequential(conv(8, 4), nn.ReLU()), reads=8)
    model.block.register_forward_hook(lambda m, a, y: torch.cat([y, y], 1))
    assert discover(model, X).sizes() == {"stem": 8, "block.0": 4, "last": 5}


def test_backward_hooks_of_the_old_kind_are_left_out_where_nothing_is_run() -> None:
    model = between(lambda m, x: m.block(x), block=nn.Sequential(conv(8, 8), nn.ReLU()))
    called: list[Any] = []
    model.block.register_backward_hook(lambda *values: called.append(values))
    assert discover(model, X).sizes() == {"stem": 8, "block.0": 8, "last": 5}
    with pytest.raises(StructureError, match="block has a backward hook of the old kind: register it by"):
        attach_modules(model, discover(model, X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as torch says of such hooks
        model(X).sum().backward()
    assert len(called) == 1


def recomputed(name: str) -> nn.Module:
    model = between(lambda m, x: m.one(x), one=conv(8, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if name == "pruned":
            prune.l1_unstructured(model.one, "weight", 0.5)
        else:
            parametrizations.orthogonal(model.one)
    return model


@pytest.mark.parametrize("name", ["pruned", "parametrized"])
def test_a_weight_that_is_computed_fixes_its_channels(name: str) -> None:
    model = recomputed(name)
    reason = "is parametrized by _Orthogonal" if name == "parametrized" else "is computed by a hook"
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
