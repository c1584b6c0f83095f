"""Networks of several inputs go wherever those of one do: found, cut, saved, run and skipped."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elastic
from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules
from elastic.dynamic.skipping import make_skipping
from elastic.errors import FileError, OptionError
from elastic.files.network import Network
from elastic.growth.gradmax import gradmax
from elastic.levels.alone import make_alone
from elastic.levels.cascade import run_cascade
from elastic.levels.nested import Levels
from elastic.levels.refining import RefiningRuntime
from elastic.levels.runtime import Runtime
from elastic.levels.sizes import level_sizes
from elastic.measure.counts import count_macs
from elastic.pruning.compaction import compact
from elastic.pruning.constants import observe_constants
from elastic.pruning.fitting import measure_compacted
from elastic.pruning.gates import attach_gates, iterate_gates
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover, find_widths
from elastic.widths.inputs import describe_inputs, draw_inputs, list_inputs, make_zeros, select_samples
from elastic.widths.width import Widths
from tests.elastic.levels.nets import extracted, halves, nested
from tests.several import LABELS, NETS, Conditional, make_inputs, make_net

every_net = pytest.mark.parametrize("name", NETS)
WIDTHS = {
    "conditional": {"gain": 6, "conv": 8, "last": 6},
    "siamese": {"body.0": 6, "body.3": 8, "body.6": 6},
    "timed": {"time.0": 12, "down": 6, "middle": 8, "up": 6},
}


def made(name: str) -> tuple[Any, tuple[Tensor, Tensor], Widths]:
    net, inputs = make_net(name).eval(), make_inputs(name)
    return net, inputs, discover(net, *inputs)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def shut_some_gates(net: nn.Module, widths: Widths, seed: int = 1) -> None:
    """Shut two gates in three, and all that write the first two channels of each width."""
    attach_gates(net, widths, "weight")
    generator = torch.Generator().manual_seed(seed)
    for _, _, gate in iterate_gates(net):
        gate.score.data = torch.rand(gate.score.shape, generator=generator) - 0.67
    for name in widths:
        for slot in widths[name].slots_with("out"):
            weight = net.get_submodule(slot.module).parametrizations.weight  # type: ignore[union-attr]
            weight[0].score.data.narrow(slot.dim, 0, 2).fill_(-1)  # type: ignore[index, union-attr, operator]


@every_net
def test_widths_are_found_and_hold(name: str) -> None:
    net, inputs, _ = made(name)
    assert discover(net, *inputs, check=True).sizes() == WIDTHS[name]


@every_net
def test_surgery_keeps_the_function(name: str) -> None:
    net, inputs, widths = made(name)
    expected = net(*inputs).detach()
    reindex(net, widths, {n: [*reversed(range(width.size)), -1, -1] for n, width in widths.items()})
    close(net(*inputs), expected)
    assert discover(net, *inputs).sizes() == {n: size + 2 for n, size in WIDTHS[name].items()}


@every_net
def test_a_compacted_network_is_the_gated_one(name: str) -> None:
    net, inputs, widths = made(name)
    shut_some_gates(net, widths)
    plain = compact(net, inputs)
    sizes = discover(plain, *inputs).sizes()
    assert all(sizes[n] < size for n, size in WIDTHS[name].items())
    for seed in range(3):
        more = make_inputs(name, 5, seed)
        close(plain(*more), net(*more))
    assert measure_compacted(net, inputs) == elastic.census(plain, discover(plain, *inputs), *inputs).params


@every_net
def test_levels_alone_are_the_nested_ones(name: str) -> None:
    net, inputs, widths = made(name)
    macs = count_macs(net, *inputs)
    sizes = level_sizes(net, widths, inputs, [0.4 * macs], by="macs")
    levels = nested(net, widths, sizes)
    assert count_macs(levels[0], *inputs) <= 0.4 * macs
    many = make_inputs(name, 11)
    alone = make_alone(levels[0].eval(), inputs)
    expected = extracted(levels, 0).eval()(*many)
    assert expected.shape == net(*many).shape and not torch.equal(expected, net(*many))
    for answer in (levels[0](*many), levels.run(0, *many), alone(*many), Network(levels).run(many, 0)):
        close(answer, expected)


@every_net
def test_saved_networks_are_loaded(name: str, tmp_path: Path) -> None:
    net, inputs, widths = made(name)
    shut_some_gates(net, widths)
    plain = compact(net, inputs)
    widths = discover(plain, *inputs)
    network = Network(nested(plain, widths, halves(widths)))
    elastic.save(network, tmp_path / "net")
    for example in (inputs, [*inputs]):
        again = elastic.load(tmp_path / "net", make_net(name), example)
        for level in range(2):
            assert torch.equal(again.run(inputs, level), network.run(inputs, level))


def test_a_file_may_say_of_several_inputs_what_they_are(tmp_path: Path) -> None:
    net = make_net("conditional").eval()
    elastic.save(net, tmp_path / "net", {"input": [["float32", 1, 8, 8], ["int64"]]})
    inputs = make_inputs("conditional")
    assert torch.equal(elastic.load(tmp_path / "net", make_net("conditional")).run(inputs), net(*inputs))
    for wrong in ([["float31", 1, 8, 8], ["int64"]], [[], ["int64"]], [["load", 1, 8, 8]]):
        elastic.save(net, tmp_path / "net", {"input": wrong})
        with pytest.raises(FileError, match=r"says that its input is .*: give an example"):
            elastic.load(tmp_path / "net", make_net("conditional"))


@pytest.mark.parametrize("name", ["conditional", "timed"])
def test_skipping_is_masking(name: str) -> None:
    net, inputs, widths = made(name)
    dynamic = attach_modules(net, widths, sets=2).eval()
    many = make_inputs(name, 11)
    for module in iterate_modules(dynamic):
        for head in module.iterate_heads():
            nn.init.normal_(head.linear.weight, std=3.0, generator=torch.Generator().manual_seed(0))
    expected = dynamic(*many)
    assert not torch.allclose(expected, net(*many), atol=1e-3)
    for skipping in (make_skipping(dynamic, [inputs]), make_skipping(dynamic, [inputs], "stock")):
        close(skipping(*many), expected)


def test_servers_answer_several_inputs() -> None:
    net, inputs, widths = made("conditional")
    levels = Levels(net, widths, halves(widths))
    for level in levels:
        level.eval()
    serve = Runtime(levels, inputs)
    assert serve.batch == 2 and torch.equal(serve(*inputs), net(*inputs))
    serve.within(memory_mb=serve.costs[0].memory_mb)
    answer, level = serve.answer(inputs)
    assert level == 0 and torch.equal(answer, levels[0](*inputs))
    refine = RefiningRuntime(levels, inputs)
    many = make_inputs("conditional", 11)
    close(refine(*many), net(*many))  # none is sure
    close(run_cascade(levels, many, 1.0)[0], net(*many))


class Broken(nn.Module):
    """Is told of labels that have no row of their own in an embedding of few."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = nn.Embedding(50, 4), nn.Embedding(3, 4)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, scale: Tensor) -> Tensor:
        return x + self.many(t) + self.few(label) * scale


def test_drawn_integers_differ_and_index_every_embedding() -> None:
    example = torch.randn(2, 4), torch.tensor([40, 2]), torch.tensor([0, 1]), torch.tensor(2.0)
    x, t, label, scale = draw_inputs(Broken(), example, torch.Generator().manual_seed(0), samples=6)
    assert x.shape == (6, 4) and x.std() > 0.5 and scale.shape == ()
    assert sorted(label.tolist()) == [0, 0, 1, 1, 2, 2] and t.min() >= 0 and t.max() < 41
    assert t.dtype == label.dtype == torch.int64
    Broken()(x, t, label, scale)
    bits, mask = draw_inputs(
        Broken(), [torch.zeros(4, dtype=torch.uint8), torch.zeros(4) > 0], torch.Generator()
    )
    assert mask.dtype == torch.bool and mask.sum() == 2 and bits.max() > 100


def test_what_an_integer_moves_is_no_constant() -> None:
    """A channel that nothing writes, times the label: it is told from a constant as labels differ."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            y: Tensor = self.last(self.bn(self.conv(x)) * label[:, None, None, None])
            return y

    torch.manual_seed(0)
    net, inputs = Scaled().eval(), (torch.randn(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64))
    with torch.no_grad():
        net.conv.weight[0] = net.conv.bias[0] = 0  # type: ignore[index]
        net.bn.bias.fill_(1.0)
    constants = observe_constants(net, ["last"], inputs)["last"]
    assert constants.isnan().all()
    x, label = torch.randn(3, 1, 4, 4), torch.tensor([0, 1, 2])
    close(compact(net, inputs)(x, label), net(x, label))


def test_an_input_for_all_samples_is_given_whole() -> None:
    class Products(nn.Module):
        def forward(self, x: Tensor, table: Tensor) -> Tensor:
            return x @ table

    assert [count_macs(Products(), torch.zeros(n, 4), torch.zeros(4, 6)) for n in (1, 3)] == [24, 24]


def test_an_example_is_a_tensor_or_a_sequence() -> None:
    x, label = make_inputs("conditional")
    assert list_inputs(x) == (x,) and list_inputs([x, label]) == (x, label)
    for wrong in (None, {"x": x}, (x, 3), [x, (label,)]):
        with pytest.raises(
            OptionError, match=r"an example input is a .*: give the network's inputs as tensors"
        ):
            list_inputs(wrong)  # type: ignore[arg-type]
    first, labels, scale = select_samples((x, label, torch.ones(5)), slice(1))
    assert len(first) == len(labels) == 1 and len(scale) == 5
    for example in (x, (x, label), [label]):
        zeros = list_inputs(make_zeros(describe_inputs(example)))
        assert [(z.shape, z.dtype) for z in zeros] == [(y.shape, y.dtype) for y in list_inputs(example)]


# --- embeddings -------------------------------------------------------------------------------------------


def test_an_embedding_lies_on_the_width_of_what_it_is_added_to() -> None:
    net, _, widths = made("conditional")
    writers = [(slot.module, slot.dim) for slot in widths["conv"].slots_with("out")]
    assert writers == [("add", 1), ("conv", 0)] or writers == [("conv", 0), ("add", 1)]
    reindex(net, widths, {"conv": [2, -1, 0]})
    assert (
        net.add.embedding_dim == 3
        and net.add.weight.shape == (LABELS, 3)
        and net.add.num_embeddings == LABELS
    )


def test_a_fresh_entry_of_an_embedding_is_the_mean_of_its_row() -> None:
    net, _, widths = made("conditional")
    mean = net.gain.weight.detach().mean(1)
    reindex(net, widths, {"gain": [*range(6), -1]})
    close(net.gain.weight[:, 6], mean)


def test_a_channel_goes_once_the_gates_of_its_embedding_have_shut_too() -> None:
    net, inputs, widths = made("conditional")
    attach_gates(net, widths, "channel")
    gates = {path: gate for path, _, gate in iterate_gates(net)}
    gates["conv"].score.data[2] = -1
    assert discover(compact(net, inputs), *inputs).sizes()["conv"] == 8
    gates["add"].score.data[:, 2] = -1
    plain = compact(net, inputs)
    assert discover(plain, *inputs).sizes()["conv"] == 7
    close(plain(*inputs), net.eval()(*inputs))


@pytest.mark.parametrize(
    ("option", "reason"), [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse")]
)
def test_an_embedding_that_no_channel_may_leave_stays_as_it_is(option: dict[str, Any], reason: str) -> None:
    net = Conditional()
    net.add = nn.Embedding(LABELS, 8, **option)
    widths = find_widths(net, *make_inputs("conditional"))
    assert reason in widths.fixed["conv"] and "gain" in widths


def test_gradmax_draws_what_embeddings_do_not() -> None:
    net, (x, label), widths = made("conditional")
    y = torch.tensor([0, 1])

    def loss(replica: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(replica(x, label), y)

    rows = gradmax(net, widths, {"conv": 2, "gain": 2}, loss, torch.Generator().manual_seed(0), candidates=4)
    assert set(rows.rows) == {"conv", "stem"} and rows.rows["conv"].shape == (2, 6, 3, 3)
    close(rows.rows["conv"].flatten(1).norm(dim=1), torch.full((2,), 2**0.5))
    expected = net(x, label).detach()
    reindex(net, widths, {"conv": [*range(8), -1, -1]}, fresh=rows)
    close(net(x, label), expected)


def test_shapes_alone_make_an_embedding_again() -> None:
    net, inputs, widths = made("conditional")
    reindex(net, widths, {"gain": range(4), "conv": [*range(8), -1]})
    again, _, own = made("conditional")
    rebuild(again, own, net.state_dict())
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(*inputs), net(*inputs))
