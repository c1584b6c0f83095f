"""Layers that meet channels where they expect space: refused by name, never followed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.surgery.checking import fix_wrong_widths
from elastic.widths import Axes, Tracker, register_op
from elastic.widths.discovery import find_widths
from elastic.widths.operations import TABLE
from tests.elastic.widths.odd import between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def convolve_tokens(m, x: Tensor) -> Tensor:
    return m.one(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))


SPACE = "works on channels as if they were space"
CONFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "convolution after a linear layer": (
        lambda: between(lambda m, x: m.two(m.one(x)), one=nn.Linear(8, 8), two=conv(8, 8, 3)),
        "one",
        f"two (Conv2d) {SPACE}",
    ),
    "convolution of a transposed map": (
        lambda: between(lambda m, x: m.one(x.transpose(1, 2)).transpose(1, 2), one=conv(8, 8, 3)),
        "stem",
        f"one (Conv2d) {SPACE}",
    ),
    "convolution over tokens": (
        lambda: between(convolve_tokens, one=nn.Conv1d(64, 64, 3, padding=1)),
        "stem",
        f"one (Conv1d) {SPACE}",
    ),
    "average over channels": (
        lambda: between(lambda m, x: F.avg_pool3d(x.pow(2)[:, None], (5, 1, 1), 1, (2, 0, 0))[:, 0]),
        "stem",
        SPACE,
    ),
    "maximum over channels": (
        lambda: between(
            lambda m, x: F.max_pool2d(x.permute(0, 2, 3, 1), (1, 3), 1, (0, 1)).permute(0, 3, 1, 2)
        ),
        "stem",
        SPACE,
    ),
    "pooling layer over channels": (
        lambda: between(lambda m, x: m.pool(x.transpose(1, 3)).transpose(1, 3), pool=nn.MaxPool2d(3, 1, 1)),
        "stem",
        f"pool (MaxPool2d) {SPACE}",
    ),
    "channels shifted": (lambda: between(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, -1))), "stem", SPACE),
    "resized over channels": (
        lambda: between(lambda m, x: F.interpolate(x.transpose(1, 3), scale_factor=1.0).transpose(1, 3)),
        "stem",
        SPACE,
    ),
    "batch norm over channels": (
        lambda: between(lambda m, x: m.norm(x.transpose(1, 3)).transpose(1, 3), norm=nn.BatchNorm2d(8)),
        "stem",
        f"norm (BatchNorm2d) {SPACE}",
    ),
    "group norm over channels as rows": (
        lambda: between(lambda m, x: m.norm(x.transpose(1, 2)).transpose(1, 2), norm=nn.GroupNorm(2, 8)),
        "stem",
        f"norm (GroupNorm) {SPACE}",
    ),
    "instance norm over channels": (
        lambda: between(lambda m, x: m.norm(x.transpose(1, 3)).transpose(1, 3), norm=nn.InstanceNorm2d(8)),
        "stem",
        f"norm (InstanceNorm2d) {SPACE}",
    ),
    "group norm over channels": (
        lambda: between(lambda m, x: m.norm(x.transpose(1, 3)).transpose(1, 3), norm=nn.GroupNorm(2, 8)),
        "stem",
        f"norm (GroupNorm) {SPACE}",
    ),
    "channel attention by a convolution": (  # ECA, arXiv 1910.03151
        lambda: between(
            lambda m, x: (
                x * torch.sigmoid(m.one(x.mean((2, 3)).view(x.shape[0], 1, -1))).view(x.shape[0], -1, 1, 1)
            ),
            one=nn.Conv1d(1, 1, 3, padding=1),
        ),
        "stem",
        f"one (Conv1d) {SPACE}",
    ),
}


@pytest.mark.parametrize(("build", "width", "reason"), CONFUSED.values(), ids=CONFUSED)
def test_channels_on_an_axis_of_space_are_refused(
    build: Callable[[], nn.Module], width: str, reason: str
) -> None:
    torch.manual_seed(0)
    model = build()
    widths = find_widths(model, X)
    assert reason in widths.fixed[width]
    free = list(widths)
    fix_wrong_widths(model, widths)
    assert list(widths) == free


def test_padding_that_leaves_channels_alone_is_followed() -> None:
    widths = find_widths(between(lambda m, x: F.pad(x, (1, 1, 1, 1, 0, 0))), X)
    assert widths.sizes() == {"stem": 8, "last": 5}


def test_a_rule_that_loses_channels_fixes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(tracker: Tracker, node: torch.fx.Node) -> Axes:
        return (None, None, None, None)

    monkeypatch.setattr(TABLE, "names", TABLE.names.copy())
    register_op("erf", lose)
    widths = find_widths(between(lambda m, x: x.erf()), X)
    assert widths.fixed["stem"] == "erf() in the model's forward does not carry them on"
