"""Step the parameters that elastic methods add to a network, beside the user's own optimizers.

Gate scores come when the user's optimizers exist; the norms of levels and kernel activation modules are there
before, so that `configure_optimizers` may find them. Scores want no weight decay, modules a learning rate of
their own, and a parameter group more would break resuming and schedulers such as OneCycleLR. So none of them
stays in the user's groups: an optimizer of the same kind follows the group that they came from, or that what
they act on is in.
"""

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from elastic.errors import TrainingError
from elastic.surgery.optimizer_state import check_state
from elastic.training.groups import remove_parameters

Leader = torch.optim.Optimizer  # one of the user's

FOLLOWED = ("lr", "betas", "momentum")  # what schedulers change
# These have one operator for a whole group, on CPUs too: scores are many and small. (SGD's wants a momentum
# of all parameters or of none, and a level that was not drawn has none yet.)
FUSED = (torch.optim.Adam, torch.optim.AdamW)


@dataclass(frozen=True)
class OwnParameter:
    """Say how a parameter that an elastic method has added learns.

    Attributes:
        like: where it is in no group itself, it learns like the first of these that is in one.
        rate: of its learning, times the network's.
        decays: whether the weight decay of the group it came from holds for it.
    """

    parameter: nn.Parameter
    like: Sequence[Tensor] = ()
    rate: float = 1.0
    decays: bool = True


class OwnOptimizers:
    """Step own parameters with optimizers that follow the user's, one for each of them.

    Args:
        leaders: the user's optimizers; own parameters are taken out of their groups.
        parameters: one that no group leads to learns like the first group of the first optimizer.

    Raises:
        TrainingError: an optimizer that cannot be followed, or none.
    """

    def __init__(self, leaders: Sequence[torch.optim.Optimizer], parameters: Iterable[OwnParameter]) -> None:
        added = list(parameters)
        self.optimizers: list[torch.optim.Optimizer] = []
        self._leaders = list(leaders)
        self._removals: list[Callable[[], None]] = []
        if not self._leaders or not added:
            return
        if not any(leader.param_groups for leader in self._leaders):
            raise TrainingError(
                "nothing is optimized, so that what elastic methods add could not learn: let "
                "configure_optimizers return an optimizer"
            )
        places = _find_places(self._leaders, added)
        for k, leader in enumerate(self._leaders):
            states = dict(leader.state)
            remove_parameters(leader, [own.parameter for own in added])
            members = [(own, i) for own, (h, i) in zip(added, places, strict=True) if h == k]
            self.optimizers.append(_make_follower(leader, members, states))

    def follow(self, wrappers: Iterable[Any], step: Callable[[Leader], None]) -> None:
        """Call `step` after each step of a user's optimizer, and drop gradients where the user does.

        Args:
            wrappers: what stands for the optimizers in the user's program, beside themselves.
        """
        for leader in self._leaders:
            handle = leader.register_step_post_hook(lambda optimizer, args, kwargs: step(optimizer))
            self._removals.append(handle.remove)
        for target in (*self._leaders, *wrappers):
            self._follow_zero_grad(target)
            self._follow_add_param_group(target)

    def _follow_zero_grad(self, target: Any) -> None:
        """Drop own gradients with the user's; torch has no hook for it."""
        zero_grad, leader = target.zero_grad, getattr(target, "optimizer", target)

        def zero_all(*args: Any, **kwargs: Any) -> None:
            zero_grad(*args, **kwargs)
            for parameter in self.list_parameters(leader):
                parameter.grad = None

        target.zero_grad = zero_all
        self._removals.append(lambda: delattr(target, "zero_grad"))

    def _follow_add_param_group(self, target: Any) -> None:
        """Leave own parameters out of groups that a program adds, say of layers that it unfreezes."""
        add, leader = target.add_param_group, getattr(target, "optimizer", target)

        def add_others(group: dict[str, Any]) -> None:
            add(group)
            for optimizer in self._leaders:
                remove_parameters(leader, self.list_parameters(optimizer))

        target.add_param_group = add_others
        self._removals.append(lambda: delattr(target, "add_param_group"))

    def release(self) -> None:
        """Follow the user's optimizers no longer."""
        while self._removals:
            self._removals.pop()()

    def list_parameters(self, leader: torch.optim.Optimizer) -> list[nn.Parameter]:
        """List the own parameters that are stepped with one of the user's optimizers."""
        follower = self._find_follower(leader)
        return [] if follower is None else [p for group in follower.param_groups for p in group["params"]]

    def step(self, leader: torch.optim.Optimizer, skip: bool = False) -> None:
        """Take the step that goes with one of the user's optimizers, and drop the gradients.

        Args:
            skip: only drop them.
        """
        follower = self._find_follower(leader)
        if follower is None:
            return
        for group in follower.param_groups:
            source = leader.param_groups[group["home"]]
            group.update({name: source[name] for name in FOLLOWED if name in source})
            if "lr" in group:
                group["lr"] = group["lr"] * group["rate"]
        if not skip:
            follower.step()
        follower.zero_grad(set_to_none=True)

    def unscale(self, leader: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> bool:
        """Divide gradients by what a scaler has multiplied the loss with; return whether all are finite."""
        grads = [p.grad for p in self.list_parameters(leader) if p.grad is not None]
        if scaler is None or not scaler.is_enabled() or not grads:
            return True
        overflow = torch.zeros(1, device=grads[0].device)
        inverse = torch.full_like(overflow, 1 / scaler.get_scale())
        torch._amp_foreach_non_finite_check_and_unscale_(grads, overflow, inverse)
        return not bool(overflow)

    def clip(self, leader: torch.optim.Optimizer, limit: float | None, algorithm: str | None) -> None:
        """Clip gradients as a run clips those of the user's optimizer, which no longer holds them."""
        parameters = [p for p in self.list_parameters(leader) if p.grad is not None]
        if parameters and limit is not None and limit > 0:
            clip = clip_grad_value_ if algorithm == "value" else clip_grad_norm_
            clip(parameters, limit)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each optimizer."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Take up the state of each optimizer."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)

    def _find_follower(self, leader: torch.optim.Optimizer) -> torch.optim.Optimizer | None:
        pairs = zip(self._leaders, self.optimizers, strict=False)
        return next((follower for optimizer, follower in pairs if optimizer is leader), None)


def _find_places(leaders: Sequence[Leader], added: Iterable[OwnParameter]) -> list[tuple[int, int]]:
    """Find what each parameter learns like: an optimizer, and a group of it."""
    places = {
        id(parameter): (k, i)
        for k, leader in enumerate(leaders)
        for i, group in enumerate(leader.param_groups)
        for parameter in group["params"]
    }
    candidates = ((own.parameter, *own.like) for own in added)
    return [next((places[id(p)] for p in group if id(p) in places), (0, 0)) for group in candidates]


def check_followed(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that surgery cannot follow, by its kind or by what it keeps after a trial step.

    Raises:
        TrainingError: it keeps its state for all parameters together, or in another optimizer, or gives
            parameters other values in evaluation.
        StructureError: what it keeps of a parameter has no entries for the parameter's own.
    """
    _check_kind(optimizer)
    for i, group in enumerate(optimizer.param_groups):
        if group["params"]:
            like = max(group["params"], key=Tensor.dim)
            trial = nn.Parameter(like.new_ones((6, 4, 3, 3, 3)[: like.dim()]))
            follower = optimizer
            with suppress(Exception):  # it is the program's own, and may want a closure
                follower = _make_follower(optimizer, [(OwnParameter(trial), i)], optimizer.state)
                _step_once(follower, trial)
            check_state(follower, trial)


def _step_once(follower: torch.optim.Optimizer, trial: nn.Parameter) -> None:
    """Step a parameter with a follower, which leaves what the user's optimizer holds as it is."""
    attributes = vars(follower).items()
    vars(follower).update({k: copy.copy(v) for k, v in attributes if isinstance(v, dict | list | set)})
    trial.grad = torch.ones_like(trial)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        follower.step()


def _check_kind(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer for what it is, see `check_followed`."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TrainingError("LBFGS keeps one state for all parameters, which cannot change: take another")
    inner = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    if inner:
        raise TrainingError(
            f"{name} wraps {type(inner[0]).__name__}, whose state no change of the network would reach: "
            f"give configure_optimizers another than {name}"
        )
    if hasattr(optimizer, "train") and hasattr(optimizer, "eval"):  # as those do that need no schedule
        raise TrainingError(
            f"{name} holds the weights of training and those of evaluation, of which one would be left as it "
            f"was: give configure_optimizers another than {name}"
        )


def _make_follower(
    leader: torch.optim.Optimizer,
    members: list[tuple[OwnParameter, int]],
    states: Mapping[Any, dict[str, Any]],
) -> torch.optim.Optimizer:
    """Make an optimizer of the same class and options, whatever its constructor takes.

    Args:
        states: of the user's optimizer, by parameter, before own parameters were taken out of it.
    """
    _check_kind(leader)
    follower = object.__new__(type(leader))
    # What its class has set beside torch's own, but no hooks, nor methods that schedulers have replaced.
    attributes = {name: value for name, value in vars(leader).items() if not hasattr(type(leader), name)}
    vars(follower).update({name: v for name, v in attributes.items() if not name.startswith("_optimizer")})
    state = {
        "defaults": leader.defaults,
        "state": defaultdict(dict),
        "param_groups": _make_groups(leader, members),
    }
    follower.__setstate__(state)
    for group in follower.param_groups:
        users = leader.param_groups[group["home"]]["params"]
        user = next((p for p in users if p.numel() and states.get(p)), None)
        for own in group["params"]:
            begun = states.get(own) or ({} if user is None else _begin_state(states[user], user, own))
            if begun:
                follower.state[own] = begun
    return follower


def _begin_state(
    user_state: Mapping[str, Any], user: nn.Parameter, parameter: nn.Parameter
) -> dict[str, Any]:
    """Make the state that an optimizer's constructor gives each parameter, as Adagrad's does.

    What it would be is read off that of one of the user's: numbers, and tensors of one number throughout. It
    is empty where steps have been taken.
    """
    state = {}
    for name, value in user_state.items():
        state[name] = copy.deepcopy(value)
        if isinstance(value, Tensor) and value.shape == user.shape:
            first = value.flatten()[0]
            if (value != first).any():
                return {}
            state[name] = torch.full_like(parameter, first.item(), dtype=value.dtype, requires_grad=False)
    return state


def _make_groups(
    leader: torch.optim.Optimizer, members: list[tuple[OwnParameter, int]]
) -> list[dict[str, Any]]:
    """Make one group for each group of the user's, rate and decay that there is."""
    groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
    for own, i in members:
        options = {name: value for name, value in leader.param_groups[i].items() if name != "params"}
        if not own.decays and "weight_decay" in options:
            options["weight_decay"] = 0.0
        if type(leader) in FUSED and not options.get("amsgrad") and own.parameter.is_floating_point():
            options |= {"fused": True, "foreach": False}
        key = (i, own.rate, own.decays)
        group = groups.setdefault(key, {**options, "home": i, "rate": own.rate, "params": []})
        group["params"].append(own.parameter)
    return list(groups.values())


def scale_module_rate(parameter: Tensor, rate: float) -> float:
    """Return the learning rate of a kernel activation module's parameter, times the network's.

    A score sums over all that its module reads, and so over the noise of their weights' steps.
    """
    return rate / math.sqrt(parameter.shape[1]) if parameter.dim() > 1 else rate
