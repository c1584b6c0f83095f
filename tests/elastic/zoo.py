"""Tiny models, one structure each, with the widths that a person finds in them by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import DeformConv2d

from elastic.widths.width import Slot, Widths


class Net(nn.Module):
    """Layers and parameters by name, and the forward that joins them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: Any) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self._forward(self, x)


# Whether a program empties, before its call number k, the lists in which a forward keeps what it does.
PROGRAMS: dict[str, Callable[[int], bool]] = {
    "empties": lambda k: True,
    "lets grow": lambda k: False,
    "empties every other": lambda k: k % 2 == 0,
}


@dataclass(frozen=True)
class Case:
    """A model and what must be found in it.

    `slots` names each width's tensor dimensions as "module.tensor.dim", followed by the layout in brackets
    where that is not the width alone, once. Below `smallest` channels a model cannot be told from another
    one (a PReLU of one scalar is a shared one, a convolution of one channel no depthwise one). `mixed` widths
    are normalised together.
    """

    build: Callable[[], nn.Module]
    sizes: Mapping[str, int]
    slots: Mapping[str, str]
    fixed: Mapping[str, str] = field(default_factory=dict)
    mixed: tuple[str, ...] = ()
    smallest: int = 1
    shape: tuple[int, ...] = (2, 3, 6, 6)

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return randomised(self.build())

    def example(self, seed: int = 1) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))


OUTPUT = "it is the model's output"


def conv(read: int, written: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(read, written, kernel, padding=kernel // 2, **options)


def head(read: int, classes: int = 5) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(read, classes))


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from its neutral value, so that one left behind is noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2 or parameter.shape[1:].numel() == 1:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model


def written(slot: Slot) -> str:
    """A slot in the notation of `Case.slots`."""
    where = ".".join(part for part in (slot.module, slot.tensor, str(slot.dim)) if part)
    if len(slot.layout) == 1 and slot.layout[0].repeat == 1:
        return where
    return f"{where}[{','.join(f'{s.width}*{s.repeat}' for s in slot.layout)}]"


def groupings(widths: Widths) -> dict[str, set[str]]:
    return {name: {written(slot) for slot in width.slots} for name, width in widths.items()}


def norm(name: str, layout: str = "") -> str:
    """The four slots of a batch norm."""
    end = f".0[{layout}]" if layout else ".0"
    return " ".join(f"{name}.{tensor}{end}" for tensor in ("weight", "bias", "running_mean", "running_var"))


def layer(name: str) -> str:
    """What a layer writes: its weight's rows and its bias."""
    return f"{name}.weight.0 {name}.bias.0"


# --- forwards that take more than one line ---------------------------------------------------------


def squeeze_excite(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.bn(m.conv(x)))
    s = F.adaptive_avg_pool2d(x, 1)
    return m.head(x * torch.sigmoid(m.up(F.relu(m.down(s)))))


def dense(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = torch.cat([x, m.one(F.relu(m.bn1(x)))], 1)
    return m.head(torch.cat([x, m.two(F.relu(m.bn2(x)))], 1))


def gated_linear(m: Any, x: Tensor) -> Tensor:
    value, gate = m.conv(x).chunk(2, dim=1)
    return m.head(m.last(value * torch.sigmoid(gate)))


def gated_join(m: Any, x: Tensor) -> Tensor:
    value, gate = m.mid(torch.cat([m.stem(x), m.side(x)], 1)).chunk(2, 1)
    return m.head(value * torch.sigmoid(gate))


def halves(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    left, right = torch.split(x, x.shape[1] // 2, 1)
    return m.head(torch.cat([m.left(left), right], 1))


def sliced_halves(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x)
    half = x.shape[1] // 2
    return m.head(x[:, :half] + x[:, half:])


def shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width).transpose(1, 2).contiguous()
    return x.view(batch, channels, height, width)


def shuffled(m: Any, x: Tensor) -> Tensor:
    return m.head(m.second(shuffle(F.relu(m.bn(m.first(m.stem(x)))), 2)))


def spatial_attention(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.conv(x))
    return m.head(m.last(x * torch.sigmoid(m.map(x))))


def layer_scaled(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(x + m.gamma * m.two(F.gelu(m.one(x))))


def shared(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    for _ in range(2):
        x = x + F.relu(m.loop(x))
    return m.head(x)


def option_a(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head(F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)) + m.two(F.relu(m.one(x))))


def tokens(m: Any, x: Tensor) -> Tensor:
    x = m.conv(x).flatten(2).transpose(1, 2)  # (batch, position, channel)
    return m.out(F.gelu(m.hidden(x)).mean(1))


CASES: dict[str, Case] = {
    "plain": Case(
        lambda: nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 6, 3), head(6)),
        {"0": 4, "3": 6},
        {"0": f"{layer('0')} {norm('1')} 3.weight.1", "3": f"{layer('3')} 4.2.weight.1"},
        {"4.2": OUTPUT},
    ),
    "residual": Case(
        lambda: Net(
            lambda m, x: m.head((y := m.stem(x)) + m.bn(m.two(F.relu(m.one(y))))),
            **dict(stem=conv(3, 4), one=conv(4, 6, 3), two=conv(6, 4, 3, bias=False), bn=nn.BatchNorm2d(4)),
            head=head(4),
        ),
        {"stem": 4, "one": 6},
        {
            "stem": f"{layer('stem')} one.weight.1 two.weight.0 {norm('bn')} head.2.weight.1",
            "one": f"{layer('one')} two.weight.1",
        },
        {"head.2": OUTPUT},
    ),
    "projection": Case(
        lambda: Net(
            lambda m, x: m.head(m.short(y := m.stem(x)) + m.two(F.relu(m.one(y)))),
            **dict(stem=conv(3, 4), short=conv(4, 5), one=conv(4, 6, 3), two=conv(6, 5, 3), head=head(5)),
        ),
        {"stem": 4, "short": 5, "one": 6},
        {
            "stem": f"{layer('stem')} short.weight.1 one.weight.1",
            "short": f"{layer('short')} {layer('two')} head.2.weight.1",
            "one": f"{layer('one')} two.weight.1",
        },
        {"head.2": OUTPUT},
    ),
    "squeeze_excite": Case(
        lambda: Net(
            squeeze_excite,
            **dict(conv=conv(3, 6), bn=nn.BatchNorm2d(6), down=conv(6, 2), up=conv(2, 6), head=head(6)),
        ),
        {"conv": 6, "down": 2},
        {
            "conv": f"{layer('conv')} {norm('bn')} down.weight.1 {layer('up')} head.2.weight.1",
            "down": f"{layer('down')} up.weight.1",
        },
        {"head.2": OUTPUT},
    ),
    "dense": Case(
        lambda: Net(
            dense,
            **dict(stem=conv(3, 4), bn1=nn.BatchNorm2d(4), one=conv(4, 3, bias=False)),
            **dict(bn2=nn.BatchNorm2d(7), two=conv(7, 2, bias=False), head=head(9)),
        ),
        {"stem": 4, "one": 3, "two": 2},
        {
            "stem": f"{layer('stem')} {norm('bn1')} one.weight.1 two.weight.1[stem*1,one*1] "
            + " ".join(f"{slot}[stem*1,one*1]" for slot in norm("bn2").split())
            + " head.2.weight.1[stem*1,one*1,two*1]",
            "one": "one.weight.0 two.weight.1[stem*1,one*1] "
            + " ".join(f"{slot}[stem*1,one*1]" for slot in norm("bn2").split())
            + " head.2.weight.1[stem*1,one*1,two*1]",
            "two": "two.weight.0 head.2.weight.1[stem*1,one*1,two*1]",
        },
        {"head.2": OUTPUT},
    ),
    "joined_with_the_input": Case(
        lambda: Net(
            lambda m, x: m.head(m.two(torch.cat([x, m.one(x)], dim=1))),
            **dict(one=conv(3, 4), two=conv(7, 5), head=head(5)),
        ),
        {"one": 4, "two": 5},
        {"one": f"{layer('one')} two.weight.1[None*3,one*1]", "two": f"{layer('two')} head.2.weight.1"},
        {"head.2": OUTPUT},
    ),
    "chunk": Case(
        lambda: Net(gated_linear, conv=conv(3, 8), last=conv(4, 5), head=head(5)),
        {"conv": 4, "last": 5},
        {
            "conv": "conv.weight.0[conv*1,conv*1] conv.bias.0[conv*1,conv*1] last.weight.1",
            "last": f"{layer('last')} head.2.weight.1",
        },
        {"head.2": OUTPUT},
        smallest=2,
    ),
    "deformed": Case(
        lambda: Net(
            lambda m, x: m.head(F.relu(m.bent(y := F.relu(m.stem(x)), m.offset(y), m.mask(y).sigmoid()))),
            stem=conv(3, 6),
            **dict(offset=conv(6, 36, 3), mask=conv(6, 18, 3), bent=DeformConv2d(6, 5, 3, padding=1)),
            head=head(5),
        ),
        {"stem": 3, "bent": 5},
        {
            "stem": "stem.weight.0[stem*1,stem*1] stem.bias.0[stem*1,stem*1] offset.weight.1[stem*1,stem*1] "
            "mask.weight.1[stem*1,stem*1] bent.weight.1[stem*1,stem*1]",
            "bent": f"{layer('bent')} head.2.weight.1",
        },
        {
            "offset": "eq(0) in bent decides by the number of channels",
            "mask": "deform_conv2d(…, …, …, …, 1, 1, 1, 1, 1, 1, …, …, True) in bent moves as many places",
            "head.2": OUTPUT,
        },
        smallest=2,
    ),
    "split": Case(
        lambda: Net(halves, conv=conv(3, 6), left=conv(3, 4), head=head(7)),
        {"conv": 3, "left": 4},
        {
            "conv": "conv.weight.0[conv*1,conv*1] conv.bias.0[conv*1,conv*1] left.weight.1 "
            "head.2.weight.1[left*1,conv*1]",
            "left": f"{layer('left')} head.2.weight.1[left*1,conv*1]",
        },
        {"head.2": OUTPUT},
        smallest=2,
    ),
    "sliced_halves": Case(
        lambda: Net(sliced_halves, conv=conv(3, 6), head=head(3)),
        {"conv": 3},
        {"conv": "conv.weight.0[conv*1,conv*1] conv.bias.0[conv*1,conv*1] head.2.weight.1"},
        {"head.2": OUTPUT},
        smallest=2,
    ),
    "channel_shuffle": Case(
        lambda: Net(
            shuffled,
            **dict(stem=conv(3, 4), first=conv(4, 6, groups=2, bias=False), bn=nn.BatchNorm2d(6)),
            **dict(second=conv(6, 8, groups=2), head=head(8)),
        ),
        # (first, second half) interleaves into pairs; the second convolution's groups tie the lower pairs to
        # the upper ones, which leaves six tied channels: nothing to change but the outer widths.
        {"stem": 2, "second": 4},
        {
            "stem": "stem.weight.0[stem*1,stem*1] stem.bias.0[stem*1,stem*1] first.weight.1",
            "second": "second.weight.0[second*1,second*1] second.bias.0[second*1,second*1] "
            "head.2.weight.1[second*1,second*1]",
        },
        {"first": "tie all of its channels together", "head.2": OUTPUT},
        smallest=2,
    ),
    "channel_shuffle_alone": Case(
        lambda: Net(
            lambda m, x: m.head(m.last(shuffle(m.conv(x), 2))), conv=conv(3, 6), last=conv(6, 5), head=head(5)
        ),
        {"conv": 3, "last": 5},
        {
            "conv": "conv.weight.0[conv*1,conv*1] conv.bias.0[conv*1,conv*1] last.weight.1[conv*2]",
            "last": f"{layer('last')} head.2.weight.1",
        },
        {"head.2": OUTPUT},
        smallest=2,
    ),
    "depthwise": Case(
        lambda: nn.Sequential(conv(3, 6), conv(6, 6, 3, groups=6), nn.BatchNorm2d(6), conv(6, 4), head(4)),
        {"0": 6, "3": 4},
        {"0": f"{layer('0')} {layer('1')} {norm('2')} 3.weight.1", "3": f"{layer('3')} 4.2.weight.1"},
        {"4.2": OUTPUT},
        smallest=2,
    ),
    "depthwise_multiplied": Case(
        lambda: nn.Sequential(conv(3, 4), conv(4, 8, 3, groups=4), nn.BatchNorm2d(8), head(8)),
        {"0": 4},
        {
            "0": f"{layer('0')} "
            + " ".join(f"{slot}[0*2]" for slot in f"{layer('1')} {norm('2')} 3.2.weight.1".split())
        },
        {"3.2": OUTPUT},
        smallest=2,
    ),
    "grouped": Case(
        lambda: nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 4, 3, groups=2), head(4)),
        {"0": 3, "2": 2},
        {
            "0": "0.weight.0[0*1,0*1] 0.bias.0[0*1,0*1] 2.weight.1",
            "2": "2.weight.0[2*1,2*1] 2.bias.0[2*1,2*1] 3.2.weight.1[2*1,2*1]",
        },
        {"3.2": OUTPUT},
        smallest=2,
    ),
    "join_in_groups": Case(
        lambda: Net(
            gated_join,
            **dict(stem=conv(3, 8), side=conv(3, 4), mid=conv(12, 12, 3, groups=2), head=head(6)),
        ),
        # The halves of the join are tied: the first and last quarter of the stem, its middle and the side.
        {"stem": 2, "stem:1": 4, "mid": 6},
        {
            "stem": " ".join(f"stem.{tensor}.0[stem*1,stem:1*1,stem*1]" for tensor in ("weight", "bias"))
            + " mid.weight.1[stem*1,stem:1*1]",
            "stem:1": " ".join(f"stem.{tensor}.0[stem*1,stem:1*1,stem*1]" for tensor in ("weight", "bias"))
            + f" {layer('side')} mid.weight.1[stem*1,stem:1*1]",
            "mid": "mid.weight.0[mid*1,mid*1] mid.bias.0[mid*1,mid*1] head.2.weight.1",
        },
        {"head.2": OUTPUT},
        smallest=2,
    ),
    "flatten": Case(
        lambda: nn.Sequential(
            conv(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 7), nn.ReLU(), nn.Linear(7, 5)
        ),
        {"0": 4, "3": 7},
        {"0": f"{layer('0')} 3.weight.1[0*9]", "3": f"{layer('3')} 5.weight.1"},
        {"5": OUTPUT},
    ),
    "view": Case(
        lambda: Net(
            lambda m, x: m.out((y := F.max_pool2d(m.conv(x), 3)).view(y.size(0), -1)),
            **dict(conv=conv(3, 4), out=nn.Linear(16, 5)),
        ),
        {"conv": 4},
        {"conv": f"{layer('conv')} out.weight.1[conv*4]"},
        {"out": OUTPUT},
    ),
    "flatten_of_a_join": Case(
        lambda: Net(
            lambda m, x: m.out(torch.flatten(F.max_pool2d(torch.cat([m.one(x), m.two(x)], 1), 3), 1)),
            **dict(one=conv(3, 2), two=conv(3, 3), out=nn.Linear(20, 5)),
        ),
        {"one": 2, "two": 3},
        {
            "one": f"{layer('one')} out.weight.1[one*4,two*4]",
            "two": f"{layer('two')} out.weight.1[one*4,two*4]",
        },
        {"out": OUTPUT},
    ),
    "prelu": Case(
        lambda: nn.Sequential(conv(3, 4), nn.PReLU(4), conv(4, 5), nn.PReLU(), head(5)),
        {"0": 4, "2": 5},
        {"0": f"{layer('0')} 1.weight.0 2.weight.1", "2": f"{layer('2')} 4.2.weight.1"},
        {"4.2": OUTPUT},
        smallest=2,
    ),
    "group_norm": Case(
        lambda: nn.Sequential(
            *(conv(3, 6), nn.GroupNorm(2, 6), nn.ReLU(), conv(6, 5), nn.GroupNorm(5, 5), nn.ReLU()), head(5)
        ),
        {"0": 2, "3": 5},
        {
            "0": " ".join(f"{slot}[0*3]" for slot in f"{layer('0')} {layer('1')} 3.weight.1".split()),
            "3": f"{layer('3')} {layer('4')} 6.2.weight.1",
        },
        {"6.2": OUTPUT},
        smallest=2,
    ),
    "group_norm_of_groups": Case(  # of a convolution, whose number stays: so does the norm's
        lambda: nn.Sequential(conv(3, 12), nn.GroupNorm(2, 12), nn.ReLU(), conv(12, 8, 3, groups=4), head(8)),
        {"0": 3, "3": 2},
        {
            "0": " ".join(f"{slot}[0*1,0*1,0*1,0*1]" for slot in f"{layer('0')} {layer('1')}".split())
            + " 3.weight.1",
            "3": " ".join(f"{slot}[3*1,3*1,3*1,3*1]" for slot in f"{layer('3')} 4.2.weight.1".split()),
        },
        {"4.2": OUTPUT},
        mixed=("0",),
        smallest=2,
    ),
    "layer_norm": Case(
        lambda: Net(
            lambda m, x: m.head(m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)),
            **dict(conv=conv(3, 4), norm=nn.LayerNorm(4), head=head(4)),
        ),
        {"conv": 4},
        {"conv": f"{layer('conv')} {layer('norm')} head.2.weight.1"},
        {"head.2": OUTPUT},
        mixed=("conv",),
    ),
    "instance_norm": Case(
        lambda: nn.Sequential(
            conv(3, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True), nn.SiLU(), head(4)
        ),
        {"0": 4},
        {"0": f"{layer('0')} {norm('1')} 3.2.weight.1"},
        {"3.2": OUTPUT},
    ),
    "tokens": Case(
        lambda: Net(tokens, conv=conv(3, 4), hidden=nn.Linear(4, 6), out=nn.Linear(6, 5)),
        {"conv": 4, "hidden": 6},
        {"conv": f"{layer('conv')} hidden.weight.1", "hidden": f"{layer('hidden')} out.weight.1"},
        {"out": OUTPUT},
    ),
    "shared": Case(
        lambda: Net(shared, stem=conv(3, 4), loop=conv(4, 4, 3), head=head(4)),
        {"stem": 4},
        {"stem": f"{layer('stem')} {layer('loop')} loop.weight.1 head.2.weight.1"},
        {"head.2": OUTPUT},
    ),
    "layer_scale": Case(
        lambda: Net(
            layer_scaled,
            **dict(stem=conv(3, 4), one=conv(4, 6), two=conv(6, 4), gamma=nn.Parameter(torch.ones(4, 1, 1))),
            head=head(4),
        ),
        {"stem": 4, "one": 6},
        {
            "stem": f"{layer('stem')} one.weight.1 {layer('two')} gamma.0 head.2.weight.1",
            "one": f"{layer('one')} two.weight.1",
        },
        {"head.2": OUTPUT},
        smallest=2,
    ),
    "spatial_attention": Case(
        lambda: Net(spatial_attention, conv=conv(3, 4), map=conv(4, 1), last=conv(4, 5), head=head(5)),
        {"conv": 4, "last": 5},
        {"conv": f"{layer('conv')} map.weight.1 last.weight.1", "last": f"{layer('last')} head.2.weight.1"},
        {"map": "mul(…) in the model's forward broadcasts one channel", "head.2": OUTPUT},
        smallest=2,
    ),
    "literal_view": Case(
        lambda: Net(
            lambda m, x: m.out(F.relu(m.hidden(m.conv(x).view(-1, 400)))),
            **dict(conv=conv(3, 4), hidden=nn.Linear(400, 7), out=nn.Linear(7, 5)),
        ),
        {"hidden": 7},
        {"hidden": f"{layer('hidden')} out.weight.1"},
        {
            "conv": "view(-1, 400) in the model's forward fixes the number of channels: x.flatten",
            "out": OUTPUT,
        },
        shape=(2, 3, 10, 10),
    ),
    "literal_view_in_a_block": Case(
        lambda: nn.Sequential(
            conv(3, 6), nn.Sequential(Net(lambda m, x: m.conv(x.view(-1, 6, 6, 6)), conv=conv(6, 4))), head(4)
        ),
        {"1.0.conv": 4},
        {"1.0.conv": f"{layer('1.0.conv')} 2.2.weight.1"},
        {"0": "view(-1, 6, 6, 6) in 1.0 fixes the number of channels", "2.2": OUTPUT},
    ),
    "literal_slice": Case(
        lambda: Net(
            lambda m, x: m.head(m.last(m.conv(x)[:, :3])), conv=conv(3, 4), last=conv(3, 5), head=head(5)
        ),
        {"last": 5},
        {"last": f"{layer('last')} head.2.weight.1"},
        {"conv": "getitem", "head.2": OUTPUT},
    ),
    "literal_split": Case(
        lambda: Net(
            lambda m, x: m.head(m.last(m.conv(x).split([1, 3], 1)[1])),
            **dict(conv=conv(3, 4), last=conv(3, 5), head=head(5)),
        ),
        {"last": 5},
        {"last": f"{layer('last')} head.2.weight.1"},
        {"conv": "split(1, 3, 1) in the model's forward fixes the number of channels", "head.2": OUTPUT},
    ),
    "padded_shortcut": Case(
        lambda: Net(option_a, stem=conv(3, 4), one=conv(4, 7, 3), two=conv(7, 6, 3, stride=2), head=head(6)),
        {"stem": 4, "one": 7},
        {
            "stem": f"{layer('stem')} one.weight.1 two.weight.0[None*1,stem*1,None*1] "
            "two.bias.0[None*1,stem*1,None*1] head.2.weight.1[None*1,stem*1,None*1]",
            "one": f"{layer('one')} two.weight.1",
        },
        {
            "two": "pad(0, 0, 0, 0, 1, 1) in the model's forward joins a part that never changes",
            "head.2": OUTPUT,
        },
    ),
    "transposed_convolution": Case(
        lambda: nn.Sequential(
            *(conv(3, 4), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.ConvTranspose2d(6, 12, 2, groups=6), nn.ConvTranspose2d(12, 8, 2, groups=2), nn.ReLU()),
            head(8),
        ),
        {"0": 4, "1": 3, "5": 4},
        {
            "0": f"{layer('0')} 1.weight.0",
            "1": f"1.weight.1[1*1,1*1] 1.bias.0[1*1,1*1] {norm('2', '1*1,1*1')} 4.weight.0[1*1,1*1] "
            "4.bias.0[1*2,1*2] 5.weight.0[1*2,1*2]",
            "5": "5.weight.1 5.bias.0[5*1,5*1] 7.2.weight.1[5*1,5*1]",
        },
        {"7.2": OUTPUT},
        smallest=2,
    ),
    "weight_norm": Case(
        lambda: nn.Sequential(
            *(weight_norm(conv(3, 4, 3)), nn.ReLU(), weight_norm(nn.ConvTranspose2d(4, 6, 2, stride=2))),
            *(nn.BatchNorm2d(6), nn.ReLU(), weight_norm(conv(6, 5), dim=None), nn.ReLU(), head(5)),
        ),
        {"0": 4, "2": 6, "5": 5},
        {
            "0": f"{layer('0')} 2.weight.0",
            "2": f"2.weight.1 2.bias.0 {norm('3')} 5.weight.1",
            "5": f"{layer('5')} 7.2.weight.1",
        },
        {"7.2": OUTPUT},
    ),
    "expanded_attention": Case(
        lambda: Net(
            lambda m, x: m.head(m.last((y := m.conv(x)) * y.mean((2, 3), keepdim=True).expand_as(y))),
            **dict(conv=conv(3, 4), last=conv(4, 5), head=head(5)),
        ),
        {"conv": 4, "last": 5},
        {"conv": f"{layer('conv')} last.weight.1", "last": f"{layer('last')} head.2.weight.1"},
        {"head.2": OUTPUT},
    ),
    "volumes": Case(
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4), nn.AvgPool3d(2), nn.Flatten(), nn.Linear(32, 5))
        ),
        {"0": 4},
        {"0": f"{layer('0')} {norm('1')} 4.weight.1[0*8]"},
        {"4": OUTPUT},
        shape=(2, 2, 4, 4, 4),
    ),
    "signals": Case(
        lambda: nn.Sequential(
            *(nn.Conv1d(2, 4, 3), nn.ELU(), nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3)),
        ),
        {"0": 4, "2": 6},
        {"0": f"{layer('0')} 2.weight.1", "2": f"{layer('2')} {norm('3')} 6.weight.1"},
        {"6": OUTPUT},
        shape=(2, 2, 9),
    ),
}

# All that a network stores is what it computes with.
STORED = {name: case for name, case in CASES.items() if name != "weight_norm"}


# --- what several tests ask of a model ---------------------------------------------------------------


@st.composite
def changes(draw: Any, widths: Widths, smallest: int = 1) -> dict[str, list[int]]:
    """Any re-indexing of some widths: growth, pruning, order, split, and all of them at once."""
    names = draw(st.lists(st.sampled_from(list(widths)), min_size=1, unique=True))
    return {
        name: draw(st.lists(st.integers(-1, size - 1), min_size=smallest, max_size=size + 2))
        for name, size in widths.sizes().items()
        if name in names
    }


def states(model: nn.Module, *optimizers: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything a structural change could touch, by name, tensors cloned."""
    found: dict[str, Any] = {}
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in named:
            found[f"{kind} {name}"] = tensor.detach().clone()
            found[f"{kind} {name} object"] = id(tensor), tensor.stride(), tensor.requires_grad
            found[f"{kind} {name} gradient"] = None if tensor.grad is None else tensor.grad.clone()
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple))}
        found[f"module {name}"] = plain, id(module), repr(module)
    for i, optimizer in enumerate(optimizers):
        groups = [{**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups]
        found[f"optimizer {i}"] = groups, len(optimizer.state)
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                kept = value.clone() if isinstance(value, Tensor) else value
                found[f"optimizer {i} {names[parameter]} {key}"] = kept
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names under which two `states` differ by a bit."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b

    return sorted(k for k in before.keys() | after.keys() if not same(before.get(k), after.get(k)))
