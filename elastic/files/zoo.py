"""Find networks that come with the package by name: files and cards made by `python -m experiments.cards`."""

import difflib
from pathlib import Path

from elastic.errors import FileError

ZOO = Path(__file__).parents[1] / "zoo"
WEIGHTS = "model.safetensors"  # of a folder, as runs and Hugging Face have it


def list_zoo() -> list[str]:
    """List the names of the networks that come with the package."""
    return sorted(path.stem for path in ZOO.glob("*.safetensors"))


def read_card(name: str) -> str:
    """Read the card of a network of the zoo: what it is, how it was made and what it does.

    Raises:
        FileError: there is none of that name.
    """
    return find_file(name).with_suffix(".md").read_text()


def find_file(source: str | Path) -> Path:
    """Find the file of a network: itself, in a folder, or by its name in the zoo.

    Raises:
        FileError: there is none.
    """
    path = Path(source).expanduser()
    file = path / WEIGHTS if path.is_dir() else path
    if file.is_file():
        return file
    if str(source) in list_zoo():
        return ZOO / f"{source}.safetensors"
    if path.is_dir():
        raise FileError(f"there is no {WEIGHTS} in {path}: name the folder of a finished run")
    close = difflib.get_close_matches(str(source), list_zoo(), 1)
    remedy = f"did you mean {close[0]}?" if close else f"name a file, or one of {', '.join(list_zoo())}"
    raise FileError(f"there is no network {source}: {remedy}")
