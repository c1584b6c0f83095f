"""The LightningModule: steps, seeds, schedules, structure, and runs that go wrong."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d
from torch.optim import SGD, AdamW, lr_scheduler

from elastic.callbacks import ElasticCallback
from elastic.errors import StructureError, TrainingError
from elastic.experiments.train import train
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import convnet, resnet20
from elastic.pruning import gates
from elastic.surgery.fresh import draw_he_normal
from elastic.surgery.reindexing import grow_index
from elastic.training.module import ElasticClassifier
from elastic.training.own_parameters import OwnOptimizers
from tests.fitted import EXACT, Run, Spy, fit, outputs, prepare
from tests.resuming import assert_same
from tests.runs import TINY, configure, load

STATIC = (*EXACT, "schedule=static", "data.batch_size=512")
PLAIN_SGD = (
    *("optimizer=sgd", "lr_scheduler=constant", "optimizer.lr=0.1"),
    *("optimizer.momentum=0", "optimizer.nesterov=false"),
    "optimizer.weight_decay=0",
)
CHANGING = (
    *TINY,
    "experiment=smoke",
    "trainer.max_epochs=3",
    "trigger=periodic",
    "trigger.every=2",
    "callbacks.growth.until=0.9",
    "callbacks.gates.begin=0.0",
)


def module(seed: int = 0, **options: Any) -> ElasticClassifier:
    torch.manual_seed(0)
    optimizer = options.pop("optimizer", partial(AdamW, lr=1e-3, weight_decay=0.1))
    return ElasticClassifier(convnet((4, 6, 6, 8)), (1, 8, 8), 10, optimizer, seed=seed, **options)


def attached(**options: Any) -> ElasticClassifier:
    """As if in a run of 40 steps."""
    made = module(**options)
    loop = SimpleNamespace(setup_data=lambda: None)
    made._trainer = SimpleNamespace(estimated_stepping_batches=40, num_training_batches=8, fit_loop=loop)  # type: ignore[assignment]
    return made


# --- steps --------------------------------------------------------------------------------------------------


def test_the_first_step_is_that_of_plain_torch(tmp_path: Path) -> None:
    """-lr times the gradient of the smoothed cross entropy plus what callbacks add."""
    held: dict[str, Any] = {}

    class Pull(ElasticCallback):
        def compute_loss(self, output: Any, *inputs: Any, **named: Any) -> Tensor:
            return 0.1 * self.structure.net[0].weight.square().sum()  # type: ignore[index, no-any-return]

    def look(trainer: Any, m: ElasticClassifier, given: Any, index: int) -> None:
        held.update(batch=given, net=copy.deepcopy(m.net))

    options = ("trainer.max_epochs=1", "label_smoothing=0.1")
    run = prepare(tmp_path, *STATIC, *PLAIN_SGD, *options, after=(Pull(), Spy(on_train_batch_start=look)))
    run.trainer.fit_loop.epoch_loop.max_steps = 1
    run.fit()
    net, (x_BCHW, y_B) = held["net"].train(), held["batch"]
    loss = F.cross_entropy(net(x_BCHW), y_B, label_smoothing=0.1) + 0.1 * net[0].weight.square().sum()
    gradients = torch.autograd.grad(loss, list(net.parameters()))
    for old, gradient, new in zip(net.parameters(), gradients, run.module.net.parameters(), strict=True):
        assert torch.allclose(new, old - 0.1 * gradient, atol=1e-6)


def test_validation_loss_is_the_plain_cross_entropy_of_all_images(tmp_path: Path) -> None:
    """Neither smoothing nor penalties; batches of unequal size weigh by their images."""
    options = ("label_smoothing=0.2", "data.batch_size=100", "trainer.max_epochs=1")
    run = fit(tmp_path, *EXACT, "schedule=[gates]", "callbacks.gates.begin=0.0", *options)
    x_BCHW, y_B = run.data.val_set.__getitems__(list(range(len(run.data.val_set))))  # type: ignore[union-attr]
    logits_BK = outputs(run.module, run.data.normalise(x_BCHW.float() / 255))
    metrics = run.trainer.callback_metrics
    assert float(metrics["val/loss"]) == pytest.approx(F.cross_entropy(logits_BK, y_B).item(), rel=1e-5)
    assert float(metrics["val/acc"]) == pytest.approx((logits_BK.argmax(1) == y_B).float().mean().item())


def test_weights_decay_and_nothing_else_does() -> None:
    made = attached()
    gates.attach_gates(made.net, made.structure.widths, "weight")
    optimizer = made.configure_optimizers()
    scores = OwnOptimizers([optimizer], made.structure.list_own_parameters()).optimizers[0].param_groups
    decayed, free = optimizer.param_groups
    names = {id(p): name for name, p in made.net.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert [names[id(p)] for p in decayed["params"]] == [
        f"{i}.parametrizations.weight.original" for i in (0, 3, 7, 10, 16)
    ]
    stepped = sum(len(group["params"]) for group in (decayed, free, *scores))
    assert stepped == len(names) and [group["weight_decay"] for group in scores] == [0.0]


def test_a_schedule_lasts_as_long_as_the_run() -> None:
    made = attached(scheduler=lr_scheduler.CosineAnnealingLR).configure_optimizers()
    assert made["lr_scheduler"]["scheduler"].T_max == 40
    part = attached(scheduler=lr_scheduler.CosineAnnealingLR)
    part.structure.schedule_fraction = 0.25
    assert part.configure_optimizers()["lr_scheduler"]["scheduler"].T_max == 10
    assert isinstance(attached().configure_optimizers(), AdamW)


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_the_default_optimizers_learn(tmp_path: Path, optimizer: str) -> None:
    rate = {"adamw": 3e-2, "sgd": 0.3}[optimizer]
    options = (f"optimizer={optimizer}", f"optimizer.lr={rate}", "trainer.max_epochs=6")
    run = fit(tmp_path, *EXACT, "schedule=static", "data.batch_size=64", *options)
    assert float(run.trainer.callback_metrics["val/acc"]) > 0.8
    scheduler: Any = run.trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.total_steps == run.trainer.global_step == scheduler.last_epoch


# --- seeds --------------------------------------------------------------------------------------------------


def end_of(folder: Path, *options: str) -> dict[str, Any]:
    train(configure(folder, *CHANGING, *options), folder)
    return load(folder / "last.ckpt")


def test_the_same_seed_gives_the_same_run_bit_for_bit(tmp_path: Path) -> None:
    one, two, other = (end_of(tmp_path / str(i), f"seed={seed}") for i, seed in enumerate((0, 0, 1)))
    assert one["state_dict"]["structure._extra_state"]["timeline"]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "elastic"):
        assert_same(one[key], two[key], key)
    files = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(3)]
    assert files[0] == files[1] != files[2]
    assert not torch.equal(one["state_dict"]["net.1.running_mean"], other["state_dict"]["net.1.running_mean"])


def test_what_was_drawn_before_does_not_matter(tmp_path: Path) -> None:
    """The global generator's state when a run starts is no part of it."""
    one = end_of(tmp_path / "a", "trainer.max_epochs=2")
    torch.rand(100)
    assert_same(one["state_dict"], end_of(tmp_path / "b", "trainer.max_epochs=2")["state_dict"])


def test_each_event_of_each_run_has_randomness_of_its_own() -> None:
    def drawn(made: ElasticClassifier) -> list[float]:
        return torch.rand(4, generator=made.structure.make_generator()).tolist()

    zero, again, one = module(0), module(0), module(1)
    assert drawn(zero) == drawn(zero) == drawn(again) != drawn(one)
    first = drawn(zero)
    zero.structure.restructure({"0": grow_index(4, 1)}, "grow: test")
    assert drawn(zero) not in (first, drawn(one))


@pytest.mark.parametrize(
    ("net", "levels", "precision", "last"),
    [
        (lambda: resnet20(4, in_channels=1), (), "32-true", False),
        (lambda: resnet20(16, in_channels=1), (), "32-true", True),
        (lambda: resnet20(16, in_channels=1), (0.5,), "32-true", False),  # its core reads 8
        (lambda: resnet20(4, in_channels=1), (), "bf16-mixed", True),
        (lambda: convnet((4, 6, 6, 8)), (), "32-true", True),
    ],
)
def test_no_layout_is_trained_in_that_torch_cannot_differentiate_safely(
    net: Callable[[], nn.Module], levels: tuple[float, ...], precision: str, last: bool
) -> None:
    """Strided 1×1 convolutions in fp32 that read fewer channels than 16: it may crash, or not."""
    own = ElasticClassifier(net(), (1, 8, 8), 10, torch.optim.SGD)
    structure = own.structure
    if levels:
        sizes = level_sizes(own.net, structure.widths, structure.example, levels)
        structure.nest(Levels(own.net, structure.widths, sizes))
    structure.trainer = trainer_on_cpu(precision)
    structure.lay_out()
    assert laid_out_last(own.net) == last


def test_a_run_lays_its_network_out_by_its_precision(tmp_path: Path) -> None:
    options = (
        "schedule=static",
        "data.batch_size=512",
        "trainer.max_epochs=1",
        "+trainer.limit_train_batches=1",
    )
    run = fit(tmp_path, *EXACT, *options, "model=resnet20", "model.width=2")
    assert not laid_out_last(run.module.net)


def trainer_on_cpu(precision: str) -> Any:
    """Make what a structure asks of a run in one process."""
    strategy = SimpleNamespace(root_device=torch.device("cpu"), model=None)
    place = {"current_epoch": 0, "global_step": 0, "world_size": 1, "optimizers": []}
    place["lightning_module"] = nn.Identity()
    return SimpleNamespace(strategy=strategy, precision=precision, **place)


def laid_out_last(net: nn.Module) -> bool:
    wide = [m.weight for m in net.modules() if isinstance(m, Conv2d) and m.kernel_size == (3, 3)]
    (last,) = {w.is_contiguous(memory_format=torch.channels_last) for w in wide if w.shape[1] > 1}
    assert all(w.is_contiguous() != last for w in wide if w.shape[1] > 1)
    return last


def test_what_has_no_images_keeps_its_layout() -> None:
    net = nn.Sequential(nn.Conv3d(1, 4, 3), nn.ReLU(), nn.Conv3d(4, 3, 3))
    module = ElasticClassifier(net, (1, 6, 6, 6), 3, SGD)  # type: ignore[arg-type]
    assert module(torch.randn(2, 1, 6, 6, 6)).shape == (2, 3, 2, 2, 2)
    assert all(parameter.is_contiguous() for parameter in net.parameters())


def test_the_layout_follows_what_grows() -> None:
    net = resnet20(8, in_channels=1)
    made = ElasticClassifier(net, (1, 8, 8), 10, torch.optim.SGD)
    made.structure.copies.append(copy.deepcopy(net))
    made.structure.trainer = trainer_on_cpu("32-true")
    for size, last in ((8, False), (16, True)):
        (stream,) = (
            n
            for n, w in made.structure.widths.items()
            if "stage1.0.conv1" in {s.module for s in w.slots_with("in")}
        )
        made.structure.restructure({stream: grow_index(8, size - 8)}, "test")
        assert laid_out_last(made.net) == laid_out_last(made.structure.copies[0]) == last


def test_levels_are_moved_with_their_network() -> None:
    torch.manual_seed(0)
    own = module()
    half = {name: max(1, width.size // 2) for name, width in own.structure.widths.items()}
    own.structure.nest(Levels(own.net, own.structure.widths, [half]))
    x_BCHW = torch.randn(2, *own.structure.example.shape[1:])
    with torch.no_grad():
        expected = own.eval().structure.run(0, x_BCHW)
        own.double()
        assert own.structure.levels is not None
        torch.testing.assert_close(own.structure.levels[0](x_BCHW.double()).float(), expected)
        next(own.net.parameters()).zero_()
        assert not torch.allclose(own.structure.levels[0](x_BCHW.double()).float(), expected)


# --- structure ----------------------------------------------------------------------------------------------


def test_restructure_notes_every_width_and_takes_copies_along() -> None:
    made = module()
    twin = copy.deepcopy(made.net)
    made.structure.copies.append(twin)
    made.structure.restructure(
        {"0": grow_index(4, 2), "7": [5, 0, 1]}, "test", lambda p, g: draw_he_normal(p.weight, g)
    )
    place = {"epoch": 0, "step": 0, "why": "test"}
    assert made.structure.timeline == [
        {**place, "width": "0", "before": 4, "after": 6},
        {**place, "width": "7", "before": 6, "after": 3},
    ]
    x_BCHW = torch.randn(3, 1, 8, 8)
    assert twin(x_BCHW).shape == made(x_BCHW).shape
    assert [p.shape for p in twin.parameters()] == [p.shape for p in made.net.parameters()]
    assert made.structure.start_sizes == {"0": 4, "3": 6, "7": 6, "10": 8}


def test_a_restructuring_that_fails_leaves_no_event() -> None:
    made = module()
    with pytest.raises(StructureError):
        made.structure.restructure({"0": [0, 7]}, "test")
    assert made.structure.timeline == [] and made.structure.widths.sizes() == made.structure.start_sizes


def test_a_state_of_other_widths_is_taken() -> None:
    one, two = module(), module()
    for made in (one, two):
        gates.attach_gates(made.net, made.structure.widths, "kernel")
    one.structure.restructure({"0": grow_index(4, 3), "3": [0, 2]}, "test")
    two.load_state_dict(one.state_dict())
    assert two.structure.widths.sizes() == {"0": 7, "3": 2, "7": 6, "10": 8}
    assert_same(one.state_dict(), two.state_dict())
    x_BCHW = torch.randn(3, 1, 8, 8)
    assert torch.equal(one.eval()(x_BCHW), two.eval()(x_BCHW))


def test_parameters_stay_the_same_objects_when_a_state_is_loaded() -> None:
    """Optimizers have been built on them by then."""
    one, two = module(), module()
    one.structure.restructure({"0": grow_index(4, 3)}, "test")
    before = [id(p) for p in two.parameters()]
    two.load_state_dict(one.state_dict())
    assert [id(p) for p in two.parameters()] == before


def test_a_module_that_refuses_a_state_is_as_it_was() -> None:
    one, two = module(), module()
    gates.attach_gates(one.net, one.structure.widths, "kernel")
    one.structure.restructure({"0": grow_index(4, 3)}, "test")
    before = copy.deepcopy(two.state_dict())
    state = one.state_dict()
    del state["net.10.parametrizations.weight.original"]
    with pytest.raises(StructureError, match="another architecture: it lacks"):
        two.load_state_dict(state)
    assert_same(two.state_dict(), before)
    two.load_state_dict(before)


def test_a_checkpoint_of_another_start_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, *STATIC, "trainer.max_epochs=1")
    run = prepare(tmp_path / "other", *STATIC, "trainer.max_epochs=2", "model.channels=[5,6,6,8]")
    with pytest.raises(TrainingError, match=r"started as .*'0': 4.*starts as .*'0': 5") as caught:
        run.fit(ckpt_path=tmp_path / "last.ckpt")
    assert "\n" not in str(caught.value)


# --- runs that go wrong -------------------------------------------------------------------------------------


def broken(folder: Path, epoch: int, *options: str) -> str:
    """The message of a run whose weights become NaN in an epoch."""

    def spoil(trainer: Any, m: ElasticClassifier, *_: Any) -> None:
        if trainer.current_epoch == epoch:
            m.net[0].weight.data.fill_(float("nan"))

    spy = Spy(on_train_batch_start=spoil)
    with pytest.raises(TrainingError) as caught:
        fit(folder, *STATIC, "trainer.max_epochs=4", *options, after=(spy,))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tensors(state: dict[str, Any]) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)]


def continued(folder: Path) -> Run:
    run = prepare(folder, *STATIC, "trainer.max_epochs=4")
    return run.fit(ckpt_path=folder / "last.ckpt")


def test_a_loss_that_is_not_a_number_ends_the_run_and_the_epochs_before_are_kept(tmp_path: Path) -> None:
    message = broken(tmp_path / "broken", 2)
    assert "epoch 2" in message and "nan" in message and "saved" in message
    held = load(tmp_path / "broken" / "last.ckpt")
    assert held["epoch"] == 1
    assert all(value.isfinite().all() for value in tensors(held["state_dict"]))
    whole = fit(tmp_path / "whole", *STATIC, "trainer.max_epochs=4")
    assert_same(whole.module.state_dict(), continued(tmp_path / "broken").module.state_dict())


def test_the_remedy_names_a_setting_that_exists(tmp_path: Path) -> None:
    """`optimizer.lr` would be answered by 'Could not override'."""
    assert "optimizer.lr" in broken(tmp_path, 1)


def test_nothing_is_promised_where_no_epoch_was_saved(tmp_path: Path) -> None:
    message = broken(tmp_path, 0)
    assert not (tmp_path / "last.ckpt").exists()
    assert "saved" not in message


def test_one_batch_that_is_not_a_number_is_enough(tmp_path: Path) -> None:
    """Its loss must not drop out of the epoch's mean."""

    def spoil(trainer: Any, m: ElasticClassifier, given: Any, index: int) -> None:
        if trainer.current_epoch == 1 and index == 1:
            m.net[0].weight.data.fill_(float("nan"))

    with pytest.raises(TrainingError, match=r"nan in epoch 1"):
        fit(tmp_path, *STATIC, "trainer.max_epochs=2", after=(Spy(on_train_batch_start=spoil),))


def test_a_gradient_of_nan_in_the_last_batch_is_not_saved(tmp_path: Path) -> None:
    """The epoch's losses were finite; its last step spoilt the weights. What is saved must be sound."""

    def spoil(trainer: Any, m: ElasticClassifier, optimizer: Any) -> None:
        if trainer.current_epoch == 1 and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            m.net[0].weight.grad.fill_(float("nan"))  # type: ignore[union-attr]

    with pytest.raises(TrainingError):
        fit(tmp_path, *STATIC, "trainer.max_epochs=4", after=(Spy(on_before_optimizer_step=spoil),))
    held = load(tmp_path / "last.ckpt")["state_dict"]
    assert all(value.isfinite().all() for value in tensors(held))


def test_an_epoch_without_validation_is_looked_at_before_it_is_saved(tmp_path: Path) -> None:
    assert "epoch 0" in broken(tmp_path, 0, "+trainer.check_val_every_n_epoch=2")
    assert not (tmp_path / "last.ckpt").exists()


def test_what_is_logged_of_an_epochs_training_is_of_that_epoch_alone(tmp_path: Path) -> None:
    """However often there is validation, which training does not depend on."""
    options = (*STATIC, "trainer.max_epochs=2")
    runs = [fit(tmp_path, *options, f"+trainer.check_val_every_n_epoch={every}") for every in (1, 2)]
    metrics = [run.trainer.callback_metrics for run in runs]
    for name in ("train/loss", "train/acc", "val/loss"):
        assert torch.equal(*(each[name] for each in metrics)), name


def test_the_module_takes_any_torch_optimizer() -> None:
    assert isinstance(attached(optimizer=partial(SGD, lr=0.1)).configure_optimizers(), SGD)
