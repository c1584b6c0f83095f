"""What lies between the last maps and the classes is one layer, and says what torch says."""

import pytest
import torch
from torch import nn

from elastic.dynamic.skipping import rewrite
from elastic.dynamic.skipping.head import ActiveHead
from elastic.widths.tracing import get_layer


class Function(nn.Module):
    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return torch.flatten(x_BCHW, 1)


@pytest.mark.parametrize(
    "between",
    [
        [nn.AdaptiveAvgPool2d(1), nn.Flatten()],
        [nn.AdaptiveAvgPool2d((1, 1)), Function()],
        [nn.Flatten()],
        [nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Flatten()],
        [nn.AdaptiveMaxPool2d(1), nn.Flatten()],
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_head_classifies_as_torch_does(between: list[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    x_BCHW = torch.randn(3, 2, 5, 7)
    maps = nn.Sequential(nn.Conv2d(2, 9, 3), *between)
    features = maps(x_BCHW).shape[1]
    net = nn.Sequential(*maps, nn.Linear(features, 4, bias=bias)).eval()
    active = rewrite(net)
    heads = [n for n in active.graph.nodes if isinstance(get_layer(active, n), ActiveHead)]
    with torch.no_grad():
        x_BCHW[1] = torch.nan
        assert len(heads) == 1
        torch.testing.assert_close(active(x_BCHW), net(x_BCHW), equal_nan=True)
        torch.testing.assert_close(active(x_BCHW[:0]), net(x_BCHW[:0]))


def test_what_a_hook_sees_is_left_to_its_layer() -> None:
    net = nn.Sequential(nn.Conv2d(2, 9, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4)).eval()
    net[1].register_forward_hook(lambda *_: None)
    active = rewrite(net)
    assert not any(isinstance(layer, ActiveHead) for layer in active.modules())
