"""What a dashboard is shown of a program's data: pictures, of whatever is one."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from elastic.callbacks.panels import LogPanels, make_visible
from tests.programs import QUIET, Program


@pytest.mark.parametrize(("channels", "shown"), [(1, 1), (2, 1), (3, 3), (4, 4), (5, 3), (12, 3)])
def test_images_of_any_channels_are_pictures(channels: int, shown: int) -> None:
    x_BCHW = torch.randn(2, channels, 5, 9, generator=torch.Generator().manual_seed(0)) * 7
    images = make_visible(x_BCHW)
    assert [tuple(image.shape) for image in images] == [(shown, 35, 63)] * 2
    for image, x_CHW in zip(images, x_BCHW, strict=True):
        x = x_CHW[:shown].numpy()
        least, most = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
        np.testing.assert_allclose(image[:, ::7, ::7], (x - least) / (most - least), atol=1e-6)


class Recorder(LogPanels):
    """Log where a test looks."""

    def __init__(self) -> None:
        self.experiment = Mock()

    def _list_loggers(self, trainer: L.Trainer) -> list[SimpleNamespace]:  # type: ignore[override]
        return [SimpleNamespace(experiment=self.experiment)]


def make_net(convolution: type[nn.Module], pool: type[nn.Module]) -> nn.Module:
    return nn.Sequential(convolution(2, 4, 3), nn.ReLU(), pool(1), nn.Flatten(), nn.Linear(4, 4))


SIGNALS = make_net(nn.Conv1d, nn.AdaptiveAvgPool1d), torch.randn(8, 2, 6)
IMAGES = make_net(nn.Conv2d, nn.AdaptiveAvgPool2d), torch.randn(8, 2, 6, 6)
VOLUMES = make_net(nn.Conv3d, nn.AdaptiveAvgPool3d), torch.randn(8, 2, 6, 6, 6)


@pytest.mark.parametrize(("net", "x", "count"), [(*SIGNALS, 0), (*IMAGES, 1), (*VOLUMES, 0)])
def test_a_program_without_images_trains_without_pictures(net: nn.Module, x: Tensor, count: int) -> None:
    panels, loader = Recorder(), DataLoader(TensorDataset(x, torch.arange(8) % 4), 4)
    L.Trainer(max_epochs=1, callbacks=[panels], **QUIET).fit(Program(net), loader, loader)
    assert panels.experiment.add_images.call_count == count
