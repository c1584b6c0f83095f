"""Train one run: `python -m experiments.train [experiment=<name>] [any Hydra override] [-m]`.

The run's folder gets the resolved configuration, `last.ckpt`, `timeline.jsonl`, the logger's files,
`model.safetensors` (compacted), `summary.json` and `history.png`. `run=<folder>` continues a run.
"""

import time
from pathlib import Path
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from callbacks import Census, PruneByGates
from elastic.checkpoint import save_compact
from elastic.compact import compact
from elastic.data import ImageData
from elastic.module import ElasticModule
from experiments.figure import draw_history
from experiments.report import show, summarise, write_summary
from experiments.setup import portable, precision, quiet, run, settings


def build(cfg: DictConfig) -> tuple[ElasticModule, ImageData]:
    """The data and the network, as the configuration describes them before anything has changed."""
    L.seed_everything(cfg.seed, verbose=False)
    data: ImageData = instantiate(cfg.data)
    net = instantiate(cfg.model, in_channels=data.shape[0], classes=data.classes)
    module = ElasticModule(
        net,
        data.shape,
        data.classes,
        instantiate(cfg.optimizer.optimizer),
        instantiate(cfg.optimizer.scheduler),
        cfg.seed,
        cfg.label_smoothing,
        cfg.channels_last,
    )
    return module, data


def train(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Carry out a run in its folder, from the start or from its last checkpoint; returns the summary."""
    quiet()
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    started = time.monotonic()
    module, data = build(cfg)
    callbacks = [instantiate(c) for c in cfg.callbacks.values() if c is not None]
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        precision=precision(cfg.trainer.precision),
        callbacks=callbacks,
        logger=instantiate(cfg.logger),
        enable_progress_bar=cfg.callbacks.get("progress") is not None,
        default_root_dir=folder,
    )
    if trainer.is_global_zero:
        OmegaConf.save(portable(cfg), folder / "config.yaml")
    last = folder / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None)

    module.cpu()
    plain = compact(module.net, module.example)
    summary = summarise(cfg, plain, data, time.monotonic() - started)
    for pruning in (c for c in callbacks if isinstance(c, PruneByGates)):
        summary |= pruning.report(module)
    if trainer.is_global_zero:
        save_compact(plain, folder / "model.safetensors", {"widths": module.widths.sizes()})
        history = next((c.history for c in callbacks if isinstance(c, Census)), [])
        draw_history(history, module.timeline, folder / "history.png")
        write_summary(summary, folder)
        show(summary, history, folder)
    return summary


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> float:
    folder = Path(HydraConfig.get().runtime.output_dir)
    return float(train(settings(cfg, folder), folder)["test/acc"])


if __name__ == "__main__":
    run(main)
