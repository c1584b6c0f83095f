"""Convolutions of other dimensions than two, transposed ones, and those that the kernel does not take."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.saliency import Saliency
from elastic.dynamic.skipping import list_methods, make_masked, make_skipping
from elastic.dynamic.skipping.gathering import GatheringConv
from elastic.errors import StructureError
from elastic.widths.discovery import discover
from tests.elastic.dynamic.gated import gated
from tests.elastic.zoo import Net, randomised

VOLUMES, SIGNALS, IMAGES = (2, 8, 8, 8), (2, 24), (2, 12, 12)


class Simple(nn.Conv3d):
    """As torchvision's Conv3DSimple: another way to be made, and nothing else."""

    def __init__(self, reads: int, kernels: int, **options: Any) -> None:
        super().__init__(reads, kernels, 3, **options)


def head(channels: int) -> nn.Module:
    return nn.Linear(channels, 4)


def volumes() -> nn.Module:
    """Pooled, normalised and padded on the way to the next convolution."""
    return nn.Sequential(
        *(Simple(2, 6), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.ReplicationPad3d(1)),
        *(
            nn.Conv3d(6, 8, 3, stride=(1, 2, 1)),
            nn.Dropout3d(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            head(8),
        ),
    )


def signals() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.BatchNorm1d(6), nn.AvgPool1d(2), nn.Conv1d(6, 6, 3, groups=6)),
        *(
            nn.InstanceNorm1d(6),
            nn.Conv1d(6, 8, 5, dilation=2),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            head(8),
        ),
    )


def joined_signals() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.last(torch.cat([m.one(x).relu(), m.two(x).relu()], -2)).mean(-1)),
        **dict(one=nn.Conv1d(2, 4, 3), two=nn.Conv1d(2, 5, 3), last=nn.Conv1d(9, 6, 3), head=head(6)),
    )


def autoencoder(make: type[nn.Module], transposed: type[nn.Module], norm: type[nn.Module]) -> nn.Module:
    """Down, and up again by a transposed convolution, as a U-Net does."""
    return nn.Sequential(
        *(make(2, 6, 3, 2, 1), nn.ReLU(), transposed(6, 8, 2, 2), norm(8), nn.ReLU()),  # type: ignore[call-arg]
        *(transposed(8, 4, 3, 2, 1, 1), nn.ReLU(), make(4, 4, 1)),  # type: ignore[call-arg]
    )


def uneven() -> nn.Module:
    """Kernels that are longer than wide, dilated, and padded on one side, as in Inception."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, (1, 7), padding=(0, 3)), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 8, (7, 1), padding=(3, 0)), nn.ReLU(), nn.Conv2d(8, 6, 3, dilation=2), nn.ReLU()),
        *(nn.Conv2d(6, 4, 3, stride=(2, 1), padding="valid"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(4)),
    )


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "volumes": (volumes, VOLUMES, 2),
    "signals": (signals, SIGNALS, 2),
    "joined signals": (joined_signals, SIGNALS, 3),
    "images up": (lambda: autoencoder(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d), IMAGES, 3),
    "volumes up": (lambda: autoencoder(nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d), VOLUMES, 3),
    "signals up": (lambda: autoencoder(nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d), SIGNALS, 3),
    "uneven": (uneven, IMAGES, 4),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape, _ = NETS[name]
    return randomised(build()).eval(), torch.randn(3, *shape)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("method", [*list_methods(), "masked"])
@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_skipping_says_what_masking_says(name: str, method: Any) -> None:
    plain, x = make(name)
    net = gated(plain, x)
    fast = make_masked(net) if method == "masked" else make_skipping(net, method=method)
    for batch in (x, x.flip(0), x[:1]):
        torch.testing.assert_close(fast(batch), net(batch), rtol=1e-4, atol=1e-5)
    modules = list(iterate_modules(net))
    assert len(modules) == NETS[name][2] and all(0 < module.active_BK.mean() < 1 for module in modules)
    gathers = any(isinstance(layer, GatheringConv) for layer in fast.modules())
    assert gathers == (method in ("kernel", "stock"))


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_what_is_off_is_not_read(name: str) -> None:
    """Each sample as by the network whose readers have zeros, in place of weights, for what is off."""
    plain, x = make(name)
    net = gated(plain, x, activation="straight_through")
    output, cut = net(x)[:1], make(name)[0]
    for module in iterate_modules(net):
        for reader in module.site.readers:
            weight: Any = cut.get_submodule(reader.path).weight
            by_channel = (
                weight
                if getattr(cut.get_submodule(reader.path), "transposed", False)
                else weight[:].transpose(0, 1)
            )
            by_channel[reader.begin : reader.end][module.active_BK[0] == 0] = 0
    torch.testing.assert_close(output, cut(x)[:1])


@pytest.mark.parametrize("name", ["volumes up", "signals up"])
@torch.no_grad()
def test_what_is_off_is_not_computed(name: str) -> None:
    """What torch counts is what the cost says: convolutions and modules."""
    plain, x = make(name)
    net = gated(plain, x[:1])
    cost, fast = ActivationCost(net, x[:1]), make_skipping(net, method="stock")
    net(x[:1])
    with FlopCounterMode(display=False) as counter:
        fast(x[:1])
    assert counter.get_total_flops() == pytest.approx(2 * float(cost.macs_B()), rel=1e-6)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_saliency_is_the_norm_of_a_map_times_that_of_the_weights_that_read_it(name: str) -> None:
    plain, x = make(name)
    dynamic = attach_modules(plain, discover(plain, x)).eval()
    saliency = Saliency(dynamic)
    saliency.fit([x])
    dynamic(x)
    first = next(iterate_modules(dynamic))
    (reader,) = first.site.readers
    assert first.site.writer in ("0", "one")
    layer: Any = plain.get_submodule(reader.path)
    weight = layer.weight if layer.transposed else layer.weight.transpose(0, 1)
    maps = plain.get_submodule(first.site.writer)(x)
    maps = plain[1](maps) if isinstance(plain, nn.Sequential) and name in ("volumes", "uneven") else maps
    product_BK = maps.relu().flatten(2).norm(dim=2) * weight[reader.begin : reader.end].flatten(1).norm(dim=1)
    torch.testing.assert_close(saliency.measure(first), product_BK / product_BK.mean(1, keepdim=True))


def test_maps_that_lie_behind_each_other_are_refused() -> None:
    """Joined in depth, not in channels: what reads them reads both layers' by the same weights."""
    net = Net(
        lambda m, x: m.head(m.last(torch.cat([m.one(x), F.relu(m.one2(x))], -3)).mean((2, 3, 4))),
        **dict(one=nn.Conv3d(2, 4, 3), one2=nn.Conv3d(2, 4, 3), last=nn.Conv3d(4, 6, 3), head=head(6)),
    )
    x = torch.randn(2, *VOLUMES)
    with pytest.raises(StructureError, match="'one' cannot be switched off: several layers write its maps"):
        attach_modules(net, discover(net, x), ["one"])
