"""What a run leaves: the tensors of a compacted network in one small file, with its levels if it has any.

The file is a safetensors file; the architecture is in its shapes and metadata. Tensors that are mostly zero
are stored as a bitmap and their non-zeros.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import MODULES, attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.errors import StructureError
from elastic.files.atomic import write_atomically
from elastic.levels.nested import Levels
from elastic.surgery.rebuilding import add_blocks, rebuild
from elastic.widths.discovery import discover

SPARSE = 0.75  # a tensor of fewer non-zeros than this is stored as a bitmap and its non-zeros
# What levels own, and kernel activation modules, are stored under these: no layer's name begins with a dot.
NORMS, KAMS = ".levels.", ".kams."


Switched = Sequence[fx.GraphModule]


def save_compact(net: nn.Module, path: Path, about: Mapping[str, Any], switched: Switched = ()) -> None:
    """Write a compacted network's tensors, the sparse ones without their zeros, atomically.

    Args:
        switched: the network, or each of its levels, with kernel activation modules, if there are any.
    """
    _write(net.state_dict() | _kams(switched), path, {**about, **_about(switched)})


def save_levels(levels: Levels, path: Path, about: Mapping[str, Any], switched: Switched = ()) -> None:
    """Write a network as `save_compact` does, and the sizes and norms of its levels."""
    norms = {NORMS + name: tensor for name, tensor in levels.norms.state_dict().items()}
    about = {**about, **_about(switched), "levels": levels.sizes[:-1]}
    _write(levels.net.state_dict() | norms | _kams(switched), path, about)


def _kams(switched: Switched) -> dict[str, Tensor]:
    kept = ((k, net.get_submodule(MODULES).state_dict()) for k, net in enumerate(switched))
    return {f"{KAMS}{k}.{name}": tensor for k, state in kept for name, tensor in state.items()}


def _about(switched: Switched) -> dict[str, Any]:
    """What `attach` has to be told, to make the same modules again."""
    if not switched:
        return {}
    first = next(iterate_modules(switched[0]))
    return {"switched": {"sets": len(first.heads), "kind": first.kind, "choice": first.activation}}


def load_switched(net: nn.Module | Levels, path: Path, example: Tensor) -> list[fx.GraphModule]:
    """The network of a file, or each of its levels, with the kernel activation modules that the file has.

    Args:
        net: from `load_compact` or `load_levels`.

    Raises:
        StructureError: the file is missing or damaged, or has no modules.
    """
    state, about = _read(path)
    if "switched" not in about:
        raise StructureError(f"{path} has no kernel activation modules: train some with schedule=dynamic")
    options = {"activation" if name == "choice" else name: value for name, value in about["switched"].items()}
    found = []
    for k, level in enumerate(net if isinstance(net, Levels) else [net]):
        made = attach_modules(level, discover(level, example), **options)
        prefix = f"{KAMS}{k}."
        kams = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        try:
            made.get_submodule(MODULES).load_state_dict(kams)
        except RuntimeError as error:
            raise StructureError(f"{path} lacks modules of level {k}: train again or restore it") from error
        found.append(made.eval())
    return found


def holds_switched(path: Path) -> bool:
    """Whether a file has kernel activation modules.

    Raises:
        StructureError: it is missing or damaged.
    """
    return "switched" in _read(path)[1]


def refuse_switched(path: Path) -> None:
    """Refuse a file's network to those who know nothing of kernel activation modules.

    Raises:
        StructureError: it has some; or the file is missing or damaged.
    """
    if holds_switched(path):
        raise StructureError(
            f"{path} holds a network that is another one without its kernel activation modules: take a run "
            "that has none, such as the one that it started from"
        )


def _write(state: Mapping[str, Tensor], path: Path, about: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        kept = tensor != 0
        if tensor.is_floating_point() and kept.sum() < SPARSE * tensor.numel():
            shapes[name] = list(tensor.shape)
            bits = kept.flatten().to(torch.uint8)
            bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
            tensors[f"{name}:bits"] = (bits << torch.arange(8)).sum(1).to(torch.uint8)
            tensors[f"{name}:values"] = tensor[kept]
        else:
            tensors[name] = tensor
    meta = {"elastic": json.dumps({"about": dict(about), "sparse": shapes})}  # one key: their order is random
    write_atomically(path, lambda part: save_file(tensors, part, meta))


def load_compact(net: nn.Module, path: Path, example: Tensor) -> nn.Module:
    """Put the tensors of `save_compact` into the network they were compacted from, as first built.

    Of a network with levels it is the largest.

    Raises:
        StructureError: the file is missing or damaged, or of another architecture.
    """
    state, _ = _read(path)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(".")}
    add_blocks(net, discover(net, example), state)
    layers = dict(net.named_modules())
    for name in state.keys() - net.state_dict().keys():  # compaction may have given a layer a bias
        layer, _, tensor_name = name.rpartition(".")
        if tensor_name == "bias" and getattr(layers.get(layer), "bias", 0) is None:
            layers[layer].bias = nn.Parameter(torch.zeros_like(state[name]))
    rebuild(net, discover(net, example), state)
    net.load_state_dict(state)
    return net.eval()


def load_levels(net: nn.Module, path: Path, example: Tensor) -> Levels:
    """Put the tensors of `save_levels` into the network as first built, and give it its levels.

    Raises:
        StructureError: the file is missing or damaged, of another architecture, or has no levels.
    """
    state, about = _read(path)
    if "levels" not in about:
        raise StructureError(f"{path} holds a network without levels: leave the level out, or train some")
    levels = Levels(load_compact(net, path, example), discover(net, example), about["levels"])
    norms = {name.removeprefix(NORMS): t for name, t in state.items() if name.startswith(NORMS)}
    try:
        levels.norms.load_state_dict(norms)
    except RuntimeError as error:
        raise StructureError(
            f"{path} lacks norms that its levels need, or has others: train again or restore it"
        ) from error
    for level in levels:
        level.eval()
    return levels


def holds_levels(path: Path) -> bool:
    """Whether a file is of `save_levels`.

    Raises:
        StructureError: it is missing or damaged.
    """
    return "levels" in _read(path)[1]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return _unpacked(path)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        cause = str(error).splitlines()[0]
        raise StructureError(f"{path} cannot be read ({cause}): train again or restore it") from error


def _unpacked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["elastic"])
    shapes = meta["sparse"]
    state = {name: tensor for name, tensor in held.items() if ":" not in name}
    for name, shape in shapes.items():
        kept = (held[f"{name}:bits"][:, None] >> torch.arange(8) & 1).bool().flatten()
        values = held[f"{name}:values"]
        if int(kept.sum()) != len(values):
            raise ValueError(f"'{name}' has {len(values)} values for {int(kept.sum())} places")
        tensor = torch.zeros(shape, dtype=values.dtype)
        tensor.view(-1)[kept[: tensor.numel()]] = values
        state[name] = tensor
    return state, meta["about"]
