"""Look at what the library stands on: licences that go with its own, and a run without a network."""

import importlib.metadata as metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

from packaging.requirements import Requirement

from elastic.experiments.tools.trials import Part

CLAIM = "a licence that goes with ours, and a run that asks no network"
OURS = "elastic-cnn"
# What may be used, and passed on, beside a program under Apache-2.0, by words of licences' names.
FREE = (
    "MIT",
    "BSD",
    "0BSD",
    "APACHE",
    "ISC",
    "ZLIB",
    "CC0",
    "PSF",
    "CNRI",  # of Python, too
    "PYTHON SOFTWARE FOUNDATION",
    "BSL",
    "KIWI",
)
WEAK = ("MPL", "MOZILLA PUBLIC LICENSE")  # as long as its files are not changed
NVIDIA = ("NVIDIA",)  # libraries that torch's builds for GPUs bring; not passed on with this package
OTHER, NAMELESS = "Other/Proprietary License", (None, "", "UNKNOWN")  # which say nothing
LOCAL = ("127.0.0.1", "::1", "localhost")
RUN = ("experiment=smoke", "trainer.max_epochs=1", "callbacks.progress=null")


def try_supply(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Look up the licence of each distribution that is needed here; train with the network cut off, once."""
    for name in sorted(find_distributions()):
        licence = find_licence(metadata.distribution(name))
        kind = classify(licence)
        part.count(f"licence: {kind}") if kind else part.fail(
            f"{name}: licence '{licence}' is not on the list"
        )
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", __name__, *RUN, f"run={folder / 'run'}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        part.fail(f"a run without a network: {process.stderr.strip().splitlines()[-1:]}")
    else:
        part.count("a run without a network")


def find_distributions(name: str = OURS) -> set[str]:
    """Find all distributions that this one needs with its extras, as far as they are installed."""
    names, waiting = set(), [name]
    ours = metadata.distribution(name).metadata.get_all("Provides-Extra") or []
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.add(name)
        waiting += _list_installed(name, ours if name == OURS else [])
    return names


def _list_installed(name: str, extras: list[str]) -> Iterator[str]:
    for text in metadata.distribution(name).requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        try:
            yield metadata.distribution(requirement.name).metadata["Name"].lower()
        except metadata.PackageNotFoundError:
            continue


def find_licence(distribution: metadata.Distribution) -> str:
    """Find the name of a licence: as an expression, else as a classifier, else what the text begins with."""
    fields: Any = distribution.metadata  # a message, though its type does not say so
    classifiers = [
        line.rpartition("::")[2].strip()
        for line in fields.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    candidates = (
        fields.get("License-Expression"),
        " OR ".join(line for line in classifiers if line != OTHER),
        fields.get("License"),
        _read_licence(distribution),
    )
    return next(
        (licence for licence in candidates if licence not in NAMELESS),
        f"none, by {fields['Author'] or fields['Author-email']}",
    )[:200]


def _read_licence(distribution: metadata.Distribution) -> str | None:
    for file in distribution.files or []:
        if file.name.upper().startswith(("LICEN", "COPYING", "EULA")) and ".dist-info" in str(file):
            return " ".join(file.read_text().split())[:200]
    return None


def classify(licence: str) -> str | None:
    """Classify a licence: all parts of "A AND B" count, one of "A OR B" will do."""
    kinds = [
        next((kind for choice in choices if (kind := _classify_one(choice))), None)
        for choices in (re.split(r"\bOR\b", all_of) for all_of in re.split(r"\bAND\b", licence))
    ]
    order = ("free", "its changed files stay open", "NVIDIA's own")
    return None if None in kinds else max((kind for kind in kinds if kind), key=order.index)


def _classify_one(licence: str) -> str | None:
    words = licence.upper()
    for names, kind in ((WEAK, "its changed files stay open"), (NVIDIA, "NVIDIA's own"), (FREE, "free")):
        if any(re.search(rf"\b{name}\b", words) for name in names):
            return kind
    return None


def forbid_network() -> None:
    """Raise where this process connects to another machine, or asks for one's address."""

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.getaddrinfo" and arguments[0] not in (None, *LOCAL):
            raise PermissionError(f"the network is cut off: {event} {arguments[0]}")
        if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in LOCAL:
            raise PermissionError(f"the network is cut off: {event} {arguments[1]}")

    sys.addaudithook(look)


if __name__ == "__main__":
    forbid_network()
    from elastic.experiments.train import main

    main()
