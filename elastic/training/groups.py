"""Keep the parameter groups of optimizers right while parameters come and go."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def adopt_parameters(
    optimizers: Iterable[torch.optim.Optimizer],
    templates: Mapping[nn.Parameter, nn.Parameter],
    order: list[nn.Parameter],
) -> None:
    """Put each new parameter into the group of the one that it is modelled on.

    A resumed run builds its groups from the network as it is by then. So where a group is in the order of the
    network's parameters, as it is when it was made from them, it stays so; elsewhere new ones come last.

    Args:
        templates: by new parameter, the one that it is modelled on, and learns like.
        order: all parameters in the network's order.
    """
    rank = {id(parameter): i for i, parameter in enumerate(order)}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            members = {id(parameter) for parameter in group["params"]}
            new = [parameter for parameter, template in templates.items() if id(template) in members]
            ranks = [rank.get(id(parameter), len(rank)) for parameter in group["params"]]
            group["params"] = [*group["params"], *new]
            if ranks == sorted(ranks):
                group["params"].sort(key=lambda parameter: rank.get(id(parameter), len(rank)))


def remove_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Take parameters out of an optimizer's groups."""
    removed = {id(parameter) for parameter in parameters}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in removed]
    for parameter in [p for p in optimizer.state if id(p) in removed]:  # Adagrad's begins before any step
        del optimizer.state[parameter]
