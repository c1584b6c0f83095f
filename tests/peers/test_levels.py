"""Torch-Pruning 1.6 as an oracle for levels: the same channels kept, the same params and MACs.

Its pruner gets our importance (Σ of squared L2 norms over the layers that write a group); it removes what a
level leaves out.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16_bn

from elastic.levels.importance import rank_channels, score_channels
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.measure import counts
from elastic.models import resnet20, resnet56
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic.zoo import randomised

tp = pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.peers


def vgg() -> nn.Sequential:
    """VGG-16-BN for 32×32: the features end in 512 channels of one pixel."""
    return nn.Sequential(vgg16_bn(weights=None).features, nn.Flatten(), nn.Linear(512, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet20": resnet20, "resnet56": resnet56, "vgg16_bn": vgg}
every_model = pytest.mark.parametrize("name", MODELS)
X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def built(name: str) -> tuple[nn.Module, Widths]:
    torch.manual_seed(0)
    net = randomised(MODELS[name]()).eval()
    return net, discover(net, X)


def writes(graph: Any, dependency: Any) -> bool:
    layer = dependency.target.module
    return isinstance(layer, nn.Conv2d | nn.Linear) and graph.is_out_channel_pruning_fn(dependency.handler)


def pruner(net: nn.Module, ratios: float | dict[nn.Module, float]) -> Any:
    """Theirs, with our importance: sqrt of the sum of squares over all writers of the group."""
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=X)

    def summed(group: Any) -> Tensor:
        rows = [d.target.module.weight.flatten(1).square().sum(1)[i] for d, i in group if writes(graph, d)]
        return torch.stack(rows).sum(0).sqrt()

    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    options = {"pruning_ratio_dict": ratios} if isinstance(ratios, dict) else {"pruning_ratio": ratios}
    return tp.pruner.BasePruner(net, X, importance=summed, ignored_layers=linear, **options)


def numbered(net: nn.Module, widths: Widths) -> nn.Module:
    """Each writer's bias or, where it has none, the norm that follows says which channel is which."""
    twin = copy.deepcopy(net)
    for width in widths.values():
        for slot in width.slots:
            layer: Any = twin.get_submodule(slot.module)
            if isinstance(layer, nn.BatchNorm2d) and slot.tensor == "bias":
                layer.bias.data = torch.arange(float(width.size))
    return twin


def kept(net: nn.Module, widths: Widths) -> dict[str, list[int]]:
    """Of each width, the channels that a numbered network still has, as its norms tell."""
    found: dict[str, list[int]] = {}
    for name, width in widths.items():
        norms = [net.get_submodule(s.module) for s in width.slots if s.tensor == "running_mean"]
        told = {tuple(int(c) for c in norm.bias.tolist()) for norm in norms}  # type: ignore[union-attr, operator]
        assert len(told) == 1, "all norms of a width keep the same channels"
        found[name] = list(told.pop())
    return found


@every_model
@pytest.mark.parametrize("fraction", [0.8, 0.75, 0.5])
def test_both_keep_the_same_channels(name: str, fraction: float) -> None:
    """At 0.8 we round to the nearest number and they down: there they are told our numbers."""
    net, widths = built(name)
    (sizes,) = level_sizes(net, widths, X, [fraction])
    theirs = numbered(net, widths)
    if all(fraction * width.size % 1 == 0 for width in widths.values()):
        ratios: Any = 1 - fraction
    else:
        ratios = {theirs.get_submodule(n): 1 - (s + 0.5) / widths[n].size for n, s in sizes.items()}
    pruner(theirs, ratios).step()
    left = kept(theirs, widths)

    scores = score_channels(net, widths, "l2")
    index = {n: rank_channels(scores[n]) for n in widths}
    assert left == {n: sorted(index[n][: sizes[n]].tolist()) for n in widths}

    ours = copy.deepcopy(net)
    reindex(ours, widths, index)
    level = Levels(ours, widths, [sizes])[0]
    assert counts.count_params_dense(level) == sum(p.numel() for p in theirs.parameters())
    macs, params = tp.utils.count_ops_and_params(theirs, X)
    assert counts.count_params_dense(level) == params
    assert counts.count_macs(level, X) == counts.count_macs(theirs, X)
    # They count norms, activations and biases, too: so does their count of the level.
    assert tp.utils.count_ops_and_params(copy.deepcopy(level), X) == (macs, params)


@every_model
def test_a_level_says_what_their_pruned_network_says(name: str) -> None:
    """Norms included: the level's start as the network's own."""
    net, widths = built(name)
    theirs = copy.deepcopy(net)
    pruner(theirs, 0.25).step()
    scores = score_channels(net, widths, "l2")
    reindex(net, widths, {n: rank_channels(scores[n]) for n in widths})
    level = Levels(net, widths, level_sizes(net, widths, X, [0.75]))[0].eval()
    with torch.no_grad():
        expected = theirs.eval()(X)
        torch.testing.assert_close(level(X), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
