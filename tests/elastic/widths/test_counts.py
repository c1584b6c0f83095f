"""Numbers computed from sizes: followed where they count the channels they stand for, else refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.errors import StructureError
from elastic.surgery.checking import fix_wrong_widths
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover, find_widths
from tests.elastic.widths.odd import between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))


def unpack_own(m, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, c, h * w).reshape(b, c, h, w)


def unpack_anothers(m, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return m.one(x).reshape(b, c, h * w).reshape(b, c, h, w)


def shuffle_if_divisible(m, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    if c % 4 != 0:
        raise ValueError("not in four groups")
    assert c % 2 == 0
    return x.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)


def cut_in_two(m, x: Tensor) -> Tensor:
    assert x.shape[1] % 4 == 0
    a, b = x.chunk(2, 1)
    return torch.cat([a * b, a], 1)


def shuffle_by_shape(m, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.reshape(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, -1, h, w)


def attend(m, x: Tensor) -> Tensor:
    """Attend over positions, by the number of channels (arXiv 1805.08318, section 3)."""
    b, c, h, w = x.shape
    weights = torch.softmax((x.flatten(2) * c**-0.5).mean(1, keepdim=True), -1)
    return x * weights.view(b, 1, h, w)


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "own shape, unpacked": lambda: between(unpack_own),
    "size() of each": lambda: between(lambda m, x: x.view(x.size(0), x.size(1), -1).view(x.size())),
    "own shape, joined": lambda: between(lambda m, x: x.view(x.shape[:2] + (-1,)).view(x.shape)),
    "product of sizes": lambda: between(
        lambda m, x: m.up(x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]))[..., None, None],
        up=nn.Linear(8 * 48, 8),
    ),
    "number of entries": lambda: between(
        lambda m, x: m.up(x.reshape(x.shape[0], x.numel() // x.shape[0]))[..., None, None],
        up=nn.Linear(8 * 48, 8),
    ),
    "channel shuffle": lambda: between(shuffle_by_shape),
    "unflattened": lambda: between(lambda m, x: x.unflatten(1, (2, x.shape[1] // 2)).flatten(1, 2)),
    "first half": lambda: between(lambda m, x: x[:, : x.shape[1] // 2], reads=4),
    "quarter and rest": lambda: between(
        lambda m, x: torch.cat([x[:, : x.shape[1] // 4], F.relu(x[:, x.shape[1] // 4 :])], 1)
    ),
    "split in half": lambda: between(lambda m, x: x.split(x.shape[1] // 2, 1)[1], reads=4),
    "split by a list": lambda: between(
        lambda m, x: x.split([x.shape[1] // 4, x.shape[1] - x.shape[1] // 4], 1)[1], reads=6
    ),
    "another's shape": lambda: between(unpack_anothers, one=conv(8, 8)),
    "view of another's shape": lambda: between(lambda m, x: m.one(x).view(x.shape), one=conv(8, 8)),
    "ones of that shape": lambda: between(lambda m, x: x * x.new_ones(x.shape[1], 1, 1)),
    "filled by that shape": lambda: between(lambda m, x: x * torch.full(x.shape, 0.5)),
    "filled by a keyword": lambda: between(lambda m, x: x * x.new_full(size=x.shape, fill_value=0.5)),
    "numbers that no channel changes": lambda: between(
        lambda m, x: x * x.dim() * x.ndim * len(x.shape) * x.element_size() * len(x) * len(x.mean(1))
    ),
    "types that no channel changes": lambda: between(lambda m, x: torch.relu(x).to(x.dtype).to(x.device)),
    "as many as another's": lambda: between(
        lambda m, x: x + m.one(x) if x.shape == m.one(x).shape else x, one=conv(8, 8)
    ),
    "one by one": lambda: between(
        lambda m, x: (
            x + m.one(x) if all(a == b for a, b in zip(x.shape, m.one(x).size(), strict=True)) else x
        ),
        one=conv(8, 8),
    ),
    "as many, and not added": lambda: between(
        lambda m, x: m.one(x) if m.one(x).size(1) == x.size(1) else x[:, :1], one=conv(8, 8)
    ),
    "more of other sizes": lambda: between(
        lambda m, x: m.short(x) + m.one(x) if x.shape != m.one(x).shape else x + m.one(x),
        **dict(one=conv(8, 8, 1, stride=2), short=conv(8, 8, 1, stride=2)),
    ),
    "there are channels": lambda: between(lambda m, x: x * 2 if x.shape[1] != 0 and x.size(1) > 0 else x),
    "there is none": lambda: between(lambda m, x: x if x.shape[1] == 0 or x.size(1) < 1 else x * 2),
    "there is one at least": lambda: between(
        lambda m, x: x * 2 if x.shape[1] >= 1 and 2 * x.size(1) > 1 else x
    ),
    "entries are counted in 32 bits": lambda: between(
        lambda m, x: x.contiguous() if x.numel() * 4 > 2**31 or x.nelement() >= 2**31 - 1 else x * 2
    ),
    "tensors are told": lambda: between(lambda m, x: x * 2 if isinstance(x, Tensor) else 1 / len(x[0])),
    "so are they by torch": lambda: between(
        lambda m, x: x * 2 if torch.is_tensor(x) and torch.jit.isinstance(x, Tensor) else 1 / len(x[0])
    ),
    "a shape is none": lambda: between(lambda m, x: 1 / len(x[0]) if isinstance(x.shape, Tensor) else x),
    "divisible as it is cut": lambda: between(shuffle_if_divisible),
    "computed from space": lambda: between(lambda m, x: x * x.shape[3] ** -0.5),
}
MIXED: dict[str, Callable[[], nn.Module]] = {
    "root mean square": lambda: between(lambda m, x: F.normalize(x, dim=1) * x.shape[1] ** 0.5),
    "by the number first": lambda: between(lambda m, x: x.shape[1] ** 0.5 * F.normalize(x, dim=1)),
    "by a norm of one's own": lambda: between(
        lambda m, x: x / (x.norm(dim=1, keepdim=True) + 1e-6) / (1 / x.size(1) ** 0.5)
    ),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scaled by channels": (lambda: between(lambda m, x: x * x.shape[1] ** -0.5), "computes with the number"),
    "divided by channels": (lambda: between(lambda m, x: x / x.size(1)), "computes with the number"),
    "attention": (lambda: between(attend), "computes with the number"),
    "divided by entries": (lambda: between(lambda m, x: x / x.numel()), "computes with the number"),
    "entries by another name": (lambda: between(lambda m, x: x / x.nelement()), "computes with the number"),
    "entries by a function": (
        lambda: between(lambda m, x: x / torch.numel(input=x)),
        "computes with the number",
    ),
    "entries of a shape": (lambda: between(lambda m, x: x / x.shape.numel()), "computes with the number"),
    "bytes": (lambda: between(lambda m, x: x / x.nbytes), "computes with the number"),
    "step in memory": (lambda: between(lambda m, x: x / x.stride(0)), "computes with the number"),
    "steps in memory": (lambda: between(lambda m, x: x / x.stride()[0]), "computes with the number"),
    "length": (lambda: between(lambda m, x: x / len(x[0])), "decides by the number"),
    "length of a weight": (lambda: between(lambda m, x: x / len(m.stem.weight)), "decides by the number"),
    "more than one": (lambda: between(lambda m, x: x * 2 if x.shape[1] > 1 else x), "decides by the number"),
    "below nine": (lambda: between(lambda m, x: x * 2 if x.shape[1] - 9 < 0 else x), "decides by the number"),
    "as many as written": (
        lambda: between(lambda m, x: x * 2 if x.shape[1:] == (8, 6, 8) else x),
        "decides by the number",
    ),
    "fewer than another's": (
        lambda: between(lambda m, x: x if x.shape == m.one(x).shape else x * 2, one=conv(8, 6)),
        "decides by the number",
    ),
    "filled with channels": (
        lambda: between(lambda m, x: x * torch.full((1,), x.shape[1])),
        "computes with the number",
    ),
    "filled with what channels give": (
        lambda: between(lambda m, x: x * x.new_full(size=(1,), fill_value=1 / x.shape[1])),
        "computes with the number",
    ),
    "divisible": (
        lambda: between(lambda m, x: x * 2 if x.shape[1] % 4 == 0 else x),
        "decides by the number",
    ),
    "divisible, and cut otherwise": (lambda: between(cut_in_two), "decides by the number"),
    "all but four": (lambda: between(lambda m, x: x[:, : x.shape[1] - 4], reads=4), "fixes the number"),
    "from four on": (lambda: between(lambda m, x: x[:, x.shape[1] - 4 :], reads=4), "fixes the number"),
    "rounded": (lambda: between(lambda m, x: x[:, : x.shape[1] // 3], reads=2), "fixes the number"),
    "split at four": (
        lambda: between(lambda m, x: x.split([4, x.shape[1] - 4], 1)[0], reads=4),
        "fixes the number",
    ),
}


@pytest.mark.parametrize("build", FOLLOWED.values(), ids=FOLLOWED)
def test_a_size_that_counts_its_channels_is_followed(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    widths = discover(model, X)
    assert "stem" in widths
    names = list(widths)
    fix_wrong_widths(model, widths)
    assert list(widths) == names


@pytest.mark.parametrize("build", MIXED.values(), ids=MIXED)
def test_a_number_may_scale_what_is_normalised_over_the_channels_that_it_counts(
    build: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = build()
    widths = discover(model, X)
    fix_wrong_widths(model, widths)
    assert widths["stem"].mixed is not None
    reindex(model, widths, {"stem": [0, 2, 5]})
    assert model(X).shape == (2, 5) and widths["stem"].size == 3


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_another_number_fixes_the_channels_it_is_computed_from(
    build: Callable[[], nn.Module], reason: str
) -> None:
    torch.manual_seed(0)
    widths = find_widths(build(), X)
    assert reason in widths.fixed["stem"]


class Named(nn.Module):
    """Give inputs and layers the names of what counts channels."""

    def __init__(self) -> None:
        super().__init__()
        self.len, self.numel, self.last = conv(3, 8), nn.ReLU(), conv(8, 5)

    def forward(self, x: Tensor, size: int = 2, mul: float = 0.5) -> Tensor:
        return self.last(self.numel(self.len(x)) * size * mul).mean((2, 3))  # type: ignore[no-any-return]


def test_inputs_and_layers_may_be_called_as_functions_are() -> None:
    assert discover(Named(), X).sizes() == {"len": 8}


def test_an_assertion_on_channels_fixes_them() -> None:
    def forward(m, x: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 8, "eight channels")
        return x

    with pytest.raises(StructureError, match="decides by the number of channels"):
        find_widths(between(forward), X)["stem"]
