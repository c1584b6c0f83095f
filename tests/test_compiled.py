"""`torch.compile` with growth and pruning: the same run, and never silently eager."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import elastic.experiments.train
from elastic.experiments.train import train
from elastic.training.compilation import compile_network
from tests.resuming import CHANGING, assert_same
from tests.runs import configure, load, load_history


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """What was compiled before makes dynamo choose other kernels, whose rounding gates may amplify."""
    torch.compiler.reset()


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    train(configure(folder, *CHANGING, "trainer.precision=32-true", *overrides), folder)
    return load(folder / "last.ckpt")["state_dict"]


@pytest.mark.slow
def test_every_structure_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that counts and runs the graph as it is: the eager run, bit for bit."""
    counter = CompileCounter()
    monkeypatch.setattr(
        elastic.experiments.train, "compile_network", partial(compile_network, backend=counter)
    )
    more = (
        "callbacks.growth.until=1.0",
        "trigger.every=1",
        "trainer.max_epochs=12",
    )  # eight would be too many
    eager = run(tmp_path / "eager", *more)
    assert counter.frame_count == 0
    compiled = run(tmp_path / "compiled", "compile=true", *more)
    events = {e["epoch"] for e in load_history(tmp_path / "compiled")["timeline"]}
    assert len(events) > 8, "more structures than dynamo keeps for one module"
    assert counter.frame_count > len(events)
    assert_same(eager, compiled)


@pytest.mark.slow
def test_with_inductor(tmp_path: Path) -> None:
    gentle = ("optimizer.lr=3e-2", "callbacks.gates.penalty=0.3")  # rounding must not decide what is shut
    few = (*gentle, "callbacks.growth.until=0.5", "trainer.max_epochs=4", "~data.augment")
    eager, compiled = run(tmp_path / "eager", *few), run(tmp_path / "compiled", "compile=true", *few)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, compiled[name], rtol=0.05, atol=0.05)
        else:
            assert value == compiled[name]
