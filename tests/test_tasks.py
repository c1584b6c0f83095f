"""The programs of docs/tasks are made elastic by two lines each, whatever their task."""

import copy
import runpy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import elastic
from elastic import Growth, Periodic
from elastic.callbacks import FollowNetwork, GrowOnSaturation, PruneByGates, PruneDynamically, TrainJointly
from elastic.dynamic.modules import iterate_modules
from elastic.experiments.train import make_network
from elastic.measure import count_params
from elastic.pruning import compact
from elastic.training.joining import find_structure

PROGRAMS = sorted(path for path in Path(__file__).parents[1].joinpath("docs", "tasks").glob("*.py"))
TASKS = [path for path in PROGRAMS if path.stem != "loop"]
SOME = [
    p if p.stem in ("classification", "detection") else pytest.param(p, marks=pytest.mark.slow) for p in TASKS
]
BUDGET = 700


def train(path: Path, *callbacks: L.Callback, epochs: int = 6) -> Any:
    """Train a program's own module on its own data with other callbacks; return its structure."""
    names = runpy.run_path(str(path))
    (module_class,) = (v for v in names.values() if isinstance(v, type) and L.LightningModule in v.__bases__)
    data = names["data"] if "data" in names else names["make_loader"]()
    torch.manual_seed(0)
    module = module_class()
    named = [FollowNetwork("backbone")] if path.stem == "detection" else []
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[*named, *callbacks],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data, data)
    structure = find_structure(module)
    assert structure is not None
    return structure


def get_first_net(path: Path) -> nn.Module:
    """Return a program's network as it is before anything has changed."""
    names = runpy.run_path(str(path))
    (module_class,) = (v for v in names.values() if isinstance(v, type) and L.LightningModule in v.__bases__)
    module = module_class()
    net: nn.Module = module.backbone if path.stem == "detection" else next(module.children())
    return net


def monitor(path: Path) -> str:
    return "val/acc" if path.stem == "classification" else "val/loss"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("path", SOME, ids=lambda path: path.stem)
def test_it_grows_and_prunes_to_a_budget_and_compacts(path: Path) -> None:
    budget = 5 * BUDGET if path.stem == "classification" else BUDGET
    growth = GrowOnSaturation(Periodic(2), Growth(factor=1.5, ceiling=2), monitor(path), until=0.5)
    structure = train(path, growth, PruneByGates(budget=budget, penalty=1e-3))
    assert any(event["why"].startswith("grow") for event in structure.timeline)
    x = torch.randn(4, *structure.example.shape[1:])
    plain = compact(structure.net, structure.example)
    assert 0.9 * budget <= count_params(plain) <= budget
    with torch.no_grad():
        pairs = zip(tree_leaves(structure.net.eval()(x)), tree_leaves(plain(x)), strict=True)
        for gated, compacted in pairs:
            torch.testing.assert_close(compacted, gated, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "callback", [PruneByGates(budget=3000, penalty=1e-3), TrainJointly([0.5])], ids=["gates", "levels"]
)
def test_its_result_is_saved_loaded_and_exported(path: Path, callback: L.Callback, tmp_path: Path) -> None:
    structure = train(path, copy.deepcopy(callback), epochs=4)
    fresh = copy.deepcopy(structure.net) if structure.levels else get_first_net(path)
    network = make_network(structure)
    elastic.save(network, tmp_path / "net.safetensors")
    again = elastic.load(tmp_path / "net.safetensors", fresh, structure.example)
    x = torch.randn(4, *structure.example.shape[1:])
    with torch.no_grad():
        for level in range(len(network)):
            pairs = zip(tree_leaves(network.run(x, level)), tree_leaves(again.run(x, level)), strict=True)
            for ours, theirs in pairs:
                torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
            elastic.export(again.plain(level), structure.example, tmp_path / f"{level}.pt2")
            exported = torch.export.load(tmp_path / f"{level}.pt2").module()(x)
            for ours, theirs in zip(tree_leaves(again.run(x, level)), tree_leaves(exported), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("path", SOME, ids=lambda path: path.stem)
def test_its_levels_learn_what_the_network_says(path: Path) -> None:
    structure = train(path, TrainJointly([0.5], outputs="values"), epochs=3)
    x = torch.randn(4, *structure.example.shape[1:])
    with torch.no_grad():
        outputs = [tree_leaves(structure.nets[k].eval()(x)) for k in range(2)]
    assert [leaf.shape for leaf in outputs[0]] == [leaf.shape for leaf in outputs[1]]
    assert not all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
    assert count_params(structure.nets[0]) < count_params(structure.nets[1])


@pytest.mark.slow
@pytest.mark.parametrize("path", TASKS, ids=lambda path: path.stem)
def test_its_kernels_are_switched_off_per_input(path: Path) -> None:
    structure = train(path, PruneDynamically(gain=300.0, begin=0.0, end=0.5, rate=20), epochs=8)
    (net,) = structure.dynamic_nets
    with torch.no_grad():
        net.eval()(torch.randn(16, *structure.example.shape[1:]))
    active = torch.cat([module.active_BK for module in iterate_modules(structure.kernel_modules)], dim=1)
    assert active.mean() < 0.9


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_is_of_forty_lines_at_most(path: Path) -> None:
    assert sum(bool(line.strip()) for line in path.read_text().splitlines()) <= 40


def test_a_plain_loop_grows_and_prunes(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(Path(__file__).parents[1] / "docs" / "tasks" / "loop.py"))
    sizes = [int(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert sizes[1] > 1.5 * sizes[0] and sizes[2] < 0.5 * sizes[1]
