"""Saved weights: shapes rebuilt, another architecture refused, compact files bit for bit, small and whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elastic.errors import FileError, StructureError
from elastic.files.network import Network
from elastic.models import convnet, resnet20
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.surgery.rebuilding import rebuild
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from elastic.widths.width import Widths
from tests.elastic import zoo

EXAMPLE = torch.zeros(1, 3, 8, 8)
CHANNELS = (6, 8, 8, 10)


def built(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return convnet(CHANNELS, in_channels=3)


def probe() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))


def changed(grain: Any = "weight") -> tuple[nn.Module, Widths]:
    """Grown here, pruned there, a share of its gates closed, its statistics moved."""
    model = built()
    widths = discover(model, EXAMPLE)
    gates.attach_gates(model, widths, grain, grace=2)
    reindex(model, widths, {"0": [0, 1, 2, 3, 4, 5, -1, -1, -1], "3": [1, 4, 7], "10": [*range(10), 2, 2]})
    generator = torch.Generator().manual_seed(3)
    for _, _, gate in gates.iterate_gates(model):
        gate.score.data = torch.where(torch.rand(gate.score.shape, generator=generator) < 0.4, -1.0, 1.0)
    model.train()(probe())
    return model.eval(), widths


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


# --- rebuild ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", ["weight", "kernel", "block", "channel"])
@pytest.mark.parametrize("prefix", ["", "net."])
def test_a_fresh_model_takes_the_state_of_a_changed_one(tmp_path: Path, grain: str, prefix: str) -> None:
    model, widths = changed(grain)
    torch.save({prefix + name: tensor for name, tensor in model.state_dict().items()}, tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)

    other = built(seed=1)
    its = discover(other, EXAMPLE)
    gates.attach_gates(other, its, grain, grace=2)  # type: ignore[arg-type]
    rebuild(other, its, state, prefix)
    other.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
    assert its.sizes() == widths.sizes() == {"0": 9, "3": 3, "7": 8, "10": 12}
    assert torch.equal(other.eval()(probe()), model(probe()))
    assert [(m.in_channels, m.out_channels) for m in other if isinstance(m, nn.Conv2d)] == [
        (3, 9),
        (9, 3),
        (3, 8),
        (8, 12),
    ]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", list(zoo.CASES))
def test_every_structure_is_rebuilt(name: str) -> None:
    """From the shapes alone, whatever lies on a tensor: halves, groups, repeats, shuffles."""
    case = zoo.CASES[name]
    model, example = case.model(), case.example()
    widths = discover(model, example)
    reindex(model, widths, {width: [*range(size), -1, -1] for width, size in widths.sizes().items()})
    other = case.model(seed=1)
    its = discover(other, example)
    rebuild(other, its, model.state_dict())
    other.load_state_dict(model.state_dict())
    assert its.sizes() == widths.sizes()
    assert torch.equal(other.eval()(example), model.eval()(example))


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: tensor for n, tensor in state.items() if n != name}


OTHERS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a tensor more": (lambda s: {**s, "17.weight": torch.zeros(3)}, "17.weight"),
    "a tensor less": (lambda s: without(s, "4.running_mean"), "4.running_mean"),
    "a width less": (lambda s: {n: t for n, t in s.items() if n.partition(".")[0] not in "34"}, "'3"),
    "a larger kernel": (lambda s: {**s, "7.weight": torch.zeros(8, 8, 5, 5)}, "7.weight"),
    "widths that differ": (lambda s: {**s, "3.weight": torch.zeros(8, 5, 3, 3)}, "3.weight"),
    "more classes": (lambda s: {**s, "14.weight": torch.zeros(11, 10)}, "14.weight"),
    "a scalar": (lambda s: {**s, "0.weight": torch.tensor(1.0)}, "0.weight"),
}


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("other", list(OTHERS))
def test_another_architecture_is_refused_by_name_and_nothing_changes(other: str, resized: bool) -> None:
    change, named = OTHERS[other]
    source = built(seed=1)
    if resized:
        reindex(source, discover(source, EXAMPLE), {"10": [*range(10), -1]})
    model = built()
    widths = discover(model, EXAMPLE)
    sizes, before = widths.sizes(), zoo.states(model)
    state = change(source.state_dict())
    if other == "more classes" and resized:
        state["14.weight"] = torch.zeros(11, 11)
    with pytest.raises(StructureError, match=f"another architecture.*{named}") as caught:
        rebuild(model, widths, state)
    assert "\n" not in str(caught.value)
    assert widths.sizes() == sizes and not zoo.differences(before, zoo.states(model))


def test_a_graph_that_is_alive_hinders_no_rebuilding() -> None:
    source, _ = changed("channel")
    model = built()
    widths = discover(model, EXAMPLE)
    gates.attach_gates(model, widths, "channel")
    said = model(probe())
    rebuild(model, widths, source.state_dict())
    model.load_state_dict(source.state_dict())
    assert said.requires_grad and torch.equal(model.eval()(probe()), source(probe()))
    model(probe()).sum().backward()


# --- compact files ------------------------------------------------------------------------------------------


def compacted(model: nn.Module | None = None) -> nn.Module:
    return compact(changed()[0] if model is None else model, EXAMPLE)


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    plain = compacted()
    Network(plain).save(tmp_path / "m.safetensors", {"asked": 1})
    back = Network.load(tmp_path / "m.safetensors", built(seed=5), EXAMPLE).plain()
    same(plain.state_dict(), back.state_dict())
    assert torch.equal(plain(probe()), back(probe())) and not back.training
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["elastic"])["about"] == {"asked": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.3, 0.74, 0.76, 1.0])
def test_round_trip_at_every_density(tmp_path: Path, kept: float) -> None:
    model = built()
    for parameter in model.parameters():
        parameter.data *= torch.rand(parameter.shape) < kept
    Network(model).save(tmp_path / "m", {})
    same(model.state_dict(), Network.load(tmp_path / "m", built(seed=5), EXAMPLE).plain().state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_round_trip_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    model = built().to(dtype)
    model[3].weight.data[:, 1:] = 0  # stored without its zeros
    Network(model).save(tmp_path / "m", {})
    same(
        model.state_dict(),
        Network.load(tmp_path / "m", built(seed=5).to(dtype), EXAMPLE).plain().state_dict(),
    )


def test_not_a_number_is_kept(tmp_path: Path) -> None:
    model = built()
    model[3].weight.data[:, 1:] = 0
    model[3].weight.data[0, 0] = torch.tensor([float("nan"), float("inf"), 1.0])
    Network(model).save(tmp_path / "m", {})
    back = Network.load(tmp_path / "m", built(seed=5), EXAMPLE).plain()
    assert torch.equal(model[3].weight.view(torch.int32), back[3].weight.view(torch.int32))


def test_sparse_storage_is_smaller(tmp_path: Path) -> None:
    """A tenth kept: 4 bytes a value and a bit a place, so about an eighth of the dense file."""
    torch.manual_seed(0)
    model = resnet20(16)
    Network(model).save(tmp_path / "dense", {})
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data *= torch.rand(parameter.shape) < 0.1
    Network(model).save(tmp_path / "sparse", packed=True)
    dense, sparse = ((tmp_path / name).stat().st_size for name in ("dense", "sparse"))
    assert dense > 4 * 270_000 and sparse < dense / 5
    assert dense < 4 * sum(t.numel() for t in model.state_dict().values()) + 40_000, "no sparse overhead"


def test_the_same_net_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        Network(compacted()).save(tmp_path / name, {"b": 1, "a": [2]})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_channels_last_gives_the_same_values(tmp_path: Path) -> None:
    model = built()
    model[3].weight.data[:, 1:] = 0
    for name, layout in (("one", torch.contiguous_format), ("two", torch.channels_last)):
        Network(model.to(memory_format=layout)).save(tmp_path / name, {})  # type: ignore[call-overload]
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_bias_that_compaction_gave_is_restored(tmp_path: Path) -> None:
    """A dead channel's constant, read through a 1×1 convolution without norm, becomes that one's bias."""

    def net(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False)
        return nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(5 * 64, 10, bias=False))

    model = net(0)
    model[0].weight.data[1] = 0
    model[0].bias.data[1] = 2.0
    plain = compact(model, EXAMPLE)
    assert plain[2].bias is not None and plain[0].out_channels == 3
    Network(plain).save(tmp_path / "m", {})
    back = Network.load(tmp_path / "m", net(1), EXAMPLE).plain()
    same(plain.state_dict(), back.state_dict())
    assert torch.allclose(back(probe()), model(probe()), atol=1e-5)


def grouped(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first, second, norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4), nn.BatchNorm2d(12)
    return nn.Sequential(first, nn.ReLU(), second, norm, nn.ReLU(), nn.Conv2d(12, 5, 1), nn.Flatten())


@pytest.mark.parametrize("groups", [3, 2, 1])
def test_groups_that_compaction_took_away_are_missing_after_loading(tmp_path: Path, groups: int) -> None:
    """With one channel left in each, a grouped convolution is a depthwise one, whose channels go alone."""
    model = grouped(0)
    for group in range(4):
        model[0].weight.data[2 * group + 1], model[0].bias.data[2 * group + 1] = 0, 0
        dead = slice(3 * group + (1 if group < groups else 0), 3 * group + 3)
        model[5].weight.data[:, dead] = 0  # type: ignore[index]
    plain = compact(model.eval(), EXAMPLE)
    assert plain[2].weight.shape == (groups, 1, 3, 3)  # type: ignore[index,union-attr]
    Network(plain).save(tmp_path / "m", {})
    back = Network.load(tmp_path / "m", grouped(1), EXAMPLE).plain()
    same(plain.state_dict(), back.state_dict())
    assert torch.equal(back(probe()), plain(probe())) and back[2].groups == groups  # type: ignore[index]


def test_a_state_of_other_groups_leaves_the_network_as_it_was() -> None:
    model, state = grouped(0), grouped(1).state_dict()
    state |= {"0.weight": torch.ones(4, 3, 1, 1), "0.bias": torch.ones(4), "2.weight": torch.ones(4, 1, 3, 3)}
    state |= {name: torch.ones(4) for name in state if name.startswith("3.") and state[name].dim()}
    state |= {"2.bias": torch.ones(4), "5.weight": torch.ones(4, 4, 1, 1)}
    widths = discover(model, EXAMPLE)
    sizes, before = widths.sizes(), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StructureError, match=r"another architecture: '5\.weight'"):
        rebuild(model, widths, state)
    same(before, model.state_dict())
    assert widths.sizes() == sizes == discover(model, EXAMPLE).sizes() and model[2].groups == 4


def refused(path: Path, net: nn.Module | None = None) -> str:
    """The message of the error, which must be one line."""
    with pytest.raises((StructureError, FileError)) as caught:
        Network.load(path, built() if net is None else net, EXAMPLE)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "m.safetensors"
    Network(compacted()).save(path, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    assert str(path) in refused(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "m") in refused(tmp_path / "m")


def rewritten(path: Path, tensors: Callable[[dict[str, Tensor]], Any], meta: dict[str, str] | None) -> None:
    held = load_file(path)
    tensors(held)
    save_file(held, path, meta)


def meta_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no metadata": lambda p: rewritten(p, lambda held: None, None),
    "metadata of another program": lambda p: rewritten(p, lambda held: None, {"format": "pt"}),
    "metadata that is no JSON": lambda p: rewritten(p, lambda held: None, {"elastic": "{"}),
    "metadata without shapes": lambda p: rewritten(p, lambda held: None, {"elastic": "{}"}),
    "values lost": lambda p: rewritten(p, lambda held: held.pop("3.weight:values"), meta_of(p)),
    "bits lost": lambda p: rewritten(p, lambda held: held.pop("3.weight:bits"), meta_of(p)),
    "bits flipped": lambda p: rewritten(p, lambda held: held["3.weight:bits"].fill_(0), meta_of(p)),
    "a value short": lambda p: rewritten(
        p, lambda held: held.update({"3.weight:values": held["3.weight:values"][1:].clone()}), meta_of(p)
    ),
    "a folder": lambda p: (p.unlink(), p.mkdir()),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.safetensors"
    Network(compacted()).save(path, packed=True)
    assert "3.weight:bits" in load_file(path)
    DAMAGE[damage](path)
    assert str(path) in refused(path)


@pytest.mark.parametrize("other", ["resnet20", "more layers", "fewer layers", "more classes"])
def test_a_file_of_another_architecture_is_refused(tmp_path: Path, other: str) -> None:
    path = tmp_path / "m.safetensors"
    Network(compacted()).save(path, {})
    nets: dict[str, Callable[[], nn.Module]] = {
        "resnet20": lambda: resnet20(4),
        "more layers": lambda: convnet((*CHANNELS, 8), in_channels=3),
        "fewer layers": lambda: convnet(CHANNELS[:3], in_channels=3),
        "more classes": lambda: convnet(CHANNELS, in_channels=3, classes=11),
    }
    assert "architecture" in refused(path, nets[other]())


@pytest.mark.parametrize("gated", ["the file", "the network"])
def test_gates_on_one_side_alone_are_refused_with_a_remedy(tmp_path: Path, gated: str) -> None:
    net, file = (changed()[0], built()) if gated == "the network" else (built(), changed()[0])
    Network(file).save(tmp_path / "m", {})
    with pytest.raises(StructureError, match=r"parametrizations.*or save what `compact` returns"):
        Network.load(tmp_path / "m", net, EXAMPLE)


def test_a_file_that_cannot_be_written_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    Network(built()).save(path, {})
    before = path.read_bytes()

    write = Path.write_bytes

    def full(part: Path, contents: bytes) -> int:
        write(part, b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        Network(built(seed=1)).save(path, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def dual_path() -> nn.Module:
    """Some channels of both convolutions are added, the others joined (DPN, arXiv 1707.01629)."""

    def forward(m: Any, x: Tensor) -> Tensor:
        (a, b), (c, d) = ((y[:, : m.added], y[:, m.added :]) for y in (m.one(x), m.two(x)))
        return m.head(torch.cat([a + c, b, d], 1))  # type: ignore[no-any-return]

    return zoo.Net(forward, one=zoo.conv(3, 5), two=zoo.conv(3, 6), head=zoo.head(9), added=2)


def test_sizes_of_which_only_sums_are_known_are_solved_for() -> None:
    x = torch.randn(2, 3, 6, 6)
    net, again = dual_path(), dual_path()
    widths, rebuilt = discover(net, x), discover(again, x)
    assert widths.sizes() == {"one": 2, "one:1": 3, "two": 4}
    reindex(net, widths, {"one": [1], "one:1": [0, 1, 2, -1], "two": [0, 3]})
    rebuild(again, rebuilt, net.state_dict())
    assert rebuilt.sizes() == widths.sizes()
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again(x), net(x))
