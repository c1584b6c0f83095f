"""The texts of a finished run are known to be those, as any tool that reads sums knows it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from elastic.files.sums import SUMS, check_sum, write_sums

TEXTS = {"config.yaml": "seed: 0\n", "timeline.jsonl": '{"epoch": 3}\n', "summary.json": "{}\n"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    write_sums(tmp_path, (*TEXTS, "missing.jsonl"))
    return tmp_path


def check_all(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    for name in TEXTS:
        check_sum(folder / name)
    return caplog.messages


@pytest.mark.parametrize("changed", [*TEXTS, SUMS])
def test_every_change_is_named(folder: Path, changed: str, caplog: pytest.LogCaptureFixture) -> None:
    assert check_all(folder, caplog) == []
    content = (folder / changed).read_bytes()
    for i in range(len(content)):
        (folder / changed).write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        named = check_all(folder, caplog)
        assert len(named) == 1 and named[0].endswith(f"remove {SUMS} if you changed it")
        assert changed == SUMS or named[0].startswith(str(folder / changed))


def test_nothing_is_said_where_nothing_was_summed_up(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / SUMS).unlink()
    assert check_all(folder, caplog) == []


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_others_check_it_too(folder: Path) -> None:
    def check() -> int:
        return subprocess.run(
            ["sha256sum", "-c", SUMS], cwd=folder, capture_output=True, check=False
        ).returncode

    assert check() == 0
    (folder / "config.yaml").write_text("seed: 1\n")
    assert check() == 1
