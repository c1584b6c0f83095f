"""Pictures: of a run, error, parameters and widths over the epochs; of several arms, what each comes to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator

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

    names, layers = _channels(history)
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


def _channels(history: Sequence[dict[str, Any]]) -> tuple[list[str], np.ndarray]:
    """Every width's name, and its channels by (width, epoch), 0 before it came with its block."""
    names = list(dict.fromkeys(name for row in history for name in row["widths"]))
    return names, np.array([[row["widths"].get(name, 0) for row in history] for name in names])


def heat_map(history: Sequence[dict[str, Any]]) -> np.ndarray:
    """Channels of every width over the epochs, as an image (H, W, 3) in bytes."""
    names, channels = _channels(history)
    figure, panel = plt.subplots(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    edges = (history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5, len(names) - 0.5, -0.5)
    shown = panel.imshow(channels, aspect="auto", cmap="viridis", vmin=0, extent=edges, interpolation="none")
    panel.set_yticks(range(len(names)), names, fontsize="x-small")
    panel.set_xlabel("epoch")
    figure.colorbar(shown, ax=panel, label="channels")
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()  # type: ignore[attr-defined]
    plt.close(figure)
    return pixels


def draw_arms(arms: Mapping[str, Sequence[dict[str, Any]]], size: str, path: Path) -> None:
    """One line an arm, best first: accuracy of every seed with its mean ± sd, its size, what training took.

    Args:
        size: "params", or "macs_dynamic" where kernels are switched off.
    """
    panels = {
        "test/acc": ("test accuracy (%)", 100.0),
        size: ("params" if size == "params" else "MACs an image, mean", 1.0),
        "macs_training": ("training (10¹² MACs)", 1e-12),
    }
    order = sorted(arms, key=lambda arm: np.mean([summary["test/acc"] for summary in arms[arm]]))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(9, 0.8 + 0.32 * len(arms)), sharey=True, layout="constrained", squeeze=False
    )
    for (key, (label, scale)), panel in zip(panels.items(), axes[0], strict=True):
        for line, arm in enumerate(order):
            values = [scale * summary[key] for summary in arms[arm] if summary.get(key) is not None]
            if values:
                sd = np.std(values, ddof=1) if len(values) > 1 else 0.0
                panel.errorbar(np.mean(values), line, xerr=sd, fmt="o", color="C0", capsize=3)
                panel.plot(values, [line] * len(values), "|", color="0.5", zorder=0)
        panel.set_xlabel(label)
        panel.grid(axis="x", alpha=0.3)
        panel.xaxis.set_major_formatter(EngFormatter(sep="") if key == size else "{x:g}")
        panel.locator_params(axis="x", nbins=5)
    axes[0, 0].set_yticks(range(len(order)), [arm.replace("_", " ") for arm in order])
    for key, panel in zip(panels, axes[0], strict=True):
        if key != "test/acc":
            panel.set_xlim(left=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_serving(answers: Sequence[Any], scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """The elastic server's answers over time, with the load shaded; what every server comes to."""
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    time_, level, bars = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
    came = [answer.came_s for answer in answers]
    step = came[1] - came[0]
    time_.plot(came, [answer.took_ms for answer in answers], ".", color="C0", ms=3)
    time_.axhline(1e3 * step, color="C3", lw=1, label="deadline")
    time_.set_ylabel("answer (ms)")
    time_.set_ylim(0, 3e3 * step)
    time_.legend(frameon=False, loc="upper right")
    level.step(came, [answer.level for answer in answers], where="post", color="C1")
    level.set_ylabel("level")
    level.locator_params(axis="y", integer=True)
    level.set_xlabel("seconds; shaded: another process shares the core")
    for panel in (time_, level):
        for answer in answers:
            if answer.loaded:
                panel.axvspan(answer.came_s, answer.came_s + step, color="0.9", lw=0, zorder=0)
    names = list(scores)[::-1]
    means = [100 * float(np.mean(scores[name])) for name in names]
    spread = [100 * float(np.std(scores[name], ddof=1)) if len(scores[name]) > 1 else 0.0 for name in names]
    bars.barh(names, means, xerr=spread, color=["C1" if name == "elastic" else "0.7" for name in names])
    bars.set_xlabel("right and in time (%)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_duty(seen: Any, images_NHWC: np.ndarray, path: Path) -> None:
    """How often each kernel is on; MACs by class and by image; the images that took least and most.

    Args:
        seen: what `experiments.usage.look` found.
        images_NHWC: the same images, as they are to be shown.
    """
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 1, 1))
    duty, by_class, spread = (figure.add_subplot(part) for part in (grid[0, 0], grid[0, 1], grid[1:, 0]))
    names, widest = list(seen.duty), max(map(len, seen.duty.values()))
    rows = np.full((len(names), widest), np.nan)
    for i, name in enumerate(names):
        on_K = np.sort(seen.duty[name].numpy())[::-1]
        rows[i] = np.interp(np.linspace(0, 1, widest), np.linspace(0, 1, len(on_K)), on_K)
    shown = duty.imshow(
        100 * rows, aspect="auto", vmin=0, vmax=100, cmap="viridis", extent=(0, 100, len(names), 0)
    )
    duty.set_yticks(np.arange(len(names)) + 0.5, names, fontsize="x-small")
    duty.set_xlabel("kernels of the layer, most used first (%)")
    figure.colorbar(shown, ax=duty, label="images for which it is on (%)")

    macs_N, label_N = 1e-6 * seen.macs_N.numpy(), seen.label_N.numpy()
    classes = np.unique(label_N)
    by_class.boxplot(
        [macs_N[label_N == k] for k in classes], tick_labels=[str(k) for k in classes], showfliers=False
    )
    by_class.set_xlabel("class")
    by_class.set_ylabel("10⁶ MACs an image")
    right_N = seen.right_N.numpy()
    spread.hist([macs_N[right_N], macs_N[~right_N]], bins=40, stacked=True, label=["right", "wrong"])
    spread.set_xlabel("10⁶ MACs an image")
    spread.set_ylabel("images")
    spread.legend(frameon=False)

    order = np.argsort(macs_N, kind="stable")
    for at, chosen, title in ((grid[1, 1], order[:8], "least"), (grid[2, 1], order[-8:], "most")):
        panel = figure.add_subplot(at)
        panel.imshow(np.concatenate(list(images_NHWC[chosen]), axis=1).squeeze(), cmap="gray")
        panel.set_title(f"the images that took {title}", fontsize="small")
        panel.set_axis_off()
    figure.savefig(path, dpi=120)
    plt.close(figure)
