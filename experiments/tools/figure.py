"""Draw pictures: of a run over its epochs, and of several arms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from elastic.errors import OptionError
from elastic.experiments.tools.arms import Arm, History
from elastic.experiments.tools.metrics import SHARES, TEST, describe_metric
from elastic.files.atomic import check_place, write_atomically

LEAST = 0.01  # %, where a logarithmic axis has no place for zero
# Of a run's picture, in parts of it: to find them by what is drawn takes as long as to draw it.
MARGINS = {"left": 0.16, "right": 0.98, "bottom": 0.07, "top": 0.98, "hspace": 0.07}
LONGEST = 40  # letters of an arm's name beside panels
LEGEND = 12  # widths that a legend has room for


def check_picture(path: Path | None) -> None:
    """Refuse a place where no picture can be, before what takes long; None where none is asked for.

    Raises:
        FileError: there is no such folder, or the place is one.
        OptionError: the file's name ends in no kind of picture.
    """
    if path is not None:
        check_place(path)
        _find_kind(path)


def _find_kind(path: Path) -> str:
    """Find what kind of picture a file's name ends in."""
    kind = path.suffix.removeprefix(".") or "png"
    if kind not in (kinds := FigureCanvasAgg.get_supported_filetypes()):
        raise OptionError(f"{path} cannot be a picture: end its name in one of {', '.join(sorted(kinds))}")
    return kind


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a picture, atomically, and forget it.

    Raises:
        OptionError: the file's name ends in no kind of picture.
    """
    kind = _find_kind(path)
    write_atomically(path, lambda part: figure.savefig(part, dpi=120, format=kind))
    plt.close(figure)


# --- a run over its epochs ------------------------------------------------------------------------


def draw_history(
    history: History, timeline: Sequence[Mapping[str, Any]], path: Path, metric: str = "acc"
) -> None:
    """Draw error, parameters and channels over the epochs, from `Census.history`; growth is dotted.

    Args:
        metric: whose distance to 1 is the error; the loss is drawn of one that may be above.
    """
    if not history:
        return
    figure, (error, size, widths) = plt.subplots(3, 1, figsize=(7, 7), sharex=True)
    figure.subplots_adjust(**MARGINS)
    _draw_error(error, history, metric)
    _draw_size(size, history)
    _draw_widths(widths, history)
    for epoch in {event["epoch"] for event in timeline if event["why"].startswith("grow")}:
        for panel in (error, size, widths):
            panel.axvline(epoch, color="C2", lw=0.8, ls=":", zorder=0)
    error.plot([], [], color="C2", lw=0.8, ls=":", label="growth")
    error.legend(frameon=False)
    size.legend(frameon=False)
    save_figure(figure, path)


def _draw_error(panel: Axes, history: History, metric: str) -> None:
    epochs = [row["epoch"] for row in history]
    has_error = metric in (*SHARES, "r2")
    for part, colour in (("train", "0.6"), ("val", "C0")):
        values = [row.get(f"{part}/{metric if has_error else 'loss'}", float("nan")) for row in history]
        errors = [max(100 * (1 - value), LEAST) for value in values] if has_error else values
        panel.plot(epochs, errors, color=colour, label=part)
    panel.set(ylabel="error (%)" if has_error else "loss", yscale="log")
    panel.yaxis.set_major_formatter("{x:g}")


def _draw_size(panel: Axes, history: History) -> None:
    epochs = [row["epoch"] for row in history]
    panel.plot(epochs, [row["params_dense"] for row in history], color="0.6", label="allocated")
    panel.plot(epochs, [row["params"] for row in history], color="C1", label="not zero")
    panel.set(ylabel="parameters", yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.yaxis.set_minor_locator(NullLocator())


def _draw_widths(panel: Axes, history: History) -> None:
    names, channels = _list_channels(history)
    panel.stackplot([row["epoch"] for row in history], channels, labels=names, step="post", alpha=0.8)
    panel.set(ylabel="channels, by width", xlabel="epoch")
    panel.set_ylim(0, 1.3 * channels.sum(0).max())  # room for the legend
    if len(names) <= LEGEND:
        panel.legend(frameon=False, fontsize="x-small", ncols=4, loc="upper left")


def _list_channels(history: History) -> tuple[list[str], np.ndarray]:
    """List the names of widths, and their channels by (width, epoch), 0 before one came with its block."""
    names = list(dict.fromkeys(name for row in history for name in row["widths"]))
    return names, np.array([[row["widths"].get(name, 0) for row in history] for name in names])


def draw_heat_map(history: History) -> np.ndarray:
    """Draw the channels of every width over the epochs, as an image (H, W, 3) in bytes."""
    names, channels = _list_channels(history)
    figure, panel = plt.subplots(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    edges = (history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5, len(names) - 0.5, -0.5)
    image = panel.imshow(channels, aspect="auto", cmap="viridis", vmin=0, extent=edges, interpolation="none")
    panel.set_yticks(range(len(names)), names, fontsize="x-small")
    panel.set_xlabel("epoch")
    figure.colorbar(image, ax=panel, label="channels")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    plt.close(figure)
    return pixels


# --- several arms ---------------------------------------------------------------------------------


def draw_arms(groups: Sequence[Sequence[Arm]], size: str, path: Path) -> None:
    """Draw accuracy, size and training of arms, a line an arm, best first: every seed, and mean ± sd.

    Args:
        groups: the arms on each data set.
        size: "params", or "macs_dynamic" where kernels are switched off.
    """
    costs = {
        size: ("params" if size == "params" else "MACs an image, mean", 1.0),
        "macs_training": ("training (10¹² MACs)", 1e-12),
    }
    lines = [len(arms) for arms in groups]
    figure, axes = plt.subplots(
        len(groups),
        1 + len(costs),
        figsize=(9, 0.8 * len(groups) + 0.32 * sum(lines)),
        height_ratios=[2 + count for count in lines],
        sharey="row",
        layout="constrained",
        squeeze=False,
    )
    for arms, panels in zip(groups, axes, strict=True):
        metric = arms[0].metric
        shown = describe_metric(metric)
        columns = {metric: (shown.label, shown.scale), **costs}
        order = sorted(arms, key=lambda arm: arm.compute_mean(metric) or ())
        for (key, (label, scale)), panel in zip(columns.items(), panels, strict=True):
            _draw_column(panel, order, key, scale)
            panel.set_xlabel(label)
            panel.xaxis.set_major_formatter(EngFormatter(sep="") if key == size else "{x:g}")
        panels[0].set_yticks(range(len(order)), [_shorten(arm.label) for arm in order])
    save_figure(figure, path)


def _shorten(label: str) -> str:
    """Write a label that leaves room for the panels; a dollar sign would begin a formula."""
    text = label.replace("_", " ").replace("\n", " ")
    return (text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…").replace("$", r"\$")


def _draw_column(panel: Axes, arms: Sequence[Arm], key: str, scale: float) -> None:
    for line, arm in enumerate(arms):
        values = [scale * run[key] for run in arm.runs if run.get(key) is not None]
        if values:
            sd = np.std(values, ddof=1) if len(values) > 1 else 0.0
            panel.errorbar(np.mean(values), line, xerr=sd, fmt="o", color="C0", capsize=3)
            panel.plot(values, [line] * len(values), "|", color="0.5", zorder=0)
    panel.grid(axis="x", alpha=0.3)
    panel.locator_params(axis="x", nbins=5)
    if not key.startswith(TEST):
        panel.set_xlim(left=0)
