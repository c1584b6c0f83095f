"""Parameters that come and go, and the groups that they are in."""

import torch
from torch import nn

from elastic.training.groups import adopt_parameters, remove_parameters


def make(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(1)) for _ in range(count)]


def ids(group: dict[str, list[nn.Parameter]]) -> list[int]:
    return [id(parameter) for parameter in group["params"]]


def test_a_new_parameter_joins_its_siblings_group_in_the_networks_order() -> None:
    a, b, new, c = make(4)
    optimizer = torch.optim.SGD([{"params": [a, c]}, {"params": [b], "lr": 0.5}], lr=0.1)
    adopt_parameters([optimizer], {new: a}, [a, b, new, c])
    first, second = optimizer.param_groups
    assert ids(first) == [id(a), id(new), id(c)] and ids(second) == [id(b)]


def test_in_a_group_of_another_order_it_comes_last() -> None:
    a, b, new = make(3)
    optimizer = torch.optim.SGD([b, a], lr=0.1)
    adopt_parameters([optimizer], {new: a}, [a, new, b])
    assert ids(optimizer.param_groups[0]) == [id(b), id(a), id(new)]


def test_a_new_parameter_whose_sibling_is_in_no_group_is_in_none() -> None:
    a, frozen, new = make(3)
    optimizer = torch.optim.SGD([a], lr=0.1)
    adopt_parameters([optimizer], {new: frozen}, [a, frozen, new])
    assert ids(optimizer.param_groups[0]) == [id(a)]


def test_what_is_removed_is_in_no_group() -> None:
    a, b, c = make(3)
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    remove_parameters(optimizer, [b, c])
    assert [ids(group) for group in optimizer.param_groups] == [[id(a)], []]
