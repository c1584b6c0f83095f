"""Checkpoints are read back if they are what was written: no bit less, and nothing but tensors."""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic.errors import FileError
from elastic.training.checkpoints import AtomicCheckpoints, read_checkpoint

STATE = {"state_dict": {"weight": torch.arange(40.0)}, "epoch": 3, "loops": {"name": [1, None, "x"]}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    AtomicCheckpoints().save_checkpoint(STATE, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt"


def test_any_program_reads_it(saved: Path) -> None:
    for mmap in (False, True):
        state = torch.load(saved, weights_only=True, mmap=mmap)
        assert torch.equal(state["state_dict"]["weight"], torch.arange(40.0)) and state["epoch"] == 3
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256=") and len(archive.comment) == 7 + 64


def test_it_comes_back(saved: Path) -> None:
    for state in (read_checkpoint(saved), AtomicCheckpoints().load_checkpoint(saved)):
        assert torch.equal(state["state_dict"]["weight"], torch.arange(40.0))
        assert state["loops"] == STATE["loops"]


def test_every_bit_that_flips_is_seen(saved: Path) -> None:
    """Those of the archive's own records, its names and its digest, too."""
    content = saved.read_bytes()
    for spot in range(0, len(content)):
        flipped = bytearray(content)
        flipped[spot] ^= 1 << spot % 8
        saved.write_bytes(flipped)
        with pytest.raises(FileError, match=r"last\.ckpt is (damaged|no checkpoint)") as caught:
            read_checkpoint(saved)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.99])
def test_what_is_cut_is_seen(saved: Path, part: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    with pytest.raises(FileError, match=r"last\.ckpt is damaged"):
        read_checkpoint(saved)


def test_parts_that_change_places_are_seen(saved: Path) -> None:
    content = saved.read_bytes()
    middle = len(content) // 2
    saved.write_bytes(content[middle:] + content[:middle])
    with pytest.raises(FileError, match=r"last\.ckpt is damaged"):
        read_checkpoint(saved)


def test_a_checkpoint_without_a_digest_is_read(tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save(STATE, tmp_path / "other.ckpt", _use_new_zipfile_serialization=zipped)
        assert read_checkpoint(tmp_path / "other.ckpt")["epoch"] == 3


class Hostile:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


@pytest.mark.parametrize("digest", [True, False])
def test_what_would_run_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: bool) -> None:
    """And nothing tells how to read it all the same."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    if digest:
        AtomicCheckpoints().save_checkpoint({"state_dict": {}, "evil": Hostile()}, path)
    else:
        buffer = io.BytesIO()
        pickle.dump({"evil": Hostile()}, buffer)
        path.write_bytes(buffer.getvalue())
    with pytest.raises(FileError, match="is never read: restore it") as caught:
        read_checkpoint(path)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)
    assert not Path("executed").exists()


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "list.ckpt")
    with pytest.raises(FileError, match="is no checkpoint"):
        read_checkpoint(tmp_path / "list.ckpt")
    with pytest.raises(FileError, match="cannot be read"):
        read_checkpoint(tmp_path / "none.ckpt")


class Harmless:
    """What a program keeps that is neither a tensor nor a plain container."""


def test_a_program_may_read_objects_of_its_own(tmp_path: Path) -> None:
    """It has to say so: by default they are what could run."""
    plugin, path = AtomicCheckpoints(), tmp_path / "deep" / "deeper" / "own.ckpt"
    plugin.save_checkpoint({"state_dict": {}, "own": Harmless()}, path)
    for weights_only in (None, True):
        with pytest.raises(FileError, match="is never read"):
            plugin.load_checkpoint(path, weights_only=weights_only)
    assert isinstance(plugin.load_checkpoint(path, weights_only=False)["own"], Harmless)
