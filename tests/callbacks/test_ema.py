"""Averaged weights: what they are, how they follow growth and pruning, that a resumed run has the same."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.callbacks import ElasticCallback
from elastic.pruning import gates
from elastic.surgery.fresh import STRATEGIES
from elastic.training.module import ElasticClassifier
from tests.fitted import EXACT, Run, Spy, prepare
from tests.programs import Killed
from tests.resuming import Kill, assert_same
from tests.runs import load

DECAY = 0.8
AVERAGED = (
    *EXACT,
    *("data.batch_size=512", "trainer.max_epochs=4", "optimizer.lr=3e-2"),
    f"callbacks.ema.decay={DECAY}",
)
GROWING = (
    *("trigger=periodic", "trigger.every=2", "callbacks.growth.until=1.0"),
    "callbacks.growth.amount.factor=1.5",
)
GATED = (
    *("callbacks.gates.begin=0.0", "callbacks.gates.grain=kernel", "callbacks.gates.penalty=3e-1"),
    *("callbacks.gates.grace=1", "callbacks.gates.budget=null"),
)


def tensors(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def averaged(module: ElasticClassifier) -> nn.Module:
    """The averaged network, while the run is under way."""
    (net,) = module.structure.copies
    return net


def counts(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def widened(old: Tensor, new: Tensor) -> Tensor:
    """`new` with `old` in its first channels."""
    wide = new.clone()
    wide[tuple(slice(size) for size in old.shape)] = old
    return wide


@pytest.mark.parametrize("fresh", [pytest.param("zero_out", marks=pytest.mark.slow), "random"])
def test_the_model_ends_as_the_average_over_all_steps_through_growth(tmp_path: Path, fresh: str) -> None:
    """Averaged by hand: a_1 = w_1, a_t = d a_(t-1) + (1 - d) w_t; fresh entries start at the model's."""
    own: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}

    def widen(trainer: Any, module: Any) -> None:
        now = tensors(module.net)
        own.update({name: widened(value, now[name]) for name, value in own.items()})

    def average(trainer: Any, module: Any, *_: Any) -> None:
        trained.update(tensors(module.net))
        for name, now in trained.items():
            before = own.get(name, now)
            own[name] = now if counts(name) else DECAY * before + (1 - DECAY) * now

    chosen = (*AVERAGED, "schedule=[growth,ema]", *GROWING, f"callbacks.growth.fresh={fresh}")
    spy = Spy(on_train_epoch_start=widen, on_train_batch_end=average)
    run = prepare(tmp_path, *chosen, after=(spy,)).fit()
    assert {event["epoch"] for event in run.module.structure.timeline} == {2}
    for name, value in tensors(run.module.net).items():
        torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-6)
        assert counts(name) or not torch.equal(value, trained[name]), "not what was trained last"


STEPS, SINCE = "+callbacks.ema.update_every_n_steps", "+callbacks.ema.update_starting_at"
LATE = {  # of 5 epochs of 6 steps: the arguments, and the steps and epochs after which the average is updated
    "inside an epoch": ([f"{SINCE}_step=14"], range(14, 30), ()),
    "at the start of an epoch": ([f"{SINCE}_step=12"], range(12, 30), ()),
    "every third step": ([f"{SINCE}_step=12", f"{STEPS}=3"], range(12, 30, 3), ()),
    "at the end of epochs": ([f"{SINCE}_epoch=2", f"{STEPS}=0"], (), (2, 3, 4)),
}
DEEP = (
    *("model=resnet20", "model._target_=elastic.models.resnet.resnet", "+model.blocks=2"),
    "model.width=2",
    "callbacks.growth.amount.blocks=1",
    "callbacks.growth.amount.ceiling=2",
)


@pytest.mark.parametrize(
    ("start", "model"),
    [
        pytest.param("inside an epoch", DEEP, marks=pytest.mark.slow),
        ("at the end of epochs", ()),
        *(pytest.param(start, (), marks=pytest.mark.slow) for start in list(LATE)[:3]),
    ],
)
def test_an_average_that_starts_late_follows_growth_before_at_and_after_its_start(
    tmp_path: Path, start: str, model: tuple[str, ...]
) -> None:
    """Averaged by hand, a_1 = w_1 where it starts. Before, it is what is trained; counts always are."""
    given, steps, epochs = LATE[start]
    decay = 0.9  # 0.9 n + 0.1 n is less than n for some counts
    own: dict[str, Tensor] = {}
    trained: dict[str, Tensor] = {}
    begun: list[bool] = []

    def check(module: Any) -> None:
        found, model = tensors(averaged(module)), tensors(module.net)
        assert {name: v.shape for name, v in found.items()} == {name: v.shape for name, v in model.items()}
        for name, value in found.items():
            torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-6)

    def follow(trainer: Any, module: Any) -> None:
        for name, now in tensors(module.net).items():
            own[name] = widened(own[name], now) if name in own else now
        check(module)

    def update(module: Any, due: bool) -> None:
        trained.update(tensors(module.net))
        for name, now in trained.items():
            if counts(name) or not begun:
                own[name] = now
            elif due:
                own[name] = decay * own[name] + (1 - decay) * now
        begun.extend([True] * due)
        check(module)

    spy = Spy(
        on_train_epoch_start=follow,
        on_train_batch_end=lambda trainer, module, *_: update(module, trainer.global_step - 1 in steps),
        on_train_epoch_end=lambda trainer, module: update(module, trainer.current_epoch in epochs),
    )
    when = ("trigger.every=1", "callbacks.growth.until=0.8", "trainer.max_epochs=5", "data.batch_size=200")
    chosen = (*AVERAGED, f"callbacks.ema.decay={decay}", "schedule=[growth,ema]", *GROWING, *when)
    run = prepare(tmp_path, *chosen, *model, *given, after=(spy,)).fit()
    assert run.trainer.global_step == 30 and len(begun) == len(steps) + len(epochs)
    grown = {event["epoch"] for event in run.module.structure.timeline if "width" in event}
    assert grown == ({1, 2} if model else {1, 2, 3})
    assert sum("stage" in event for event in run.module.structure.timeline) == (3 if model else 0)
    for name, value in tensors(run.module.net).items():
        torch.testing.assert_close(value, own[name], rtol=1e-5, atol=1e-6)
        assert counts(name) or not torch.equal(value, trained[name]), "not what was trained last"


# The layers that the width of the first convolution reaches, and the dimension it has there.
REACHED = {"0": 0, "1": 0, "3": 1}


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_kept_channels_keep_their_average_and_fresh_ones_are_the_models(tmp_path: Path, gated: bool) -> None:
    index = [2, 0, -1, 3, -1]
    seen: list[str] = []

    def change(trainer: Any, module: Any) -> None:
        if trainer.current_epoch != 2:
            return
        before = tensors(averaged(module))
        module.structure.restructure({"0": index}, "test", STRATEGIES["random"])
        model, after = tensors(module.net), tensors(averaged(module))
        for name, value in after.items():
            expected, dim = before[name], REACHED.get(name.partition(".")[0])
            if dim is not None and value.dim() > dim:
                expected = model[name].clone()
                for new, old in enumerate(index):
                    if old >= 0:
                        expected.select(dim, new).copy_(before[name].select(dim, old))
                assert not torch.equal(expected, model[name]) or name.endswith("grace")
                seen.append(name)
            assert torch.equal(value, expected), name

    schedule = ("schedule=[gates,ema]", *GATED) if gated else ("schedule=[ema]",)
    run = prepare(tmp_path, *AVERAGED, *schedule, after=(Spy(on_train_epoch_start=change),)).fit()
    assert len(seen) == (10 if gated else 6) and any("score" in name for name in seen) == gated
    assert run.module.structure.widths["0"].size == 5


def test_the_average_is_what_is_validated_and_training_goes_on_without_it(tmp_path: Path) -> None:
    accuracies: list[tuple[float, float]] = []
    trained: dict[str, Tensor] = {}

    def validated(trainer: Any, module: Any) -> None:
        if trainer.sanity_checking:
            return
        assert_same(tensors(module.net), trained)
        data = trainer.datamodule
        x_BCHW, y_B = data.val_set.__getitems__(list(range(len(data.val_set))))
        logits_BK = averaged(module).eval()(data.normalise(x_BCHW.float() / 255))
        right = (logits_BK.argmax(1) == y_B).float().mean().item()
        accuracies.append((float(trainer.callback_metrics["val/acc"]), right))

    spy = Spy(
        on_train_batch_end=lambda trainer, module, *_: trained.update(tensors(module.net)),
        on_validation_end=validated,
    )
    run = prepare(tmp_path, *AVERAGED, "schedule=[growth,ema]", *GROWING, after=(spy,)).fit()
    assert (
        run.module.structure.timeline
        and len(accuracies) == 4
        and all(logged == pytest.approx(own) for logged, own in accuracies)
    )


def flatten(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out the memory format, which may differ in an average: nothing is computed with it."""
    return {
        name: (list(value.shape), value.flatten()) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def same_checkpoint(one: dict[str, Any], two: dict[str, Any]) -> None:
    for key in ("current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "elastic"):
        assert_same(one[key], two[key], key)
    assert_same(flatten(one["state_dict"]), flatten(two["state_dict"]))


@pytest.mark.slow
def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    """Killed after growth and after pruning; and continued once more when it has finished."""
    longer = ("trainer.max_epochs=6", "data.batch_size=128", "optimizer.lr=6e-2")

    def ready(name: str, *around: Any) -> Run:
        chosen = (*AVERAGED, "schedule=[ema,growth,gates]", *GROWING, *GATED, *longer)
        return prepare(tmp_path / name, *chosen, after=around)

    whole, last = ready("whole").fit(), tmp_path / "broken" / "last.ckpt"
    for epoch, batch in ((3, 1), (5, 0)):
        with pytest.raises(Killed):
            ready("broken", Kill(epoch, batch)).fit(ckpt_path=last if last.exists() else None)
    broken = ready("broken").fit(ckpt_path=last)

    events = {(event["epoch"], event["why"][:5]) for event in whole.module.structure.timeline}
    assert (2, "grow:") in events and events & {(epoch, "prune") for epoch in range(5)}
    same_checkpoint(load(tmp_path / "whole" / "last.ckpt"), load(last))
    assert_same(tensors(whole.module.net), tensors(broken.module.net))
    held = load(last)["state_dict"]
    assert all(torch.equal(value, held[f"net.{name}"]) for name, value in tensors(broken.module.net).items())
    assert_same(tensors(whole.module.net), tensors(ready("broken").fit(ckpt_path=last).module.net))


def test_frozen_gates_decide_in_the_average_as_in_the_model(tmp_path: Path) -> None:
    """Else an average that lags behind would not meet the budget."""
    frozen: list[int] = []

    def look(trainer: Any, module: Any, *_: Any) -> None:
        own = [gate.score for _, _, gate in gates.iterate_gates(module.net)]
        if own[0].requires_grad:
            return
        frozen.append(trainer.current_epoch)
        its = [gate.score for _, _, gate in gates.iterate_gates(averaged(module))]
        assert all(torch.equal(a, b) for a, b in zip(own, its, strict=True))

    slow = ("callbacks.ema.decay=0.999", "trainer.max_epochs=10", "callbacks.gates.end=0.9")
    chosen = (*AVERAGED, "schedule=[gates,ema]", *GATED, *slow, "callbacks.gates.budget=700")
    run = prepare(tmp_path, *chosen, after=(Spy(on_train_batch_end=look),)).fit()
    report = run.callbacks["gates"].report()
    assert set(frozen) == {9} and 0.8 * 700 < report["budget/actual"] <= 700


def test_counts_are_counted_not_averaged(tmp_path: Path) -> None:
    run = prepare(tmp_path, *AVERAGED, "schedule=[ema]").fit()
    held = [value for name, value in tensors(run.module.net).items() if counts(name)]
    assert held and all(int(value) == run.trainer.global_step for value in held)


class Single(ElasticCallback):
    """Answer what the loss is, and hold what cannot be copied."""

    def compute_loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor:
        return torch.zeros(())

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")


def test_a_further_fit_averages_anew_and_copies_neither_copies_nor_callbacks(tmp_path: Path) -> None:
    seen: list[Any] = []

    def look(trainer: Any, module: Any) -> None:
        twin: Any = run.callbacks["ema"]._average_model.module
        structure = twin.structure
        assert structure.copies == [] and structure.trainer is None and structure.net is twin.net
        assert twin.net is averaged(module) and twin.net._compiled_call_impl is None
        assert module.net._compiled_call_impl is not None
        seen.append(twin)

    around = {"before": (Single(),), "after": (Spy(on_fit_start=look),)}
    run = prepare(tmp_path, *AVERAGED, "schedule=[growth,ema]", *GROWING, **around)
    run.fit()
    assert not run.module.structure.copies and run.module.net._compiled_call_impl is None
    run.trainer.fit_loop.max_epochs = 7
    start = tensors(run.module.net)
    run.fit()
    assert len(seen) == 2 and seen[0] is not seen[1] and not run.module.structure.copies
    assert run.module.structure.widths["0"].size > start["0.weight"].shape[0]


def test_another_copy_stays_where_it_is(tmp_path: Path) -> None:
    run = prepare(tmp_path, *AVERAGED, "schedule=[growth,ema]", *GROWING)
    twin = copy.deepcopy(run.module.net)
    run.module.structure.copies.append(twin)
    run.fit()
    assert [id(net) for net in run.module.structure.copies] == [id(twin)]
    assert [p.shape for p in twin.parameters()] == [p.shape for p in run.module.net.parameters()]


def test_a_run_without_averages_is_continued_with_them(tmp_path: Path) -> None:
    growing = (*GROWING, "lr_scheduler=constant")
    prepare(tmp_path, *AVERAGED[:-1], "schedule=[growth]", *growing, "trainer.max_epochs=3").fit()
    run = prepare(tmp_path, *AVERAGED, "schedule=[growth,ema]", *growing)
    with pytest.warns(UserWarning, match="not created with WeightAveraging"):
        run.fit(ckpt_path=tmp_path / "last.ckpt")
    assert run.module.structure.widths["0"].size == 6 and run.trainer.current_epoch == 4


@pytest.mark.slow
def test_blocks_that_a_stage_gains_are_averaged_and_resumed(tmp_path: Path) -> None:
    """They start as the model's."""
    small = ("model=resnet20", "model._target_=elastic.models.resnet.resnet", "+model.blocks=2")
    when = ("trigger.every=1", "callbacks.growth.until=0.5", "trainer.max_epochs=3")
    chosen = (*AVERAGED, "schedule=[growth,ema]", *GROWING, *small, "model.width=2", *when)
    chosen += ("callbacks.growth.amount.blocks=1",)
    began: list[bool] = []

    def look(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            model = tensors(module.net)
            came = {name: value for name, value in tensors(averaged(module)).items() if name not in first}
            began.extend(torch.equal(value, model[name]) for name, value in came.items())

    whole = prepare(tmp_path / "whole", *chosen, after=(Spy(on_train_epoch_start=look),))
    first = tensors(whole.module.net)
    whole.fit()
    assert (
        len(began) > 10
        and all(began)
        and {event["epoch"] for event in whole.module.structure.timeline} == {1}
    )
    with pytest.raises(Killed):
        prepare(tmp_path / "broken", *chosen, after=(Kill(2, 1),)).fit()
    last = tmp_path / "broken" / "last.ckpt"
    prepare(tmp_path / "broken", *chosen).fit(ckpt_path=last)
    same_checkpoint(load(tmp_path / "whole" / "last.ckpt"), load(last))
