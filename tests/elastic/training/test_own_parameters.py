"""What elastic methods add is stepped as the user's optimizer would, but for decay and rate."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from elastic.errors import StructureError, TrainingError
from elastic.training.own_parameters import OwnOptimizers, OwnParameter, check_followed

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, weight_decay=0.1),
}


class Signs(torch.optim.Optimizer):
    """Keep what it needs in attributes of its own."""

    def __init__(self, groups: Any, beta: float) -> None:
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.1})
        self.beta = beta

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                parameter.sub_(group["lr"] * mean.lerp_(parameter.grad, 1 - self.beta).sign())


OPTIMIZERS["own"] = lambda groups: Signs(groups, beta=0.5)


class Begun(torch.optim.Optimizer):
    """Have a state before any step."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 1e-2, "weight_decay": 0.0})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.state[parameter] = {"steps": 0, "sum": torch.full_like(parameter, 0.1)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                state["steps"] += 1
                state["sum"].addcmul_(parameter.grad, parameter.grad)
                parameter.addcdiv_(parameter.grad, state["sum"].sqrt(), value=-group["lr"] / state["steps"])


OPTIMIZERS["begun"] = Begun


class Odd(torch.optim.SGD):
    """Take arguments that nobody could guess."""

    def __init__(self, groups: Any, colour: str) -> None:
        super().__init__(groups, lr=1e-2, momentum=0.9)


class Rateless(torch.optim.Optimizer):
    """Take steps of a length of its own, as A2Grad and ALI-G do: its groups have no learning rate."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"weight_decay": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.sub_(parameter.grad + group["weight_decay"] * parameter, alpha=0.1)


def make_parameters(count: int = 4) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2, generator=generator)) for _ in range(count)]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, (i + 1) * (step - 1.5))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_they_are_stepped_as_in_the_users_optimizer_without_decay(name: str) -> None:
    """The oracle: the same optimizer with a group of its own for them, under the same schedule."""
    user, own = make_parameters(), make_parameters()
    plain, scores = user[:2], user[2:]
    home = OPTIMIZERS[name](user)
    schedule = torch.optim.lr_scheduler.StepLR(home, 2, gamma=0.5)
    followers = OwnOptimizers([home], [OwnParameter(p, decays=False) for p in scores])
    oracle = OPTIMIZERS[name]([{"params": own[:2]}, {"params": own[2:], "weight_decay": 0.0}])
    expected = torch.optim.lr_scheduler.StepLR(oracle, 2, gamma=0.5)
    for step in range(5):
        set_gradients(user, step)
        set_gradients(own, step)
        followers.step(home)
        home.step()
        schedule.step()
        oracle.step()
        expected.step()
        assert all(p.grad is None for p in scores)
    for a, b in zip((*plain, *scores), own, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_whose_first_gradient_comes_later_is_stepped_like_the_others(name: str) -> None:
    """A level that is not drawn in each step, a block that is added: against torch's own optimizer."""
    user, own = make_parameters(), make_parameters()
    home, oracle = OPTIMIZERS[name](user), OPTIMIZERS[name](own)
    followers = OwnOptimizers([home], [OwnParameter(p) for p in user])
    for step in range(4):
        set_gradients(user, step)
        set_gradients(own, step)
        for late in (user[1], own[1]):
            late.grad = late.grad if step > 1 else None
        followers.step(home)
        oracle.step()
        oracle.zero_grad()
    for a, b in zip(user, own, strict=True):
        torch.testing.assert_close(a, b)


def test_one_that_comes_later_begins_as_the_others_have() -> None:
    """Gates come when the user's optimizer exists, which has not made them a state."""
    user, own, shape = make_parameters(2), make_parameters(2), (4, 1)
    scores = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    home, oracle = Begun(user), Begun([*own, scores[1]])
    followers = OwnOptimizers([home], [OwnParameter(scores[0], like=[user[0]])])
    for step in range(3):
        for score in scores:
            score.grad = torch.full(shape, step - 1.5)
        followers.step(home)
        oracle.step()
    torch.testing.assert_close(*scores)


def test_a_rate_multiplies_the_scheduled_one() -> None:
    user, own = make_parameters(2), make_parameters(2)
    home = torch.optim.SGD(user, lr=0.1)
    followers = OwnOptimizers([home], [OwnParameter(user[1], rate=3.0)])
    set_gradients(user, 0)
    set_gradients(own, 0)
    followers.step(home)
    torch.testing.assert_close(user[1], own[1] - 0.3 * own[1].grad)  # type: ignore[operator]


def test_each_follows_the_group_and_the_optimizer_that_it_came_from() -> None:
    a, b, c, missing = make_parameters()
    first = torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.1}])
    second = torch.optim.SGD([c], lr=0.01)
    followers = OwnOptimizers([first, second], [OwnParameter(p) for p in (b, c, missing)])
    assert [[p["lr"] for p in f.param_groups] for f in followers.optimizers] == [[0.1, 0.5], [0.01]]
    assert [id(p) for p in followers.list_parameters(first)] == [id(b), id(missing)], "in none"
    assert [id(p) for p in followers.list_parameters(second)] == [id(c)]
    assert [id(p) for group in first.param_groups for p in group["params"]] == [id(a)]
    assert not second.param_groups[0]["params"]


def test_a_constructor_that_takes_other_arguments_is_no_obstacle() -> None:
    user = make_parameters(2)
    home = Odd(user, colour="red")
    followers = OwnOptimizers([home], [OwnParameter(user[1])])
    before = user[1].detach().clone()
    set_gradients(user, 0)
    followers.step(home)
    assert type(followers.optimizers[0]) is Odd and not torch.equal(user[1], before)


def test_an_optimizer_without_a_learning_rate_is_followed() -> None:
    user = make_parameters(2)
    home = Rateless(user)
    followers = OwnOptimizers([home], [OwnParameter(user[1], decays=False)])
    before = user[1].detach().clone()
    set_gradients(user, 0)
    expected = before - 0.1 * user[1].grad  # type: ignore[operator]
    followers.step(home)
    torch.testing.assert_close(user[1].detach(), expected)


def test_an_optimizer_with_one_state_for_all_is_refused() -> None:
    user = make_parameters(1)
    with pytest.raises(TrainingError, match="LBFGS keeps one state"):
        OwnOptimizers([torch.optim.LBFGS(user)], [OwnParameter(user[0])])


class Counting(torch.optim.SGD):
    """Count its steps where all copies of it would look, and want a closure where it is asked to."""

    def __init__(self, groups: Any, closure: bool) -> None:
        super().__init__(groups, lr=0.1)
        self.wants, self.counts = closure, {"steps": 0}

    def step(self, closure: Any = None) -> None:
        if self.wants and closure is None:
            raise RuntimeError("a closure is needed")
        self.counts["steps"] += 1
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[parameter]["basis"] = torch.eye(3)


def test_a_trial_finds_what_cannot_follow_and_leaves_the_optimizer_as_it_was() -> None:
    user = make_parameters(1)
    home, before, state = Counting(user, closure=False), user[0].detach().clone(), torch.get_rng_state()
    with pytest.raises(StructureError, match="Counting keeps 'basis'"):
        check_followed(home)
    assert torch.equal(user[0], before) and torch.equal(torch.get_rng_state(), state)
    assert not home.state and home.counts == {"steps": 0} and user[0].grad is None
    check_followed(Counting(user, closure=True))  # nobody knows what it will keep


def test_state_is_saved_and_taken_up() -> None:
    def step(user: list[nn.Parameter], home: Any, followers: OwnOptimizers, count: int) -> None:
        for i in range(count):
            set_gradients(user, i)
            followers.step(home)

    def make(user: list[nn.Parameter]) -> tuple[Any, OwnOptimizers]:
        home = torch.optim.AdamW(user, lr=1e-2)
        return home, OwnOptimizers([home], [OwnParameter(user[1], decays=False)])

    user = make_parameters(2)
    home, followers = make(user)
    step(user, home, followers, 3)
    again = copy.deepcopy(user)
    other, restored = make(again)
    restored.load_state_dict(copy.deepcopy(followers.state_dict()))
    step(user, home, followers, 2)
    step(again, other, restored, 2)
    assert torch.equal(user[1], again[1])


@pytest.mark.parametrize("overflows", [False, True])
def test_scaled_gradients_are_unscaled_and_an_overflow_is_skipped(overflows: bool) -> None:
    user = make_parameters(2)
    home = torch.optim.SGD(user, lr=0.1)
    followers = OwnOptimizers([home], [OwnParameter(user[1])])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(user[1].sum())  # a scaler has its scale from the first loss on
    user[1].grad = torch.full_like(user[1], torch.inf if overflows else 16.0)
    before = user[1].detach().clone()
    finite = followers.unscale(home, scaler)
    assert finite == (not overflows)
    followers.step(home, skip=not finite)
    torch.testing.assert_close(user[1], before - (0.0 if overflows else 0.1 * 2.0))


def test_without_own_parameters_nothing_is_done() -> None:
    user = make_parameters(1)
    home = torch.optim.SGD(user, lr=0.1)
    followers = OwnOptimizers([home], [])
    followers.step(home)
    assert (
        followers.optimizers == [] and followers.list_parameters(home) == [] and followers.unscale(home, None)
    )
