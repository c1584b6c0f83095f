"""Sweeps for real, in processes of their own: on the cores of one machine, as jobs, and after a kill.

Those on SLURM and Ray run where there is a cluster, one node is enough, or the launcher.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SWEEP = (
    *(sys.executable, "-W", "ignore", "-m", "experiments.train", "-m", "experiment=smoke"),
    *("callbacks.progress=null", "trainer.accelerator=cpu", "trainer.max_epochs=2", "seed=0,1,2"),
)
pytestmark = pytest.mark.slow


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*SWEEP, f"hydra.sweep.dir={folder / 'sweep'}", *options],
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    try:
        said, _ = process.communicate(timeout=250)
    finally:
        with_children(process)
    assert process.returncode == code, said
    return said


def with_children(process: "subprocess.Popen[str]") -> None:
    """End a sweep and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def summaries(folder: Path) -> dict[str, float]:
    return {path.parent.name: path.stat().st_mtime for path in folder.glob("sweep/*/summary.json")}


LAUNCHERS = {  # with Hydra's plugin for each, and what it needs to be told here
    "cores": ("joblib", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("submitit", "hydra.launcher.timeout_min=4"),
    "slurm": ("submitit", "hydra.launcher.timeout_min=30"),
    "ray": ("ray", "+hydra.launcher.ray.init.num_cpus=2"),
}


def launched_by(launcher: str) -> list[str]:
    plugin, option = LAUNCHERS[launcher]
    pytest.importorskip(f"hydra_plugins.hydra_{plugin}_launcher")
    if launcher == "slurm" and (shutil.which("sinfo") is None or subprocess.run(["sinfo"]).returncode):
        pytest.skip("no SLURM answers: run this on a cluster")
    return [f"hydra/launcher={launcher}", option]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_run_of_a_sweep_is_done(tmp_path: Path, launcher: str) -> None:
    finish(start(tmp_path, *launched_by(launcher)))
    found = list(summaries(tmp_path))
    assert len(found) == 3 and {name[-1] for name in found} == set("012")
    assert not list(tmp_path.glob("sweep/*/failed.json"))


@pytest.mark.timeout(600)  # two sweeps, and a queue
def test_jobs_that_were_cancelled_are_finished_by_the_next_sweep(tmp_path: Path) -> None:
    options = (*launched_by("slurm"), "trainer.max_epochs=60", "seed=0,1")
    process = start(tmp_path, *options)
    while not list(tmp_path.glob("sweep/*/last.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    (job,) = (path.name for path in tmp_path.glob("sweep/.submitit/*") if path.name.isdigit())
    subprocess.run(["scancel", job], check=True)
    with_children(process)
    process.communicate()
    while subprocess.run(["squeue", "-h", "-j", job], capture_output=True, check=True).stdout:
        time.sleep(0.5)
    assert len(summaries(tmp_path)) < 2 and not list(tmp_path.glob("sweep/*/failed.json"))
    finish(start(tmp_path, *options))
    assert len(summaries(tmp_path)) == 2 and not list(tmp_path.glob("sweep/*/failed.json"))


def test_a_sweep_that_was_killed_does_what_is_missing(tmp_path: Path) -> None:
    process = start(tmp_path)
    while not summaries(tmp_path):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    with_children(process)
    process.communicate()
    done = summaries(tmp_path)
    assert 1 <= len(done) < 3
    said = finish(start(tmp_path))
    after = summaries(tmp_path)
    assert len(after) == 3 and all(after[name] == when for name, when in done.items())
    assert said.rstrip().endswith("3 of 3 done, 0 running, 0 failed")


def test_a_run_that_fails_takes_no_other_down(tmp_path: Path) -> None:
    said = finish(start(tmp_path, "optimizer.lr=1e-2,-1", "seed=0"), code=1)
    assert len(summaries(tmp_path)) == 1
    (note,) = tmp_path.glob("sweep/*/failed.json")
    assert json.loads(note.read_text())["error"].startswith("optimizer.lr=-1 cannot be")
    progress, error = said.rstrip().splitlines()[-2:]
    assert progress.endswith("1 of 2 done, 0 running, 1 failed")
    assert error == f"error: 1 of 2 runs have failed: {tmp_path}/sweep/<run>/failed.json says why"


def test_a_worker_that_dies_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    process = start(tmp_path, "hydra/launcher=cores", "trainer.max_epochs=300")
    while len(list(tmp_path.glob("sweep/*/last.ckpt"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(child) for path in children for child in path.read_text().split()]
    loky = [pid for pid in workers if b"LokyProcess" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(loky[0], signal.SIGKILL)
    said = finish(process, code=1)
    assert said.rstrip().splitlines()[-1].startswith("error: a worker of the sweep has died")
    assert "Traceback" not in said
