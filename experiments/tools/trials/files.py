"""Damage the files of a run, its data and the compiled kernel, or put hostile ones in their place.

All is named, and nothing is called.
"""

import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image

from elastic.data.table import ImageTableData
from elastic.dynamic.skipping import compiling
from elastic.errors import ElasticError, FileError
from elastic.experiments.tools.folders import CHECKPOINT, CONFIG, SUMMARY, find_checkpoint, load_config
from elastic.experiments.tools.restore import WEIGHTS, restore
from elastic.experiments.tools.trials import Part
from elastic.files.sums import SUMS, logger
from elastic.training.checkpoints import add_digest
from elastic.training.timeline import read_timeline

CLAIM = "named in one line, and nothing executed; of a run's files and the kernel every damage"
TIMELINE = "timeline.jsonl"
COMPILED = 500  # trials for which it is worth it to compile the kernel
SILENT = "read, it says something else"
NOTED = "read, and a line says that it is another"
CALLS = ("os.system", "builtins.exec", "torch.load", "torch.hub.load", "subprocess.run", "joblib.load")


@dataclass(frozen=True)
class Target:
    """Say of a file how it is read, and what of it can be known.

    Attributes:
        read: what is in the folder now.
        hostile: makes contents that call, or ask for, what nobody may want.
        is_sealed: whether it has a digest, so that every damage is seen.
    """

    read: Callable[[], object]
    hostile: Callable[[Random, Path], bytes]
    is_sealed: bool = False


def try_files(part: Part, trials: int, random: Random, run: Path, folder: Path) -> None:
    """Damage a file of a finished run, of its data or of the kernel's cache in each trial, and read it.

    Args:
        run: the folder of the run.
        folder: for copies of its files, which a trial changes.
    """
    folder.mkdir()
    for name in (WEIGHTS, CHECKPOINT, CONFIG, SUMMARY, TIMELINE, SUMS):
        shutil.copy(run / name, folder)
    marker, sums = folder / "called", (folder / SUMS).read_bytes()
    targets = make_targets(folder, load_config(run), trials >= COMPILED and shutil.which("c++") is not None)
    originals = {path: path.read_bytes() for path in targets}
    paths = [*targets, *(path for path, target in targets.items() if target.is_sealed)]
    while part.trials < trials:
        path, kind = random.choice(paths), random.choice(list(DAMAGES))
        target, content = targets[path], originals[path]
        damaged = target.hostile(random, marker) if kind == "hostile" else DAMAGES[kind](content, random)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        if kind == "hostile":  # whoever writes that is not stopped by sums
            (folder / SUMS).unlink()
        outcome = _try_once(target.read)
        if marker.exists():
            outcome = "executed"
            marker.rmdir()
        name = "kernel.so" if path.suffix == ".so" else path.name
        # Tables and pixels may say something else that can be; what has a digest may not.
        if outcome in ("named", NOTED) or (outcome == SILENT and not target.is_sealed):
            part.count(f"{name}: {outcome}")
        else:
            part.fail(f"{name}, {kind}: {outcome}")
        path.write_bytes(content)
        (folder / SUMS).write_bytes(sums)


def make_targets(folder: Path, cfg: Any, has_kernel: bool) -> dict[Path, Target]:
    """Make what is tried: the run's files, which are there, images, tables and perhaps a compiled kernel."""
    targets = {
        folder / WEIGHTS: Target(lambda: restore(folder), _make_hostile_weights, True),
        folder / CHECKPOINT: Target(lambda: find_checkpoint(folder, cfg), _make_hostile_pickle, True),
        folder / CONFIG: Target(lambda: restore(folder), _make_hostile_config, True),
        folder / SUMMARY: Target(lambda: restore(folder), _make_hostile_summary, True),
        folder / TIMELINE: Target(lambda: read_timeline(folder / TIMELINE), _make_hostile_rows, True),
    }
    data = folder / "data"
    for name in _write_data(data):
        hostile = _make_hostile_table if name.endswith(".csv") else _make_hostile_image
        targets[data / name] = Target(lambda: _read_data(data), hostile)
    if has_kernel:
        library = _make_library(folder / "cache")
        read = partial(_read_library, library, folder / "cache")
        targets[library] = Target(read, lambda random, marker: random.randbytes(4096), True)
    return targets


def _try_once(read: Callable[[], object]) -> str:
    """Read a file that is damaged, and return how that ends."""
    notes: SimpleQueue[Any] = SimpleQueue()
    handler = QueueHandler(notes)
    logger.addHandler(handler)
    try:
        read()
    except ElasticError as error:
        return "named" if "\n" not in str(error) else f"more than a line, {error}"
    except Exception as error:
        return f"{type(error).__name__} {error}"
    finally:
        logger.removeHandler(handler)
    return SILENT if notes.empty() else NOTED


# --- data and the kernel --------------------------------------------------------------------------


def _write_data(folder: Path) -> tuple[str, ...]:
    """Write images and the tables that list them; return the files that trials damage."""
    folder.mkdir()
    random = np.random.default_rng(0)
    names = [f"{i}{suffix}" for suffix in (".png", ".jpg", ".bmp") for i in range(4)]
    for name in names:
        Image.fromarray(random.integers(0, 256, (9, 9, 3), np.uint8)).save(folder / name)
    rows = "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    for table in ("train.csv", "test.csv"):
        (folder / table).write_text(f"path,label\n{rows}")
    return "0.png", "0.jpg", "0.bmp", "train.csv", "test.csv"


def _read_data(folder: Path) -> None:
    data = ImageTableData(8, root=str(folder), batch_size=4, mean=[0.5], std=[0.5], seed=0)
    data.prepare_data()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for _ in loader:
            pass


def _make_library(cache: Path) -> Path:
    """Compile the kernel into a cache of its own."""
    cache.mkdir(mode=0o700)
    command = compiling._find_compiler()
    name = f"active-{compiling._digest_sources(command)[:16]}"
    return compiling._compile(command, cache, name)


def _read_library(library: Path, cache: Path) -> None:
    """Load the kernel from a cache, without compiling it anew where that would be done.

    Raises:
        FileError: it would be: the damage is seen.
    """
    compile_kernel, environment = compiling._compile, os.environ.get(compiling.CACHE)

    def refuse(*_: Any) -> Path:
        raise FileError(f"{library} is damaged: it is made again")

    compiling._compile = refuse  # type: ignore[assignment]
    os.environ[compiling.CACHE] = str(cache)
    try:
        compiling._load()
    finally:
        compiling._compile = compile_kernel
        os.environ.pop(compiling.CACHE)
        if environment is not None:
            os.environ[compiling.CACHE] = environment


# --- damages --------------------------------------------------------------------------------------


def _flip(content: bytes, random: Random) -> bytes:
    changed = bytearray(content)
    changed[random.randrange(len(changed))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _cut(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def _swap(content: bytes, random: Random) -> bytes:
    a, b = sorted(random.randrange(len(content)) for _ in range(2))
    return content[b:] + content[a:b] + content[:a]


def _blank(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content))
    length = min(random.choice((1, 16, 512)), len(content) - start)
    return content[:start] + bytes(length) + content[start + length :]


def _append(content: bytes, random: Random) -> bytes:
    return content + random.randbytes(random.choice((1, 64)))


def _invent(content: bytes, random: Random) -> bytes:
    return random.randbytes(random.choice((1, 100, 5000)))


DAMAGES: dict[str, Callable[[bytes, Random], bytes]] = {
    "a bit flipped": _flip,
    "cut": _cut,
    "parts swapped": _swap,
    "a part blank": _blank,
    "more at its end": _append,
    "other bytes": _invent,
    "hostile": lambda content, random: content,
}


class _Call:
    """Write a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _make_hostile_pickle(random: Random, marker: Path) -> bytes:
    buffer = io.BytesIO()
    payload = {"state_dict": {}, "callbacks": _Call(marker)}
    if random.random() < 0.5:
        torch.save(payload, buffer)
        return add_digest(buffer.getvalue())
    pickle.dump(payload, buffer)
    return buffer.getvalue()


def _make_hostile_config(random: Random, marker: Path) -> bytes:
    call: dict[str, Any] = {"_target_": random.choice(CALLS), "command": f"mkdir {marker}", "f": str(marker)}
    if random.random() < 0.3:
        call["_partial_"] = True
    if random.random() < 0.3:
        call = {"_target_": "hydra.utils.call", "config": call}
    content: dict[str, Any] = {"name": "x", "seed": 0, "run": ".", "choices": {"data": "x", "model": "x"}}
    places = ("data", "model", "optimizer", "trainer", "callbacks")
    content |= {place: {"_target_": "elastic.data.Digits"} for place in places}
    place = random.choice(places)
    content[place] = random.choice([call, {"_target_": "elastic.data.Digits", "root": [call]}, {"a": call}])
    return json.dumps(content).encode()


def _make_hostile_rows(random: Random, marker: Path) -> bytes:
    before, after = random.choice([-1, "a", 4]), random.choice([10**9, None, [1]])
    row = {"epoch": 0, "before": before, "after": after, "width": "0"}
    return json.dumps(row).encode() + b"\n"


def _make_hostile_weights(random: Random, marker: Path) -> bytes:
    about = json.dumps({"about": {"switched": {"sets": 10**7}}, "sparse": {"x": [10**9, 10**9]}})
    entry = {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"elastic": about}, "x": entry})
    size = random.choice([len(header), 2**63, 0])
    return size.to_bytes(8, "little") + header.encode() + bytes(4)


def _make_hostile_summary(random: Random, marker: Path) -> bytes:
    return random.choice([b"[]", b"[" * 10**5, b'{"weights": 3}', b"null"])


def _make_hostile_table(random: Random, marker: Path) -> bytes:
    path = random.choice(["\0", "a" * 5000, "/dev/zero", "/proc/self/mem", "..", '"0.png\n\nx"', "é", "-"])
    label = random.choice(["a", '"a\nb"', "", "\0", "x" * 10**5])
    return f"path,label\n0.png,a\n1.png,b\n{path},{label}\n".encode()


def _make_hostile_image(random: Random, marker: Path) -> bytes:
    """Say of an image that it is huge, or something else."""
    if random.random() < 0.5:
        return random.choice([b"GIF89a" + b"\xff" * 20, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
    size = random.choice([10**4, 10**5, 2**31 - 1])
    header = b"IHDR" + size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    crc = zlib.crc32(header).to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + crc
