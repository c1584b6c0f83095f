"""Give runs options that cannot be: each is refused in one line, or is in the run as it was asked for."""

import copy
from collections.abc import Iterator
from math import inf, nan
from pathlib import Path
from random import Random
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from elastic.experiments.tools import memory
from elastic.experiments.tools.checking import check_options
from elastic.experiments.tools.composition import list_choices
from elastic.experiments.tools.errors import THEIRS, format_error
from elastic.experiments.tools.parts import make_callbacks
from elastic.experiments.tools.trials import Part
from elastic.experiments.tools.trials.composing import compose_run
from elastic.experiments.train import build, make_trainer

CLAIM = "refused in one line, or built as asked"
MEMORY = 10**9  # bytes that trials may use: a network beyond them is refused, as one beyond a machine's is
BASES = 16  # composed configurations, of which each trial changes one
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 1000, 10**7, 2**32, -(2**40), 0.5, 2.5, -0.1, 1e-9, 1e30, nan, inf, -inf),
    *(True, False, None, "", "abc", "1", "null", "../x", "é\n"),
    *([], [0], [1, 2], ["a"], [[1]], [nan], {}, {"a": 1}, {"_target_": "nowhere.net"}),
)
SCHEDULES = ("growth,gates", "gates,ema", "growth", "joint", "reconstruct", "dynamic", "static")


def try_options(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Change one to three options of a composed configuration, and make all parts of its run."""
    find_memory, memory.find_memory = memory.find_memory, lambda: MEMORY
    try:
        bases = [_compose(random, folder) for _ in range(min(BASES, 1 + trials // 8))]
        for trial in range(trials):
            cfg = copy.deepcopy(random.choice(bases))
            content: Any = OmegaConf.to_container(cfg, resolve=True)
            keys = list(_list_keys(content))
            changes = {random.choice(keys): random.choice(VALUES) for _ in range(random.choice((1, 1, 2, 3)))}
            _try_once(part, cfg, changes, folder / str(trial))
    finally:
        memory.find_memory = find_memory


def _try_once(part: Part, cfg: DictConfig, changes: dict[str, Any], folder: Path) -> None:
    try:
        with open_dict(cfg):
            for key, value in changes.items():
                OmegaConf.update(cfg, key, value, merge=False)
        check_options(cfg)
    except THEIRS as error:
        part.count("refused by type or range") if "\n" not in format_error(error) else part.fail(f"{changes}")
        return
    except Exception as error:
        part.fail(f"{changes}: {type(error).__name__} {error}")
        return
    differing = [key for key, value in changes.items() if not _is_same(OmegaConf.select(cfg, key), value)]
    if differing:
        part.fail(f"{differing} of {changes} became something else")
        return
    try:
        callbacks = [*make_callbacks(cfg).values()]
        build(cfg)
        make_trainer(cfg, callbacks, folder)
    except THEIRS as error:
        part.count("refused as it was built") if "\n" not in format_error(error) else part.fail(f"{changes}")
    except Exception:  # which a run turns into one line, without knowing the option
        part.count("refused by what failed in being built")
    else:
        part.count("built as asked")


def _is_same(value: Any, expected: Any) -> bool:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return repr(plain) == repr(expected) or plain == expected or plain == str(expected)


def _list_keys(node: Any, key: str = "") -> Iterator[str]:
    for name, value in node.items():
        path = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict):
            yield from _list_keys(value, path)
        elif not str(name).startswith("_") and not path.startswith(("choices", "hydra", "run")):
            yield path


def _compose(random: Random, folder: Path) -> DictConfig:
    """Compose choices at random, of data that needs no download."""
    words = [
        f"data={random.choice(('digits', 'shapes'))}",
        f"model={random.choice(('convnet', 'resnet20', 'narrow'))}",
        f"schedule=[{random.choice(SCHEDULES)}]",
        f"optimizer={random.choice(list_choices('optimizer'))}",
        f"lr_scheduler={random.choice(list_choices('lr_scheduler'))}",
    ]
    return compose_run(folder, words)
