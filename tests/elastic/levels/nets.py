"""Share networks with levels, and what tests of levels look at, among their tests."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, densenet
from torchvision.models.convnext import CNBlock
from torchvision.models.resnet import Bottleneck
from torchvision.ops import Permute

from elastic.levels.cutting import find_nestable, is_view
from elastic.levels.nested import Levels
from elastic.levels.sizes import make_resized
from elastic.models import convnet, resnet20
from elastic.surgery.layers import NORMS
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic.zoo import conv, head, randomised


def alexnet_like() -> nn.Sequential:
    """Two convolutions, a flatten that repeats channels, two hidden linear layers with dropout."""
    return nn.Sequential(
        *(conv(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(32, 12), nn.ReLU(), nn.Dropout(0.5)),
        *(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 5)),
    )


def resnext_like() -> nn.Sequential:
    stem = conv(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()
    return nn.Sequential(*stem, *(Bottleneck(16, 4, groups=2) for _ in range(2)), head(16))


def convnext_like() -> nn.Sequential:
    """Depthwise convolutions, layer norms over channels that stand last, a scale a channel."""
    return nn.Sequential(conv(3, 6, 3), CNBlock(6, 0.5, 0.0), conv(6, 8, 3), CNBlock(8, 0.5, 0.0), head(8))


NETS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: convnet((6, 8, 8, 10), in_channels=3, classes=5),
    "resnet20": lambda: resnet20(4, classes=5),
    "mobilenet_v2": lambda: MobileNetV2(5, 0.25, [[1, 8, 1, 1], [3, 12, 2, 2], [3, 16, 1, 2]]),
    "densenet": lambda: densenet.DenseNet(4, (2, 2), 8, 2, num_classes=5),
    "resnext": resnext_like,
    "convnext": convnext_like,
    "alexnet": alexnet_like,
    "layer_norm_over_maps": lambda: nn.Sequential(
        *(conv(3, 6, 3), nn.LayerNorm((6, 8, 8)), nn.ReLU(), conv(6, 5, 3)), head(5)
    ),
    "channels_last_in_a_layer_norm": lambda: nn.Sequential(
        *(
            conv(3, 6, 3),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm((8, 8, 6)),
            Permute([0, 3, 1, 2]),
            conv(6, 5, 3),
        ),
        head(5),
    ),
}
SHAPE = {"mobilenet_v2": (2, 3, 24, 24), "densenet": (2, 3, 32, 32)}
every_net = pytest.mark.parametrize("name", NETS)
some_nets = pytest.mark.parametrize("name", ["convnet", "densenet", "convnext", "alexnet"])


def example(name: str, seed: int = 1) -> Tensor:
    return torch.randn(SHAPE.get(name, (2, 3, 8, 8)), generator=torch.Generator().manual_seed(seed))


def built(name: str) -> tuple[nn.Module, Tensor, Widths]:
    torch.manual_seed(0)
    net, x = randomised(NETS[name]()), example(name)
    return net, x, discover(net, x)


def halves(widths: Widths, *fractions: float) -> list[dict[str, int]]:
    return [{n: max(1, int(widths[n].size * f)) for n in find_nestable(widths)} for f in fractions or (0.5,)]


def norms(net: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in net.named_modules() if isinstance(module, NORMS)}


def nested(net: nn.Module, widths: Widths, sizes: list[dict[str, int]]) -> Levels:
    """Levels whose norms are unlike the network's, so that one that is not the level's own is noticed."""
    levels = Levels(net, widths, sizes)
    torch.manual_seed(7)
    randomised(levels.norms)
    return levels


def extracted(levels: Levels, k: int) -> nn.Module:
    """Level k as a network of its own: cut out by re-indexing, with the level's norms put in by name."""
    net = make_resized(levels.net, levels.widths, levels.sizes[k])
    if k < len(levels) - 1:
        own: Any = levels.norms[k]
        for path, norm in norms(net).items():
            norm.load_state_dict(own[path.replace(".", "/")].state_dict())
    return net.train(levels.net.training)


def evaluated(levels: Levels) -> Levels:
    for level in levels:
        level.eval()
    return levels


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * (1 + float(b.detach().abs().max())))


def shared(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are not a norm's, by name."""
    for path, module in net.named_modules():
        if not isinstance(module, NORMS):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{path}.{name}", tensor


def entries(levels: Levels, k: int) -> dict[str, Tensor]:
    """Which of the network's entries level k has of each tensor: their numbers, cut out by re-indexing."""
    numbered = copy.deepcopy(levels.net)
    for tensor in (*numbered.parameters(), *numbered.buffers()):
        tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    state = make_resized(numbered, levels.widths, levels.sizes[k]).state_dict()
    return {name: numbers.long() for name, numbers in state.items()}


def inside(levels: Levels) -> None:
    """Every level's tensors are a part of the network's: in its storage, where they can be."""
    whole = dict(shared(levels.net))
    for k, level in enumerate(levels[:-1]):
        larger, numbers = dict(shared(levels[k + 1])), entries(levels, k)
        assert larger.keys() == whole.keys()
        for name, tensor in shared(level):
            held = whole[name]
            numbered = numbers[name.lstrip(".")]  # a parameter of the network itself has no path
            assert tensor.dtype == held.dtype and torch.equal(tensor, held.flatten()[numbered]), name
            path, _, own = name.rpartition(".")
            if not is_view(levels.cuts[k].get((path, own), ())):
                continue
            assert tensor.data_ptr() == held.data_ptr(), name
            steps = [
                (n, s, t)
                for n, s, t in zip(tensor.shape, tensor.stride(), held.stride(), strict=True)
                if n > 1
            ]
            assert all(s == t for _, s, t in steps), name
            assert all(a <= b for a, b in zip(tensor.shape, larger[name].shape, strict=True)), name


def step(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A loss whose gradient reaches every logit differently; dropout draws the same each time."""
    torch.manual_seed(5)
    logits = net(x)
    loss = (logits * torch.arange(1, logits.shape[1] + 1)).square().mean()
    loss.backward()
    return loss.detach()


def placed(gradient: Tensor, like: Tensor, numbers: Tensor) -> Tensor:
    """A level's gradient among zeros, where its entries are the network's of these numbers."""
    whole = torch.zeros(like.numel(), dtype=gradient.dtype)
    whole[numbers.flatten()] = gradient.flatten()
    return whole.view(like.shape)
