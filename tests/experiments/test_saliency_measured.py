"""What choosing by saliency keeps of a trained network, before any weight has adapted, on CIFAR-10."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.saliency import Saliency
from elastic.experiments.tools.restore import restore
from elastic.widths.discovery import discover

DENSE = Path(__file__).parents[2] / "experiments" / "prune_and_grow" / "resnet20-dense-seed0"
FITTED, IMAGES, BATCH = 2048, 1000, 250


def measure(dynamic: fx.GraphModule, rise: float, x_NCHW: Tensor, y_N: Tensor) -> tuple[float, float]:
    """Return accuracy and the part of the kernels that is on, with scores lower by `rise`."""
    modules, right, parts = list(iterate_modules(dynamic)), 0, []
    for module in modules:
        module.get_head().linear.bias.data -= rise
    for x_BCHW, y_B in zip(x_NCHW.split(BATCH), y_N.split(BATCH), strict=True):
        right += int((dynamic(x_BCHW).argmax(1) == y_B).sum())
        parts.append(torch.stack([module.active_BK.mean(1) for module in modules]).mean())
    for module in modules:
        module.get_head().linear.bias.data += rise
    return right / len(y_N), float(torch.stack(parts).mean())


def search(dynamic: fx.GraphModule, target: float, x_NCHW: Tensor, y_N: Tensor) -> Iterator[float]:
    """Yield accuracies while the threshold closes in on the target."""
    low, high = 0.0, 12.0
    for _ in range(6):
        middle = (low + high) / 2
        accuracy, part = measure(dynamic, middle, x_NCHW, y_N)
        low, high = (middle, high) if part > target else (low, middle)
        yield accuracy


@pytest.mark.slow
@pytest.mark.data
@torch.no_grad()
def test_a_choice_for_each_image_keeps_more_than_one_for_all() -> None:
    """On training images, no weight trained: at 70 % of the kernels 76 % are right, not 68."""
    kept = {}
    for kind in ("input", "constant"):
        run = restore(DENSE)
        run.data.prepare_data()
        net = run.network.plain()
        x_NCHW, y_N = run.data.sample(FITTED + IMAGES, seed=0)
        dynamic = attach_modules(net, discover(net, x_NCHW[:2]), activation="hard", kind=kind).eval()
        Saliency(dynamic).fit(x_NCHW[:FITTED].split(256))
        *_, kept[kind] = search(dynamic, 0.7, x_NCHW[FITTED:], y_N[FITTED:])
    assert kept["input"] > 0.72 and kept["input"] > kept["constant"] + 0.04
