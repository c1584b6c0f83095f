"""Growth in depth: a block that enters as an identity, and all that has to follow."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from elastic import StructureError, discover, gates
from elastic.checkpoint import load_compact, rebuild, save_compact
from elastic.compact import compact
from elastic.depth import deepen, depth, stages
from elastic.models import resnet20
from elastic.models.resnet import BasicBlock
from elastic.surgery import grow_index, reindex
from tests.elastic import zoo

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": lambda: resnet20(width=4),
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "bottlenecks": lambda: torchvision.models.resnet50(num_classes=10, width_per_group=8),
}


def built(name: str = "resnet20", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name]()


@torch.no_grad()
def run(net: nn.Module, training: bool) -> Tensor:
    return copy.deepcopy(net).train(training)(X)


@pytest.mark.parametrize("name", list(NETS))
def test_a_deeper_network_is_the_same_function(name: str) -> None:
    net = built(name)
    run_before = {training: run(net, training) for training in (True, False)}
    widths = discover(net, X)
    before, blocks = widths.sizes(), depth(net)
    for stage in stages(net):
        deepen(net, widths, stage)
    assert depth(net) == {stage: count + 1 for stage, count in blocks.items()} and len(blocks) >= 3
    assert {name: widths[name].size for name in before} == before
    assert len(widths) >= len(before) + len(blocks), "the blocks' inner widths are widths, too"
    for training, expected in run_before.items():
        assert torch.equal(run(net, training), expected)


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
    gates.attach(net, widths, "weight", grace=2)
    for _, _, gate in gates.gated(net):
        gate.score.data.uniform_(-1, 1)
    twin = copy.deepcopy(net)
    before = run(net, True)
    deepen(net, widths, "stage3", copies=[twin])
    assert torch.equal(run(net, True), before)
    fresh = [gate for path, _, gate in gates.gated(net) if path.startswith("stage3.3.")]
    assert len(fresh) == 2
    assert all((gate.score == gates.START).all() and (gate.grace == 2).all() for gate in fresh)
    block, its = (n.get_submodule("stage3.3").state_dict() for n in (net, twin))
    assert block.keys() == its.keys() and all(torch.equal(block[k], its[k]) for k in block)
    assert net.get_submodule("stage3.3") is not twin.get_submodule("stage3.3")


# --- saved and restored -------------------------------------------------------------------------------------


def deepened(seed: int = 1) -> nn.Module:
    net = built(seed=seed)
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
    gates.attach(net, discover(net, X), "weight")
    gates.settle(net, 0.3 * gates.total(net))
    plain = compact(net, X)
    assert torch.allclose(run(plain, False), run(net, False), atol=1e-5)
    save_compact(plain, tmp_path / "m", {})
    assert torch.equal(run(load_compact(built(), tmp_path / "m", X), False), run(plain, False))


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
        if self.how == "scaled":
            return self.relu(h_BCHW + 2 * x_BCHW)
        return self.relu(h_BCHW + self.bn1(x_BCHW))


@pytest.mark.parametrize("how", ["gelu", "relu before", "scaled", "two norms"])
def test_a_block_that_could_not_be_an_identity_is_no_stage(how: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(Other(how), Other(how)), nn.Conv2d(4, 2, 3))
    assert stages(net) == {}
    refusal = "'1' is no sequence of residual blocks .* the model has none"
    with pytest.raises(StructureError, match=refusal) as caught:
        deepen(net, discover(net, X), "1")
    assert "\n" not in str(caught.value)


def test_norms_without_gain_and_children_with_names_are_no_stages() -> None:
    block = BasicBlock(4, 4, 1)
    block.bn2 = nn.BatchNorm2d(4, affine=False)
    named = nn.Sequential()
    named.add_module("first", BasicBlock(4, 4, 1))
    assert stages(nn.Sequential(block)) == stages(named) == {}
    assert stages(nn.Sequential(BasicBlock(4, 4, 1))) == {"": "bn2"}
    assert stages(nn.Sequential(BasicBlock(4, 8, 1))) == {}, "its shortcut is no identity"


def test_the_stages_there_are_are_named() -> None:
    net = built()
    with pytest.raises(StructureError, match=r"'stage9' .* the model has stage1, stage2, stage3"):
        deepen(net, discover(net, X), "stage9")
