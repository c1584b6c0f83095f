"""Serve requests with a deadline while another process loads the CPU: is the elastic model best?

    python -m experiments.serve run=<folder> [batch=32] [deadline=1.3] [seconds=3] [repeats=5]
        [csv=<file>] [figure=<png>] [markdown=<file>]

A stream of images from the test split comes at a fixed rate, a batch as soon as the last one is due. The same
stream is served by the network whose level `elastic.Runtime` chooses; by the smallest level, and what it is
not sure of by the largest while there is time (`elastic.levels.RefiningRuntime`); and by each level alone.
All run on one core, which a busy process shares with them in every other phase of so many seconds. What
counts is the part of all images that is classified right and in time.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from elastic.data import ImageData
from elastic.errors import FileError
from elastic.experiments.tools.environment import silence
from elastic.experiments.tools.errors import run
from elastic.experiments.tools.figure import check_picture
from elastic.experiments.tools.options import call
from elastic.experiments.tools.per_image import read_test_batches
from elastic.experiments.tools.restore import restore
from elastic.experiments.tools.runtime_figures import draw_serving
from elastic.experiments.tools.tables import (
    check_targets,
    format_markdown,
    format_spread,
    print_table,
    write_between_marks,
    write_csv,
)
from elastic.levels import Late, RefiningRuntime, Runtime, make_alone
from elastic.ranges import Count, Positive

PHASES = (False, True, False, True, False)  # whether the busy process runs
REQUESTS = 100  # different batches, at most
SCORES = ("right in time", "in time", "accuracy in time")
Batches = list[tuple[Tensor, Tensor]]
# Answers a batch within so many milliseconds and says by which level, or raises `Late`.
Server = Callable[[Tensor, float], tuple[Tensor, int]]


@dataclass(frozen=True)
class Answer:
    """Hold the answer to one request.

    Attributes:
        arrival_s: when the request came.
        loaded: whether the busy process ran.
        level: that answered.
        accuracy: part of the images that were classified right.
        latency_ms: from the request's arrival.
        in_time: whether the deadline was met.
    """

    arrival_s: float
    loaded: bool
    level: int
    accuracy: float
    latency_ms: float
    in_time: bool


Answers = list[Answer]


def serve_stream(
    run: Path,
    batch: Count = 32,
    deadline: Positive = 1.3,
    seconds: Positive = 3.0,
    repeats: Count = 5,
    csv: Path | None = None,
    figure: Path | None = None,
    markdown: Path | None = None,
) -> None:
    """Serve a stream of images by the elastic network and by each of its levels, and show who is best.

    Args:
        run: the folder of a finished run with levels.
        batch: images of a request.
        deadline: relative to what the whole network takes on an idle core.
        seconds: of each phase.
        repeats: of the whole comparison.
        csv: a table to write.
        figure: a picture to draw.
        markdown: a text to put the table into, between marks that name the deadline.

    Raises:
        FileError: there is no such run, it has no levels, or the table cannot be written.
    """
    check_targets(name := f"serve deadline={deadline:g}", csv, markdown)
    check_picture(figure)
    torch.set_num_threads(1)
    finished = restore(run).reject_modules().require_classes()
    if len(finished.network) == 1:
        raise FileError(f"{run} holds a network without levels: train some with schedule=joint")
    _keep_to_one_core()
    batches = read_requests(finished.data, batch)
    levels = [make_alone(level, batches[0][0]) for level in finished.network.nets]
    answers = run_servers(levels, batches, deadline, seconds, repeats)
    scores = {name: [score(repeat) for repeat in of_server] for name, of_server in answers.items()}
    head = ["server", *(f"{name} (%)" for name in SCORES)]
    rows = [
        [name, *(format_spread([100 * part for part in parts]) for parts in zip(*of_server, strict=True))]
        for name, of_server in scores.items()
    ]
    print_table(head, rows)
    if markdown is not None:
        write_between_marks(markdown, name, format_markdown(head, rows))
    if csv is not None:
        write_csv(csv, ("server", "repeat", *SCORES), _list_rows(scores))
    if figure is not None:
        accuracies = {name: [values[0] for values in of_server] for name, of_server in scores.items()}
        draw_serving(answers["elastic"][0], accuracies, figure)


def _keep_to_one_core() -> None:
    """Keep this process, and those that it starts, to one core, where the system allows that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def _list_rows(scores: Mapping[str, Sequence[tuple[float, ...]]]) -> Iterator[list[object]]:
    """List what each server has come to in each repeat."""
    for name, of_server in scores.items():
        for i, values in enumerate(of_server):
            yield [name, i, *(f"{value:.4f}" for value in values)]


def read_requests(data: ImageData, batch: int) -> Batches:
    """Read batches of the test split, as the network takes them."""
    data.batch_size = batch
    return [(x_BCHW, y_B) for x_BCHW, y_B in read_test_batches(data) if len(y_B) == batch][:REQUESTS]


@contextmanager
def start_rival() -> Iterator[Callable[[bool], None]]:
    """Start a busy process on this process's core; yield what lets it run or stops it."""
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        rival.send_signal(signal.SIGSTOP)
        yield lambda on: rival.send_signal(signal.SIGCONT if on else signal.SIGSTOP)
    finally:
        rival.kill()
        rival.wait()


def run_servers(
    levels: Sequence[nn.Module], batches: Batches, deadline: float, seconds: float, repeats: int
) -> dict[str, list[Answers]]:
    """Answer the stream by every server in every repeat, the servers in turn.

    Args:
        deadline: relative to what the whole network takes on an idle core.
    """
    example = batches[0][0]
    runtimes = {"elastic": Runtime(levels, example), "refining": RefiningRuntime(levels, example)}
    runtimes |= {f"level {k}": Runtime([level], example) for k, level in enumerate(levels)}
    deadline_ms = deadline * runtimes["elastic"].costs[-1].latency_ms
    answers: dict[str, list[Answers]] = {name: [] for name in runtimes}
    with start_rival() as load:
        for _ in range(repeats):
            for name, runtime in runtimes.items():
                runtime.within(latency_ms=max(deadline_ms, runtime.costs[0].latency_ms))
                answers[name].append(answer_stream(runtime.answer, batches, deadline_ms / 1e3, seconds, load))
    return answers


def answer_stream(
    server: Server,
    batches: Batches,
    deadline_s: float,
    seconds: float,
    load: Callable[[bool], None],
) -> Answers:
    """Answer requests through all phases; one that a server gives up is not in time."""
    answers: Answers = []
    begin, k = time.perf_counter(), 0
    for i in range(int(len(PHASES) * seconds / deadline_s)):
        arrival_s = i * deadline_s
        loaded = PHASES[int(arrival_s / seconds)]
        load(loaded)
        while (now := time.perf_counter() - begin) < arrival_s:
            time.sleep(min(1e-3, arrival_s - now))
        x_BCHW, y_B = batches[i % len(batches)]
        left_s, accuracy, is_answered = arrival_s + deadline_s - now, 0.0, False
        with suppress(Late):
            y_BK, k = server(x_BCHW, 1e3 * left_s)
            accuracy, is_answered = float((y_BK.argmax(1) == y_B).float().mean()), True
        latency_s = time.perf_counter() - begin - arrival_s
        in_time = is_answered and latency_s <= deadline_s
        answers.append(Answer(arrival_s, loaded, k, accuracy, 1e3 * latency_s, in_time))
    return answers


def score(answers: Answers) -> tuple[float, float, float]:
    """Compute the parts of the images that are right in time, in time, and right where in time."""
    in_time = [answer for answer in answers if answer.in_time]
    accuracy = sum(answer.accuracy for answer in in_time)
    return accuracy / len(answers), len(in_time) / len(answers), accuracy / max(1, len(in_time))


def main() -> None:
    silence()
    call(serve_stream)


if __name__ == "__main__":
    run(main)
