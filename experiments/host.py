"""Answer requests over HTTP: `python -m experiments.host source=<file, folder or name> [deadline=20]`.

LitServe (extra `serve`) takes the requests, and the largest level that is expected to meet the deadline on
this machine, as it is loaded now, answers; with `refine=true` the smallest does, and while there is time the
largest answers again what it is least sure of. `POST /predict` takes
`{"images": [<base64 of an image file>, …]}`.
"""

import multiprocessing
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

from elastic.errors import FileError, OptionError
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.experiments.tools.signals import SIGNALS
from elastic.files.zoo import find_file
from elastic.ranges import Count, Positive, Range


def host_network(
    source: str,
    port: Annotated[int, Range(1024, 65535)] = 8000,
    deadline: Positive = 20.0,
    level: int | None = None,
    images: Count = 1,
    refine: bool = False,
) -> None:
    """Answer requests over HTTP on this machine alone, until it is stopped.

    Args:
        source: of the network: a file, a folder, or a name of the zoo.
        port: of 127.0.0.1.
        deadline: of a request's computation, in milliseconds.
        level: that always answers, 0 being the smallest; by default the deadline decides.
        images: that a request usually has.
        refine: let the smallest level answer, and the largest what it is least sure of while there is time.

    Raises:
        FileError: there is no such network, it does not say what is needed, or the extra is missing.
        OptionError: there is no such level, one alone has nothing to refine, or the port is taken.
    """
    path = find_file(source)
    try:
        import litserve

        from elastic.experiments.tools.levels_api import LevelsAPI, read_levels
    except ImportError as error:
        raise FileError(f"{error.name} is not installed: install the extra `serve`") from error
    # This says what is wrong, before a process of the server's does at length.
    levels, _ = read_levels(str(path), level)
    if refine and len(levels) == 1:
        raise OptionError("refine=true takes two levels, and there is one to answer: leave it out")
    check_port(port)
    api = LevelsAPI(str(path), deadline, level, images, refine)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    with end_children():
        server.run(
            host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, num_api_servers=1
        )


def check_port(port: int) -> None:
    """Refuse a port that another program listens at.

    Raises:
        OptionError: one does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            cause = f"port={port} cannot be listened at ({error.strerror})"
            raise OptionError(f"{cause}: name another") from error


@contextmanager
def end_children() -> Iterator[None]:
    """Let no process outlive its server on a signal: LitServe would wait for them, and they for it."""

    def end(number: int, frame: FrameType | None) -> None:
        kill_children()
        handler = before[number]
        if not callable(handler):
            os._exit(128 + number)
        handler(number, frame)

    before: dict[int, Any] = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        kill_children()
        for number, handler in before.items():
            signal.signal(number, handler)


def kill_children() -> None:
    """Kill the processes that this one has started."""
    for child in multiprocessing.active_children():
        child.kill()


def main() -> None:
    silence()
    call(host_network)


if __name__ == "__main__":
    run(main)
