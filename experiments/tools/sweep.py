"""Sweeps: each run is done once, goes on where it was killed, and fails alone.

`python -m experiments.train -m <overrides with several values>`, or `-m sweep=<name>` for a file of
`conf/sweep/`. A run's folder is named after what sets it apart, so that a sweep that is started again finds
what it has done.
"""

import copy
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from math import nan, prod
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from elastic.errors import BusyError, SweepError, TrainingError
from elastic.experiments.tools.errors import format_error
from elastic.experiments.tools.folders import load_config, make_portable
from elastic.files.atomic import write_atomically

FAILED = "failed.json"  # in a run's folder: why it failed
PLAN = "sweep.json"  # in a sweep's folder: how many runs it has, when it set out, and with how many done
LONGEST = 150  # characters of a name


def name_run(overrides: str) -> str:
    """A folder's name for a run of a sweep, from its overrides: what differs, and last the seed.

    `data=mnist,schedule=[growth,gates],callbacks.gates.budget=2000,seed=1` is
    `mnist-growth+gates-budget=2000-seed1`, so that the runs of several seeds are one arm.
    """
    parts, seed = [], ""
    for given in OverridesParser.create().parse_overrides(_split_overrides(overrides)):
        key, value = given.get_key_element(), given.get_value_element_as_str()
        if key == "seed":
            seed = f"-seed{value}"
        if key in ("seed", "sweep"):
            continue
        value = re.sub(r"[^\w.+=-]+", "+", value).strip("+")
        parts.append(value if "." not in key else f"{key.rpartition('.')[2]}={value}")
    name = "-".join(parts) or "run"
    if len(name) > LONGEST:  # file systems allow 255 bytes
        name = f"{name[:LONGEST]}-{sha256(name.encode()).hexdigest()[:8]}"
    return name + (seed or "-seed0")


def _split_overrides(overrides: str) -> list[str]:
    """At the commas that are not inside brackets."""
    return [part for part in re.split(r",(?![^\[{(]*[\]})])", overrides) if part]


OmegaConf.register_new_resolver("run_name", name_run, replace=True)


def run_in_sweep(
    cfg: DictConfig, folder: Path, train: Callable[[DictConfig, Path], dict[str, Any]]
) -> dict[str, Any]:
    """The summary of one run of a sweep; empty if it failed, which is noted in its folder."""
    if "wandb" in (cfg.get("logger") or {}):  # there the runs of a group are told apart by name
        cfg.logger.wandb.name = folder.name
    try:
        if (folder / "config.yaml").exists() and load_config(folder) != make_portable(cfg):
            raise TrainingError(f"{folder} holds another run: give the sweep another hydra.sweep.dir")
        if (folder / "summary.json").exists():
            found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
            return found
        (folder / FAILED).unlink(missing_ok=True)
        return train(cfg, folder)
    except SweepError:
        raise
    except BusyError as error:  # an earlier start of this sweep is still at it
        print(format_error(error), flush=True)
        return {}
    except Exception as error:  # whatever it is, the others go on
        text = json.dumps({"error": format_error(error), "kind": type(error).__name__}) + "\n"
        write_atomically(folder / FAILED, lambda part: part.write_text(text))
        return {}


def read_objectives(summary: dict[str, Any], objectives: Sequence[str]) -> float | tuple[float, ...]:
    """What a search goes by: the entries of a summary that it asked for, NaN where a run failed."""
    found = tuple(float(summary.get(name, nan)) for name in objectives)
    return found[0] if len(found) == 1 else found


class Sweep(Callback):
    """Lets a search go on where it was killed, and says after each run how far the sweep is."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sweeper, folder = config.hydra.sweeper, settle_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        runs = sweeper.get("n_trials") or count_grid(sweeper.get("params") or {}, config.hydra.overrides.task)
        since = time.time()
        done, _running, _failed = count_states(folder, since)
        plan = {"runs": runs, "since": since, "behind": done}
        write_atomically(folder / PLAN, lambda part: part.write_text(json.dumps(plan) + "\n"))
        if sweeper.get("storage") is not None:
            sweeper.n_trials = count_remaining(sweeper)

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            print(describe_progress(Path(config.hydra.sweep.dir)), flush=True)


def settle_folder(config: DictConfig) -> Path:
    """Settle the one folder of all runs of a sweep, whose name may depend on what differs between them."""
    HydraConfig.instance().set_config(copy.deepcopy(config))  # Hydra itself does so before each run only
    folder, overrides = Path(config.hydra.sweep.dir), config.hydra.overrides.hydra
    if not any(text.startswith("hydra.sweep.dir=") for text in overrides):
        overrides.append(f"hydra.sweep.dir='{folder}'")  # each run's configuration is composed anew
    return folder


def count_grid(params: Mapping[str, Any], overrides: Sequence[str]) -> int:
    """How many runs a grid has; what the command line says of a key rules."""
    given = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    parsed = {each.get_key_element(): each for each in OverridesParser.create().parse_overrides(given)}
    swept = (each for each in parsed.values() if each.is_sweep_override())
    return prod(sum(1 for _ in each.sweep_string_iterator()) for each in swept)


def count_remaining(sweeper: DictConfig) -> int:
    """Trials that a search has still to do; those that a killed search left unfinished come first.

    They are asked for again with the same parameters, and so go on from their checkpoints.
    """
    import optuna

    study = optuna.create_study(
        study_name=sweeper.study_name,
        storage=sweeper.storage,
        directions=[getattr(d, "name", d) for d in _as_list(sweeper.direction)],
        load_if_exists=True,
    )
    for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs={"again": trial.number})
    again = {t.user_attrs["again"] for t in study.trials if "again" in t.user_attrs}
    done = [t for t in study.trials if t.state.is_finished() and t.number not in again]
    return max(0, int(sweeper.n_trials) - len(done))


def _as_list(value: Any) -> list[Any]:
    return list(value) if OmegaConf.is_list(value) else [value]


def count_states(folder: Path, since: float) -> tuple[int, int, int]:
    """The runs that are done, running, and failed since then; what failed before is tried again."""
    runs = [run for run in folder.iterdir() if (run / "config.yaml").exists() or (run / FAILED).exists()]
    done = sum((run / "summary.json").exists() for run in runs)
    failed = [run / FAILED for run in runs if (run / FAILED).exists()]
    return done, len(runs) - done - len(failed), sum(note.stat().st_mtime >= since for note in failed)


def describe_progress(folder: Path) -> str:
    """How far a sweep is, and how long it takes yet if it goes on as it has since it was started."""
    plan = json.loads((folder / PLAN).read_text())
    done, running, failed = count_states(folder, plan["since"])
    ended = done + failed - plan["behind"]
    left = plan["runs"] - done - failed
    minutes = (time.time() - plan["since"]) / max(ended, 1) * left / 60
    said = f"{folder}: {done} of {plan['runs']} done, {running} running, {failed} failed"
    return f"{said}; about {minutes:.0f} min left" if left > 0 and ended > 0 else said
