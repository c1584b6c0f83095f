"""Networks are traced once where that is enough, and shapes known without a call are those of torch."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from elastic.widths.tracing import make_meta_copy, trace_both_modes, trace_modes
from elastic.widths.tracing.shapes import infer_call, infer_layer
from tests.elastic.widths.odd import Forward, between

X = torch.empty(2, 6, 9, 8, device="meta")
COLUMN = torch.empty(6, 1, 1, device="meta")


class Switching(nn.Module):
    """Use the mode in the way that it is told."""

    def __init__(self, use: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Conv2d(6, 4, 1)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.use(self, self.first(x)))


@pytest.mark.parametrize(
    ("use", "graphs"),
    [
        (lambda net, x: net.second(F.dropout(x, 0.1, net.training)), 1),
        (lambda net, x: x if net.training else net.second(x), 2),
        (lambda net, x: x if net.training is True else net.second(x), 2),
        (lambda net, x: net.second(x) * (1 + int(net.training)), 2),
    ],
    ids=["passed", "decides", "compared", "counted"],
)
def test_what_the_mode_is_used_for_tells_whether_one_graph_is_enough(
    use: Callable[[nn.Module, Tensor], Tensor], graphs: int
) -> None:
    net, x = Switching(use), torch.zeros(2, 3, 9, 9)
    assert len(trace_modes(make_meta_copy(net), x.to("meta"))) == graphs
    assert {"first", "second"} >= set(discover(net, x)) >= {"first"}
    assert net.training is True


LAYERS = [
    nn.Conv2d(6, 4, 3, 2, padding=(1, 2), dilation=2, device="meta"),
    nn.Conv2d(6, 12, (3, 1), groups=6, bias=False, device="meta"),
    nn.Linear(8, 5, device="meta"),
    nn.AdaptiveAvgPool2d((None, 3)),
]
CALLS: list[tuple[Any, tuple[Any, ...]]] = [
    (torch.cat, ([X, X[:, :0], X], 1)),
    (torch.cat, ((X, X), -1)),
    (operator.mul, (COLUMN, X)),
    (operator.add, (X, 2)),
    (operator.iadd, (X.clone(), COLUMN)),
    (F.adaptive_avg_pool2d, (X, 1)),
    (F.gelu, (X,)),
    ("add_", (X.clone(), X)),
]


def same(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.dtype, first.stride()) == (second.shape, second.dtype, second.stride())


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layers_shape_is_that_of_its_call(layer: nn.Module) -> None:
    inferred = infer_layer(layer, (X,), {})
    assert inferred is not None and same(inferred, layer(X))
    assert infer_layer(layer, (torch.zeros(2, 6, 9, 8),), {}) is None  # it is computed


@pytest.mark.parametrize(("target", "args"), CALLS)
def test_a_functions_shape_is_that_of_its_call(target: Any, args: tuple[Any, ...]) -> None:
    inferred = infer_call(target, args, {})
    called = getattr(args[0], target)(*args[1:]) if isinstance(target, str) else target(*args)
    assert inferred is not None and same(inferred, called)


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (torch.cat, ([X, X[:, :, :4]], 1)),  # which torch refuses
        (operator.iadd, (COLUMN, X)),
        (operator.mul, (X, X.to(torch.float64))),  # of another type
        (operator.add, (X.permute(0, 2, 3, 1), X.permute(0, 2, 3, 1)[..., :1])),  # laid out in another way
    ],
)
def test_what_is_not_known_is_called(target: Any, args: tuple[Any, ...]) -> None:
    assert infer_call(target, args, {}) is None


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: x[:, :, 1:-1, 1:-1],
    "cropped, channels last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :, 1:-1],
    "some channels": lambda x: x[:, 2:4],
    "some channels, channels last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :4],
    "permuted": lambda x: x.permute(0, 2, 3, 1),
    "transposed": lambda x: x.transpose(2, 3),
    "transposed and cropped": lambda x: x.transpose(2, 3)[:, :, 1:],
    "expanded": lambda x: x[:, :, :1].expand(2, 6, 9, 8),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
}
EACH: list[tuple[Any, tuple[Any, ...]]] = [
    *((function, ()) for function in (F.relu, F.gelu, F.hardtanh, "sigmoid", "relu_")),
    *((function, (0.5,)) for function in ("mul", operator.mul, operator.iadd)),
    (F.dropout, (0.5, True)),
    (F.dropout, (0.5, False)),
]
NORMS: dict[str, Callable[[Tensor], nn.Module]] = {
    "batch": lambda x: (nn.BatchNorm1d if x.dim() == 3 else nn.BatchNorm2d)(x.shape[1]),
    "group": lambda x: nn.GroupNorm(1, x.shape[1]),
    "layer": lambda x: nn.LayerNorm(x.shape[-1]),
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("target", "others"), EACH)
def test_what_works_entry_by_entry_gives_torchs_strides(
    lay_out: Callable[[Tensor], Tensor], target: Any, others: tuple[Any, ...]
) -> None:
    def call(x: Tensor) -> Tensor:
        if x.is_meta and (inferred := infer_call(target, (x, *others), {})) is not None:
            return inferred
        return getattr(x, target)(*others) if isinstance(target, str) else target(x, *others)

    is_in_place = target in (operator.iadd, "relu_")
    x = lay_out(torch.zeros(2, 6, 9, 8))
    if not (is_in_place and x.stride(2) == 0):  # which torch refuses
        assert same(call(lay_out(X.clone())), call(x))


@pytest.mark.parametrize("first", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS.values(), ids=LAYOUTS)
def test_two_tensors_give_torchs_strides(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> None:
    args = first(X), second(X)
    if args[0].shape == args[1].shape:
        inferred = infer_call(operator.add, args, {})
        real = first(torch.zeros(X.shape)) + second(torch.zeros(X.shape))
        assert same(args[0] + args[1] if inferred is None else inferred, real)


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_a_transposed_convolution_without_data_takes_its_channels_alone(kind: type[nn.Module]) -> None:
    """As it does with data; by the shapes that it takes it is told what a network is given."""
    dims = int(kind.__name__[-2])
    layer, x = kind(6, 4, 3, stride=2, groups=2), torch.zeros(2, 6, *[5] * dims)
    without_data = make_meta_copy(layer)
    for single in (x, x[0]):
        assert without_data(single.to("meta")).shape == layer(single).shape
    size = layer(x, output_size=[12] * dims).shape
    assert without_data(x.to("meta"), output_size=[12] * dims).shape == size
    for net, device in ((layer, "cpu"), (without_data, "meta")):
        with pytest.raises(RuntimeError, match="channels"):
            net(x[:, :1].to(device))


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_norms_give_torchs_strides(
    lay_out: Callable[[Tensor], Tensor], make: Callable[[Tensor], nn.Module]
) -> None:
    x = lay_out(torch.zeros(2, 6, 9, 8))
    norm = make(x)
    expected = norm(x)
    assert same(make_meta_copy(norm)(lay_out(X)), expected)
    functions: dict[type[nn.Module], tuple[Any, tuple[Any, ...]]] = {
        nn.LayerNorm: (F.layer_norm, (x.shape[-1:],)),
        nn.GroupNorm: (F.group_norm, (1,)),
    }
    target, others = functions.get(type(norm), (F.batch_norm, (None, None, None, None, True)))
    inferred = infer_call(target, (lay_out(X), *others), {})
    assert inferred is not None and same(inferred, expected)


def attend_by_head(m: Any, y: Tensor) -> Tensor:
    """Scale a part of the channels, and view it head by head, as attention of guided diffusion does."""
    b, c, h, w = y.shape
    q = y.reshape(b, c, -1).chunk(2, 1)[0]
    return torch.cat([(q * 0.5).view(b * 2, c // 4, h * w).view(b, c // 2, h, w)] * 2, 1)


def project_rows(m: Any, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    rows = m.norm(y.permute(0, 2, 3, 1)).view(-1, c)
    return m.fc(rows).view(b, h, w, 8).permute(0, 3, 1, 2)


def view_transposed(m: Any, y: Tensor) -> Tensor:
    y = m.norm(y.transpose(2, 3))
    return y.view(y.size(0), y.size(1), -1).unsqueeze(-1)


def view_crop(m: Any, y: Tensor) -> Tensor:
    y = m.norm(y[:, :, 1:-1, 1:-1])
    return y.view(y.size(0), y.size(1), -1).unsqueeze(-1)


VIEWS: dict[str, tuple[Forward, dict[str, nn.Module], int]] = {
    "attention": (attend_by_head, {}, 2),  # four channels that change together
    "layer norm": (project_rows, {"norm": nn.LayerNorm(8), "fc": nn.Linear(8, 8)}, 8),
    "batch norm": (view_transposed, {"norm": nn.BatchNorm2d(8)}, 8),
    "group norm": (view_transposed, {"norm": nn.GroupNorm(8, 8)}, 8),
    **{
        f"crop, {type(layer).__name__}": (view_crop, {"norm": layer}, 8)
        for layer in (nn.ReLU(), nn.Hardtanh(), nn.Dropout(), nn.BatchNorm2d(8), nn.GroupNorm(8, 8))
    },
}


@pytest.mark.parametrize(("forward", "layers", "channels"), VIEWS.values(), ids=VIEWS)
def test_a_view_of_what_torch_lays_out_anew_is_followed(
    forward: Forward, layers: dict[str, nn.Module], channels: int
) -> None:
    net, x = between(forward, **layers).train(), torch.randn(2, 3, 9, 9)
    net(x)
    widths = discover(net, x)
    assert widths["stem"].size == channels


class Assigning(nn.Module):
    """Assign statistics, and keep what it has seen, which its next forward begins with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.seen = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), torch.zeros(6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.first(x_BCHW)
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * y_BCHW.mean((0, 2, 3)).detach()
            self.seen = self.mean + self.seen
        output: Tensor = self.last(y_BCHW - self.mean[:, None, None])
        return output


def test_what_a_forward_assigns_to_is_put_back() -> None:
    net, x = Assigning(), torch.randn(2, 3, 4, 4)
    mean, seen = net.mean, net.seen
    widths = discover(net, x)
    assert widths.sizes() == {"first": 6}
    with pytest.raises(StructureError, match=r"assigns to 'mean' in training.*as self.mean.copy_\(…\) does"):
        trace_both_modes(net, x.to("meta"))
    assert net.mean is mean and net.seen is seen
    reindex(net, widths, {"first": [0, 2, 5]})
    assert net.eval()(x).shape == (2, 4, 4, 4)
