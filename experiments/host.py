"""Answer requests over HTTP: `python -m experiments.host source=<file, folder or name> [deadline=20]`.

LitServe (extra `serve`) takes the requests, and the largest level that is expected to meet the deadline on
this machine, as it is loaded now, answers. `POST /predict` takes
`{"images": [<base64 of an image file>, …]}`.
"""

from typing import Annotated

from elastic.errors import FileError
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.options import call
from elastic.files.zoo import find_file
from elastic.ranges import Count, Positive, Range


def host_network(
    source: str,
    port: Annotated[int, Range(1, 65535)] = 8000,
    deadline: Positive = 20.0,
    level: int | None = None,
    images: Count = 1,
) -> None:
    """Answer requests over HTTP on this machine alone, until it is stopped.

    Args:
        source: of the network: a file, a folder, or a name of the zoo.
        port: of 127.0.0.1.
        deadline: of a request's computation, in milliseconds.
        level: that always answers, 0 being the smallest; by default the deadline decides.
        images: that a request usually has.

    Raises:
        FileError: there is no such network, or the extra is missing.
    """
    path = find_file(source)
    try:
        import litserve

        from elastic.experiments.tools.levels_api import LevelsAPI
    except ImportError as error:
        raise FileError(f"{error.name} is not installed: install the extra `serve`") from error
    api = LevelsAPI(str(path), deadline, level, images)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1", port=port, log_level="warning", generate_client_file=False, num_api_servers=1
    )


def main() -> None:
    silence()
    call(host_network)


if __name__ == "__main__":
    run(main)
