"""Load a module whose network has grown, been gated, nested or given modules, without its callbacks."""

import inspect
import re
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from torch import nn

from elastic.errors import ElasticError, FileError, cite
from elastic.training.checkpoints import read_checkpoint
from elastic.training.history import HISTORY
from elastic.training.joining import add_structure, find_structure
from elastic.training.locating import WRAPPED
from elastic.training.structure import Structure
from elastic.widths.inputs import make_zeros
from elastic.widths.mode import set_mode

M = TypeVar("M", bound=L.LightningModule)
HEAD = re.compile(r"\bkernel_modules\..*\.heads\.(\d+)\.")


def load_module(module_class: type[M], checkpoint: Path | str, **arguments: Any) -> M:
    """Load a module from a checkpoint that a run with elastic callbacks has left.

    `load_from_checkpoint` makes the network as its class does, not as large as the one that is saved.

    Args:
        module_class: the class that was trained.
        checkpoint: the file; only tensors and plain containers are read from it.
        arguments: of the class, where its hyperparameters were not saved.

    Returns:
        The module in evaluation mode, on the CPU.

    Raises:
        FileError: the file cannot be read, or is no checkpoint of such a run.
        StructureError: it is of another architecture.
    """
    contents = _read(Path(checkpoint))
    state: dict[str, Any] = contents["state_dict"]
    key = next((name for name in state if name.endswith(HISTORY) and "start_sizes" in state[name]), None)
    if key is None:
        raise FileError(
            f"{checkpoint} has no elastic network: load it with {module_class.__name__}.load_from_checkpoint"
        )
    module = module_class(**{**_select_arguments(module_class, contents), **arguments})
    if not any(WRAPPED in name for name in module.state_dict()):  # it is compiled later, if at all
        state = {name.replace(f"{WRAPPED}.", ""): value for name, value in state.items()}
    try:
        _check_sets(state, state[key])
        structure = find_structure(module) or _join(module, state[key])
        module.load_state_dict(state)
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if isinstance(error, ElasticError):
            raise
        cause = cite(error)
        raise FileError(
            f"{checkpoint} does not fit {module_class.__name__} ({cause}): name another"
        ) from error
    structure.route([])
    return set_mode(module)


def _select_arguments(module_class: type[L.LightningModule], contents: dict[str, Any]) -> dict[str, Any]:
    """Select those of the saved hyperparameters that a class takes: under one name, or each by its own."""
    values, name = dict(contents.get("hyper_parameters", {})), contents.get("hparams_name")
    parameters = inspect.signature(module_class).parameters
    if isinstance(name, str) and name in parameters and name not in values:
        return {name: values}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {key: value for key, value in values.items() if takes_all or key in parameters}


def _read(path: Path) -> dict[str, Any]:
    contents = read_checkpoint(path)
    if not isinstance(contents.get("state_dict"), dict):
        raise FileError(f"{path} has no state_dict: name a checkpoint of Lightning's")
    return contents


def _join(module: nn.Module, history: dict[str, Any]) -> Structure:
    path = history["network"]
    structure = Structure(
        module.get_submodule(path), make_zeros(history["example"]), history["seed"], path=path
    )
    structure.follow_copies(module, history.get("copies", ()))
    return add_structure(module, structure)


def _check_sets(state: dict[str, Any], history: dict[str, Any]) -> None:
    """Refuse a history of other sets of kernel activation modules than there are tensors of."""
    heads = {match[1] for name in state if (match := HEAD.search(name))}
    if history["modules"] is not None and history["modules"]["sets"] != len(heads):
        raise FileError(f"the checkpoint says of its modules what its {len(heads)} sets do not: name another")
