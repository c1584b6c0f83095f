"""Keep what a run results in: a compacted network with its levels and its kernel activation modules.

The file is a safetensors file. Its tensors are those of the largest level under their own names; what levels
and modules own begins with a dot. The architecture is shapes and metadata: a known builder and its options;
or the caller brings the network as it was first built. No code is read from a file.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import MODULES, attach_modules
from elastic.dynamic.modules import describe_modules, iterate_modules, select_set
from elastic.errors import FileError, OptionError, StructureError
from elastic.files.filling import fill_network, load_state, match_type, refuse_unfillable, take_types
from elastic.files.metadata import build_network, make_example, read_levels, read_modules
from elastic.files.packing import read_tensors, write_tensors
from elastic.files.zoo import find_file
from elastic.levels.nested import Levels
from elastic.surgery.checking import discover_checked
from elastic.widths.copying import find_runs
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.tracing.meta import refuse_compiled

# What levels own, and kernel activation modules, are stored under these: no layer's name begins with a dot.
LEVEL_NORMS, LEVEL_MODULES = ".levels.", ".kams."
# Held while one of several sets runs: it is selected for all threads. No network has it: they are copied.
SELECTED = RLock()
STRUCTURE = ("levels", "switched")  # of the metadata: what the network itself knows


class Network:
    """Carry a run's result: one level or more, smallest first, with or without kernel activation modules.

    Args:
        levels: the levels of a network, or a network that is its only level.
        dynamic_nets: each level with its kernel activation modules, if there are any.
        about: what is to be said of it, in plain containers; see `docs/files.md`.

    Attributes:
        levels: the levels that share one storage; None where there is one only.
    """

    def __init__(
        self,
        levels: Levels | nn.Module,
        dynamic_nets: Sequence[fx.GraphModule] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.about = dict(about or {})
        if isinstance(levels, nn.Module):
            self.levels, self.nets = None, [levels]
        elif isinstance(levels, Levels):
            self.levels, self.nets = levels, list(levels)
        else:
            raise StructureError(f"a {type(levels).__name__} is no network: give `Levels`, or one module")
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

        It is the same module for all sets: where threads want several, `run` takes one after the other.

        Raises:
            OptionError: there is no such level or set.
        """
        if not 0 <= set < self.sets:
            extent = f"0 … {self.sets - 1}" if self.sets else "none: train some with schedule=dynamic"
            raise OptionError(f"there is no set {set} of kernel activation modules: the network has {extent}")
        net = self.dynamic_nets[self._index(level)]
        select_set(net, set)
        return net

    def run(self, x: Example, level: int | None = None, set: int | None = None) -> Any:
        """Run a level, with its kernel activation modules if it has any, the first set by default.

        Args:
            x: an input, batch first, or several.

        Raises:
            OptionError: there is no such level or set.
        """
        if set is None and not self.dynamic_nets:
            return self.plain(level)(*list_inputs(x))
        with SELECTED if self.sets > 1 else nullcontext():
            return self.dynamic(level, set or 0)(*list_inputs(x))

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

    def save(self, path: str | Path, about: Mapping[str, Any] | None = None, packed: bool = False) -> None:
        """Write the network atomically.

        Args:
            about: what else is to be said of it, in plain containers.
            packed: leave out the zeros of sparse tensors: smaller, but only this package reads it.

        Raises:
            StructureError: it is a compiled one, or has a state beside its tensors.
            OptionError: what is to be said is not in plain containers.
            FileError: the file cannot be written.
        """
        refuse_compiled(self.plain())
        runs = tuple(f"{path}." for path in find_runs(self.plain()))
        state = self.plain().state_dict()
        tensors = {name: value for name, value in state.items() if not name.startswith(runs)}
        about = {**self.about, **(about or {})}
        if reserved := [name for name in STRUCTURE if name in about]:
            raise OptionError(
                f"about says '{reserved[0]}', which a file says of its own: give it another name"
            )
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                kind = f"a {type(value).__name__}, which no file of tensors holds"
                raise StructureError(f"'{name}' is {kind}: keep it in a buffer, or leave it out of the state")
        for k, net in enumerate(self.dynamic_nets):
            modules = net.get_submodule(MODULES).state_dict()
            tensors |= {f"{LEVEL_MODULES}{k}.{name}": tensor for name, tensor in modules.items()}
        if self.dynamic_nets:
            options = describe_modules(self.dynamic_nets[0])
            about["switched"] = {"choice": options.pop("activation"), **options}
        if self.levels is not None:
            norms = self.levels.norms.state_dict()
            tensors |= {LEVEL_NORMS + name: tensor for name, tensor in norms.items()}
            about["levels"] = self.levels.sizes[:-1]
        write_tensors(tensors, about, Path(path).expanduser(), packed)

    @classmethod
    @torch.inference_mode(False)  # else it could not be trained, nor changed, outside
    def load(
        cls, path: str | Path, net: nn.Module | None = None, example: Example | None = None
    ) -> "Network":
        """Read a network from its file, which is read once, ready for inference.

        Args:
            net: the network as it was first built, before anything had changed, to be filled in place; by
                default it is built as the file says.
            example: an input, batch first, or several; by default zeros of the size that the file says.

        Raises:
            FileError: the file is missing or damaged, or does not say what is not given.
            StructureError: it is of another architecture, or the given network cannot be filled.
        """
        path = Path(path).expanduser()
        tensors, about = read_tensors(path)
        if net is None:
            net = build_network(about, path)
        refuse_unfillable(net, path)
        if example is None:
            example = make_example(about, path)
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith(".")}
        take_types(net, state)
        example = match_type(example, net)
        widths = fill_network(net, state, example)
        description = {name: value for name, value in about.items() if name not in STRUCTURE}
        if "levels" in about:
            levels = Levels(net, widths, read_levels(about, path))
            load_state(levels.norms, _select(tensors, LEVEL_NORMS), f"{path} lacks norms of its levels")
            network = cls(levels, about=description)
        else:
            network = cls(net, about=description)
        for level in network.nets:
            level.eval()
        if "switched" in about:
            network._attach(tensors, read_modules(about, tensors, path), example, path)
        return network

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "Network":
        """Read a network from a folder or a repository of Hugging Face (extra `hub`).

        Args:
            source: the folder, or the repository's id, `<user>/<name>`.
            options: `net` and `example` as in `load`; others, such as `revision`, `token` and `cache_dir`, as
                Hugging Face's own `from_pretrained` takes them.

        Raises:
            FileError: see `load`; or there is no such repository, or the extra is missing.
        """
        if Path(source).exists():
            return load(source, options.get("net"), options.get("example"))
        network: Network = _import_hub().read_repository(str(source), cls.load, options)
        return network

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write a folder as Hugging Face has it: weights, configuration and card (extra `hub`).

        A card that is there already is kept.

        Raises:
            FileError: the extra is missing, or there can be no such folder.
        """
        _import_hub().write_folder(self, Path(folder), options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Write a repository of Hugging Face, with a card made of what is said of the network (extra `hub`).

        Args:
            repo_id: `<user>/<name>`.
            options: such as `private` and `token`, as Hugging Face's own `push_to_hub` takes them.

        Returns:
            the address of the commit.

        Raises:
            FileError: the extra is missing, or the repository cannot be written.
        """
        return str(_import_hub().write_repository(self, repo_id, options))

    def _attach(
        self, tensors: Mapping[str, Tensor], modules: Mapping[str, Any], example: Example, path: Path
    ) -> None:
        """Give every level the kernel activation modules of a file."""
        for k, net in enumerate(self.nets):
            dynamic = attach_modules(
                net,
                discover_checked(net, *list_inputs(example)),
                modules.get("names"),
                sets=modules["sets"],
                activation=modules["choice"],
                kind=modules["kind"],
                branches=modules.get("branches") is True,  # neither these nor names in files of before
            )
            state = _select(tensors, f"{LEVEL_MODULES}{k}.")
            load_state(dynamic.get_submodule(MODULES), state, f"{path} lacks modules of level {k}")
            self.dynamic_nets.append(dynamic.eval())


def save(
    network: Network | Levels | nn.Module,
    path: str | Path,
    about: Mapping[str, Any] | None = None,
    packed: bool = False,
) -> None:
    """Write a network into a safetensors file; see `Network.save`."""
    (network if isinstance(network, Network) else Network(network)).save(path, about, packed)


def load(source: str | Path, net: nn.Module | None = None, example: Example | None = None) -> Network:
    """Read a network by the name it has in the zoo, from its file, or from a folder that holds one.

    Args:
        net: the network as it was first built, where the file does not say how; it is filled in place.
        example: an input, batch first, or several, where the file does not say their sizes.

    Raises:
        FileError: there is no such file, it is damaged, or does not say what is not given.
        StructureError: it is of another architecture.
    """
    return Network.load(find_file(source), net, example)


def _import_hub() -> ModuleType:
    try:
        return import_module("elastic.files.hub")
    except ImportError as error:
        raise FileError(f"{error.name} is not installed: install the extra `hub`") from error


def _select(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors under a prefix, without it."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
