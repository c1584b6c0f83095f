"""Describe a model by the name of its builder and its options, and build it again: no code is read."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from elastic.errors import OptionError, cite
from elastic.models.alexnet import alexnet
from elastic.models.convnet import convnet
from elastic.models.resnet import resnet20, resnet56
from elastic.models.separable import separable
from elastic.models.timm import from_timm
from elastic.models.torchvision import from_torchvision
from elastic.models.unet import unet
from elastic.models.vgg import vgg16_bn

# A name here is a name in files.
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        alexnet,
        convnet,
        from_timm,
        from_torchvision,
        resnet20,
        resnet56,
        separable,
        unet,
        vgg16_bn,
    )
}
# Options that fetch or read other files: the weights are in the network's own.
FETCHING = (
    "weights",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)
NARROW = "elastic.models.narrow.narrow"  # whose model is that of its inside: its widths are in its tensors


def build_model(model: Mapping[str, Any]) -> nn.Module:
    """Build a model, untrained.

    Args:
        model: the `builder`, a name of `BUILDERS`, and its `options`.

    Raises:
        OptionError: there is no such builder, or it does not take these options.
    """
    name, options = model.get("builder"), model.get("options")
    if name not in BUILDERS or not isinstance(options, Mapping):
        raise OptionError(f"there is no builder '{name}': bring the network, or choose {', '.join(BUILDERS)}")
    if fetching := [option for option in FETCHING if options.get(option)]:
        raise OptionError(f"{name} would fetch something by {fetching[0]}: bring the network")
    try:
        return BUILDERS[name](**options)
    except (TypeError, ValueError, RuntimeError) as error:
        cause = cite(error)
        raise OptionError(
            f"{name} cannot be built with {dict(options)} ({cause}): bring the network"
        ) from error


def describe_model(node: Mapping[str, Any], in_channels: int, classes: int) -> dict[str, Any] | None:
    """Describe what a node of a configuration builds, for `build_model`; None where that is another's code.

    Args:
        node: a `_target_` with its options, in plain containers.
    """
    if node["_target_"] == NARROW:
        return describe_model(node["model"], in_channels, classes)
    module, _, name = node["_target_"].rpartition(".")
    if module != "elastic.models" or name not in BUILDERS:
        return None
    options = {key: value for key, value in node.items() if not (key.startswith("_") or key in FETCHING)}
    return {"builder": name, "options": {**options, "in_channels": in_channels, "classes": classes}}
