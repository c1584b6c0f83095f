"""Make one page about many runs that opens anywhere: a single HTML file, nothing to fetch."""

import base64
import html
import io
import re
from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt

from elastic.experiments.tools.charts import Draw
from elastic.experiments.tools.results import ResultTable, write_latex

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.5rem } h2 { font-size: 1.3rem; margin-top: 2.6rem }
h3 { font-size: 1.1rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; counter-reset: arm }
.wide, pre { overflow-x: auto }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
td:first-child { min-width: 12rem; white-space: normal }
tbody tr { counter-increment: arm } tbody td:first-child::before { content: counter(arm) " "; color: #888 }
figure { margin: 1rem 0 } img { width: 100%; max-width: 62rem; min-width: 40rem }
figcaption, .note, summary { color: #666; font-size: .9rem }
"""


def make_page(title: str, facts: Mapping[str, str], parts: Iterable[str]) -> str:
    """Make the page.

    Args:
        facts: about all runs, above everything else.
        parts: that follow, as HTML.
    """
    lines = "<br>".join(f"{html.escape(name)}: {html.escape(text)}" for name, text in facts.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{html.escape(title)}</h1>
<p class="note">{lines}</p>
{"".join(parts)}
<p class="note">Test figures are of the last epoch; mean ± sd over seeds; in bold the best mean of each
column. Numbers before arms are those in the figures below their table. params: scalars that inference needs
and that are not zero. macs: multiply-accumulates for one input; kMACs … PMACs: 10³ … 10¹⁵ of them.</p>
</body></html>
"""


def make_section(title: str, table: ResultTable, figures: Iterable[str]) -> str:
    """Make the part about one data set: its table, the same in LaTeX, and figures."""
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    latex = f"<details><summary>LaTeX</summary><pre>{html.escape(write_latex(table))}</pre></details>"
    return f"{heading}{_make_table(table)}{latex}{''.join(figures)}"


def _make_table(table: ResultTable) -> str:
    def make_cell(text: str, bold: bool) -> str:
        broken = re.sub("([_/=+])", r"\1<wbr>", html.escape(text))  # where a long name may be broken
        return f"<td><b>{broken}</b></td>" if bold else f"<td>{broken}</td>"

    lines = (
        "".join(make_cell(text, (i, j) in table.best) for j, text in enumerate(row))
        for i, row in enumerate(table.rows)
    )
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in table.head)
    return f"""<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{rows}
</tbody></table></div>"""


def list_failures(reasons: Mapping[str, str]) -> str:
    """List the runs that failed, and why."""
    if not reasons:
        return ""
    items = "".join(
        f"<li><b>{html.escape(run)}</b>: {html.escape(reason)}</li>" for run, reason in reasons.items()
    )
    return f"<h2>Failed</h2><ul>{items}</ul>"


def make_figure(title: str, caption: str, draw: Draw, height: float = 4.0) -> str:
    """Make a figure as HTML, or nothing where there is nothing to draw."""
    figure, panel = plt.subplots(figsize=(9, height), layout="constrained")
    try:
        if not draw(panel):
            return ""
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=150, format="png")
    finally:
        plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    name = html.escape(title)
    image = f'<div class="wide"><img alt="{name}" src="data:image/png;base64,{data}"></div>'
    return f"<h3>{name}</h3><figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>\n"
