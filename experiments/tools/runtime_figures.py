"""Draw pictures of what happens at run time: a server's answers, a network's kernels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elastic.experiments.tools.figure import save_figure
from elastic.experiments.tools.per_image import PerImage

# --- a server's answers ---------------------------------------------------------------------------


def draw_serving(answers: Sequence[Any], scores: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the elastic server's answers over time, with the load shaded, and what every server comes to."""
    figure = plt.figure(figsize=(9, 4), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    times, levels, bars = (figure.add_subplot(part) for part in (grid[0, 0], grid[1, 0], grid[:, 1]))
    _draw_answers(times, levels, answers)
    names = list(scores)[::-1]
    means = [100 * float(np.mean(scores[name])) for name in names]
    sd = [100 * float(np.std(scores[name], ddof=1)) if len(scores[name]) > 1 else 0.0 for name in names]
    bars.barh(names, means, xerr=sd, color=["C1" if name == "elastic" else "0.7" for name in names])
    bars.set_xlabel("right and in time (%)")
    save_figure(figure, path)


def _draw_answers(times: Axes, levels: Axes, answers: Sequence[Any]) -> None:
    arrivals_s = [answer.arrival_s for answer in answers]
    step_s = arrivals_s[1] - arrivals_s[0]
    times.plot(arrivals_s, [answer.latency_ms for answer in answers], ".", color="C0", ms=3)
    times.axhline(1e3 * step_s, color="C3", lw=1, label="deadline")
    times.set_ylabel("answer (ms)")
    times.set_ylim(0, 3e3 * step_s)
    times.legend(frameon=False, loc="upper right")
    levels.step(arrivals_s, [answer.level for answer in answers], where="post", color="C1")
    levels.set_ylabel("level")
    levels.locator_params(axis="y", integer=True)
    levels.set_xlabel("seconds; shaded: another process shares the core")
    for panel in (times, levels):
        for answer in answers:
            if answer.loaded:
                panel.axvspan(answer.arrival_s, answer.arrival_s + step_s, color="0.9", lw=0, zorder=0)


# --- a network's kernels --------------------------------------------------------------------------


def draw_kernel_usage(images: PerImage, images_NHWC: np.ndarray, path: Path) -> None:
    """Draw how often each kernel is on, MACs by class and by image, and the images that took least and most.

    Args:
        images: what each took.
        images_NHWC: the same images, as they are to be shown.
    """
    figure = plt.figure(figsize=(10, 7), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(3, 1, 1))
    usage, classes, spread = (figure.add_subplot(part) for part in (grid[0, 0], grid[0, 1], grid[1:, 0]))
    _draw_usage(figure, usage, images)
    _draw_macs(classes, spread, images)
    order = np.argsort(images.macs_N.numpy(), kind="stable")
    for part, index, title in ((grid[1, 1], order[:8], "least"), (grid[2, 1], order[-8:], "most")):
        panel = figure.add_subplot(part)
        panel.imshow(np.concatenate(list(images_NHWC[index]), axis=1).squeeze(), cmap="gray")
        panel.set_title(f"the images that took {title}", fontsize="small")
        panel.set_axis_off()
    save_figure(figure, path)


def _draw_usage(figure: Figure, panel: Axes, images: PerImage) -> None:
    """Draw a line a layer, its kernels side by side, most used first, on a common scale of 0 … 100 %."""
    names, widest = list(images.usage), max(map(len, images.usage.values()))
    rows = np.full((len(names), widest), np.nan)
    for i, name in enumerate(names):
        usage_K = np.sort(images.usage[name].numpy())[::-1]
        rows[i] = np.interp(np.linspace(0, 1, widest), np.linspace(0, 1, len(usage_K)), usage_K)
    edges = (0, 100, len(names), 0)
    image = panel.imshow(100 * rows, aspect="auto", vmin=0, vmax=100, cmap="viridis", extent=edges)
    panel.set_yticks(np.arange(len(names)) + 0.5, names, fontsize="x-small")
    panel.set_xlabel("kernels of the layer, most used first (%)")
    figure.colorbar(image, ax=panel, label="images for which it is on (%)")


def _draw_macs(classes: Axes, spread: Axes, images: PerImage) -> None:
    macs_N, label_N = 1e-6 * images.macs_N.numpy(), images.label_N.numpy()
    labels = np.unique(label_N)
    macs_of_classes = [macs_N[label_N == label] for label in labels]
    classes.boxplot(macs_of_classes, tick_labels=[str(label) for label in labels], showfliers=False)
    classes.set(xlabel="class", ylabel="10⁶ MACs an image")
    correct_N = images.correct_N.numpy()
    spread.hist([macs_N[correct_N], macs_N[~correct_N]], bins=40, stacked=True, label=["right", "wrong"])
    spread.set(xlabel="10⁶ MACs an image", ylabel="images")
    spread.legend(frameon=False)
