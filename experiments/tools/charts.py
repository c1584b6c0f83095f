"""The figures of the report's page: arms against each other, over the epochs, and level by level.

Each function gives one that draws on a panel and says whether there was anything to draw. Arms are named at
the right edge, each with a line to where it is drawn, so that no name lies on another one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

LINE = 0.17  # inches that a name takes
MARGIN = 0.8  # inches above and below a panel
LONGEST = 44  # characters of a name


@dataclass(frozen=True)
class Arm:
    """What is drawn of an arm in one colour: the summaries of its runs, and what their censuses found."""

    name: str
    colour: str
    runs: Sequence[dict[str, Any]]
    histories: Sequence[Sequence[dict[str, Any]]] = ()


Draw = Callable[[Axes], bool]
Named = tuple[str, str, float, float]  # a name, its colour, and the point it belongs to


def short(name: str) -> str:
    """A name that fits beside a panel: what is left out is in its middle."""
    half = (LONGEST - 1) // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


def height(names: int) -> float:
    """Inches of a figure with so many names."""
    return max(4.0, MARGIN + LINE * names)


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Places within 0 … 1 in the order of those wanted, and near to them, at least `gap` from each other."""
    order = np.argsort(wanted, kind="stable")
    ranks = gap * np.arange(len(wanted))  # what is pushed up by those below, then down by those above
    up = np.maximum.accumulate(np.asarray(wanted, float)[order] - ranks)
    places = np.empty(len(wanted))
    places[order] = np.clip(up, 0, max(0.0, 1 - ranks[-1])) + ranks
    return [float(place) for place in places]


def name_points(panel: Axes, named: Sequence[Named]) -> None:
    """Write names at the right edge of a panel whose limits are settled, each joined to its point."""
    inches = panel.get_figure(root=True).get_figheight() - MARGIN  # type: ignore[union-attr]
    to_panel = panel.transScale + panel.transLimits
    wanted = [float(to_panel.transform((x, y))[1]) for _, _, x, y in named]
    for (name, colour, x, y), place in zip(named, apart(wanted, LINE / inches), strict=True):
        panel.annotate(
            name,
            (x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.7,
                "ls": ":",
                "relpos": (0, 0.5),
                "shrinkB": 3,
            },
        )


def logarithmic(panel: Axes, which: str) -> None:
    """A logarithmic axis, "x" or "y"; ticks say 0.2, 20 k or 5 M, also where it spans less than a decade."""
    panel.set(**{f"{which}scale": "log"})  # type: ignore[arg-type]
    axis: Axis = {"x": panel.xaxis, "y": panel.yaxis}[which]
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 5 * low else MaxNLocator(5))
    axis.set_major_formatter(EngFormatter() if high > 1000 else "{x:g}")
    axis.set_minor_locator(NullLocator())


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats: at most as large and at least as accurate; by size."""
    best, found = -np.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def against(arms: Sequence[Arm], key: str, label: str) -> Draw:
    """Test accuracy against a cost, an arm a point, with the front of what nothing else beats."""

    def draw(panel: Axes) -> bool:
        named: list[Named] = []
        for arm in arms:
            if not all(run.get(key) for run in arm.runs):
                continue
            x, y = ([scale * run[k] for run in arm.runs] for k, scale in ((key, 1.0), ("test/acc", 100.0)))
            spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in (x, y)]
            named.append((arm.name, arm.colour, float(np.mean(x)), float(np.mean(y))))
            panel.errorbar(
                *named[-1][2:], xerr=spread[0], yerr=spread[1], fmt="o", capsize=3, color=arm.colour
            )
        if len(named) < 2:
            return False
        points = [(x, y) for _, _, x, y in named]
        panel.plot(*zip(*(points[i] for i in front(points)), strict=True), color="0.7", lw=1, zorder=0)
        _finish(panel, label, "test accuracy (%)", named, "x")
        return True

    return draw


def over_time(arms: Sequence[Arm], key: str, label: str) -> Draw:
    """A figure of the census over the epochs, a colour an arm, a line a run."""

    def draw(panel: Axes) -> bool:
        named: list[Named] = []
        for arm in arms:
            for rows in (rows for rows in arm.histories if rows):
                epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
                panel.plot(epochs, values, color=arm.colour, lw=1.2)
                last = (arm.name, arm.colour, epochs[-1], values[-1])
                named = [*(other for other in named if other[0] != arm.name), last]  # one name an arm
        if not named:
            return False
        _finish(panel, "epoch", label, named, "y")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        return True

    return draw


def by_level(arms: Sequence[Arm], keys: Sequence[str], label: str, scale: float = 1.0) -> Draw:
    """Accuracy of the levels, and of the sets of modules, against a cost: a line an arm.

    Args:
        keys: of the cost; the first one that a level has.
    """

    def draw(panel: Axes) -> bool:
        named: list[Named] = []
        for arm in arms:
            for kind, mark in (("levels", "o-"), ("sets", "s--")):
                runs = [run[kind] for run in arm.runs if len(run.get(kind) or ()) > 1]
                key = next(
                    (key for key in keys if runs and all(key in row for run in runs for row in run)), None
                )
                if key is None:
                    continue
                cost = np.mean([[scale * row[key] for row in run] for run in runs], 0)
                right = np.mean([[100 * row["test/acc"] for row in run] for run in runs], 0)
                order = np.argsort(cost)
                panel.plot(cost[order], right[order], mark, color=arm.colour)
                named.append((f"{arm.name}, {kind}", arm.colour, cost[order[-1]], right[order[-1]]))
        if not named:
            return False
        _finish(panel, label, "test accuracy (%)", named)
        return True

    return draw


def _finish(panel: Axes, x: str, y: str, named: Sequence[Named], logarithm: str | None = None) -> None:
    if logarithm is not None:
        logarithmic(panel, logarithm)
    panel.set(xlabel=x, ylabel=y, xlim=panel.get_xlim(), ylim=panel.get_ylim())
    if "%" in y:
        panel.set_ylim(top=min(panel.get_ylim()[1], 101))  # an sd may reach further
    panel.grid(alpha=0.3)
    name_points(panel, named)
