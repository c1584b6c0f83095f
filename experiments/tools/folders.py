"""Read and keep the folder of a run: its configuration, its checkpoint, the lock while it trains."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from elastic.errors import BusyError, FileError, TrainingError
from elastic.experiments.tools.trust import check_trust
from elastic.files.atomic import write_atomically
from elastic.files.sums import SUMS, check_sum
from elastic.training.checkpoints import read_checkpoint

CONFIG, CHECKPOINT, SUMMARY = "config.yaml", "last.ckpt", "summary.json"
FINISHED = (CONFIG, "model.safetensors", SUMMARY)
# Of every configuration.
PARTS = {"name", "seed", "choices", "data", "model", "optimizer", "trainer", "callbacks"}
# What a file's bytes make of YAML and OmegaConf: no text, half a list, a key twice, a number alone.
DAMAGE = (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError, AssertionError)
DEEPEST = 50  # of a configuration's lists and dictionaries in each other
REMEDY = "restore it, or train again in another folder"
# What may differ between a run and what continues it: where data is and who reads it, not what is trained.
EPOCHS = "trainer.max_epochs="  # the one option that a run that goes on may change
PLACES = ("root", "download", "workers")
MARK = "\0"  # instead of "${"
FAST_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # not in every build of PyYAML


class RunMark(L.Callback):
    """Mark the checkpoints of a run with a digest of what it trains, so that none is taken for another's."""

    def __init__(self, cfg: DictConfig) -> None:
        parts: Any = OmegaConf.to_container(make_portable(cfg), resolve=False)
        content = {key: parts.get(key) for key in ("seed", "task", "model", "optimizer", "init")}
        content["data"] = {key: value for key, value in parts["data"].items() if key not in PLACES}
        content["callbacks"] = sorted(name for name, node in parts["callbacks"].items() if node is not None)
        self.digest = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return {"run": self.digest}


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep any second run out of the folder meanwhile; a process that is killed lets go of it.

    Raises:
        BusyError: one trains there.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]  # the first process of the run has it
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BusyError(f"another process trains in {folder}: wait until it has ended, or stop it") from error


def continue_config(cfg: DictConfig, folder: Path) -> DictConfig:
    """Return the configuration of a run: a folder that holds one already is continued with its own.

    It may be continued for more epochs than it was started with.

    Raises:
        TrainingError: overrides that would make a continued run another one.
    """
    cfg.run = str(folder)
    has_begun = (folder / CHECKPOINT).exists()
    if not has_begun and (folder / SUMMARY).exists():
        raise TrainingError(
            f"{folder} holds a finished network and no {CHECKPOINT} to go on from; training replaces it: "
            f"start from it with init={folder} in another folder, or remove {SUMMARY} and train again"
        )
    words = [text for text in HydraConfig.get().overrides.task if not text.startswith(("run=", "trust="))]
    goes_on = [text for text in words if text.startswith(EPOCHS)]
    if has_begun and len(words) > len(goes_on):
        raise TrainingError(
            f"{folder} holds a run already: continue it with run={folder} alone, for more epochs with "
            f"{EPOCHS}…, or name another folder"
        )
    if not has_begun and (words or not (folder / CONFIG).exists()):
        return cfg
    saved = load_config(folder)
    saved.run = str(folder)
    if goes_on:
        extend(saved, cfg.trainer.max_epochs, folder)
    return saved


def is_pruned(folder: Path) -> bool:
    """Tell whether a folder holds what `elastic prune` has left: a network without a training of its own."""
    try:
        return "pruned" in json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def extend(saved: DictConfig, epochs: int, folder: Path) -> None:
    """Let a run that has begun last for more epochs.

    Raises:
        TrainingError: it has planned each of them, or they would be fewer.
    """
    planned = saved.trainer.max_epochs
    if saved.callbacks.get("reconstruct") is not None and epochs != planned:
        raise TrainingError(
            f"{folder} holds a run in phases, whose epochs were shared out at its start: continue it with "
            f"run={folder} alone, or start another one from it with init={folder}"
        )
    if not isinstance(epochs, int) or epochs < 1:  # no number of epochs, as the check of options will tell
        saved.trainer.max_epochs = epochs
        return
    if planned in (None, -1):
        raise TrainingError(
            f"{folder} holds a run that steps or time bound, and not epochs: continue it with "
            f"run={folder} alone"
        )
    if epochs < planned:
        raise TrainingError(f"{folder} holds a run of {planned} epochs: set {EPOCHS}{planned} or more")
    saved.trainer.max_epochs = epochs


def load_config(folder: Path) -> DictConfig:
    """Load the configuration that a run was started with, to be carried out.

    Raises:
        FileError: it is missing or damaged, or names what a recorded configuration may not, see `trust`.
    """
    cfg = _parse_config(folder / CONFIG)
    check_trust(OmegaConf.to_container(cfg, resolve=False), folder / CONFIG)
    check_sum(folder / CONFIG)
    return cfg


def read_config(folder: Path) -> DictConfig:
    """Read the configuration that a run was started with, to be looked at.

    Raises:
        FileError: it is missing or damaged.
    """
    cfg = _parse_config(folder / CONFIG)
    check_sum(folder / CONFIG)
    return cfg


def _parse_config(file: Path) -> DictConfig:
    try:
        text = file.read_text(encoding="utf-8")
        _check_events(yaml.parse(text, FAST_LOADER))
        cfg = OmegaConf.create(text)
    except DAMAGE as error:
        raise FileError(f"{file} cannot be read: {REMEDY}") from error
    if not isinstance(cfg, DictConfig) or not cfg.keys() >= PARTS:
        raise FileError(f"{file} is cut, or no configuration of a run: {REMEDY}")
    return cfg


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Refuse what no run writes, and a page of which fills the memory: aliases, and what lies deep."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > DEEPEST:
            raise ValueError("it refers to itself, or is too deep")


def check_finished(folder: Path) -> Path:
    """Return the folder, if it holds a finished run.

    Raises:
        FileError: a file is missing, or it is one itself.
    """
    if folder.is_file():
        raise FileError(f"{folder} is a file: name the folder of a finished run")
    for name in FINISHED:
        if not (folder / name).exists():
            raise FileError(f"{folder / name} is missing: finish the run with run={folder}, or name another")
    return folder


def find_checkpoint(folder: Path, cfg: DictConfig) -> tuple[Path | None, Mapping[str, Any]]:
    """Find the checkpoint to continue from, if there is one, and the states of callbacks that it holds.

    Raises:
        FileError: it is damaged, or of another run.
    """
    checkpoint = folder / CHECKPOINT
    if not checkpoint.exists():
        return None, {}
    states: Mapping[str, Any] = read_checkpoint(checkpoint).get("callbacks", {})
    state = states.get(RunMark.__name__)
    if state is not None and state != RunMark(cfg).state_dict():
        raise FileError(
            f"{checkpoint} is of another run than {folder / CONFIG}: restore them, or remove "
            f"{checkpoint.name} and train again"
        )
    return checkpoint, states


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Write the configuration of a run that begins, or goes on, into its folder, atomically."""
    (folder / SUMS).unlink(missing_ok=True)  # of what the folder held when the run had ended
    text = OmegaConf.to_yaml(make_portable(cfg))
    write_atomically(folder / CONFIG, lambda part: part.write_text(text, encoding="utf-8"))


def make_portable(cfg: DictConfig) -> DictConfig:
    """Resolve a configuration but for what depends on the machine: folders and the environment.

    Where a value refers to one that does, the other's expression takes its place.
    """
    marked = OmegaConf.create(_map_texts(_mark, OmegaConf.to_container(cfg)))
    resolved = OmegaConf.to_container(marked, resolve=True)
    portable = OmegaConf.create(_map_texts(lambda text: text.replace(MARK, "${"), resolved))
    portable.run = "."
    portable.pop("trust", None)  # that is said anew by whoever uses it
    return portable


def _mark(text: str) -> str:
    """Let an expression that depends on the machine be a text like any other."""
    return text.replace("${", MARK) if "${run}" in text or "${oc.env" in text else text


def _map_texts(change: Callable[[str], str], node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _map_texts(change, value) for key, value in node.items()}
    if isinstance(node, list):
        return [_map_texts(change, value) for value in node]
    return change(node) if isinstance(node, str) else node
