"""Cutting one labelled set in two so that both parts have its mix of classes."""

import torch
from torch import Tensor


def stratified_split(labels_N: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (rest, part), each in ascending order, where the part holds exactly `count` of the N samples.

    Every class gives its share of `count`, rounded down; the samples still missing come from the classes
    that lost most by the rounding. Which samples are taken depends on the seed alone.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes_K = torch.bincount(labels_N)
    share_K = sizes_K.double() * count / len(labels_N)
    taken_K = share_K.floor().long()
    short = count - int(taken_K.sum())
    taken_K[torch.argsort(taken_K - share_K, stable=True)[:short]] += 1

    chosen_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label, taken in enumerate(taken_K.tolist()):
        members = (labels_N == label).nonzero().flatten()
        chosen_N[members[torch.randperm(len(members), generator=generator)[:taken]]] = True
    return (~chosen_N).nonzero().flatten(), chosen_N.nonzero().flatten()
