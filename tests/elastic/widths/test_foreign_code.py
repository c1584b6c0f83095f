"""What published forwards do beside calling their layers is followed, or refused in one line."""

import copy
import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributions import (
    Bernoulli,
    Independent,
    Laplace,
    MultivariateNormal,
    Normal,
    RelaxedBernoulli,
    Uniform,
    kl_divergence,
)
from torch.nn.modules.utils import _pair
from torch.nn.utils.parametrize import register_parametrization
from torch.utils.checkpoint import checkpoint
from torchvision.models.video.mvit import MSBlockConfig, MViT

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import StructureError
from elastic.measure.counts import count_macs
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates
from elastic.surgery.checking import fix_wrong_widths
from elastic.surgery.reindexing import reindex
from elastic.widths.copying import copy_module
from elastic.widths.discovery import discover, find_widths
from elastic.widths.tracing import trace_both_modes
from tests.elastic.widths.odd import Forward, between

X = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Swish(torch.autograd.Function):
    """Keep no more than the input for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return gradients[0] * gate * (1 + x * (1 - gate))


class Rounding(torch.autograd.Function):
    """Round, with the gradient of a function that does not."""

    @staticmethod
    def forward(x: Tensor, steps: int = 4) -> Tensor:
        return torch.round(x * steps) / steps

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


swish = Swish.apply


def squeeze_and_swish(m: Any, y: Tensor) -> Tensor:
    return y * torch.sigmoid(m.excite(swish(y.mean((2, 3), keepdim=True))))


def look_up_by_dimensions(m: Any, y: Tensor) -> Tensor:
    pools = {3: F.max_pool1d, 4: F.max_pool2d}
    return pools[y.ndim](pools[y.dim()](y, 2), 2)


def try_lengths(m: Any, y: Tensor) -> Tensor:
    try:
        normed: Tensor = m.norm(y, lengths=None)
    except TypeError:
        normed = m.norm(y)
    return normed


def erase_stripe(m: Any, y: Tensor) -> Tensor:
    """As SpecAugment does, arXiv 1904.08779."""
    if m.training:
        length = torch.randint(0, 4, (1,))[0]
        begin = torch.randint(0, y.shape[3] - length, (1,))[0]
        y = y.clone()
        y[:, :, :, begin : begin + length] = 0
    return y


def crop(m: Any, y: Tensor) -> Tensor:
    half = ((torch.tensor(y.shape[2:]) - torch.tensor(m.shrink(y).shape[2:])) / 2).int()
    return F.pad(y, (-torch.stack((half, half)).t().flatten()).tolist())


def pad_to_input(m: Any, y: Tensor) -> Tensor:
    """As the best known U-Net in PyTorch did."""
    small = m.shrink(y)
    high = torch.tensor([y.size()[2] - small.size()[2]])
    wide = torch.tensor([y.size()[3] - small.size()[3]])
    sides = [wide // 2, wide - wide // 2, high // 2, high - high // 2]
    return y + F.pad(small, sides)  # type: ignore[arg-type]


FOLLOWED: dict[str, tuple[Forward, dict[str, nn.Module]]] = {
    "gradient of its own": (squeeze_and_swish, {"excite": nn.Conv2d(8, 8, 1)}),
    "gradient with a context apart": (lambda m, y: Rounding.apply(y), {}),
    "name of a type": (lambda m, y: y.float() if "Half" in y.type() or 7 in y.shape[2:] else y, {}),
    "layers that the forward makes": (
        lambda m, y: nn.MaxPool2d(2)(nn.Sequential(nn.ReLU(), nn.Dropout(0.0))(y)),
        {},
    ),
    "kind of what a layer gives in training": (
        lambda m, y: m.deep(y) if isinstance(m.drop(m.norm(y)), Tensor) else m.shallow(y),
        {
            "norm": nn.InstanceNorm2d(8),
            "drop": nn.Dropout(),
            "deep": nn.ReLU(),
            "shallow": nn.Conv2d(4, 8, 1),
        },
    ),
    "number of dimensions": (look_up_by_dimensions, {}),
    "NumPy's integers": (lambda m, y: F.max_pool2d(y, np.int32(2)), {}),
    "an argument that a layer does not take": (try_lengths, {"norm": nn.BatchNorm2d(8)}),
    "a layer that is moved": (lambda m, y: m.blur.to(y.device)(y), {"blur": nn.AvgPool2d(3)}),
    "a module that is moved": (lambda m, y: m.blur.to(y)(y), {"blur": nn.Sequential(nn.Conv2d(8, 8, 3))}),
    "a fraction that fills": (lambda m, y: y + y.new_full((y.shape[-1], 1), y.detach().mean()), {}),
    "a fraction that fills what torch makes": (lambda m, y: y + torch.full((1, 9), y.detach().mean()), {}),
    "several tensors at once": (lambda m, y: torch.add(*m.keep([y, y.relu()])), {"keep": nn.Identity()}),
    "a stripe that is erased": (erase_stripe, {}),
    "sizes in a table": (crop, {"shrink": nn.AvgPool2d(5, 1)}),
    "sizes, each in a tensor": (pad_to_input, {"shrink": nn.AvgPool2d(2, padding=1)}),
    "a distribution": (lambda m, y: Normal(y, y.exp()).log_prob(y.detach().mean(0)) + y, {}),
    "a mask": (lambda m, y: y * torch.as_tensor(y > 0, dtype=y.dtype, device=y.device), {}),
}


@pytest.mark.parametrize(("forward", "layers"), FOLLOWED.values(), ids=FOLLOWED)
def test_it_is_followed_and_right(forward: Forward, layers: dict[str, nn.Module]) -> None:
    net = between(forward, **layers).eval()
    widths = discover(net, X)
    assert {"stem", "last"} <= set(widths)
    fix_wrong_widths(net, widths)
    assert widths["stem"].size == 8
    reindex(net, widths, {"stem": [0, 2, 5]})
    assert net(X).shape == (2, 5)


# Distributions of maps, as variational networks draw them.
DRAWN: dict[str, Forward] = {
    "normal": lambda m, y: Normal(y, y.exp()).rsample(),
    "without a gradient": lambda m, y: Normal(y, y.exp()).sample() + y,
    "several samples": lambda m, y: Normal(y, 1.0).rsample((3,)).mean(0),
    "several samples, of a size": lambda m, y: Normal(y, 1.0).rsample(torch.Size([3])).mean(0),
    "independent dimensions": lambda m, y: Independent(Normal(y, y.exp()), 3).rsample(),
    "uniform": lambda m, y: Uniform(y, y + 1).rsample(),
    "Laplace": lambda m, y: Laplace(y, y.exp()).rsample(),
    "Bernoulli": lambda m, y: Bernoulli(logits=y).sample() + y,
    "relaxed": lambda m, y: RelaxedBernoulli(torch.tensor(0.5), logits=y).rsample(),
    "divergence": lambda m, y: y * kl_divergence(Normal(y, y.exp()), Normal(0.0, 1.0)),
}


@pytest.mark.parametrize("forward", DRAWN.values(), ids=DRAWN)
def test_distributions_of_maps_are_followed_and_drawn_anew(forward: Forward) -> None:
    net = between(forward).eval()
    assert count_macs(net, X) > 0
    assert set(discover(net, X, check=True)) == {"stem", "last"}
    traced = trace_both_modes(net, X.to("meta")).eval()
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = net(X)
        torch.manual_seed(seed)
        torch.testing.assert_close(traced(X), expected)


ALONE = """
import torch
from elastic import discover

class Net(torch.nn.Sequential):
    def forward(self, x):
        return self[1](torch.distributions.Normal(self[0](x), 1.0).rsample())

conv = torch.nn.Conv2d
print(discover(Net(conv(3, 8, 3), conv(8, 4, 1)), torch.rand(2, 3, 8, 8)).sizes())
"""


def test_torch_may_import_more_of_itself_for_a_trace() -> None:
    """What it keeps of its own functions then is not what stands for them while a forward is traced."""
    run = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=False)
    assert run.stdout == "{'0': 8}\n", run.stderr


def test_of_a_distribution_over_channels_the_rest_of_a_network_is_followed() -> None:
    def draw(m: Any, y: Tensor) -> Tensor:
        means = m.mean(y.mean((2, 3)))
        drawn = MultivariateNormal(means, torch.diag_embed(means.exp())).rsample()
        return y * m.excite(drawn)[..., None, None]

    net = between(draw, mean=nn.Linear(8, 3), excite=nn.Linear(3, 8))
    widths = discover(net, X, check=True)
    assert {"stem", "last"} == set(widths) and "diag_embed" in widths.fixed["mean"]


class Boxed:
    """Hold what a network gives, as programs' own classes do."""

    def __init__(self, maps: Tensor) -> None:
        self.maps, self.name = maps, "boxed"


# What networks give, whose tensors an attribute has.
GIVEN: dict[str, tuple[Forward, Callable[[Any], list[Tensor]]]] = {
    "a distribution": (lambda m, y: Normal(y, y.exp()), lambda given: [given.loc, given.scale]),
    "a distribution of another": (
        lambda m, y: Independent(Normal(y, 1.0), 1),
        lambda given: [given.mean, given.log_prob(given.mean)],
    ),
    "an object": (lambda m, y: Boxed(y.relu()), lambda given: [given.maps]),
}


@pytest.mark.parametrize(("forward", "unpack"), GIVEN.values(), ids=GIVEN)
def test_objects_that_a_network_gives_are_made_anew(
    forward: Forward, unpack: Callable[[Any], list[Tensor]]
) -> None:
    class Giving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Any:
            return forward(self, self.last(self.norm(self.stem(x)))), x.shape

    torch.manual_seed(0)
    net = Giving().eval()
    widths = discover(net, X)
    assert set(widths) == {"stem"} and "last" in widths.fixed
    traced = trace_both_modes(net, X.to("meta")).eval()
    for x in (X, X[:1]):
        (given, size), (expected, _) = traced(x), net(x)
        assert type(given) is type(expected) and size == x.shape
        torch.testing.assert_close(unpack(given), unpack(expected))


def scale_softly(y: Tensor, steepness: float = 2.0) -> Tensor:
    return y * torch.sigmoid(steepness * y)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # as many programs do it yet
    scripted = torch.jit.script(scale_softly)


def name_type(m: Any, y: Tensor) -> Tensor:
    ones = torch.ones(1).type(y.type()) + torch.zeros(1).type(torch.DoubleTensor).type(y.dtype)
    return y.type(torch.DoubleTensor).type(torch.FloatTensor) * ones


# What insists on tensors.
WRAPPED: dict[str, Forward] = {
    "function of TorchScript": lambda m, y: scripted(y),
    "function of TorchScript, by name": lambda m, y: scripted(steepness=0.5, y=y) + scripted(torch.ones(1)),
    "variable": lambda m, y: Variable(y.mean((2, 3), keepdim=True)) + y,
    "variable that the forward makes": lambda m, y: y + Variable(torch.ones(y.size()), requires_grad=False),
    "name of a type": name_type,
    "type that is called with sizes": lambda m, y: y + torch.FloatTensor(y.size(0), *y.size()[1:]).zero_(),
    "tensor that is called with sizes": lambda m, y: y + torch.Tensor(y.size(0), *y.size()[1:]).zero_(),
    "tensor that is called with numbers": lambda m, y: y / torch.Tensor([y.shape[2], 2.0]).sum(),
    "type that is called with a shape": lambda m, y: y + Variable(torch.FloatTensor(y.size()).fill_(1)),
    "type that is called with numbers": lambda m, y: y / torch.FloatTensor([y.shape[2], 2.0]).sum(),
    "type that is asked for": lambda m, y: (
        y if isinstance(torch.ones(1), torch.FloatTensor) and torch.LongTensor([3]).item() == 3 else m.last(y)
    ),
    "new one like another": lambda m, y: y + y.new(y.size(0), y.size(1), 1, 1).fill_(1),
    "variable of what the forward holds": lambda m, y: y + Variable(torch.ones(1)),
}


@pytest.mark.parametrize("forward", WRAPPED.values(), ids=WRAPPED)
def test_what_insists_on_tensors_takes_traced_values(forward: Forward) -> None:
    net = between(forward).eval()
    expected = net(X)
    assert len(discover(net, X, check=True)) == 2
    torch.testing.assert_close(trace_both_modes(net, X.to("meta")).eval()(X), expected)
    torch.testing.assert_close(net(X), expected)
    with pytest.raises(RuntimeError, match="Expected a value of type 'Tensor"):
        scripted("no tensor")
    with pytest.raises(TypeError, match="has to be a tensor"):
        Variable("no tensor")


class ActNorm(nn.Module):
    """Start from the statistics of the first batch (Glow, arXiv 1807.03039), and note that it has."""

    def __init__(self, is_started: Tensor, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.zeros(1, 8, 1, 1)), nn.Parameter(torch.ones(1, 8, 1, 1))
        self.register_buffer("is_started", is_started.clone())
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        if not self.ask(self.is_started):
            with torch.no_grad():
                self.shift.data.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.data.copy_(1 / x.std((0, 2, 3), keepdim=True))
            self.is_started.fill_(1)
        return self.scale * (x + self.shift)


HELD: dict[str, tuple[Tensor, Callable[[Tensor], Any]]] = {
    "an integer": (torch.tensor(0, dtype=torch.uint8), lambda started: started.item() == 1),
    "a fraction": (torch.zeros(1), lambda started: started > 0),
    "a flag": (torch.tensor(False), lambda started: started),
}


@pytest.mark.parametrize(("is_started", "ask"), HELD.values(), ids=HELD)
def test_a_forward_may_decide_by_a_number_that_it_holds(
    is_started: Tensor, ask: Callable[[Tensor], Any]
) -> None:
    net = between(lambda m, y: m.norm(y), norm=ActNorm(is_started, ask)).eval()
    state = copy.deepcopy(net.state_dict())
    early = discover(net, X, check=True)
    assert early.sizes() == {"stem": 8, "last": 5} and early.written == {"norm"}
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    traced = trace_both_modes(net, X.to("meta")).eval()
    traced(X)  # which starts it
    with pytest.raises(
        StructureError, match="number that it holds was False, which is True now: run it once"
    ):
        traced(X)
    widths = discover(net, X, check=True)
    assert widths.sizes() == {"stem": 8, "last": 5} and not widths.written
    expected = net(X)
    dynamic = attach_modules(net, widths).eval()
    torch.testing.assert_close(trace_both_modes(net, X.to("meta")).eval()(X), expected)
    torch.testing.assert_close(make_skipping(dynamic)(X), dynamic(X), rtol=1e-4, atol=1e-4)


def run_apart(m: Any, y: Tensor) -> Tensor:
    with torch.autocast(y.device.type, enabled=torch.is_autocast_enabled(y.device.type)):
        return y.relu()


# What would be three times as much, were the question answered wrongly.
QUESTIONS: dict[str, Forward] = {
    "device for autocast": run_apart,
    "by device": lambda m, y: y * {"cpu": 1.0, "cuda": 3.0}[y.device.type],
    "is on the CPU": lambda m, y: y if y.is_cpu and not y.is_cuda and y.device.index is None else 3 * y,
    "is that device": lambda m, y: y if y.device == torch.device("cpu") else 3 * y,
    "is not that device": lambda m, y: 3 * y if y.device != torch.device("cpu") else y,
    "device of a weight": lambda m, y: 3 * y if y.device != m.last.weight.device else y,
    "device among several": lambda m, y: y if y.device in {torch.device("cpu")} else 3 * y,
    "name of the device": lambda m, y: y if f"{y.device}" == "cpu" else 3 * y,
    "device of what is made": lambda m, y: y * torch.ones(1, device=y.device, dtype=y.dtype),
    "by type": lambda m, y: y * {torch.float16: 3, torch.float32: 1}[y.dtype],
    "type among several": lambda m, y: 3 * y if y.dtype in (torch.float16, torch.bfloat16) else y,
    "limits of the type": lambda m, y: y.clamp(torch.finfo(y.dtype).tiny, torch.finfo(y.dtype).max),
    "name of the type": lambda m, y: y if str(y.dtype) == "torch.float32" else 3 * y,
    "kind of a number": lambda m, y: y if isinstance(y.shape[2], int) and not isinstance(y, int) else 3 * y,
    "kind of a quotient": lambda m, y: y if isinstance(y.shape[2] / 2, float) else 3 * y,
    "kind of a shape": lambda m, y: (
        y if isinstance(y.shape[2:], tuple) and not isinstance(y, tuple) else 3 * y
    ),
    "one number or several": lambda m, y: F.avg_pool2d(y, _pair(y.shape[2] // 3)),
    "name of a number": lambda m, y: y if f"{y.shape[2]:02d} {y.shape[3]}" == "09 9" else 3 * y,
    "layer by a number": lambda m, y: getattr(m, f"by{y.shape[2]}", torch.zeros_like)(y),
    "is for the gradient": lambda m, y: y.detach() * 3 if m.training and y.requires_grad else y,
}


@pytest.mark.parametrize("forward", QUESTIONS.values(), ids=QUESTIONS)
def test_a_forward_that_asks_where_its_tensors_are_and_of_what_type_is_told(forward: Forward) -> None:
    net = between(forward, by9=nn.Tanh()).eval()
    assert discover(net, X).sizes() == {"stem": 8, "last": 5}
    torch.testing.assert_close(trace_both_modes(net, X.to("meta"))(X), net(X))


@functools.lru_cache
def make_once(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((1,), 2.0, device=device, dtype=dtype)


@pytest.mark.parametrize("runs_first", [False, True])
def test_what_a_function_keeps_for_good_is_not_of_a_trace(runs_first: bool) -> None:
    make_once.cache_clear()
    net = between(lambda m, y: y * make_once(y.device, y.dtype)).eval()
    expected = net(X) if runs_first else None
    assert discover(net, X).sizes() == {"stem": 8, "last": 5}
    output = net(X)
    assert expected is None or torch.equal(output, expected)
    assert discover(net, X).sizes() == {"stem": 8, "last": 5}


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_would_be_computed_again_is_followed(reentrant: bool, is_training: bool) -> None:
    def run(m: Any, y: Tensor) -> Tensor:
        once: Tensor = checkpoint(m.work, y, use_reentrant=reentrant)
        return checkpoint(lambda a: a * 2, once, use_reentrant=reentrant) if m.training else once * 2

    net = between(run, work=nn.Conv2d(8, 8, 1)).train(is_training)
    widths = discover(net, X)
    assert widths.sizes() == {"stem": 8, "work": 8, "last": 5}
    traced = trace_both_modes(net, X.to("meta"))
    torch.testing.assert_close(traced(X), net(X))
    reindex(net, widths, {"stem": [0, 2], "work": [1, 3, 5]})
    net(X).sum().backward()


def test_a_traced_network_has_the_gradients_of_its_functions() -> None:
    net = between(lambda m, y: Rounding.apply(y))
    traced = trace_both_modes(net, X.to("meta"))
    weights = list(net.parameters())
    ours = torch.autograd.grad(traced(X).sum(), weights)
    torch.testing.assert_close(ours, torch.autograd.grad(net(X).sum(), weights))
    assert ours[0].any(), "of a rounded number, torch's own would be zero"
    dynamic = attach_modules(net, discover(net, X), ["stem"])
    ours = torch.autograd.grad(dynamic(X).sum(), weights)
    assert ours[0].any() and dynamic(X).shape == (2, 5)


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(8, 8, 1), lambda: nn.BatchNorm2d(8, affine=False)], ids=["weights", "buffers"]
)
def test_a_layer_that_is_no_submodule_is_named(make: Callable[[], nn.Module]) -> None:
    layers = [make()]
    kind = type(layers[0]).__name__
    with pytest.raises(StructureError, match=f"^a {kind} that the forward calls is no submodule.*ModuleList"):
        discover(between(lambda m, y: layers[0](y)), X)


def keep_alone(m: Any, y: Tensor) -> Tensor:
    m.aux = m.side(y)
    return y


def keep_in_training(m: Any, y: Tensor) -> Tensor:
    if m.training:
        m.aux = {"scores": m.side(y)}
    return y


def keep_in_a_list(m: Any, y: Tensor) -> Tensor:
    m.kept.append(m.side(y))
    return y


def keep_as_an_array(m: Any, y: Tensor) -> Tensor:
    m.aux = m.side(y).detach().cpu().numpy()
    return y


@pytest.mark.parametrize("keep", [keep_alone, keep_in_training, keep_in_a_list, keep_as_an_array])
def test_what_a_forward_keeps_for_the_program_alone_stays_as_wide(keep: Forward) -> None:
    net = between(keep, side=nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)))
    net.kept = []
    widths = discover(net, X)
    assert set(widths) == {"stem", "last", "side.0"}
    assert "the forward keeps it" in widths.fixed["side.2"]


def test_a_forward_that_needs_the_data_itself_is_told_so() -> None:
    with pytest.raises(StructureError, match=r"Net cannot be traced.*what depends on the data"):
        discover(between(lambda m, y: y * float(np.median(y.detach().cpu().numpy()))), X)


def is_left_out(m: Any, y: Tensor) -> bool:
    return bool(torch.rand(1, device=y.device) < 0.5)


# Stochastic depth (arXiv 1603.09382) as programs write it: whether a draw leaves a block out.
LEFT_OUT: dict[str, Forward] = {
    "compared": is_left_out,
    "as a number": lambda m, y: torch.rand(1, dtype=y.dtype).item() < 0.5,
    "drawn in place": lambda m, y: y.new_empty(1).bernoulli_(0.5) == 0,
    "of a size": lambda m, y: torch.rand_like(y[:, 0, 0, 0]).mean() < 0.5,
    "of another": lambda m, y: torch.equal(torch.bernoulli(torch.full((1,), 0.5).to(y)), torch.ones(1).to(y)),
    "whole": lambda m, y: int(torch.randint(0, 2, (1,), device=y.device)),
}


def scale_by_draw(m: Any, y: Tensor) -> Tensor:
    if not m.training:
        return y + m.side(y)
    kept = torch.bernoulli(torch.full((1,), 0.8, dtype=y.dtype, device=y.device))
    return y + float(kept) / 0.8 * m.side(y)


def leave_out(is_left_out: Forward) -> Forward:
    return lambda m, y: y if m.training and is_left_out(m, y) else y + m.side(y)


@pytest.mark.parametrize("forward", [scale_by_draw, *map(leave_out, LEFT_OUT.values())])
def test_what_a_forward_leaves_out_by_a_draw_is_followed(forward: Forward) -> None:
    torch.manual_seed(0)
    net = between(forward, side=nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1)))
    for training in (True, False):
        widths = discover(net.train(training), X, check=True)
        assert {"side.0", "last"} <= set(widths)
        attach_gates(copy_module(net), widths, "channel")
    with pytest.raises(StructureError, match="decides by a number that it draws"):
        attach_modules(net, widths)


def test_what_depends_on_data_beside_a_draw_is_refused() -> None:
    with pytest.raises(StructureError, match="what depends on the data"):
        discover(between(lambda m, y: y * float((torch.rand_like(y) * y).mean())), X)


class Spiking(nn.Module):
    """Add up what comes in until it spikes, several times, as spiking networks do."""

    mem: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.register_buffer("mem", torch.zeros(0), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        self.mem = torch.zeros_like(self.mem)
        outputs: list[Tensor] = []
        for _ in range(3):
            y_BCHW = self.first(x_BCHW)
            if self.mem.shape != y_BCHW.shape:
                self.mem = torch.zeros_like(y_BCHW)
            self.mem = 0.9 * self.mem + y_BCHW
            spikes_BCHW = (self.mem > 0.5).to(x_BCHW.dtype)
            self.mem = self.mem - spikes_BCHW
            outputs.append(self.last(spikes_BCHW))
        return torch.stack(outputs).sum(0)


@pytest.mark.parametrize("batch", [0, 2, 5])
@torch.no_grad()
def test_a_state_that_begins_anew_changes_with_what_is_added_to_it(batch: int) -> None:
    """Whatever batch the last one was that is held, if there was one: compaction comes after training."""
    net = Spiking().eval()
    if batch:
        net(X[:1].expand(batch, -1, -1, -1))
    net.first.weight[4:], net.first.bias[4:] = 0, 0
    assert discover(net, X, check=True).sizes() == {"first": 6}
    expected, plain = net(X), compact(net, X)
    assert plain.first.out_channels == 4
    torch.testing.assert_close(plain(X), expected)


class Caching(nn.Module):
    """Keep in evaluation what it has computed, in a dictionary and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.bias = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 4, 1),
            nn.Parameter(torch.ones(2, 6)),
        )
        self.cache: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.first(x_BCHW)
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias.sum(0)[:, None, None]
        self.seen.append(y_BCHW)
        output: Tensor = self.last(y_BCHW * (self.cache["bias"] if not self.training else 1))
        return output


def test_what_a_forward_keeps_in_its_containers_while_it_is_traced_is_taken_back() -> None:
    net = Caching().eval()
    expected = net(X)
    (kept,), (seen,) = net.cache.values(), net.seen
    assert "joins a part that never changes" in find_widths(net, X).fixed["first"]
    traced = trace_both_modes(net, X.to("meta"))
    assert net.cache["bias"] is kept and len(net.seen) == 1 and net.seen[0] is seen
    assert torch.equal(traced(X), expected)
    assert net.cache["bias"] is kept and len(net.seen) == 2 and torch.equal(net.seen[1], seen)
    net.cache.clear()
    assert discover(net, X).sizes() == {"first": 6} and not net.cache
    torch.testing.assert_close(net(X), expected)


def test_weights_that_are_computed_are_not_taken_for_one_another() -> None:
    """A tensor that is gone may leave its identity to another one."""

    class Sum(nn.Module):
        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return one + other

        def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
            return weight / 2, weight / 2

    def split(layer: nn.Module) -> nn.Module:
        return register_parametrization(layer, "weight", Sum())

    for _ in range(8):
        layers = [layer for n in range(3, 23) for layer in (split(nn.Conv2d(n, n + 1, 1)), nn.ReLU())]
        assert len(find_widths(nn.Sequential(*layers), X).fixed) == 20


@pytest.mark.parametrize("other", [nn.ReLU(), nn.LSTM(2, 2)], ids=["", "beside one that copies itself"])
def test_a_list_that_modules_share_is_one_in_a_copy(other: nn.Module) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), other)
    maps = [X, torch.ones(1, requires_grad=True) * 2]
    net[0].maps = net[1].maps = maps  # type: ignore[assignment]
    replica = copy_module(net)
    assert replica[0].maps is replica[1].maps is not maps
    torch.testing.assert_close(replica[0].maps, maps)
    assert replica[0].maps[1] is not maps[1]


class Settings(dict[str, Any]):
    """Give entries by name, as programs have it: what is lacking is a KeyError."""

    __getattr__ = dict.__getitem__  # type: ignore[assignment]


def test_settings_by_name_are_copied() -> None:
    net = between(lambda m, y: y * m.settings.scale + m.settings.inner.shift)
    inner = Settings(shift=torch.ones(1))
    net.settings = Settings(scale=2.0, inner=inner, same=inner)
    replica = copy_module(net)
    assert type(replica.settings) is Settings and replica.settings is not net.settings
    assert replica.settings.inner is replica.settings["same"] is not inner
    assert replica.settings.inner.shift is not inner.shift
    torch.testing.assert_close(replica(X), net(X))
    assert len(discover(net, X, check=True)) == 2


def test_what_cannot_be_copied_is_refused_in_one_line() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1))
    net.names = {"a": 1}.keys()  # type: ignore[assignment]
    with pytest.raises(StructureError, match=r"^Sequential cannot be copied .*dict_keys.*: let its modules"):
        discover(net, X)


def test_a_helper_of_a_library_is_not_taken_for_what_its_name_says() -> None:
    """MViT's own `_unsqueeze` gives a tensor and a number."""
    block = MSBlockConfig(2, 8, 8, kernel_q=[], kernel_kv=[], stride_q=[], stride_kv=[])
    options = dict.fromkeys(("residual_pool", "rel_pos_embed", "proj_after_attn"), False)
    net = MViT((16, 16), 4, [block] * 2, residual_with_cls_embed=True, num_classes=3, **options)
    widths = discover(net, torch.randn(2, 3, 4, 16, 16), check=True)
    assert widths.sizes() == {
        f"blocks.{i}.{name}": n for i in (0, 1) for name, n in (("attn.qkv", 4), ("mlp.0", 32))
    }
