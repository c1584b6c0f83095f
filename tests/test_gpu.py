"""On a CUDA device: no step waits for it, runs end as on a CPU, half precision, resuming, compiling."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from elastic.experiments.tools.summary import measure_network
from elastic.experiments.train import make_network
from tests.fitted import EXACT, Run, Spy, prepare
from tests.programs import Killed

pytestmark = pytest.mark.gpu

GPU = (*EXACT, "trainer.accelerator=gpu", "data.batch_size=64", "trainer.log_every_n_steps=10")
GROWING = (
    *("trigger=periodic", "trigger.every=1", "callbacks.growth.until=0.5"),
    *("callbacks.growth.amount.factor=1.5", "callbacks.gates.begin=0.0"),
)
SCHEDULES = {
    "growth, gates and an average": (
        *("schedule=[growth,gates,ema]", *GROWING, "callbacks.gates.budget=3000"),
        "callbacks.ema.decay=0.9",
    ),
    "channel gates by MACs": (
        *("schedule=gates", "callbacks.gates.grain=channel", "callbacks.gates.by=macs"),
        "callbacks.gates.begin=0.0",
    ),
    "levels at once": ("schedule=joint",),
    "kernels per input": ("schedule=dynamic", "callbacks.dynamic.begin=0.0"),
}


class Watch(L.Callback):
    """Lets nothing wait for the device from the end of one batch to the end of another."""

    def __init__(self, first: int = 1, last: int = 7) -> None:
        self.first, self.last, self.batches = first, last, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        batch_idx = args[-1]
        if batch_idx == self.first:
            torch.cuda.set_sync_debug_mode("error")
        if self.first < batch_idx <= self.last:
            self.batches += 1
        if batch_idx == self.last:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_no_step_waits_for_the_device(tmp_path: Path, schedule: tuple[str, ...]) -> None:
    watch = Watch()
    try:
        prepare(tmp_path, *GPU, *schedule, after=(watch,)).fit()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.batches


def test_batches_are_gathered_on_the_device_in_the_order_of_a_cpu(tmp_path: Path) -> None:
    batches: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"gpu": [], "cpu": []}
    for place, taken in batches.items():
        run = prepare(
            tmp_path / place,
            *GPU,
            f"trainer.accelerator={place}",
            "schedule=static",
            "trainer.max_epochs=1",
            after=(Spy(on_train_batch_start=lambda t, m, batch, i, taken=taken: taken.append(batch)),),
        ).fit()
        assert run.data.train_set.dataset.images.is_cuda == (place == "gpu")
    for (x, y), (x_cpu, y_cpu) in zip(*batches.values(), strict=True):
        assert torch.equal(y.cpu(), y_cpu)
        torch.testing.assert_close(x.cpu(), x_cpu)


def test_a_run_ends_near_that_of_a_cpu_and_is_measured_alike_on_both(tmp_path: Path) -> None:
    ends = {}
    for place in ("gpu", "cpu"):
        words = (*SCHEDULES["growth, gates and an average"], f"trainer.accelerator={place}")
        ends[place] = prepare(tmp_path / place, *GPU, *words).fit()
    gpu, cpu = ([row for row in ends[p].module.structure.timeline if "grow" in row["why"]] for p in ends)
    assert gpu and [(row["epoch"], row["width"]) for row in gpu] == [(r["epoch"], r["width"]) for r in cpu]
    x, _ = ends["gpu"].data.sample(64, 0)
    with torch.no_grad():
        on_gpu = copy.deepcopy(ends["gpu"].module.net).eval().cuda()(x.cuda())
    network = make_network(ends["gpu"].module.cpu().structure)
    with torch.no_grad():
        torch.testing.assert_close(network.plain()(x), on_gpu.cpu(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed"])
def test_half_precision_grows_prunes_and_learns(tmp_path: Path, precision: str) -> None:
    losses: list[float] = []

    def note(trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            losses.append(float(trainer.callback_metrics["val/loss"]))

    words = (*SCHEDULES["growth, gates and an average"], f"trainer.precision={precision}")
    epochs = ("trainer.max_epochs=8", "optimizer.lr=5e-3")
    run = prepare(tmp_path, *GPU, *words, *epochs, after=(Spy(on_validation_end=note),)).fit()
    assert min(losses) < losses[0] / 2 and all(torch.tensor(losses).isfinite())  # at the end gates are cut
    assert any(row["why"].startswith("grow") for row in run.module.structure.timeline)
    report = run.callbacks["gates"].report()
    assert report["budget/actual"] == pytest.approx(report["budget/target"], rel=0.02)


class Kill(L.Callback):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 2:
            raise Killed


def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    words = (*GPU, *SCHEDULES["growth, gates and an average"], "trainer.max_epochs=4")
    words = (*words, "+trainer.deterministic=true", "+trainer.benchmark=false")
    whole = prepare(tmp_path / "whole", *words).fit()
    with pytest.raises(Killed):
        prepare(tmp_path / "killed", *words, after=(Kill(),)).fit()
    again = prepare(tmp_path / "killed", *words)
    again.trainer.ckpt_path = tmp_path / "killed/last.ckpt"
    again.fit()
    _assert_equal(whole, again)


def _assert_equal(first: Run, second: Run) -> None:
    states = [run.module.state_dict() for run in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name]), name


def test_kernels_per_input_are_counted_where_the_run_has_left_its_images(tmp_path: Path) -> None:
    run = prepare(tmp_path, *GPU, *SCHEDULES["kernels per input"], "trainer.max_epochs=1").fit()
    network = make_network(run.module.cpu().structure)
    row = measure_network(network, run.data, run.module.task)
    assert 0 < row["macs_dynamic"] <= row["macs"]


@pytest.mark.filterwarnings("ignore:TensorFloat32")
def test_a_network_that_grows_is_compiled_anew(tmp_path: Path) -> None:
    from elastic.training.compilation import compile_network

    run = prepare(tmp_path, *GPU, "schedule=growth", *GROWING[:4], "trainer.max_epochs=3")
    compile_network(run.module.net)
    run.fit()
    x, _ = run.data.sample(64, 0)
    net = run.module.net.eval().cuda()
    with torch.no_grad():
        torch.testing.assert_close(net(x.cuda()), net.forward(x.cuda()), rtol=1e-2, atol=1e-2)
