"""Follow the state that a module loads: the network is rebuilt as the state has it, before values are loaded.

The state holds what has happened to the network: see `Structure.get_extra_state`.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from elastic.errors import StructureError, TrainingError
from elastic.levels.nested import Levels
from elastic.pruning.gates import attach_gates, iterate_gates
from elastic.pruning.hiding import HiddenGates
from elastic.surgery.rebuilding import rebuild
from elastic.training.locating import find_path, make_prefix
from elastic.training.structure import Structure

HISTORY = "._extra_state"  # how torch names what a module adds to a state, behind the module's path
PLACES = ("names", "sets", "branches")  # of modules: which tensors there are


def follow_loading(module: nn.Module, structure: Structure) -> None:
    """Bring the network of a structure to the shapes of whatever state its module loads."""
    module.register_load_state_dict_pre_hook(partial(_prepare_load, structure))
    module.register_load_state_dict_post_hook(partial(_finish_load, structure))


def _prepare_load(
    structure: Structure, module: nn.Module, state: Mapping[str, Any], prefix: str, *_: object
) -> None:
    """Rebuild the network as a state has it, before its values are loaded.

    Raises:
        TrainingError: the state is of a network that began otherwise, or has other modules.
        StructureError: the state is of another architecture; the network is as it was.
    """
    if all(child is not structure for child in module.children()):
        return  # the program has put another network in the place of its
    net = structure.net
    history = state.get(f"{prefix}{find_path(module, structure)}{HISTORY}")
    copies = [module.get_submodule(path) for path in structure.copy_paths]
    if history is not None:
        _check_start(structure, history["start_sizes"])
        _check_modules(structure, history["modules"])
    structure.hidden_gates.restore()
    is_gated = any(iterate_gates(net))
    if history is not None and history["grain"] is not None and not is_gated:
        attach_gates(net, structure.widths, history["grain"], copies=copies)
    widths = copy.deepcopy(structure.widths)
    # Where it is by now: `torch.compile` may have wrapped it since.
    paths = [find_path(module, net), *structure.copy_paths]
    try:
        for path, root in zip(paths, (net, *copies), strict=True):
            own_widths = structure.widths if root is net else copy.deepcopy(widths)
            rebuild(root, own_widths, state, prefix + make_prefix(path))
    except StructureError:
        if is_gated:
            _finish_load(structure)
        else:
            HiddenGates().hide(net, *copies)  # and forget them
        raise
    if history is not None:
        _take_history(structure, history)
    structure.lay_out()


def _finish_load(structure: Structure, *_: object) -> None:
    """Hide gates again from a program that has not made its optimizers."""
    if structure.hidden_gates.is_hiding:
        structure.hide_gates()


def _take_history(structure: Structure, history: dict[str, Any]) -> None:
    structure.start_sizes, structure.timeline = dict(history["start_sizes"]), list(history["timeline"])
    structure.seed = history["seed"]
    if history["levels"] is not None and structure.levels is None:
        structure.nest(Levels(structure.net, structure.widths, history["levels"]))
    if history["modules"] is not None and not structure.dynamic_nets:
        structure.attach_dynamic(**history["modules"])
        structure.select_first()


def _check_modules(structure: Structure, modules: dict[str, Any] | None) -> None:
    present = structure.describe_modules()
    is_trained = structure.trainer is not None and structure.trainer.state.fn == "fit"
    if present is None and modules is not None and is_trained:
        raise TrainingError(
            "the checkpoint has kernel activation modules: continue with the PruneDynamically that made them"
        )
    for name, value in (present or {}).items():
        if name in PLACES and modules is not None and modules.get(name, value) != value:
            raise TrainingError(
                f"the checkpoint's kernel activation modules have {name}={modules[name]}, this run's "
                f"{name}={value}: continue with the options that the run was started with"
            )


def _check_start(structure: Structure, sizes: Mapping[str, int]) -> None:
    if not structure.start_sizes.items() <= sizes.items():  # blocks may have been added
        raise TrainingError(
            f"the checkpoint started as {sizes}, this model starts as {structure.start_sizes}: "
            "continue with the configuration the run was started with"
        )
