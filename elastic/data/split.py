"""Cut a labelled set in two so that both parts have its mix of classes."""

import torch
from torch import Tensor


def split_stratified(labels_N: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split N samples into indices (rest, part), each ascending, where the part has exactly `count` of them.

    Every class gives its share of `count`, rounded down; the samples still missing come from the classes
    that lost most by the rounding. Which samples are taken depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes_K = torch.bincount(labels_N)
    share_K = sizes_K.double() * count / len(labels_N)
    counts_K = share_K.floor().long()
    remainder = count - int(counts_K.sum())
    counts_K[torch.argsort(counts_K - share_K, stable=True)[:remainder]] += 1

    part_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label, size in enumerate(counts_K.tolist()):
        members = (labels_N == label).nonzero().flatten()
        part_N[members[torch.randperm(len(members), generator=generator)[:size]]] = True
    return (~part_N).nonzero().flatten(), part_N.nonzero().flatten()


def find_strata(targets: Tensor) -> Tensor:
    """Return what a split is stratified by: the classes, or one stratum where targets are no classes."""
    return targets if is_class_number(targets) else torch.zeros(len(targets), dtype=torch.long)


def is_class_number(targets: Tensor) -> bool:
    """Tell whether targets are one class number a sample."""
    return targets.dim() == 1 and not targets.is_floating_point()
