"""Build torchvision's own models, mostly for 224×224 images."""

from torch import nn
from torchvision.models import get_model, list_models

from elastic.errors import OptionError


def from_torchvision(name: str, in_channels: int = 3, classes: int = 1000) -> nn.Module:
    """Build a classifier of torchvision, untrained.

    Raises:
        OptionError: there is none of that name, or it takes another number of colours.
    """
    if name not in list_models():
        raise OptionError(
            f"torchvision has no model '{name}': choose one of torchvision.models.list_models()"
        )
    if in_channels != 3:
        raise OptionError(f"torchvision's {name} takes 3 colours, not {in_channels}: choose another data set")
    return get_model(name, weights=None, num_classes=classes)
