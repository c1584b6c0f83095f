"""Torch-Pruning 1.6 as an oracle: arXiv 2301.12900, which follows the autograd graph where we follow fx."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from elastic.models import resnet20
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from elastic.widths.width import Width

tp = pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.peers

MODELS = {
    "resnet20": resnet20,
    "resnet18": models.resnet18,
    "densenet121": models.densenet121,
    "mobilenet_v2": models.mobilenet_v2,
    "vgg11_bn": models.vgg11_bn,
}
LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = MODELS[request.param]()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model(x)  # statistics of its own in every norm
    return model.eval(), x


def group_of(graph, model: nn.Module, width: Width, channels: list[int]):
    """Torch-Pruning's group of the width, entered by its first writer."""
    layer = model.get_submodule(width.name)
    prune = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    return graph.get_pruning_group(layer, prune, channels)


def test_both_couple_the_same_layers(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {module: name for name, module in model.named_modules()}
    for name, width in discover(model, x).items():
        theirs = set()
        for dependency, _ in group_of(graph, model, width, [0]):
            layer = dependency.target.module
            if isinstance(layer, LAYERS):
                role = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
                role = "per_channel" if isinstance(layer, nn.BatchNorm2d) else role
                theirs.add((names[layer], "depthwise" if getattr(layer, "groups", 1) > 1 else role))
        ours = {(slot.module, slot.role) for slot in width.slots if slot.tensor == "weight"}
        assert ours == theirs, name


def test_both_prune_alike(case: tuple[nn.Module, torch.Tensor]) -> None:
    ours, x = case
    ours, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    widths = discover(ours, x)
    whole = sum(parameter.numel() for parameter in ours.parameters())
    gone = {n: [0, w.size // 2, w.size - 1] for n, w in list(widths.items())[:: max(1, len(widths) // 12)]}

    graph = tp.DependencyGraph().build_dependency(theirs, example_inputs=x)
    for name, channels in gone.items():
        group_of(graph, theirs, widths[name], channels).prune()
    reindex(ours, widths, {n: [c for c in range(widths[n].size) if c not in gone[n]] for n in gone})

    assert {n: p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
    assert sum(parameter.numel() for parameter in ours.parameters()) < whole
    assert repr(ours) == repr(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
