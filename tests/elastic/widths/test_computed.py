"""Numbers that are computed from modules' attributes fix the channels they count; others leave them free."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.surgery.checking import fix_wrong_widths
from elastic.widths.discovery import find_widths
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
Use = Callable[["Counting", Tensor], Tensor]


class Counting(nn.Module):
    """Hold numbers of channels that follow these, and use them once more.

    `split(8)` gives one part, so that `wide` follows the channels of `stem`.
    """

    def __init__(self, use: Use) -> None:
        super().__init__()
        self.use, self.wide, self.narrow, self.loops = use, 8, 5, 2
        self.stem, self.norm, self.last, self.head = conv(3, 8), nn.BatchNorm2d(8), conv(8, 5), conv(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat(self.norm(self.stem(x)).split(self.wide, 1), 1)
        z = torch.cat(self.last(self.use(self, y)).relu().split(self.narrow, 1), 1)
        return self.head(z).mean((2, 3))  # type: ignore[no-any-return]


NUMBERS: dict[str, Callable[[int], Any]] = {
    "1.0 / n": lambda n: 1.0 / n,
    "2.0 * n": lambda n: 2.0 * n,
    "0.9 ** n": lambda n: 0.9**n,
    "0.5 + n": lambda n: 0.5 + n,
    "n ** -0.5": lambda n: n**-0.5,
    "n >> 1": lambda n: n >> 1,
    "1 << n": lambda n: 1 << n,
    "n & 6": lambda n: n & 6,
    "n | 1": lambda n: n | 1,
    "n ^ 1": lambda n: n ^ 1,
    "~n": lambda n: ~n,
    "+n": lambda n: +n,
    "abs": abs,
    "round": round,
    "math.ceil": math.ceil,
    "divmod": lambda n: divmod(n, 3)[0],
    "math.log2": math.log2,
    "kernel of ECA, arXiv 1910.03151": lambda n: int(abs((math.log2(n) + 1) / 2)),
    "math.gcd": lambda n: math.gcd(n, 48),
    "math.sqrt": math.sqrt,
    "range": lambda n: sum(1.0 for _ in range(n)),
    "index": lambda n: list(range(20))[n],
    "slice": lambda n: len(list(range(20))[:n]),
    "repeated": lambda n: len([0] * n),
    "formatted": lambda n: float(f"{n}"),
    "printed": lambda n: float("%d" % n),  # noqa: UP031
    "ones": lambda n: torch.ones(n).sum(),
    "tensor": lambda n: torch.tensor(n),
    "range of torch": lambda n: torch.arange(n).sum(),
    "random numbers": lambda n: torch.rand(n).sum(),
}


@pytest.mark.sampled(12)
@pytest.mark.parametrize("compute", NUMBERS.values(), ids=NUMBERS)
def test_a_number_computed_from_an_attribute_fixes_what_it_counts(compute: Callable[[int], Any]) -> None:
    widths = find_widths(Counting(lambda m, x: x * compute(m.wide)), X)
    assert widths.fixed["stem"] == "the forward computes with wide"
    assert widths.sizes() == {"last": 5}


def test_a_number_of_a_shape_in_whole_patches_is_followed() -> None:
    """As MobileViT of Transformers asks for it: a multiple of an attribute, within a call of Python's own."""

    def pad(m: Any, x: Tensor) -> Tensor:
        size = int(math.ceil(x.shape[2] / m.patch) * m.patch)
        return nn.functional.interpolate(x, (size, size)) if size != x.shape[2] else x

    model = Counting(pad)
    model.patch = 3
    assert "stem" in find_widths(model, X)


LAYERS: dict[str, Callable[[Counting], int]] = {
    "stem.out_channels": lambda m: m.stem.out_channels,
    "norm.num_features": lambda m: m.norm.num_features,
    "last.in_channels": lambda m: getattr(m.last, "in_" + "channels"),
}


@pytest.mark.parametrize("compute", [lambda n: 1.0 / n, math.log, lambda n: torch.zeros(n).numel()])
@pytest.mark.parametrize("name", LAYERS)
def test_so_does_one_of_a_layers_own(name: str, compute: Callable[[int], Any]) -> None:
    widths = find_widths(Counting(lambda m, x: x * compute(LAYERS[name](m))), X)
    assert widths.fixed["stem"] == f"the forward computes with {name}"
    assert widths.sizes() == {"last": 5}


def test_of_several_attributes_those_are_found_that_are_computed_with() -> None:
    widths = find_widths(Counting(lambda m, x: x * math.log(m.wide) * (3.0 * m.narrow)), X)
    assert {name: widths.fixed[name] for name in ("stem", "last")} == {
        "stem": "the forward computes with wide",
        "last": "the forward computes with narrow",
    }


def test_what_one_mode_computes_with_is_not_followed_in_the_other() -> None:
    def forward(m: Counting, x: Tensor) -> Tensor:
        return x * (1.0 / m.last.in_channels) if m.training else x[:, : m.last.in_channels]

    assert find_widths(Counting(forward), X).fixed["stem"] == "the forward computes with last.in_channels"


def keep_once(m: Counting, x: Tensor) -> Tensor:
    """Go another way the second time."""
    kept, m.kept = getattr(m, "kept", 1.0), 2.0
    return x * kept if kept == 1.0 else x * kept + 1


def assert_by_name(m: Counting, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == m.wide, f"there are not {m.wide} channels")
    return x


def ask(m: Counting, x: Tensor) -> Tensor:
    if x.shape[1] != m.wide or x.dim() != 4:
        raise ValueError(f"there are not {m.wide} channels")
    b, _, h, w = x.shape
    return x.view(b, m.wide, h * w).view(x.shape)


def flatten_rows(m: Counting, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(b, h, w * m.wide).view(b, h, w, -1).permute(0, 3, 1, 2)


FREE: dict[str, Use] = {
    "not used again": lambda m, x: x,
    "multiples": lambda m, x: x.repeat_interleave(2, 1).view(2, m.wide, 2, 6, 8).mean(2),
    "message of an assertion": assert_by_name,
    "asked": ask,
    "times a height": lambda m, x: x.reshape(x.shape[0], m.wide * x.shape[2], x.shape[3]).view(x.shape),
    "an area times it": lambda m, x: x.reshape(2, x.shape[2] * x.shape[3] * m.wide).view(x.shape),
    "a width times it, beside channels last": flatten_rows,
    "other numbers": lambda m, x: sum(x * (0.5 * i) for i in range(m.loops)) * math.log(m.loops),
    "random numbers": lambda m, x: x * torch.rand(1),
    "kept": keep_once,
}


@pytest.mark.parametrize("use", FREE.values(), ids=FREE)
def test_a_number_that_is_not_computed_with_leaves_its_channels_free(use: Use) -> None:
    torch.manual_seed(0)
    model = Counting(use)
    widths = find_widths(model, X)
    assert widths.sizes() == {"stem": 8, "last": 5}
    if use not in (FREE["random numbers"], keep_once):
        fix_wrong_widths(model, widths)
        assert widths.sizes() == {"stem": 8, "last": 5}
    assert model.wide == 8 and model.training
