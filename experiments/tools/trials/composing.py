"""Compose the configurations that trials are made of, as a command line would, in this process."""

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from elastic.experiments.tools.composition import CONF, remove_leftovers

QUIET = ("trainer.accelerator=cpu", "trainer.precision=32-true", "callbacks.progress=null")
# Some batches of digits an epoch, so that an epoch takes hundredths of a second.
SHORT = (
    *("+trainer.limit_train_batches=3", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"),
    *("data.batch_size=32", "callbacks.learning_rate=null", "trainer.log_every_n_steps=1"),
)
# Grow and prune within a few epochs.
CHANGING = (
    *("trigger=periodic", "trigger.every=2", "callbacks.growth.until=0.9", "callbacks.gates.begin=0.0"),
    *("callbacks.growth.amount.factor=1.3", "callbacks.gates.penalty=0.3", "callbacks.gates.grain=kernel"),
    *("callbacks.gates.grace=1", "optimizer.lr=0.2", "lr_scheduler=constant"),
)


def compose_run(folder: Path, words: Sequence[str]) -> DictConfig:
    """Compose what `elastic train run=<folder> <words>` would carry out on the CPU."""
    GlobalHydra.instance().clear()
    words = [*QUIET, *words]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"run={folder}", f"hydra.runtime.output_dir={folder}", *words]
        cfg = compose("config", overrides, return_hydra_config=True)
        cfg = remove_leftovers(cfg, words, cfg.hydra.runtime.choices)
    with open_dict(cfg), read_write(cfg):
        HydraConfig.instance().set_config(cfg)
        OmegaConf.resolve(cfg.choices)
        cfg.name = "trial"
        del cfg["hydra"]
    return cfg
