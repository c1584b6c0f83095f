"""Damage the files of a run, and put hostile ones in their place: all is named, nothing is called."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from elastic.errors import ElasticError
from elastic.experiments.tools.folders import CHECKPOINT, CONFIG, SUMMARY, find_checkpoint, load_config
from elastic.experiments.tools.restore import WEIGHTS, restore
from elastic.experiments.tools.trials import Part
from elastic.training.checkpoints import add_digest
from elastic.training.timeline import read_timeline

CLAIM = "named in one line, and nothing executed; of weights and checkpoints every damage"
TIMELINE = "timeline.jsonl"
SILENT = "read, it says something else"
SEALED = (WEIGHTS, CHECKPOINT)  # files with a digest
CALLS = ("os.system", "builtins.exec", "torch.load", "torch.hub.load", "subprocess.run", "joblib.load")


def try_files(part: Part, trials: int, random: Random, run: Path, folder: Path) -> None:
    """Damage a file of a finished run in each trial, and read it.

    Args:
        run: the folder of the run.
        folder: for copies of its files, which a trial changes.
    """
    folder.mkdir()
    names = (WEIGHTS, CHECKPOINT, CONFIG, SUMMARY, TIMELINE)
    for name in names:
        shutil.copy(run / name, folder)
    cfg = load_config(run)
    marker = folder / "called"
    for _ in range(trials):
        name = random.choice((*SEALED, *names))
        kind = random.choice(list(DAMAGES))
        content = (run / name).read_bytes()
        damaged = HOSTILE[name](random, marker) if kind == "hostile" else DAMAGES[kind](content, random)
        if damaged == content:
            continue
        (folder / name).write_bytes(damaged)
        outcome = _try_once(name, folder, cfg)
        if marker.exists():
            outcome = "executed"
            marker.rmdir()
        # Text may say something else that can be; what has a digest may not.
        if outcome == "named" or (outcome == SILENT and name not in SEALED):
            part.count(f"{name}: {outcome}")
        else:
            part.fail(f"{name}, {kind}: {outcome}")
        (folder / name).write_bytes(content)


def _try_once(name: str, folder: Path, cfg: Any) -> str:
    """Read a file that is damaged, and return how that ends."""
    try:
        _read(name, folder, cfg)
    except ElasticError as error:
        return "named" if "\n" not in str(error) else f"more than a line, {error}"
    except Exception as error:
        return f"{type(error).__name__} {error}"
    return SILENT


def _read(name: str, folder: Path, cfg: Any) -> None:
    if name == CHECKPOINT:
        find_checkpoint(folder, cfg)
    elif name == TIMELINE:
        read_timeline(folder / name)
    else:
        restore(folder)


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


HOSTILE: dict[str, Callable[[Random, Path], bytes]] = {
    WEIGHTS: _make_hostile_weights,
    CHECKPOINT: _make_hostile_pickle,
    CONFIG: _make_hostile_config,
    SUMMARY: lambda random, marker: random.choice([b"[]", b"[" * 10**5, b'{"weights": 3}', b"null"]),
    TIMELINE: _make_hostile_rows,
}
