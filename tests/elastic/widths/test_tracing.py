"""Networks are traced once where that is enough, and shapes known without a call are those of torch."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.widths.discovery import discover
from elastic.widths.tracing import make_meta_copy, trace_modes
from elastic.widths.tracing.shapes import infer_call, infer_layer

X = torch.empty(2, 6, 9, 8, device="meta")
COLUMN = torch.empty(6, 1, 1, device="meta")


class Switching(nn.Module):
    """Use the mode in the way that it is told."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, self.first(x)))


@pytest.mark.parametrize(
    ("use", "graphs"),
    [
        (lambda net, x: net.second(F.dropout(x, 0.1, net.training)), 1),
        (lambda net, x: x if net.training else net.second(x), 2),
        (lambda net, x: x if net.training is True else net.second(x), 2),
        (lambda net, x: net.second(x) * (1 + int(net.training)), 2),
    ],
    ids=["passed", "decides", "compared", "counted"],
)
def test_what_the_mode_is_used_for_tells_whether_one_graph_is_enough(
    use: Callable[[nn.Module, Tensor], Tensor], graphs: int
) -> None:
    net, x = Switching(use), torch.zeros(2, 3, 9, 9)
    assert len(trace_modes(make_meta_copy(net), x.to("meta"))) == graphs
    assert {"first", "second"} >= set(discover(net, x)) >= {"first"}
    assert net.training is True


LAYERS = [
    nn.Conv2d(6, 4, 3, 2, padding=(1, 2), dilation=2, device="meta"),
    nn.Conv2d(6, 12, (3, 1), groups=6, bias=False, device="meta"),
    nn.Linear(8, 5, device="meta"),
    nn.AdaptiveAvgPool2d((None, 3)),
]
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (torch.cat, ([X, X[:, :0], X], 1)),
    (torch.cat, ((X, X), -1)),
    (operator.mul, (COLUMN, X)),
    (operator.add, (X, 2)),
    (operator.iadd, (X.clone(), COLUMN)),
    (F.adaptive_avg_pool2d, (X, 1)),
    (F.gelu, (X,)),
    ("add_", (X.clone(), X)),
]


def same(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.dtype, first.stride()) == (second.shape, second.dtype, second.stride())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layers_shape_is_that_of_its_call(layer: nn.Module) -> None:
    inferred = infer_layer(layer, (X,), {})
    assert inferred is not None and same(inferred, layer(X))
    assert infer_layer(layer, (torch.zeros(2, 6, 9, 8),), {}) is None  # it is computed


@pytest.mark.parametrize(("target", "args"), CALLS)
def test_a_functions_shape_is_that_of_its_call(target: Any, args: tuple[Any, ...]) -> None:
    inferred = infer_call(target, args, {})
    called = getattr(args[0], target)(*args[1:]) if isinstance(target, str) else target(*args)
    assert inferred is not None and same(inferred, called)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (torch.cat, ([X, X[:, :, :4]], 1)),  # which torch refuses
        (operator.iadd, (COLUMN, X)),
        (operator.mul, (X, X.to(torch.float64))),  # of another type
        (operator.add, (X.permute(0, 2, 3, 1), X.permute(0, 2, 3, 1)[..., :1])),  # laid out in another way
    ],
)
def test_what_is_not_known_is_called(target: Any, args: tuple[Any, ...]) -> None:
    assert infer_call(target, args, {}) is None
