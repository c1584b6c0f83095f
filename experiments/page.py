"""One page about many runs that opens anywhere: table and figures in a single HTML file, nothing to fetch."""

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

Arms = Mapping[str, Sequence[dict[str, Any]]]
Histories = Mapping[str, Sequence[Sequence[dict[str, Any]]]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
img { max-width: 100% } figure { margin: 1rem 0 } figcaption, .note { color: #666; font-size: .9rem }
"""


def page(
    title: str, head: Sequence[str], rows: Sequence[Sequence[str]], best: int, parts: Sequence[str]
) -> str:
    """The page.

    Args:
        head, rows: of the table.
        best: the row that is set in bold.
        parts: what follows the table, as HTML.
    """
    cells = [[html.escape(cell) for cell in row] for row in rows]
    cells[best] = [f"<b>{cell}</b>" for cell in cells[best]]
    lines = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in cells)
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>
{lines}
</tbody></table></div>
<p class="note">Test accuracy of the last epoch; mean ± sd over seeds; in bold the most accurate. params:
scalars that inference needs and that are not zero. MACs: multiply-accumulates for one input.</p>
{"".join(parts)}
</body></html>
"""


def failures(failed: Mapping[str, str]) -> str:
    """The runs that failed, and why."""
    if not failed:
        return ""
    items = "".join(f"<li><b>{html.escape(run)}</b>: {html.escape(why)}</li>" for run, why in failed.items())
    return f"<h2>Failed</h2><ul>{items}</ul>"


def picture(title: str, caption: str, draw: Callable[[Axes], bool], height: float = 4.0) -> str:
    """A figure as HTML, or nothing where `draw` has found nothing to draw."""
    figure, panel = plt.subplots(figsize=(8, height), layout="constrained")
    try:
        if not draw(panel):
            return ""
        held = io.BytesIO()
        figure.savefig(held, dpi=110, format="png")
    finally:
        plt.close(figure)
    data = base64.b64encode(held.getvalue()).decode()
    name = html.escape(title)
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<h2>{name}</h2><figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>\n"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The points that no other beats: at most as large and at least as accurate; by size."""
    best, found = -np.inf, []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            best = points[i][1]
            found.append(i)
    return found


def against(arms: Arms, key: str, label: str) -> Callable[[Axes], bool]:
    """Test accuracy against a cost, an arm a point, with the front of what nothing else beats."""

    def draw(panel: Axes) -> bool:
        held = {arm: runs for arm, runs in arms.items() if all(run.get(key) for run in runs)}
        points = []
        for arm, runs in held.items():
            x, y = ([scale * run[k] for run in runs] for k, scale in ((key, 1.0), ("test/acc", 100.0)))
            spread = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in (x, y)]
            points.append((float(np.mean(x)), float(np.mean(y))))
            panel.errorbar(*points[-1], xerr=spread[0], yerr=spread[1], fmt="o", capsize=3)
            panel.annotate(
                arm.replace("_", " "), points[-1], xytext=(6, 4), textcoords="offset points", fontsize="small"
            )
        if len(points) < 2:
            return False
        edge = [points[i] for i in front(points)]
        panel.plot(*zip(*edge, strict=True), color="0.7", lw=1, zorder=0)
        panel.set_xscale("log")
        panel.set_xlabel(label)
        panel.set_ylabel("test accuracy (%)")
        panel.grid(alpha=0.3)
        panel.margins(x=0.15)
        return True

    return draw


def over_time(histories: Histories, key: str, label: str) -> Callable[[Axes], bool]:
    """A figure of the census over the epochs, a colour an arm, a line a run."""

    def draw(panel: Axes) -> bool:
        drawn = 0
        for colour, (arm, runs) in enumerate(histories.items()):
            for i, rows in enumerate(run for run in runs if run):
                epochs, values = [row["epoch"] for row in rows], [row[key] for row in rows]
                panel.plot(
                    epochs,
                    values,
                    color=f"C{colour % 10}",
                    lw=1.2,
                    label=None if i else arm.replace("_", " "),
                )
                drawn += 1
        if not drawn:
            return False
        panel.set_yscale("log")
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small", ncols=2)
        return True

    return draw


def by_level(arms: Arms) -> Callable[[Axes], bool]:
    """Accuracy of the levels, and of the sets of modules, against what they compute: a line an arm."""

    def draw(panel: Axes) -> bool:
        for arm, runs in arms.items():
            for kind, mark in (("levels", "o-"), ("sets", "s--")):
                rows = [run[kind] for run in runs if len(run.get(kind) or ()) > 1]
                if rows:
                    macs = np.mean(
                        [[row.get("macs_dynamic", row.get("macs")) for row in run] for run in rows], 0
                    )
                    right = np.mean([[100 * row["test/acc"] for row in run] for run in rows], 0)
                    order = np.argsort(macs)
                    panel.plot(
                        1e-6 * macs[order], right[order], mark, label=f"{arm.replace('_', ' ')}, {kind}"
                    )
        if not panel.lines:
            return False
        panel.set_xlabel("10⁶ MACs an image, mean")
        panel.set_ylabel("test accuracy (%)")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False, fontsize="small")
        return True

    return draw
