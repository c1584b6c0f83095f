"""Programs that start by Lightning's own command line name callbacks in its configuration."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader

from elastic.training.joining import find_structure
from tests.programs import BATCH, QUIET, VALIDATION, Program, make_data


class Data(L.LightningDataModule):
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(make_data(), BATCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(VALIDATION, BATCH)


def name(path: str, **options: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": options}


GROWTH = {
    "trigger": name("elastic.Periodic", every=1),
    "amount": {"factor": 1.5, "ceiling": 2},
}
CALLBACKS: dict[str, list[dict[str, Any]]] = {
    "growth": [
        name("elastic.callbacks.FollowNetwork", network="net"),
        name("elastic.callbacks.GrowOnSaturation", **GROWTH),
        name("elastic.callbacks.PruneByGates", grain="channel", budget=900),
        name("elastic.callbacks.AverageWeights", decay=0.9),
    ],
    "joint": [name("elastic.callbacks.TrainJointly", fractions=[0.5])],
    "reconstruct": [name("elastic.callbacks.Reconstruct", fractions=[0.5], dense=0.34)],
    "dynamic": [name("elastic.callbacks.PruneDynamically", gain=[0.5, 1.0])],
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", CALLBACKS)
def test_callbacks_are_named_in_its_configuration(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = {**QUIET, "max_epochs": 4, "log_every_n_steps": 1, "callbacks": CALLBACKS[method]}
    file = tmp_path / "program.yaml"
    file.write_text(yaml.safe_dump({"seed_everything": 3, "trainer": trainer}))
    monkeypatch.setattr(sys, "argv", ["program.py", "fit", "--config", str(file)])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning 2.6 calls what 4.53 deprecates
    cli = LightningCLI(Program, Data, save_config_callback=None)
    structure = find_structure(cli.model)
    assert structure is not None
    if method == "growth":
        assert any(row["why"].startswith("grow") for row in structure.timeline)
    else:
        assert (structure.levels is None) == (method == "dynamic") == bool(structure.dynamic_nets)
