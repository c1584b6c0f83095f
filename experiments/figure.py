"""The picture of a run: accuracy, parameters and widths over the epochs, with every structural event."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_history(history: list[dict[str, Any]], timeline: list[dict[str, Any]], path: Path) -> None:
    """Three panels over epochs, from `Census.history` and the module's timeline."""
    if not history:
        return
    epochs = [row["epoch"] for row in history]
    figure, (accuracy, size, widths) = plt.subplots(3, 1, figsize=(7, 7), sharex=True, layout="constrained")
    for part, colour in (("train", "0.6"), ("val", "C0")):
        shown = [100 * row.get(f"{part}/acc", float("nan")) for row in history]
        accuracy.plot(epochs, shown, color=colour, label=part)
    accuracy.set_ylabel("accuracy (%)")

    size.plot(epochs, [row["params_dense"] for row in history], color="0.6", label="allocated")
    size.plot(epochs, [row["params"] for row in history], color="C1", label="not zero")
    size.set_ylabel("parameters")
    size.set_yscale("log")

    names = list(history[0]["widths"])
    layers = [[row["widths"][name] for row in history] for name in names]
    widths.stackplot(epochs, layers, labels=names, step="post", alpha=0.8)
    widths.set_ylabel("channels, by width")
    widths.set_xlabel("epoch")

    for event in {event["epoch"] for event in timeline if event["why"].startswith("grow")}:
        for panel in (accuracy, size, widths):
            panel.axvline(event, color="C2", lw=0.8, ls=":", zorder=0)
    accuracy.plot([], [], color="C2", lw=0.8, ls=":", label="growth")
    accuracy.legend(frameon=False, loc="lower right")
    size.legend(frameon=False)
    if len(names) <= 12:
        widths.legend(frameon=False, fontsize="x-small", ncols=4, loc="upper left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
