"""Networks with levels in one file: all bits come back, into levels that share storage again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.files.network import load_compact, load_levels, save_compact, save_levels
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
    save_levels(levels, tmp_path / "levels", {"seed": 3})
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
    save_levels(levels, tmp_path / "levels", {})
    whole = load_compact(fresh(name), tmp_path / "levels", x)
    same(net.state_dict(), whole.state_dict())
    assert torch.equal(net(x), whole(x))


def test_the_file_says_sizes_and_whatever_it_is_told(tmp_path: Path) -> None:
    net, _, widths = built("convnet")
    sizes = halves(widths, 0.3, 0.7)
    save_levels(Levels(net, widths, sizes), tmp_path / "levels", {"seed": 3})
    with safe_open(tmp_path / "levels", framework="pt") as file:
        about = json.loads(file.metadata()["elastic"])["about"]
    assert about == {"seed": 3, "levels": sizes}


def test_equal_levels_make_equal_files_small_ones(tmp_path: Path) -> None:
    net, _, widths = built("resnet20")
    levels = nested(net, widths, halves(widths, 0.3, 0.7))
    for file in ("one", "two"):
        save_levels(levels, tmp_path / file, {})
    save_compact(net, tmp_path / "net", {})
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
    save_levels(levels, tmp_path / "levels", {})
    again = load_levels(fresh("convnet"), tmp_path / "levels", x)
    for a, b in zip(levels, again, strict=True):
        same(a.state_dict(), b.state_dict())
        assert torch.equal(a(x), b(x))


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
        save_levels(levels, tmp_path / "net", {})
        for a, b in zip(levels, load_levels(build(), tmp_path / "net", x), strict=True):
            assert torch.equal(a(x), b(x))
    else:
        save_compact(net, tmp_path / "net", {})
    assert torch.equal(load_compact(build(), tmp_path / "net", x)(x), net(x))


# --- refusals ----------------------------------------------------------------------------------------------


def refused(name: str, path: Path, *named: str) -> None:
    net, x = fresh(name), built(name)[1]
    with pytest.raises(StructureError) as caught:
        load_levels(net, path, x)
    assert all(part in str(caught.value) for part in (*named, str(path))), str(caught.value)
    assert "\n" not in str(caught.value)


def saved(path: Path, name: str = "convnet") -> Path:
    net, _, widths = built(name)
    save_levels(nested(net, widths, halves(widths, 0.3, 0.7)), path, {})
    return path


def test_a_file_without_levels_is_refused(tmp_path: Path) -> None:
    net, _, _ = built("convnet")
    save_compact(net, tmp_path / "net", {})
    refused("convnet", tmp_path / "net", "holds a network without levels")


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
    change(tensors, meta["about"])
    save_file(tensors, path, {"elastic": json.dumps(meta)})


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
