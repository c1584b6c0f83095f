"""Growth in depth: a block that enters as an identity, and all that has to follow."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet

from elastic import discover
from elastic.errors import StructureError
from elastic.files.network import Network
from elastic.models import resnet20
from elastic.models.resnet import BasicBlock
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.pruning.ranking import keep_best_gates
from elastic.surgery.depth import count_blocks, deepen, find_stages
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import grow_index, reindex
from tests.elastic import zoo

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class PreActivation(nn.Module):
    """Begins with its norms, as the blocks of wide ResNets do, and ends in a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(self.norm1(x_BCHW).relu())
        return x_BCHW + self.conv2(self.norm2(h_BCHW).relu())  # type: ignore[no-any-return]


class Plain(nn.Module):
    """Has no norm at all, as for images with more pixels: its branch is scaled by a number."""

    def __init__(self, weight_norm: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1)
        if weight_norm:
            self.conv2 = nn.utils.parametrizations.weight_norm(self.conv2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.conv2(self.conv1(x_BCHW).relu()) * 0.1 + x_BCHW  # type: ignore[no-any-return]


class Dark(nn.Module):
    """Has an activation behind the norm that ends its branch, whose slope at zero is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.norm(self.conv2(self.conv1(x_BCHW).relu()))
        return nn.functional.leaky_relu(h_BCHW, 0.1) + x_BCHW


class Stage(nn.Module):
    """Holds blocks: a stage, and no block of those that hold it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Plain(), Plain())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.blocks(x_BCHW)  # type: ignore[no-any-return]


class Mixer(nn.Module):
    """Mixes places, and then channels, each in a branch of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, 4), nn.GroupNorm(1, 4)
        self.pool, self.scale = nn.AvgPool2d(3, 1, 1), nn.Parameter(torch.ones(4, 1, 1))
        self.fc1, self.fc2, self.drop = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1), nn.Dropout(0.0)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW + self.scale * self.pool(self.norm1(x_BCHW))
        return x_BCHW + self.drop(self.fc2(nn.functional.gelu(self.fc1(self.norm2(x_BCHW)))))


class Listed(nn.Module):
    """Goes through stages that it holds in lists, with other layers between them."""

    def __init__(self, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.between = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.stages = nn.ModuleList(nn.ModuleList([kind(), kind()]) for _ in range(2))
        self.last, self.head = nn.Sequential(kind()), nn.Linear(4, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.stem(x_BCHW)
        for stage in self.stages:
            for block in stage:  # type: ignore[attr-defined]
                h_BCHW = block(h_BCHW)
            h_BCHW = self.between(h_BCHW)
        return self.head(self.last(h_BCHW).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet20(width=4),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "efficientnet": lambda: EfficientNet(
        [MBConvConfig(2, 3, 1, *channels, 2) for channels in ((8, 8), (8, 12), (12, 16))],
        dropout=0.0,
        stochastic_depth_prob=0.0,
        num_classes=10,
        last_channel=16,
    ),
    "convnext": lambda: ConvNeXt(
        [CNBlockConfig(4, 6, 1), CNBlockConfig(6, 8, 2), CNBlockConfig(8, None, 2)], num_classes=10
    ),
    "bottlenecks": lambda: ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10, width_per_group=8),
    "regnet": lambda: RegNet(BlockParams([2, 2, 2], [4, 8, 8], [2, 4, 4], [1.0] * 3, [2, 2, 2]), 10, 4),
    "wide resnet": lambda: Listed(PreActivation),
    "no norm": lambda: Listed(Plain),
    "weight norm": lambda: Listed(functools.partial(Plain, weight_norm=True)),
    "two branches": lambda: Listed(Mixer),
    "leaky": lambda: Listed(Dark),
}


def built(name: str = "resnet20", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name]()


@torch.no_grad()
def run(net: nn.Module, training: bool) -> Tensor:
    return copy.deepcopy(net).train(training)(X)


@pytest.mark.parametrize(
    "name",
    [
        "efficientnet",
        "convnext",
        "resnet20",
        *("regnet", "wide resnet", "no norm", "weight norm", "two branches", "leaky"),
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "bottlenecks")),
    ],
)
def test_a_deeper_network_is_the_same_function(name: str) -> None:
    net = built(name)
    run_before = {training: run(net, training) for training in (True, False)}
    widths = discover(net, X)
    before, blocks = widths.sizes(), count_blocks(net)
    for stage in find_stages(net):
        deepen(net, widths, stage)
    assert count_blocks(net) == {stage: count + 1 for stage, count in blocks.items()} and len(blocks) >= 3
    assert {name: widths[name].size for name in before} == before
    assert len(widths) >= len(before) + len(blocks), "the blocks' inner widths are widths, too"
    for training, expected in run_before.items():
        assert torch.equal(run(net, training), expected)


class Scaled(BasicBlock):
    """A branch that is weighed by what it holds, scaled, and dropped in training."""

    def __init__(self) -> None:
        super().__init__(4, 4, 1)
        self.squeeze, self.scale = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4))
        self.drop = nn.Dropout(0.5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.bn2(self.conv2(x_BCHW))
        h_BCHW = h_BCHW * self.squeeze(h_BCHW.mean((2, 3), keepdim=True)).sigmoid()
        return x_BCHW + self.drop(self.scale.view(1, -1, 1, 1) * h_BCHW)


def test_a_branch_may_end_in_a_scale_and_in_what_drops_it() -> None:
    torch.manual_seed(0)
    net = wrapped(nn.Sequential(Scaled(), Scaled()))
    assert find_stages(net) == {"layer": ("scale",)}
    before = run(net, False)
    deepen(net, discover(net, X), "layer")
    assert torch.equal(run(net, False), before)
    net.train()(X).square().sum().backward()
    block: Any = net.get_submodule("layer.2")
    assert block.scale.grad.abs().min() > 0 and not block.scale.any() and block.bn2.weight.any()


def test_a_new_block_learns_from_the_first_step_on() -> None:
    net = built()
    deepen(net, discover(net, X), "stage2")
    block = net.get_submodule("stage2.3")
    net.train()(X).square().sum().backward()
    assert block.bn2.weight.grad.abs().min() > 0  # type: ignore[union-attr]
    with torch.no_grad():
        block.bn2.weight.fill_(0.1)  # type: ignore[union-attr]
    net(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters())


@pytest.mark.parametrize("name", ["regnet", "wide resnet", "no norm", "weight norm", "two branches", "leaky"])
def test_a_new_block_learns_however_it_ends(name: str) -> None:
    """What ends its branches first, all of it from the second step on."""
    net = built(name)
    stage, last = next(iter(find_stages(net).items()))
    deepen(net, discover(net, X), stage)
    block = list(net.get_submodule(stage).children())[-1]
    for _ in range(2):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        optimizer.zero_grad()
        net.train()(X).square().sum().backward()
        for tensor in {tensor.rpartition(".")[0] for tensor in last}:
            assert any(p.grad.abs().sum() > 0 for p in block.get_submodule(tensor).parameters())  # type: ignore[union-attr]
        optimizer.step()
    learnt = [p.grad is not None and p.grad.abs().sum() > 0 for p in block.parameters()]
    assert all(learnt) and len(learnt) > 3


@pytest.mark.parametrize("name", ["regnet", "wide resnet", "two branches"])
def test_any_deeper_network_is_gated_compacted_saved_and_loaded(name: str, tmp_path: Path) -> None:
    net = built(name)
    stages = list(find_stages(net))
    for stage in (stages[0], stages[0], stages[-1]):
        deepen(net, discover(net, X), stage)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.full_like(parameter, 0.1).normal_(0, 0.1))
    gates.attach_gates(net, discover(net, X), "weight")
    keep_best_gates(net, 0.3 * gates.count_gated(net))
    plain = compact(net, X)
    assert torch.allclose(run(plain, False), run(net, False), atol=1e-4)
    Network(plain).save(tmp_path / "m", {})
    assert torch.equal(run(Network.load(tmp_path / "m", built(name), X).plain(), False), run(plain, False))
    state = net.state_dict()
    del state[next(reversed(state))]
    shallow = built(name)
    gates.attach_gates(shallow, discover(shallow, X), "weight")
    before = zoo.states(shallow)
    with pytest.raises(StructureError, match="another architecture"):
        rebuild(shallow, discover(shallow, X), state)
    assert not zoo.differences(before, zoo.states(shallow))


def test_blocks_differ_and_repeat_with_their_generator() -> None:
    def drawn(seed: int) -> Tensor:
        net = built()
        deepen(net, discover(net, X), "stage1", generator=torch.Generator().manual_seed(seed))
        return net.get_submodule("stage1.3").conv1.weight.detach()  # type: ignore[union-attr,return-value]

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_a_deepened_network_changes_its_widths_like_any_other() -> None:
    net = built()
    widths = discover(net, X)
    deepen(net, widths, "stage1")
    before = run(net, False)
    reindex(net, widths, {name: grow_index(widths[name].size, 2) for name in widths})
    assert torch.allclose(run(net, False), before, atol=1e-5)
    assert net.get_submodule("stage1.3.conv1").weight.shape == (6, 6, 3, 3)  # type: ignore[union-attr]


def test_gates_start_open_and_in_grace_and_copies_get_the_same_block() -> None:
    net = built()
    widths = discover(net, X)
    gates.attach_gates(net, widths, "weight", grace=2)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data.uniform_(-1, 1)
    twin = copy.deepcopy(net)
    before = run(net, True)
    deepen(net, widths, "stage3", copies=[twin])
    assert torch.equal(run(net, True), before)
    fresh = [gate for path, _, gate in gates.iterate_gates(net) if path.startswith("stage3.3.")]
    assert len(fresh) == 2
    assert all((gate.score == gates.START).all() and (gate.grace == 2).all() for gate in fresh)
    block, its = (n.get_submodule("stage3.3").state_dict() for n in (net, twin))
    assert block.keys() == its.keys() and all(torch.equal(block[k], its[k]) for k in block)
    assert net.get_submodule("stage3.3") is not twin.get_submodule("stage3.3")


# --- saved and restored -------------------------------------------------------------------------------------


def deepened() -> nn.Module:
    return copy.deepcopy(_deepened())


@functools.cache
def _deepened() -> nn.Module:
    net = built(seed=1)
    widths = discover(net, X)
    deepen(net, widths, "stage1")
    reindex(net, widths, {"stage1.3.conv1": range(3), "conv": range(3)})
    deepen(net, widths, "stage1")
    deepen(net, widths, "stage3")
    reindex(net, widths, {"stage3.3.conv1": grow_index(16, 4)})
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1)
                module.bias.uniform_(-0.1, 0.1)
    return net


def test_a_state_dict_says_how_deep_the_network_is() -> None:
    source, net = deepened(), built()
    widths = discover(net, X)
    rebuild(net, widths, source.state_dict())
    net.load_state_dict(source.state_dict())
    assert torch.equal(run(net, False), run(source, False))
    assert widths.sizes() == discover(source, X).sizes()


@pytest.mark.parametrize("gone", ["stage1.4.bn1.weight", "fc.bias", "stage3.3.conv2.weight"])
def test_a_state_that_does_not_fit_leaves_the_network_as_it_was(gone: str) -> None:
    state = deepened().state_dict()
    del state[gone]
    net = built()
    widths = discover(net, X)
    sizes, before = widths.sizes(), zoo.states(net)
    with pytest.raises(StructureError, match="another architecture"):
        rebuild(net, widths, state)
    assert widths.sizes() == sizes == discover(net, X).sizes()
    assert not zoo.differences(before, zoo.states(net))


def test_the_shallower_state_is_refused_by_a_deeper_network() -> None:
    with pytest.raises(StructureError, match="it lacks"):
        net = deepened()
        rebuild(net, discover(net, X), built().state_dict())


def test_compacted_saved_and_loaded(tmp_path: Path) -> None:
    net = deepened()
    gates.attach_gates(net, discover(net, X), "weight")
    keep_best_gates(net, 0.3 * gates.count_gated(net))
    plain = compact(net, X)
    assert torch.allclose(run(plain, False), run(net, False), atol=1e-5)
    Network(plain).save(tmp_path / "m", {})
    assert torch.equal(run(Network.load(tmp_path / "m", built(), X).plain(), False), run(plain, False))


class Forward(nn.Module):
    """Uses its stage in a way of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first = how, nn.Conv2d(3, 4, 3)
        self.layer = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        self.last = nn.Linear(4, 2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.first(x_BCHW).relu()
        if self.how == "one by one":
            h_BCHW = self.layer[1](self.layer[0](h_BCHW))
        elif self.how == "all outputs":
            for block in self.layer:
                h_BCHW = h_BCHW + block(h_BCHW)
        elif self.how == "their number":
            h_BCHW = self.layer(h_BCHW) / len(self.layer)
        else:
            h_BCHW = self.layer(h_BCHW)
        return self.last(h_BCHW.mean((2, 3)))


class InDictionary(Forward):
    def forward(self, x_BCHW: Tensor) -> Any:
        return {"logits": super().forward(x_BCHW)}


class Overwrites(BasicBlock):
    """Changes its input, so that its shortcut is another one."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.bn1(self.conv1(nn.functional.relu(x_BCHW, inplace=True))) + x_BCHW


class Twice(BasicBlock):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return torch.add(self.bn2(self.conv2(self.conv1(x_BCHW))), x_BCHW, alpha=2)


def shared() -> nn.Module:
    block = BasicBlock(4, 4, 1)
    return nn.Sequential(block, block)


UNUSABLE: dict[str, Callable[[], nn.Module]] = {
    **{how: (lambda how=how: Forward(how)) for how in ("one by one", "all outputs", "their number")},  # type: ignore[misc]
    "in a dictionary": lambda: InDictionary("their number"),
    "overwritten input": lambda: wrapped(nn.Sequential(Overwrites(4, 4, 1), Overwrites(4, 4, 1))),
    "another addition": lambda: wrapped(nn.Sequential(Twice(4, 4, 1), Twice(4, 4, 1))),
    "one block twice": lambda: wrapped(shared()),
    "one by one, listed": lambda: wrapped(nn.ModuleList(shared()), "one by one"),
}


def wrapped(stage: nn.Module, how: str = "in order") -> nn.Module:
    net = Forward(how)
    net.layer = stage  # type: ignore[assignment]
    return net


@pytest.mark.parametrize("how", list(UNUSABLE))
def test_what_a_block_more_would_change_is_refused_and_left_as_it_was(how: str) -> None:
    torch.manual_seed(0)
    net = UNUSABLE[how]()
    widths = discover(net, X)
    sizes, before, modes = widths.sizes(), zoo.states(net), [module.training for module in net.modules()]
    with pytest.raises(
        StructureError, match=r"'layer' cannot grow: .* set its Growth's blocks to 0"
    ) as caught:
        deepen(net, widths, "layer")
    assert "\n" not in str(caught.value)
    assert widths.sizes() == sizes and not zoo.differences(before, zoo.states(net))
    assert modes == [module.training for module in net.modules()]


class Depthwise(nn.Module):
    """An inverted bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bn1 = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.dw, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.down, self.bn3 = nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.bn2(self.dw(self.bn1(self.up(x_BCHW)).relu())).relu()
        return x_BCHW + self.bn3(self.down(h_BCHW))  # type: ignore[no-any-return]


def test_a_depthwise_width_of_one_channel_stays_one_width() -> None:
    net = wrapped(nn.Sequential(Depthwise(), Depthwise()))
    widths = discover(net, X)
    reindex(net, widths, {"layer.0.up": [0], "layer.1.up": [3]})
    deepen(net, widths, "layer")
    assert widths.sizes() == {"first": 4, "layer.0.up": 1, "layer.1.up": 1, "layer.2.up": 1}
    before = run(net, False)
    reindex(net, widths, {"layer.2.up": grow_index(1, 2)})
    torch.testing.assert_close(run(net, False), before)


def test_a_stage_that_begins_with_other_layers_is_counted_right() -> None:
    def made() -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), BasicBlock(4, 4, 1), BasicBlock(4, 4, 1))
        )

    source, net = made(), made()
    deepen(source, discover(source, X), "")
    rebuild(net, discover(net, X), source.state_dict())
    assert len(net) == 6  # type: ignore[arg-type]


def test_of_stages_in_stages_the_outer_ones_grow() -> None:
    class Outer(BasicBlock):
        def __init__(self) -> None:
            super().__init__(4, 4, 1)
            self.inner = nn.Sequential(BasicBlock(4, 4, 1))

        def forward(self, x_BCHW: Tensor) -> Tensor:
            return self.relu(self.bn2(self.conv2(self.inner(x_BCHW))) + x_BCHW)  # type: ignore[no-any-return]

    assert find_stages(wrapped(nn.Sequential(Outer(), Outer()))) == {"layer": ("bn2.weight", "bn2.bias")}


def test_a_module_that_holds_a_stage_is_no_block() -> None:
    stages = find_stages(wrapped(nn.Sequential(Stage(), Stage())))
    assert stages == {f"layer.{i}.blocks": ("conv2.weight", "conv2.bias") for i in range(2)}


def test_layers_parametrized_by_others_are_no_blocks() -> None:
    block = BasicBlock(4, 4, 1)
    nn.utils.parametrizations.spectral_norm(block.conv1)
    assert find_stages(nn.Sequential(block)) == {}


def test_synchronised_norms_are_followed_on_any_machine() -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(built())
    widths = discover(net, X)
    assert widths == discover(built(), X)
    deepen(net, widths, "stage1")
    assert count_blocks(net)["stage1"] == 4


# --- what cannot grow ---------------------------------------------------------------------------------------


class Other(BasicBlock):
    """A block whose end is not idempotent, or whose branch does not end in a norm."""

    def __init__(self, how: str) -> None:
        super().__init__(4, 4, 1)
        self.how = how

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x_BCHW)))))
        if self.how == "gelu":
            return nn.functional.gelu(h_BCHW + x_BCHW)
        if self.how == "relu before":
            return self.relu(h_BCHW) + x_BCHW
        if self.how == "dropped":  # what comes by, too
            return self.relu(h_BCHW + nn.functional.dropout(x_BCHW, training=self.training))
        if self.how == "scaled":
            return self.relu(h_BCHW + 2 * x_BCHW)
        return self.relu(h_BCHW + self.bn1(x_BCHW))


@pytest.mark.parametrize("how", ["gelu", "relu before", "scaled", "two norms", "dropped"])
def test_a_block_that_could_not_be_an_identity_is_no_stage(how: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Other(how), Other(how)), nn.Conv2d(4, 2, 3))
    assert find_stages(net) == {}
    refusal = "'1' is no sequence of residual blocks .* the model has none"
    with pytest.raises(StructureError, match=refusal) as caught:
        deepen(net, discover(net, X), "1")
    assert "\n" not in str(caught.value)


def test_norms_without_gain_and_children_without_numbers_are_no_stages() -> None:
    block = BasicBlock(4, 4, 1)
    block.bn2 = nn.BatchNorm2d(4, affine=False)
    named = nn.Sequential()
    named.add_module("first", BasicBlock(4, 4, 1))  # what would the next be called?
    assert find_stages(nn.Sequential(block)) == find_stages(named) == {}
    assert find_stages(nn.Sequential(BasicBlock(4, 4, 1))) == {"": ("bn2.weight", "bn2.bias")}
    assert find_stages(nn.Sequential(BasicBlock(4, 8, 1))) == {}, "its shortcut is no identity"
    block = BasicBlock(4, 4, 1)
    assert find_stages(nn.Sequential(block, nn.Conv2d(4, 4, 1), block)) == {"": ("bn2.weight", "bn2.bias")}


def test_the_stages_there_are_are_named() -> None:
    net = built()
    with pytest.raises(StructureError, match=r"'stage9' .* the model has stage1, stage2, stage3"):
        deepen(net, discover(net, X), "stage9")
