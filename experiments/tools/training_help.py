"""Describe what a run can be composed of, from the configuration itself."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from elastic.experiments.tools.composition import CONF, LISTS, list_choices

EXAMPLES = (
    ("experiment=digits", "the demo, half a minute"),
    ("data=cifar10 model=resnet20 schedule=[growth,gates]", "ResNet-20, grown and pruned"),
    ("callbacks.gates.budget=2e3 seed=0,1,2 -m", "pruned to 2,000 parameters, three seeds"),
    ("run=outputs/…", "a run that was killed goes on"),
)
WIDTH = 120  # characters of a line
HIDDEN = ("callbacks", "trainer")  # of one choice each


def describe_training() -> str:
    """Describe groups with their choices, options with their defaults, and what Hydra adds."""
    config = (CONF / "config.yaml").read_text()
    return "\n".join(
        [
            "usage: elastic train [group=choice …] [option=value …] [-m]",
            "",
            "Train a network: data × model × schedule. With -m, and several values for an option, a sweep.",
            "",
            "groups, their choices, [what is chosen unless told otherwise]:",
            *_describe_groups(yaml.safe_load(config)["defaults"]),
            "",
            "options:",
            *_describe_options(config),
            "",
            "Each group has options of its own, say model.width or callbacks.gates.budget:",
            "`elastic train … --cfg job` shows all of a run's, `--hydra-help` what else Hydra can do.",
            "",
            *(f"  elastic train {line:<52} {text}" for line, text in EXAMPLES),
        ]
    )


def _describe_groups(defaults: list[Any]) -> Iterator[str]:
    for entry in (entry for entry in defaults if isinstance(entry, dict)):
        ((group, default_choice),) = entry.items()
        if group.startswith("override ") or group in HIDDEN:
            continue
        default = default_choice if isinstance(default_choice, list) else [default_choice]
        choices = (f"[{name}]" if name in default else name for name in list_choices(group))
        note = " (one or a list)" if group in LISTS else ""
        text = f"  {group + '=':<14} {', '.join(choices)}{note}"
        yield from textwrap.wrap(text, WIDTH, subsequent_indent=" " * 17, break_on_hyphens=False)


def _describe_options(config: str) -> Iterator[str]:
    """Describe the plain options of the main file, with the comments beside them."""
    for name, value, comment in re.findall(r"^(\w+): ([^\n#]+?)(?: +# (.*))?$", config, re.MULTILINE):
        yield f"  {name + '=':<18} {value:<28} {comment}".rstrip()
