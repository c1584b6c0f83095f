"""Check a configuration by the signatures of what it names: each option exists, has its type and range."""

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from elastic.errors import OptionError, cite
from elastic.experiments.tools.signatures import Below1, Parameter, Signature, read_signature
from elastic.experiments.tools.trust import find_object
from elastic.ranges import ANYTHING, Range, Seed, describe, explain, fits, get_hints

MISSING = "???"
# What the run itself gives to the trainer, and which option decides it.
GIVEN = {
    "callbacks": "callbacks.<name>",
    "logger": "logger",
    "enable_progress_bar": "callbacks.progress",
    "default_root_dir": "run",
}
# Of a scheduler: the run's length, and where it is, which it knows itself.
LENGTH = ("total_steps", "epochs", "steps_per_epoch", "last_epoch")
# Of the checkpoint that a run goes on from.
CHECKPOINT = {
    "filename": "last",
    "enable_version_counter": False,
    "monitor": None,
    "save_top_k": 1,
    "save_weights_only": False,
    "save_on_train_epoch_end": True,
}
# Of every summary, beside its metric.
NUMBERS = (
    *("params", "params_dense", "macs", "macs_dynamic", "macs_training", "wall_s"),
    *("epochs", "budget/target", "budget/actual"),
)
FURTHER = {"model": ("in_channels", "classes"), "task": ("classes",)}  # that are given to what is made


@dataclass
class RunOptions:
    """Name the options of a run that no part of it has, with their types and ranges."""

    name: str
    run: str
    seed: Seed
    label_smoothing: Below1
    objectives: list[str]
    timeline: str | None
    init: str | None
    choices: Mapping[str, str]
    compile: bool | Literal["reduce-overhead", "max-autotune"]
    threads: Annotated[int, Range(1, 1024)] | None
    trust: list[str]
    licence: str | None


PARTS = {
    "task": "classification",
    "data": "digits",
    "model": "convnet",
    "optimizer": "adamw",
    "trainer": "default",
}


def check_options(cfg: DictConfig) -> None:
    """Refuse options that cannot be, and write whole numbers as such (2e3 is 2000).

    Raises:
        OptionError: for the first that is unknown, missing, of another type, or out of range.
    """
    for part in PARTS:
        _check_there(cfg, part)
    content = _resolve(cfg)
    _check_names(cfg)
    for part in ("callbacks", "logger"):
        _check_group(part, content.get(part) or {})
    for name, hint in get_hints(RunOptions.__init__).items():
        if name in content:
            _check_value(cfg, name, content[name], hint)
    _check_objectives(content)
    for part in (
        "task",
        "data",
        "model",
        "optimizer",
        "lr_scheduler",
        "trainer",
        "logger",
        "trigger",
        "callbacks",
    ):
        _check_node(cfg, part, content.get(part))
    _check_checkpoint(content)
    for name in LENGTH:
        if name in (content.get("lr_scheduler") or {}):
            raise OptionError(
                f"lr_scheduler.{name} is given by the run itself: set trainer.max_epochs instead"
            )
    _check_length(content["trainer"])
    for name in GIVEN.keys() & content["trainer"].keys():
        raise OptionError(f"trainer.{name} is given by the run itself: set {GIVEN[name]} instead")


def _check_names(cfg: DictConfig) -> None:
    """Refuse options that nothing of a run takes, unless others refer to them."""
    names = [*get_hints(RunOptions.__init__), *PARTS, "lr_scheduler", "logger", "trigger", "callbacks"]
    text = json.dumps(OmegaConf.to_container(cfg, resolve=False), default=str)
    for name in map(str, cfg):
        if name not in names and not re.search(rf"\$\{{{re.escape(name)}[.}}\[]", text):
            close = difflib.get_close_matches(name, names, 1)
            remedy = f"did you mean {close[0]}?" if close else f"a run has {', '.join(sorted(names))}"
            raise OptionError(f"there is no option {name}: {remedy}")


def _check_length(trainer: Mapping[str, Any]) -> None:
    """Refuse a run that would have to last longer than it may."""
    for unit in ("epochs", "steps"):
        minimum, maximum = (trainer.get(f"{end}_{unit}") or -1 for end in ("min", "max"))
        if 0 < maximum < minimum:
            raise OptionError(
                f"trainer.min_{unit}={minimum} cannot be, trainer.max_{unit} is {maximum}: lower it, or "
                "raise that"
            )


def _check_there(cfg: DictConfig, part: str) -> None:
    if not isinstance(cfg.get(part), DictConfig) or "_target_" not in cfg[part]:
        raise OptionError(f"there is no {part}: choose one, such as {part}={PARTS[part]}")


def _check_group(part: str, group: Any) -> None:
    """Refuse callbacks, or loggers, that are none."""
    if not isinstance(group, dict):
        raise OptionError(f"{part}={group} cannot be: set it to names with a part each")
    for name, node in group.items():
        if node is not None and not (isinstance(node, dict) and "_target_" in node):
            raise OptionError(f"{part}.{name}={node} cannot be: set it to a part with a _target_, or null")


def _check_objectives(content: Mapping[str, Any]) -> None:
    """Refuse to search by what no summary has; callbacks of the user's own may report what they like."""
    metric = content["task"].get("metric")
    numbers = (f"val/{metric}", f"test/{metric}", *NUMBERS)
    objectives = content.get("objectives", numbers[:1])
    targets = [node["_target_"] for node in content["callbacks"].values() if node is not None]
    are_known = all(target.startswith(("elastic.", "lightning.")) for target in targets)
    for name in objectives or [""]:
        if name not in numbers and (are_known or not name):
            close = difflib.get_close_matches(name, numbers, 1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(numbers)}"
            raise OptionError(f"objectives={objectives} cannot be, no summary has '{name}': {remedy}")


def _check_checkpoint(content: Mapping[str, Any]) -> None:
    """Refuse what would leave a run nothing to go on from."""
    node = content["callbacks"].get("checkpoint")
    for name, value in (CHECKPOINT | {"dirpath": content["run"]}).items() if node else ():
        if node.get(name, value) != value:
            raise OptionError(
                f"callbacks.checkpoint.{name}={node[name]} cannot be, a run goes on from last.ckpt: leave "
                "it; for other checkpoints add a callback of another name, +callbacks.best._target_=…"
            )


def check_part(cfg: DictConfig, part: str) -> None:
    """Refuse options of one part that cannot be, see `check_options`."""
    _check_there(cfg, part)
    _check_node(cfg, part, _resolve(cfg)[part])


def _resolve(cfg: DictConfig) -> dict[str, Any]:
    try:
        content: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
        raise OptionError(f"{key or 'an option'} cannot be resolved: {lines[0]}") from error
    return dict(content)


def _check_node(cfg: DictConfig, key: str, node: Any) -> None:
    """Check a part of a configuration, and the parts that it has."""
    for name, child in _iterate_children(node):
        _check_node(cfg, f"{key}.{name}", child)
    if not isinstance(node, dict) or "_target_" not in node:
        return
    signature = _read_target(key, node["_target_"])
    for name, value in node.items():
        if name.startswith("_") and name.endswith("_"):  # Hydra's own
            continue
        if name in signature.parameters:
            parameter = signature.parameters[name]
            if value != MISSING and not _is_default(value, parameter):
                _check_value(cfg, f"{key}.{name}", value, parameter.hint)
        elif not signature.others:
            raise OptionError(_explain_unknown(f"{key}.{name}", name, signature))
        if value == MISSING:
            hint = signature.parameters[name].hint if name in signature.parameters else str
            raise OptionError(f"{key}.{name} is missing: set it to {describe(hint)}")
    if not node.get("_partial_") and not node.get("_args_"):
        names = {*node, *FURTHER.get(key, ())}
        for name, parameter in signature.parameters.items():
            if parameter.default is inspect.Parameter.empty and name not in names:
                raise OptionError(
                    f"{key}.{name} is missing: {explain(name, None, parameter.hint).partition(': ')[2]}"
                )


def _iterate_children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list):
        yield from enumerate(node)


def _check_value(cfg: DictConfig, key: str, value: Any, hint: Any) -> None:
    """Check an option's value; what is written as another number is put right."""
    plain = _replace_parts(value)
    if fits(plain, hint):
        return
    integral = _as_integers(plain)
    if repr(integral) != repr(plain) and fits(integral, hint):
        with open_dict(cfg):
            OmegaConf.update(cfg, key, integral, merge=False)
    elif isinstance(plain, int) and not isinstance(plain, bool) and fits(str(plain), hint):
        with open_dict(cfg):
            OmegaConf.update(cfg, key, str(plain), merge=False)
    else:
        raise OptionError(explain(key, value, hint))


def _replace_parts(value: Any) -> Any:
    """Put in place of every part with a `_target_` what fits any type."""
    if isinstance(value, dict):
        return (
            ANYTHING if "_target_" in value else {name: _replace_parts(item) for name, item in value.items()}
        )
    return [_replace_parts(item) for item in value] if isinstance(value, list) else value


def _as_integers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return [_as_integers(item) for item in value] if isinstance(value, list) else value


def _is_default(value: Any, parameter: Parameter) -> bool:
    is_equal = type(value) is type(parameter.default) and value == parameter.default
    return is_equal and not parameter.is_bounded


def _explain_unknown(key: str, name: str, signature: Signature) -> str:
    names = sorted(signature.parameters)
    close = difflib.get_close_matches(name, names, 1)
    remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(names) or 'none'}"
    return f"there is no option {key}: {remedy}"


def _read_target(key: str, target: Any) -> Signature:
    """Read what a class or a function that a configuration names takes.

    Raises:
        OptionError: it cannot be imported, or is neither.
    """
    if not isinstance(target, str) or not target:
        raise OptionError(f"{key}._target_={target} is no name: set it to that of a class or a function")
    try:
        obj = find_object(target)
    except Exception as error:  # of whatever its module does when it is imported
        cause = cite(error)
        raise OptionError(f"{key} names {target}, which cannot be imported: {cause}") from error
    if not callable(obj):
        raise OptionError(f"{key} names {target}, which is neither a class nor a function: name one")
    return read_signature(obj)
