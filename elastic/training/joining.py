"""Find the network of any LightningModule, and give the module a `Structure` of it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from elastic.errors import StructureError, TrainingError, cite
from elastic.training.capturing import Call, capture_inputs, list_positional
from elastic.training.history import follow_loading
from elastic.training.locating import WRAPPED, find_path
from elastic.training.structure import Structure
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.leaves import list_tensors
from elastic.widths.mode import set_mode
from elastic.widths.tracing import drop_data, make_meta_copy, run_without_data

ATTRIBUTE = "elastic_structure"  # the name of the child that a foreign module is given


def find_structure(module: nn.Module) -> Structure | None:
    """Return the structure that a module has, if it has one."""
    return next((child for child in module.children() if isinstance(child, Structure)), None)


def join_structure(
    trainer: L.Trainer, module: L.LightningModule, network: str | None = None, example: Example | None = None
) -> Structure:
    """Return the structure of a module; the first to ask makes it.

    Args:
        network: the path of the network in the module; where it is left out, the module's one child.
        example: an input of the network, or several; where they are left out, they are found.

    Raises:
        TrainingError: it cannot be told which child is the network, or what its input is; or another one is
            followed already.
        StructureError: nothing of the network can change.
    """
    former = getattr(module, ATTRIBUTE, None)
    if isinstance(former, Structure) and not former.is_current(module):  # of a net since compacted, say
        delattr(module, ATTRIBUTE)
    structure = find_structure(module)
    if structure is None:
        net = find_network(module, network)
        seed, path = torch.initial_seed() % 2**32, find_path(module, net)
        example = find_example(trainer, module, net) if example is None else example
        structure = add_structure(module, Structure(net, example, seed, path=path))
    elif network is not None and find_network(module, network) is not structure.net:
        raise TrainingError(
            f"FollowNetwork('{network}') names another network than '{structure.path}', which is followed "
            "already: give one FollowNetwork, as the first callback"
        )
    structure.trainer = trainer
    return structure


def add_structure(module: nn.Module, structure: Structure) -> Structure:
    """Make a structure a child of its network's module; loading a state then rebuilds the network first."""
    module.add_module(ATTRIBUTE, structure)
    follow_loading(module, structure)
    return structure


def find_network(module: L.LightningModule, network: str | None = None) -> nn.Module:
    """Return the one child of a module that has layers, or the one that is named.

    Raises:
        TrainingError: there is none, more than one to choose from, or one that does not run by itself.
    """
    net = _pick_network(module, network)
    net = getattr(net, WRAPPED, net)
    if type(net).forward is nn.Module.forward:
        raise TrainingError(
            f"{type(module).__name__} runs the parts of '{find_path(module, net)}' itself, which has no "
            "forward: name a network that has one, or with FollowNetwork('') the module"
        )
    return net


def _pick_network(module: L.LightningModule, network: str | None) -> nn.Module:
    if network is not None:
        try:
            return module.get_submodule(network)
        except AttributeError as error:
            names = ", ".join(name for name, _ in module.named_children())
            raise TrainingError(f"the module has no '{network}': name its network, one of {names}") from error
    candidates = _list_candidates(module)
    if not candidates:
        raise TrainingError(
            f"{type(module).__name__} has no child with parameters yet: make its network in __init__, which "
            "callbacks look for before setup and configure_model"
        )
    if len(candidates) != 1:
        names = ", ".join(candidates)
        raise TrainingError(
            f"{type(module).__name__} has {len(candidates)} children with parameters ({names}): "
            "name the one that is to be elastic with callbacks=[FollowNetwork('…'), …], or '' for the module "
            "itself"
        )
    return next(iter(candidates.values()))


def _list_candidates(module: nn.Module) -> dict[str, nn.Module]:
    """List the children that have parameters, but for those that hold another, as a loss may, and no more."""
    children = {name: child for name, child in module.named_children() if list(child.parameters())}
    held = {name: set(child.parameters()) for name, child in children.items()}
    return {
        name: child
        for name, child in children.items()
        if not any(
            other is not child and other in child.modules() and held[key] == held[name]
            for key, other in children.items()
        )
    }


def find_example(trainer: L.Trainer, module: L.LightningModule, net: nn.Module) -> Example:
    """Return the inputs of the network: from the module's `example_input_array`, or a batch of the data.

    A network of one input is given the first tensor, where it takes that.

    Raises:
        TrainingError: there are no such inputs, or they do not reach the network.
    """
    array = module.example_input_array
    batch = None if array is not None else _take_batch(trainer, module)
    tensors = list_tensors(batch if array is None else array)
    if not tensors:
        raise TrainingError(f"an input cannot be told: give {type(module).__name__} an example_input_array")
    first, call = tensors[0], _make_call(tensors[0] if array is None else array)
    is_whole, is_single = find_path(module, net) == "", [net] == list(module.children())
    if (is_whole or is_single) and _takes_one(net) and (is_whole or _runs(net, first)):
        return first
    if is_whole and array is not None:
        return list_positional(net, call) or first
    try:
        return _capture_any(module, net, call, batch)
    except TrainingError:
        if is_whole or is_single:
            return first  # what is wrong with it is told where it is traced
        raise


def _takes_one(net: nn.Module) -> bool:
    """Tell whether a network's forward has one parameter."""
    try:
        parameters = list(inspect.signature(net.forward).parameters.values())
    except ValueError:  # of a TorchScript module, which is refused where it is traced
        return True
    return len(parameters) == 1 and parameters[0].kind is parameters[0].POSITIONAL_OR_KEYWORD


def _make_call(example: Any) -> Call:
    """Make what a module's forward is called with of its example, as Lightning does."""
    if isinstance(example, dict):
        return (), example
    return (tuple(example) if isinstance(example, tuple) else (example,)), {}


def _capture_any(module: L.LightningModule, net: nn.Module, call: Call, batch: Any) -> Example:
    """Return what reaches the network from the module's forward, or from a training step on a batch.

    Raises:
        TrainingError: neither reaches it; without a forward, the first tensor is taken for its input.
    """
    args, kwargs = call
    calls: list[Callable[[], Any]] = [lambda: module.training_step(batch, 0)] if batch is not None else []
    if module is not net:  # of a batch it is told the first tensor, which may leave out what a step gives
        calls.insert(0 if _takes_one(net) else len(calls), lambda: module.forward(*args, **kwargs))
    reason, has_forward = "the module's forward does not reach it", True
    for run in calls:
        try:
            inputs = capture_inputs(module, net, run)
        except NotImplementedError:  # Lightning's, of modules without a forward
            has_forward = False
        except StructureError:
            raise
        except Exception as error:  # it is the user's own
            reason = cite(error)
        else:
            if inputs is not None and _runs(net, *list_inputs(inputs)):
                return inputs
    if not has_forward:
        return list_tensors(call)[0]
    raise TrainingError(
        f"the input of {type(module).__name__}'s '{find_path(module, net)}' cannot be told ({reason}): give "
        "the module an example_input_array, or FollowNetwork('…', example=…) an input of the network"
    )


def _runs(net: nn.Module, *inputs: Tensor) -> bool:
    """Tell whether a network takes inputs, by their shapes and types alone."""
    try:
        with torch.no_grad(), quiet_hooks(net), run_without_data():
            set_mode(make_meta_copy(net))(*map(drop_data, inputs))
    except Exception:  # it is the user's own
        return False
    return True


def _take_batch(trainer: L.Trainer, module: L.LightningModule) -> Any:
    """Return a training batch as the module sees it, without moving any random state."""
    with isolate_rng():
        loaders = _make_loaders(trainer, module)
        if not loaders:
            raise TrainingError(f"there is no data yet: give {type(module).__name__} an example_input_array")
        batch = next(iter(loaders[0]))
        return module._apply_batch_transfer_handler(batch, module.device)


def _make_loaders(trainer: L.Trainer, module: L.LightningModule) -> Sequence[Any]:
    """Make the loaders that a batch may be taken from: of training, or of what is looked at without it."""
    loops: list[Any] = [trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]
    for source in (loop._data_source for loop in loops):
        try:
            loaders = source.dataloader() if source.is_defined() else None
        except Exception as error:  # the user's own may need what its setup makes, which comes later
            raise TrainingError(
                f"there is no data before {type(module).__name__} is set up ({cite(error)}): give it an "
                "example_input_array"
            ) from error
        if candidates := [loader for loader in tree_leaves(loaders) if loader is not None]:
            return candidates
    return []
