"""Imports go one way: elastic core <- elastic <- callbacks <- experiments."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("elastic", "callbacks", "experiments", "tests")  # each may import itself and what stands before it
# The part of elastic/ that needs torch alone. A new file there that needs no more is added here.
CORE = (
    *("errors", "axes", "rules", "trace", "widths", "stored", "surgery", "fresh", "gradmax", "depth"),
    *("gates", "compact", "cost", "saturation", "budget", "settle", "timeline"),
    *("nested", "importance", "sizes", "reconstruct", "timing", "runtime"),
    *("dynamic", "kam", "parsimony", "skipping", "compiled"),
)
CORE_MAY_IMPORT = {*sys.stdlib_module_names, "torch", "numpy"}


def imported(source: str, package: str) -> Iterator[str]:
    """The dotted name of everything that source text in `package` imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, node.module] if node.module else above)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> set[str]:
    return set(imported(path.read_text(encoding="utf-8"), ".".join(path.relative_to(ROOT).parent.parts)))


def files(layer: str) -> list[Path]:
    return sorted((ROOT / layer).rglob("*.py"))


def is_core(path: Path) -> bool:
    return path.relative_to(ROOT / "elastic").parts[0].removesuffix(".py") in CORE


def allowed_in_core(name: str) -> bool:
    top, _, rest = name.partition(".")
    return top in CORE_MAY_IMPORT or (top == "elastic" and rest.partition(".")[0] in CORE)


@pytest.mark.parametrize("layer", LAYERS[:-1])
def test_a_layer_imports_nothing_above_it(layer: str) -> None:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(layer)
        for name in sorted(imports_of(path))
        if name.partition(".")[0] in above
    ]
    assert not bad, bad


def test_the_core_needs_torch_alone() -> None:
    bad = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files("elastic")
        if is_core(path)
        for name in sorted(imports_of(path))
        if not allowed_in_core(name)
    ]
    assert not bad, bad


def test_every_core_name_is_a_module() -> None:
    found = {path.stem for path in (ROOT / "elastic").iterdir()}
    assert not set(CORE) - found, "renamed or removed: mend CORE, or nothing holds that file"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import lightning.pytorch as pl", "lightning.pytorch"),
        ("from . import data", "elastic.data"),
        ("from .widths import Width", "elastic.widths.Width"),
        ("from ..callbacks import grow", "callbacks.grow"),
        ("def f():\n    from experiments.train import main", "experiments.train.main"),
        ("if TYPE_CHECKING:\n    import callbacks", "callbacks"),
    ],
)
def test_an_import_is_seen_in_every_form(source: str, name: str) -> None:
    assert list(imported(source, "elastic")) == [name]
    assert allowed_in_core(name) == (name == "elastic.widths.Width")
