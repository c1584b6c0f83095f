"""Our own models: shapes, and sizes by formulas of their papers."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import ResNet

from elastic.errors import OptionError
from elastic.models import alexnet, convnet, from_torchvision, resnet20, resnet56, separable, vgg16_bn
from elastic.models.resnet import resnet
from elastic.pruning import attach_gates, compact
from elastic.pruning.gates import iterate_gates
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import discover


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def residual_parameters(blocks: int, width: int = 16, read: int = 3, classes: int = 10) -> int:
    """He et al., arXiv 1512.03385, table 6: 6n + 2 layers; two scalars a channel in each norm; option B."""
    total = 9 * read * width + 2 * width
    for stage in (1, 2, 4):
        channels = width * stage
        before = channels if stage == 1 else channels // 2
        total += 9 * before * channels + (2 * blocks - 1) * 9 * channels**2 + 2 * blocks * 2 * channels
        if stage > 1:
            total += before * channels + 2 * channels
    return total + (4 * width + 1) * classes


def test_residual_networks_have_the_size_of_the_paper() -> None:
    assert count(resnet20()) == residual_parameters(3) == 272_474
    assert count(resnet56()) == residual_parameters(9) == 855_770
    # option A (no projections): the 0.27M and 0.85M of table 6
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert round((272_474 - projections) / 1e6, 2) == 0.27
    assert round((855_770 - projections) / 1e6, 2) == 0.85


@pytest.mark.parametrize(
    ("blocks", "width", "read", "classes"), [(1, 4, 1, 3), (2, 8, 3, 100), (3, 32, 3, 10)]
)
def test_residual_networks_of_other_sizes(blocks: int, width: int, read: int, classes: int) -> None:
    model = resnet(blocks, width, read, classes)
    assert count(model) == residual_parameters(blocks, width, read, classes)
    assert model(torch.randn(2, read, 16, 16)).shape == (2, classes)


@pytest.mark.parametrize(("make", "layers"), [(resnet20, 20), (resnet56, 56)])
def test_residual_networks_have_as_many_layers_as_their_name_says(make, layers: int) -> None:
    model = make()
    counted = [m for m in model.modules() if isinstance(m, nn.Linear)]
    counted += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(counted) == layers


def test_residual_networks_halve_the_image_twice() -> None:
    model = resnet20().eval()
    sizes = {}
    for name in ("stage1", "stage2", "stage3"):
        model.get_submodule(name).register_forward_hook(
            lambda m, x, y, name=name: sizes.update({name: y.shape})
        )
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    assert sizes == {"stage1": (1, 16, 32, 32), "stage2": (1, 32, 16, 16), "stage3": (1, 64, 8, 8)}


def test_a_residual_network_has_a_width_a_stage_and_one_inside_each_block() -> None:
    widths = discover(resnet20(), torch.randn(2, 3, 32, 32))
    assert len(widths) == 3 + 9
    assert widths["conv"].size == 16 and len(widths["conv"].slots_with("out")) == 1 + 3
    inside = {name for name in widths if name.endswith("conv1")}
    assert len(inside) == 9
    assert all(
        len(widths[name].slots_with("out")) == len(widths[name].slots_with("in")) == 1 for name in inside
    )


@pytest.mark.parametrize("pixels", [8, 28, 32])
@pytest.mark.parametrize("pools", [(), (1,), (1, 3), (0, 1, 2)])
def test_convnets_take_small_images(pixels: int, pools: tuple[int, ...]) -> None:
    model = convnet((4, 6, 8, 10), pools, in_channels=2, classes=7).eval()
    assert model(torch.randn(3, 2, pixels, pixels)).shape == (3, 7)
    maps = {}
    model[-3].register_forward_hook(lambda m, x, y: maps.update(size=x[0].shape))
    model(torch.randn(3, 2, pixels, pixels))
    assert maps["size"] == (3, 10, pixels >> len(pools), pixels >> len(pools))


def test_a_convnet_is_as_large_as_its_layers() -> None:
    model = convnet((16, 24, 32, 32))
    kernels = 9 * (1 * 16 + 16 * 24 + 24 * 32 + 32 * 32)
    assert count(model) == kernels + 2 * (16 + 24 + 32 + 32) + 33 * 10 == 20_266  # DESIGN, table of section 8
    assert list(discover(model, torch.randn(2, 1, 8, 8)).sizes().values()) == [16, 24, 32, 32]


@pytest.mark.parametrize("make", [convnet, resnet20, separable])
def test_every_parameter_learns(make) -> None:
    torch.manual_seed(0)
    model = make(in_channels=1, classes=4)
    model(torch.randn(8, 1, 8, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_vgg_is_as_large_as_its_layers() -> None:
    channels = [3, 64, 64, 128, 128, *[256] * 3, *[512] * 6]
    convolutions = sum(9 * read * written for read, written in itertools.pairwise(channels))
    assert count(vgg16_bn()) == convolutions + 2 * sum(channels[1:]) + 512 * 10 + 10
    assert round(count(vgg16_bn()) / 1e6, 1) == 14.7
    assert sum(isinstance(m, nn.Conv2d) for m in vgg16_bn(8).modules()) == 13
    assert vgg16_bn(4, in_channels=1, classes=7)(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_alexnet_has_five_convolutions_and_three_linear_layers() -> None:
    net = alexnet(8, in_channels=1, classes=7, hidden=32)
    assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    layers = [layer for layer in net if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert [layer.weight.shape[0] for layer in layers] == [8, 24, 48, 32, 32, 32, 32, 7]
    assert layers[5].in_features == 32 * 4 * 4  # type: ignore[union-attr]
    assert discover(net, torch.zeros(2, 1, 32, 32)).sizes() == {
        **{f"conv{i}": size for i, size in enumerate((8, 24, 48, 32, 32), start=1)},
        **{"fc6": 32, "fc7": 32},
    }


def test_alexnet_tells_images_apart_before_it_has_learnt() -> None:
    answers_BK = alexnet(32).eval()(torch.randn(16, 3, 32, 32))
    assert answers_BK.std(0).mean() > 0.1  # 0.0005 with torch's weights


def test_a_separable_network_is_as_large_as_its_layers() -> None:
    width, blocks = 8, {1: 2, 2: 4, 3: 3}
    stages = sum(
        n * (26 * i * width + 2 * i * width + (3 * i * width + 3) * i * width) for i, n in blocks.items()
    )
    halvings = sum((4 * (i - 1) * width + 3) * i * width for i in (2, 3))
    expected = (27 + 3) * width + stages + halvings + (3 * width + 1) * 10
    assert count(separable(width)) == expected


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_separable_network_changes_in_all_its_widths(norm: Any) -> None:
    """It grows without a change of its outputs; but layer norms feel channels between blocks."""
    torch.manual_seed(0)
    net, x = separable(4, norm).eval(), torch.randn(2, 3, 32, 32)
    widths = discover(net, x)
    between = {"conv": 4, "down2": 8, "down3": 12}
    assert {name for name, width in widths.items() if width.mixed} == (
        {*between} if norm == "layer" else set()
    )
    assert len(widths) == 3 + 9
    added = {name: grow_index(size, size) for name, size in widths.sizes().items()}
    felt = {name: added.pop(name) for name in between if norm == "layer"}
    with torch.no_grad():
        expected = net(x)
        reindex(net, widths, added)
        torch.testing.assert_close(net(x), expected)
        reindex(net, widths, felt)
    assert count(net) == count(separable(8, norm))
    attach_gates(net, widths, grain="weight")
    for path, _, gate in iterate_gates(net):
        gate.score.data.normal_()
        if path == "stage2.0.project":
            gate.score.data[:, :9] = -1  # nothing reads them
    plain = compact(net, x)
    torch.testing.assert_close(plain.eval()(x), net.eval()(x))
    assert discover(plain, x)["stage2.0.expand"].size == 7


def test_a_norm_that_there_is_not_is_refused() -> None:
    with pytest.raises(OptionError, match="there is no norm 'group': choose layer or batch"):
        separable(4, "group")  # type: ignore[arg-type]


def test_torchvisions_models_are_taken_untrained_with_the_classes_asked_for() -> None:
    net = from_torchvision("resnet18", classes=7)
    assert type(net) is ResNet and net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "resnet19"}, "torchvision has no model 'resnet19': choose one of"),
        ({"name": "resnet18", "in_channels": 1}, "torchvision's resnet18 takes 3 colours, not 1: choose"),
    ],
)
def test_what_torchvision_has_not_is_said(options: Any, said: str) -> None:
    with pytest.raises(OptionError, match=f"^{said}"):
        from_torchvision(**options)
