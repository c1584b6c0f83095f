"""Parameters and multiply-accumulates against counts by hand."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

from elastic.measure.counts import census, count_macs, count_macs_by_layer, count_params, count_params_dense
from elastic.models import convnet, resnet20
from elastic.pruning import gates
from elastic.pruning.folding import fold_gates
from elastic.pruning.gates import Grain
from elastic.widths.discovery import discover
from tests.elastic.zoo import CASES, STORED, Case, Net, conv, differences, head, states

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def numel(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def filled(net: nn.Module) -> nn.Module:
    """No parameter is zero, as a norm's fresh shift would be."""
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.1, 1)
    return net


# --- MACs ------------------------------------------------------------------------------------------------


def test_macs_of_resnet20_by_hand() -> None:
    """He et al., arXiv 1512.03385, table 6, with projection shortcuts."""
    stem = 32 * 32 * 3 * 9 * 16
    one = 6 * 32 * 32 * 16 * 9 * 16
    two = 16 * 16 * (16 * 9 * 32 + 5 * 32 * 9 * 32 + 16 * 32)
    three = 8 * 8 * (32 * 9 * 64 + 5 * 64 * 9 * 64 + 32 * 64)
    assert (
        count_macs(resnet20(), torch.zeros(1, 3, 32, 32)) == stem + one + two + three + 64 * 10 == 40_813_184
    )


class Scaled(nn.Module):
    """A convolution of a program's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(6, 4, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 0.1 * self.weight)


def test_a_layer_of_ones_own_has_its_macs_with_gates_and_without() -> None:
    net, x = nn.Sequential(conv(3, 4), Scaled(), nn.BatchNorm2d(6), conv(6, 5)), torch.zeros(2, 3, 8, 8)
    expected = {"0": 64 * 3 * 4, "1": 36 * 4 * 9 * 6, "3": 36 * 6 * 5}
    assert count_macs_by_layer(net, x) == expected
    gates.attach_gates(net, discover(net, x), "weight")
    assert count_macs_by_layer(net, x) == expected


def test_macs_of_convnet_by_hand() -> None:
    found = count_macs_by_layer(convnet((4, 6, 6, 8)), torch.zeros(5, 1, 12, 12))
    sizes = (144 * 9 * 4, 144 * 4 * 9 * 6, 36 * 6 * 9 * 6, 36 * 6 * 9 * 8, 8 * 10)
    assert found == dict(zip(("0", "3", "7", "10", "16"), sizes, strict=True))


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(4, 6, 3), (4, 8, 8), 36 * 9 * 4 * 6),
        (nn.Conv2d(4, 6, 3, stride=2, padding=1), (4, 8, 8), 16 * 9 * 4 * 6),
        (nn.Conv2d(4, 6, 3, dilation=2), (4, 8, 8), 16 * 9 * 4 * 6),
        (nn.Conv2d(4, 8, (1, 5), groups=4), (4, 8, 8), 8 * 4 * 5 * 8),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (4, 8, 8), 64 * 9 * 2 * 6),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 8, 8), 64 * 4 * 4 * 6),
        (nn.Conv1d(4, 6, 3), (4, 8), 6 * 3 * 4 * 6),
        (nn.Linear(4, 6), (4,), 24),
        (nn.Linear(4, 6), (7, 4), 7 * 24),
        (nn.BatchNorm2d(4), (4, 8, 8), 0),
    ],
    ids=repr,
)
def test_macs_of_one_layer(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    x = torch.zeros(3, *shape)
    assert count_macs(layer, x) == expected
    assert count_macs(nn.Sequential(layer, nn.ReLU()), x) == expected
    assert count_macs_by_layer(nn.Sequential(layer), x) == ({"0": expected} if expected else {})


@every_case
def test_layers_sum_to_the_whole(case: Case) -> None:
    """The hooks of a real run see what the count must say."""
    net, x = case.model().eval(), case.example()
    seen: dict[str, int] = {}

    def hook(path: str) -> Any:
        def count(layer: Any, args: tuple[Tensor], y: Tensor) -> None:
            weight = layer.weight
            positions = args[0] if isinstance(layer, nn.ConvTranspose2d) else y
            per = weight[:, 0].numel() * weight.shape[1]
            places = positions[0].numel() // (weight.shape[0])
            seen[path] = seen.get(path, 0) + places * per

        return count

    for path, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd, DeformConv2d)):
            layer.register_forward_hook(hook(path))
    net(x)
    found = count_macs_by_layer(case.model(), x)
    assert found == seen
    assert count_macs(case.model(), x) == sum(seen.values())


def test_products_outside_of_layers_count() -> None:
    net = Net(lambda m, x: m.out((x @ x.transpose(1, 2)).mean(2)), out=nn.Linear(5, 2))
    found = count_macs_by_layer(net, torch.zeros(3, 5, 7))
    assert found == {"out": 10, "": 5 * 7 * 5}
    assert count_macs(net, torch.zeros(1, 5, 7)) == 10 + 5 * 7 * 5


def test_what_a_forward_makes_has_no_part_in_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        mean, scale = torch.tensor([0.4, 0.5, 0.6]), torch.linspace(0.5, 1, 3).tolist()
        return m.conv((x - mean[:, None, None]) * scale[1])

    plain = Net(lambda m, x: m.conv(x), conv=conv(3, 4, 3))
    x = torch.zeros(1, 3, 8, 8)
    assert count_macs(Net(forward, conv=conv(3, 4, 3)), x) == count_macs(plain, x) == 3 * 4 * 9 * 64


def test_clips_whose_frames_lie_in_the_batch_are_counted_by_frame() -> None:
    """As temporal shift modules do it (arXiv 1811.08383)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        clips = m.conv(x).unflatten(0, (-1, 4))
        frames = torch.cat([clips[:, 1:], torch.zeros_like(clips[:, :1])], 1).flatten(0, 1)
        return m.last(frames).unflatten(0, (-1, 4)).mean((1, 3, 4))

    net = Net(forward, conv=conv(3, 4, 3), last=conv(4, 5))
    assert count_macs_by_layer(net, torch.zeros(8, 3, 6, 6)) == {"conv": 3 * 4 * 9 * 36, "last": 4 * 5 * 36}
    with pytest.raises(RuntimeError):
        count_macs(net, torch.zeros(1, 3, 6, 6))


def test_counting_leaves_the_model_alone() -> None:
    net = convnet((4, 6, 6, 8)).train()
    before, drawn = states(net), torch.get_rng_state()
    count_macs(net, torch.zeros(1, 1, 8, 8))
    count_params(net)
    assert not differences(before, states(net))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in net.modules())


@pytest.mark.parametrize("grain", ["weight", "kernel", "channel"])
def test_macs_are_those_of_dense_kernels(grain: Grain) -> None:
    """Closed gates save nothing until compaction."""
    net, x = convnet((4, 6, 6, 8)), torch.zeros(1, 1, 8, 8)
    expected = count_macs_by_layer(net, x)
    gates.attach_gates(net, discover(net, x), grain)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data.fill_(-1)
    assert count_macs_by_layer(net, x) == expected


# --- parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", STORED.values(), ids=STORED)
def test_parameters_of_a_plain_model(case: Case) -> None:
    net = filled(case.model())
    assert count_params(net) == count_params_dense(net) == numel(net)
    first = next(net.parameters())
    with torch.no_grad():
        first.view(-1)[:2] = 0
    assert count_params(net) == numel(net) - 2
    assert count_params_dense(net) == numel(net)


def test_buffers_do_not_count() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert count_params(net) == 12 + 4, "a fresh norm shifts by zero"
    assert count_params_dense(net) == 12 + 8


@pytest.mark.parametrize("grain", ["weight", "kernel", "block", "channel"])
def test_parameters_of_a_gated_model(grain: Grain) -> None:
    net: Any = filled(nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), head(4)))
    dense, x = numel(net), torch.zeros(1, 3, 6, 6)
    assert dense == 4 * 27 + 4 + 8 + 20 + 5
    gates.attach_gates(net, discover(net, x), grain, grace=2)
    assert count_params(net) == count_params_dense(net) == dense, "scores and grace do not count"
    gate = next(gate for path, _, gate in gates.iterate_gates(net) if path == "0")
    gate.score.data[1] = -1
    gate.grace.fill_(2)
    lost = 27 + 3 if grain == "channel" else 27  # with its bias and the norm's two
    assert count_params(net) == dense - lost
    assert count_params_dense(net) == dense
    assert count_params(net) == count_params(fold_gates(net))
    net[0].parametrizations["weight"].original.data[0, 0, 0, 0] = 0
    assert count_params(net) == dense - lost - 1


def test_shared_parameters_count_once() -> None:
    case = CASES["shared"]
    net = filled(case.model())
    assert count_params(net) == 16 + 4 * 36 + 4 + 25
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    tied[2].weight = tied[0].weight
    assert count_params(filled(tied)) == count_params_dense(tied) == 16
    twice = nn.ModuleList([tied, tied[0]])
    assert count_params(twice) == 16


def test_a_shared_gated_layer_counts_once() -> None:
    case = CASES["shared"]
    net, x = filled(case.model()), case.example()
    gates.attach_gates(net, discover(net, x), "weight")
    assert count_params(net) == count_params_dense(net) == 16 + 4 * 36 + 4 + 25


def test_a_module_that_has_something_named_score_counts() -> None:
    net = Net(
        lambda m, x: m.score(m.gamma * m.conv(x)),
        **dict(conv=conv(3, 4), gamma=nn.Parameter(torch.ones(4, 1, 1)), score=head(4)),
    )
    assert count_params(net) == count_params_dense(net) == numel(net)


def test_frozen_and_half_precision_parameters_count() -> None:
    net = filled(convnet((4, 6, 6, 8))).requires_grad_(False).half()
    assert count_params(net) == numel(net)


def test_a_census_says_it_all() -> None:
    net, x = filled(convnet((4, 6, 6, 8))), torch.zeros(2, 1, 8, 8)
    widths = discover(net, x)
    with torch.no_grad():
        next(net.parameters()).zero_()
    found = census(net, widths, x)
    assert found.params == numel(net) - 36
    assert found.params_dense == numel(net)
    assert found.macs == count_macs(net, x)
    assert found.widths == {"0": 4, "3": 6, "7": 6, "10": 8}
    expected = copy.deepcopy(net)
    assert F.mse_loss(net.eval()(x), expected.eval()(x)) == 0
