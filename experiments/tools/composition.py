"""Make a composed configuration mean what its command line says: nothing dropped, nothing left over.

Hydra merges an experiment's options into whatever choices stand beside it. Where the command line replaces a
choice, those options mean nothing any more; and where nobody reads an option of the command line, its user
has to know.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hydra import compose
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from elastic.errors import OptionError
from elastic.experiments.tools.compatibility import let_hydra_start

CONF = Path(__file__).parents[2] / "conf"
NO_NAME = re.compile(r"null|true|false|[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)  # as Hydra reads a value
# What Hydra says of several values where there is one run.
SEVERAL = re.compile(r"(?:Ambiguous value for argument|Sweep parameters) '(.+?)'(?: requires|\n|$)")
LISTS = ("logger", "schedule")  # groups of which a run has several
# Groups whose choices have options of their own: another choice starts without an experiment's.
OWN_OPTIONS = ("model", "optimizer", "lr_scheduler")
PATHS = (  # options that name a file or a folder
    *("run", "init", "timeline", "data.root", "callbacks.distil.teacher.run"),
    *("callbacks.joint.sensitivity", "callbacks.reconstruct.sensitivity", "hydra.sweep.dir"),
)
PLAIN = re.compile(r"[\w/\\+.$%*@?|: -]*", re.ASCII)  # what Hydra takes without quotes
# What stands beside the callbacks, but only one of them reads.
READ_BY = {"trigger": "growth", "timeline": "growth"}


def rewrite(word: str) -> str:
    """Write for Hydra what its grammar does not know: `key=~/…`, `group=null`, signs in paths."""
    key, equals, value = word.partition("=")
    if not equals:
        return word
    if value == "null" and (CONF / key).is_dir() and key != "callbacks":
        return f"{key}=[]" if key in LISTS else f"~{key}"
    value = str(Path(value).expanduser()) if value.startswith("~") else value
    return f"{key}={_quote(value)}" if key in PATHS else f"{key}={value}"


def _quote(path: str) -> str:
    """Put a path in quotes where Hydra needs them; lists of a sweep and references stay as they are."""
    is_list = "," in path or "${" in path or path.startswith("[")
    if is_list or path.startswith(("'", '"')) or PLAIN.fullmatch(path):
        return path
    escaped = path.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def check_words(words: Sequence[str]) -> None:
    """Refuse words of a command line that Hydra does not understand, which it would show over many lines.

    Raises:
        OptionError: a flag is unknown, or stands between options; a choice is no name; a folder is a
            file, or that of one run where there are several.
    """
    with let_hydra_start():
        flags_known, unknown = get_args_parser().parse_known_args(words)
    if flags := [word for word in unknown if word.startswith("-")]:
        raise OptionError(f"there is no {flags[0]}: see --help")
    if unknown:
        raise OptionError(f"{unknown[0]} stands behind a flag that stands behind options: put flags first")
    for word in words:
        key, equals, value = word.partition("=")
        if word in ("run=", "hydra.run.dir="):  # it would be the folder that one is in
            raise OptionError(f"{word} names no folder: name one, or leave it out")
        if key in ("run", "hydra.run.dir") and (file := _find_file(value)):
            raise OptionError(f"{word} cannot be, {file} is a file: name a folder")
        if key == "run" and flags_known.multirun:
            raise OptionError(f"{word} is the folder of one run: with -m name all runs' by hydra.sweep.dir=…")
        if equals and not key:
            raise OptionError(f"{word} names no option: write <option>{word}")
        if equals and (CONF / key).is_dir() and NO_NAME.fullmatch(value):
            raise OptionError(f"there is no {word}: choose {', '.join(list_choices(key))}")


def _find_file(path: str) -> Path | None:
    """Find what stands in the way of a folder: a file there, or in place of a folder above it."""
    folder = Path(path.strip("'\""))
    return next((place for place in (folder, *folder.parents) if place.is_file()), None)


def remove_leftovers(
    cfg: DictConfig, overrides: Sequence[str], choices: Mapping[str, str | None]
) -> DictConfig:
    """Take out what a composed configuration has left over.

    Args:
        overrides: the command line.
        choices: of the groups, see `hydra.runtime.choices`.

    Raises:
        OptionError: an override that nothing takes; a callback that is none.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    with open_dict(cfg):
        replaced = find_replaced(parsed, choices)
        for name, node in compose_alone(parsed, replaced).items():
            cfg[name] = node
        for name, node in list(cfg.callbacks.items()):
            if node is not None and not OmegaConf.is_dict(node):
                raise OptionError(
                    f"callbacks.{name}={node} is no callback: set its options one by one, "
                    f"callbacks.{name}.…=…, or leave it out with callbacks.{name}=null"
                )
        for override in parsed:
            refuse_unread(override, cfg)
        for name, node in list(cfg.callbacks.items()):
            if node is not None and "_target_" not in node:
                del cfg.callbacks[name]  # an experiment's options for what this run has not
    return cfg


def find_replaced(overrides: Sequence[Override], choices: Mapping[str, str | None]) -> list[str]:
    """Name the groups in which the command line has chosen otherwise than its experiment."""
    experiment = choices.get("experiment")
    named = [o.key_or_group for o in overrides if o.key_or_group in OWN_OPTIONS]
    if experiment is None or not named:
        return []
    composed = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    defaults = composed.hydra.runtime.choices
    return [name for name in named if choices.get(name) != defaults.get(name)]


def compose_alone(overrides: Sequence[Override], groups: Sequence[str]) -> dict[str, DictConfig]:
    """Compose groups as they are without an experiment, with the command line's own options."""
    if not groups:
        return {}
    own = [str(o.input_line) for o in overrides if re.split(r"[.@/]", o.key_or_group)[0] in groups]
    composed = compose("config", own)
    return {name: composed[name] for name in groups if name in composed}


def refuse_unread(override: Override, cfg: DictConfig) -> None:
    """Refuse an option of the command line for a callback that the run has not.

    Raises:
        OptionError: it is one.
    """
    top, _, name = override.key_or_group.partition(".")
    callback = name.partition(".")[0] if top == "callbacks" else READ_BY.get(top)
    left_out = override.is_delete() or override.key_or_group == f"callbacks.{callback}"
    if not callback or callback in list_callbacks(cfg) or left_out:
        return
    raise OptionError(explain_unread(override.input_line or "", callback))


def explain_unread(line: str, callback: str) -> str:
    """Tell that nothing takes an option, and what would."""
    schedules = list_choices("schedule")
    remedy = f"say schedule={callback}" if callback in schedules else f"there are {', '.join(schedules)}"
    lacking = f"this run has no '{callback}'"
    return f"nothing takes {line}: {lacking}; leave it out, or choose a schedule with it, {remedy}"


def list_choices(group: str) -> list[str]:
    """Name the choices of a group that come with the package."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def list_callbacks(cfg: DictConfig) -> dict[str, DictConfig]:
    """List the callbacks of a run by name, without an experiment's options for what the run has not."""
    return {name: c for name, c in cfg.callbacks.items() if c is not None and "_target_" in c}


def explain(error: Exception) -> str | None:
    """Word what Hydra cannot compose as a user would want to read it; None where it says so itself."""
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0]
        return f"{error.override} cannot be read: a text with such signs goes in quotes, \"{key}='…'\""
    if isinstance(error, MissingConfigException):
        return _explain_choice(error)
    if merged := re.match(r"Error merging override (.+)", str(error)):
        return f"{merged[1]} cannot be, it has options with names: set them one by one, or all to null"
    if several := SEVERAL.match(str(error)):
        return f"{several[1]} is several values: add -m for a run of each, or write a list as <option>=[…,…]"
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return _explain_option(error, cause)
    return None


def _explain_choice(error: MissingConfigException) -> str | None:
    group, _, choice = (error.missing_cfg_file or "").rpartition("/")
    choices = error.options or list_choices(group)
    return f"there is no {group}={choice}: choose {', '.join(choices)}" if choices else None


def _list_names(cfg: DictConfig) -> list[str]:
    return sorted(str(name) for name in cfg if not str(name).startswith("_") and name != "hydra")


def _find_paths(cfg: DictConfig, name: str, depth: int = 2) -> Iterator[str]:
    """Find the options of a name in groups, and in groups of those."""
    for key in _list_names(cfg):
        group = cfg._get_node(key)
        if not isinstance(group, DictConfig) or not group:
            continue
        if name in group:
            yield f"{key}.{name}"
        elif depth > 1:
            yield from (f"{key}.{path}" for path in _find_paths(group, name, depth - 1))


def _explain_option(error: ConfigCompositionException, cause: OmegaConfBaseException) -> str | None:
    match = re.match(r"Could not override '(.+)'\.\nTo append to your config use \+(.+)", str(error))
    parent = cause.parent_node
    if match is None or not isinstance(parent, DictConfig):
        return None
    key, line = match.groups()
    top, _, rest = key.partition(".")
    callback = rest.partition(".")[0]
    if top == "callbacks" and "." in rest and parent._get_full_key(None) == "callbacks":
        return explain_unread(line, callback)
    path = parent._get_full_key(None)
    names = _list_names(parent)
    close = difflib.get_close_matches(key.rpartition(".")[2], names, 1)
    if close:
        neighbours = [f"{path}.{close[0]}" if path else close[0]]
    else:
        neighbours = list(_find_paths(parent, key)) if "." not in key else []
    remedy = (
        f"did you mean {' or '.join(neighbours)}?"
        if neighbours
        else f"{path or 'a run'} has {', '.join(names)};"
    )
    return f"there is no option {key}: {remedy} a new one is added by +{line}"
