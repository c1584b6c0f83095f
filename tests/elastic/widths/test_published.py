"""What published networks put between convolutions: attention, conditioning, coordinates, decoders."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.surgery.checking import fix_wrong_widths
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import find_widths
from tests.elastic.widths.odd import Forward, between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Build = Callable[[], nn.Module]


def just(forward: Forward, reads: int = 8, **layers: Callable[[], Any]) -> Build:
    return lambda: between(forward, reads, **{name: make() for name, make in layers.items()})


def attend_to_places(m: Any, x: Tensor) -> Tensor:
    """Look at the largest and the mean channel (CBAM, arXiv 1807.06521)."""
    top, _ = torch.max(x, dim=1, keepdim=True)
    return x * m.look(torch.cat([top, x.mean(1, keepdim=True)], 1)).sigmoid()


def add_coordinates(m: Any, x: Tensor) -> Tensor:
    """Join rows' numbers (CoordConv, arXiv 1807.03247)."""
    rows = torch.linspace(-1, 1, 8).view(1, 1, 8, 1).expand(2, 1, 8, 8)
    return m.one(torch.cat([x, rows.type_as(x)], 1))


def drop_blocks(m: Any, x: Tensor) -> Tensor:
    """Drop regions (DropBlock, arXiv 1810.12890), here always the same."""
    mask = (torch.ones(x.size(0), *x.shape[2:]).cumsum(1) < 6).to(x)
    return x * F.max_pool2d(mask[:, None], 3, 1, 1) / mask.mean()


def modulate(m: Any, x: Tensor) -> Tensor:
    """Scale and shift by what a linear layer gives (FiLM, arXiv 1709.07871)."""
    p, n = m.project(x.mean((2, 3)).relu()), x.size(1)
    return x * p[:, :n, None, None] + p[:, n:, None, None]


def modulate_twice(m: Any, x: Tensor) -> Tensor:
    p, n = m.project(m.one(x).mean((2, 3)).relu()), x.size(1)
    return x * p[:, :n, None, None] + p[:, n : 2 * n, None, None] * p[:, 2 * n :, None, None]


def modulate_parts(m: Any, x: Tensor) -> Tensor:
    scale, shift = m.project(x.mean((2, 3)).relu()).split(x.size(1), 1)
    return x * scale[..., None, None] + shift[..., None, None]


def modulate_at_the_end(m: Any, x: Tensor) -> Tensor:
    """Cut where twice as many channels end as there are."""
    p = m.project(x.mean((2, 3)).relu())
    return x * p[:, 2 * x.size(1) :, None, None]


def join_half(m: Any, x: Tensor) -> Tensor:
    """Join half as many channels of another width."""
    return torch.cat([x, m.one(x)[:, : x.size(1) // 2]], 1)


def attend_in_place(m: Any, x: Tensor) -> Tensor:
    """Attend between places, by a product that is scaled (as in the memory-saving attention of diffusion)."""
    y = x.flatten(2).transpose(1, 2)
    weight = torch.baddbmm(y.new_zeros(1, 1, 1), y, y.transpose(1, 2), beta=0, alpha=0.1).softmax(-1)
    return torch.bmm(weight, y).transpose(1, 2).reshape(x.shape)


def decode(m: Any, x: Tensor) -> Tensor:
    """Begin maps from a vector, as generators do (DCGAN, arXiv 1511.06434)."""
    return F.relu(m.up(m.maps(m.begin(x.mean((2, 3))))))


def decoder(sizes: tuple[int, ...], begin: int = 96) -> Build:
    return just(
        decode,
        begin=lambda: nn.Linear(8, begin),
        maps=lambda: nn.Unflatten(1, sizes),
        up=lambda: nn.ConvTranspose2d(6, 8, 4),
    )


def pad_shortcut(m: Any, x: Tensor) -> Tensor:
    """Add what has fewer channels, between others of zeros (ResNet, arXiv 1512.03385, option A)."""
    return F.relu(m.wide(F.relu(x))[:, :, ::2, ::2] + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))


def weigh_frequencies(m: Any, x: Tensor) -> Tensor:
    """Weigh what a Fourier transform over space gives (GFNet, arXiv 2107.00645)."""
    y = torch.fft.rfft2(x, dim=(2, 3), norm="ortho") * torch.view_as_complex(m.weight)
    return torch.fft.irfft2(y, s=x.shape[2:], dim=(2, 3), norm="ortho")


def convolve_frequencies(m: Any, x: Tensor) -> Tensor:
    """Convolve real and imaginary parts as channels (Fast Fourier Convolution)."""
    y = torch.fft.rfft2(x)
    y = F.relu(m.one(torch.cat([y.real, y.imag], 1)))
    return torch.fft.irfft2(torch.complex(*y.chunk(2, 1)), s=x.shape[-2:])


def transform_image(m: Any, x: Tensor) -> Tensor:
    """Move images by what a layer says (spatial transformer networks, arXiv 1506.02025)."""
    theta = m.locate(x.mean((2, 3))).tanh().view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def blur(m: Any, x: Tensor) -> Tensor:
    """Blur each channel by a filter that the forward makes (anti-aliased networks, arXiv 1904.11486)."""
    line = torch.tensor([1.0, 2.0, 1.0]).to(x.device, x.dtype)
    line = line.type(x.dtype) / 4
    filters = (line[:, None] * line)[None, None].expand(x.size(1), 1, 3, 3)
    return F.conv2d(F.pad(x, [1, 1, 1, 1], mode="reflect"), filters, stride=2, groups=x.size(1))


def add_rows(m: Any, x: Tensor) -> Tensor:
    """Join rows' numbers, for as many images and places as there are."""
    rows = torch.linspace(-1, 1, 8).view(1, 1, x.shape[2], 1).expand(x.shape[0], 1, -1, x.shape[3])
    return m.one(torch.cat([x, rows, torch.ones(1, 1, 1, 8).repeat(x.size(0), 1, x.size(2), 1)], 1))


def turn_pairs(m: Any, x: Tensor) -> Tensor:
    """Turn pairs of channels that lie side by side (RoFormer, arXiv 2104.09864)."""
    a, b, angle = x[:, ::2], x[:, 1::2], x.mean((2, 3), keepdim=True)[:, 0::2]
    return torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 2).flatten(
        1, 2
    )


def weigh_operations(m: Any, x: Tensor) -> Tensor:
    """Sum candidates, each by its share (DARTS, arXiv 1806.09055)."""
    candidates = (m.one, F.relu, m.two)
    return sum(share * run(x) for share, run in zip(m.shares.softmax(0), candidates, strict=True))


def remember(m: Any, x: Tensor) -> Tensor:
    """Keep a state from step to step (convolutional LSTM, arXiv 1506.04214), which begins with zeros."""
    state = cell = torch.zeros(x.shape[0], m.hidden, *x.shape[2:])
    for _ in range(2):
        i, f, o, g = torch.split(m.gates(torch.cat([x, state], 1)), m.hidden, 1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        state = o.sigmoid() * cell.tanh()
    return state


def normalise_by_shape(m: Any, x: Tensor) -> Tensor:
    return x / torch.tensor(x.shape[2:]).prod() + x.new_tensor([1.0, 2, 3, 4, 5, 6, 7, 8])


# The sizes of what is free.
FOLLOWED: dict[str, tuple[Build, dict[str, int]]] = {
    "attention to places": (
        just(attend_to_places, look=lambda: conv(2, 1, 7)),
        {"stem": 8},
    ),
    "the smallest channel": (just(lambda m, x: x * x.min(1, True).values), {"stem": 8}),
    "coordinates": (just(add_coordinates, one=lambda: conv(9, 8)), {"stem": 8, "one": 8}),
    "rows": (just(add_rows, one=lambda: conv(10, 8)), {"stem": 8, "one": 8}),
    "values that the forward makes": (just(normalise_by_shape), {"stem": 8}),
    "weights of frequencies": (
        just(weigh_frequencies, weight=lambda: nn.Parameter(torch.rand(8, 8, 5, 2))),
        {"stem": 8},
    ),
    "convolution of frequencies": (
        just(convolve_frequencies, one=lambda: conv(16, 16)),
        {"stem": 8, "one": 8},
    ),
    "flattened by a product": (
        just(
            lambda m, x: m.all(x.view(-1, math.prod(x.shape[1:])))[..., None, None],
            all=lambda: nn.Linear(512, 8),
        ),
        {"stem": 8, "all": 8},
    ),
    "flattened by NumPy": (
        just(
            lambda m, x: m.all(x.view(-1, np.prod(x.shape[1:])))[..., None, None],
            all=lambda: nn.Linear(512, 8),
        ),
        {"stem": 8, "all": 8},
    ),
    "numbers of NumPy": (
        just(lambda m, x: x / np.sqrt(x.shape[3]) * float(np.array(x.shape[2:]).sum())),
        {"stem": 8},
    ),
    "turned pairs": (just(turn_pairs), {"stem": 4}),
    "weighed candidates": (
        just(
            weigh_operations,
            one=lambda: conv(8, 8),
            two=lambda: conv(8, 8, 3),
            shares=lambda: nn.Parameter(torch.rand(3)),
        ),
        {"stem": 8},
    ),
    "a state of zeros": (
        just(remember, 5, gates=lambda: conv(13, 20, 3), hidden=lambda: 5),
        {"stem": 8, "gates": 5},
    ),
    "as many entries as an attribute says": (
        just(
            lambda m, x: (
                m.one(x) * x.mean(1, True).expand(-1, m.width, -1, -1)
                + x.amax(1, True).repeat(1, m.width, 1, 1)
            ),
            6,
            one=lambda: conv(8, 6),
            width=lambda: 6,
        ),
        {"stem": 8, "one": 6},
    ),
    "samples one by one": (just(lambda m, x: torch.stack([F.relu(sample) for sample in x])), {"stem": 8}),
    "moved images": (just(transform_image, locate=lambda: nn.Linear(8, 6)), {"stem": 8}),
    "blur": (just(blur), {"stem": 8}),
    "regions": (just(drop_blocks), {"stem": 8}),
    "of the type of others": (
        just(lambda m, x: m.one(x).type_as(x), one=lambda: conv(8, 8)),
        {"stem": 8, "one": 8},
    ),
    "of the type of more": (
        just(lambda m, x: m.one(x).to(x), reads=4, one=lambda: conv(8, 4)),
        {"stem": 8, "one": 4},
    ),
    "scaled and shifted": (just(modulate, project=lambda: nn.Linear(8, 16)), {"stem": 8}),
    "three parts": (
        just(modulate_twice, project=lambda: nn.Linear(6, 24), one=lambda: conv(8, 6)),
        {"stem": 8, "one": 6},
    ),
    "split by others' number": (just(modulate_parts, project=lambda: nn.Linear(8, 16)), {"stem": 8}),
    "the last of three parts": (just(modulate_at_the_end, project=lambda: nn.Linear(8, 24)), {"stem": 8}),
    "half as many of another": (just(join_half, 12, one=lambda: conv(8, 12)), {"stem": 4}),
    "product": (
        just(
            lambda m, x: x * torch.mm(x.mean((2, 3)), m.weight)[..., None, None],
            weight=lambda: nn.Parameter(torch.rand(8, 8)),
        ),
        {"stem": 8},
    ),
    "product and sum": (
        just(
            lambda m, x: x * torch.addmm(m.shift, m.one(x).mean((2, 3)), m.weight)[..., None, None],
            one=lambda: conv(8, 6),
            weight=lambda: nn.Parameter(torch.rand(6, 8)),
            shift=lambda: nn.Parameter(torch.rand(8)),
        ),
        {"stem": 8, "one": 6},
    ),
    "product and sum of matrices": (
        just(
            lambda m, x: x * (m.two(x).mean((2, 3)).addmm(m.one(x).mean((2, 3)), m.weight))[..., None, None],
            one=lambda: conv(8, 6),
            two=lambda: conv(8, 8),
            weight=lambda: nn.Parameter(torch.rand(6, 8)),
        ),
        {"stem": 8, "one": 6},
    ),
    "attention by products": (just(attend_in_place), {"stem": 8}),
    "decoder": (decoder((6, 4, 4)), {"stem": 8, "begin": 6, "up": 8}),
    "decoder, counted from what is left": (decoder((-1, 4, 4)), {"stem": 8, "begin": 6, "up": 8}),
    "decoder by an attribute": (
        just(
            lambda m, x: m.up(m.begin(x.mean((2, 3))).unflatten(1, (m.channels, 4, 4))),
            channels=lambda: 6,
            begin=lambda: nn.Linear(8, 96),
            up=lambda: nn.ConvTranspose2d(6, 8, 4),
        ),
        {"stem": 8, "begin": 6, "up": 8},
    ),
    "pairs of a layer": (
        just(
            lambda m, x: m.pairs(m.one(x)).sum(2),
            one=lambda: conv(8, 16),
            pairs=lambda: nn.Unflatten(1, (8, 2)),
        ),
        {"stem": 8, "one": 8},
    ),
    "padded shortcut": (just(pad_shortcut, 12, wide=lambda: conv(8, 12, 3)), {"stem": 8}),
    "padded at one end": (
        just(lambda m, x: F.pad(x, [0, 0, 1, 1, 0, 2], "constant", 0.5), 10),
        {"stem": 8},
    ),
    "padded by a layer": (
        just(
            lambda m, x: m.pad(m.one(x)),
            9,
            one=lambda: conv(8, 6),
            pad=lambda: nn.ConstantPad3d((0, 0, 0, 0, 3, 0), 2.0),
        ),
        {"stem": 8, "one": 6},
    ),
    "unflattened to others' shape": (
        just(lambda m, x: x.flatten(1).unflatten(1, m.one(x).shape[1:]), one=lambda: conv(8, 8)),
        {"stem": 8},
    ),
    "of another type": (just(lambda m, x: x.to(torch.float64).to(x)), {"stem": 8}),
}


@pytest.mark.sampled(19)
@pytest.mark.parametrize(("build", "sizes"), FOLLOWED.values(), ids=FOLLOWED)
def test_what_is_published_is_followed(build: Build, sizes: dict[str, int]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    widths = find_widths(model, X)
    assert widths.sizes() == sizes | {"last": 5}, widths.fixed
    fix_wrong_widths(model, widths)
    assert widths.sizes() == sizes | {"last": 5}, widths.fixed
    for name, size in sizes.items():  # each by itself
        reindex(model, widths, {name: grow_index(size, 2)})
        with torch.no_grad():
            model(X)
    assert find_widths(model, X) == widths


REFUSED: dict[str, tuple[Build, str]] = {
    "the place of the largest channel": (
        just(lambda m, x: x * x.max(1, True)[1]),
        "says which channel is the largest",
    ),
    "numbers repeated as often as there are channels": (
        just(
            lambda m, x: torch.cat([x, torch.ones(1, 2, 1, 1).repeat(2, x.shape[1], 8, 8)], 1).sum(1, True), 1
        ),
        "computes with the number of channels",
    ),
    "from a written number on": (
        just(lambda m, x: x + m.one(x)[:, 4:], one=lambda: conv(8, 12)),
        "fixes the number of channels",
    ),
    "up to another number": (
        just(lambda m, x: x * m.one(x)[:, : x.size(1) + 1, :].mean(), one=lambda: conv(8, 12)),
        "fixes the number of channels",
    ),
    "added to a row of numbers": (
        just(
            lambda m, x: x * torch.addmm(torch.ones(8), m.one(x).mean((2, 3)), m.weight)[..., None, None],
            one=lambda: conv(8, 6),
            weight=lambda: nn.Parameter(torch.rand(6, 8)),
        ),
        "joins a part that never changes",
    ),
    "unflattened to numbers": (
        just(lambda m, x: x.unflatten(1, (4, 2)).flatten(1, 2)),
        "fixes the number of channels",
    ),
    "padded by neighbours": (
        just(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1), "replicate"), 10),
        "changes the number of channels",
    ),
    "padded and cut": (
        just(lambda m, x: F.pad(x, (0, 0, 0, 0, 3, -1)), 10),
        "changes the number of channels",
    ),
    "padded to a number": (
        just(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 12 - x.size(1))), 12),
        "computes with the number of channels",
    ),
    "channels counted by NumPy": (
        just(lambda m, x: x / np.sqrt(x.shape[1])),
        "decides by the number of channels",
    ),
    "frequencies of channels": (just(lambda m, x: torch.fft.fft(x, dim=1).real), "as if they were space"),
    "frequencies of all dimensions": (just(lambda m, x: torch.fft.fftn(x).real), "channels too"),
    "numbers of channels as values": (
        just(lambda m, x: x / torch.tensor(x.shape[1:]).prod()),
        "computes with the number of channels",
    ),
    "both, by names": (
        just(lambda m, x: (lambda top: x * top.values + top.indices)(x.max(1, True))),
        "says which channel is the largest",
    ),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_numbers_or_places_decide_is_refused(build: Build, reason: str) -> None:
    torch.manual_seed(0)
    widths = find_widths(build(), X)
    assert "stem" not in widths and reason in widths.fixed["stem"]


def test_a_place_that_is_an_output_fixes_the_channels() -> None:
    layers = nn.ModuleDict({"stem": conv(3, 8), "last": conv(8, 5)})

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Any:
            y = self.layers["stem"](x)
            return self.layers["last"](y), y.max(1)

    assert not find_widths(Both(), X)


def test_a_layer_that_unflattens_says_how_many_channels_it_gives() -> None:
    model = decoder((6, 4, 4))()
    reindex(model, find_widths(model, X), {"begin": grow_index(6, 2)})
    assert model.maps.unflattened_size == (8, 4, 4) and model.begin.out_features == 128
