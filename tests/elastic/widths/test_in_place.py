"""Methods that change a tensor's shape in place, whether or not their result is used."""

import operator
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from elastic import Levels, discover, grow_index, reindex
from elastic.errors import StructureError
from elastic.pruning.compaction import compact
from elastic.pruning.gates import Grain, attach_gates, iterate_gates
from elastic.surgery.fresh import random
from elastic.widths.discovery import find_widths
from elastic.widths.tracing import trace
from tests.elastic.widths.odd import between
from tests.elastic.zoo import Net

X = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(0))  # as many places as channels
SHUFFLED = [3, -1, 0, 5, 7, 1, 4, -1, 2, 6]


def change(tensor: Tensor, *calls: tuple[str, tuple[int, ...]]) -> Tensor:
    """Call methods, and give the tensor itself."""
    for name, arguments in calls:
        getattr(tensor, name)(*arguments)
    return tensor


def project_places(*calls: tuple[str, tuple[int, ...]]) -> nn.Module:
    """Read channels, which come to lie on the last dimension, with a linear layer."""
    return Net(
        lambda m, x: m.head(m.read(change(m.stem(x).flatten(2), *calls)).relu().mean(1)),
        **{"stem": nn.Conv2d(3, 8, 1), "read": nn.Linear(8, 6), "head": nn.Linear(6, 5)},
    )


def gate(*calls: tuple[str, tuple[int, ...]]) -> nn.Module:
    return between(lambda m, x: x * change(x.mean((2, 3)).sigmoid(), *calls))


def change_result(m: nn.Module, x: Tensor) -> Tensor:
    """Change what another method has given, which is the tensor itself."""
    y = x.mean((2, 3))
    y.sigmoid_().unsqueeze_(-1)
    y.relu_().unsqueeze_(-1)
    return x * y


def copy_part(m: nn.Module, x: Tensor) -> Tensor:
    """Write rows of maps into rows of others."""
    y = torch.zeros_like(x)
    y[:, :, :1].copy_(x[:, :, 1:])
    return x + y


def write_fused(m: nn.Module, how: str) -> None:
    """Give a layer what is computed from others' weights, as reparametrized blocks do in evaluation."""
    fused, bias = m.one.weight + m.two.weight, m.one.bias + m.two.bias
    if how == "assigned":
        m.fused.weight.data, m.fused.bias.data = fused.data, bias.data
    elif how == "copied":
        with torch.no_grad():
            m.fused.weight.copy_(fused)
            m.fused.bias.copy_(bias)
    elif how == "copied to a view":
        m.fused.weight.data.transpose(2, 3).copy_(fused.transpose(2, 3))
        m.fused.bias.detach().copy_(bias)
    else:
        m.fused.weight.data[:], m.fused.bias.data[...] = fused.data, bias.data


def ask_shape(m: nn.Module, x: Tensor) -> Tensor:
    y = x.flatten(2)[..., :6]
    if y.shape[2] == 6:
        y.transpose_(1, 2)
    if y.shape[1] != 6:
        raise ValueError("six places")
    return x * y.mean(1)[..., None, None]


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "transpose_": lambda: project_places(("transpose_", (1, 2))),
    "swapaxes_": lambda: project_places(("swapaxes_", (-1, -2))),
    "and back": lambda: project_places(*[("swapdims_", (1, 2))] * 3),
    "unsqueeze_": lambda: gate(("unsqueeze_", (-1,)), ("unsqueeze_", (-1,))),
    "squeeze_": lambda: gate(*[("unsqueeze_", (-1,))] * 3, ("squeeze_", (-1,))),
    "t_": lambda: gate(("t_", ()), ("t_", ()), *[("unsqueeze_", (-1,))] * 2),
    "copy_": lambda: between(lambda m, x: torch.zeros_like(x).copy_(x.mean((2, 3), keepdim=True)) + x),
    "copy_ into a part": lambda: between(copy_part),
    "result of a method": lambda: between(change_result),
    "shape asked": lambda: between(ask_shape),
}


@pytest.mark.parametrize("build", FOLLOWED.values(), ids=FOLLOWED)
def test_a_tensor_whose_shape_changes_in_place_is_followed(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    expected = model(X).detach()
    widths = discover(model, X)
    assert widths["stem"].size == 8
    reindex(model, widths, {"stem": SHUFFLED})
    torch.testing.assert_close(model(X), expected)


def test_a_shape_that_cannot_be_followed_fixes_the_channels() -> None:
    widths = find_widths(between(lambda m, x: change(x, ("resize_", (2, 8, 8, 1))).view(2, 8, 2, 4)), X)
    assert widths.fixed["stem"] == "resize_(2, 8, 8, 1) in the model's forward cannot be followed"
    assert list(widths) == ["last"]


def fuse(how: str) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if m.training:
            return m.one(x) + m.two(x)
        write_fused(m, how)
        return m.fused(x)

    return between(forward, **{name: nn.Conv2d(8, 8, 1) for name in ("one", "two", "fused")})


@pytest.mark.parametrize("how", ["assigned", "copied", "copied to a view", "set"])
@pytest.mark.parametrize("grain", ["weight", "channel"])
def test_weights_that_a_forward_writes_have_the_channels_of_those_that_it_writes(
    how: str, grain: Grain
) -> None:
    """A gated layer computes with another tensor than it holds, where what is written would be lost."""
    torch.manual_seed(0)
    model = fuse(how).eval()
    widths = discover(model, X, check=True)
    assert list(widths) == ["stem", "one", "last"] and widths.written == {"fused"}
    expected = model(X).detach()
    reindex(model, widths, {"stem": SHUFFLED, "one": SHUFFLED})
    attach_gates(model, widths, grain)
    assert not is_parametrized(model.fused) and is_parametrized(model.one)
    torch.testing.assert_close(model(X), expected)


def add_in_place(w: Tensor) -> None:
    w += 1


def scale_data(w: Tensor) -> None:
    w.data *= 2


WRITES: dict[str, Callable[[Tensor], object]] = {
    "operator": add_in_place,
    "operator on its data": scale_data,
    "function": lambda w: torch.clamp_(w, 0),
    "flag": lambda w: F.relu(w, inplace=True),
    "flag by position": lambda w: F.elu(w, 1.0, True),
    "layer": lambda w: nn.Hardtanh(inplace=True)(w),
    "out": lambda w: torch.add(w, 1, out=w),
    "view by a method": lambda w: w.swapaxes(2, 3).mul_(2),
    "one of several views": lambda w: w.chunk(2, 1)[0].zero_(),
    "normalized": lambda w: w.div_(w.norm()),
    "bounded": lambda w: w.renorm_(2, 0, 0.1),
}
ANEW = ("operator", "operator on its data", "flag by position", "out", "view by a method")


def write_first(write: Callable[[Tensor], object]) -> nn.Module:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            write(m.inner.weight)
        return m.inner(x)  # type: ignore[no-any-return]

    return between(forward, inner=nn.Conv2d(8, 8, 1))


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_in_whatever_way_a_weight_is_written_to_it_is_followed_and_has_no_gate(
    write: Callable[[Tensor], object],
) -> None:
    model = write_first(write)
    widths = discover(model, X)
    assert list(widths) == ["stem", "inner", "last"] and widths.written == {"inner"}
    attach_gates(model, widths, "weight")
    assert [path for path, _, _ in iterate_gates(model)] == ["stem", "last", "head.2"]


@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_is_the_same_for_channels_in_other_places(name: str) -> None:
    """What differs from call to call is no function, of which nothing can be checked."""
    with pytest.raises(StructureError, match="each time") if name in ANEW else nullcontext():
        assert discover(write_first(WRITES[name]), X, check=True)


class Masked(nn.Conv2d):
    """See pixels to the left and above alone (arXiv 1606.05328)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding=1)
        mask = torch.ones_like(self.weight)
        mask[:, :, 1, 2:] = mask[:, :, 2] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data *= self.mask
        return super().forward(x)


def test_a_mask_grows_with_the_weight_that_it_is_written_into() -> None:
    model = nn.Sequential(Masked(3, 8, 3), nn.ReLU(), Masked(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1))
    widths = discover(model, X, check=True)
    reindex(model, widths, {"0": grow_index(8, 12), "2": grow_index(6, 9)}, fresh=random)
    for layer in (model[0], model[2]):
        assert layer.mask.shape == layer.weight.shape
        assert torch.equal(layer.mask, layer.mask[:1, :1].expand_as(layer.mask))
    model(X)
    assert not model[2].weight[:, :, 2].any() and model[2].weight[8, 10, 0].all()


def test_levels_have_no_part_of_weights_that_the_forward_writes() -> None:
    """It may assign others, which then are the level's alone."""
    model = write_first(lambda w: w.clamp_(0))
    widths = discover(model, X)
    with pytest.raises(StructureError, match=r"'stem' is of weights that the forward changes, .* whole"):
        Levels(model, widths, [{"stem": 4}])
    small = Levels(model, widths, [{"last": 3}])[0]
    small(X)
    assert small.inner.weight is model.inner.weight


def test_a_flag_that_is_none_of_writing_fixes_nothing() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        weight = m.inner.weight
        drawn = F.dropout(weight, 0.0, True) - weight.mean((1, 2, 3), True)
        return F.conv2d(F.relu(x, True), drawn)

    assert list(find_widths(between(forward, inner=nn.Conv2d(8, 8, 1)), X)) == ["stem", "inner", "last"]


def join_earlier(m: nn.Module, x: Tensor) -> Tensor:
    """Change maps that a list holds."""
    maps = []
    for k in range(3):
        y = x * (k + 2)
        maps.append(y)
        y += x
    return torch.cat(maps, 1)


def change_view(m: nn.Module, x: Tensor) -> Tensor:
    flat = (x * 2).flatten(2)
    rows = flat.transpose(1, 2)
    rows /= 3
    return flat


def change_chunk(m: nn.Module, x: Tensor) -> Tensor:
    first, second = x.chunk(2, 1)
    first *= second
    first -= 1
    return x


def change_what_stays(m: nn.Module, x: Tensor) -> Tensor:
    y = m.same(x)
    y += 1
    return x * y


def change_number(m: nn.Module, x: Tensor) -> Tensor:
    height = x.shape[2]
    both = height
    both += x.shape[3]
    return x.mean((2, 3), keepdim=True).expand(-1, -1, height, both)


ALIASES = (join_earlier, change_view, change_chunk, change_what_stays, change_number)


@pytest.mark.parametrize("forward", ALIASES)
@torch.no_grad()
def test_a_traced_network_sees_what_is_changed_under_another_name(
    forward: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    model = Net(lambda m, x: forward(m, m.stem(x)), stem=nn.Conv2d(3, 8, 1), same=nn.Identity()).eval()
    torch.testing.assert_close(trace(model, X.to("meta"))(X), model(X), rtol=0, atol=0)


def test_what_nothing_else_sees_is_traced_as_a_tensor_of_its_own() -> None:
    """As a residual is: its maps may be switched, and be kept for the gradient."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.stem(x)
        y += x.mean()
        y *= 2
        return y

    traced = trace(Net(forward, stem=nn.Conv2d(3, 8, 1)), X.to("meta"))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert targets == [operator.add, operator.mul]


def test_statistics_that_a_forward_writes_keep_no_channels() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        if m.training:
            with torch.no_grad():
                m.mean.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))
        return x - m.mean[:, None, None]

    assert list(find_widths(between(forward, mean=nn.Buffer(torch.zeros(8))), X)) == ["stem", "last"]


def test_what_is_changed_may_be_called_as_a_view_is() -> None:
    """An input, a parameter and a layer, whose names are those of methods."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last, self.view = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.ReLU()
            self.narrow = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t.mul_(2)
            with torch.no_grad():
                self.narrow.clamp_(0)
            y: Tensor = self.view(self.stem(x))
            y.mul_(t[:, None, None, None])
            return self.last(y * self.narrow[:, None, None])  # type: ignore[no-any-return]

    widths = find_widths(Named(), X, torch.ones(2))
    assert list(widths) == ["stem"] and widths.written == {""}


def cut_below(m: nn.Module, y: Tensor) -> Tensor:
    y[y < 0] = 0
    return y


def fill_up(m: nn.Module, y: Tensor) -> Tensor:
    """Zeros, of channels that are off, too."""
    y[y <= 0] = 0.5
    return y


def fill_with_a_tensor(m: nn.Module, y: Tensor) -> Tensor:
    y[torch.isnan(y) | (y > 1)] = y.new_tensor(0.25)
    return y


def leave_samples_out(m: nn.Module, y: Tensor) -> Tensor:
    y[torch.arange(len(y), device=y.device) > 0] = 0
    return y


@torch.no_grad()
@pytest.mark.parametrize("write", [cut_below, fill_up, fill_with_a_tensor, leave_samples_out])
def test_one_value_written_where_a_mask_has_it_leaves_channels_free(
    write: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    net = between(write).eval()
    expected = net(X)
    widths = discover(net, X, check=True)
    assert set(widths) == {"stem", "last"}
    order = torch.randperm(8)
    reindex(net, widths, {"stem": order})
    torch.testing.assert_close(net(X), expected)
    attach_gates(net, widths, "channel")
    next(gate for path, _, gate in iterate_gates(net) if path == "stem").score[:3] = -1
    expected = net(X)
    compacted = compact(net, X)
    assert compacted.stem.out_channels == 5
    torch.testing.assert_close(compacted(X), expected)
