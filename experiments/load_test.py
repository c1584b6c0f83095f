"""Send requests over HTTP to an elastic network and to each of its levels, while the machine is loaded.

    python -m experiments.load_test source=<file, folder or zoo name> [deadline=80] [rate=10] [seconds=3]

Each server, see `experiments.host`, runs on one core, which a busy process shares in every other phase of so
many seconds. Requests of test images come at a fixed rate, whether or not others have been answered. The
table tells what is right in time, the latency of the answers, and how many were lost.
"""

import base64
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from torchvision.transforms.functional import to_pil_image

import elastic
from elastic.data import ImageData
from elastic.errors import FileError
from elastic.experiments.formats import make_data
from elastic.experiments.serve import start_rival
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.tables import check_places, print_table, write_csv
from elastic.files.zoo import find_file
from elastic.ranges import Count, Positive

PHASES = (False, True, False)  # whether the busy process runs
START_S, ANSWER_S = 180.0, 30.0  # how long a server may take to start, and to answer
COMPUTED = 0.5  # part of the deadline for computation; the rest is for the way
CLIENTS = 32
PERCENTILES = (50, 95, 99)
TIMES = tuple(f"p{percent} (ms)" for percent in PERCENTILES)
HEAD = ("server", "right in time (%)", "in time (%)", *TIMES, "levels", "requests", "lost")
Switch = Callable[[bool], None]
Requests = Sequence[tuple[bytes, list[int]]]  # body and labels


@dataclass(frozen=True)
class Reply:
    """Hold what became of a request: accuracy and level are of an answer; there is none if it was lost."""

    latency_ms: float
    accuracy: float = 0.0
    level: int | None = None


def send_load(
    source: str,
    deadline: Positive = 80.0,
    rate: Positive = 10.0,
    seconds: Positive = 3.0,
    images: Count = 8,
    csv: Path | None = None,
) -> None:
    """Send requests to an elastic network and to each of its levels, and show how they are answered.

    Args:
        source: of the network: a file, a folder, or a name of the zoo.
        deadline: of an answer, in milliseconds.
        rate: requests a second.
        seconds: of each phase.
        images: of a request.
        csv: a table to write.

    Raises:
        FileError: there is no such network, the extra `serve` is missing, or a server does not start.
    """
    check_places(csv)
    network = elastic.load(source)
    name = network.about.get("made", {}).get("data")
    if name is None:
        raise FileError(f"{source} does not say its data, made.data: name a run's network, or one of the zoo")
    requests = make_requests(make_data(name), images)
    rows = []
    for name, options in list_servers(len(network)).items():
        with start_server(source, deadline * COMPUTED, images, **options) as (port, load):
            rows.append([name, *score(send_stream(port, requests, rate, seconds, load), deadline)])
    print_table(HEAD, rows, width=120)
    if csv is not None:
        write_csv(csv, HEAD, rows)


def list_servers(levels: int) -> dict[str, dict[str, int]]:
    """List the servers of a network with so many levels: options of `experiments.host` by name."""
    servers: dict[str, dict[str, int]] = {"elastic": {}}
    if levels > 1:
        servers["refining"] = {"refine": True}
    return servers | {f"level {k}": {"level": k} for k in range(levels)}


def make_requests(data: ImageData, images: int) -> Requests:
    """Make requests of the first test images."""
    data.setup()
    assert data.test_set is not None
    requests = []
    count = min(len(data.test_set), 50 * images)
    for start in range(0, count, images):
        x_BCHW, y_B = data.test_set.__getitems__(range(start, min(start + images, count)))
        bodies = []
        for x_CHW in x_BCHW:
            file = io.BytesIO()
            to_pil_image(x_CHW).save(file, "PNG")
            bodies.append(base64.b64encode(file.getvalue()).decode())
        requests.append((json.dumps({"images": bodies}).encode(), y_B.tolist()))
    return requests


@contextmanager
def start_server(source: str, deadline: float, images: int, **further: int) -> Iterator[tuple[int, Switch]]:
    """Start a server and a busy process, which is stopped, on one core; yield a port and its switch."""
    port = _find_port()
    options = {"source": find_file(source), "port": port, "deadline": deadline, "images": images, **further}
    words = [f"{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-W", "ignore", "-m", "elastic.experiments.host", *words]
    with keep_to_core() as spread, tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT)
        try:
            with start_rival() as load:
                spread()
                _wait(server, port, log)
                yield port, load
        finally:
            with suppress(ProcessLookupError):  # it may have ended, which is told
                os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@contextmanager
def keep_to_core() -> Iterator[Callable[[], None]]:
    """Start processes on the last core meanwhile, where the system allows that.

    Yields:
        what takes this process itself to the other cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield lambda: None
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield lambda: os.sched_setaffinity(0, cores - {max(cores)} or cores)
    finally:
        os.sched_setaffinity(0, cores)


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(server: "subprocess.Popen[bytes]", port: int, log: IO[bytes]) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except OSError:
            time.sleep(0.2)
    log.seek(0)
    *_, last = ["no word of it", *log.read().decode().splitlines()]
    outcome = (
        f"has not started within {START_S:.0f} s" if server.poll() is None else "has ended as it started"
    )
    raise FileError(f"the server {outcome}: {last}")


def send_stream(port: int, requests: Requests, rate: float, seconds: float, load: Switch) -> list[Reply]:
    """Send requests at a fixed rate through all phases, and gather what became of them."""
    begin, futures = time.perf_counter(), []
    with ThreadPoolExecutor(CLIENTS) as clients:
        for i in range(int(len(PHASES) * seconds * rate)):
            arrival_s = begin + i / rate
            load(PHASES[int(i / rate / seconds)])
            time.sleep(max(0.0, arrival_s - time.perf_counter()))
            futures.append(clients.submit(_send, port, *requests[i % len(requests)], arrival_s))
        return [future.result() for future in futures]


def _send(port: int, body: bytes, labels: list[int], arrival_s: float) -> Reply:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/predict", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_S) as response:
            answer = json.load(response)
    except (OSError, ValueError):
        return Reply(1e3 * (time.perf_counter() - arrival_s))
    accuracy = statistics.mean(float(a == b) for a, b in zip(answer["labels"], labels, strict=True))
    return Reply(1e3 * (time.perf_counter() - arrival_s), accuracy, answer["level"])


def score(replies: Sequence[Reply], deadline: float) -> list[str]:
    """Compute the cells of a row behind the server's name."""
    answers = [reply for reply in replies if reply.level is not None]
    in_time = [reply for reply in answers if reply.latency_ms <= deadline]
    accuracy = sum(reply.accuracy for reply in in_time) / len(replies)
    latencies = sorted(reply.latency_ms for reply in answers)
    ranks = [min(len(latencies) - 1, len(latencies) * percent // 100) for percent in PERCENTILES]
    levels = sorted({str(reply.level) for reply in answers})
    return [
        f"{100 * accuracy:.1f}",
        f"{100 * len(in_time) / len(replies):.1f}",
        *(f"{latencies[rank]:.1f}" if latencies else "–" for rank in ranks),
        " ".join(levels),
        str(len(replies)),
        str(len(replies) - len(answers)),
    ]


def main() -> None:
    silence()
    call(send_load)


if __name__ == "__main__":
    run(main)
