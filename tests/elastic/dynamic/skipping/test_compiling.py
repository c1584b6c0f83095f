"""The compiled kernel: made once, kept, and loaded only as it was made, by the user."""

import functools
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from elastic.dynamic.skipping import compiling, make_skipping
from elastic.dynamic.skipping.compiling import CACHE, Kernel, load_kernel
from elastic.dynamic.skipping.convolution import ActiveConv2d

KERNEL = load_kernel()  # with the user's own cache
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None, reason="there is no C++ compiler"
)


class Compiler:
    """A compiler that takes no time: it copies what the real one has made, and counts."""

    def __init__(self, folder: Path) -> None:
        self.path, self.count_file = folder / "compiler", folder / "count"
        assert KERNEL is not None
        self.path.write_text(
            f'#!/bin/sh\necho "$@" >> {self.count_file}\nfor last; do :; done\ncp {KERNEL.path} "$last"\n'
        )
        self.path.chmod(0o700)

    @property
    def calls(self) -> list[str]:
        return self.count_file.read_text().splitlines() if self.count_file.exists() else []


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE, str(folder))
    return folder


@pytest.fixture
def compiler(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    made = Compiler(tmp_path)
    monkeypatch.setenv("CXX", str(made.path))
    return made


def load() -> Kernel | None:
    """As a new process does."""
    return load_kernel.__wrapped__()


def refusal(caplog: pytest.LogCaptureFixture) -> str:
    """The one line that is said where there is no kernel."""
    caplog.clear()
    assert load() is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "\n" not in record.getMessage()
    assert record.getMessage().startswith("kernels are skipped by stock PyTorch")
    return record.getMessage()


@needs_compiler
def test_where_there_is_a_compiler_it_compiles() -> None:
    """It would be done without if it did not."""
    assert KERNEL is not None


def test_without_a_compiler_there_is_no_kernel_which_is_said(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler 'no-such-compiler'; install one, or set CXX" in refusal(caplog)
    monkeypatch.setenv("CXX", "false")  # one that fails
    assert "/false' fails (" in refusal(caplog)
    monkeypatch.setenv("CXX", "true")  # one that makes nothing
    assert "cannot be used" in refusal(caplog)
    assert not list(cache.rglob("*.so"))


def test_it_is_said_once_and_stock_torch_takes_over(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(compiling, "load_kernel", functools.cache(load_kernel.__wrapped__))
    net, x_BCHW = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(make_skipping(net)(x_BCHW), net(x_BCHW))
    assert len(caplog.records) == 1


@needs_compiler
def test_it_is_compiled_once_and_kept(cache: Path, compiler: Compiler) -> None:
    assert load() is not None
    (library,) = cache.iterdir()
    assert load() is not None
    assert len(compiler.calls) == 1 and list(cache.iterdir()) == [library]


@needs_compiler
def test_a_compiler_may_come_with_flags_and_a_cache_be_relative(
    tmp_path: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", f"{compiler.path} -DNOTHING")
    monkeypatch.setenv(CACHE, ".")
    assert load() is not None and list(tmp_path.glob("active-*.so"))
    assert compiler.calls[0].startswith("-DNOTHING -std=c++17")


def test_without_a_place_to_keep_it_there_is_no_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find_nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(Path, "expanduser", find_nobody)
    assert "(Could not determine home directory.); set ELASTIC_CACHE to another" in refusal(caplog)


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "another"])
def test_a_damaged_library_is_made_again(cache: Path, compiler: Compiler, damage: str) -> None:
    """A cut one ended the process: what is mapped but not there is SIGBUS."""
    load()
    (library,) = cache.iterdir()
    content = library.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"cut": content[:middle], "empty": b"", "flipped": flipped, "another": b"#!/bin/sh\n"}[damage]
    library.unlink()  # this process goes on with the file that it has loaded
    library.write_bytes(damaged)
    kernel = load()
    assert kernel is not None and len(compiler.calls) == 2
    assert [path.read_bytes() for path in cache.iterdir()] == [content]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(compiling, "load_kernel", lambda: kernel)
        conv, x_BCHW = nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)
        torch.testing.assert_close(ActiveConv2d(conv, relu=False)(x_BCHW), conv(x_BCHW), rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="owners are POSIX's")
def test_a_folder_that_is_not_the_users_own_is_not_loaded_from(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load()
    cache.chmod(0o777)
    assert "is others', or they may write to it; set ELASTIC_CACHE to a folder of your own" in refusal(caplog)
    cache.chmod(0o700)
    assert load() is not None
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert str(cache) in refusal(caplog)
    assert len(compiler.calls) == 1


@needs_compiler
@pytest.mark.skipif(not hasattr(os, "getuid"), reason="modes are POSIX's")
def test_a_library_that_others_may_write_to_is_made_again(cache: Path, compiler: Compiler) -> None:
    load()
    (library,) = cache.iterdir()
    assert library.stat().st_mode & 0o077 == library.parent.stat().st_mode & 0o077 == 0
    library.chmod(0o777)
    assert load() is not None and len(compiler.calls) == 2
    (library,) = cache.iterdir()
    assert library.stat().st_mode & 0o077 == 0
