"""Tell mkdocs what it cannot know: the API's pages, the recorded runs, and the links of pages to both."""

import atexit
import re
import shutil
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Folder here → folder where it is installed.
PACKAGES = {"elastic": "elastic", "callbacks": "elastic/callbacks"}
NAME = re.compile(r"(?<!`)`(elastic(?!\.experiments)[\w.]*)`(?!`)")


@event_priority(100)  # before the plugins
def on_config(config: Any) -> Any:
    """Lay the packages out as they are installed, where the reader of docstrings finds all of them."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for source, target in PACKAGES.items():
        shutil.copytree(ROOT / source, place / target, ignore=shutil.ignore_patterns("__pycache__"))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(place)]
    return config


def list_modules() -> list[str]:
    """List the dotted names of the public modules, each package before what is in it."""
    names = []
    for source, target in PACKAGES.items():
        for path in (ROOT / source).rglob("*.py"):
            relative = Path(target, path.relative_to(ROOT / source).with_suffix(""))
            parts = [part for part in relative.parts if part != "__init__"]
            if not any(part.startswith("_") for part in parts):
                names.append(".".join(parts))
    return sorted(names)


def on_files(files: Files, config: Any) -> Files:
    """Add a page a module, and the recorded runs with their figures, tables and plans, to the site."""
    api = {name: f"api/{name}.md" for name in list_modules()}
    for name, uri in api.items():
        files.append(File.generated(config, uri, content=f"::: {name}\n"))
    recorded = ROOT / "experiments"
    runs = sorted(recorded.glob("*/README.md"))
    for path in (*runs, *recorded.rglob("*.png"), *recorded.glob("*/*.csv"), *recorded.glob("*.yaml")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    packages = {name.rpartition(".")[0] for name in api}

    def get_package(name: str) -> str:
        return name if name in packages else name.rpartition(".")[0]

    by_package = groupby(sorted(api, key=get_package), get_package)
    config.nav += [
        {"Recorded runs": [path.relative_to(ROOT).as_posix() for path in runs]},
        {"API": [{package: [{name: api[name]} for name in names]} for package, names in by_package]},
    ]
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Link the names of the API. `docs/` is the top of the site: links lose the `../` or `docs/` of it."""
    up = "../" * page.file.src_uri.count("/")
    markdown = NAME.sub(r"[`\1`][\1]", markdown)
    return markdown.replace(f"]({up}../", f"]({up}").replace(f"]({up}docs/", f"]({up}")


def on_page_content(html: str, **_: Any) -> str:
    """Write the head of an example with one colon."""
    return html.replace("<p>Example::</p>", "<p>Example:</p>")
