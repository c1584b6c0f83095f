"""Requests with a deadline while another process loads and releases the CPU: is the elastic model best?

    python -m experiments.serve run=<folder> [batch=32] [deadline=1.3] [seconds=3] [repeats=5]
        [csv=<file>] [figure=<png>]

A stream of images from the test split comes at a fixed rate, a batch as soon as the last one is due. The same
stream is served by the network whose level `elastic.runtime.Runtime` chooses, and by each level alone; all on
one core, which a busy process shares with them in every other phase of so many seconds. What counts is the
part of all images that is classified right and in time.
"""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from csv import writer as write_rows
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from elastic.data import ImageData
from elastic.errors import TrainingError
from elastic.experiments.tools.figure import draw_serving
from elastic.experiments.tools.per_image import batches
from elastic.experiments.tools.restore import restore_plain
from elastic.experiments.tools.setup import quiet, run
from elastic.levels.nested import Levels
from elastic.levels.runtime import Runtime

PHASES = (False, True, False, True, False)  # whether the rival runs
Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Answer:
    """To one request: when it came (s), whether the rival ran, the level, how long it took (ms)."""

    came_s: float
    loaded: bool
    level: int
    right: float
    took_ms: float
    met: bool


@contextmanager
def rival() -> Iterator[Callable[[bool], None]]:
    """A busy process on this process's core; gives what lets it run or stops it."""
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        busy.send_signal(signal.SIGSTOP)
        yield lambda on: busy.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
    finally:
        busy.kill()
        busy.wait()


def stream(
    serve: Callable[[Tensor], Tensor],
    level: Callable[[], int],
    batches: Batches,
    deadline_s: float,
    seconds: float,
    load: Callable[[bool], None],
) -> list[Answer]:
    """Serve requests through all phases; one that is past its deadline before its turn is dropped."""
    answers = []
    begin = time.perf_counter()
    for i in range(int(len(PHASES) * seconds / deadline_s)):
        came = i * deadline_s
        loaded = PHASES[int(came / seconds)]
        load(loaded)
        while (now := time.perf_counter() - begin) < came:
            time.sleep(min(1e-3, came - now))
        x_BCHW, y_B = batches[i % len(batches)]
        k, right = level(), 0.0
        served = now < came + deadline_s
        if served:
            right = float((serve(x_BCHW).argmax(1) == y_B).float().mean())
        took_s = time.perf_counter() - begin - came
        answers.append(Answer(came, loaded, k, right, 1e3 * took_s, served and took_s <= deadline_s))
    return answers


def compete(
    levels: Levels, batches: Batches, deadline: float, seconds: float, repeats: int
) -> dict[str, list]:
    """The answers of every server in every repeat, the servers in turn.

    Args:
        deadline: relative to what the whole network takes on an idle core.
    """
    serve = Runtime(levels, batches[0][0])
    deadline_ms = deadline * serve.costs[-1].latency_ms
    found: dict[str, list[list[Answer]]] = {}
    with rival() as load:
        for _ in range(repeats):
            for name in ("elastic", *(f"level {k}" for k in range(len(levels)))):
                if name == "elastic":
                    serve.within(latency_ms=deadline_ms)
                else:
                    serve.within(memory_mb=serve.costs[int(name[-1])].memory_mb)
                answers = stream(serve, lambda: serve.level, batches, deadline_ms / 1e3, seconds, load)
                found.setdefault(name, []).append(answers)
    return found


def score(answers: list[Answer]) -> tuple[float, float, float]:
    """Parts of the images: right in time, in time, and right where in time."""
    met = [answer for answer in answers if answer.met]
    right = sum(answer.right for answer in met)
    return right / len(answers), len(met) / len(answers), right / max(1, len(met))


def images(data: ImageData, batch: int, count: int) -> Batches:
    """Batches of the test split, as the network takes them."""
    data.batch_size = batch
    return [(x_BCHW, y_B) for x_BCHW, y_B in batches(data) if len(y_B) == batch][:count]


def serve_stream(
    run: Path,
    batch: int = 32,
    deadline: float = 1.3,
    seconds: float = 3.0,
    repeats: int = 5,
    csv: Path | None = None,
    figure: Path | None = None,
) -> None:
    """Serve a stream of images by the elastic network and by each of its levels, and show who is best.

    Args:
        batch: images of a request.
        deadline: relative to what the whole network takes on an idle core.
        seconds: of each phase.
        repeats: of the whole comparison.
        csv: a table to write.
        figure: a picture to draw.
    """
    torch.set_num_threads(1)
    net, data = restore_plain(run)
    if not isinstance(net, Levels):
        raise TrainingError(f"{run} holds a network without levels: train some with schedule=joint")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found = compete(net, images(data, batch, 100), deadline, seconds, repeats)

    table = Table("server", "right in time (%)", "in time (%)", "accuracy in time (%)")
    rows = [(name, i, *score(answers)) for name, runs in found.items() for i, answers in enumerate(runs)]
    for name in found:
        columns = list(zip(*(row[2:] for row in rows if row[0] == name), strict=True))
        table.add_row(name, *(_shown(column) for column in columns))
    Console().print(table)
    if csv is not None:
        with csv.open("w", newline="") as file:
            writer = write_rows(file, lineterminator="\n")
            writer.writerow(["server", "repeat", "right in time", "in time", "accuracy in time"])
            writer.writerows([name, i, *(f"{value:.4f}" for value in values)] for name, i, *values in rows)
    if figure is not None:
        scores = {name: [row[2] for row in rows if row[0] == name] for name in found}
        draw_serving(found["elastic"][0], scores, figure)


def _shown(values: tuple[float, ...]) -> str:
    sd = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.2f} ± {100 * sd:.2f}"


def main() -> None:
    quiet()
    given = OmegaConf.from_dotlist(sys.argv[1:])
    numbers, files = ("batch", "deadline", "seconds", "repeats"), ("csv", "figure")
    if "run" not in given or set(given) - {*numbers, *files, "run"}:
        raise TrainingError(
            f"usage: {(__doc__ or '').strip().partition(chr(10) * 2)[2].strip().splitlines()[0]} …"
        )
    options = {name: given[name] for name in numbers if name in given}
    paths = {name: Path(str(given[name])) for name in files if name in given}
    serve_stream(Path(str(given.run)), **options, **paths)


if __name__ == "__main__":
    run(main)
