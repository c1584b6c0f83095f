"""GradMax: the function is preserved, and the gradient is the largest there is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.growth.gradmax import Rows, _draw_orthonormal, _find_directions, _Probe, gradmax
from elastic.models import convnet, resnet20
from elastic.pruning import gates
from elastic.surgery.fresh import zero_out
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic import zoo

HE = 2**0.5  # He et al. expect so long a row
EVERYTHING = 10_000  # candidates: more than any fan-in here, so that the search is complete


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(channels: int = 3, size: int = 8, classes: int = 10, n: int = 32) -> tuple[Tensor, Tensor]:
    generator = seeded(7)
    x_BCHW = torch.randn(n, channels, size, size, generator=generator)
    return x_BCHW, torch.randint(classes, (n,), generator=generator)


def loss_on(x_BCHW: Tensor, y_B: Tensor):  # type: ignore[no-untyped-def]
    return lambda net: F.cross_entropy(net(x_BCHW), y_B)


def grow(model: nn.Module, widths: Widths, added: dict[str, int], fresh=zero_out, seed: int = 0) -> None:  # type: ignore[no-untyped-def]
    changes = {name: grow_index(widths[name].size, by) for name, by in added.items()}
    reindex(model, widths, changes, fresh=fresh, generator=seeded(seed))


def reading_gradient(model: nn.Module, widths: Widths, name: str, by: int, loss) -> float:  # type: ignore[no-untyped-def]
    """Norm of the loss's gradient for the weights that read the last `by` channels."""
    model.zero_grad()
    loss(model).backward()
    total = 0.0
    for slot in widths[name].slots_with("in"):
        weight = model.get_submodule(slot.module).weight
        places = widths.positions(slot, name)[-by:].flatten()
        total += weight.grad[:, places].square().sum().item()
    return total**0.5


def copied(model: nn.Module, widths: Widths) -> tuple[nn.Module, Widths]:
    return copy.deepcopy(model), copy.deepcopy(widths)


@pytest.mark.parametrize("by", [1, 3])
def test_on_a_linear_net_it_finds_the_largest_singular_values(by: int) -> None:
    """Of M = Σ δ xᵀ over the batch: the new readers' gradient is M V, at most √(σ₁² + … + σ_by²)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 5), nn.Linear(5, 6))
    x_BC, y_B = torch.randn(20, 12), torch.randint(6, (20,))
    widths = discover(model, x_BC)
    rows = gradmax(model, widths, {"0": by}, loss_on(x_BC, y_B), seeded(0), EVERYTHING)

    delta_BK = (model(x_BC).softmax(1) - F.one_hot(y_B, 6)).detach() / len(x_BC)
    sigma = torch.linalg.svdvals(delta_BK.T @ x_BC)
    best = HE * sigma[:by].square().sum().sqrt().item()
    assert rows.rows["0"].norm(dim=1).tolist() == pytest.approx([HE] * by, rel=1e-5)
    grow(model, widths, {"0": by}, rows)
    found = reading_gradient(model, widths, "0", by, loss_on(x_BC, y_B))
    assert found == pytest.approx(best, rel=1e-4)


def test_on_a_linear_convolution_it_finds_the_largest_singular_values() -> None:
    """M is over 3×3 patches, averaged by the pooling."""
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    x_BCHW, y_B = images()
    widths = discover(model, x_BCHW)
    rows = gradmax(model, widths, {"0": 2}, loss_on(x_BCHW, y_B), seeded(0), EVERYTHING)
    delta_BK = (model(x_BCHW).softmax(1) - F.one_hot(y_B, 10)).detach() / len(y_B)
    patches_BN = F.unfold(x_BCHW, 3, padding=1).mean(2)
    best = HE * torch.linalg.svdvals(delta_BK.T @ patches_BN)[:2].square().sum().sqrt().item()
    grow(model, widths, {"0": 2}, rows)
    assert reading_gradient(model, widths, "0", 2, loss_on(x_BCHW, y_B)) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("name", ["0", "3", "7", "10"])
@pytest.mark.parametrize("init", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_its_gradient_is_above_that_of_random_channels(init: int, name: str) -> None:
    """Through batch norm and ReLU the search is of first order only; still, it must be worth its time."""
    torch.manual_seed(init)
    model = convnet((6, 8, 8, 10), in_channels=3)
    x_BCHW, y_B = images(n=128)
    widths = discover(model, x_BCHW)
    loss = loss_on(x_BCHW, y_B)

    def gradient(fresh, seed: int) -> float:  # type: ignore[no-untyped-def]
        probe, grown = copied(model, widths)
        grow(probe, grown, {name: 2}, fresh, seed)
        return reading_gradient(probe, grown, name, 2, loss)

    chosen = gradient(gradmax(model, widths, {name: 2}, loss, seeded(0), EVERYTHING), 0)
    assert chosen >= torch.tensor([gradient(zero_out, seed) for seed in range(20)]).median()


def test_no_direction_that_was_tried_is_better() -> None:
    """Where the network is so far from linear that what is best of a linear one is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
    x_BC, y_B = torch.randn(8, 6), torch.randint(6, (8,))
    widths = discover(model, x_BC)
    probe = _Probe(model, widths, widths["0"], loss_on(x_BC, y_B))
    as_tried = 0
    for seed in range(20):
        tried = _draw_orthonormal(4, 6, seeded(seed))
        found = _find_directions(probe, 1, 4, seeded(seed))
        most = probe.compute_gradients(tried).norm(dim=1).max()
        assert probe.compute_gradients(found).norm() >= most * (1 - 1e-5)
        as_tried += bool((tried == found).all(1).any())
    assert 0 < as_tried < 20


def test_more_candidates_give_no_less_on_a_linear_net() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 5), nn.Linear(5, 6))
    x_BC, y_B = torch.randn(20, 40), torch.randint(6, (20,))
    widths = discover(model, x_BC)
    found = []
    for candidates in (2, 10, 40):
        probe, grown = copied(model, widths)
        rows = gradmax(model, widths, {"0": 2}, loss_on(x_BC, y_B), seeded(0), candidates)
        grow(probe, grown, {"0": 2}, rows)
        found.append(reading_gradient(probe, grown, "0", 2, loss_on(x_BC, y_B)))
    assert found[0] < found[1] < found[2]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", [name for name, case in zoo.CASES.items() if not case.mixed])
def test_the_function_is_preserved(name: str) -> None:
    """For every structure in the zoo, all widths growing at once, by more than the fan-in of some."""
    model, example = zoo.CASES[name].model().eval(), zoo.CASES[name].example()
    widths = discover(model, example)
    then = model(example).detach()

    def loss(net: nn.Module) -> Tensor:
        return net.eval()(example).square().sum()

    rows = gradmax(model, widths, {width: 5 for width in widths}, loss, seeded(0))
    grow(model, widths, {width: 5 for width in widths}, rows)
    assert torch.allclose(model(example), then, atol=1e-5 * float(then.abs().max()))


def test_residual_widths_have_rows_for_all_of_their_writers() -> None:
    torch.manual_seed(0)
    model = resnet20(4).train()
    x_BCHW, y_B = images(n=16)
    widths = discover(model, x_BCHW)
    name = next(n for n in widths if len(widths[n].slots_with("out")) > 2)
    writers = {slot.module for slot in widths[name].slots_with("out")}
    rows = gradmax(model, widths, {name: 3}, loss_on(x_BCHW, y_B), seeded(0))
    assert rows.rows.keys() == writers
    joint = torch.cat([rows.rows[path].flatten(1) for path in writers], 1)
    assert joint.norm(dim=1).tolist() == pytest.approx([HE] * 3, rel=1e-5), "one direction over all of them"
    assert (joint @ joint.T - HE**2 * torch.eye(3)).abs().max() < 1e-4
    for mode in (False, True):
        probe, grown = copied(model, widths)
        then = copy.deepcopy(model).train(mode)(x_BCHW)
        grow(probe, grown, {name: 3}, rows)
        assert torch.allclose(probe.train(mode)(x_BCHW), then, atol=1e-5)


def test_grouped_layers_fall_back_to_zero_out() -> None:
    """Their channels come in groups, one direction for which would not do."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(8 * 16, 10)]
    model = nn.Sequential(*layers)
    x_BCHW, y_B = images()
    widths = discover(model, x_BCHW)
    added = {name: 2 for name in widths}
    rows = gradmax(model, widths, added, loss_on(x_BCHW, y_B), seeded(0))
    assert rows.rows == {}
    ours, theirs = copied(model, widths), copied(model, widths)
    grow(*ours, added, rows, seed=3)
    grow(*theirs, added, zero_out, seed=3)
    assert all(map(torch.equal, ours[0].state_dict().values(), theirs[0].state_dict().values()))


def test_more_channels_than_the_fan_in_has_entries() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 64, 10))
    x_BCHW, y_B = images(channels=1)
    widths = discover(model, x_BCHW)
    rows = gradmax(model, widths, {"0": 5}, loss_on(x_BCHW, y_B), seeded(0))
    assert rows.rows["0"].shape == (5, 1, 1, 1)
    assert rows.rows["0"].abs().flatten().tolist() == pytest.approx([HE] * 5, rel=1e-5)


def test_more_channels_than_weights_that_read_one() -> None:
    """Two weights tell two directions; the others are orthogonal to them, and to each other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    x_BCHW, y_B = images(channels=3, classes=2)
    widths = discover(model, x_BCHW)
    rows = gradmax(model, widths, {"0": 3}, loss_on(x_BCHW, y_B), seeded(0)).rows["0"].flatten(1)
    assert torch.allclose(rows @ rows.T, HE**2 * torch.eye(3), atol=1e-5)


class Auxiliary(nn.Module):
    """A branch that no loss sees, and one of which only a mean over channels is left."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.unseen = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)
        self.averaged, self.head = nn.Conv2d(4, 6, 1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        return self.head(x.mean((2, 3))), self.unseen(x), self.averaged(x).mean(1)


def test_what_the_loss_does_not_see_pulls_nowhere() -> None:
    torch.manual_seed(0)
    model = Auxiliary()
    x_BCHW, y_B = images()
    widths = discover(model, x_BCHW)
    both = {"stem": 3, "averaged": 2}
    rows = gradmax(model, widths, both, lambda net: F.cross_entropy(net(x_BCHW)[0], y_B), seeded(0)).rows
    alone = nn.Sequential(model.stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    expected = gradmax(alone, discover(alone, x_BCHW), {"0": 3}, loss_on(x_BCHW, y_B), seeded(0)).rows
    assert rows.keys() == {"stem"} and torch.allclose(rows["stem"], expected["0"], atol=1e-5)


def test_it_repeats_and_leaves_everything_else_alone() -> None:
    torch.manual_seed(0)
    model = convnet(in_channels=3)
    x_BCHW, y_B = images()
    widths = discover(model, x_BCHW)
    gates.attach_gates(model, widths, "weight", grace=2)
    model[3].eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    sizes, random = widths.sizes(), torch.get_rng_state()
    added = {name: 2 for name in widths}

    def found(seed: int) -> Rows:
        return gradmax(model, widths, added, loss_on(x_BCHW, y_B), seeded(seed))

    one, two, other = found(0), found(0), found(1)
    assert all(torch.equal(one.rows[path], two.rows[path]) for path in one.rows)
    assert not any(torch.equal(one.rows[path], other.rows[path]) for path in one.rows)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert modes == [module.training for module in model.modules()]
    assert sizes == widths.sizes()
    grow(model, widths, added, one)  # no graph of the search is alive


def test_gates_do_not_hide_what_is_behind_them() -> None:
    """A gated model gets the rows of the same model without gates, as long as all are open."""
    torch.manual_seed(0)
    model = convnet(in_channels=3)
    x_BCHW, y_B = images()
    widths = discover(model, x_BCHW)
    plain = gradmax(model, widths, {"3": 2}, loss_on(x_BCHW, y_B), seeded(0))
    gates.attach_gates(model, widths, "kernel")
    gated = gradmax(model, widths, {"3": 2}, loss_on(x_BCHW, y_B), seeded(0))
    assert torch.allclose(plain.rows["3"], gated.rows["3"], atol=1e-5)
