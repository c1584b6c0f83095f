"""Entries that learn at rates of their own: as if each group of them had a learning rate of its own."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from elastic.surgery.optimizer_state import ENTRY_RATE
from elastic.training.entry_rates import EntryRates

TARGET = torch.linspace(-1, 1, 6)


def descend(optimizer: torch.optim.Optimizer, parameters: list[Tensor], steps: int) -> Tensor:
    """Let parameters, laid end to end, go towards the target, each entry on its own."""
    for _ in range(steps):
        optimizer.zero_grad()
        (torch.cat(parameters) - TARGET).pow(4).sum().backward()
        optimizer.step()
    return torch.cat(parameters).detach().clone()


@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.01),
        SGD,
        partial(AdamW, weight_decay=0.1),
        partial(AdamW, fused=True),
    ],
    ids=["nesterov", "sgd", "adamw", "fused"],
)
def test_an_entrys_rate_is_its_learning_rate(make: Any) -> None:
    """The oracle: torch's own parameter groups, of three entries at the rate and three at three times it."""
    one = nn.Parameter(torch.full((6,), 0.3))
    optimizer = make([one], lr=0.01)
    rates = EntryRates([optimizer])
    two = [nn.Parameter(torch.full((3,), 0.3)) for _ in range(2)]
    groups = make([{"params": [two[0]]}, {"params": [two[1]], "lr": 0.01}], lr=0.01)
    assert torch.equal(descend(optimizer, [one], 2), descend(groups, two, 2)), "before there are rates"
    rates.prepare()
    optimizer.state[one][ENTRY_RATE][3:] = 0  # as `reindex` leaves what is fresh
    rates.set_fresh(3.0)
    groups.param_groups[1]["lr"] = 0.03
    torch.testing.assert_close(descend(optimizer, [one], 5), descend(groups, two, 5))
    again = make([one], lr=0.01)
    EntryRates([again])
    again.load_state_dict(optimizer.state_dict())
    torch.testing.assert_close(descend(again, [one], 5), descend(groups, two, 5))


def test_rates_of_earlier_growth_stay() -> None:
    one = nn.Parameter(torch.zeros(6))
    optimizer = SGD([one], lr=0.1)
    rates = EntryRates([optimizer])
    for start, rate in ((4, 2.0), (5, 3.0)):
        rates.prepare()
        optimizer.state[one][ENTRY_RATE][start:] = 0
        rates.set_fresh(rate)
    assert optimizer.state[one][ENTRY_RATE].tolist() == [1, 1, 1, 1, 2, 3]


def test_what_has_not_been_stepped_is_left_to_its_optimizer() -> None:
    """Adam makes its moments with the first step, of a parameter without any state."""
    one = nn.Parameter(torch.zeros(6))
    optimizer = AdamW([one])
    EntryRates([optimizer]).prepare()
    descend(optimizer, [one], 1)
    assert one.detach().abs().min() > 0
