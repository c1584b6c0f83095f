"""The magnitude control: the path it follows, what it closes, what leaves, what is trained and what not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic.callbacks import PruneByMagnitude
from elastic.errors import OptionError, TrainingError
from elastic.experiments.train import train
from elastic.measure import counts
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.folding import fold_gates
from elastic.training.module import ElasticClassifier
from tests.fitted import EXACT, Spy, batch, fit, outputs, prepare
from tests.resuming import assert_same_run, kill
from tests.runs import configure

FULL = 1146  # parameters of the network
FIRST = FULL - 24  # where norms' shifts are still zero
SMALLEST = ("schedule=[magnitude]", "callbacks.magnitude.begin=0.25", "callbacks.magnitude.end=0.75")
PRUNING = (*EXACT, *SMALLEST, "data.batch_size=512", "trainer.max_epochs=8", "optimizer.lr=2e-2")


def compacted(module: ElasticClassifier) -> int:
    return counts.count_params(compact(module.net, module.structure.example))


def masks(module: ElasticClassifier) -> list[Tensor]:
    return [gate.score.detach() > 0 for _, _, gate in gates.iterate_gates(module.net)]


def magnitudes(module: ElasticClassifier) -> list[Tensor]:
    return [
        layer.parametrizations.weight.original.detach().abs()  # type: ignore[union-attr,index]
        for _, layer, _ in gates.iterate_gates(module.net)
    ]


def sizes(folder: Path, *options: str) -> list[int]:
    """The compacted network's parameters in each epoch."""
    found: dict[int, int] = {}

    def look(trainer: Any, module: Any, *_: Any) -> None:
        found.setdefault(trainer.current_epoch, compacted(module))

    fit(folder, *PRUNING, *options, after=(Spy(on_train_batch_start=look),))
    return list(found.values())


def test_the_compacted_network_follows_the_cubic_path_to_the_budget(tmp_path: Path) -> None:
    """Zhu & Gupta's formula by hand: all up to epoch 2 of 8, 400 from epoch 6 on; never above."""
    found = sizes(tmp_path, "callbacks.magnitude.budget=400")
    path = [400 + (FULL - 400) * (1 - (epoch - 2) / 4) ** 3 for epoch in range(2, 7)]
    assert path[0] == FULL and path[-1] == 400
    for got, allowed in zip(found[2:7], path, strict=True):
        assert allowed - 1 < got <= allowed
    assert found[:2] == [FIRST, FULL] and found[7] == 400


def test_the_budget_is_met_where_the_end_lies_behind_the_last_epoch(tmp_path: Path) -> None:
    options = ("trainer.max_epochs=3", "callbacks.magnitude.end=1.0", "callbacks.magnitude.budget=600")
    assert sizes(tmp_path, *options)[-1] == 600


def test_nothing_is_closed_where_the_budget_is_larger_than_the_network(tmp_path: Path) -> None:
    run = fit(tmp_path, *PRUNING, "callbacks.magnitude.budget=5000")
    assert all(mask.all() for mask in masks(run.module)) and not run.module.structure.timeline
    report = run.callbacks["magnitude"].report()
    assert (report["budget/target"], report["budget/actual"]) == (5000, FULL)
    assert report["budget/reason"].startswith("all gates that are left are open")


def test_the_smallest_weights_are_closed_for_good_and_only_they(tmp_path: Path) -> None:
    """At each step: no open weight, but for the largest of its layer, is smaller than one closed just now."""
    before: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    steps: list[int] = []

    def was(trainer: Any, module: Any) -> None:
        before[trainer.current_epoch] = [m.clone() for m in magnitudes(module)], masks(module)

    def look(trainer: Any, module: Any) -> None:
        values, old = before[trainer.current_epoch]
        new = masks(module)
        assert all((then | ~now).all() for then, now in zip(old, new, strict=True)), "one has opened again"
        if closed := [v[then & ~now] for v, then, now in zip(values, old, new, strict=True)]:
            kept = [v[now].sort().values[:-1] for v, now in zip(values, new, strict=True)]
            assert torch.cat(kept).min() >= max([0.0, *torch.cat(closed).tolist()])
            steps.append(sum(map(len, closed)))

    spies = {"before": (Spy(on_train_epoch_start=was),), "after": (Spy(on_train_epoch_start=look),)}
    run = fit(tmp_path, *PRUNING, "callbacks.magnitude.budget=900", **spies)
    assert not run.module.structure.timeline, "channels have left: positions are no longer comparable"
    assert [count > 0 for count in steps] == [False] * 3 + [True] * 4 + [False]


def test_nothing_trains_the_gates_and_the_loss_is_the_tasks(tmp_path: Path) -> None:
    """The scores are 1 or -1 throughout, momentum and decay or not; the loss is the cross entropy alone."""
    task: list[float] = []
    total: list[float] = []

    def before_step(trainer: Any, module: Any, given: Any, index: int) -> None:
        x_BCHW, y_B = given
        if index == 0:
            task.append(F.cross_entropy(fold_gates(module.net).train()(x_BCHW), y_B).item())
        assert all(not gate.score.requires_grad for _, _, gate in gates.iterate_gates(module.net))

    def after_step(trainer: Any, module: Any, out: Any, given: Any, index: int) -> None:
        if index == 0:
            total.append(out["loss"].item())

    spy = Spy(on_train_batch_start=before_step, on_train_batch_end=after_step)
    run = fit(tmp_path, *PRUNING, "callbacks.magnitude.budget=500", "optimizer=sgd", after=(spy,))
    assert total == pytest.approx(task, rel=1e-5) and len(total) == 8
    found = {
        value for _, _, gate in gates.iterate_gates(run.module.net) for value in gate.score.unique().tolist()
    }
    assert found == {-1.0, 1.0}


def test_the_weights_that_stay_go_on_learning(tmp_path: Path) -> None:
    at: dict[int, Tensor] = {}

    def look(trainer: Any, module: Any) -> None:
        at[trainer.current_epoch] = torch.cat([w.flatten() for w in magnitudes(module)]).clone()

    run = fit(tmp_path, *PRUNING, "callbacks.magnitude.budget=900", after=(Spy(on_train_epoch_end=look),))
    open_ = torch.cat([mask.flatten() for mask in masks(run.module)])
    assert (at[6][open_] != at[7][open_]).float().mean() > 0.9


def test_dead_channels_leave_and_the_output_stays(tmp_path: Path) -> None:
    seen: dict[int, Tensor] = {}
    checked: list[int] = []

    def settled(trainer: Any, module: Any) -> None:
        """As the callback closes gates, before anything leaves."""
        seen[trainer.current_epoch] = outputs(module, batch(trainer.datamodule)[0])

    def after(trainer: Any, module: Any) -> None:
        epoch = trainer.current_epoch
        if any(event["epoch"] == epoch for event in module.structure.timeline):
            now = outputs(module, batch(trainer.datamodule)[0])
            assert (seen[epoch] - now).abs().max() <= 1e-5 * now.abs().max()
            checked.append(epoch)

    run = prepare(
        tmp_path, *PRUNING, "callbacks.magnitude.budget=150", after=(Spy(on_train_epoch_start=after),)
    )
    restructure = run.module.structure.restructure

    def noted(*given: Any, **options: Any) -> None:
        settled(run.trainer, run.module)
        restructure(*given, **options)

    run.module.structure.restructure = noted  # type: ignore[method-assign]
    run.fit()
    assert checked, "no channel died: the test shows nothing"
    assert {event["why"] for event in run.module.structure.timeline} == {"prune: channels without effect"}
    assert all(event["after"] < event["before"] for event in run.module.structure.timeline)
    plain = compact(run.module.net, run.module.structure.example)
    x_BCHW, _ = batch(run.data)
    assert torch.allclose(plain(x_BCHW), outputs(run.module, x_BCHW), atol=1e-5)
    assert counts.count_params(plain) <= 150


def test_a_network_that_has_grown_is_pruned_from_its_full_size(tmp_path: Path) -> None:
    growing = ("schedule=[growth,magnitude]", "trigger=periodic", "trigger.every=1")
    given = (*growing, "callbacks.growth.until=0.2", "callbacks.growth.fresh=random")
    run = fit(tmp_path, *PRUNING, *given, "callbacks.magnitude.budget=600")
    assert any(event["why"].startswith("grow") for event in run.module.structure.timeline)
    assert run.callbacks["magnitude"].budget.peak > 1.5 * FULL
    assert compacted(run.module) == 600


@pytest.mark.slow
def test_a_run_killed_and_continued_is_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: killed between the steps."""
    growing = (
        "schedule=[growth,magnitude]",
        "trigger=periodic",
        "trigger.every=1",
        "callbacks.growth.until=0.3",
    )
    given = (*PRUNING, "callbacks.magnitude.budget=200", *growing)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    summary = train(configure(whole, *given), whole)
    kill(configure(broken, *given), broken, monkeypatch, 5, 1)
    train(configure(broken, *given), broken)
    events = [json.loads(line) for line in (whole / "timeline.jsonl").read_text().splitlines()]
    pruned = {event["epoch"] for event in events if event["why"].startswith("prune")}
    assert min(pruned) < 5 <= max(pruned), "channels have left before and after it is killed"
    assert_same_run(whole, broken)
    assert summary["schedule"] == "growth+magnitude" and summary["params"] <= 200


@pytest.mark.parametrize("schedule", ["[gates,magnitude]", "[magnitude,gates]"])
def test_gates_and_magnitude_do_not_prune_one_network(tmp_path: Path, schedule: str) -> None:
    with pytest.raises(TrainingError, match="by gates and by magnitude") as caught:
        fit(tmp_path, *PRUNING, f"schedule={schedule}", "callbacks.magnitude.budget=500")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given", [{"budget": 0}, {"budget": 9, "begin": 0.9, "end": 0.1}, {"budget": 9, "end": 1.5}]
)
def test_a_path_that_cannot_be_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        PruneByMagnitude(**given)
