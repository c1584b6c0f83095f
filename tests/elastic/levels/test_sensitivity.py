"""What cutting each width costs and saves, and sizes chosen by it."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from elastic.errors import FileError, OptionError, StructureError
from elastic.experiments.prune import prune_run
from elastic.experiments.sensitivity import show_sensitivity
from elastic.experiments.tools.restore import restore
from elastic.experiments.train import train
from elastic.levels.importance import score_channels
from elastic.levels.sensitivity import (
    Cut,
    Evaluation,
    fit_to_budget,
    keep_best,
    measure_sensitivity,
    read_curves,
)
from elastic.levels.sizes import level_sizes
from elastic.measure.counts import count_macs
from elastic.models import convnet
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.runs import TINY, configure

EXAMPLE = torch.zeros(1, 1, 8, 8)


def make_net(useless: int = 0) -> nn.Sequential:
    """Make a network of which the second width has channels that nothing reads."""
    torch.manual_seed(0)
    net = convnet((8, 8, 8), (1,)).eval()
    with torch.no_grad():
        for layer in (net[3], net[4]):
            layer.weight[:useless] *= 1e-3
        net[7].weight[:, :useless] = 0
    return net


def evaluate(net: nn.Module) -> Evaluation:
    """Compare with what the whole network says."""
    x_BCHW = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        distance = (net.eval()(x_BCHW) - make_net(4)(x_BCHW)).square().mean().item()
    return Evaluation(distance, -distance)


def test_a_cut_costs_what_leaving_the_channels_unread_costs_and_saves_their_macs() -> None:
    net = make_net(4)
    widths = discover(net, EXAMPLE)
    scores = score_channels(net, widths)
    curves = measure_sensitivity(net, widths, EXAMPLE, evaluate, parts=(0.75, 0.5, 0.25))
    assert list(curves) == list(widths) and all(cut.latency_ms == 0 for cut in curves["3"])
    for cut in curves["3"][1:]:
        unread = copy.deepcopy(net)
        dropped = scores["3"].argsort()[: 8 - cut.channels]
        with torch.no_grad():
            unread[7].weight[:, dropped] = 0
        assert cut.loss == pytest.approx(evaluate(unread).loss, abs=1e-6)
        assert cut.metric == pytest.approx(cut.loss)
        smaller = keep_best(net, widths, {"3": cut.channels}, scores)
        assert cut.macs == count_macs(net, EXAMPLE) - count_macs(smaller, EXAMPLE)
    assert curves["3"][2].channels == 4 and curves["3"][2].loss == pytest.approx(0, abs=1e-9)
    assert curves["3"][3].loss > 1e-6 < curves["0"][1].loss


@pytest.mark.parametrize("parts", [(), (0.25, 0.5), (0.5, 0.5), (1.0, 0.5), (0.5, 0.0)])
def test_parts_descend_between_one_and_none(parts: tuple[float, ...]) -> None:
    with pytest.raises(OptionError, match="between 1 and 0, descending"):
        measure_sensitivity(nn.Sequential(), Widths({}), EXAMPLE, evaluate, parts)


def test_what_costs_nothing_goes_first_and_levels_are_parts_of_each_other() -> None:
    net = make_net(4)
    widths = discover(net, EXAMPLE)
    curves = measure_sensitivity(net, widths, EXAMPLE, evaluate)
    whole = count_macs(net, EXAMPLE)
    free = whole - curves["3"][3].macs
    small, large = level_sizes(net, widths, EXAMPLE, [0.5 * free, free], "macs", curves=curves)
    assert large == {**widths.sizes(), "3": 4}
    assert all(small[name] <= large[name] for name in widths)
    scores = score_channels(net, widths)
    for sizes, budget in ((small, 0.5 * free), (large, free)):
        assert count_macs(keep_best(net, widths, sizes, scores), EXAMPLE) <= budget
    with pytest.raises(StructureError, match="no sizes are within macs=1"):
        level_sizes(net, widths, EXAMPLE, [1.0], "macs", curves=curves)
    with pytest.raises(OptionError, match="set by to macs or latency_ms"):
        level_sizes(net, widths, EXAMPLE, [0.5], curves=curves)
    with pytest.raises(StructureError, match="nothing is known of width '0'"):
        level_sizes(net, widths, EXAMPLE, [free], "macs", curves={**curves, "0": curves["0"][1:]})


WIDTH = st.integers(4, 24)


@given(
    widths=st.dictionaries(st.sampled_from("abcd"), WIDTH, min_size=1),
    prices=st.lists(st.floats(0.5, 4), min_size=4, max_size=4),
    losses=st.lists(st.floats(0, 3), min_size=16, max_size=16),
    part=st.floats(0.5, 0.95),
    multiple=st.sampled_from([1, 2, 4]),
)
def test_sizes_are_within_the_budget_and_as_large_as_the_last_cut_allows(
    widths: dict[str, int], prices: list[float], losses: list[float], part: float, multiple: int
) -> None:
    price = dict(zip(widths, prices, strict=False))
    curves = {
        name: [
            Cut(kept, losses[4 * i + j] if j else 0.0, 0.0, price[name] * (size - kept))
            for j, kept in enumerate(dict.fromkeys([size, size // 2 + size // 4, size // 2, 1]))
        ]
        for i, (name, size) in enumerate(widths.items())
    }
    whole = sum(price[name] * size for name, size in widths.items())

    def measure(sizes: dict[str, int]) -> float:
        return sum(price[name] * size for name, size in sizes.items())

    least = measure({name: min(multiple, size) for name, size in widths.items()})
    budget = max(part * whole, least)
    large = fit_to_budget(curves, widths, budget, measure, multiple=multiple)  # type: ignore[arg-type]
    small = fit_to_budget(curves, large, least, measure, multiple=multiple)  # type: ignore[arg-type]
    for sizes, limit, above in ((large, budget, widths), (small, least, large)):
        assert measure(sizes) <= limit + 1e-9
        assert all(sizes[name] <= above[name] for name in widths)
        assert all(size % multiple == 0 or size == widths[name] for name, size in sizes.items())


@pytest.mark.slow
def test_a_run_sizes_its_levels_by_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, file = tmp_path / "first", tmp_path / "curves.json"
    options = (*TINY, "trainer.max_epochs=1", "data.batch_size=300")
    train(configure(first, *options, "schedule=static"), first)
    show_sensitivity(first, images=100, json=file, csv=tmp_path / "cuts.csv", figure=tmp_path / "cuts.png")
    assert "MACs saved" in capsys.readouterr().out and (tmp_path / "cuts.png").stat().st_size > 5_000
    curves = read_curves(file)
    assert {name: curve[0].channels for name, curve in curves.items()} == {"0": 4, "3": 6, "7": 6, "10": 8}
    joint = (
        "schedule=joint",
        "callbacks.joint.by=macs",
        "callbacks.joint.fractions=[15000]",
        f"init={first}",
    )
    summary = train(
        configure(tmp_path / "second", *options, *joint, f"callbacks.joint.sensitivity={file}"),
        tmp_path / "second",
    )
    assert 10_000 < summary["levels"][0]["macs"] <= 15_000
    macs = restore(first).summary["macs"]
    for by in ("l1", "sensitivity"):
        prune_run(first, tmp_path / by, part=0.6, by=by)
        pruned = restore(tmp_path / by)
        assert 0.3 * macs < pruned.summary["macs"] <= 0.6 * macs
        assert pruned.network.run(pruned.example).shape == (1, 10)
        assert "val/acc" not in pruned.summary, "nobody has validated what is left"
    assert restore(first).summary["val/acc"] > 0
    with pytest.raises(FileError, match="already"):
        prune_run(first, tmp_path / "l1")


WITHOUT_NUMBERS = '{"0": [{"channels": 4, "loss": NaN, "metric": 0, "macs": 0}]}'


@pytest.mark.parametrize(
    "text", ["", "[]", "{}[", WITHOUT_NUMBERS, '{"0": []}', '{"0": [{"channels": 1}]}', '{"0": 3}']
)
def test_a_file_of_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "curves.json").write_text(text)
    with pytest.raises(FileError, match="holds no sensitivity"):
        read_curves(tmp_path / "curves.json")
    with pytest.raises(FileError, match="holds no sensitivity"):
        read_curves(tmp_path / "missing.json")
