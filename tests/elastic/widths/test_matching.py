"""Widths that are not those of the model that they are given with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from elastic import (
    Levels,
    Widths,
    attach_gates,
    attach_modules,
    census,
    compact,
    deepen,
    discover,
    level_sizes,
    reindex,
)
from elastic.errors import OptionError, StructureError
from elastic.models import resnet20
from elastic.pruning.gates import iterate_gates

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Use = Callable[[nn.Module, Widths], object]
USES: dict[str, Use] = {
    "attach_gates": lambda net, widths: attach_gates(net, widths, "weight"),
    "attach_modules": attach_modules,
    "census": lambda net, widths: census(net, widths, X),
    "deepen": lambda net, widths: deepen(net, widths, "stage1"),
    "Levels": lambda net, widths: Levels(net, widths, [{"conv": 2}]),
    "level_sizes": lambda net, widths: level_sizes(net, widths, X, [0.5]),
    "reindex": lambda net, widths: reindex(net, widths, {"stage1.0.conv1": [0, 1]}),
}


def prune(net: nn.Module) -> nn.Module:
    """Make a network of fewer channels, as gates that are shut leave it."""
    widths = discover(net, X)
    attach_gates(net, widths, "channel")
    for _, _, gate in iterate_gates(net):
        with torch.no_grad():
            gate.score[: len(gate.score) // 2] = -10.0
    return compact(net, X)


def replace_layer(net: nn.Module) -> nn.Module:
    net.stage1[0].conv1 = nn.Identity()  # type: ignore[union-attr, index, assignment]
    return net


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "narrower": lambda: resnet20(width=2),
    "another": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)),
    "pruned": lambda: prune(resnet20(width=4)),
    "changed": lambda: replace_layer(resnet20(width=4)),
}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_widths_of_another_network_are_refused_in_a_line(use: Use, make: Callable[[], nn.Module]) -> None:
    widths = discover(resnet20(width=4), X)
    net = make()
    before = {name: tensor.shape for name, tensor in net.state_dict().items()}
    with pytest.raises(StructureError, match=r"^these are not the widths of the .*: .*; give those") as error:
        use(net, widths)
    assert "\n" not in str(error.value)
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == before


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("other", [X, {"conv": 4}, None], ids=["example", "sizes", "none"])
def test_what_is_no_widths_is_refused_in_a_line(use: Use, other: Tensor | dict[str, int] | None) -> None:
    with pytest.raises(OptionError, match=f"^a {type(other).__name__} is no widths: give those"):
        use(resnet20(width=4), other)  # type: ignore[arg-type]


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_own_widths_are_taken_gates_or_not(use: Use) -> None:
    net = resnet20(width=4)
    widths = discover(net, X)
    use(net, widths)
    reindex(net, widths, {"stage1.1.conv1": [3, 1, 0]})
    assert discover(net, X).sizes() == widths.sizes()
