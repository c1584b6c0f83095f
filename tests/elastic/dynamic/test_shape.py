"""Batch-shaping: scores that are clearly on for a share of a batch, and else off, are near the prior."""

import math

import torch

from elastic.dynamic.loss import compute_shape_distance


def test_scores_drawn_from_the_prior_are_near_it_and_others_are_not() -> None:
    share, ranks = 0.45, torch.arange(1, 2000)[:, None] / 2000
    a = -math.log2(1 - share**2)
    drawn = torch.logit((1 - (1 - ranks) ** 2) ** (1 / a))
    assert (drawn > 0).float().mean().sub(share).abs() < 0.01
    assert compute_shape_distance(drawn, share) < 1e-4 < 0.05 < compute_shape_distance(0 * drawn, share)
