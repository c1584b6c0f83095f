"""Torch's functions between two convolutions: channels pass, and surgery keeps what the network computes."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic import discover, reindex
from elastic.errors import StructureError
from elastic.widths.discovery import find_widths
from tests.elastic.zoo import Net, randomised

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
SHUFFLED = [3, -1, 0, 5, 1, 4, -1, 2]  # of six channels, with two fresh ones


def between(work: Callable[[Tensor], Tensor], ndim: int = 4, read: int = 6) -> Net:
    """A convolution, what it is about, and another one; `work` may be a layer."""
    torch.manual_seed(0)
    convolution = CONVOLUTIONS[ndim]
    layers = {"work": work} if isinstance(work, nn.Module) else {}

    def forward(m: Net, x: Tensor) -> Tensor:
        y: Tensor = m.last(getattr(m, "work", work)(m.stem(x)).float())
        return y.flatten(2).mean(2)

    return randomised(Net(forward, stem=convolution(3, 6, 1), last=convolution(read, 5, 1), **layers)).eval()


def example(ndim: int = 4) -> Tensor:
    return torch.randn(2, 3, *[8] * (ndim - 2), generator=torch.Generator().manual_seed(0))


def check_followed(model: nn.Module, x: Tensor) -> None:
    widths = discover(model, x)
    assert widths["stem"].size == 6
    expected = model(x).detach()
    reindex(model, widths, {"stem": SHUFFLED})
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


ONE_BY_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "atan": torch.atan,
    "arctan2": lambda x: torch.arctan2(x, x + 1),
    "asinh": lambda x: x.asinh(),
    "cosh": torch.cosh,
    "logit": lambda x: torch.logit(x.sigmoid()),
    "expit": torch.special.expit,
    "special": lambda x: torch.special.erf(x) * torch.special.log1p(x.abs()) + torch.special.ndtr(x),
    "logsigmoid": F.logsigmoid,
    "ldexp": lambda x: torch.ldexp(torch.deg2rad(x), torch.signbit(x).int()),
    "copysign": lambda x: torch.copysign(x.cos(), x),
    "hypot": lambda x: torch.hypot(x, x - 1),
    "fmax": lambda x: torch.fmax(x, -x),
    "fmod": lambda x: torch.fmod(x, 2),
    "remainder": lambda x: x % 2,
    "floor division": lambda x: x // 2,
    "sign": lambda x: +torch.sgn(x),
    "log10": lambda x: torch.log10(x.abs() + 1),
    "frac": lambda x: x.frac() + x.trunc() * 2,
    "not": lambda x: x * ~(x > 0),
    "and": lambda x: x * ((x > 0) & (x < 1)),
    "or": lambda x: x * ((x < 0) | (x > 1)),
    "xor": lambda x: x * ((x > 0) ^ (x > 1)),
    "logical_and": lambda x: x * torch.logical_and(x > 0, x < 1),
    "isfinite": lambda x: x * torch.isfinite(x),
    "long names": lambda x: torch.multiply(torch.subtract(x, torch.divide(x, 3)), torch.absolute(x)),
    # Functions that take a number for either argument look into what they take for a tensor of one entry.
    "pow": lambda x: torch.pow(x, 2),
    "float_power": lambda x: torch.float_power(x.abs(), 1.5).float(),
    "where, or a number": lambda x: torch.where(x > 0, x, 0.5) + torch.where(x > 1, 0.5, x),
    "bitwise_or with a number": lambda x: x * torch.bitwise_or(x > 0, False),
    "xlogy": lambda x: torch.xlogy(2.0, x.abs() + 1) * torch.isclose(x, x.relu()),
    "filled": lambda x: x * torch.empty_like(x).fill_(2.0) + x.clone().zero_(),
    "flat and back": lambda x: x.ravel().reshape(x.shape),
    "numbers rounded": lambda x: x * round(x.shape[3] / 3) + divmod(x.shape[2], 3)[1],
    "data": lambda x: x + x.data,
    "requires_grad_": lambda x: x.clone().requires_grad_(),
}
OVER_SPACE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmin": lambda x: F.softmin(x, 2),
    "softmin layer": nn.Softmin(3),
    "sort": lambda x: torch.sort(x, 2)[0],
    "sort by name": lambda x: x.sort(dim=-1).values,
    "argsort": lambda x: x.argsort(3),
    "max by name": lambda x: x.max(dim=3, keepdim=True).values,
    "place by name": lambda x: x.max(dim=3, keepdim=True).indices,
    "argmax": lambda x: x.argmax(2, keepdim=True),
    "argmin": lambda x: x.argmin(-1).unsqueeze(2),
    "median": lambda x: x.median(2, keepdim=True)[0],
    "mode": lambda x: x.round().mode(3, True).values,
    "topk": lambda x: x.topk(3, 3)[0],
    "topk at the end": lambda x: x.topk(3).values,
    "kthvalue": lambda x: x.kthvalue(3, 2).values.unsqueeze(2),
    "triangles": lambda x: x.tril() + torch.triu(x, 1) * 2,
    "distances": lambda x: torch.cdist(x, x[:, :, :3]),
    "similarities": lambda x: x * F.cosine_similarity(x, x.relu(), 2)[:, :, None],
    "distances of rows": lambda x: x * F.pairwise_distance(x, x.relu(), keepdim=True),
    "differences": lambda x: F.mse_loss(x, x.relu(), reduction="none") + F.huber_loss(x, x / 2, "none"),
    "divergence": lambda x: F.kl_div(x.log_softmax(2), x.softmax(2), reduction="none"),
    "gather": lambda x: x.flatten(2).gather(2, torch.arange(9).expand(2, x.shape[1], 9))[..., None],
    "gather in an order of its own": lambda x: torch.gather(x, 3, x.argsort(3)),
    "split_with_sizes": lambda x: x.split_with_sizes([2, 6], 2)[1],
    "max pool by its own name": lambda x: F.adaptive_max_pool2d_with_indices(x, 2)[0],
    "whole numbers": lambda x: (x * 9).short() + (x * 9).char(),
    "linalg.matmul": lambda x: torch.linalg.matmul(x, x),
    "special softmax": lambda x: torch.special.softmax(x, 2),
    "count_nonzero": lambda x: x.relu().count_nonzero(2).unsqueeze(2),
    "windows": lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)),
    "unfold and fold": lambda x: F.fold(F.unfold(x, 2, stride=2) ** 2, (8, 8), 2, stride=2),
    "fold layer": nn.Sequential(nn.Unfold(3, padding=1), nn.Fold((8, 8), 3, padding=1)),
    "tensor_split": lambda x: torch.tensor_split(x, 2, 2)[0],
    "dstack": lambda x: torch.dstack((x, x)),
    "vstack": lambda x: torch.vstack((x, x + 1)),
    "hstack": lambda x: torch.hstack((x[:, :, :4], x[:, :, 4:])).unflatten(1, (2, -1)).sum(1),
    "broadcast_to": lambda x: torch.broadcast_to(x.mean((2, 3), keepdim=True), x.shape),
    "lp_pool2d": lambda x: F.lp_pool2d(x, 2.0, 2),
}
LAYERS: list[tuple[nn.Module, int]] = [
    *((layer, 3) for layer in (nn.ReflectionPad1d(1), nn.ReplicationPad1d(2), nn.CircularPad1d(1))),
    *((layer, 3) for layer in (nn.ZeroPad1d(1), nn.ConstantPad1d((1, 2), 0.5), nn.LPPool1d(2, 2))),
    *((layer, 5) for layer in (nn.ReflectionPad3d(1), nn.ReplicationPad3d(2), nn.CircularPad3d(1))),
    *((layer, 5) for layer in (nn.ZeroPad3d(1), nn.ConstantPad3d(1, 0.5), nn.LPPool3d(2, 2))),
]


@pytest.mark.parametrize("work", (ONE_BY_ONE | OVER_SPACE).values(), ids=ONE_BY_ONE | OVER_SPACE)
def test_channels_pass(work: Callable[[Tensor], Tensor]) -> None:
    check_followed(between(work), example())


COMPARED: dict[str, Callable[[Tensor], Tensor]] = {
    "similarity": lambda x: F.cosine_similarity(x, x.relu())[:, None],
    "similarity of a layer": lambda x: nn.CosineSimilarity(1)(x, x.relu())[:, None],
    "distance": lambda x: F.pairwise_distance(x.movedim(1, 3), x.relu().movedim(1, 3))[:, None],
    "distance of a layer": lambda x: nn.PairwiseDistance()(x.movedim(1, 3), x.relu().movedim(1, 3))[:, None],
    "loss": lambda x: F.mse_loss(x, x.relu()) + F.smooth_l1_loss(x, x / 2, reduction="sum"),
    "loss of a layer": lambda x: nn.BCEWithLogitsLoss()(x, x.sigmoid()),
    "divergence": lambda x: F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"),
    "distance of all": lambda x: x.dist(x.relu()),
}


@pytest.mark.parametrize("compare", COMPARED.values(), ids=COMPARED)
def test_channels_that_are_compared_together_are_free_and_felt(compare: Callable[[Tensor], Tensor]) -> None:
    """A variational or quantizing network computes a part of its loss in its forward."""
    model = between(lambda x: x * compare(x))
    widths = discover(model, example(), check=True)
    assert widths["stem"].size == 6 and widths["stem"].mixed


@pytest.mark.parametrize(("layer", "ndim"), LAYERS, ids=lambda value: type(value).__name__)
def test_channels_pass_layers_of_other_dimensions(layer: nn.Module, ndim: int) -> None:
    check_followed(between(layer, ndim), example(ndim))


def test_a_linear_layer_reads_the_windows_of_unfold() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.head(m.read(F.unfold(m.stem(x), 3, padding=1).transpose(1, 2)).relu().mean(1)),
        **{"stem": nn.Conv2d(3, 6, 1), "read": nn.Linear(54, 7), "head": nn.Linear(7, 5)},
    ).eval()
    check_followed(model, example())
    assert model.read.weight.shape == (7, 72)


def test_equal_parts_of_a_number_stay_equal() -> None:
    model = between(lambda x: torch.maximum(*torch.tensor_split(x, 2, 1)), read=3)
    expected = model(example()).detach()
    widths = discover(model, example())
    assert widths.sizes() == {"stem": 3}
    reindex(model, widths, {"stem": [2, -1, 0, 1]})
    torch.testing.assert_close(model(example()), expected)


def test_distances_sum_over_channels() -> None:
    def weigh(x: Tensor) -> Tensor:
        points = x.flatten(2).transpose(1, 2)
        return (torch.cdist(points, points[:, :9]).softmax(-1) @ points[:, :9]).transpose(1, 2).view(x.shape)

    model = between(weigh)
    expected = model(example()).detach()
    widths = discover(model, example())
    assert "sums over its channels" in str(widths["stem"].mixed)
    reindex(model, widths, {"stem": [3, 2, 0, 5, 1, 4]})
    torch.testing.assert_close(model(example()), expected)


FIXED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sort": (lambda x: x.sort(1)[0], "sort(1) in the model's forward ranks its channels"),
    "median of all": (lambda x: x * x.median(), "median() in the model's forward ranks its channels"),
    "argmax": (lambda x: x * x.argmax(1, True), "argmax(1, True) in the model's forward says which channel"),
    "windows": (
        lambda x: x.unfold(1, 6, 1)[..., 0].repeat(1, 6, 1, 1),
        "works on channels as if they were space",
    ),
    "cuts that are written": (
        lambda x: sum(torch.tensor_split(x, (2, 4), 1)).repeat(1, 3, 1, 1),
        "tensor_split(2, 4, 1) in the model's forward fixes the number of channels",
    ),
    "triangles": (
        lambda x: x.permute(0, 2, 3, 1).tril().permute(0, 3, 1, 2),
        "tril() in the model's forward depends on the order of its channels",
    ),
    "neighbours": (
        lambda x: F.local_response_norm(x, 2),
        "local_response_norm(2) in the model's forward depends on the order of its channels",
    ),
    "layer of neighbours": (
        nn.LocalResponseNorm(2),
        "work (LocalResponseNorm) depends on the order of its channels",
    ),
}


@pytest.mark.parametrize(("work", "reason"), FIXED.values(), ids=FIXED)
def test_channels_that_are_compared_stay(work: Callable[[Tensor], Tensor], reason: str) -> None:
    model = between(work)
    widths = find_widths(model, example())
    assert reason in widths.fixed["stem"]
    with pytest.raises(StructureError):
        widths["stem"]


class Asserting(nn.Module):
    """Knows how many channels it has, and sees to it that it is given as many."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 6
        self.stem, self.last, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 1), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).relu()
        self.look(y)
        return self.head(self.last(y).mean((2, 3)))  # type: ignore[no-any-return]

    def look(self, y: Tensor) -> None:
        assert y.shape[1] == self.width


class AttributeFirst(Asserting):
    def look(self, y: Tensor) -> None:
        assert self.width == y.size(1)


class ByTorch(Asserting):
    def look(self, y: Tensor) -> None:
        torch._assert(condition=y.shape[1] == self.last.in_channels, message="other channels")


class Raising(Asserting):
    def look(self, y: Tensor) -> None:
        if y.shape[1] != self.width:
            raise ValueError("other channels")


@pytest.mark.parametrize("kind", [Asserting, AttributeFirst, ByTorch, Raising])
def test_a_comparison_with_an_attribute_follows_the_channels(kind: type[Asserting]) -> None:
    model = kind().eval()
    check_followed(model, example())
    assert model.width == (6 if kind is ByTorch else 8)
    assert discover(model, example()).sizes() == {"stem": 8, "last": 5}


class Written(Asserting):
    def look(self, y: Tensor) -> None:
        assert y.shape[1] == 6


class OneMore(Asserting):
    def look(self, y: Tensor) -> None:
        assert y.shape[1] != self.width + 1


class AtLeast(Asserting):
    def look(self, y: Tensor) -> None:
        assert y.shape[1] >= self.width


@pytest.mark.parametrize("kind", [Written, OneMore, AtLeast])
def test_any_other_comparison_fixes_them(kind: type[Asserting]) -> None:
    widths = discover(kind(), example())
    assert list(widths) == ["last"] and "decides by the number of channels" in widths.fixed["stem"]
