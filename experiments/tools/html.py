"""One page about many runs that opens anywhere: table and figures in a single HTML file, nothing to fetch."""

import base64
import html
import io
import re
from collections.abc import Mapping, Sequence, Set

import matplotlib.pyplot as plt

from elastic.experiments.tools.charts import Draw

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
td:first-child { min-width: 12rem; white-space: normal }
tbody tr { counter-increment: arm } tbody td:first-child::before { content: counter(arm) " "; color: #888 }
figure { margin: 1rem 0 } img { width: 100%; max-width: 62rem; min-width: 40rem }
figcaption, .note { color: #666; font-size: .9rem }
"""


def page(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    best: Set[tuple[int, int]],
    parts: Sequence[str],
) -> str:
    """The page.

    Args:
        head, rows: of the table.
        best: the cells that are set in bold, by row and column.
        parts: what follows the table, as HTML.
    """

    def cell(i: int, j: int) -> str:
        text = re.sub("([_/=+])", r"\1<wbr>", html.escape(rows[i][j]))  # where a long name may be broken
        return f"<td><b>{text}</b></td>" if (i, j) in best else f"<td>{text}</td>"

    lines = "\n".join(f"<tr>{''.join(cell(i, j) for j in range(len(head)))}</tr>" for i in range(len(rows)))
    heads = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>
{lines}
</tbody></table></div>
<p class="note">Test accuracy of the last epoch; mean ± sd over seeds; in bold the best mean of each
column. Numbers before arms are those in the figures. params: scalars that inference needs and that are not
zero. macs: multiply-accumulates for one input; TMACs: 10¹² of them.</p>
{"".join(parts)}
</body></html>
"""


def failures(failed: Mapping[str, str]) -> str:
    """The runs that failed, and why."""
    if not failed:
        return ""
    items = "".join(f"<li><b>{html.escape(run)}</b>: {html.escape(why)}</li>" for run, why in failed.items())
    return f"<h2>Failed</h2><ul>{items}</ul>"


def picture(title: str, caption: str, draw: Draw, height: float = 4.0) -> str:
    """A figure as HTML, or nothing where `draw` has found nothing to draw."""
    figure, panel = plt.subplots(figsize=(9, height), layout="constrained")
    try:
        if not draw(panel):
            return ""
        held = io.BytesIO()
        figure.savefig(held, dpi=150, format="png")
    finally:
        plt.close(figure)
    data = base64.b64encode(held.getvalue()).decode()
    name = html.escape(title)
    image = f'<div class="wide"><img alt="{name}" src="data:image/png;base64,{data}"></div>'
    return f"<h2>{name}</h2><figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>\n"
