"""A network of a level's shape that owes its weights nothing."""

from functools import partial

import pytest
import torch

from elastic.errors import OptionError
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import resnet20
from elastic.models.narrow import narrow
from elastic.widths.discovery import discover

X = torch.zeros(2, 3, 16, 16)


@pytest.mark.parametrize("fraction", [0.512, 0.8])
def test_it_has_the_shapes_of_the_level(fraction: float) -> None:
    net = resnet20(8)
    widths = discover(net, X)
    level = Levels(net, widths, level_sizes(net, widths, X, [fraction]))[0]
    alone = narrow(partial(resnet20, 8), fraction, pixels=16)
    shapes = {name: tensor.shape for name, tensor in level.state_dict().items()}
    assert {name: tensor.shape for name, tensor in alone.state_dict().items()} == shapes
    assert alone.eval()(X).shape == (2, 10)


def test_its_weights_are_drawn_for_its_own_size() -> None:
    """Not cut from those of the whole: their spread follows from the channels that are read."""
    torch.manual_seed(0)
    alone = narrow(partial(resnet20, 32), 0.25, pixels=16)
    weight = alone.stage1[1].conv2.weight  # type: ignore[union-attr,index]
    bound = (1 / (8 * 9)) ** 0.5  # torch's default: uniform within 1 / √fan-in
    assert weight.abs().max() > 0.95 * bound


def test_other_fractions_are_refused() -> None:
    with pytest.raises(OptionError, match="between 0 and 1"):
        narrow(resnet20, 1.0, pixels=16)
