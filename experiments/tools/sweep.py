"""Carry out sweeps: each run is done once, goes on where it was killed, and fails alone.

`elastic train -m <overrides with several values>`, or `-m sweep=<name>` for a file of
`conf/sweep/`. A run's folder is named after what sets it apart, so that a sweep that is started again finds
what it has done.
"""

import copy
import json
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from math import nan
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from elastic.errors import BusyError, FileError, SweepError, TrainingError
from elastic.experiments.tools.errors import format_error
from elastic.experiments.tools.folders import CONFIG, SUMMARY, make_portable, read_config
from elastic.experiments.tools.restore import read_summary
from elastic.experiments.tools.signals import AGAIN, advise
from elastic.files.atomic import write_atomically

FAILED = "failed.json"  # in a run's folder: why it failed
PLAN = "sweep.json"  # in a sweep's folder: its runs, when it set out, and what had ended by then
REPEATS = "again"  # of a trial: the number of the one that it repeats
SUBDIR = "${run_name:"  # of a configuration that names its runs here
LONGEST = 150  # characters of a name
Summary = dict[str, Any]


def name_run(overrides: str) -> str:
    """Name the folder of a run of a sweep after its overrides: what differs, and last the seed.

    `data=mnist,schedule=[growth,gates],callbacks.gates.budget=2000,seed=1` is
    `mnist-growth+gates-budget=2000-seed1`, so that the runs of several seeds are one arm.
    """
    parts, seed = [], ""
    for override in OverridesParser.create().parse_overrides(_split_overrides(overrides)):
        key, value = override.get_key_element(), override.get_value_element_as_str()
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
    """Split at the commas that are not inside brackets."""
    return [part for part in re.split(r",(?![^\[{(]*[\]})])", overrides) if part]


OmegaConf.register_new_resolver("run_name", name_run, replace=True)


def run_in_sweep(cfg: DictConfig, folder: Path, train: Callable[[DictConfig, Path], Summary]) -> Summary:
    """Carry out one run of a sweep, unless that has been done; return its summary, empty if it failed."""
    cfg.run = str(folder)
    if "wandb" in (cfg.get("logger") or {}):  # there the runs of a group are told apart by name
        cfg.logger.wandb.name = folder.name
    return note_failure(folder, lambda: _run_once(cfg, folder, train))


def _run_once(cfg: DictConfig, folder: Path, train: Callable[[DictConfig, Path], Summary]) -> Summary:
    try:
        if (folder / CONFIG).exists() and read_config(folder) != make_portable(cfg):
            raise TrainingError(f"{folder} holds another run: give the sweep another hydra.sweep.dir")
        if (folder / SUMMARY).exists():
            return read_summary(folder)
    except FileError as error:  # what the sweep has at hand is put in its place
        print(f"{error}; this sweep does its run again", flush=True)
        (folder / CONFIG).unlink(missing_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    return train(cfg, folder)


def note_failure(folder: Path, work: Callable[[], Summary]) -> Summary:
    """Return the summary that work on a run returns; where it fails, note why and return an empty one."""
    try:
        return work()
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
    """Read what a search goes by: entries of a summary, NaN where a run failed or was not validated."""
    read = (summary.get(name) for name in objectives)
    values = tuple(nan if value is None else float(value) for value in read)
    return values[0] if len(values) == 1 else values


@contextmanager
def complete_sweep() -> Iterator[None]:
    """Refuse to end as if all were done where it is not, if what is carried out is a sweep.

    Raises:
        SweepError: runs have failed, or a process has died.
    """
    Sweep.folder = None
    try:
        yield
    except BrokenProcessPool as error:
        raise SweepError(
            f"a worker of the sweep has died, perhaps for want of memory: {AGAIN}, and it goes on, or lower "
            "hydra.launcher.n_jobs"
        ) from error
    if Sweep.folder is not None:
        plan = json.loads((Sweep.folder / PLAN).read_text())
        if failed := count_states(Sweep.folder, plan["stale"], plan["names"])[2]:
            raise SweepError(
                f"{failed} of {plan['runs']} runs have failed: {Sweep.folder}/<run>/{FAILED} says why"
            )


class Sweep(Callback):
    """Let a search go on where it was killed, and say after each run how far the sweep is.

    Attributes:
        folder: of the sweep that this process has started.
    """

    folder: ClassVar[Path | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sweeper, folder = config.hydra.sweeper, settle_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        names = (
            []
            if "n_trials" in sweeper
            else name_grid(sweeper.get("params") or {}, config.hydra.overrides.task)
        )
        since, stale = time.time(), {path.parent.name: path.stat().st_mtime_ns for path in list_notes(folder)}
        runs = sweeper.get("n_trials") or len(set(names))
        raw: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        if not raw["subdir"].startswith(SUBDIR):  # names of the user's own
            names = []
        finished = count_states(folder, stale, names)[0]
        Sweep.folder = folder
        advise(lambda: f"{AGAIN}, the sweep in {folder} goes on")
        plan = {"runs": runs, "names": names, "since": since, "behind": finished, "stale": stale}
        write_atomically(folder / PLAN, lambda part: part.write_text(json.dumps(plan) + "\n"))
        if sweeper.get("storage") is not None:
            sweeper.n_trials = count_remaining(sweeper)

    def on_job_end(self, config: DictConfig, job_return: Any, **_: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            print(describe_progress(Path(config.hydra.sweep.dir)), flush=True)
            job_return.cfg = job_return.hydra_cfg = None  # Hydra keeps those of all runs, and reads none


def settle_folder(config: DictConfig) -> Path:
    """Settle the one folder of all runs of a sweep, whose name may depend on what differs between them."""
    HydraConfig.instance().set_config(copy.deepcopy(config))  # Hydra itself does so before each run only
    folder, overrides = Path(config.hydra.sweep.dir), config.hydra.overrides.hydra
    if not any(text.startswith("hydra.sweep.dir=") for text in overrides):
        overrides.append(f"hydra.sweep.dir='{folder}'")  # each run's configuration is composed anew
    return folder


def name_grid(params: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Name the folders of a grid's runs; what the command line says of a key rules."""
    texts = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(texts), None)
    return [name_run(",".join(sorted(job))) for job in jobs]


def count_remaining(sweeper: DictConfig) -> int:
    """Count the trials that a search has still to do; those that a killed search left unfinished come first.

    They are proposed again with the same parameters, and so go on from their checkpoints.
    """
    import optuna

    storage = optuna.storages.RDBStorage(sweeper.storage)
    try:
        study = optuna.create_study(
            study_name=sweeper.study_name,
            storage=storage,
            directions=[getattr(d, "name", d) for d in _as_list(sweeper.direction)],
            load_if_exists=True,
        )
        for trial in study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(trial.params, user_attrs={REPEATS: trial.number})
        trials = study.trials
    finally:
        storage.engine.dispose()
    repeated = {t.user_attrs[REPEATS] for t in trials if REPEATS in t.user_attrs}
    finished = [t for t in trials if t.state.is_finished() and t.number not in repeated]
    return max(0, int(sweeper.n_trials) - len(finished))


def _as_list(value: Any) -> list[Any]:
    return list(value) if OmegaConf.is_list(value) else [value]


def list_notes(folder: Path) -> list[Path]:
    """List the notes of why runs failed."""
    return [run / FAILED for run in folder.iterdir() if (run / FAILED).exists()]


def count_states(folder: Path, stale: Mapping[str, int], names: Collection[str]) -> tuple[int, int, int]:
    """Count the runs that are done, running, and failed; what failed in an earlier start is tried again.

    Args:
        stale: when the notes of an earlier start were written; to be compared with nothing else, since
            clocks may jump.
        names: of the sweep's runs, if they are known: others in its folder are of another sweep.
    """
    present = [run for run in folder.iterdir() if (run / CONFIG).exists() or (run / FAILED).exists()]
    runs = [run for run in present if not names or run.name in names]
    finished = sum((run / SUMMARY).exists() for run in runs)
    notes = [note for note in list_notes(folder) if note.parent in runs]
    failed = sum(note.stat().st_mtime_ns != stale.get(note.parent.name) for note in notes)
    return finished, len(runs) - finished - len(notes), failed


def describe_progress(folder: Path) -> str:
    """Describe how far a sweep is, and how long it takes yet if it goes on as it has since it was started."""
    plan = json.loads((folder / PLAN).read_text())
    finished, running, failed = count_states(folder, plan["stale"], plan["names"])
    progress = finished + failed - plan["behind"]
    remaining = plan["runs"] - finished - failed
    minutes = max(0.0, time.time() - plan["since"]) / max(progress, 1) * remaining / 60
    text = f"{folder}: {finished} of {plan['runs']} done, {running} running, {failed} failed"
    return f"{text}; about {minutes:.0f} min left" if remaining > 0 and progress > 0 else text
