"""Know the moments of a run at which a kill leaves something else: each write, and each step between."""

import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Literal

from torch.optim.optimizer import register_optimizer_step_post_hook

LOCK = ".lock"


@dataclass(frozen=True)
class Moment:
    """Say what has just happened.

    Attributes:
        kind: a file is about to be written, or a folder made ("open"); a file that will replace another is
            written, which a kill may leave half done ("written"); it has replaced the other ("placed"); an
            optimizer has made a step ("step").
        file: that is opened or written.
    """

    kind: Literal["open", "written", "placed", "step"]
    file: Path | None = None


Watch = Callable[[Moment], None]


def watch_moments(folder: Path, watch: Watch) -> None:
    """Tell of each moment of this process from now on: for good, so this is for a fork.

    Args:
        folder: of the files that count.
        watch: is told; what it raises is raised where the moment is.
    """
    replace, inside, process = os.replace, False, os.getpid()

    def tell(moment: Moment) -> None:
        nonlocal inside
        if not inside and os.getpid() == process:  # what watches writes as well; its forks write nothing
            inside = True
            try:
                watch(moment)
            finally:
                inside = False

    def replace_watched(part: Any, path: Any, **options: Any) -> None:
        tell(Moment("written", Path(part)))
        replace(part, path, **options)
        tell(Moment("placed"))

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if inside or event not in ("open", "os.mkdir") or not str(arguments[0]).startswith(f"{folder}/"):
            return
        flags = os.O_WRONLY if event == "os.mkdir" else arguments[2]
        if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
            tell(Moment("open", Path(arguments[0])))

    os.replace = replace_watched  # type: ignore[assignment]
    sys.addaudithook(audit)
    register_optimizer_step_post_hook(lambda *_: tell(Moment("step")))


def cut(part: Path, random: Random) -> None:
    """Leave a file as a write that has not come to its end does."""
    content = part.read_bytes()
    part.write_bytes(content[: random.randrange(len(content) + 1)])


def copy_moments(folder: Path, copies: Path, random: Random) -> Watch:
    """Return what copies a folder at each moment as a kill would leave it; halves of a write twice."""
    copies.mkdir(parents=True)

    def copy(moment: Moment) -> None:
        for is_cut in (True, True, False) if moment.kind == "written" else (False,):
            place = copies / f"{len(os.listdir(copies)):05}"
            shutil.copytree(folder, place, ignore=shutil.ignore_patterns(LOCK))
            if is_cut and moment.file is not None:
                cut(place / moment.file.relative_to(folder), random)

    return copy


def kill_at(count: int, random: Random) -> Watch:
    """Return what kills this process and all of its group at a moment, so many moments from now."""
    remaining = count

    def kill(moment: Moment) -> None:
        nonlocal remaining
        remaining -= 1
        if remaining < 0:
            if moment.kind == "written" and moment.file is not None:
                cut(moment.file, random)
            os.killpg(0, signal.SIGKILL)

    return kill


def refuse_writes(count: int, number: int, random: Random) -> Watch:
    """Return what lets each write fail from one on, as a full or read-only disk does.

    Args:
        count: of the writes before.
        number: of the system's error.
    """
    remaining = count

    def refuse(moment: Moment) -> None:
        nonlocal remaining
        if moment.kind in ("placed", "step") or moment.file is None:
            return
        remaining -= 1
        if remaining < 0:
            if moment.kind == "written" and number == errno.ENOSPC:
                cut(moment.file, random)
            raise OSError(number, os.strerror(number), str(moment.file))

    return refuse


def digest_folder(folder: Path) -> str:
    """Digest what a folder holds, and under which names."""
    digest = sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK):
        digest.update(f"{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
