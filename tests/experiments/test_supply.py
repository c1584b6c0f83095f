"""Licences: each part counts, one of several to choose from will do, and what is unknown is no licence."""

import subprocess
import sys

import pytest

from elastic.experiments.tools.trials.supply import classify, find_distributions


@pytest.mark.parametrize(
    ("licence", "kind"),
    [
        ("MIT License", "free"),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "free"),
        ("MPL-2.0 AND MIT", "its changed files stay open"),
        ("GPL-3.0-only OR MIT", "free"),
        ("MIT AND GPL-3.0-only", None),
        ("GNU Lesser General Public License v3", None),
        ("Permitted to some", None),
        ("none, by None", None),
    ],
)
def test_licences(licence: str, kind: str | None) -> None:
    assert classify(licence) == kind


def test_what_is_needed_is_found_to_the_end() -> None:
    assert {"elastic-cnn", "torch", "lightning", "markupsafe"} <= find_distributions()


@pytest.mark.slow
@pytest.mark.parametrize(("host", "code"), [("192.0.2.1", 1), ("127.0.0.1", 0)])
def test_a_connection_to_another_machine_is_seen(host: str, code: int) -> None:
    program = (
        "import socket, contextlib\n"
        "from elastic.experiments.tools.trials.supply import forbid_network\n"
        "forbid_network()\n"
        "with contextlib.suppress(ConnectionRefusedError):\n"
        f"    socket.create_connection(('{host}', 9), timeout=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == code and ("cut off" in done.stderr) == bool(code)
