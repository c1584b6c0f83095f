"""Small runs of tests are configured as Hydra configures a command line."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import open_dict

from elastic.experiments.tools.composition import remove_leftovers
from tests.runs import CONF, TINY, configure


@pytest.mark.parametrize(
    "overrides",
    [
        ("experiment=smoke", *TINY, "seed=3", "trainer.max_epochs=2"),
        ("experiment=smoke", "model=resnet20", "model.width=8", "optimizer=sgd", "optimizer.lr=0.01"),
        ("experiment=digits", "schedule=[dynamic,ema]", "callbacks.dynamic.target=0.5", "+seeds={a: 1}"),
        ("experiment=mnist", "model.channels=[4,6,6,7,7,9,11]", "trigger=periodic", "~callbacks.progress"),
    ],
)
def test_plain_options_are_applied_as_hydra_applies_them(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    found = configure(tmp_path, *overrides)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = [f"run={tmp_path}", f"hydra.runtime.output_dir={tmp_path}", *overrides]
        composed = compose("config", words, return_hydra_config=True)
        expected = remove_leftovers(composed, overrides, composed.hydra.runtime.choices)
    with open_dict(expected):
        del expected["hydra"]
    assert found == expected
