"""The checked kernel: right layers are counted, and a write beyond memory is a fault that is named."""

import os
import shlex
import shutil
from pathlib import Path
from random import Random

import pytest

from elastic.experiments.tools.trials import Part, kernel

COMPILER = (shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason="there is no C++ compiler"),
]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Part:
    monkeypatch.setattr(kernel, "PROCESSORS", {"AVX2": kernel.PROCESSORS["AVX2"]})
    return Part("kernel", kernel.CLAIM)


def test_layers_are_counted(part: Part, tmp_path: Path) -> None:
    kernel.try_kernel(part, 120, Random(0), tmp_path)
    assert not part.faults and part.trials == 120
    assert set(part.outcomes) == {f"AVX2: {kind}" for kind in kernel.KINDS}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("for (int c = 0, k = 0; c < channels; c++)", "for (int c = 0, k = 0; c <= channels; c++)"),
        ("std::max(mean[c], within[c])", "std::max(mean[c], within[c + 1])"),
    ],
)
def test_a_faulty_kernel_is_found(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(kernel.SOURCES, sources)
    (source,) = (path for path in sources.iterdir() if right in path.read_text())
    source.write_text(source.read_text().replace(right, wrong))
    monkeypatch.setattr(kernel, "SOURCES", sources)
    kernel.try_kernel(part, 300, Random(0), tmp_path)
    assert len(part.faults) == 1 and part.trials < 300
