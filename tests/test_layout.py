"""Imports go one way, from room to room, and most rooms need torch and NumPy alone."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each may import itself and what stands before it; rooms in one row may import each other.
LAYERS = (
    ("elastic.errors", "elastic.ranges"),
    ("elastic.widths", "elastic.surgery", "elastic.measure"),
    ("elastic.growth", "elastic.pruning", "elastic.levels", "elastic.dynamic"),
    ("elastic.training", "elastic.files", "elastic.data", "elastic.models"),
    ("elastic.callbacks",),
    ("elastic.experiments",),
)
LEVEL = {room: i for i, rooms in enumerate(LAYERS) for room in rooms}
# What needs more than torch and NumPy; all else has to run without.
WITH_LIBRARIES = ("training", "files", "data", "models", "callbacks", "experiments")
ALONE = {*sys.stdlib_module_names, "torch", "numpy", "elastic"}


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


def sources() -> list[Path]:
    folders = ("elastic", "callbacks", "experiments")
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room_of(name: str) -> str:
    """The room of a dotted name: `elastic.widths` of `elastic.widths.tracing.trace`."""
    return ".".join(name.split(".")[:2])


def installed_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name if name.startswith("elastic") else f"elastic.{name}"


def test_every_room_has_its_place() -> None:
    rooms = {room_of(installed_name(path)) for path in sources()} - {"elastic.__init__"}
    assert rooms == set(LEVEL)


def test_imports_go_one_way() -> None:
    above = {
        installed_name(path): names
        for path in sources()
        if (room := room_of(installed_name(path))) != "elastic.__init__"  # the face of the torch-only rooms
        and (names := {name for name in imports_of(path) if LEVEL.get(room_of(name), -1) > LEVEL[room]})
    }
    assert not above


def test_most_rooms_need_torch_and_numpy_alone() -> None:
    alone = [
        path
        for path in sources()
        if path.relative_to(ROOT).parts[-2] not in WITH_LIBRARIES
        and not room_of(installed_name(path)).endswith(WITH_LIBRARIES)
    ]
    other = {
        installed_name(path): names
        for path in alone
        if (names := {name for name in imports_of(path) if name.partition(".")[0] not in ALONE})
    }
    assert alone
    assert not other


def test_importing_the_face_loads_torch_alone() -> None:
    libraries = ("lightning", "hydra", "wandb", "torchvision", "safetensors")
    files = ("Network", "export", "load", "save")
    names = f"[getattr(elastic, name) for name in elastic.__all__ if name not in {files}]"
    code = f"import sys, elastic; {names}; print(*(m for m in {libraries} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_test_module_imports_another() -> None:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    others = {
        path.name: names
        for path in paths
        if (names := {n for n in imports_of(path) if re.search(r"(^|\.)test_", n.rpartition(".")[0])})
    }
    assert paths
    assert not others


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import lightning.pytorch as pl", "lightning.pytorch"),
        ("from . import data", "elastic.data"),
        ("from .widths import Width", "elastic.widths.Width"),
        ("from ..callbacks import growth", "callbacks.growth"),
        ("def f():\n    from elastic.experiments.train import main", "elastic.experiments.train.main"),
        ("if TYPE_CHECKING:\n    import elastic.callbacks", "elastic.callbacks"),
    ],
)
def test_an_import_is_seen_in_every_form(source: str, name: str) -> None:
    assert list(imported(source, "elastic")) == [name]
