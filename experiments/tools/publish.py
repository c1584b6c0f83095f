"""Publish the end of a run on W&B or in TensorBoard: its summary, tables and pictures, on W&B its network."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from elastic.experiments.tools.figure import draw_heat_map
from elastic.experiments.tools.summary import TEXTS
from elastic.experiments.tools.tables import format_markdown
from elastic.files.zoo import WEIGHTS

FILES = (WEIGHTS, *TEXTS)
EVENT = ("epoch", "step", "why", "width", "stage", "before", "after")  # keys of the timeline
Rows = Sequence[Mapping[str, Any]]


def publish(
    logger: Logger | None,
    folder: Path,
    config: Any,
    summary: dict[str, Any],
    history: list[dict[str, Any]],
    timeline: Rows,
) -> None:
    """Log what is known once a run has ended, and on W&B close it; with another logger nothing happens.

    Args:
        config: the run's configuration, complete, as plain containers.
    """
    if isinstance(logger, TensorBoardLogger):
        _write_for_tensorboard(logger, summary, history, timeline)
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    run = logger.experiment
    run.config.update(config, allow_val_change=True)
    run.summary.update({name: value for name, value in summary.items() if name not in ("levels", "sets")})
    media: dict[str, Any] = {"timeline": _make_table(EVENT, timeline)}
    if history:
        sizes = [
            {"epoch": row["epoch"], "width": name, "channels": size}
            for row in history
            for name, size in row["widths"].items()
        ]
        media["widths"] = _make_table(("epoch", "width", "channels"), sizes)
        media["widths over time"] = wandb.Image(draw_heat_map(history))
    for kind in ("levels", "sets"):
        if rows := summary.get(kind):
            media[kind] = _make_table([name for name in rows[0] if name != "sets"], rows)
    run.log(media)
    artifact = wandb.Artifact(f"{summary['experiment']}-{folder.name}", type="model", metadata=summary)
    for name in FILES:
        if (folder / name).exists():
            artifact.add_file(str(folder / name))
    run.log_artifact(artifact, aliases=["latest", f"seed{summary['seed']}"])
    run.finish()  # or the next run of a sweep, in this process, would go on in it


def _write_for_tensorboard(
    logger: TensorBoardLogger, summary: dict[str, Any], history: list[dict[str, Any]], timeline: Rows
) -> None:
    """Write the summary and the timeline as texts, and the widths over time as a picture."""
    board, numbers = logger.experiment, [(name, str(value)) for name, value in summary.items()]
    board.add_text("summary", format_markdown(("", ""), numbers))
    rows = [[str(row.get(name, "")) for name in EVENT] for row in timeline]
    board.add_text("timeline", format_markdown(EVENT, rows))
    if history:
        board.add_image("widths over time", draw_heat_map(history), dataformats="HWC")
    board.flush()


def _make_table(names: Sequence[str], rows: Rows) -> Any:
    import wandb

    return wandb.Table(list(names), [[row.get(name) for name in names] for row in rows])
