"""Read a command's options, `key=value`, by the signature and the docstring of the function that does it."""

import difflib
import inspect
import re
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic.errors import OptionError
from elastic.ranges import explain, fits

T = TypeVar("T")
HELP = ("-h", "--help")
NONE = ("null", "none")
TRUST = "trust="  # of every command that reads runs
TRUST_HELP = "your own modules, which the run's configuration may name"


def read_path(text: str) -> Path:
    if not text:
        raise ValueError  # it would be the folder that one is in
    return Path(text).expanduser()


def read_int(text: str) -> int:
    """Read a whole number, which may be written as 2e3."""
    if not float(text).is_integer():
        raise ValueError
    return int(float(text))


def read_bool(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


# How each type is read from a word, and what it is called.
TYPES: dict[type, tuple[Callable[[str], Any], str]] = {
    Path: (read_path, "path"),
    str: (str, "text"),
    int: (read_int, "whole number"),
    float: (float, "number"),
    bool: (read_bool, "true or false"),
}


@dataclass(frozen=True)
class Option:
    """Describe an option of a command."""

    name: str
    kind: type
    optional: bool  # may be null
    default: Any
    help: str
    hint: Any = Any  # with the range of a number

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    def read(self, text: str) -> Any:
        """Read the option's value.

        Raises:
            OptionError: it is of another type, or out of its range.
        """
        if self.optional and text.lower() in NONE:
            return None
        if not text and self.required:
            raise OptionError(f"{self.name}= says nothing: set {self.name}, see --help")
        read, kind = TYPES[self.kind]
        try:
            value = read(text)
        except (ValueError, KeyError, OverflowError):
            raise OptionError(f"{self.name}={text} is no {kind}: set {self.name} to one") from None
        if self.kind in (int, float) and not fits(value, self.hint):
            raise OptionError(explain(self.name, value, self.hint))
        return value


def list_options(function: Callable[..., Any]) -> dict[str, Option]:
    """List the options of a function by name."""
    hints, helps = get_type_hints(function), read_helps(inspect.getdoc(function) or "")
    bounded_hints = get_type_hints(function, include_extras=True)
    options = {}
    for name, parameter in inspect.signature(function).parameters.items():
        is_union = get_origin(hints[name]) in (Union, types.UnionType)
        kinds = [kind for kind in get_args(hints[name]) or [hints[name]] if kind is not type(None)]
        options[name] = Option(
            name, kinds[0], is_union, parameter.default, helps.get(name, ""), bounded_hints[name]
        )
    return options


def read_helps(doc: str) -> dict[str, str]:
    """Read what the `Args:` of a docstring say of each name."""
    block = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)*)", doc, re.MULTILINE)
    entries = re.findall(
        r"^ {4}([\w, ]+): ((?:.*\n?)(?: {5,}.*\n?)*)", block[1] if block else "", re.MULTILINE
    )
    return {name: " ".join(text.split()) for names, text in entries for name in names.split(", ")}


def read_options(function: Callable[..., Any], words: Sequence[str]) -> dict[str, Any]:
    """Read a function's options from the words of a command line.

    Raises:
        OptionError: an unknown option, one of another type, or one that is missing.
    """
    options, values = list_options(function), {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in options:
            close = difflib.get_close_matches(name, options, 1, cutoff=0.7)  # options are short
            names = ", ".join(f"{name}=…" for name in options) or "none"
            remedy = f": did you mean {close[0]}=…?" if close else f"; there are: {names}"
            raise OptionError(f"there is no option {word}{remedy}")
        values[name] = options[name].read(text)
    missing = [
        f"{option.name}=…" for option in options.values() if option.required and option.name not in values
    ]
    if missing:
        raise OptionError(f"name {' and '.join(missing)}: see --help")
    return values


def reads_runs(function: Callable[..., Any]) -> bool:
    """Tell whether a function reads the configuration of a run, or of those that a glob names."""
    options = list_options(function)
    return "run" in options or ("runs" in options and options["runs"].kind is str)


def describe(function: Callable[..., Any], command: str) -> str:
    """Describe a command: what it does, its options, their types and defaults."""
    options, doc = list_options(function).values(), inspect.getdoc(function) or ""
    usage = " ".join([command, *(f"{o.name}=…" if o.required else f"[{o.name}=…]" for o in options)])
    summary = " ".join(doc.partition("\n\n")[0].split())
    lines = [f"  {o.name + '=':<10} {_describe_value(o):<24} {o.help}".rstrip() for o in options]
    if reads_runs(function):
        lines.append(f"  {TRUST:<10} {'[modules]':<24} {TRUST_HELP}")
    return "\n".join([f"usage: {usage}", "", summary, "", *lines]).rstrip()


def _describe_value(option: Option) -> str:
    kind = TYPES[option.kind][1]
    default = option.default
    return kind if option.required or default in (None, "") else f"{kind} ({str(default).lower()})"


def call(function: Callable[..., T]) -> T:
    """Call a function with the options of this command line; `--help` describes it instead."""
    words = sys.argv[1:]
    if any(word in HELP for word in words):
        print(describe(function, f"elastic {Path(sys.argv[0]).stem}"))
        raise SystemExit(0)
    trust_words = [word for word in words if word.startswith(TRUST) and reads_runs(function)]
    for word in trust_words:
        from elastic.experiments.tools.trust import trust_modules  # which imports much

        trust_modules(name.strip() for name in word.removeprefix(TRUST).strip("[]").split(","))
    return function(**read_options(function, [word for word in words if word not in trust_words]))
