"""Models of other packages by name, and what is said where there is none."""

import sys

import pytest
import torch

from elastic import discover
from elastic.errors import OptionError
from elastic.models import from_timm


def test_without_timm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(OptionError, match=r"needs timm, .*: pip install 'elastic-cnn\[timm\]'$"):
        from_timm("resnet18")


@pytest.mark.peers
def test_a_model_of_timm_is_built_by_name() -> None:
    pytest.importorskip("timm")
    model = from_timm("test_byobnet", in_channels=1, classes=7)
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7) and len(discover(model, x)) > 9
    with pytest.raises(OptionError, match="timm has no model 'resnet18000'"):
        from_timm("resnet18000")
