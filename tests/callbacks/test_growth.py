"""Growth: when it happens, what it leaves as it was, how fresh channels start."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException

from elastic.callbacks import GrowOnSaturation
from elastic.data import Digits
from elastic.errors import OptionError, TrainingError
from elastic.growth.amount import Growth
from elastic.growth.triggers import Periodic, Plateau
from elastic.pruning.gates import Gate
from tests.fitted import EXACT, Script, Spy, batch, fit, outputs, prepare
from tests.programs import Killed
from tests.runs import load, load_history

GROWING = (
    *EXACT,
    "schedule=[growth]",
    "data.batch_size=512",
    "trainer.max_epochs=8",
    "callbacks.growth.until=1.0",
    "callbacks.growth.amount.factor=1.5",
    "callbacks.growth.amount.ceiling=2",
)
SLOW = pytest.mark.slow
START = {"0": 4, "3": 6, "7": 6, "10": 8}
GROWN = {"0": 6, "3": 9, "7": 9, "10": 12}
FULL = {"0": 8, "3": 12, "7": 12, "10": 16}


def scripted(patience: int) -> tuple[str, ...]:
    trigger = ("trigger.min_gain=0.1", f"trigger.patience={patience}")
    return (*GROWING, "trigger=plateau", *trigger, "callbacks.growth.monitor=fake")


def saved_sizes(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = load_history(folder)["sizes"]
    return sizes


def test_grows_when_the_trigger_says_at_the_next_epochs_start(tmp_path: Path) -> None:
    """Of these values, patience 2 and a least gain of 0.1 make epochs 3, 5 and 7 the saturated ones."""
    held: list[dict[str, int]] = []
    trained: list[dict[str, int]] = []
    steps: list[int] = []
    run = fit(
        tmp_path,
        *scripted(patience=2),
        before=(
            Script(0.1, 0.5, 0.5, 0.59, 0.0, 0.55, 0.9, 0.9),
            Spy(
                on_train_epoch_start=lambda t, m: (
                    held.append(saved_sizes(tmp_path)) if t.current_epoch else None
                ),
                on_train_batch_end=lambda t, m, *_: trained.append(m.structure.widths.sizes()),
                on_train_epoch_end=lambda t, m: steps.append(t.global_step),
            ),
        ),
    )
    per_epoch = steps[0]
    assert steps == [per_epoch * (epoch + 1) for epoch in range(8)]
    assert trained[::per_epoch] == [START] * 4 + [GROWN] * 2 + [FULL] * 2
    assert held == [START] * 4 + [GROWN] * 2 + [FULL], "saved before the growth that the epoch led to"
    assert run.module.structure.timeline == [
        {
            "epoch": epoch,
            "step": epoch * per_epoch,
            "why": "grow: fake saturated",
            "width": name,
            "before": before[name],
            "after": after[name],
        }
        for epoch, before, after in ((4, START, GROWN), (6, GROWN, FULL))
        for name in START
    ]
    written = (tmp_path / "timeline.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == run.module.structure.timeline


def test_never_grows_above_the_ceiling(tmp_path: Path) -> None:
    run = fit(tmp_path, *GROWING, "trigger=periodic", "trigger.every=1")
    assert run.module.structure.widths.sizes() == FULL
    assert sorted({event["epoch"] for event in run.module.structure.timeline}) == [1, 2], (
        "no empty events after"
    )
    assert {event["why"] for event in run.module.structure.timeline} == {"grow: by the clock"}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("until", "last"), [(0.26, 2), (0.25, 1), pytest.param(0.0, None, marks=SLOW)])
def test_nothing_grows_after_until(tmp_path: Path, until: float, last: int | None) -> None:
    """Epoch e of 8 may grow where e / 8 is less than `until`."""
    growth = ("callbacks.growth.amount.factor=1.01", "callbacks.growth.amount.ceiling=4")
    run = fit(
        tmp_path, *GROWING, "trigger=periodic", "trigger.every=1", *growth, f"callbacks.growth.until={until}"
    )
    assert max((event["epoch"] for event in run.module.structure.timeline), default=None) == last


def test_the_sanity_check_and_later_validation_are_not_observed(tmp_path: Path) -> None:
    run = fit(
        tmp_path, *GROWING, "trainer.num_sanity_val_steps=1", "trainer.max_epochs=3", "trigger=periodic"
    )
    run.trainer.validate(run.module, run.data, verbose=False)
    assert run.callbacks["growth"].trigger.observations == 3


def test_optimizer_scheduler_and_parameters_are_the_same_objects(tmp_path: Path) -> None:
    def identities(trainer: Any, module: Any) -> list[int]:
        optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        of_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
        return [id(optimizer), id(scheduler), *map(id, module.parameters()), *of_groups]

    seen: list[list[int]] = []
    moments: list[bool] = []

    def look(trainer: Any, module: Any) -> None:
        seen.append(identities(trainer, module))
        state = trainer.optimizers[0].state
        moments.append(all(state[p]["exp_avg"].shape == p.shape for p in state))

    spy = Spy(on_train_epoch_start=look)
    run = fit(tmp_path, *GROWING, "trigger=periodic", "trigger.every=1", "trainer.max_epochs=4", after=(spy,))
    assert run.module.structure.widths.sizes() == FULL
    assert len(seen) == 4 and all(ids == seen[0] for ids in seen)
    assert all(moments)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("gated", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("fresh", "preserved"),
    [
        *(("zero_out", True), ("split", True), ("gradmax", True), ("pairs", True)),
        *(("random", False), ("transfer", False)),
    ],
)
def test_growth_preserves_the_function(tmp_path: Path, fresh: str, preserved: bool, gated: bool) -> None:
    at: dict[str, torch.Tensor] = {}

    def look(when: str) -> Spy:
        def record(trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 3:
                for gate in (m for m in module.modules() if isinstance(m, Gate) and when == "before"):
                    gate.score.data[torch.rand(gate.score.shape) < 0.1] = -1
                at[when] = outputs(module, batch(trainer.datamodule)[0])

        return Spy(on_train_epoch_start=record)

    options = ("optimizer.lr=3e-2", "trigger=periodic", "trigger.every=3", "trainer.max_epochs=4")
    schedule = ("schedule=[growth,gates]",) if gated else ()
    chosen = (*GROWING, *schedule, *options, f"callbacks.growth.fresh={fresh}")
    run = fit(tmp_path, *chosen, before=(look("before"),), after=(look("after"),))
    assert {event["epoch"] for event in run.module.structure.timeline if "grow" in event["why"]} == {3}
    assert any(isinstance(m, Gate) for m in run.module.modules()) == gated
    size, change = at["before"].abs().max(), (at["before"] - at["after"]).abs().max()
    assert (change < 1e-5 * size) if preserved else (change > 1e-2 * size)


def test_pairs_learn_from_the_first_step_and_part(tmp_path: Path) -> None:
    """What writes a fresh channel gets a gradient at once; with zeros behind it it would get none."""
    moves: list[torch.Tensor] = []

    def look(trainer: Any, module: Any, batch: Any, index: int) -> None:
        if trainer.current_epoch == 1 and index < 2:
            moves.append(module.net[0].weight.detach().clone())

    options = ("trigger=periodic", "trigger.every=1", "trainer.max_epochs=2", "optimizer=sgd")
    fit(
        tmp_path,
        *(*GROWING, *options, "callbacks.growth.fresh=pairs"),
        after=(Spy(on_train_batch_start=look),),
    )
    first, second = moves
    assert torch.equal(first[4], first[5]), "grown from 4 to 6: one channel that stands twice"
    assert not torch.equal(second[4], second[5])
    pull = (second - first).flatten(1)[4:]
    assert pull.norm(dim=1).min() > 1e-4 and torch.nn.functional.cosine_similarity(*pull, dim=0) < 0


@pytest.mark.parametrize("optimizer", [pytest.param("sgd", marks=pytest.mark.slow), "adamw"])
def test_what_comes_late_learns_faster_after_a_restart_too(tmp_path: Path, optimizer: str) -> None:
    """At 2 of 4 epochs half of the run is left: at catch_up=2 fresh entries learn at four times the rate."""
    catching_up = (
        "callbacks.growth.catch_up=2",
        "trigger=periodic",
        "trigger.every=2",
        f"optimizer={optimizer}",
    )
    options = (*GROWING, "optimizer.lr=1e-2", *catching_up, "trainer.max_epochs=4")
    whole = fit(tmp_path / "whole", *options)
    weight = whole.module.net[3].weight
    rates = whole.trainer.optimizers[0].state[weight]["entry_rate"]
    assert tuple(rates.shape[:2]) == (9, 6)
    assert (rates[:6, :4] == 1).all() and (rates[6:] == 4).all() and (rates[:, 4:] == 4).all()

    def leave(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        fit(tmp_path / "parts", *options, after=(Spy(on_train_epoch_start=leave),))
    again = prepare(tmp_path / "parts", *options).fit(ckpt_path=tmp_path / "parts" / "last.ckpt")
    assert torch.equal(again.module.net[3].weight, weight)


def test_training_loss_is_watched_as_well(tmp_path: Path) -> None:
    """A gain that cannot be reached lets each epoch after the first one fire."""
    trigger = ("trigger=plateau", "trigger.mode=min", "trigger.min_gain=10", "trigger.patience=1")
    watched = ("callbacks.growth.monitor=train/loss", "trainer.max_epochs=3")
    run = fit(tmp_path, *GROWING, *trigger, *watched)
    assert {event["epoch"] for event in run.module.structure.timeline} == {2}
    assert {event["why"] for event in run.module.structure.timeline} == {"grow: train/loss saturated"}
    assert run.callbacks["growth"].trigger.best == run.callbacks["census"].history[0]["train/loss"]


@pytest.mark.parametrize(("monitor", "epochs"), [("val/auc", 0), ("train/auc", 1)])
def test_a_metric_that_is_not_logged_is_named_with_those_that_are(
    tmp_path: Path, monitor: str, epochs: int
) -> None:
    """A validation metric before anything is trained; others after the first epoch."""
    run = prepare(tmp_path, *GROWING, f"callbacks.growth.monitor={monitor}")
    with pytest.raises(
        TrainingError, match=rf"'{monitor}'.* not logged.*val/acc, val/loss.*on_epoch=True"
    ) as caught:
        run.fit()
    assert "\n" not in str(caught.value)
    assert run.trainer.global_step == epochs * run.trainer.num_training_batches


def test_an_unknown_start_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        OptionError, match=r"'zeros': choose zero_out, random, split, pairs, transfer, gradmax"
    ):
        GrowOnSaturation(Periodic(), Growth(), fresh="zeros")


def test_state_round_trip_continues_the_count(tmp_path: Path) -> None:
    """A trigger loaded half-way through its patience fires when the one that was saved would have."""
    values = [0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.6, 0.7, 0.7]
    whole = Plateau(patience=3, min_gain=0.05)
    fires = [whole.observe(v) for v in values]
    assert any(fires[5:])
    broken = GrowOnSaturation(Plateau(patience=3, min_gain=0.05), Growth())
    found = [broken.trigger.observe(v) for v in values[:5]]
    torch.save(broken.state_dict(), tmp_path / "state")
    again = GrowOnSaturation(Plateau(patience=3, min_gain=0.05), Growth())
    again.load_state_dict(load(tmp_path / "state"))
    assert found + [again.trigger.observe(v) for v in values[5:]] == fires


def test_gradmax_takes_the_images_there_are(tmp_path: Path) -> None:
    """It looks at 256 training images; a set may have fewer."""
    few = ("data.val_fraction=0.9", "data.batch_size=64", "callbacks.growth.fresh=gradmax")
    options = ("trigger=periodic", "trigger.every=1", "trainer.max_epochs=2")
    run = prepare(tmp_path, *GROWING, *few, *options)
    assert isinstance(run.data, Digits)
    run.fit()
    assert run.module.structure.widths.sizes() == GROWN


# --- depth, and growth that is replayed -------------------------------------------------------------------


RESIDUAL = (
    *("model=resnet20", "model._target_=elastic.models.resnet.resnet", "+model.blocks=2", "model.width=2"),
    *("trainer.max_epochs=4", "trigger=periodic", "trigger.every=1"),
)


@pytest.mark.parametrize(
    ("ceiling", "blocks"),
    [(1.5, 2), *(pytest.param(*both, marks=SLOW) for both in ((1, 2), (1.5, 0)))],
)
def test_stages_gain_blocks_one_at_a_time_up_to_so_many(tmp_path: Path, ceiling: float, blocks: int) -> None:
    """In depth alone, in both ways and in width alone; function and moments of what was there are kept."""
    seen: list[tuple[Any, Any]] = []
    given = (f"callbacks.growth.amount.ceiling={ceiling}", f"callbacks.growth.amount.blocks={blocks}")
    run = prepare(tmp_path, *GROWING, *RESIDUAL, *given)
    x_BCHW, _ = batch(run.data)
    kept = run.module.net.conv.weight  # type: ignore[union-attr]

    def look(trainer: Any, module: Any) -> None:
        moment = trainer.optimizers[0].state.get(kept, {}).get("exp_avg")
        seen.append((outputs(module, x_BCHW), None if moment is None else moment[:2, :, :, :].clone()))

    run.trainer.callbacks.insert(0, Spy(on_train_epoch_start=look))  # type: ignore[attr-defined]
    run.trainer.callbacks.append(Spy(on_train_epoch_start=look))  # type: ignore[attr-defined]
    run.fit()
    for before, after in zip(seen[::2], seen[1::2], strict=True):
        torch.testing.assert_close(after[0], before[0], rtol=1e-4, atol=1e-5)
        assert before[1] is None or torch.equal(after[1], before[1])
    stages = [(e["epoch"], e["stage"], e["before"]) for e in run.module.structure.timeline if "stage" in e]
    assert stages == [(1 + i, f"stage{s}", 2 + i) for i in range(blocks) for s in (1, 2, 3)]
    grown = {e["width"] for e in run.module.structure.timeline if "width" in e}
    assert bool(grown) == (ceiling > 1) and grown <= set(run.module.structure.widths)
    groups = run.trainer.optimizers[0].param_groups
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in run.module.net.parameters()} and len(held) > 40


@pytest.mark.slow
def test_a_timeline_is_replayed_on_all_of_the_training_data(tmp_path: Path) -> None:
    """Growth comes at the epochs and to the sizes of the first run; pruning is left to the second."""
    both = ("callbacks.growth.amount.blocks=1", "schedule=[growth,gates]", "callbacks.gates.penalty=1.0")
    first = fit(tmp_path / "first", *GROWING, *RESIDUAL, *both, "callbacks.growth.amount.ceiling=1.5")
    again = (f"timeline={tmp_path / 'first' / 'timeline.jsonl'}", "data.val_fraction=0", "trigger=plateau")
    second = fit(tmp_path / "second", *GROWING, *RESIDUAL[:-2], *again)
    assert len(second.data.train_set) == 1437 > len(first.data.train_set)  # type: ignore[arg-type]

    def growth(run: Any) -> list[tuple[Any, ...]]:
        events = [e for e in run.module.structure.timeline if e["after"] > e["before"]]
        return [(e["epoch"], e.get("width"), e.get("stage"), e["after"]) for e in events]

    assert growth(first) == growth(second) != []
    assert {e["why"] for e in second.module.structure.timeline} == {"grow: timeline"}


def test_what_a_run_has_beyond_the_timeline_is_left_alone(tmp_path: Path) -> None:
    """It need not have pruned what the other run had."""
    events = (("0", START["0"], 2), ("0", 2, 3), ("3", START["3"], 9))
    rows = [{"epoch": 1, "why": "", "width": w, "before": b, "after": a} for w, b, a in events]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = fit(tmp_path / "run", *GROWING, f"timeline={tmp_path / 't.jsonl'}")
    assert run.module.structure.widths.sizes() == START | {"3": 9}


@pytest.mark.slow
def test_a_timeline_of_fewer_blocks_is_refused(tmp_path: Path) -> None:
    row = {"epoch": 1, "why": "", "stage": "stage1", "before": 1, "after": 2}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    with pytest.raises(TrainingError, match="with 1 in the stage 'stage1', this network with 2"):
        fit(tmp_path, *GROWING, *RESIDUAL, f"timeline={tmp_path / 't.jsonl'}")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read .*name the timeline.jsonl of a run"),
        ("{half", "cannot be read .*name the timeline.jsonl of a run"),
        ("[1]", "is no timeline of a run"),
        ('{"epoch": 1, "why": "", "before": 1, "after": 2, "width": "stage1.0.conv1"}', "tells of 'stage1.0"),
        ('{"epoch": 1, "why": "", "before": 1, "after": 2, "stage": "stage1"}', "tells of 'stage1'"),
        (
            '{"epoch": 1, "why": "", "before": 3, "after": 9, "width": "0"}',
            "with 3 in the width '0', this network with 4",
        ),
    ],
)
def test_a_timeline_that_does_not_fit_is_refused_before_anything_is_trained(
    tmp_path: Path, text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises((InstantiationException, TrainingError), match=said):
        fit(tmp_path, *GROWING, f"timeline={tmp_path / 't.jsonl'}")
    assert not (tmp_path / "last.ckpt").exists()
