"""Networks in one file: all bits come back, into levels that share storage again."""

import copy
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import elastic
from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import iterate_modules, select_set
from elastic.errors import ElasticError, FileError, OptionError, StructureError
from elastic.files.network import Network
from elastic.files.packing import read_tensors
from elastic.levels.nested import Levels
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from tests.elastic.levels.nets import (
    NETS,
    built,
    evaluated,
    every_net,
    halves,
    inside,
    nested,
    some_nets,
)
from tests.elastic.zoo import Net, conv, head, randomised


def fresh(name: str) -> nn.Module:
    torch.manual_seed(99)
    return NETS[name]()


def load_levels(net: nn.Module, path: Path, x: Tensor) -> Levels:
    levels = Network.load(path, net, x).levels
    assert levels is not None
    return levels


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]), name


@every_net
def test_levels_come_back_to_the_last_bit(tmp_path: Path, name: str) -> None:
    net, x, widths = built(name)
    levels = evaluated(nested(net, widths, halves(widths, 0.3, 0.7)))
    if name in ("densenet", "convnext"):  # so that they are stored without their zeros
        with torch.no_grad():
            for tensor in (*net.parameters(), *levels.norms.parameters()):
                tensor[torch.rand(tensor.shape) < 0.6] = 0
    Network(levels).save(tmp_path / "levels", {"seed": 3}, packed=True)
    again = load_levels(fresh(name), tmp_path / "levels", x)
    assert again.sizes == levels.sizes and len(again) == len(levels)
    for a, b in zip(levels, again, strict=True):
        assert repr(a) == repr(b)  # in evaluation mode, too
        same(a.state_dict(), b.state_dict())
        assert not any(m.training for m in b.modules())
        assert torch.equal(a(x), b(x))
    inside(again)
    assert [p.name for p in tmp_path.iterdir()] == ["levels"]


@some_nets
def test_without_its_levels_it_is_the_whole_network(tmp_path: Path, name: str) -> None:
    net, x, widths = built(name)
    levels = nested(net.eval(), widths, halves(widths, 0.5))
    Network(levels).save(tmp_path / "levels", {})
    whole = Network.load(tmp_path / "levels", fresh(name), x).plain()
    same(net.state_dict(), whole.state_dict())
    assert torch.equal(net(x), whole(x))


def test_the_file_says_sizes_and_whatever_it_is_told(tmp_path: Path) -> None:
    net, x, widths = built("convnet")
    sizes = halves(widths, 0.3, 0.7)
    Network(Levels(net, widths, sizes)).save(str(tmp_path / "levels"), {"seed": 3})
    assert Network.load(str(tmp_path / "levels"), built("convnet")[0], x).about == {"seed": 3}
    with safe_open(tmp_path / "levels", framework="pt") as file:
        about = json.loads(file.metadata()["elastic"])["about"]
    assert about == {"seed": 3, "levels": sizes}


def test_equal_levels_make_equal_files_small_ones(tmp_path: Path) -> None:
    net, _, widths = built("resnet20")
    levels = nested(net, widths, halves(widths, 0.3, 0.7))
    for file in ("one", "two"):
        Network(levels).save(tmp_path / file, {})
    Network(net).save(tmp_path / "net")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    held, alone = load_file(tmp_path / "one"), load_file(tmp_path / "net")
    own = sum(t.nbytes for t in levels.norms.state_dict().values())
    assert sum(t.nbytes for t in held.values()) - sum(t.nbytes for t in alone.values()) == own


def test_levels_of_a_network_that_was_grown_and_pruned(tmp_path: Path) -> None:
    """Other widths than those it is first built with, and biases that it was not built with."""
    net, x, widths = built("convnet")
    gates.attach_gates(net, widths, "weight")
    reindex(net, widths, {"0": [0, 1, 2, 3, 4, 5, -1, -1, -1], "3": [1, 4, 7]})
    torch.manual_seed(4)
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data = torch.where(torch.rand(gate.score.shape) < 0.5, -1.0, 1.0)
        gate.score.data[0] = -1  # a channel dies, its constant becomes its readers' bias
    plain = compact(net.eval(), x)
    widths = discover(plain, x)
    levels = evaluated(nested(plain, widths, halves(widths, 0.3, 0.7)))
    Network(levels).save(tmp_path / "levels", {})
    again = load_levels(fresh("convnet"), tmp_path / "levels", x)
    for a, b in zip(levels, again, strict=True):
        same(a.state_dict(), b.state_dict())
        assert torch.equal(a(x), b(x))


def test_layers_that_share_a_weight_are_stored(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net: Any = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4), head(4))
        net[2].weight = net[1].weight
        return net  # type: ignore[no-any-return]

    net, x = tied(), torch.randn(2, 3, 6, 6)
    reindex(net, discover(net, x), {"0": [0, 2]})
    Network(net).save(tmp_path / "net")
    assert torch.equal(Network.load(tmp_path / "net", tied(), x).run(x), net(x))


@pytest.mark.parametrize("nest", [False, True])
def test_a_network_whose_own_layers_are_called_levels(tmp_path: Path, nest: bool) -> None:
    def build() -> nn.Module:
        layers = {"levels": nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4)), "level": conv(4, 6, 3)}
        return randomised(Net(lambda m, x: m.head(m.level(m.levels(x))), **layers, head=head(6)))

    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(2, 3, 6, 6)
    widths = discover(net, x)
    levels = evaluated(nested(net, widths, halves(widths, 0.5)))
    if nest:
        Network(levels).save(tmp_path / "net", {})
        for a, b in zip(levels, load_levels(build(), tmp_path / "net", x), strict=True):
            assert torch.equal(a(x), b(x))
    else:
        Network(net).save(tmp_path / "net")
    assert torch.equal(Network.load(tmp_path / "net", build(), x).run(x), net(x))


# --- refusals ----------------------------------------------------------------------------------------------


def refused(name: str, path: Path, *named: str) -> None:
    net, x = fresh(name), built(name)[1]
    with pytest.raises(FileError) as caught:
        Network.load(path, net, x)
    assert all(part in str(caught.value) for part in (*named, str(path))), str(caught.value)
    assert "\n" not in str(caught.value)


def saved(path: Path, name: str = "convnet") -> Path:
    net, _, widths = built(name)
    Network(nested(net, widths, halves(widths, 0.3, 0.7))).save(path)
    return path


def test_a_file_that_is_missing_or_damaged_is_refused(tmp_path: Path) -> None:
    refused("convnet", tmp_path / "none", "cannot be read")
    whole = saved(tmp_path / "whole").read_bytes()
    for end in (0, 5, len(whole) // 2, len(whole) - 1):
        (tmp_path / "part").write_bytes(whole[:end])
        refused("convnet", tmp_path / "part", "cannot be read")


def test_levels_of_another_architecture_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "levels")
    net = fresh("resnet20")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    with pytest.raises(StructureError, match="another architecture") as caught:
        load_levels(net, path, torch.zeros(1, 3, 8, 8))
    assert "\n" not in str(caught.value)
    same(before, net.state_dict())


def changed(path: Path, change: Any) -> None:
    """The file again, after a change to its tensors and what it says of them."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        meta = json.loads(file.metadata()["elastic"])
    del meta["sha256"]  # as if it had always been so
    change(tensors, meta["about"])
    save_file(tensors, path, {"elastic": json.dumps(meta)})


def test_a_bit_that_flips_is_seen(tmp_path: Path) -> None:
    """In the header, in its padding and in what it says of itself; in the data; in the digest."""
    content = bytearray(saved(tmp_path / "levels").read_bytes())
    header, digest = 8 + int.from_bytes(content[:8], "little"), content.index(b"sha256")
    spots = [*range(24), *range(digest - 2, digest + 90), header - 1, len(content) - 1]
    for spot in spots + list(range(header, len(content), 1 + (len(content) - header) // 60)):
        for bit in (0, 3, 5):
            flipped = bytearray(content)
            flipped[spot] ^= 1 << bit
            (tmp_path / "flipped").write_bytes(flipped)
            with pytest.raises(FileError, match="flipped cannot be read"):
                read_tensors(tmp_path / "flipped")


def test_a_file_without_a_digest_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "levels")
    before = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not memory of the file
    changed(path, lambda tensors, about: None)
    with safe_open(path, framework="pt") as file:
        assert "sha256" not in file.metadata()["elastic"]
    assert len(load_levels(fresh("convnet"), path, built("convnet")[1])) == 3
    same(before, load_file(path))


SAYS: dict[str, Any] = {
    "no levels": lambda about: about.update(levels=7),
    "levels of words": lambda about: about["levels"][0].update({"0": "many"}),
    "levels without a channel": lambda about: about["levels"][0].update({"0": 0}),
    "sets without end": lambda about: about["switched"].update(sets=10**7),
    "sets of half a kind": lambda about: about["switched"].update(sets=1.0),
    "modules of no kind": lambda about: about["switched"].update(kind=["input"]),
    "modules of no width": lambda about: about["switched"].update(names=[3]),
    "no modules": lambda about: about.update(switched=[3]),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("what", SAYS)
def test_what_a_file_says_and_cannot_be_is_refused(tmp_path: Path, what: str) -> None:
    net, x, widths = built("convnet")
    dynamic(evaluated(nested(net, widths, halves(widths, 0.5))), x).save(tmp_path / "net")
    changed(tmp_path / "net", lambda tensors, about: SAYS[what](about))
    refused("convnet", tmp_path / "net", "says of its")


def test_a_shape_that_its_places_do_not_fill_is_refused(tmp_path: Path) -> None:
    net, _, _ = built("convnet")
    with torch.no_grad():
        net[0].weight.zero_()  # type: ignore[union-attr]
    path = tmp_path / "net"
    Network(net).save(path)
    tensors = load_file(path)
    for shape in ([10**6, 10**6], [-1, 4], ["4"], [True]):
        with safe_open(path, framework="pt") as file:
            meta = json.loads(file.metadata()["elastic"])
        meta.pop("sha256", None)
        meta["sparse"]["0.weight"] = shape
        save_file(tensors, path, {"elastic": json.dumps(meta)})
        refused("convnet", path, "cannot be read")


def test_a_file_that_lacks_a_levels_norms_is_refused(tmp_path: Path) -> None:
    def lose(tensors: dict[str, Tensor], about: Any) -> None:
        for name in [n for n in tensors if "running_mean" in n and "/" not in n and "levels" in n]:
            del tensors[name]

    path = saved(tmp_path / "levels")
    before = len(load_file(path))
    changed(path, lose)
    assert len(load_file(path)) < before
    refused("convnet", path)


def test_a_file_whose_levels_are_no_levels_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "levels")
    changed(path, lambda tensors, about: about["levels"].reverse())
    net, x = fresh("convnet"), built("convnet")[1]
    with pytest.raises(StructureError, match="from small to large"):
        load_levels(net, path, x)


# --- one level or several, with and without kernel activation modules --------------------------------------


def dynamic(levels: Levels | nn.Module, x: Tensor, sets: int = 1) -> Network:
    """A network whose modules switch kernels, each set others."""
    plain = [levels] if isinstance(levels, nn.Module) else list(levels)
    nets = [attach_modules(net, discover(net, x), sets=sets).eval() for net in plain]
    for net in nets:
        for module in iterate_modules(net):
            for parameter in module.heads.parameters():
                nn.init.normal_(parameter)
    return Network(levels, nets)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("nest", [False, True])
@pytest.mark.parametrize("sets", [1, 3])
def test_modules_come_back_with_their_levels_and_sets(tmp_path: Path, nest: bool, sets: int) -> None:
    net, x, widths = built("convnet")
    levels = evaluated(nested(net, widths, halves(widths, 0.5))) if nest else net.eval()
    network = dynamic(levels, x, sets)
    network.save(tmp_path / "net", {"seed": 3})
    again = Network.load(tmp_path / "net", fresh("convnet"), x)
    assert len(again) == len(network) == 1 + nest and again.sets == network.sets == sets
    for level in range(len(network)):
        outputs = [network.run(x, level, k) for k in range(sets)]
        assert all(torch.equal(again.run(x, level, k), y) for k, y in enumerate(outputs))
        assert torch.equal(again.run(x, level), outputs[0]), "the first set, whatever was selected last"
        assert not torch.equal(outputs[0], network.plain(level)(x)), "they leave something out"
        assert not any(module.training for module in again.dynamic(level).modules())
        if sets > 1:
            assert not torch.equal(outputs[0], outputs[1])
    assert again.nets[-1] is again.plain() and torch.equal(again.plain()(x), network.plain()(x))


def test_what_runs_is_the_level_and_the_set_that_are_named() -> None:
    net, x, widths = built("convnet")
    network = Network(evaluated(nested(net, widths, halves(widths, 0.5))))
    assert torch.equal(network.run(x, 0), network.plain(0)(x))
    assert torch.equal(network.run(x), network.run(x, 1))
    assert not torch.equal(network.run(x), network.run(x, 0))
    switched = dynamic(net.eval(), x, sets=2)
    select_set(switched.dynamic_nets[0], 1)
    expected = switched.dynamic_nets[0](x)
    assert torch.equal(switched.run(x, set=1), expected)


def test_threads_get_the_answers_of_their_own_sets() -> None:
    """Another one asks for another set while the first is answered."""
    net, x, _ = built("convnet")
    network = dynamic(net.eval(), x, sets=2)
    expected = [network.run(x, set=k) for k in range(2)]
    assert not torch.equal(*expected)
    answers: list[Tensor] = []
    other = threading.Thread(target=lambda: answers.append(network.run(x, set=1)))

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            other.start()
            other.join(0.1)

    first = next(module for module in net.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(interrupt)
    answers.insert(0, network.run(x, set=0))
    other.join()
    assert all(map(torch.equal, answers, expected))


@pytest.mark.parametrize(
    ("level", "index", "text"),
    [
        (1, 0, "there is no level 1: the run's network has level 0 alone"),
        (-1, 0, "there is no level -1"),
        (0, 2, "there is no set 2 of kernel activation modules: the network has 0 … 1"),
        (0, -1, "there is no set -1"),
    ],
)
def test_a_level_or_set_that_is_not_there_is_an_error(level: int, index: int, text: str) -> None:
    net, x, _ = built("convnet")
    network = dynamic(net, x, sets=2)
    with pytest.raises(OptionError, match=text):
        network.run(x, level, index)


@pytest.mark.parametrize("names", [["stage1.0.conv1"], []])
def test_modules_come_back_where_they_were(tmp_path: Path, names: list[str]) -> None:
    net, x, _ = built("resnet20")
    switched = attach_modules(net, discover(net, x), names, branches=True).eval()
    for module in iterate_modules(switched):
        nn.init.normal_(module.get_head().linear.bias)
    Network(net, [switched]).save(tmp_path / "net")
    found = Network.load(tmp_path / "net", fresh("resnet20"), x)
    with torch.no_grad():
        assert torch.equal(found.run(x), switched(x))


def test_a_network_without_modules_has_no_set() -> None:
    net, x, _ = built("convnet")
    with pytest.raises(OptionError, match="has none: train some with schedule=dynamic"):
        Network(net).run(x, set=0)
    assert Network(net).sets == 0


def test_who_cannot_run_modules_refuses_them(tmp_path: Path) -> None:
    net, x, _ = built("convnet")
    Network(net).reject_modules(tmp_path)
    with pytest.raises(FileError, match=f"{tmp_path} holds a network that is another one without"):
        dynamic(net, x).reject_modules(tmp_path)


def test_networks_side_by_side_are_no_levels(tmp_path: Path) -> None:
    for networks in ([conv(3, 4), conv(3, 8)], {"a": conv(3, 4)}):
        with pytest.raises(StructureError, match="is no network: give `Levels`, or one module"):
            elastic.save(networks, tmp_path / "net")  # type: ignore[arg-type]


def test_every_level_needs_modules_of_its_own() -> None:
    net, x, widths = built("convnet")
    levels = nested(net, widths, halves(widths, 0.5))
    with pytest.raises(StructureError, match="1 dynamic networks for 2 levels"):
        Network(levels, dynamic(net, x).dynamic_nets)


def test_a_file_without_the_modules_of_a_level_is_refused(tmp_path: Path) -> None:
    def lose(tensors: dict[str, Tensor], about: Any) -> None:
        for name in [name for name in tensors if name.startswith(".kams.1.") and ":" not in name]:
            del tensors[name]

    net, x, widths = built("convnet")
    dynamic(evaluated(nested(net, widths, halves(widths, 0.5))), x).save(tmp_path / "net")
    changed(tmp_path / "net", lose)
    refused("convnet", tmp_path / "net", "lacks modules of level 1")


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, widths = built("convnet")
    dynamic(evaluated(nested(net, widths, halves(widths, 0.5))), x, sets=2).save(tmp_path / "net")
    opened, read_bytes = [], Path.read_bytes

    def watch(path: Path) -> bytes:
        opened.append(path)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", watch)
    Network.load(tmp_path / "net", fresh("convnet"), x)
    assert opened == [tmp_path / "net"]


def test_what_is_read_in_inference_mode_is_read_as_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With levels and modules; and it can be trained."""
    net, x, widths = built("convnet")
    network = dynamic(evaluated(nested(net, widths, halves(widths, 0.5))), x)
    network.save(tmp_path / "net", {"model": {}, "input": list(x.shape[1:])})
    monkeypatch.setattr("elastic.files.metadata.build_model", lambda options: fresh("convnet"))
    with torch.inference_mode():
        again = Network.load(tmp_path / "net")
        with pytest.raises(StructureError, match="build it outside"):
            Network.load(tmp_path / "net", fresh("convnet"), x)
    for level in range(len(network)):
        assert torch.equal(again.run(x, level), network.run(x, level))
    again.plain()(x).sum().backward()


def test_the_package_saves_and_loads(tmp_path: Path) -> None:
    net, x, widths = built("convnet")
    elastic.save(net.eval(), tmp_path / "net")
    elastic.save(evaluated(nested(net, widths, halves(widths, 0.5))), tmp_path / "levels")
    assert torch.equal(elastic.load(tmp_path / "net", fresh("convnet"), x).run(x), net(x))
    assert len(elastic.load(tmp_path / "levels", fresh("convnet"), x)) == 2
    assert elastic.Network is Network
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        elastic.lode  # noqa: B018


# --- what else a network may have --------------------------------------------------------------------------


def tied() -> nn.Module:
    net: Any = nn.Sequential(conv(3, 6), conv(6, 6), nn.ReLU(), conv(6, 6), head(6))
    net[3].weight = net[1].weight
    return net  # type: ignore[no-any-return]


def test_layers_that_share_a_weight_no_more_are_read_apart(tmp_path: Path) -> None:
    """Compacted, each has kernels of its own; or values alone, which loading would overwrite."""
    torch.manual_seed(0)
    net, x = randomised(tied()).eval(), torch.randn(2, 3, 6, 6)
    gated = copy.deepcopy(net)
    gates.attach_gates(gated, discover(gated, x), "channel")
    for *_, gate in gates.iterate_gates(gated):
        gate.score.data.copy_(torch.linspace(-1, 2, gate.score.numel()).view_as(gate.score))
    apart: Any = copy.deepcopy(net)
    apart[3].weight = nn.Parameter(2 * apart[1].weight.detach())
    for case in (compact(gated, x), apart):
        Network(case).save(tmp_path / "net")
        again = Network.load(tmp_path / "net", tied(), x).plain()
        same(case.state_dict(), again.state_dict())
        assert torch.equal(again(x), case(x))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_floats_come_back(tmp_path: Path, kind: torch.dtype) -> None:
    """Of levels, and of modules; norms may have others."""
    net, x, widths = built("convnet")
    network = dynamic(evaluated(nested(net.to(kind), widths, halves(widths, 0.5))), x.to(kind))
    network.save(tmp_path / "net")
    again = Network.load(tmp_path / "net", fresh("convnet"), x)
    for level in range(2):
        same(network.dynamic(level).state_dict(), again.dynamic(level).state_dict())
        assert torch.equal(network.run(x.to(kind), level), again.run(x.to(kind), level))
    for module in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        module.float()
    Network(net).save(tmp_path / "mixed")
    same(net.state_dict(), Network.load(tmp_path / "mixed", fresh("convnet"), x).plain().state_dict())


@pytest.mark.parametrize("packed", [False, True])
def test_a_layers_name_may_have_a_colon(tmp_path: Path, packed: bool) -> None:
    x, first = torch.randn(2, 3, 6, 6), conv(3, 4)
    first.weight.data[:3] = 0
    net = nn.Sequential(OrderedDict({"a:b": first, "c": conv(4, 4), "d": head(4)}))
    Network(net.eval()).save(tmp_path / "net", packed=packed)
    assert torch.equal(Network.load(tmp_path / "net", copy.deepcopy(net), x).run(x), net(x))


def test_a_file_may_lie_under_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    net, x, _ = built("convnet")
    Network(net.eval()).save("~/net")
    assert torch.equal(Network.load("~/net", fresh("convnet"), x).run(x), net(x))


class Noted(nn.Conv2d):
    def get_extra_state(self) -> dict[str, int]:
        return {"seen": 3}


UNSTORABLE: dict[str, tuple[Any, dict[Any, Any], str]] = {
    "a state beside tensors": (
        lambda: nn.Sequential(Noted(3, 4, 1)),
        {},
        "'0._extra_state' is a dict, which no file of tensors holds: keep it in a buffer",
    ),
    "a compiled network": (  # as torch.compile wraps it
        lambda: nn.Sequential(OrderedDict({"_orig_mod": conv(3, 4)})),
        {},
        "what torch.compile made of a module",
    ),
    "a tensor": (lambda: conv(3, 4), {"mean": torch.ones(40, 40)}, "a Tensor as 'mean' .*: give plain lists"),
    "a name that is a number": (lambda: conv(3, 4), {3: 1}, "by the name 3: give it a name that is a text"),
    "a name of the file's own": (lambda: conv(3, 4), {"levels": [{}]}, "says 'levels', .*: give it another"),
}


@pytest.mark.parametrize("what", UNSTORABLE)
def test_what_no_file_can_hold_is_refused_in_a_line(tmp_path: Path, what: str) -> None:
    make, about, text = UNSTORABLE[what]
    with pytest.raises(ElasticError, match=text) as caught:
        elastic.save(make(), tmp_path / "net", about)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_lazy_layer_is_not_filled(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.LazyConv2d(4, 1), head(4)), torch.randn(2, 3, 6, 6)
    net(x)
    Network(net.eval()).save(tmp_path / "net")
    with pytest.raises(StructureError, match="cannot fill a lazy layer: run the network once, then load"):
        Network.load(tmp_path / "net", nn.Sequential(nn.LazyConv2d(4, 1), head(4)), x)
