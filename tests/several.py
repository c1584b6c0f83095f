"""Networks of several inputs, one kind each."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.elastic.zoo import conv, head, randomised

LABELS, CLASSES, STEPS = 3, 5, 50


class Conditional(nn.Module):
    """Scale, shift and add to maps by a label (conditional batch norm, Dumoulin et al., arXiv 1610.07629)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = conv(1, 6, 3, bias=False), nn.BatchNorm2d(6, affine=False)
        self.gain, self.shift = nn.Embedding(LABELS, 6), nn.Embedding(LABELS, 6)
        self.conv, self.bn, self.add = conv(6, 8, 3), nn.BatchNorm2d(8), nn.Embedding(LABELS, 8)
        self.last, self.head = conv(8, 6, 3), head(6, CLASSES)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gain, shift = self.gain(label)[:, :, None, None], self.shift(label)[:, :, None, None]
        x = F.relu(self.norm(self.stem(x)) * gain + shift)
        x = F.relu(self.bn(self.conv(x)) + self.add(label)[:, :, None, None])
        y: Tensor = self.head(F.relu(self.last(x)))
        return y


class Siamese(nn.Module):
    """Compare two images by what one body makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(conv(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), conv(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(conv(8, 6, 3), nn.ReLU()),
        )
        self.head = head(12, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        left, right = self.body(left), self.body(right)
        y: Tensor = self.head(torch.cat([left * right, (left - right).abs()], 1))
        return y


class TimedUNet(nn.Module):
    """Denoise an image, as a diffusion model's U-Net does, told a time step by sinusoidal features."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 50.0 ** -torch.linspace(0, 1, 4))
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU())
        self.down, self.bn, self.at_down = conv(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(12, 6)
        self.middle, self.at_middle = conv(6, 8, 3), nn.Linear(12, 8)
        self.up, self.last = conv(14, 6, 3), conv(6, 1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.rates
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        skip = F.relu(self.bn(self.down(x)) + self.at_down(time)[:, :, None, None])
        x = F.relu(self.middle(F.avg_pool2d(skip, 2)) + self.at_middle(time)[:, :, None, None])
        x = torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1)
        y: Tensor = self.last(F.relu(self.up(x)))
        return y


NETS: dict[str, Callable[[], nn.Module]] = {
    "conditional": Conditional,
    "siamese": Siamese,
    "timed": TimedUNet,
}


def make_inputs(name: str, batch: int = 2, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(batch, 1, 8, 8, generator=generator)
    if name == "siamese":
        return x_BCHW, torch.randn(batch, 1, 8, 8, generator=generator)
    return x_BCHW, torch.randint(LABELS if name == "conditional" else STEPS, (batch,), generator=generator)


def make_net(name: str) -> Any:
    torch.manual_seed(0)
    return randomised(NETS[name]())
