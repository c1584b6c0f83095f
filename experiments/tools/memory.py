"""Refuse a network that this machine's memory cannot train, before any of it is asked for.

Beyond its memory a system ends a program without a word.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from elastic.data import ImageData
from elastic.errors import OptionError

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container
LEFT = ("MemAvailable", "SwapFree")
COPIES = 2  # of the parameters: themselves and their gradients, whatever the optimizer holds


def check_memory(cfg: DictConfig, data: ImageData) -> None:
    """Refuse a run on the CPU whose network and a batch's activations exceed the memory there is.

    Nothing is allocated for it. What cannot be built or executed so is not judged.

    Raises:
        OptionError: they do.
    """
    memory = find_memory()
    if memory is None or (torch.cuda.is_available() and cfg.trainer.get("accelerator") != "cpu"):
        return
    try:
        with isolate_rng(), warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            need = measure_start(cfg, data)
            if need <= memory:
                net = instantiate(cfg.model, in_channels=data.shape[0], classes=data.classes)
                need = measure_training(net, torch.empty(data.batch_size, *data.shape))
    except Exception:  # a builder that reads values, an operation that meta tensors lack
        return
    if need > memory:
        raise OptionError(
            f"a step of training takes {need / 1e9:,.0f} GB, and there are {memory / 1e9:,.0f} GB: choose a "
            f"smaller model than {cfg.model.get('_target_')} with these options, or lower data.batch_size"
        )


def measure_start(cfg: DictConfig, data: ImageData) -> int:
    """Measure the bytes of the network that the model is made from, where that is another one's builder."""
    if not OmegaConf.is_dict(cfg.model.get("model")):
        return 0
    net = instantiate(cfg.model.model)(in_channels=data.shape[0], classes=data.classes)
    return sum(parameter.nbytes for parameter in net.parameters())


def measure_training(net: nn.Module, x_BCHW: Tensor) -> int:
    """Measure the bytes of a step of training: parameters, gradients, and what is kept for these."""
    storages: dict[
        int, torch.UntypedStorage
    ] = {}  # by address: an activation is kept by what makes and reads it

    def keep(tensor: Tensor) -> Any:
        """Keep what the tensor lies in, not the tensor: it would hold the network, and be held by it."""
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage

    with saved_tensors_hooks(keep, lambda storage: storage):  # nothing asks for it
        net.train()(x_BCHW)
    own = {tensor.untyped_storage()._cdata for tensor in (*net.parameters(), *net.buffers())}
    weights = COPIES * sum(parameter.nbytes for parameter in net.parameters())
    return weights + sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def find_memory() -> int | None:
    """Find how much memory is left for this process, if the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = [sum(1024 * int(line.split()[1]) for line in lines if line.startswith(LEFT))]
    except (OSError, ValueError):
        return None
    for limit in LIMITS:
        try:
            sizes.append(int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none
            continue
    return min(sizes)
