"""Operations of one's own, and what a rule that is at fault leads to."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import elastic
from elastic import discover, grow_index, register_op, reindex
from elastic.errors import OptionError, StructureError
from elastic.widths import Axes, NotFollowed, Rule, Tracker
from elastic.widths.operations import LAYERS, TABLE
from elastic.widths.operations.interface import get_axes, get_input
from tests.elastic.zoo import Net, conv, head

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class ChannelScale(nn.Module):
    """A layer of a user's: one factor a channel, by a loop over channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.stack([x_BCHW[:, c] * factor for c, factor in enumerate(self.factor)], 1)


class LoudChannelScale(ChannelScale):
    """Another with the same forward."""


class TwiceChannelScale(ChannelScale):
    """One with a forward of its own, which the rule does not know."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return super().forward(super().forward(x_BCHW.flip(1)))


def scale_channels(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `ChannelScale`."""
    x = get_axes(get_input(node))
    tracker.record(str(node.target), "factor", 0, "per_channel", x[1])
    return x


def double(x_BCHW: Tensor) -> Tensor:
    return torch.cat([x_BCHW, x_BCHW], 1)


torch.fx.wrap("double")


@pytest.fixture(autouse=True)
def clean_table() -> Iterator[None]:
    """Take back what a test registers."""
    before = TABLE.layers.copy(), TABLE.functions.copy(), TABLE.names.copy(), TABLE.leaves.copy()
    yield
    TABLE.layers, TABLE.functions, TABLE.names, TABLE.leaves = before
    TABLE.bases.clear()


def scaled(layer: type[nn.Module] = ChannelScale) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conv(3, 4), layer(4), conv(4, 5), head(5))


def doubled() -> nn.Module:
    torch.manual_seed(0)
    return Net(lambda m, x: m.head(m.last(double(m.stem(x)))), stem=conv(3, 4), last=conv(8, 5), head=head(5))


def test_without_a_rule_it_is_refused_by_name() -> None:
    assert discover(scaled(), X).fixed["0"].endswith("in 1 picks single channels")
    assert discover(doubled(), X).fixed["stem"] == "double() in the model's forward cannot be followed"


@pytest.mark.parametrize("layer", [ChannelScale, LoudChannelScale])
def test_a_layer_of_ones_own_is_followed(layer: type[nn.Module]) -> None:
    register_op(ChannelScale, scale_channels)
    model = scaled(layer).eval()
    widths = discover(model, X)
    assert widths.sizes() == {"0": 4, "2": 5}
    assert "1.factor" in {f"{slot.module}.{slot.tensor}" for slot in widths["0"].slots}
    expected = model(X).detach()
    reindex(model, widths, {"0": [*grow_index(4, 2).tolist()[::-1]]})
    assert model.get_parameter("1.factor").shape == (6,)
    torch.testing.assert_close(model(X), expected)


def test_a_subclass_with_a_forward_of_its_own_does_not_take_the_rule() -> None:
    register_op(ChannelScale, scale_channels)
    assert "0" in discover(scaled(TwiceChannelScale), X).fixed


def test_a_function_of_ones_own_is_followed() -> None:
    def repeat_channels(tracker: Tracker, node: fx.Node) -> Axes:
        batch, channels, *space = get_axes(get_input(node))
        assert channels is not None
        return (batch, torch.tensor(channels).repeat(2).numpy(), *space)

    register_op(double, repeat_channels)
    model = doubled().eval()
    widths = discover(model, X)
    assert widths.sizes() == {"stem": 4, "last": 5}
    expected = model(X).detach()
    reindex(model, widths, {"stem": [2, -1, 0, 1, 3]})
    torch.testing.assert_close(model(X), expected)


def test_a_method_is_followed_by_name() -> None:
    model = Net(lambda m, x: m.head(m.stem(x).polygamma(1)), stem=conv(3, 4), head=head(4))
    assert not elastic.widths.find_widths(model, X)
    register_op("polygamma", lambda tracker, node: get_axes(get_input(node)))
    assert discover(model, X).sizes() == {"stem": 4}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda tracker, node: node.kwargs["nothing"], "KeyError: 'nothing'"),
        (lambda tracker, node: node.args[5], "IndexError"),
        (lambda tracker, node: get_axes(get_input(node))[:2], "AssertionError: it gives axes of"),
        (lambda tracker, node: None, "AssertionError: it gives axes of"),
        (lambda tracker, node: tracker.get_layer(node, nn.Conv2d), "TypeError: it is for a Conv2d"),
        (lambda tracker, node: tracker.begin("1", "weight", "out"), "LookupError: 1 has no tensor weight"),
    ],
)
def test_a_fault_in_a_rule_is_an_error_with_the_nodes_name(rule: Rule, message: str) -> None:
    register_op(ChannelScale, rule)
    with pytest.raises(StructureError, match=r"the rule <lambda> is at fault at 1 \(ChannelScale\)") as fault:
        discover(scaled(), X)
    assert message in str(fault.value) and "\n" not in str(fault.value)


def test_a_rule_may_decline() -> None:
    def decline(tracker: Tracker, node: fx.Node) -> Axes:
        raise NotFollowed("scales by a loop")

    register_op(ChannelScale, decline)
    widths = discover(scaled(), X)
    assert widths.fixed["0"] == "1 (ChannelScale) cannot be followed: it scales by a loop"
    assert widths.sizes() == {"2": 5}


@pytest.mark.parametrize("operation", [3, None, ["relu"]])
def test_what_is_no_operation_is_refused(operation: object) -> None:
    with pytest.raises(OptionError, match="is no operation"):
        register_op(operation, scale_channels)  # type: ignore[arg-type]


def relu(x_BCHW: Tensor) -> Tensor:
    """Not torch's."""
    return x_BCHW.flip(1)


torch.fx.wrap("relu")


def test_a_users_function_is_not_taken_for_torchs_of_the_same_name() -> None:
    model = Net(lambda m, x: m.head(relu(m.stem(x))), stem=conv(3, 4), head=head(4))
    assert "relu() in the model's forward" in elastic.widths.find_widths(model, X).fixed["stem"]


def test_every_operation_has_one_rule() -> None:
    kinds = [kind for kinds in LAYERS.values() for kind in kinds]
    assert len(kinds) == len(set(kinds))


# Of NumPy's names for arguments, torch's functions take these for their own.
NUMPY = {"dim": "axis", "keepdim": "keepdims"}
BY_NAME: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "cat": (lambda x, y, **named: torch.cat([x, y], **named), {"dim": 1}),
    "concatenate": (lambda x, y, **named: torch.concatenate((x, y), **named), {"dim": 1}),
    "stack": (lambda x, y, **named: torch.stack([x, y], **named)[:, 0], {"dim": 1}),
    "unsqueeze": (lambda x, y, **named: x.unsqueeze(**named)[:, 0] + y, {"dim": 1}),
    "squeeze": (lambda x, y, **named: torch.squeeze(x[:, None], **named) + y, {"dim": 1}),
    "unbind": (lambda x, y, **named: x.unbind(**named)[0][..., None] + y, {"dim": 3}),
    "chunk": (
        lambda x, y, **named: torch.cat(x.chunk(2, **named)) + torch.cat([y[:, :, :3]] * 2),
        {"dim": 2},
    ),
    "mean": (lambda x, y, **named: x.mean(**named) * y, {"dim": (2, 3), "keepdim": True}),
    "sum": (lambda x, y, **named: torch.sum(x, **named) + y, {"dim": 3, "keepdim": True}),
    "max": (lambda x, y, **named: torch.max(x, **named)[0] + y, {"dim": 3, "keepdim": True}),
    "amax": (lambda x, y, **named: x.amax(**named) * y, {"dim": (2, 3), "keepdim": True}),
    "std": (lambda x, y, **named: x.std(**named) * y, {"dim": (2, 3), "keepdim": True}),
    "softmax": (lambda x, y, **named: torch.softmax(x, **named) * y, {"dim": 2}),
    "cumsum": (lambda x, y, **named: x.cumsum(**named) + y, {"dim": 2}),
    "argmax": (lambda x, y, **named: x.argmax(**named) + y, {"dim": 2, "keepdim": True}),
    "index_select": (lambda x, y, **named: x.index_select(index=torch.arange(6), **named) + y, {"dim": 2}),
    "repeat": (lambda x, y, **named: x.repeat_interleave(2, **named), {"dim": 2}),
}


@pytest.mark.parametrize(("call", "named"), BY_NAME.values(), ids=BY_NAME)
def test_arguments_may_have_numpys_names(call: Callable[..., Any], named: dict[str, Any]) -> None:
    def find_widths(named: dict[str, Any]) -> tuple[dict[str, int], dict[str, str]]:
        def forward(m: Any, x: Tensor) -> Tensor:
            return m.out(call(m.one(x), m.two(x), **named))  # type: ignore[no-any-return]

        read = 8 if call in (BY_NAME["cat"][0], BY_NAME["concatenate"][0]) else 4
        widths = discover(Net(forward, one=conv(3, 4), two=conv(3, 4), out=head(read)), X, check=True)
        return widths.sizes(), dict(widths.fixed)

    assert find_widths({NUMPY[name]: value for name, value in named.items()}) == find_widths(named)
