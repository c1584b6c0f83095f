"""Let fresh entries of parameters learn at a rate of their own, whatever the optimizer.

What comes late has less of the run left than what was there from the start (arXiv 2306.12700 adapts the
rate by age, too). A factor on gradients is nothing to Adam, so it is the step that is scaled, as a learning
rate of each entry would. Factors are optimizer state: they follow `reindex` and checkpoints like moments.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from elastic.surgery.optimizer_state import ENTRY_RATE


class EntryRates:
    """Scale the steps of optimizers entry by entry, once there are rates."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self.optimizers = list(optimizers)
        self._before: list[Tensor] = []
        for optimizer in self.optimizers:
            optimizer.register_step_pre_hook(self._remember)
            optimizer.register_step_post_hook(self._scale)

    def prepare(self) -> None:
        """Give each entry that is trained a rate, 1 unless it has one; those that come now get 0."""
        for optimizer in self.optimizers:
            for parameter in _list_parameters(optimizer):
                state = optimizer.state.get(parameter, {})
                # Adam takes a state that holds anything for one that it has made.
                if ENTRY_RATE not in state and (state or isinstance(optimizer, torch.optim.SGD)):
                    optimizer.state[parameter][ENTRY_RATE] = torch.ones_like(parameter)

    def set_fresh(self, rate: float) -> None:
        """Give the entries that have come since `prepare` their rate."""
        for optimizer in self.optimizers:
            for _, rates in _list_rates(optimizer):
                rates.masked_fill_(rates == 0, rate)

    def _remember(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._before = [parameter.detach().clone() for parameter, _ in _list_rates(optimizer)]

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        pairs = list(_list_rates(optimizer))
        if pairs and len(pairs) == len(self._before):
            parameters, rates = zip(*pairs, strict=True)
            torch._foreach_lerp_(self._before, parameters, rates)
            torch._foreach_copy_(parameters, self._before)
        self._before = []


def _list_parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _list_rates(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    for parameter in _list_parameters(optimizer):
        rates = optimizer.state.get(parameter, {}).get(ENTRY_RATE)
        if rates is not None:
            yield parameter, rates
