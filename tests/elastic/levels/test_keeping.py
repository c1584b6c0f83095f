"""What the forward of a level keeps in modules, where a program looks for it: in its network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic import Levels
from elastic.training.structure import Structure
from tests.elastic.zoo import PROGRAMS, Net

X = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def keep(m: Any, x: Tensor, empties: bool) -> Tensor:
    if x.shape[2:] not in m.sizes:
        m.sizes.append(x.shape[2:])  # a cache, of the level's own channels
        m.grids["one"] = torch.ones(1, m.stem.out_channels, 1, 1)
    y = m.stem(x) * m.grids["one"]
    if empties:
        m.maps.clear()
    m.maps.append(y)
    m.maps.append((y, m.mid(y)))
    m.named["stem"], m.first = y, {"stem": y}
    return m.last(m.maps[-1][1])  # type: ignore[no-any-return]


def make_structure(empties: bool, dynamic: bool) -> tuple[Any, Structure]:
    torch.manual_seed(0)
    layers = {"stem": nn.Conv2d(3, 4, 1), "mid": nn.Conv2d(4, 4, 1), "last": nn.Conv2d(4, 2, 1)}
    state: dict[str, Any] = {"maps": [], "sizes": [], "named": {}, "grids": {}, "first": None}
    net: Any = Net(lambda m, x: keep(m, x, empties), **state, **layers)
    structure = Structure(net, X[0])
    structure.nest(Levels(net, structure.widths, [{"mid": 1}, {"mid": 3}]))
    if dynamic:
        structure.attach_dynamic()
    return net.train(), structure


def list_kept(net: Any) -> dict[str, Any]:
    return {name: vars(net)[name] for name in ("maps", "named", "first")}


@pytest.mark.sampled(10)
@pytest.mark.parametrize("is_emptied", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("empties", [False, True])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_the_network_keeps_what_its_active_level_keeps(
    level: int, empties: bool, dynamic: bool, is_emptied: Callable[[int], bool]
) -> None:
    """As often as a network of this size alone would."""
    net, structure = make_structure(empties, dynamic)
    structure.level = level
    expected: list[Any] = []
    for k, x in enumerate(X):
        if is_emptied(k):
            net.maps.clear()
            expected.clear()
        structure.run_active(x)
        for other in {0, 1, 2} - {level}:
            structure.run(other, x)
        y = net.first["stem"]
        assert y.requires_grad and net.named["stem"] is y and net.maps[-1][0] is y
        torch.testing.assert_close(y, net.stem(x))
        assert net.maps[-1][1].grad_fn is not None
        expected = [] if empties else expected
        expected += [y, net.maps[-1]]
        assert len(net.maps) == len(expected)
        assert all(a is b for a, b in zip(net.maps, expected, strict=True))


def test_levels_hold_nothing_of_the_steps_before() -> None:
    net, structure = make_structure(empties=False, dynamic=False)
    for x in X:
        net.maps.clear()
        structure.run_active(x)
        for k in range(2):
            structure.run(k, x)
    assert [len(level.maps) for level in structure.nets] == [0, 0, 2]  # type: ignore[arg-type]


def test_caches_are_each_levels_own() -> None:
    _, structure = make_structure(empties=False, dynamic=False)
    for k in (0, 1, 2, 0):
        structure.level = k
        structure.run_active(X[0])
    assert all(len(level.sizes) == 1 for level in structure.nets)  # type: ignore[arg-type]
    grids = [level.grids["one"] for level in structure.nets]  # type: ignore[index, union-attr]
    assert len(set(map(id, grids))) == 3


def test_a_loss_on_what_a_level_keeps_trains_the_network() -> None:
    net, structure = make_structure(empties=True, dynamic=False)
    structure.level = 0
    for x in X:
        net.zero_grad()
        structure.run_active(x)
        net.first["stem"].square().mean().backward()
        assert net.stem.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_a_hook_computes_stay_the_networks() -> None:
    net, structure = make_structure(empties=True, dynamic=False)
    torch.nn.utils.prune.identity(net.stem, "weight")
    structure = Structure(net, X[0])
    structure.nest(Levels(net, structure.widths, [{"mid": 1}]))
    net(X[0])
    before = net.stem.weight
    structure.level = 0
    structure.run_active(X[0])
    assert net.stem.weight is before and structure.nets[0].stem.weight is not before  # type: ignore[union-attr]
    assert net.first["stem"].requires_grad
