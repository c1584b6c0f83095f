"""Kernels that end a branch: what is off is left out of the sum, in training, execution, counts and files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.dynamic.attaching import MODULES, attach_modules
from elastic.dynamic.loss import ActivationCost
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.saliency import Saliency
from elastic.dynamic.skipping import make_skipping
from elastic.errors import StructureError
from elastic.experiments.evaluate import evaluate
from elastic.experiments.tools.restore import restore
from elastic.experiments.train import train
from elastic.measure.counts import count_macs_by_layer
from elastic.models import resnet20
from elastic.widths.discovery import discover
from tests.elastic.dynamic.gated import gated
from tests.elastic.zoo import Net, conv, head, randomised
from tests.fitted import EXACT
from tests.runs import configure

X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return randomised(resnet20(width=4)).eval()


def test_every_block_has_a_kernel_module_more_and_projections_have_none() -> None:
    net = make_net()
    few, more = (attach_modules(net, discover(net, X), branches=branches) for branches in (False, True))
    added = {m.site.writer for m in iterate_modules(more)} - {m.site.writer for m in iterate_modules(few)}
    assert added == {f"stage{i}.{j}.conv2" for i in (1, 2, 3) for j in (0, 1, 2)}


def test_they_may_be_all_that_can_be_switched() -> None:
    layers = {"stem": conv(3, 8, 3), "end": conv(8, 8, 3), "head": head(8)}
    net = Net(lambda n, x: n.head((y := n.stem(x)) + n.end(torch.sigmoid(y))), **layers)
    widths = discover(net, X)
    with pytest.raises(StructureError, match="cannot be switched off"):
        attach_modules(net, widths)
    for names in (None, []):
        (module,) = iterate_modules(attach_modules(net, widths, names, branches=True))
        assert module.site.writer == "end"


class Branched(nn.Module):
    """Two branches that end with a norm each, or with one norm for both."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.stem, self.inner, self.last = conv(3, 8, 3), conv(8, 6), conv(6, 2)
        self.one, self.two = conv(8, 8, 3), conv(8, 8, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(norms))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = h + self.norms[0](self.one(torch.tanh(h)))
        h = h + self.norms[-1](self.two(torch.tanh(h)))
        return self.last(torch.relu(self.inner(h))).mean((2, 3))


@pytest.mark.parametrize(("norms", "ends"), [(2, {"one", "two"}), (1, set())])
def test_branches_that_share_a_norm_are_not_switched(norms: int, ends: set[str]) -> None:
    """What their maps weigh is told by the norm, which tells that of its last call alone."""
    net = Branched(norms)
    dynamic = attach_modules(net, discover(net, X), branches=True)
    assert {module.site.writer for module in iterate_modules(dynamic)} & {"one", "two"} == ends


class Grouped(nn.Module):
    """A branch that ends with a convolution in groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem, self.inner, self.last = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.Conv2d(8, 6, 1),
            nn.Conv2d(6, 2, 1),
        )
        self.end = nn.Conv2d(8, 8, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = torch.relu(self.inner(torch.relu(h + self.end(torch.tanh(h)))))
        return self.last(h).mean((2, 3))


@pytest.mark.parametrize(("groups", "ends"), [(1, True), (2, False)])
def test_a_convolution_in_groups_ends_no_branch(groups: int, ends: bool) -> None:
    net = Grouped(groups)
    dynamic = attach_modules(net, discover(net, X), branches=True)
    assert ("end" in {module.site.writer for module in iterate_modules(dynamic)}) == ends


def test_what_is_off_adds_nothing() -> None:
    """The plain network, with norms that make zeros of what the modules have switched off."""
    plain, dynamic = make_net(), gated(make_net(), X, activation="hard", branches=True)
    x = X[:1]
    with torch.no_grad():
        outputs = dynamic(x)
        ends = [m for m in iterate_modules(dynamic) if not m.site.readers]
        assert any((m.active_BK == 0).any() for m in ends)
        for module in iterate_modules(dynamic):
            norm: Any = plain.get_submodule(module.site.writer.replace("conv", "bn"))
            on_K = module.active_BK[0]
            norm.weight.mul_(on_K)
            norm.bias.mul_(on_K)
        torch.testing.assert_close(outputs, plain(x))


def test_execution_leaves_it_out() -> None:
    for activation in ("hard", "scale"):
        dynamic = gated(make_net(), X, activation=activation, branches=True)
        with torch.no_grad():
            torch.testing.assert_close(make_skipping(dynamic)(X), dynamic(X), rtol=1e-3, atol=1e-4)


def test_a_layer_between_two_choices_costs_the_product_of_their_parts() -> None:
    dynamic = gated(make_net(), X, activation="hard", branches=True)
    cost = ActivationCost(dynamic, X)
    macs = {k: n for k, n in count_macs_by_layer(dynamic, X).items() if not k.startswith(f"{MODULES}.")}
    with torch.no_grad():
        dynamic(X)
        part = {m.site.writer: m.active_BK.mean(1) for m in iterate_modules(dynamic)}
        expected = torch.full((len(X),), float(cost.module_macs))
        for name, count in macs.items():
            own = part.get(name, torch.ones(len(X)))
            reads: Tensor = part[name.replace("conv2", "conv1")] if "conv2" in name else torch.ones(len(X))
            expected += count * own * reads
        torch.testing.assert_close(cost.macs_B(), expected)


def test_their_saliency_is_the_norm_of_what_they_add() -> None:
    dynamic = gated(make_net(), X, activation="hard", branches=True)
    saliency, added = Saliency(dynamic), {}

    def note(norm: nn.Module, inputs: Any, output: Tensor) -> None:
        added["map"] = output

    dynamic.get_submodule("stage2.1.bn2").register_forward_hook(note)
    with torch.no_grad():
        dynamic(X)
    (module,) = (m for m in iterate_modules(dynamic) if m.site.writer == "stage2.1.conv2")
    norm_BK = added["map"].flatten(2).norm(dim=2)
    torch.testing.assert_close(saliency.measure(module), norm_BK / norm_BK.mean(1, keepdim=True))


@pytest.mark.slow
def test_a_run_is_saved_with_them_and_measured_again(tmp_path: Path) -> None:
    options = ("schedule=dynamic", "model=resnet20", "model.width=4", "callbacks.dynamic.branches=true")
    more = ("data.batch_size=300", "trainer.max_epochs=1", "callbacks.dynamic.activation=hard")
    summary = train(configure(tmp_path, *EXACT, *options, *more), tmp_path)
    assert evaluate(tmp_path) == summary
    (dynamic,) = restore(tmp_path).network.dynamic_nets
    assert sum(not m.site.readers for m in iterate_modules(dynamic)) == 9
