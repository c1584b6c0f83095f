"""Change the code at random, a little at a time, and see whether the default suite notices.

    python tests/mutants.py [--seed 0] [--count 200] [--to outputs/mutants]

A mutant is one change (an operator, a number, a condition), made by cosmic-ray. It is killed if a test that
executes its line fails; tests of the same part of the library are asked first, for a minute of their time at
most. Survivors are printed as differences, to be looked at: each wants a test, or changes nothing of worth.
The parts are those of `ROOMS`: callbacks, commands, data, files, models and most of training are left out.
Once, the suite is run with coverage, to know which test executes which line.

This process imports nothing of the library: each fork of it imports it changed.
"""

import argparse
import ast
import difflib
import importlib
import json
import os
import platform
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider
from coverage import CoverageData

ROOT = Path(__file__).parents[1]
CAMPAIGN = ROOT / "outputs/campaign"
ROOMS = {
    "widths": "elastic/widths/**/*.py",
    "surgery": "elastic/surgery/**/*.py",
    "growth": "elastic/growth/**/*.py",
    "gates": "elastic/pruning/**/*.py",
    "levels": "elastic/levels/**/*.py",
    "dynamic": "elastic/dynamic/**/*.py",
    "checkpoints": "elastic/training/c*.py",
}
# Of the operators: what is left out changes decorators, or inserts names, which import errors tell apart.
LEFT_OUT = ("RemoveDecorator", "VariableReplacer", "VariableInserter", "ExceptionReplacer")
TESTS_S = 60.0  # of the tests' own time for one mutant
LIMIT_S = 600  # then it hangs, which is seen, too
BREAKS = "killed, it breaks"
# How pytest ends: all passed, one failed, files or a conftest that break; and a process that was killed.
ENDS = {0: "survived", 1: "killed", 2: BREAKS, 4: BREAKS, -signal.SIGKILL: "killed, it hangs"}
IMPORTED = "-Wignore::pytest.PytestAssertRewriteWarning"  # plugins, before pytest looks for them
OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "--timeout=120", IMPORTED)
DURATIONS, COVERAGE, RESULTS = "durations.json", "coverage", "results.json"


class Mutant(NamedTuple):
    room: str
    file: str
    line: int
    operator: str
    code: str


Place = tuple[str, int, list[tuple[str, int]]]  # file, line, and the operators, each with its occurrence


class Suite:
    """Tell which tests execute a line, those of its own part first, then the quick ones."""

    def __init__(self, folder: Path) -> None:
        self.seconds: dict[str, float] = json.loads((folder / DURATIONS).read_text())
        self.data = CoverageData(str(folder / COVERAGE))
        self.data.read()

    def choose(self, file: str, line: int) -> list[str]:
        contexts = self.data.contexts_by_lineno(str(ROOT / file))
        source = (ROOT / file).read_text()
        tests = {name.partition("|")[0] for at in _find_lines(source, line) for name in contexts.get(at, ())}
        own = str(next(folder for folder in Path("tests", file).parents if (ROOT / folder).is_dir()))
        if not tests & self.seconds.keys():  # executed when it is imported
            tests = {test for test in self.seconds if test.startswith(own)}
        ranked = sorted(tests & self.seconds.keys(), key=lambda t: (not t.startswith(own), self.seconds[t]))
        chosen, total = [], 0.0
        for test in ranked:
            total += self.seconds[test]
            if total > TESTS_S and chosen:
                break
            chosen.append(test)
        return chosen


def run_mutants(seed: int, count: int, to: Path) -> None:
    """Try mutants, about the same number of each part, and say which have survived.

    Args:
        to: a folder for what the suite executes, and for the results.
    """
    to.mkdir(parents=True, exist_ok=True)
    if not (to / DURATIONS).exists():
        _measure_coverage(to)
    suite, results = Suite(to), _read_results(to, seed)
    if _fork(partial(_run_tests, suite.choose("elastic/widths/union.py", 1))):
        raise SystemExit("tests fail in a fork of this process, without any change")
    for mutant in islice(draw_mutants(Random(seed), count), len(results), None):
        tests = suite.choose(mutant.file, mutant.line)
        end = try_mutant(mutant, tests) if tests else "survived, no test executes it"
        results.append({**mutant._asdict(), "end": end, "tests": len(tests), "seed": seed})
        results[-1]["code"] = _show_difference(mutant)
        print(f"{len(results)} {mutant.file}:{mutant.line} {mutant.operator}: {end}", flush=True)
        (to / RESULTS).write_text(json.dumps(results, indent=1))
    results = results[:count]
    _report(results)
    _write_result(results, seed)


def _read_results(folder: Path, seed: int) -> list[dict[str, Any]]:
    """Read what has been tried with this seed before: that is not tried again."""
    file = folder / RESULTS
    results = json.loads(file.read_text()) if file.exists() else []
    return [result for result in results if result["seed"] == seed]


def draw_mutants(random: Random, count: int) -> Iterator[Mutant]:
    """Draw mutants of each part in turn, none twice."""
    places = {room: _list_places(pattern) for room, pattern in ROOMS.items()}
    for found in places.values():
        random.shuffle(found)
    for i in range(count):
        room = list(ROOMS)[i % len(ROOMS)]
        if places[room]:
            file, line, changes = places[room].pop()
            operator, occurrence = random.choice(changes)
            code = mutate_code((ROOT / file).read_text(), OperatorProvider()[operator](), occurrence)
            if is_code(code):
                yield Mutant(room, file, line, operator, code)


def is_code(text: str) -> bool:
    """Tell whether a text is Python: a star of a signature is no product."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _list_places(pattern: str) -> list[Place]:
    """List where operators can change some files, and how."""
    return [place for path in sorted(ROOT.glob(pattern)) for place in _list_places_in(path)]


def _list_places_in(path: Path) -> list[Place]:
    source, provider = path.read_text(), OperatorProvider()
    nodes, ignored = list(ast_nodes(get_ast(source))), _find_ignored(source)
    changes: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
    for name in (name for name in provider if name not in LEFT_OUT):
        operator = provider[name]()
        positions = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for i, start in enumerate(positions):
            if not any(begin <= start < end for begin, end in ignored):
                changes[start].append((name, i))
    return [(str(path.relative_to(ROOT)), line, found) for (line, _), found in sorted(changes.items())]


def _find_ignored(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Find annotations, which nothing evaluates that counts."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            found += [node.returns] if node.returns else []
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation:
            found.append(node.annotation)
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found]


def _find_lines(source: str, line: int) -> range:
    """Find the lines of the smallest statement around a line: of several, not all are counted as executed."""
    spans = [
        (node.lineno, node.end_lineno or node.lineno)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    begin, end = min(spans, key=lambda span: span[1] - span[0], default=(line, line))
    return range(begin, min(end, line) + 1)


def try_mutant(mutant: Mutant, tests: list[str]) -> str:
    """Run tests with a changed file, in a fork of this process; return how it ended."""
    path, before = ROOT / mutant.file, (ROOT / mutant.file).read_text()
    path.write_text(mutant.code)
    try:
        code = _fork(partial(_run_tests, tests))
    finally:
        path.write_text(before)
    if code not in ENDS:
        raise SystemExit(f"pytest ends with {code} for {mutant.file}:{mutant.line}")
    return ENDS[code]


def _run_tests(tests: list[str]) -> int:
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    return int(pytest.main([*OPTIONS, *tests]))


def _fork(work: Callable[[], int]) -> int:
    process = os.fork()
    if not process:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        os.setsid()
        try:
            os._exit(work())
        finally:
            os._exit(3)
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _measure_coverage(folder: Path) -> None:
    """Run the suite once."""
    seconds: dict[str, float] = {}

    class Watch:
        def pytest_runtest_logreport(self, report: Any) -> None:
            seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration

    os.environ["COVERAGE_FILE"] = str(folder / COVERAGE)
    options = ["-q", "-n", "2", f"--cov={ROOT / 'elastic'}", "--cov-context=test", "--cov-report="]
    if pytest.main([*options, "--timeout=900", str(ROOT / "tests")], plugins=[Watch()]):
        raise SystemExit("the suite fails as it is: mend that first")
    (folder / DURATIONS).write_text(json.dumps(seconds))


def _show_difference(mutant: Mutant) -> str:
    before = (ROOT / mutant.file).read_text().splitlines()
    lines = difflib.unified_diff(before, mutant.code.splitlines(), lineterm="", n=1)
    return "\n".join(list(lines)[2:])


def _write_result(results: list[dict[str, Any]], seed: int) -> None:
    """Write what has come of it down beside the parts of a campaign, whose page has it, too."""
    ends = Counter(f"{result['room']}: {result['end'].partition(',')[0]}" for result in results)
    part = {
        "name": "mutants",
        "claim": "of 100 small changes in the parts listed below the default suite notices 85",
        "trials": len(results),
        "outcomes": ends,
        "faults": [],
        "command": f"make mutants ARGS='--seed {seed} --count {len(results)}'",
        "minutes": None,  # it may have been carried out in several sittings
        "machine": platform.machine(),
        "versions": f"Python {platform.python_version()}, pytest {pytest.__version__}",
    }
    CAMPAIGN.mkdir(parents=True, exist_ok=True)
    (CAMPAIGN / "mutants.json").write_text(json.dumps(part, indent=1))


def _report(results: list[dict[str, Any]]) -> None:
    for room in (*ROOMS, None):
        mine = [result for result in results if room in (None, result["room"])]
        killed = sum(result["end"].startswith("killed") for result in mine)
        print(
            f"{room or 'all':12} {killed:4} of {len(mine):4} killed, {100 * killed / max(1, len(mine)):.0f} %"
        )
    for result in results:
        if not result["end"].startswith("killed"):
            print(f"\n{result['file']}:{result['line']} {result['end']}\n{result['code']}")


if __name__ == "__main__":
    # Forks begin with all that does not change.
    for name in ("hydra", "lightning", "torchvision", "sklearn"):
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the mutants that are drawn")
    parser.add_argument("--count", type=int, default=200, help="of mutants")
    parser.add_argument(
        "--to", type=Path, default=ROOT / "outputs/mutants", help="a folder for what is found"
    )
    run_mutants(**vars(parser.parse_args()))
