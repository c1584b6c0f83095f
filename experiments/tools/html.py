"""Make one page about many runs that opens anywhere: a single HTML file, nothing to fetch.

Figures are drawn as SVG, inside the page: they are sharp at any size, and tell of a point or a line that is
pointed at by its `<title>`, which browsers show without a script. A plotting library of JavaScript would add
some megabytes to each page.
"""

import html
import io
import re
from collections.abc import Iterable, Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.colors import to_hex

from elastic.experiments.tools.charts import TIP, Draw, Series
from elastic.experiments.tools.results import ResultTable, list_csv, write_latex
from elastic.experiments.tools.tables import write_rows

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
figure { margin: 1rem 0 } svg { width: 100%; height: auto; max-width: 54rem }
.tip:hover * { stroke-width: 5 !important } .tip { cursor: help }
.arms { display: flex; flex-wrap: wrap; gap: 0 1.2rem; padding: 0; margin: 0; list-style: none;
  font-size: .9rem }
.arms b { display: inline-block; width: .8rem; height: .8rem; border-radius: 50% }
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
    """Make the part about one data set: its table, the same in LaTeX and as CSV, and figures."""
    heading = f"<h2>{html.escape(title)}</h2>" if title else ""
    texts = {"LaTeX": write_latex(table), "CSV": write_rows(*list_csv(table.arms, table.baseline))}
    sources = "".join(
        f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre></details>"
        for name, text in texts.items()
    )
    return f"{heading}{_make_table(table)}{sources}{''.join(figures)}"


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
    with mpl.rc_context({"svg.fonttype": "none", "font.family": ["DejaVu Sans"]}):
        figure, panel = plt.subplots(figsize=(7, height), layout="constrained")
        try:
            arms = draw(panel)
            if not arms:
                return ""
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            plt.close(figure)
    name = html.escape(title)
    image = _embed(buffer.getvalue(), name)
    note = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<h3>{name}</h3><figure>{image}{_list_arms(arms)}{note}</figure>\n"


def _embed(svg: str, name: str) -> str:
    """Turn a drawing of matplotlib's into an element of a page, whose artists tell what their gid says."""
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    (box,) = re.findall(r'viewBox="[^"]*"', head)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(rf'<g id="{TIP}([^"]*)">', r'<g class="tip"><title>\1</title>', body)
    body = body.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return f'<svg role="img" aria-label="{name}" {box}>{body}'


def _list_arms(arms: Sequence[Series]) -> str:
    """List the numbers, colours and names of the arms in a figure, as wide as there is room for."""
    items = "".join(
        f'<li><b style="background: {to_hex(arm.colour)}"></b> {arm.number} {html.escape(arm.name)}</li>'
        for arm in sorted(arms, key=lambda arm: arm.number)
    )
    return f'<ul class="arms">{items}</ul>'
