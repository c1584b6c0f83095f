"""The report as a browser shows it: nothing is fetched, nothing sticks out, all pictures are there."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from elastic.experiments.compare import compare_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium here: install it, say apt-get install chromium"),
]
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--virtual-time-budget=5000",
    "--hide-scrollbars",
)
# What sticks out on the right is listed, unless an element around it scrolls.
LOOK = """<script>addEventListener("load", () => {
  const wide = innerWidth, clips = e => e.className == "wide" || e.tagName == "svg";
  const scrolls = e => e && (clips(e) || scrolls(e.parentElement));
  const out = [...document.querySelectorAll("body *")].filter(
    e => e.getBoundingClientRect().right > wide + 1 && !scrolls(e.parentElement));
  parent.postMessage(JSON.stringify({
    wide, scroll: document.documentElement.scrollWidth, out: out.map(e => e.outerHTML.slice(0, 80)),
    figures: [...document.querySelectorAll("svg")].map(e => e.getBoundingClientRect().width),
    legends: [...document.querySelectorAll(".arms li")].map(e => e.getBoundingClientRect().right),
    tips: document.querySelectorAll("svg .tip > title").length,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:")),
  }), "*");
})</script>"""
# In a frame, since no window of chromium is as narrow as a phone.
FRAME = """<!doctype html><body style="margin: 0">
<script>addEventListener("message", e => { document.body.dataset.seen = e.data })</script>
<iframe src="looked.html" width="WIDTH" height="1600" style="border: 0"></iframe></body>"""


def show(page: Path, *options: str) -> str:
    window = ("--window-size=1280,1600", f"--user-data-dir={page.parent}/profile")
    asked = [str(BROWSER), *OPTIONS, *window, *options, page.as_uri()]
    return subprocess.run(asked, capture_output=True, text=True, timeout=120, check=True).stdout


def seen(page: Path, width: int) -> dict[str, Any]:
    """What a script in the page finds, where there is room for so many pixels."""
    page.with_name("looked.html").write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    page.with_name("frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    (text,) = re.findall('data-seen="([^"]*)"', show(page.with_name("frame.html"), "--dump-dom"))
    return json.loads(html.unescape(text))  # type: ignore[no-any-return]


def write(folder: Path, acc: float, params: int, epochs: int = 5) -> None:
    """A run as it would be written, with levels, sets of modules and a history."""
    folder.mkdir(parents=True)
    levels = [
        {
            "level": k,
            "params": params // (3 - k),
            "macs": 900 * params // (3 - k),
            "test/acc": acc - 0.1 / (k + 1),
        }
        for k in range(3)
    ]
    sets = [{"set": k, "test/acc": acc - k / 50, "macs_dynamic": 800 * params - 90 * k} for k in range(2)]
    about = {
        "test/acc": acc,
        "params": params,
        "params_dense": 2 * params,
        "macs": 900 * params,
        "wall_s": 9.0,
    }
    more = {"macs_dynamic": 800 * params, "macs_training": 10**12 + params, "levels": levels, "sets": sets}
    (folder / "summary.json").write_text(json.dumps(about | more))
    rows = [{"epoch": e, "params": params + 100 * e, "params_dense": 2 * params} for e in range(epochs)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    name = "growth+gates-" + "-".join(f"callbacks.gates.option{i}=value{i}" for i in range(6))
    for seed in (0, 1):
        write(folder / f"gnap-seed{seed}", 0.93 + seed / 100, 20_000)
        write(folder / f"{name}-seed{seed}", 0.931 + seed / 100, 20_100)
    (folder / "broken-seed0").mkdir()
    (folder / "broken-seed0" / "failed.json").write_text(json.dumps({"error": "a/path/without/end" * 20}))
    compare_runs(f"{folder}/*-seed*", html=folder / "page.html")
    return folder / "page.html"


@pytest.mark.parametrize("width", [1600, 1024, 500, 390])
def test_nothing_sticks_out_and_nothing_is_fetched(page: Path, width: int) -> None:
    assert page.stat().st_size < 2_000_000
    found = seen(page, width)
    assert found["wide"] == width, "or the rest says nothing about this width"
    assert found["out"] == [] and found["scroll"] <= width
    assert found["fetched"] == []
    assert len(found["figures"]) == 6 and all(0.5 * min(width, 900) < w < width for w in found["figures"])
    assert len(found["legends"]) >= 12 and max(found["legends"]) <= width, "whole, at any width"
    assert found["tips"] >= 12


def test_the_browser_shows_it(page: Path) -> None:
    show(page, f"--screenshot={page.parent}/page.png")
    image = plt.imread(page.parent / "page.png")
    assert image.shape[:2] == (1600, 1280) and image[800:].std() > 0.05, "figures, not blank paper"
