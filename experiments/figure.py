"""The picture of a run: error, parameters and widths over the epochs, with every structural event."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

LEAST = 0.01  # %, where a logarithmic axis has no place for zero


def draw_history(history: list[dict[str, Any]], timeline: list[dict[str, Any]], path: Path) -> None:
    """Three panels over epochs, from `Census.history` and the module's timeline; growth is dotted."""
    if not history:
        return
    epochs = [row["epoch"] for row in history]
    figure, (error, size, widths) = plt.subplots(3, 1, figsize=(7, 7), sharex=True, layout="constrained")
    for part, colour in (("train", "0.6"), ("val", "C0")):
        shown = [max(100 * (1 - row.get(f"{part}/acc", float("nan"))), LEAST) for row in history]
        error.plot(epochs, shown, color=colour, label=part)
    error.set_ylabel("error (%)")
    error.set_yscale("log")
    error.yaxis.set_major_formatter("{x:g}")

    size.plot(epochs, [row["params_dense"] for row in history], color="0.6", label="allocated")
    size.plot(epochs, [row["params"] for row in history], color="C1", label="not zero")
    size.set_ylabel("parameters")
    size.set_yscale("log")
    size.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    size.yaxis.set_major_formatter("{x:,.0f}")
    size.yaxis.set_minor_formatter("")

    names = list(history[0]["widths"])
    layers = [[row["widths"][name] for row in history] for name in names]
    widths.stackplot(epochs, layers, labels=names, step="post", alpha=0.8)
    widths.set_ylabel("channels, by width")
    widths.set_xlabel("epoch")

    for event in {event["epoch"] for event in timeline if event["why"].startswith("grow")}:
        for panel in (error, size, widths):
            panel.axvline(event, color="C2", lw=0.8, ls=":", zorder=0)
    error.plot([], [], color="C2", lw=0.8, ls=":", label="growth")
    error.legend(frameon=False)
    size.legend(frameon=False)
    widths.set_ylim(0, 1.3 * max(sum(row["widths"].values()) for row in history))  # room for the legend
    if len(names) <= 12:
        widths.legend(frameon=False, fontsize="x-small", ncols=4, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
