"""A run with levels, and what the entry points make of it: export, serve, compare."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elastic.experiments.compare
import elastic.experiments.export
import elastic.experiments.serve
from elastic.experiments import serve
from elastic.experiments.serve import PHASES, Answer, answer_stream, score
from elastic.experiments.tools.restore import restore
from elastic.experiments.train import train
from elastic.levels import Late
from tests.fitted import EXACT, command
from tests.runs import configure

Fixtures = tuple[pytest.MonkeyPatch, pytest.CaptureFixture[str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint-seed0")
    given = (*EXACT, "schedule=joint", "callbacks.joint.fractions=[0.5]")
    train(configure(folder, *given), folder)
    return folder


@pytest.fixture
def fixtures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fixtures:
    return monkeypatch, capsys


@pytest.mark.sampled(1)
@pytest.mark.parametrize("level", [0, 1, None])
def test_a_level_is_exported_as_it_is_in_its_network(
    finished: Path, tmp_path: Path, fixtures: Fixtures, level: int | None
) -> None:
    chosen = [] if level is None else [f"level={level}"]
    code, out, err = command(
        elastic.experiments.export.main, *fixtures, f"run={finished}", f"to={tmp_path / 'net.pt2'}", *chosen
    )
    assert code == 0 and not err and out.startswith(f"{tmp_path / 'net.pt2'}: ")
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        expected = restore(finished).network.run(x, level)
        found = torch.export.load(tmp_path / "net.pt2").module()(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["to=net.pt2", "level=2"], "there is no level 2: the run's network has 0 … 1"),
        (["to=net.pth"], "name a file that ends in .pt2, .onnx"),
        ([], "name to=…"),
        (["to=net.pt2", "level=core"], "level=core is no whole number"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    finished: Path, tmp_path: Path, fixtures: Fixtures, arguments: list[str], named: str
) -> None:
    fixtures[0].chdir(tmp_path)
    code, out, err = command(elastic.experiments.export.main, *fixtures, f"run={finished}", *arguments)
    assert code == 1 and not out and named in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_levels_are_arms_of_a_comparison(finished: Path, tmp_path: Path, fixtures: Fixtures) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "joint-seed0").symlink_to(finished)
    table = tmp_path / "table.csv"
    code, out, _ = command(elastic.experiments.compare.main, *fixtures, f"runs={runs}/*", f"csv={table}")
    assert code == 0 and "joint level 0" in out
    rows = {row["arm"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert set(rows) == {"joint", "joint level 0"}
    (core, whole) = summary["levels"]
    for arm, expected in (("joint level 0", core), ("joint", whole)):
        assert float(rows[arm]["params mean"]) == expected["params"]
        assert float(rows[arm]["macs mean"]) == expected["macs"]
        assert float(rows[arm]["test/acc mean"]) == pytest.approx(100 * expected["test/acc"], rel=1e-5)


class Clock:
    """Time that passes only where somebody sleeps, loads or answers."""

    def __init__(self) -> None:
        self.now, self.loaded = 0.0, False

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(serve, "time", SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep))
    yield clock


def answered(clock: Clock, takes_s: float, slower: float, deadline_s: float = 0.01) -> list[Answer]:
    """A server that is right half of the time."""
    batches = [(torch.eye(10)[:4], torch.tensor([0, 1, 9, 9]))]

    def answer(x: torch.Tensor, left_ms: float) -> tuple[torch.Tensor, int]:
        assert left_ms <= 1e3 * deadline_s * (1 + 1e-9)
        if left_ms <= 0:
            raise Late(takes_s)
        clock.now += takes_s * (slower if clock.loaded else 1)
        return x, 1

    return answer_stream(answer, batches, deadline_s, 1.0, lambda on: setattr(clock, "loaded", on))


def test_who_is_fast_enough_is_judged_by_accuracy_alone(clock: Clock) -> None:
    answers = answered(clock, takes_s=0.004, slower=2)
    assert len(answers) == 100 * len(PHASES) and all(a.in_time and a.level == 1 for a in answers)
    assert score(answers) == (0.5, 1.0, 0.5)
    assert sum(a.loaded for a in answers) == 100 * sum(PHASES)
    assert {round(a.latency_ms, 6) for a in answers if a.loaded} == {8.0}


def test_who_is_late_under_load_gets_nothing_there(clock: Clock) -> None:
    answers = answered(clock, takes_s=0.008, slower=2)
    idle = [a for a in answers if not a.loaded]
    met = sum(a.in_time for a in idle) / len(idle)
    assert 0.95 < met < 1, "the first after a load wait for what came before"
    assert not any(a.in_time for a in answers if a.loaded), "16 ms for each, one every 10 ms"
    assert score(answers)[0] == pytest.approx(0.5 * met * 3 / 5)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_only_what_is_right_in_time_counts(given: list[tuple[bool, float]]) -> None:
    answers = [Answer(0, False, 0, right, 1.0, met) for met, right in given]
    total, in_time, accuracy = score(answers)
    assert total == pytest.approx(sum(r for m, r in given if m) / len(given))
    assert total == pytest.approx(in_time * accuracy)


@pytest.mark.slow
def test_a_stream_is_served_by_the_elastic_network_and_by_every_level(
    finished: Path, tmp_path: Path, fixtures: Fixtures
) -> None:
    options = ("batch=8", "seconds=0.1", "repeats=2")
    text = tmp_path / "s.md"
    text.write_text(
        "<!-- begin of `elastic serve deadline=1.3` -->\n<!-- end of `elastic serve deadline=1.3` -->\n"
    )
    options += (f"csv={tmp_path / 's.csv'}", f"figure={tmp_path / 's.png'}", f"markdown={text}")
    code, out, err = command(elastic.experiments.serve.main, *fixtures, f"run={finished}", *options)
    assert code == 0 and not err, err
    rows = list(csv.DictReader((tmp_path / "s.csv").read_text().splitlines()))
    assert [row["server"] for row in rows] == [
        n for n in ("elastic", "refining", "level 0", "level 1") for _ in range(2)
    ]
    assert all(0 <= float(row["right in time"]) <= float(row["in time"]) <= 1 for row in rows)
    assert all(f"| {name} |" in text.read_text() for name in ("elastic", "refining", "level 0", "level 1"))
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in out for name in ("elastic", "refining", "level 0", "level 1"))


def test_a_network_without_levels_cannot_compete(tmp_path: Path, fixtures: Fixtures) -> None:
    train(
        configure(tmp_path, *EXACT, "schedule=static", "lr_scheduler=constant", "trainer.max_epochs=1"),
        tmp_path,
    )
    code, _, err = command(elastic.experiments.serve.main, *fixtures, f"run={tmp_path}")
    assert code == 1 and "without levels: train some with schedule=joint" in err and err.count("\n") == 1
