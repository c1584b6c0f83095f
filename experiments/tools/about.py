"""Say in a network's file what it is, what it was made from and what it does."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from elastic.data import ImageData
from elastic.experiments.tools.metrics import TEST
from elastic.models.builders import describe_model

MADE = ("experiment", "schedule", "data", "seed", "epochs", "git", "elastic", "torch", "device")
MEASURED = ("params", "params_dense", "macs", "macs_dynamic", "latency_ms", "levels", "sets")


def describe_run(cfg: DictConfig, data: ImageData, summary: dict[str, Any]) -> dict[str, Any]:
    """Describe the network of a run, in plain containers; see `docs/files.md`."""
    node = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(node, dict)
    model = describe_model({str(key): value for key, value in node.items()}, data.shape[0], data.classes)
    about: dict[str, Any] = {} if model is None else {"model": model}
    return about | {
        **describe_data(data),
        **({"licence": cfg.licence} if cfg.get("licence") else {}),
        "made": {key: summary[key] for key in MADE if key in summary} | name_sources(cfg),
        "measured": {
            key: value
            for key, value in summary.items()
            if (key in MEASURED or key.startswith(TEST)) and value not in (None, [])
        },
    }


def name_sources(cfg: DictConfig) -> dict[str, str]:
    """Name the runs that a run has started from, and learned from."""
    sources = {"init": cfg.get("init"), "teacher": OmegaConf.select(cfg, "callbacks.distil.teacher.run")}
    return {key: Path(run).name for key, run in sources.items() if isinstance(run, str)}


def describe_data(data: ImageData) -> dict[str, Any]:
    """Describe what a network takes, and what its outputs mean."""
    return {
        "input": list(data.shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "classes": data.class_names,
    }
