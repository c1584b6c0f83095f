"""Keep what a run results in: a compacted network with its levels and its kernel activation modules.

The file is a safetensors file. The architecture is in its shapes and metadata; the network as it was first
built comes from the caller, so that no code is read from a file.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import MODULES, attach_modules
from elastic.dynamic.modules import iterate_modules, select_set
from elastic.errors import FileError, OptionError, StructureError
from elastic.files.packing import read_tensors, write_tensors
from elastic.levels.nested import Levels
from elastic.surgery.checking import discover_checked
from elastic.surgery.rebuilding import add_blocks, rebuild
from elastic.widths.discovery import Widths, discover

# What levels own, and kernel activation modules, are stored under these: no layer's name begins with a dot.
LEVEL_NORMS, LEVEL_MODULES = ".levels.", ".kams."


class Network:
    """Carry a run's result: one level or more, smallest first, with or without kernel activation modules.

    Args:
        levels: the levels of a network, or a network that is its only level.
        dynamic_nets: each level with its kernel activation modules, if there are any.

    Attributes:
        levels: the levels that share one storage; None where there is one only.
    """

    def __init__(self, levels: Levels | nn.Module, dynamic_nets: Sequence[fx.GraphModule] = ()) -> None:
        if isinstance(levels, nn.Module):
            self.levels, self.nets = None, [levels]
        else:
            self.levels, self.nets = levels, list(levels)
        self.dynamic_nets = list(dynamic_nets)
        if self.dynamic_nets and len(self.dynamic_nets) != len(self.nets):
            raise StructureError(
                f"{len(self.dynamic_nets)} dynamic networks for {len(self.nets)} levels: give each its own"
            )

    def __len__(self) -> int:
        """Count the levels."""
        return len(self.nets)

    @property
    def sets(self) -> int:
        """Count the sets of kernel activation modules; 0 without any."""
        return len(next(iterate_modules(self.dynamic_nets[0])).heads) if self.dynamic_nets else 0

    def plain(self, level: int | None = None) -> nn.Module:
        """Return a level without its kernel activation modules, the largest by default.

        Raises:
            OptionError: there is no such level.
        """
        return self.nets[self._index(level)]

    def dynamic(self, level: int | None = None, set: int = 0) -> fx.GraphModule:
        """Return a level, the largest by default, with a set of its kernel activation modules selected.

        Raises:
            OptionError: there is no such level or set.
        """
        if not 0 <= set < self.sets:
            extent = f"0 … {self.sets - 1}" if self.sets else "none: train some with schedule=dynamic"
            raise OptionError(f"there is no set {set} of kernel activation modules: the network has {extent}")
        net = self.dynamic_nets[self._index(level)]
        select_set(net, set)
        return net

    def run(self, x_BCHW: Tensor, level: int | None = None, set: int | None = None) -> Any:
        """Run a level, with its kernel activation modules if it has any, the first set by default.

        Raises:
            OptionError: there is no such level or set.
        """
        if set is None and not self.dynamic_nets:
            return self.plain(level)(x_BCHW)
        return self.dynamic(level, set or 0)(x_BCHW)

    def _index(self, level: int | None) -> int:
        last = len(self) - 1
        if level is not None and not 0 <= level <= last:
            extent = f"0 … {last}" if last else "level 0 alone"
            raise OptionError(f"there is no level {level}: the run's network has {extent}")
        return last if level is None else level

    def reject_modules(self, path: Path) -> None:
        """Refuse kernel activation modules, for a caller that cannot run them.

        Args:
            path: of the network's file, to be named.

        Raises:
            FileError: the network has some.
        """
        if self.dynamic_nets:
            raise FileError(
                f"{path} holds a network that is another one without its kernel activation modules: take a "
                "run that has none, such as the one that it started from"
            )

    def save(self, path: Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the network atomically, its sparse tensors without their zeros.

        Args:
            about: what else is to be said of it, in plain containers.
        """
        tensors, about = dict(self.plain().state_dict()), dict(about or {})
        for k, net in enumerate(self.dynamic_nets):
            modules = net.get_submodule(MODULES).state_dict()
            tensors |= {f"{LEVEL_MODULES}{k}.{name}": tensor for name, tensor in modules.items()}
        if self.dynamic_nets:
            first = next(iterate_modules(self.dynamic_nets[0]))
            about["switched"] = {"sets": self.sets, "kind": first.kind, "choice": first.activation}
        if self.levels is not None:
            norms = self.levels.norms.state_dict()
            tensors |= {LEVEL_NORMS + name: tensor for name, tensor in norms.items()}
            about["levels"] = self.levels.sizes[:-1]
        write_tensors(tensors, about, path)

    @classmethod
    def load(cls, model: nn.Module, path: Path, example: Tensor) -> "Network":
        """Read a network from its file, which is read once, ready for inference.

        Args:
            model: the network as it was first built, before anything had changed; it is filled in place.
            example: an input, batch first.

        Raises:
            FileError: the file is missing or damaged.
            StructureError: it is of another architecture.
        """
        tensors, about = read_tensors(path)
        widths = _fill(model, {name: t for name, t in tensors.items() if not name.startswith(".")}, example)
        if "levels" in about:
            levels = Levels(model, widths, about["levels"])
            _load_state(levels.norms, _select(tensors, LEVEL_NORMS), f"{path} lacks norms of its levels")
            network = cls(levels)
        else:
            network = cls(model)
        for net in network.nets:
            net.eval()
        if "switched" in about:
            network._attach(tensors, about["switched"], example, path)
        return network

    def _attach(self, tensors: Mapping[str, Tensor], modules: Any, example: Tensor, path: Path) -> None:
        """Give every level the kernel activation modules of a file."""
        for k, net in enumerate(self.nets):
            dynamic = attach_modules(
                net, discover_checked(net, example), None, modules["sets"], modules["choice"], modules["kind"]
            )
            state = _select(tensors, f"{LEVEL_MODULES}{k}.")
            _load_state(dynamic.get_submodule(MODULES), state, f"{path} lacks modules of level {k}")
            self.dynamic_nets.append(dynamic.eval())


def save(network: Network | Levels | nn.Module, path: Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a network into a small file; see `Network.save`."""
    (network if isinstance(network, Network) else Network(network)).save(path, about)


def load(model: nn.Module, path: Path, example: Tensor) -> Network:
    """Read a network from its file; see `Network.load`."""
    return Network.load(model, path, example)


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _load_state(module: nn.Module, state: Mapping[str, Tensor], fault: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # names that are missing or too many, or other shapes
        raise FileError(f"{fault}, or has others: train again or restore it") from error


def _fill(model: nn.Module, state: Mapping[str, Tensor], example: Tensor) -> Widths:
    """Give a network as first built the shapes and the values of a state, and return its widths."""
    widths = discover(model, example)
    add_blocks(model, widths, state)
    if _add_biases(model, state):
        widths = discover(model, example)  # which has the biases, too
    rebuild(model, widths, state)
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
