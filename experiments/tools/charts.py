"""Draw the figures of the report's page: arms against each other, over the epochs, and level by level.

Each function makes one that draws on a panel and returns the arms that it has drawn. An arm's number stands
at the right edge, with a line to where the arm is drawn, so that no number lies on another one. An artist's
`gid` is what it tells when it is pointed at.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from elastic.experiments.tools.arms import Arm, History, Summary
from elastic.experiments.tools.metrics import ShownMetric, describe_metric, find_metric
from elastic.experiments.tools.tables import format_spread

LINE = 0.17  # inches that a number takes
MARGIN = 0.8  # inches above and below a panel
TIP = "tip:"  # how the gid of an artist begins that tells something


@dataclass(frozen=True)
class Series:
    """Hold what is drawn of an arm in one colour: summaries of its runs, and their histories.

    Attributes:
        number: of its row in the table.
    """

    number: int
    name: str
    colour: str
    runs: Sequence[Summary]
    histories: Sequence[History] = ()

    @property
    def metric(self) -> ShownMetric:
        """Describe the metric that the runs are judged by."""
        return describe_metric(find_metric(self.runs[0]))

    def list_metrics(self, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """List that metric of summaries, or of their levels, as it is shown."""
        return [self.metric.scale * row[self.metric.key] for row in rows]


@dataclass(frozen=True)
class Point:
    """Hold a point of a panel that an arm is named at."""

    arm: Series
    x: float
    y: float


Draw = Callable[[Axes], list[Series]]


def make_series(arms: Sequence[Arm]) -> list[Series]:
    """Give each arm a number, which its row of the table has, too, and a colour."""
    return [Series(i + 1, arm.label, f"C{i % 10}", arm.runs, arm.histories) for i, arm in enumerate(arms)]


def compute_height(names: int) -> float:
    """Compute the inches of a figure with so many numbers at its edge."""
    return max(4.0, MARGIN + LINE * names)


def plot_against(series: Sequence[Series], key: str, label: str) -> Draw:
    """Plot the metric of arms against a cost, an arm a point, with the front of what nothing else beats."""

    def draw(panel: Axes) -> list[Series]:
        points = []
        for arm in series:
            costs = [run[key] for run in arm.runs if run.get(key)]
            if len(costs) < len(arm.runs):
                continue
            accuracies = arm.list_metrics(arm.runs)
            x, y = float(np.mean(costs)), float(np.mean(accuracies))
            sd = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in (costs, accuracies)]
            bars = panel.errorbar(x, y, xerr=sd[0], yerr=sd[1], fmt="o", capsize=3, color=arm.colour)
            value = f"{format_spread(accuracies, arm.metric.digits)}{arm.metric.unit}"
            cost = format_spread(costs, 0 if x >= 100 else 3)
            bars.lines[0].set_gid(f"{TIP}{arm.name}: {value}, {cost} {label}")
            points.append(Point(arm, x, y))
        if len(points) < 2:
            return []
        front = find_front([(point.x, point.y) for point in points])
        panel.plot([points[i].x for i in front], [points[i].y for i in front], color="0.7", lw=1, zorder=0)
        _finish(panel, label, series[0].metric.label, points, "x")
        return [point.arm for point in points]

    return draw


def plot_over_time(series: Sequence[Series], key: str, label: str) -> Draw:
    """Plot a figure of the census over the epochs, a colour an arm, a line a run."""

    def draw(panel: Axes) -> list[Series]:
        ends: dict[int, Point] = {}  # one number an arm
        for arm in series:
            for rows in filter(None, arm.histories):
                epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
                tip = f"{TIP}{arm.name}: {values[0]:,} to {values[-1]:,} {label}"
                panel.plot(epochs, values, color=arm.colour, lw=1.2, gid=tip)
                ends[arm.number] = Point(arm, epochs[-1], values[-1])
        if not ends:
            return []
        _finish(panel, "epoch", label, list(ends.values()), "y")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        return [point.arm for point in ends.values()]

    return draw


def plot_levels(series: Sequence[Series], keys: Sequence[str], label: str, scale: float = 1.0) -> Draw:
    """Plot the metric of the levels, and of the sets of modules, against a cost: a line an arm.

    Args:
        keys: of the cost; the first one that a level has.
    """

    def draw(panel: Axes) -> list[Series]:
        ends = []
        for arm in series:
            for kind, marker in (("levels", "o-"), ("sets", "s--")):
                runs = [run[kind] for run in arm.runs if len(run.get(kind) or ()) > 1]
                key = _find_key(runs, keys)
                if key is None or len({len(run) for run in runs}) > 1:  # seeds of other levels have no mean
                    continue
                costs = np.mean([[scale * row[key] for row in run] for run in runs], 0)
                accuracies = np.mean([arm.list_metrics(run) for run in runs], 0)
                order = np.argsort(costs)
                panel.plot(costs[order], accuracies[order], marker[1:], color=arm.colour)
                for k, (x, y) in enumerate(zip(costs, accuracies, strict=True)):
                    value = f"{y:.{arm.metric.digits}f}{arm.metric.unit}"
                    tip = f"{TIP}{arm.name}, {kind[:-1]} {k}: {value}, {x:,.4g} {label}"
                    panel.plot(x, y, marker[0], color=arm.colour, gid=tip)
                ends.append(Point(arm, costs[order[-1]], accuracies[order[-1]]))
        if not ends:
            return []
        _finish(panel, label, series[0].metric.label, ends)
        return list({point.arm.number: point.arm for point in ends}.values())

    return draw


def _find_key(runs: Sequence[Sequence[dict[str, Any]]], keys: Sequence[str]) -> str | None:
    """Find the first key that all rows of all runs have, if there are any."""
    rows = [row for run in runs for row in run]
    return next((key for key in keys if rows and all(key in row for row in rows)), None)


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the points that no other beats: at most as large and at least as accurate; by size."""
    best, front = -np.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            front.append(i)
    return front


# --- axes and names -------------------------------------------------------------------------------


def _finish(panel: Axes, x: str, y: str, points: Sequence[Point], logarithmic: str | None = None) -> None:
    """Label the axes, settle their limits, and write numbers beside them."""
    if logarithmic is not None:
        _set_logarithmic(panel, logarithmic)
    panel.set(xlabel=x, ylabel=y, xlim=panel.get_xlim(), ylim=panel.get_ylim())
    if "%" in y:
        panel.set_ylim(top=min(panel.get_ylim()[1], 101))  # an sd may reach further
    panel.grid(alpha=0.3)
    _name_points(panel, points)


def _set_logarithmic(panel: Axes, which: str) -> None:
    """Make an axis, "x" or "y", logarithmic; ticks say 0.2, 20 k or 5 M, also within one decade."""
    set_scale, axis = {"x": (panel.set_xscale, panel.xaxis), "y": (panel.set_yscale, panel.yaxis)}[which]
    set_scale("log")
    lower, upper = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if upper > 5 * lower else MaxNLocator(5))
    axis.set_major_formatter(EngFormatter() if upper > 1000 else "{x:g}")
    axis.set_minor_locator(NullLocator())


def _name_points(panel: Axes, points: Sequence[Point]) -> None:
    """Write numbers at the right edge of a panel whose limits are settled, each joined to its point."""
    figure = panel.get_figure(root=True)
    assert figure is not None
    inches = figure.get_figheight() - MARGIN
    to_panel = panel.transScale + panel.transLimits
    heights = [float(to_panel.transform((point.x, point.y))[1]) for point in points]
    for point, place in zip(points, space_out(heights, LINE / inches), strict=True):
        panel.annotate(
            str(point.arm.number),
            (point.x, point.y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            arrowprops=_LEADER | {"color": point.arm.colour},
        )


_LEADER = {"arrowstyle": "-", "lw": 0.7, "ls": ":", "relpos": (0, 0.5), "shrinkB": 3}


def space_out(heights: Sequence[float], gap: float) -> list[float]:
    """Find places within 0 … 1, in the order of heights and near to them, at least `gap` from each other."""
    order = np.argsort(heights, kind="stable")
    ranks = gap * np.arange(len(heights))  # what is pushed up by those below, then down by those above
    up = np.maximum.accumulate(np.asarray(heights, float)[order] - ranks)
    places = np.empty(len(heights))
    places[order] = np.clip(up, 0, max(0.0, 1 - ranks[-1])) + ranks
    return [float(place) for place in places]
