"""The end of a run on W&B: its summary, how it came about in tables and pictures, its network as artifact."""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from elastic.experiments.tools.figure import heat_map

FILES = ("model.safetensors", "config.yaml", "summary.json", "timeline.jsonl", "history.jsonl")
EVENT = ("epoch", "step", "why", "width", "stage", "before", "after")


def publish(
    logger: Logger | None,
    folder: Path,
    config: Any,
    summary: dict[str, Any],
    history: list[dict[str, Any]],
    timeline: list[dict[str, Any]],
) -> None:
    """Log what is known once a run has ended, and close it; with another logger nothing happens.

    Args:
        config: the run's configuration, complete, as plain containers.
    """
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    run = logger.experiment
    run.config.update(config, allow_val_change=True)
    run.summary.update({name: value for name, value in summary.items() if not isinstance(value, list)})
    logged: dict[str, Any] = {
        "timeline": wandb.Table(list(EVENT), [[event.get(name) for name in EVENT] for event in timeline])
    }
    if history:
        rows = [[row["epoch"], name, size] for row in history for name, size in row["widths"].items()]
        logged["widths"] = wandb.Table(["epoch", "width", "channels"], rows)
        logged["widths over time"] = wandb.Image(heat_map(history))
    for kind in ("levels", "sets"):
        if held := summary.get(kind):
            names = [name for name in held[0] if not isinstance(held[0][name], list)]
            logged[kind] = wandb.Table(names, [[row[name] for name in names] for row in held])
    run.log(logged)
    made = wandb.Artifact(f"{summary['experiment']}-{folder.name}", type="model", metadata=summary)
    for name in FILES:
        if (folder / name).exists():
            made.add_file(str(folder / name))
    run.log_artifact(made, aliases=["latest", f"seed{summary['seed']}"])
    run.finish()  # or the next run of a sweep, in this process, would go on in it
