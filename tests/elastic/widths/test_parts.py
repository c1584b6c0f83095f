"""A part of a model: some of its widths by name, or one of its modules."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic import discover, reindex
from elastic.errors import OptionError, StructureError
from tests.elastic.zoo import Net, conv, head

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    backbone = nn.Sequential(conv(3, 4, 3), nn.ReLU(), nn.Sequential(conv(4, 6, 3), nn.ReLU(), conv(6, 5)))
    return Net(lambda m, x: m.head(m.last(m.backbone(x))), backbone=backbone, last=conv(5, 7), head=head(7))


@pytest.mark.parametrize(
    ("options", "free"),
    [
        ({"only": ["backbone.*"]}, {"backbone.0", "backbone.2.0", "backbone.2.2"}),
        ({"only": ["backbone.0", "last"]}, {"backbone.0", "last"}),
        ({"exclude": ["backbone.2.*"]}, {"backbone.0", "last"}),
        ({"only": ["backbone.*"], "exclude": ["*.0"]}, {"backbone.2.2"}),
    ],
)
def test_some_widths_by_name(options: dict[str, Any], free: set[str]) -> None:
    model = make_net()
    widths = discover(model, X, **options)
    assert set(widths) == free
    others = set(discover(model, X)) - free
    assert {widths.fixed[name] for name in others} <= {"it is excluded", "it is not among those asked for"}
    shapes = {name: p.shape for name, p in model.named_parameters()}
    reindex(model, widths, {name: range(width.size - 1) for name, width in widths.items()})
    model(X)
    for name in others:
        assert model.get_submodule(name).weight.shape[0] == shapes[f"{name}.weight"][0]


def test_a_width_is_meant_by_any_layer_that_writes_it() -> None:
    model = Net(lambda m, x: m.head(m.one(x) + m.two(x)), one=conv(3, 4), two=conv(3, 4, 3), head=head(4))
    with pytest.raises(StructureError, match="one: it is excluded"):
        discover(model, X, exclude=["two"])


def test_a_name_of_nothing_is_refused() -> None:
    with pytest.raises(OptionError, match=r"'layer5.\*' is of no layer that writes a width"):
        discover(make_net(), X, exclude=["layer5.*"])


def test_a_module_of_a_model_keeps_its_border() -> None:
    model = make_net().eval()
    widths = discover(model.backbone, X, check=True)
    assert widths.sizes() == {"0": 4, "2.0": 6} and widths.fixed == {"2.2": "it is the model's output"}
    with torch.no_grad():
        expected = model(X)
        reindex(model.backbone, widths, {"0": [2, 0, 1, 3], "2.0": [*range(6), -1]})
        torch.testing.assert_close(model(X), expected)


def test_the_backbone_of_a_detector_or_of_segmentation() -> None:
    """Networks that torch.fx does not trace as a whole, or whose parts give several maps."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = conv(3, 4, 3), nn.Conv2d(4, 6, 3, 2, 1)
            self.inner, self.side = conv(6, 5), conv(4, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            fine = self.stem(x).relu()
            coarse = self.inner(self.down(fine).relu())
            up = nn.functional.interpolate(coarse, size=fine.shape[-2:])
            return {"fine": self.side(fine) + up, "coarse": coarse}

    torch.manual_seed(0)
    model = Pyramid().eval()
    widths = discover(model, X, check=True)
    assert widths.sizes() == {"stem": 4, "down": 6}
    assert widths.fixed == {"inner": "it is the model's output"}
