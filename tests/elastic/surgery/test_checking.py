"""The check of widths on the real network: a wrong rule is found, a right network is let be."""

import copy
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery import checking
from elastic.surgery.checking import discover_checked, fix_wrong_widths
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths import Axes, Tracker, discover, register_op
from elastic.widths.operations import TABLE
from elastic.widths.operations.interface import get_axes, get_input
from elastic.widths.width import fix_widths
from tests.elastic import zoo
from tests.elastic.widths.odd import between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def clean_table() -> Iterator[None]:
    """Take back what a test registers."""
    names = TABLE.names.copy()
    yield
    TABLE.names = names


def pass_through(tracker: Tracker, node: torch.fx.Node) -> Axes:
    """Say that an operation leaves channels alone, whether it does or not."""
    return get_axes(get_input(node))


WRONG = {
    "flip": (
        lambda m, x: m.one(x).flip(1),
        "in another order of its channels the network is another function",
    ),
    "cumsum": (lambda m, x: m.one(x).cumsum(1), "in another order of its channels the network is another"),
    "narrow": (lambda m, x: m.one(x).narrow(1, 0, 8), "with fresh channels that nothing reads the network"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_width_that_is_followed_wrongly_is_fixed_with_the_reason(name: str) -> None:
    forward, reason = WRONG[name]
    register_op(name, pass_through)
    torch.manual_seed(0)
    model = between(forward, one=conv(8, 8))
    assert set(discover(model, X)) == {"stem", "one", "last"}
    before = zoo.states(model)
    random = torch.get_rng_state()
    widths = discover(model, X, check=True)
    assert set(widths) == {"stem", "last"} and reason in widths.fixed["one"]
    assert not zoo.differences(before, zoo.states(model)) and torch.equal(random, torch.get_rng_state())
    with pytest.raises(StructureError, match="'one' cannot change: "):
        widths["one"]


def test_what_takes_under_a_second_is_checked_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    register_op("flip", pass_through)
    model = between(lambda m, x: m.one(x).flip(1), one=conv(8, 8))
    assert set(discover_checked(model, X)) == {"stem", "last"}
    monkeypatch.setattr(checking, "CHECKED_MACS", 1000)
    assert set(discover_checked(model, X)) == {"stem", "one", "last"}


def test_a_run_trains_what_the_check_has_left() -> None:
    from elastic.training.structure import Structure

    register_op("flip", pass_through)
    model = between(lambda m, x: m.one(x).flip(1), one=conv(8, 8, 3))
    structure = Structure(model, X)
    assert set(structure.widths) == {"stem", "last"}
    structure.attach_dynamic()
    assert list(structure.kernel_modules[0]) == ["stem", "last"]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("case", zoo.CASES.values(), ids=zoo.CASES)
def test_what_is_followed_rightly_is_let_be(case: zoo.Case) -> None:
    model = case.model()
    widths = discover(model, case.example())
    expected = copy.deepcopy(widths)
    fix_wrong_widths(model, widths)
    assert widths == expected


def test_a_model_that_takes_single_precision_only_is_checked_in_it() -> None:
    class Single(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(x.float() + torch.ones(1, dtype=torch.float32))

    model = between(lambda m, x: m.single(x), single=Single())
    assert set(discover(model, X, check=True)) == {"stem", "last"}


def test_a_width_that_is_fixed_later_counts_as_constant() -> None:
    """Its neighbours on the same tensors can still change."""
    case = zoo.CASES["dense"]
    model, x = case.model().eval(), case.example()
    widths = discover(model, x)
    fix_widths(widths, {"one": "a reason"})
    assert set(widths) == {"stem", "two"} and widths.fixed["one"] == "a reason"
    (slot,) = [slot for slot in widths["two"].slots if slot.module == "head.2"]
    assert [(s.width, s.repeat) for s in slot.layout] == [("stem", 1), (None, 3), ("two", 1)]
    expected = model(x).detach()
    reindex(model, widths, {name: grow_index(size, 2) for name, size in widths.sizes().items()})
    torch.testing.assert_close(model(x), expected)


class Drawing(nn.Module):
    """Computes what cannot be compared as it is: numbers drawn anew at each call, or none at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, conv(3, 8), conv(8, 4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.first(x_BCHW)
        if self.how == "dropout":
            h_BCHW = nn.functional.dropout(h_BCHW, 0.2)
        if self.how == "noise":
            h_BCHW = h_BCHW + torch.randn(len(h_BCHW), 1, 1, 1, dtype=h_BCHW.dtype)
        if self.how == "sample":
            h_BCHW = torch.distributions.Normal(h_BCHW, h_BCHW.exp()).rsample()
        y_BC = self.last(self.mix(h_BCHW)).mean((2, 3))
        if self.how == "Python's noise":
            y_BC = y_BC + random.random()
        return {"infinite": y_BC / 0.0, "logarithm": y_BC.log()}.get(self.how, y_BC)

    def mix(self, h_BCHW: Tensor) -> Tensor:
        return h_BCHW


class FlippedDrawing(Drawing):
    def mix(self, h_BCHW: Tensor) -> Tensor:
        return h_BCHW.flip(1)


@pytest.mark.parametrize("how", ["Python's noise", "infinite", "logarithm"])
def test_what_cannot_be_compared_condemns_no_width(how: str) -> None:
    torch.manual_seed(0)
    net, x_BCHW = Drawing(how), torch.randn(2, 3, 8, 8)
    assert discover_checked(net, x_BCHW).sizes() == {"first": 8}
    if how != "logarithm":  # some of whose outputs are numbers
        with pytest.raises(StructureError, match=r"numbers that are none of torch's|is nowhere finite"):
            discover(net, x_BCHW, check=True)


@pytest.mark.parametrize("how", ["dropout", "noise", "sample"])
def test_what_draws_is_compared_as_if_all_numbers_were_the_same(how: str) -> None:
    register_op("flip", pass_through)
    torch.manual_seed(0)
    x_BCHW = torch.randn(2, 3, 8, 8)
    assert discover(Drawing(how), x_BCHW, check=True).sizes() == {"first": 8}
    with pytest.raises(StructureError, match="another order of its channels the network is another function"):
        discover(FlippedDrawing(how), x_BCHW, check=True)


def test_what_is_a_number_is_compared_where_the_rest_is_none() -> None:
    register_op("flip", pass_through)
    torch.manual_seed(0)
    net, x_BCHW = FlippedDrawing("logarithm"), torch.randn(8, 3, 8, 8)
    assert discover(net, x_BCHW).sizes() == {"first": 8}
    with pytest.raises(StructureError, match="another order of its channels the network is another function"):
        discover(net, x_BCHW, check=True)
