"""What mkdocs cannot know: the API's pages, the recorded runs, and the links of pages to both."""

import re
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGES = ("elastic", "callbacks")
# In a page's text, not in commands: there `callbacks.gates.budget` is an option.
NAME = re.compile(r"(?<!`)`((?:elastic|callbacks\.(?=[A-Z]))[\w.]*)`(?!`)")


def modules() -> list[str]:
    """The dotted names of the public modules, each package before what is in it."""
    paths = (path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    parts = ([part for part in path.with_suffix("").parts if part != "__init__"] for path in paths)
    return sorted(".".join(p) for p in parts if not any(part.startswith("_") for part in p))


def on_files(files: Files, config: Any) -> Files:
    """Add a page a module, and the recorded runs with their figures, to the site and its navigation."""
    api = {name: f"api/{name}.md" for name in modules()}
    for name, uri in api.items():
        files.append(File.generated(config, uri, content=f"::: {name}\n"))
    runs = sorted((ROOT / "experiments").glob("*/README.md"))
    for path in (*runs, *(ROOT / "experiments").rglob("*.png")):
        uri = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    by_package = groupby(sorted(api, key=_package), _package)
    config.nav += [
        {"Recorded runs": [path.relative_to(ROOT).as_posix() for path in runs]},
        {"API": [{package: [{name: api[name]} for name in names]} for package, names in by_package]},
    ]
    return files


def _package(name: str) -> str:
    """The package that a module is in; a package is in itself."""
    return name if (ROOT / name.replace(".", "/")).is_dir() else name.rpartition(".")[0]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Link the names of the API. Links that leave `docs/`, the top of the site, lose a `../`."""
    up = "../" * page.file.src_uri.count("/")
    return NAME.sub(r"[`\1`][\1]", markdown).replace(f"]({up}../", f"]({up}")


def on_page_content(html: str, **_: Any) -> str:
    return html.replace("<p>Example::</p>", "<p>Example:</p>")
