"""Networks and programs that are not written as most are learn what plain ones do, to the last bit."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic import (
    Growth,
    Levels,
    Periodic,
    attach_modules,
    compact,
    discover,
    level_sizes,
    load,
    make_skipping,
    save,
)
from elastic.callbacks import (
    Distil,
    FollowNetwork,
    GrowOnSaturation,
    PruneByGates,
    PruneDynamically,
    Reconstruct,
    TrainJointly,
)
from elastic.levels import make_alone
from elastic.measure import measure_latency_ms
from tests.programs import Program, fit, make_data, make_network


@dataclass(frozen=True)
class Answer:
    logits: Tensor
    note: str = ""


class Named(dict[str, Tensor]):
    @property
    def logits(self) -> Tensor:
        return self["logits"]


@dataclass
class Both(OrderedDict[str, Tensor]):
    """Be a dataclass and a dictionary of what is there, as outputs of Transformers are."""

    loss: Tensor | None = None
    logits: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) is not None:
                super().__setitem__(field.name, value)

    def __setitem__(self, name: str, value: Tensor) -> None:
        super().__setitem__(name, value)
        setattr(self, name, value)


WRAPS: dict[str, Callable[[Tensor], Any]] = {
    "dataclass": Answer,
    "dictionary": lambda logits: Named(logits=logits),
    "both": lambda logits: Both(logits=logits),
}


class Network(nn.Module):
    """Be a plain network, but for what happens to its input and its output.

    Args:
        before, after: work on these.
    """

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body = make_network()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.body(self.before(x)))


class Silent(Network):
    """Return nothing when it is brought into a mode, as mmengine's backbones do."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


class Reading(Program):
    """Read logits of an output.

    Args:
        read: reads them; of a training step alone, it may write to them.
    """

    def __init__(self, net: nn.Module, read: Callable[[Any], Tensor]) -> None:
        super().__init__(net)
        self.read = read

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.read(self.net(x_BCHW))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])


def grow() -> GrowOnSaturation:
    return GrowOnSaturation(Periodic(1), Growth(factor=1.5, ceiling=2), until=0.7)


METHODS: dict[str, Callable[[nn.Module], list[L.Callback]]] = {
    "grow and prune": lambda teacher: [grow(), PruneByGates(budget=600)],
    "joint": lambda teacher: [TrainJointly([0.5])],
    "reconstruct": lambda teacher: [Reconstruct([0.5])],
    "dynamic": lambda teacher: [PruneDynamically(2.0, activation="scale")],
    "distil": lambda teacher: [grow(), Distil(teacher)],
}


def train(
    method: str,
    before: Callable[[Tensor], Tensor] = lambda x: x,
    after: Callable[[Tensor], Any] = lambda y: y,
    read: Callable[[Any], Tensor] = lambda y: y,
    kind: type[Network] = Network,
) -> dict[str, Tensor]:
    """Train a network by one method, taught by another one of its kind; return what its body has learnt."""
    torch.manual_seed(0)
    net, teacher = kind(before, after), kind(before, after)
    fit(Reading(net, read), METHODS[method](teacher), max_epochs=5, limit_train_batches=2)
    return net.body.state_dict()


class Whole(Program):
    """Be the network itself, and have its layers."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__(nn.Identity())
        del self.net
        self.first, self.rest = layers[:3], layers[3:]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.rest(self.first(x_BCHW))  # type: ignore[no-any-return]


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_of_a_class_of_ones_own_are_trained_as_tensors_are(
    method: str, wrap: Callable[[Tensor], Any]
) -> None:
    assert_same(train(method, after=wrap, read=lambda output: output.logits), train(method))


def divide(y: Tensor) -> Tensor:
    y /= 2
    return y


def clear_entries(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("change", "plain"),
    [(divide, lambda y: y / 2), (clear_entries, lambda y: torch.cat([0 * y[:, :1], y[:, 1:]], 1))],
    ids=["divided", "cleared"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_program_may_write_to_what_its_network_says(
    method: str, change: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> None:
    assert_same(train(method, read=change), train(method, read=plain))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_network_may_write_to_what_it_is_given(method: str) -> None:
    """Levels and teachers see what it was given."""
    assert_same(train(method, before=lambda x: x.sub_(0.5)), train(method, before=lambda x: x - 0.5))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_network_may_return_nothing_when_it_is_brought_into_a_mode(method: str) -> None:
    assert_same(train(method, kind=Silent), train(method))


def test_what_is_made_of_a_network_that_returns_nothing_is_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Silent(lambda x: x, lambda y: y)
    net.eval()
    x_BCHW = make_data()[:4][0]
    widths = discover(net, x_BCHW, check=True)
    levels = Levels(net, widths, level_sizes(net, widths, x_BCHW, [0.5]))
    assert levels[0](x_BCHW).shape == net(x_BCHW).shape and measure_latency_ms(net, x_BCHW) > 0
    save(levels, tmp_path / "net.safetensors")
    loaded = load(tmp_path / "net.safetensors", Silent(lambda x: x, lambda y: y), x_BCHW)
    dynamic = attach_modules(net, widths)
    skipping = make_skipping(dynamic, method="stock")
    for other in (compact(net, x_BCHW), loaded.nets[-1], skipping, make_alone(levels[1], x_BCHW)):
        torch.testing.assert_close(other(x_BCHW), net(x_BCHW))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", METHODS)
def test_a_program_may_be_its_network(method: str) -> None:
    torch.manual_seed(0)
    module, teacher = Whole(make_network()), make_network()
    callbacks = [FollowNetwork(""), *METHODS[method](teacher)]
    fit(module, callbacks, max_epochs=5, limit_train_batches=2)
    trained = [
        parameter for name, parameter in module.named_parameters() if name.startswith(("first", "rest"))
    ]
    expected = [value for name, value in train(method).items() if is_trained(name)]
    for parameter, value in zip(trained, expected, strict=True):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)


def is_trained(name: str) -> bool:
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked", "grace"))


@pytest.mark.parametrize("method", ["grow and prune", "joint", "distil"])
def test_a_program_that_is_its_network_is_saved_without_its_run(method: str, tmp_path: Path) -> None:
    module = Whole(make_network())
    callbacks = [FollowNetwork(""), *METHODS[method](make_network())]
    fit(module.train(), callbacks, max_epochs=5, limit_train_batches=2)
    structure = callbacks[0].structure
    network = compact(module, structure.example) if method == "grow and prune" else structure.levels or module
    save(network, tmp_path / "network.safetensors")
    loaded = load(tmp_path / "network.safetensors", Whole(make_network()), structure.example)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(loaded.plain()(x), module.eval()(x), rtol=1e-5, atol=1e-5)
    if method == "grow and prune":
        assert [name for name, _ in network.named_children()] == ["first", "rest"]  # type: ignore[union-attr]
        assert "elastic_structure" in dict(module.named_children()), "the program goes on with it"
