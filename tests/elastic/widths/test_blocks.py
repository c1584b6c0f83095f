"""Blocks of published networks and unusual forwards, each between two convolutions: followed, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.errors import StructureError
from elastic.measure.counts import count_macs
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates, iterate_gates, set_score
from elastic.surgery.checking import fix_wrong_widths
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import find_widths
from elastic.widths.tracing import make_meta_copy, trace, trace_both_modes
from elastic.widths.width import Widths
from tests.elastic.widths.odd import between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2, arXiv 2301.00808."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.rand(1, 1, 1, channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        x = self.gamma * (x * norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)) + self.beta + x
        return x.permute(0, 3, 1, 2)


class StandardisedByMoments(nn.Conv2d):
    """Weight standardisation, arXiv 1903.10520."""

    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(var + 1e-7)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedInSteps(nn.Conv2d):
    """The same, as its authors wrote it."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = w - w.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        w = w / std.expand_as(w)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByNorm(nn.Conv2d):
    """The same by batch norm, with a gain (NFNet, arXiv 2101.08692)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain, self.scale = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1)), 0.5

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1),
            *(None, None),
            weight=(self.gain * self.scale).view(-1),
            training=True,
            momentum=0.0,
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Computed(nn.Module):
    """A convolution whose weight and bias are computed."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8, 8, 3, 3)), nn.Parameter(torch.rand(8))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.compute(self.weight), self.bias * 0.1, padding=1)


class Scaled(Computed):
    """A convolution whose weight has a gain of its own for each row, of its norm or as it is."""

    def __init__(self, divide: Callable[[Tensor], Tensor] = lambda w: w) -> None:
        super().__init__(lambda w: self.gain * divide(w))
        self.gain = nn.Parameter(torch.rand(8, 1, 1, 1))


class NormedByHand(Scaled):
    """Weight norm as papers' code has it (arXiv 1602.07868)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__(lambda w: w / w.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


class Masked(Computed):
    """A convolution whose weight a buffer masks, entry by entry (X-Nets, arXiv 1711.08757; PixelCNN)."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(lambda w: mask(w, self.mask))
        self.register_buffer("mask", torch.ones(8, 8, 3, 3).triu().to(dtype))


class CentralDifference(nn.Module):
    """Central difference convolution, arXiv 2003.04092: the sum of each kernel is a kernel, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.conv.weight.sum(2).sum(2)[:, :, None, None]
        return self.conv(x) - 0.7 * F.conv2d(x, kernel)


class PaddedAlike(nn.Conv2d):
    """Pads as much as the input's size asks for."""

    def forward(self, x: Tensor) -> Tensor:
        excess = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        if any(excess):
            x = F.pad(
                x, (excess[1] // 2, excess[1] - excess[1] // 2, excess[0] // 2, excess[0] - excess[0] // 2)
            )
        return F.conv2d(x, self.weight, self.bias, 2, 0, self.dilation, self.groups)


class Csp(nn.Module):
    """C2f of YOLOv8: one part goes on through convolutions, all are joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c = channels // 2
        self.one, self.two, self.three = conv(8, 2 * self.c), conv(self.c, self.c, 3), conv(3 * self.c, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.one(x).split((self.c, self.c), 1))
        return self.three(torch.cat([*parts, self.two(parts[-1])], 1))


class Halved(Csp):
    """CSPNet, arXiv 1911.11929: the size of a half is computed from an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.one(x).split(self.c * 2 // 2, dim=1)
        return self.three(torch.cat([left, right, self.two(right)], 1))


class SwappedRows(nn.Module):
    """Cut space by a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 3

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(x.split(self.rows, 2)[::-1], 2)


class Ghost(nn.Module):
    """GhostNet, arXiv 1911.11907."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_chs = channels
        self.primary, self.cheap = conv(8, 4), conv(4, 4, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : self.out_chs, :, :]


class Partial(nn.Module):
    """FasterNet, arXiv 2303.03667: a convolution of some channels, the others stay."""

    def __init__(self, channels: int, by_slices: bool = False) -> None:
        super().__init__()
        self.some, self.by_slices = channels // 4, by_slices
        self.others = channels - self.some
        self.conv = conv(self.some, self.some, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.by_slices:
            x = x.clone()
            x[:, : self.some, :, :] = self.conv(x[:, : self.some, :, :])
            return x
        some, others = torch.split(x, [self.some, self.others], dim=1)
        return torch.cat((self.conv(some), others), 1)


class Branches(nn.Module):
    """InceptionNeXt, arXiv 2303.16900: sizes in a tuple."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = (channels - 4, 2, 2)
        self.square, self.row = conv(2, 2, 3, groups=2), conv(2, 2, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        same, square, row = torch.split(x, self.sizes, dim=1)
        return torch.cat((same, self.square(square), self.row(row)), dim=1)


class Steps(nn.Module):
    """Res2Net, arXiv 1904.01169: each part is added to the next."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.convs = nn.ModuleList(conv(width, width, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = torch.split(x, self.width, 1)
        outputs = [first]
        for part, layer in zip(parts, self.convs, strict=False):
            outputs.append(layer(part + outputs[-1]))
        return torch.cat([*outputs, *parts[2:]], 1)


class Selective(nn.Module):
    """Selective kernels, arXiv 1903.06586: softmax over branches that are stacked."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b, self.down = conv(channels, channels, 3), conv(channels, channels), conv(channels, 4)
        self.up = conv(4, 2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([self.a(x), self.b(x)], dim=1)
        weight = self.up(F.relu(self.down(branches.sum(1).mean((2, 3), keepdim=True))))
        b, c, h, w = weight.shape
        return (branches * weight.view(b, 2, c // 2, h, w).softmax(dim=1)).sum(dim=1)


class Attention(nn.Module):
    """Attention with heads over positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads, self.size = 2, channels // 2
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, self.heads, self.size)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, h * w, c)).transpose(1, 2).reshape(b, c, h, w)


class CrossAttention(nn.Module):
    """Attention between channels (XCiT, arXiv 2106.09681)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = conv(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.flatten(2) for part in self.qkv(x).chunk(3, 1))
        weight = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return (weight @ v).view(x.shape)


class EfficientChannelAttention(nn.Module):
    """ECA-Net, arXiv 1910.03151: a convolution along the channels knows their order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).view(x.shape[0], 1, -1)).sigmoid()
        return x * y.view(x.shape[0], -1, 1, 1).expand_as(x)


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 2, 0, 7, 6, 5, 4]))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order]


def attend_by_heads(m: Any, x: Tensor, channels: int) -> Tensor:
    """Attend by heads, whose size a product of attributes gives (LowFormer, arXiv 2409.03460)."""
    qkv = m.wide(x).reshape(x.shape[0], m.heads, m.three * m.size, 64).transpose(2, 3)
    y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=3))
    return y.transpose(2, 3).reshape(x.shape[0], channels, 8, 8)


def heads() -> dict[str, Any]:
    return {"wide": conv(8, 24), "heads": 2, "size": 4, "three": 3}


def just(forward: Callable[[Any, Tensor], Tensor], reads: int = 8, **layers: Any) -> Callable[[], nn.Module]:
    return lambda: between(forward, reads=reads, **layers)


def block(make: Callable[[], nn.Module], reads: int = 8) -> Callable[[], nn.Module]:
    return lambda: between(lambda m, x: m.block(x), reads=reads, block=make())


# What is free beside the last convolution.
FOLLOWED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "global response norm": (block(lambda: GlobalResponseNorm(8)), {"stem"}),
    "standardised by moments": (block(lambda: StandardisedByMoments(8, 8, 3, padding=1)), {"stem", "block"}),
    "standardised in steps": (block(lambda: StandardisedInSteps(8, 8, 3, padding=1)), {"stem", "block"}),
    "standardised by norm": (block(lambda: StandardisedByNorm(8, 8, 3, padding=1)), {"stem", "block"}),
    "standardised in groups": (
        block(lambda: StandardisedByNorm(8, 8, 3, padding=1, groups=2)),
        {"stem", "block"},
    ),
    "standardised, depthwise": (block(lambda: StandardisedByNorm(8, 8, 3, padding=1, groups=8)), {"stem"}),
    "padded alike": (block(lambda: PaddedAlike(8, 8, 3)), {"stem", "block"}),
    "csp": (block(lambda: Csp(8)), {"stem", "block.one", "block.two", "block.three"}),
    "half of an attribute": (block(lambda: Halved(8)), {"stem", "block.one", "block.two", "block.three"}),
    "ghost": (block(lambda: Ghost(8)), {"stem", "block.primary"}),
    "partial": (block(lambda: Partial(8)), {"stem", "stem:1", "block.conv"}),
    "partial, written into": (block(lambda: Partial(8, True)), {"stem", "stem:1"}),
    "branches": (block(lambda: Branches(8)), {"stem", "stem:1", "stem:2"}),
    "steps": (block(lambda: Steps(2)), {"stem", "block.convs.1"}),
    "selective": (block(lambda: Selective(8)), {"stem", "block.a", "block.down"}),
    "attention": (block(lambda: Attention(8)), {"stem"}),
    "attention of channels": (block(CrossAttention), {"stem"}),
    "glu": (just(lambda m, x: F.glu(x, 1), 4), {"stem"}),
    "glu as a layer": (just(lambda m, x: m.glu(x), 4, glu=nn.GLU(1)), {"stem"}),
    "pixel shuffle": (just(lambda m, x: F.pixel_shuffle(x, 2), 2), {"stem"}),
    "pixel unshuffle": (just(lambda m, x: m.down(x), 32, down=nn.PixelUnshuffle(2)), {"stem"}),
    "channel shuffle": (just(lambda m, x: m.shuffle(x), shuffle=nn.ChannelShuffle(2)), {"stem"}),
    "movedim": (
        just(lambda m, x: m.one(x.movedim(1, -1)).movedim(-1, 1), one=nn.Linear(8, 8)),
        {"stem", "one"},
    ),
    "repeat": (just(lambda m, x: x.repeat(1, 2, 1, 1), 16), {"stem"}),
    "expand": (just(lambda m, x: x * x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8)), {"stem"}),
    "expand to a shape": (just(lambda m, x: x + x.mean(1, keepdim=True).expand(x.shape)), {"stem"}),
    "einsum": (
        just(lambda m, x: torch.einsum("bchw,bc->bchw", x, x.mean((2, 3)))),
        {"stem"},
    ),
    "new zeros": (just(lambda m, x: x + x.new_zeros(x.size(0), x.size(1), 1, 1)), {"stem"}),
    "ones": (just(lambda m, x: x * torch.ones(x.shape[0], x.shape[1], 1, 1)), {"stem"}),
    "joined with zeros": (
        just(lambda m, x: torch.cat([x, x.new_zeros(x.shape[0], 2, 8, 8)], axis=1), 10),
        {"stem"},
    ),
    "a branch on space": (
        just(lambda m, x: m.one(x) if x.shape[2] > 4 else x, one=conv(8, 8)),
        {"stem", "one"},
    ),
    "stack and sum": (just(lambda m, x: torch.stack([x, F.relu(x)]).sum(0)), {"stem"}),
    "stacked pairs": (just(lambda m, x: torch.stack([x, F.relu(x)], 2).flatten(1, 2), 16), {"stem"}),
    "where": (just(lambda m, x: torch.where(x > 0, x, m.one(x)), one=conv(8, 8)), {"stem"}),
    "maximum over channels": (just(lambda m, x: x * x.max(1, keepdim=True)[0]), {"stem"}),
    "flipped in space": (just(lambda m, x: x.flip(3).roll(1, 2)), {"stem"}),
    "repeated, each by itself": (just(lambda m, x: x.repeat_interleave(2, 1), 16), {"stem"}),
    "tiled": (just(lambda m, x: torch.tile(x, (2, 1, 1)), 16), {"stem"}),
    "space is split by an attribute": (
        just(lambda m, x: m.rows(x), rows=SwappedRows()),
        {"stem"},
    ),
    "summed up along space": (just(lambda m, x: x.cumsum(2) + x.select(3, 0)[..., None]), {"stem"}),
    "matrices transposed": (just(lambda m, x: x.mT.mT @ torch.eye(8).t()), {"stem"}),
    "einsum of a list": (
        just(lambda m, x: torch.einsum("bchw,bc->bchw", [x, x.mean((2, 3))])),
        {"stem"},
    ),
    "einsum with an ellipsis": (
        just(lambda m, x: torch.einsum("bc...,bc->bc...", x, x.mean((2, 3)))),
        {"stem"},
    ),
    "normalised by root mean squares": (
        just(lambda m, x: m.norm(x.movedim(1, 3)).movedim(3, 1), norm=nn.RMSNorm(8)),
        {"stem"},
    ),
    "parts, joined in another order": (
        just(lambda m, x: torch.cat(x.split(x.shape[1] // 2, 1)[::-1], 1)),
        {"stem"},
    ),
    "parts, stacked": (just(lambda m, x: torch.stack(x.chunk(2, 1)).sum(0), 4), {"stem"}),
    "put back to where maxima were": (
        just(lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
        {"stem"},
    ),
    "heads times their size": (
        just(
            lambda m, x: attend_by_heads(m, x, m.heads * m.size), wide=conv(8, 24), heads=2, size=4, three=3
        ),
        {"stem", "wide"},
    ),
    "their size times heads": (
        just(
            lambda m, x: attend_by_heads(m, x, m.size * m.heads), wide=conv(8, 24), heads=2, size=4, three=3
        ),
        {"stem", "wide"},
    ),
    "images of attributes' sizes": (  # as decoders make them of a vector
        just(
            lambda m, x: m.up(m.vector(x.mean((2, 3))).view([len(x), m.wide[-1], *m.size])),
            **{
                "vector": nn.Linear(8, 96),
                "up": nn.ConvTranspose2d(6, 8, 2, 2),
                "wide": (3, 6),
                "size": [4, 4],
            },
        ),
        {"stem", "vector", "up"},
    ),
    "a layer of what the forward makes": (  # as Swin V2 makes its biases of places
        just(
            lambda m, x: (
                y := x * m.one(torch.linspace(0, 1, 8)[:, None]).t()[:, :, None],
                y.view(int(y.shape[0] / 1.0), *y.shape[1:]),
            )[1],
            one=nn.Linear(1, 8),
        ),
        {"stem"},
    ),
    "a blur that is spread over all channels": (
        just(
            lambda m, x: F.conv2d(x, m.blur.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]),
            blur=nn.Buffer(torch.rand(1, 1, 3, 3)),
        ),
        {"stem"},
    ),
    "a kernel that is spread over all channels": (
        just(
            lambda m, x: F.conv2d(
                x, m.kernel.view(1, 1, 3, 3).repeat(x.shape[1], 1, 1, 1), groups=x.shape[1]
            ),
            kernel=nn.Buffer(torch.rand(3, 3)),
        ),
        {"stem"},
    ),
    "a kernel for images of one channel": (
        just(
            lambda m, x: F.conv2d(x.reshape(-1, 1, 8, 8), m.kernel).view(x.shape[0], x.shape[1], 6, 6),
            kernel=nn.Buffer(torch.rand(1, 1, 3, 3)),
        ),
        {"stem"},
    ),
    "noise that is drawn in place": (
        just(lambda m, x: x * torch.empty_like(x).uniform_(2, 2) + torch.zeros_like(x).normal_(0, 0)),
        {"stem"},
    ),
    "rows of all maps, by an attribute": (  # as MobileViT cuts patches
        just(lambda m, x: x.reshape(len(x) * x.shape[1] * m.rows, 8 // m.rows, 8).view(x.shape), rows=2),
        {"stem"},
    ),
    "every other channel": (just(lambda m, x: x[:, ::2], 4), {"stem"}),
    "a slice of a sequence": (
        just(lambda m, x: m.rows[1:](x), rows=nn.Sequential(nn.ReLU(), conv(8, 8), nn.ReLU())),
        {"stem", "rows.1"},
    ),
    "an attribute of its own in arithmetic": (
        just(lambda m, x: x * m.scale**-0.5 if m.scale > 1 else x, scale=8),
        {"stem"},
    ),
    "a size of another layer": (
        just(lambda m, x: m.one(x).reshape(-1, m.one.out_channels, 64)[..., None], one=conv(8, 8)),
        {"stem", "one"},
    ),
}


@pytest.mark.sampled(27)
@pytest.mark.parametrize(("build", "free"), FOLLOWED.values(), ids=FOLLOWED)
def test_a_block_is_followed(build: Callable[[], nn.Module], free: set[str]) -> None:
    torch.manual_seed(0)
    model = build().eval()
    widths = find_widths(model, X)
    assert set(widths) == free | {"last"}, widths.fixed
    fix_wrong_widths(model, widths)
    assert set(widths) == free | {"last"}, widths.fixed
    assert find_widths(model, X) == widths
    check_changes(model, widths)


@torch.no_grad()
def check_changes(model: nn.Module, widths: Widths) -> None:
    """A block that has grown and shrunk runs, and is found again with the widths that it had."""
    for indices in (
        {name: grow_index(width.size, 2) for name, width in widths.items()},
        {name: list(range(2, 2 + width.size)) for name, width in widths.items()},
    ):
        reindex(model, widths, indices)
        model(X)
        assert find_widths(model, X) == widths


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "efficient channel attention": (
        block(EfficientChannelAttention),
        "works on channels as if they were space",
    ),
    "reordered by a buffer": (block(Reordered), "picks channels by a list"),
    "index_select": (
        just(lambda m, x: x.index_select(1, torch.tensor([0, 2, 1, 3])), 4),
        "picks channels by a list",
    ),
    "gathered": (
        just(lambda m, x: x.gather(1, torch.zeros_like(x).long())),
        "picks channels by a list",
    ),
    "gathered of some": (
        just(lambda m, x: x.gather(2, torch.zeros(2, 4, 8, 8, dtype=torch.long)), 4),
        "fixes the number of channels",
    ),
    "a branch on channels": (just(lambda m, x: x * 2 if x.shape[1] == 8 else x), "decides by the number"),
    "a loop over channels": (
        just(lambda m, x: x + sum(x[:, i : i + 1] for i in range(x.shape[1]))),
        "decides by the number of channels",
    ),
    "ones of a number": (just(lambda m, x: x * torch.ones(x.shape[0], 8, 1, 1)), "joins a part that never"),
    "numbers of channels": (just(lambda m, x: x * torch.arange(x.shape[1])[:, None, None]), "computes with"),
    "expanded to a number": (just(lambda m, x: x + x.mean(1, keepdim=True).expand(-1, 8, -1, -1)), "joins a"),
    "flipped": (just(lambda m, x: x.flip(1)), "changes the order of its channels"),
    "rolled": (just(lambda m, x: x.roll(1, 1)), "changes the order of its channels"),
    "the largest channel": (
        just(lambda m, x: x * x.max(1, keepdim=True)[1]),
        "says which channel is the larg",
    ),
    "response norm of neighbours": (
        just(lambda m, x: m.one(x), one=nn.LocalResponseNorm(3)),
        "depends on the order of its channels",
    ),
    "pooled over channels": (
        just(lambda m, x: F.max_pool3d(x[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0]),
        "works on channels as if they were space",
    ),
    "scaled by a tensor that none stores": (
        just(lambda m, x: x * m.scale, scale=torch.rand(8, 1, 1)),
        "scale is in no checkpoint: make it a buffer that is stored",
    ),
    "scaled by a buffer that is not stored": (
        just(lambda m, x: x * m.scale, scale=nn.Buffer(torch.rand(8, 1, 1), persistent=False)),
        "scale is in no checkpoint: make it a buffer that is stored",
    ),
    "one channel overwritten": (
        just(lambda m, x: (y := x.clone(), y.__setitem__((slice(None), 0), 0), y)[2]),
        "picks single channels",
    ),
    "summed up along channels": (just(lambda m, x: x.cumsum(1)), "depends on the order of its channels"),
    "one channel": (just(lambda m, x: x * x.select(1, 0)[:, None]), "picks single channels"),
    "a run of channels": (just(lambda m, x: x.narrow(1, 0, 4), 4), "fixes the number of channels"),
    "a power of a layer's attribute": (
        just(lambda m, x: x * m.stem.out_channels**-0.5),
        "the forward computes with stem.out_channels",
    ),
    "a multiple of a layer's attribute": (
        just(lambda m, x: x * (2 * m.stem.out_channels)),
        "takes out_channels as it is",
    ),
    "a branch on a layer's attributes": (
        just(lambda m, x: x if m.stem.in_channels == m.stem.out_channels else 2 * x),
        "the forward computes with stem.out_channels",
    ),
    "every third channel": (just(lambda m, x: x[:, ::3], 3), "fixes the number of channels"),
    "every other channel from the third on": (
        just(lambda m, x: x[:, 2::2], 3),
        "fixes the number of channels",
    ),
    "taken apart": (just(lambda m, x: torch.stack(x.unbind(1)[::-1], 1)), "picks single channels"),
}


@pytest.mark.parametrize(("build", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_block_is_refused_by_name(build: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    widths = find_widths(build(), X)
    assert set(widths) == {"last"} and reason in widths.fixed["stem"]


@pytest.mark.parametrize(
    "kind", [StandardisedByMoments, StandardisedInSteps, StandardisedByNorm, NormedByHand]
)
def test_what_standardises_its_weight_is_followed_with_gates(kind: type[nn.Conv2d]) -> None:
    model = block(lambda: kind(8, 8, 3, padding=1))()
    widths = find_widths(model, X)
    assert len(widths) == 3
    attach_gates(model, widths, "weight")
    assert find_widths(model, X) == widths


# Weights that a forward computes, and whether a channel that is read by zeros is not felt.
COMPUTED: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "scaled (Progressive GAN, arXiv 1710.10196)": (lambda: Computed(lambda w: 0.3 * w), True),
    "masked (PixelCNN, arXiv 1601.06759)": (
        lambda: Computed(lambda w: (w / 2) * torch.ones(3, 3).triu()),
        True,
    ),
    "masked by a buffer": (lambda: Masked(lambda w, mask: w * mask), True),
    "masked in place": (lambda: Masked(lambda w, mask: w.clone().mul_(mask)), True),
    "masked by a buffer of truths": (lambda: Masked(lambda w, mask: w * mask, torch.bool), True),
    "masked by a buffer of whole numbers": (lambda: Masked(lambda w, mask: mask * w, torch.int8), True),
    "filled where a mask says so": (
        lambda: Masked(lambda w, mask: w.masked_fill(~mask, 0), torch.bool),
        True,
    ),
    "chosen by a mask, or zero": (
        lambda: Masked(lambda w, mask: torch.where(mask, w, torch.zeros_like(w)), torch.bool),
        True,
    ),
    "chosen by a mask": (lambda: Masked(lambda w, mask: w.where(mask, 0.0), torch.bool), True),
    "filled with ones": (lambda: Masked(lambda w, mask: w.masked_fill(~mask, 1), torch.bool), False),
    "central difference": (CentralDifference, True),
    "scaled by a parameter for each row": (Scaled, True),
    "positive": (lambda: Computed(F.softplus), False),
    "less a mean": (lambda: Computed(lambda w: w - w.mean(1, keepdim=True)), False),
    "divided by a mean": (lambda: Computed(lambda w: w / w.abs().mean(1, keepdim=True)), False),
}


@pytest.mark.parametrize(("make", "is_separate"), COMPUTED.values(), ids=COMPUTED)
def test_channels_that_a_computed_weight_reads_are_separate_where_zeros_stay(
    make: Callable[[], nn.Module], is_separate: bool
) -> None:
    torch.manual_seed(0)
    model = block(make)().eval()
    widths = find_widths(model, X)
    assert len(widths) == 3 and (widths["stem"].mixed is None) == is_separate
    fix_wrong_widths(model, widths)
    assert len(widths) == 3
    expected = model(X).detach()
    reindex(model, widths, {"stem": grow_index(8, 2)})
    assert torch.allclose(model(X), expected, rtol=1e-4, atol=1e-4) == is_separate


def test_an_attribute_that_is_used_as_it_is_fixes_what_it_counts() -> None:
    class Scaled(Csp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.c

    torch.manual_seed(0)
    widths = find_widths(between(lambda m, x: m.block(x), block=Scaled(8)), X)
    assert set(widths) == {"stem", "block.two", "block.three", "last"}
    assert "takes c as it is" in widths.fixed["block.one"]


def test_of_widths_that_no_tensor_tells_apart_one_changes() -> None:
    """Only attributes say where one ends, which no checkpoint has."""
    models = [between(lambda m, x: torch.cat(x.split([m.a, m.b], 1)[::-1], 1), a=3, b=5) for _ in range(2)]
    widths = find_widths(models[0], X)
    assert widths.sizes() == {"stem:1": 5, "last": 5}
    assert widths.fixed["stem"] == "no tensor tells its channels from those of stem:1"
    reindex(models[0], widths, {"stem:1": [0, 2]})
    rebuild(models[1], find_widths(models[1], X), models[0].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    torch.testing.assert_close(models[1](X), models[0](X))


def test_a_network_that_asked_for_a_shape_refuses_another() -> None:
    model = between(lambda m, x: m.one(x) if x.shape[2] > 4 else x, one=conv(8, 8))
    traced = trace(make_meta_copy(model), X.to("meta"))
    assert traced(X.to("meta")).shape == (2, 5)
    with pytest.raises(StructureError, match="traced for inputs of another shape"):
        traced(X[..., :4, :4].to("meta"))


@pytest.mark.parametrize("multiply", [lambda wide, size: wide * size, lambda wide, size: size * wide])
def test_a_traced_product_of_an_attribute_and_a_size_follows_the_size(multiply: Callable[..., Any]) -> None:
    model = between(
        lambda m, x: x.reshape(x.shape[0], multiply(m.wide, x.shape[2]), x.shape[3]).view(x.shape), wide=8
    )
    traced = trace(make_meta_copy(model), X.to("meta"))
    assert traced(X[..., :4, :4].to("meta")).shape == (2, 5)


def swap_by_tensor(m: nn.Module, x: Tensor) -> Tensor:
    """Order dimensions by numbers that lie where the maps lie, as learned image compression does."""
    dims = torch.arange(2, x.ndim, device=x.device)
    order = torch.cat((torch.tensor([1, 0], device=x.device), dims))
    return (x.permute(*order).contiguous() * 2).permute(*order)


def cut_by_tensor(m: nn.Module, x: Tensor) -> Tensor:
    """Compute how many columns stay, as resampling of signals does."""
    return x[..., : torch.ceil(torch.as_tensor(x.shape[3] * 3 / 4)).long()]


@pytest.mark.parametrize(
    ("forward", "columns"), [(swap_by_tensor, 8), (cut_by_tensor, 6)], ids=["order", "size"]
)
def test_numbers_that_a_forward_puts_into_tensors_are_known(
    forward: Callable[..., Tensor], columns: int
) -> None:
    torch.manual_seed(0)
    model = between(forward).eval()
    widths = find_widths(model, X)
    fix_wrong_widths(model, widths)
    assert list(widths) == ["stem", "last"]
    check_changes(model, widths)
    assert count_macs(model, X[:1]) == count_macs(between(lambda m, x: x[..., :columns]), X[:1])


def test_a_trace_that_fails_leaves_everything_as_it_was() -> None:
    class Failing(Csp):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"after {super().forward(x) is not None}")

    model = between(lambda m, x: m.block(x), block=Failing(8))
    ones, call = torch.ones, nn.Module.__call__
    for attempt in (lambda: find_widths(model, X), lambda: trace_both_modes(model, X.to("meta"))):
        with pytest.raises(StructureError, match="cannot be traced"):
            attempt()
        assert torch.ones is ones and nn.Module.__call__ is call and not hasattr(nn.Module, "training")
        assert type(model.block.c) is int and all(module.training for module in model.modules())


@torch.no_grad()
def test_a_network_that_asks_for_shapes_is_gated_and_compacted() -> None:
    torch.manual_seed(0)
    model = between(lambda m, x: m.norm(m.one(x)), one=PaddedAlike(8, 8, 3), norm=nn.BatchNorm2d(8)).eval()
    attach_gates(model, find_widths(model, X), "channel")
    for _, _, gate in iterate_gates(model):
        set_score(gate, torch.tensor([-1.0, 1.0]).repeat(4)[: len(gate.score)].view_as(gate.score))
    plain = compact(model, X)
    assert plain.one.out_channels < 8
    torch.testing.assert_close(plain(X), model(X))
