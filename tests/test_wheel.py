"""Test that the package installs under one name, beside a user's own folders that are called as ours are."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("elastic", "callbacks", "experiments")  # folders of the checkout with code; conf has none
# A user's project with folders of the same names, and a script that uses both sides.
FILES = {
    "callbacks/__init__.py": "MINE = 'callbacks'\n",
    "experiments/__init__.py": "",
    "experiments/mine.py": "MINE = 'experiments'\n",
    "conf/config.yaml": "mine: true\n",
    "script.py": (
        "import callbacks, experiments.mine, elastic\n"
        "from elastic.callbacks import GrowOnSaturation\n"
        "from elastic.experiments.train import train\n"
        "print(callbacks.MINE, experiments.mine.MINE, elastic.discover.__name__, elastic.__version__)\n"
    ),
}


def read_settings() -> dict[str, dict[str, list[str]]]:
    tool: dict[str, dict[str, list[str]]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    return tool


def test_every_package_of_the_tree_is_installed() -> None:
    """And the configuration; recorded runs are not."""
    folders = {path.parent for top in OURS for path in (ROOT / top).rglob("*.py")} | {ROOT / "conf"}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    packages = {name if name.startswith("elastic") else f"elastic.{name}" for name in names}
    assert set(read_settings()["setuptools"]["packages"]) == packages


def test_all_that_is_no_code_is_installed_too() -> None:
    data: dict[str, list[str]] = read_settings()["setuptools"]["package-data"]  # type: ignore[assignment]
    patterns = {ROOT / "elastic": data["elastic"], ROOT / "conf": data["elastic.conf"]}
    patterns[ROOT / "elastic/dynamic/skipping"] = data["elastic.dynamic.skipping"]
    files = {path for folder, globs in patterns.items() for glob in globs for path in folder.glob(glob)}
    others = {path for top in ("elastic", "conf") for path in (ROOT / top).rglob("*") if path.is_file()}
    assert files == {path for path in others if path.suffix not in (".py", ".pyc")}


def run(folder: Path, *words: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_source(folder: Path) -> Path:
    """Copy what a wheel is built from: a build leaves files beside its source."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder)
    for name in (*OURS, "conf"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("*-seed*", "__pycache__", "*.png")
        )
    return folder


def build(tool: str, folder: Path) -> Path:
    """Build the wheel."""
    source, wheels = copy_source(folder / "source"), folder / "wheels"
    if tool == "uv":
        run(folder, sys.executable, "-m", "uv", "build", "-q", "--wheel", "-o", wheels, source)
    else:
        run(folder, sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, source)
    (wheel,) = wheels.glob("*.whl")
    return wheel


def install(tool: str, wheel: Path, folder: Path) -> Path:
    """Install a wheel into a fresh environment, which borrows what it needs from this one."""
    run(folder, sys.executable, "-m", "venv", folder / "env", *(["--without-pip"] if tool == "uv" else []))
    python = folder / "env/bin/python"
    if tool == "uv":
        run(
            folder, sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python, "--no-deps", wheel
        )
    else:
        run(folder, python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_it_is_installed_beside_a_users_own_folders(tmp_path: Path, tool: str) -> None:
    pytest.importorskip(tool)
    wheel = build(tool, tmp_path)
    assert wheel.stat().st_size < 10e6, "with the zoo"
    commands = install(tool, wheel, tmp_path)
    project = tmp_path / "project"
    for name, text in FILES.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    said = run(project, commands / "python", "script.py").split()
    assert said == ["callbacks", "experiments", "discover", version]
    code = "import elastic.callbacks; print(elastic.callbacks.__file__)"
    where = run(project, commands / "python", "-c", code).strip()
    assert Path(where).is_relative_to(tmp_path / "env")
    code = "import elastic; print(len(elastic.load('cifar10-resnet20-levels')))"
    assert run(project, commands / "python", "-c", code).strip() == "4"
    few = ("experiment=smoke", "trainer.max_epochs=2", "data.batch_size=256", "trainer.log_every_n_steps=1")
    run(project, commands / "elastic", "train", *few, "run=outputs/one")
    summary = json.loads((project / "outputs/one/summary.json").read_text())
    assert (summary["experiment"], summary["elastic"], summary["git"]) == ("smoke", version, None)
    last = run(project, commands / "elastic", "evaluate", "run=outputs/one").splitlines()[-1]
    assert json.loads(last)["test/acc"] == summary["test/acc"]
    assert "evaluate" in run(project, commands / "elastic", "--help")
