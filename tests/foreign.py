"""Train a module that knows nothing of the library in processes of its own: `python -m tests.foreign`."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from elastic import Growth, Periodic
from elastic.callbacks import GrowOnSaturation, PruneByGates
from elastic.training.joining import find_structure
from tests.programs import BATCH, IMAGES, Program, fit, make_data, make_network


class Hasty(Program):
    """Learn by steps so large that gates close within a few epochs."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=5e-2)


def run(folder: Path, devices: int) -> None:
    """Grow and prune; each process writes what it ends with.

    There are no norms: what they make of a batch depends on how processes share it.
    """
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for layer in make_network() if not isinstance(layer, nn.BatchNorm2d)))
    module = Hasty(net)
    growth = GrowOnSaturation(Periodic(2), Growth(factor=1.5, ceiling=2), until=0.5)
    pruning = PruneByGates(penalty=1.0, begin=0.0, end=0.8, grain="channel")
    strategy = "ddp" if devices > 1 else "auto"
    rank = int(os.environ.get("LOCAL_RANK", "0"))  # Lightning's sampler would shuffle
    loader = DataLoader(Subset(make_data(), range(rank, IMAGES, devices)), BATCH // devices)
    parallel = {"devices": devices, "strategy": strategy, "use_distributed_sampler": False}
    trainer = fit(module, [growth, pruning], loader=loader, max_epochs=10, **parallel)
    structure = find_structure(module)
    assert structure is not None
    scores = [gate.detach() for name, gate in net.named_parameters() if name.endswith("score")]
    state = {"net": net.state_dict(), "timeline": structure.timeline, "scores": scores}
    torch.save(state, folder / f"{devices}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]))
