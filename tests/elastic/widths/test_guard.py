"""What a program sets in its modules once they are traced: numbers and flags, and the modes of parts."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from elastic import attach_modules, discover, make_skipping
from elastic.errors import StructureError
from elastic.widths.tracing import sync_traced, trace_both_modes

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """Compute with what a program sets: its forward is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self._forward = forward
        self.scale, self.calls, self.is_on, self.kind = 1.0, 0, True, "relu"
        self.options, self.scales, self.pair = {"scale": 1.0}, [1.0, 2.0], (1.0, 2.0)
        self.size: tuple[int, ...] | None = None
        self.grid: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.block, self.last = nn.Conv2d(3, 8, 1), Block(forward), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.block(self.stem(x).relu()))
        return logits


def choose(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) if m.is_on else x


def rectify(m: Any, x: Tensor) -> Tensor:
    return getattr(torch, m.kind)(m.conv(x))  # type: ignore[no-any-return]


# The forward, what a program changes, and its name.
Case = tuple[Callable[[Any, Tensor], Tensor], Callable[[Any], None], str]
CASES: dict[str, Case] = {
    "number": (lambda m, x: m.conv(x) * m.scale, lambda m: setattr(m, "scale", 4.0), "scale"),
    "count": (lambda m, x: m.conv(x) * m.calls, lambda m: setattr(m, "calls", 3), "calls"),
    "flag": (choose, lambda m: setattr(m, "is_on", False), "is_on"),
    "text": (rectify, lambda m: setattr(m, "kind", "sigmoid"), "kind"),
    "entry": (lambda m, x: m.conv(x) * m.options["scale"], lambda m: m.options.update(scale=3.0), "options"),
    "item": (lambda m, x: m.conv(x) * m.scales[0], lambda m: m.scales.insert(0, 3.0), "scales"),
    "tuple": (lambda m, x: m.conv(x) * m.pair[0], lambda m: setattr(m, "pair", (2.0, 2.0)), "pair"),
    "gone": (lambda m, x: m.conv(x) * getattr(m, "scale", 5.0), lambda m: delattr(m, "scale"), "scale"),
    "type": (lambda m, x: m.conv(x) * m.scale, lambda m: setattr(m, "scale", 1), "scale"),
}


def trace(net: nn.Module) -> fx.GraphModule:
    return trace_both_modes(net, X.to("meta"))


def check_same(traced: nn.Module, net: nn.Module) -> None:
    for mode in (True, False):
        torch.testing.assert_close(traced.train(mode)(X), net.train(mode)(X), rtol=0, atol=0)


@pytest.mark.parametrize(("forward", "change", "name"), CASES.values(), ids=CASES)
def test_a_trace_says_which_constant_has_changed(
    forward: Callable[[Any, Tensor], Tensor], change: Callable[[Any], None], name: str
) -> None:
    net = Net(forward)
    traced = trace(net)
    check_same(traced, net)
    before = copy.deepcopy(vars(net.block)[name])
    change(net.block)
    for mode in (True, False):
        with pytest.raises(StructureError, match=rf"^'block\.{name}' was .* now: set it before, or") as e:
            traced.train(mode)(X)
        assert ("is missing now" in str(e.value)) is not hasattr(net.block, name)
    setattr(net.block, name, before)
    check_same(traced, net)
    change(net.block)
    check_same(trace(net), net)


@pytest.mark.parametrize(("forward", "change", "name"), CASES.values(), ids=CASES)
def test_what_the_forward_does_not_read_may_change(
    forward: Callable[[Any, Tensor], Tensor], change: Callable[[Any], None], name: str
) -> None:
    net = Net(lambda m, x: m.conv(x))
    traced = trace(net)
    change(net.block)
    check_same(traced, net)


def log(m: Any, x: Tensor) -> Tensor:
    """Read what makes no difference for long."""
    if m.calls < 3:
        return m.conv(x)  # type: ignore[no-any-return]
    return m.conv(x).relu()  # type: ignore[no-any-return]


def test_a_number_may_change_for_as_long_as_that_makes_no_difference() -> None:
    net = Net(log)
    traced = trace(net)
    for calls in (1, 0, 2, 1):
        net.block.calls = calls
        check_same(traced, net)
        for mode in (torch.inference_mode(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
            net.block.calls = (net.block.calls + 1) % 3  # type: ignore[operator]
            with mode:
                assert torch.equal(traced.eval()(X), net.eval()(X))
    net.block.calls = 3
    with pytest.raises(StructureError, match=r"'block\.calls' was 0 when .* is 3 now"):
        traced(X)


def multiply(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * torch.tensor(m.scale)  # type: ignore[no-any-return]


def fill(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) + torch.full((1, 8, 1, 1), m.scale)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [multiply, fill])
def test_a_number_that_a_forward_makes_a_tensor_of_is_a_constant(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    net = Net(forward)
    traced = trace(net)
    check_same(traced, net)
    net.block.scale = 2.0
    with pytest.raises(StructureError, match=r"'block\.scale' was 1\.0 when .* is 2\.0 now"):
        traced(X)


def test_a_buffer_is_followed() -> None:
    net = Net(lambda m, x: m.conv(x) * m.factor)
    net.block.register_buffer("factor", torch.ones(()))
    traced = trace(net)
    net.block.factor.mul_(3.0)  # type: ignore[operator, union-attr]
    check_same(traced, net)


def count_calls(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.conv(x)  # type: ignore[no-any-return]


def warm_up(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.conv(x) * min(1.0, m.calls / 10)  # type: ignore[no-any-return]


def anneal(m: Any, x: Tensor) -> Tensor:
    if m.training:
        m.scale *= 0.5
    return m.conv(x) * m.scale  # type: ignore[no-any-return]


def warm_up_by_a_tensor(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.conv(x) * torch.tensor(m.calls / 10)  # type: ignore[no-any-return]


COUNTING = [(warm_up, "calls"), (warm_up_by_a_tensor, "calls"), (anneal, "scale")]


@pytest.mark.parametrize(("forward", "name"), COUNTING)
def test_a_number_that_the_forward_counts_and_computes_with_is_refused(
    forward: Callable[[Any, Tensor], Tensor], name: str
) -> None:
    net = Net(forward)
    with pytest.raises(StructureError, match=rf"^the forward changes 'block\.{name}' and computes with it"):
        attach_modules(net, discover(net, X))
    assert vars(net.block)[name] == vars(Block(forward))[name]


def make_grid(m: Any, x: Tensor) -> Tensor:
    """Keep what depends on the size, as caches of coordinates do."""
    if m.size != tuple(x.shape[2:]):
        m.size, m.grid = tuple(x.shape[2:]), torch.ones(x.shape[2:])
    return m.conv(x) * m.grid  # type: ignore[no-any-return]


def keep_mean(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    if m.scale is not None:  # which it reads, and changes into a tensor
        m.scale = y.mean()
    return y  # type: ignore[no-any-return]


def count_in_a_list(m: Any, x: Tensor) -> Tensor:
    m.scales[0] += 1.0
    return m.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [count_calls, count_in_a_list, keep_mean, make_grid])
def test_what_the_forward_only_keeps_is_no_constant(forward: Callable[[Any, Tensor], Tensor]) -> None:
    net = Net(forward)
    traced = trace(net)
    check_same(traced, net)
    check_same(traced, net)


def test_what_the_mode_changes_is_no_constant() -> None:
    """A traced network alone is brought into a mode by many: the model's flags say another one then."""

    class Switching(Net):
        def train(self, mode: bool = True) -> "Switching":
            super().train(mode)
            self.block.is_on = mode
            return self

    net = Switching(choose)
    traced = trace(net)
    check_same(traced, net)
    expected = [net.train(mode)(X) for mode in (True, False)]
    assert not torch.equal(*expected)
    for mode, output in zip((True, False), expected, strict=True):
        assert torch.equal(traced.train(mode)(X), output)


def drop(m: Any, x: Tensor) -> Tensor:
    return F.dropout(m.conv(x), 0.5, m.training)


def skip(m: Any, x: Tensor) -> Tensor:
    return x if m.training else m.conv(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("forward", [drop, skip])
@pytest.mark.parametrize("mode", [True, False])
def test_a_part_in_another_mode_than_the_network_is_named(
    forward: Callable[[Any, Tensor], Tensor], mode: bool
) -> None:
    net = Net(forward)
    traced = trace(net)
    net.train(mode).block.train(not mode)
    sync_traced(traced, net, mode)
    with pytest.raises(StructureError, match=r"^'block' is in .* while the network is in .*: let the net"):
        traced(X)
    net.train(mode)
    torch.manual_seed(0)
    expected = net(X)
    torch.manual_seed(0)
    assert torch.equal(traced(X), expected)


def normalize(m: Any, x: Tensor) -> Tensor:
    """Call the norm's function, as subclasses of it do."""
    n = m.norm
    is_in_batch = n.training or n.running_mean is None
    y = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, is_in_batch, n.momentum, n.eps)
    return m.conv(y)  # type: ignore[no-any-return]


def normalize_and_count(m: Any, x: Tensor) -> Tensor:
    if m.norm.training:
        m.norm.num_batches_tracked.add_(1)
    return normalize(m, x)


PARTS: dict[str, tuple[Callable[[Any, Tensor], Tensor], nn.Module]] = {
    "norm": (lambda m, x: m.conv(m.norm(x)), nn.BatchNorm2d(8)),
    "function": (normalize, nn.BatchNorm2d(8)),
    "counter": (normalize_and_count, nn.BatchNorm2d(8)),
    "dropout": (lambda m, x: m.conv(m.norm(x)), nn.Dropout(0.5)),
    "nothing": (lambda m, x: m.conv(x).relu() if m.training else F.relu(m.conv(x)), nn.Identity()),
}


@pytest.mark.parametrize(("forward", "norm"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("mode", [True, False])
def test_layers_that_are_in_another_mode_than_the_network_are_followed(
    forward: Callable[[Any, Tensor], Tensor], norm: nn.Module, mode: bool
) -> None:
    net = Net(forward)
    net.block.norm = copy.deepcopy(norm)
    traced = trace(net)
    for _ in range(2):
        net.train(mode).block.norm.train(not mode)
        sync_traced(traced, net, mode)
        outputs = []
        for network in (net, traced):
            torch.manual_seed(0)
            outputs.append(network(X))
        torch.testing.assert_close(*outputs)


def test_a_network_that_keeps_a_part_in_evaluation_itself_is_followed() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self.block.eval()
            return self

    net = Frozen(drop)
    traced = trace(net)
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(X), net.train(mode)(X))


def test_copies_and_files_are_held_against_nothing() -> None:
    net = Net(CASES["number"][0])
    dynamic = attach_modules(net, discover(net, X)).eval()
    expected = dynamic(X)
    copied = copy.deepcopy(dynamic)
    stored = pickle.loads(pickle.dumps(dynamic))  # noqa: S301
    skipping = make_skipping(dynamic)
    net.block.scale = 2.0
    with pytest.raises(StructureError, match=r"'block\.scale' was 1\.0"):
        dynamic(X)
    for network in (copied, stored, skipping):
        torch.testing.assert_close(network(X), expected)
