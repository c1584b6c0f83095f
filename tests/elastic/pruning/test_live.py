"""What gates leave, counted while they stand, against the compacted network and entry by entry."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import DenseNet, MobileNetV3, ShuffleNetV2
from torchvision.models.mobilenetv3 import InvertedResidualConfig

from elastic.measure.counts import count_macs, count_macs_per_weight, count_params
from elastic.models import convnet, resnet20
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.fitting import measure_compacted
from elastic.pruning.folding import compute_mask
from elastic.pruning.gates import Grain
from elastic.pruning.live import count_live_macs, count_live_params, find_alive, read_entries
from elastic.pruning.ranking import reopen_gates
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic.pruning.grains import every_case_and_grain, every_grain
from tests.elastic.zoo import Case


def close_at_random(net: nn.Module, rate: float, seed: int = 0) -> None:
    """Close single gates, and whole rows and columns."""
    draw = torch.Generator().manual_seed(seed)
    for _, _, gate in gates.iterate_gates(net):
        score = gate.score.data
        closed = torch.rand(score.shape, generator=draw) < 0.3
        closed[torch.rand(len(score), generator=draw) < rate] = True
        closed[:, torch.rand(score.shape[1], generator=draw) < rate / 2] = True
        score.masked_fill_(closed, -1.0)


def find_masks(model: nn.Module, widths: Widths) -> dict[tuple[str, str], Tensor]:
    """Find which entries live, by the definition: entry by entry, until nothing changes."""
    slots = [slot for width in widths.values() for slot in width.slots if slot.tensor in ("weight", "bias")]
    masks = {(s.module, s.tensor): compute_mask(model.get_submodule(s.module), s.tensor) for s in slots}
    while True:
        before = {key: mask.clone() for key, mask in masks.items()}
        for name, width in widths.items():
            if width.mixed is not None:  # its dead channels are felt by the others
                continue
            slots = [slot for slot in width.slots if slot.tensor in ("weight", "bias")]
            written = [slot for slot in slots if slot.role == "out"]
            for channel in range(width.size):

                def lines(slot: Any, channel: int = channel, name: str = name) -> list[Tensor]:
                    positions = widths.positions(slot, name)[channel].tolist()
                    return [masks[slot.module, slot.tensor].select(slot.dim, place) for place in positions]

                read = [slot for slot in slots if slot.role == "in"]
                if all(any(bool(line.any()) for s in side for line in lines(s)) for side in (written, read)):
                    continue
                for slot in slots:
                    for line in lines(slot):
                        line.zero_()
        if all(torch.equal(before[key], mask) for key, mask in masks.items()):
            return masks


@pytest.mark.sampled(10)
@every_case_and_grain
def test_live_entries_entry_by_entry(case: Case, grain: Grain) -> None:
    net, x = case.model(), case.example()
    widths = discover(net, x)
    gates.attach_gates(net, widths, grain)
    close_at_random(net, 0.4)
    params = count_params(net)
    entries, others = read_entries(net, widths)
    alive = find_alive(entries, widths).entries
    expected = find_masks(net, widths)
    assert alive.keys() == expected.keys()
    assert params == others + sum(int(entry.nonzero.sum()) for entry in entries.values())
    dead = 0
    for (path, tensor), mask in expected.items():
        values = getattr(net.get_submodule(path), tensor)
        entry = entries[path, tensor]
        others = [dim for dim in range(mask.dim()) if dim not in entry.dims]
        live = mask.flatten() if not others else mask.sum(others).flatten()
        assert torch.equal(torch.from_numpy(entry.open * alive[path, tensor]).flatten(), live.int())
        dead += int(((values != 0) & (mask == 0)).sum())
    assert count_live_params(net, widths) == params - dead
    if grain == "channel":  # whose dense kernels do more than what is open
        return
    uses = {path: 2.0 for path, tensor in expected if tensor == "weight" and mask.dim() > 0}
    assert count_live_macs(net, widths, uses) == sum(2 * float(expected[p, "weight"].sum()) for p in uses)


def test_live_sizes_are_those_of_the_compacted_network() -> None:
    """At channel grain without constants: a death that spreads counts as compaction finds it."""
    net, x = convnet((4, 6, 6, 8)), torch.zeros(1, 1, 12, 12)
    for parameter in net.parameters():
        nn.init.uniform_(parameter, 0.1, 1)
    widths = discover(net, x)
    gates.attach_gates(net, widths, "channel")
    closed = (("0", [1]), ("3", [0, 2]), ("10", [7]))
    for path, channels in closed:
        gate = next(gate for p, _, gate in gates.iterate_gates(net) if p == path)
        gate.score.data[channels] = -1
    small = compact(net, x)
    assert count_live_params(net, widths) == count_params(small)
    uses = count_macs_per_weight(net, x)
    assert count_live_macs(net, widths, uses) == count_macs(small, x)


def make_small_mobilenet() -> nn.Module:
    settings = [
        InvertedResidualConfig(8, 3, 16, 8, True, "HS", 1, 1, 1),
        InvertedResidualConfig(8, 5, 24, 12, True, "HS", 2, 1, 1),
        InvertedResidualConfig(12, 3, 32, 12, False, "RE", 1, 1, 1),
    ]
    return MobileNetV3(settings, 32, num_classes=5)


PUBLISHED = {
    "mobilenet": make_small_mobilenet,
    "shufflenet": lambda: ShuffleNetV2([2, 2, 2], [8, 16, 24, 32, 32], num_classes=5),
    "densenet": lambda: DenseNet(4, (2, 2), 8, bn_size=2, num_classes=5),
    "resnet": lambda: resnet20(4),
}


@pytest.mark.parametrize("rate", [0.4, 0.8])
@pytest.mark.parametrize("build", PUBLISHED.values(), ids=PUBLISHED)
def test_what_lives_of_a_published_network_is_what_compaction_leaves(
    build: Callable[[], nn.Module], rate: float
) -> None:
    """Behind squeeze and excitation, depthwise convolutions, shuffles, and norms of what is joined."""
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(1, 3, 32, 32)
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.3)
    widths, uses = discover(net, x), count_macs_per_weight(net, x)
    gates.attach_gates(net, widths, "channel")
    for _, _, gate in gates.iterate_gates(net):
        score = torch.where(torch.rand_like(gate.score) < rate, -1.0, 1.0)
        score.flatten()[0] = 1.0
        gates.set_score(gate, score)
    small = compact(net, x)
    torch.testing.assert_close(small(x), net(x))
    # But for biases that take over what norms of a DenseNet make of closed channels.
    assert count_live_params(net, widths) == pytest.approx(count_params(small), rel=0.01)
    assert count_live_macs(net, widths, uses) == pytest.approx(count_macs(small, x), rel=1e-6)
    assert measure_compacted(net, x, "macs") == count_macs(small, x)


def test_layers_of_fixed_channels_count_as_they_are() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 5, 1)]
    net, x = nn.Sequential(*layers), torch.zeros(1, 3, 8, 8)
    widths = discover(net, x, only=["2"])
    gates.attach_gates(net, widths, "channel")
    assert count_live_macs(net, widths, count_macs_per_weight(net, x)) == count_macs(net, x)


@every_grain
def test_the_device_is_read_once(grain: Grain) -> None:
    net, x = resnet20(8), torch.zeros(1, 3, 32, 32)
    widths = discover(net, x)
    gates.attach_gates(net, widths, grain)
    close_at_random(net, 0.4)
    uses = count_macs_per_weight(net, x)
    looks = (
        lambda: count_live_params(net, widths),
        lambda: count_live_macs(net, widths, uses),
        lambda: gates.count_open(net),
        lambda: reopen_gates(net, 0.0),
        lambda: count_params(net),
    )
    for look in looks:
        with CountReads() as counter:
            look()
        assert counter.reads <= 1


class CountReads(TorchDispatchMode):
    """Count what hands values of tensors to Python or copies them to the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_copy = str(func) == "aten._to_copy.default" and kwargs.get("device") is not None
        self.reads += is_copy or str(func) == "aten._local_scalar_dense.default"
        return func(*args, **kwargs)
