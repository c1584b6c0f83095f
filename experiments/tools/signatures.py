"""Read what classes and functions take by name: each option's type, its range and its default.

Ranges stand beside the defaults in this package's own signatures (`elastic.ranges`). Others' signatures have
types at most: what their numbers have to be is said here.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

from elastic.ranges import Count, Natural, NotNegative, Part, Positive, Range, get_hints

Share = Natural | Part  # a number of batches, or a part of them
Below1 = Annotated[float, Range(0, 1, below=True)]
# By where something is defined: ranges of options that others have, whichever of their classes it is.
THEIRS: dict[str, dict[str, Any]] = {
    "torch.optim.lr_scheduler": {
        "max_lr": Positive | list[Positive],
        "pct_start": Annotated[float, Range(0, 1, above=True, below=True)],
        "div_factor": Positive,
        "final_div_factor": Positive,
        "gamma": Positive,
        "factor": NotNegative,
        "start_factor": Annotated[float, Range(0, 1, above=True)],
        "end_factor": Part,
        "patience": Natural,
        "cooldown": Natural,
        "step_size": Count,
        "total_iters": Count,
        "milestones": list[Natural],
        "T_max": Count,
        "T_0": Count,
        "T_mult": Count,
        "eta_min": NotNegative,
        "min_lr": NotNegative | list[NotNegative],
        "base_momentum": Below1,
        "max_momentum": Below1,
    },
    "torch.optim": {
        "lr": NotNegative,
        "momentum": Below1,
        "dampening": Part,
        "weight_decay": NotNegative,
        "eps": NotNegative,
        "alpha": Part,
        "rho": Part,
        "lr_decay": NotNegative,
        "momentum_decay": NotNegative,
        "betas": tuple[Below1, Below1],
    },
    "lightning.pytorch.trainer": {
        "max_epochs": Count | Literal[-1] | None,  # where steps or time bound the run
        "min_epochs": Natural | None,
        "max_steps": Count | Literal[-1],
        "min_steps": Natural | None,
        "precision": Literal["auto"] | str | Literal[16, 32, 64],
        "limit_train_batches": Share | None,
        "limit_val_batches": Share | None,
        "limit_test_batches": Share | None,
        "limit_predict_batches": Share | None,
        "overfit_batches": Share,
        "val_check_interval": Share | None,
        "check_val_every_n_epoch": Count | None,
        "num_sanity_val_steps": Annotated[int, Range(-1)],
        "log_every_n_steps": Natural,
        "accumulate_grad_batches": Count,
        "gradient_clip_val": NotNegative | None,
        "gradient_clip_algorithm": Literal["norm", "value"] | None,
        "reload_dataloaders_every_n_epochs": Natural,
        "num_nodes": Count,
        "devices": Annotated[int, Range(-1)] | str | list[Natural],
    },
    "lightning.pytorch.callbacks": {
        "every_n_epochs": Count | None,
        "every_n_train_steps": Count | None,
        "decay": Below1,
        "patience": Count,
        "min_delta": NotNegative,
    },
    "lightning.pytorch.loggers": {"flush_logs_every_n_steps": Count},
}


@dataclass(frozen=True)
class Parameter:
    """Hold what a signature says of an argument."""

    hint: Any
    default: Any
    is_bounded: bool  # by us: its own default need not be possible here


@dataclass(frozen=True)
class Signature:
    """Hold the arguments that something takes by name; `others` if any more."""

    parameters: Mapping[str, Parameter]
    others: bool


@cache
def read_signature(target: Any) -> Signature:
    """Read what a class or a function takes by name; of a class of ours what it hands on as well."""
    parameters: dict[str, Parameter] = {}
    others = False
    for function in _list_constructors(target) if inspect.isclass(target) else [target]:
        try:
            own_parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # written in C
            return Signature(parameters, True)
        for parameter in own_parameters[inspect.isclass(target) :]:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                parameters.setdefault(parameter.name, _read_parameter(function, parameter))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own_parameters):
            break
        # A function hands them on to whatever it likes, as do others' classes.
        others = others or not inspect.isclass(target) or not _is_ours(function)
    return Signature(parameters, others)


def _list_constructors(target: type) -> list[Any]:
    """List the constructor of a class, and of one of ours those that it hands options on to."""
    constructors = [vars(base)["__init__"] for base in target.__mro__ if "__init__" in vars(base)]
    return constructors if any(map(_is_ours, target.__mro__)) else constructors[:1]


def _is_ours(target: Any) -> bool:
    return str(getattr(target, "__module__", "")).startswith("elastic.")


def _read_parameter(function: Any, parameter: inspect.Parameter) -> Parameter:
    bounds = _find_bounds(function)
    hint = bounds.get(parameter.name, get_hints(function).get(parameter.name, Any))
    return Parameter(hint, parameter.default, parameter.name in bounds)


def _find_bounds(function: Any) -> Mapping[str, Any]:
    """Find what is said here of the options of others' classes, by where their constructor is defined."""
    module = getattr(function, "__module__", "") or ""
    candidates = (ranges for package, ranges in THEIRS.items() if f"{module}.".startswith(f"{package}."))
    return next(candidates, {})
