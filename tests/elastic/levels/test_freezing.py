"""Phases against the run they divide, and what they freeze against the bits it had."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from elastic.errors import OptionError
from elastic.levels.freezing import FrozenPart, Phase, plan_phases
from elastic.levels.nested import Levels
from elastic.levels.sizes import make_resized
from tests.elastic.levels.nets import built, halves, nested, norms, shared, step

# --- phases ------------------------------------------------------------------------------------------------

parts = st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.3, 0.4, 1 / 3, 0.5, 1.0])


@given(st.integers(2, 6), st.integers(1, 120), parts, parts)
@settings(max_examples=150)
def test_phases_cover_the_run_in_order_or_are_refused(
    levels: int, epochs: int, dense: float, prune: float
) -> None:
    top, grow = levels - 1, 1 - dense - prune
    shares = [dense] * (dense != 0) + [prune / top] * top + [grow / top] * top
    try:
        found = plan_phases(levels, epochs, dense, prune)
    except OptionError as error:
        assert "\n" not in str(error) and "trainer.max_epochs" in str(error)
        assert min(shares) * epochs < 1, "each phase would have had an epoch"
        return
    assert min(shares) > 0
    assert [epoch for phase in found for epoch in phase.epochs] == list(range(epochs))
    trained = [(phase.level, phase.grown) for phase in found]
    down, up = [(k, False) for k in range(top - 1, -1, -1)], [(k, True) for k in range(1, levels)]
    assert trained == [(top, False)] * (dense > 0) + down + up
    for phase, share in zip(found, shares, strict=True):
        assert phase.epochs and abs(len(phase.epochs) - share * epochs) <= 1


def test_the_run_of_the_documentation() -> None:
    assert plan_phases(4, 100, 0.4, 0.3) == [
        Phase(3, False, range(0, 40)),
        *(Phase(2, False, range(40, 50)), Phase(1, False, range(50, 60)), Phase(0, False, range(60, 70))),
        *(Phase(1, True, range(70, 80)), Phase(2, True, range(80, 90)), Phase(3, True, range(90, 100))),
    ]


@pytest.mark.parametrize(
    ("given_", "named"),
    [
        ((4, 5, 0.4, 0.3), "of 5 epochs none is left to train level 2"),
        ((2, 9, 0.0, 0.0), "of 9 epochs none is left to train level 0"),
        ((2, 9, 0.5, 0.5), "of 9 epochs none is left to grow level 1"),
        ((2, 9, 0.9, 0.5), "none is left to grow level 1"),
        ((2, 9, 1.5, 0.5), "none is left"),
        ((2, 9, -0.2, 0.5), "dense=-0.2"),
        ((3, 9, 0.2, -0.5), "prune=-0.5"),
    ],
)
def test_a_phase_without_an_epoch_is_refused(given_: Any, named: str) -> None:
    with pytest.raises(OptionError) as caught:
        plan_phases(*given_)
    assert named in str(caught.value) and "\n" not in str(caught.value)


# --- what is frozen ----------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, weight_decay=0.1),
}


def members(levels: Levels, k: int) -> dict[str, Tensor]:
    """Which entries of each tensor level k holds: a network of numbered entries is cut down to it."""
    numbered = make_resized(levels.net, levels.widths, levels.sizes[-1])
    for _, tensor in shared(numbered):
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    left = dict(shared(make_resized(numbered, levels.widths, levels.sizes[k])))
    return {n: torch.isin(t.detach(), left[n].detach()) for n, t in shared(numbered)}


def check_frozen(name: str, phase: Phase, optimizer: str) -> None:
    """Steps from a state in which every entry has momentum: what must move moves, the rest keeps its bits."""
    net, x, widths = built(name)
    levels = nested(net.double().train(), widths, halves(widths, 0.3, 0.7))
    levels.norms.double()
    x = x.double()
    parameters = [*net.parameters(), *levels.norms.parameters()]
    made = OPTIMIZERS[optimizer](parameters)
    for k in range(len(levels)):  # momentum for all
        step(lambda x, k=k: levels.run(k, x), x)
        made.step()
    made.zero_grad(set_to_none=True)
    inner = members(levels, phase.level)
    if phase.grown:
        below = members(levels, phase.level - 1)
        inner = {n: mask & ~below[n] for n, mask in inner.items()}

    before = {n: t.detach().clone() for n, t in shared(net)}
    norms_before = {n: [p.detach().clone() for p in m.parameters()] for n, m in _norms(levels).items()}
    frozen = FrozenPart(levels, phase)
    for _ in range(3):
        step(lambda x: levels.run(phase.level, x), x)
        made.step()
        made.zero_grad(set_to_none=True)
        frozen.restore()
    moved = 0
    for tensor, now in shared(net):
        mask = inner[tensor]
        assert torch.equal(now[~mask], before[tensor][~mask]), tensor
        assert isinstance(now, nn.Parameter) and now.is_leaf and now.requires_grad
        if now.dim() > 1:
            assert (now[mask] != before[tensor][mask]).all(), tensor
            moved += int(mask.sum())
    assert moved
    for (k, path), norm in _norms(levels).items():
        if k != phase.level:
            held = norms_before[k, path]
            assert all(torch.equal(a, b) for a, b in zip(held, norm.parameters(), strict=True)), (k, path)


def _norms(levels: Levels) -> dict[tuple[int, str], nn.Module]:
    return {(k, path): norm for k, level in enumerate(levels) for path, norm in norms(level).items()}


PHASES = [
    Phase(k, grown, range(1)) for k, grown in [(2, False), (1, False), (0, False), (1, True), (2, True)]
]
every_phase = pytest.mark.parametrize(
    "phase", PHASES, ids=[f"{'grow' if p.grown else 'train'}{p.level}" for p in PHASES]
)


@pytest.mark.sampled(8)
@every_phase
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_is_frozen_keeps_its_bits_and_the_rest_is_trained(phase: Phase, optimizer: str) -> None:
    check_frozen("convnet", phase, optimizer)


@pytest.mark.sampled(4)
@every_phase
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        "convnext",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("densenet", "resnext", "mobilenet_v2")),
    ],
)
def test_so_it_is_in_networks_of_many_kinds(name: str, phase: Phase) -> None:
    check_frozen(name, phase, "adamw")


def test_the_levels_see_what_is_restored() -> None:
    net, _, widths = built("convnet")
    levels = Levels(net, widths, halves(widths, 0.3, 0.7))
    before = {n: t.clone() for n, t in levels[0].state_dict().items()}
    frozen = FrozenPart(levels, Phase(1, True, range(1)))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_()
    frozen.restore()
    assert all(torch.equal(before[n], t) for n, t in levels[0].state_dict().items())


def test_a_value_that_is_no_number_is_kept_too() -> None:
    """Restored is copied, not computed: not even by adding zero."""
    net, _, widths = built("convnet")
    levels = Levels(net, widths, halves(widths, 0.5))
    strange = torch.tensor([-0.0, float("nan"), float("inf"), 1e-42])
    with torch.no_grad():
        net[0].weight.view(-1)[:4] = strange  # type: ignore[index, union-attr, operator]
    frozen = FrozenPart(levels, Phase(1, True, range(1)))
    with torch.no_grad():
        net[0].weight.add_(1.0)  # type: ignore[index, union-attr, operator]
    frozen.restore()
    held: Any = net[0].weight.detach().view(-1)[:4]  # type: ignore[index, union-attr, operator]
    assert torch.equal(held.view(torch.int32), strange.view(torch.int32))
