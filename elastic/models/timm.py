"""Build models of timm (PyTorch Image Models), by their names there."""

from typing import Any

from torch import nn

from elastic.errors import OptionError


def from_timm(name: str, in_channels: int = 3, classes: int = 1000, **options: Any) -> nn.Module:
    """Build a classifier of timm; with `pretrained=True` timm fetches its weights.

    Args:
        options: further arguments of `timm.create_model`.

    Raises:
        OptionError: timm is not installed, or has no model of that name.
    """
    try:
        import timm
    except ImportError as error:
        raise OptionError(
            f"model '{name}' needs timm, which is not installed: pip install 'elastic-cnn[timm]'"
        ) from error
    if not timm.is_model(name):
        raise OptionError(f"timm has no model '{name}': choose one of timm.list_models()")
    return timm.create_model(name, in_chans=in_channels, num_classes=classes, **options)
