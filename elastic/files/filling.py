"""Fill a network as first built with the shapes, the types and the values of saved tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn

from elastic.errors import FileError, StructureError
from elastic.surgery.rebuilding import add_blocks, rebuild
from elastic.widths.discovery import discover
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.width import Widths


def refuse_unfillable(net: nn.Module, path: Path) -> None:
    """Refuse a network whose tensors cannot be put in place.

    Raises:
        StructureError: it is one.
    """
    for parameter in net.parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise StructureError(f"{path} cannot fill a lazy layer: run the network once, then load")
        if parameter.is_inference():
            raise StructureError(f"{path} cannot fill what torch.inference_mode has made: build it outside")


def take_types(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give tensors of a module the types of a state, as of half precision, where both are of floats."""
    for name, tensor in module.state_dict(keep_vars=True).items():
        value = state.get(name)
        if _is_float(tensor) and _is_float(value):
            tensor.data = tensor.data.to(value.dtype)


def _is_float(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def match_type(example: Example, net: nn.Module) -> Example:
    """Bring inputs of floats to the type that the network has in front."""
    front = next((p.dtype for p in net.parameters() if p.is_floating_point()), None)
    inputs = [x.to(front) if x.is_floating_point() else x for x in list_inputs(example)]
    return inputs[0] if isinstance(example, Tensor) else inputs


def _separate_shared(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give layers that share a parameter each its own, where a state has different ones: compacted, say."""
    first: dict[nn.Parameter, str] = {}
    for path, layer in model.named_modules():
        for key, parameter in layer._parameters.items():
            name = f"{path}.{key}".lstrip(".")
            if parameter is None or first.setdefault(parameter, name) == name:
                continue
            values = [state[key] for key in (first[parameter], name) if key in state]
            if len(values) == 2 and not torch.equal(*values):
                layer._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def fill_network(model: nn.Module, state: Mapping[str, Tensor], example: Example) -> Widths:
    """Give a network as first built the shapes and the values of a state, and return its widths."""
    _separate_shared(model, state)
    widths = discover(model, *list_inputs(example))
    add_blocks(model, widths, state)
    if _add_biases(model, state):
        widths = discover(model, *list_inputs(example))  # which has the biases, too
    rebuild(model, widths, state)
    take_types(model, state)  # of blocks that were added, too
    model.load_state_dict(state)
    return widths


def _add_biases(model: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Give layers the biases that compaction has given them, and return whether there are any."""
    layers = dict(model.named_modules())
    added = False
    for name in state.keys() - model.state_dict().keys():
        path, _, tensor_name = name.rpartition(".")
        if tensor_name == "bias" and getattr(layers.get(path), "bias", 0) is None:
            layers[path].bias = nn.Parameter(torch.zeros_like(state[name]))
            added = True
    return added


def load_state(module: nn.Module, state: Mapping[str, Tensor], fault: str) -> None:
    """Fill a module of the right shapes.

    Raises:
        FileError: the state has other tensors, or of other shapes.
    """
    take_types(module, state)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # names that are missing or too many, or other shapes
        raise FileError(f"{fault}, or has others: train again or restore it") from error
