"""Files that travel: any reader of safetensors has the tensors, and one line makes the network again."""

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import elastic
from elastic.dynamic.attaching import attach_modules
from elastic.errors import FileError, OptionError
from elastic.files.network import Network
from elastic.models import convnet, from_torchvision
from elastic.models.builders import BUILDERS, build_model, describe_model
from elastic.pruning import gates
from elastic.pruning.compaction import compact
from elastic.surgery.reindexing import reindex
from elastic.widths.discovery import discover
from tests.elastic.levels.nets import halves, nested

OPTIONS = {"channels": [4, 6, 6, 8], "pools": [1, 3], "in_channels": 1, "classes": 10}
ABOUT = {
    "model": {"builder": "convnet", "options": OPTIONS},
    "input": [1, 8, 8],
    "mean": [0.3],
    "licence": "MIT",
}


def grow_and_prune() -> tuple[nn.Module, torch.Tensor]:
    """A network of other widths than it was built with, with many zeros and biases it had not."""
    torch.manual_seed(0)
    net, x = convnet([4, 6, 6, 8]), torch.randn(3, 1, 8, 8)
    widths = discover(net, x)
    gates.attach_gates(net, widths, "weight")
    reindex(net, widths, {"0": [0, 1, 2, 3, -1, -1]})
    for _, _, gate in gates.iterate_gates(net):
        gate.score.data = torch.where(torch.rand(gate.score.shape) < 0.5, -1.0, 1.0)
        gate.score.data[0] = -1  # a channel dies, its constant becomes its readers' bias
    return compact(net.eval(), x), x


def test_any_reader_fills_the_plain_module(tmp_path: Path) -> None:
    net, x = grow_and_prune()
    expected = net(x)
    elastic.save(net, tmp_path / "net.safetensors", ABOUT)
    for parameter in net.parameters():
        nn.init.constant_(parameter, 7)
    net.load_state_dict(load_file(tmp_path / "net.safetensors"))  # strict
    assert torch.equal(net(x), expected)


def test_packed_and_plain_files_hold_the_same_and_packed_is_smaller(tmp_path: Path) -> None:
    net, x = grow_and_prune()
    elastic.save(net, tmp_path / "plain", ABOUT)
    elastic.save(net, tmp_path / "packed", ABOUT, packed=True)
    plain, packed = (elastic.load(tmp_path / name).plain() for name in ("plain", "packed"))
    assert torch.equal(plain(x), net(x)) and torch.equal(packed(x), net(x))
    plain_bytes, packed_bytes = (
        sum(t.nbytes for t in load_file(tmp_path / name).values()) for name in ("plain", "packed")
    )
    assert packed_bytes < 0.7 * plain_bytes


def test_one_line_loads_levels_and_sets(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = convnet([4, 6, 6, 8]).eval(), torch.randn(3, 1, 8, 8)
    widths = discover(net, x)
    levels = nested(net, widths, halves(widths, 0.5))
    nets = [attach_modules(level, discover(level, x), sets=2).eval() for level in levels]
    network = Network(levels, nets, ABOUT)
    network.save(tmp_path / "model.safetensors")
    again = elastic.load(tmp_path)  # the folder
    assert (len(again), again.sets, again.about) == (2, 2, ABOUT)
    for level in range(2):
        for k in range(2):
            assert torch.equal(again.run(x, level, k), network.run(x, level, k))
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_torchvisions_models_are_built_by_their_name(tmp_path: Path) -> None:
    net, x = from_torchvision("squeezenet1_1", classes=5).eval(), torch.randn(2, 3, 64, 64)
    options = {"name": "squeezenet1_1", "in_channels": 3, "classes": 5}
    model = {"builder": "from_torchvision", "options": options}
    elastic.save(net, tmp_path / "net", {"model": model, "input": [3, 64, 64]})
    assert torch.equal(elastic.load(tmp_path / "net").run(x), net(x))


def test_a_file_is_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        elastic.save(convnet(), tmp_path / "net")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "net").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({}, "does not say how its network is built"),
        ({"input": [1, 8, 8], "model": 5}, "does not say how its network is built"),
        ({"model": ABOUT["model"]}, "does not say the size of its input"),
        ({**ABOUT, "input": "eight"}, "says that its input is eight"),
        ({**ABOUT, "input": [1, -8, 8]}, "says that its input is"),
        ({**ABOUT, "model": {"builder": "os.system", "options": {}}}, "no builder 'os.system'"),
        ({**ABOUT, "model": {"builder": "convnet", "options": {"layers": 3}}}, "cannot be built with"),
        ({**ABOUT, "model": {"builder": "convnet", "options": {"channels": []}}}, "at least one convolution"),
        ({**ABOUT, "model": {"builder": "resnet20", "options": {"in_channels": 1}}}, "another architecture"),
        (
            {
                **ABOUT,
                "model": {"builder": "from_torchvision", "options": {"name": "a", "weights": "DEFAULT"}},
            },
            "would fetch something by weights",
        ),
    ],
)
def test_a_file_that_does_not_say_enough_is_refused_in_a_line(
    tmp_path: Path, about: dict[str, Any], text: str
) -> None:
    path = tmp_path / "net.safetensors"
    elastic.save(convnet([4, 6, 6, 8]), path, about)
    with pytest.raises(elastic.ElasticError, match=text) as caught:
        elastic.load(path)
    assert "\n" not in str(caught.value)
    assert elastic.load(path, convnet([4, 6, 6, 8]), torch.zeros(1, 1, 8, 8)), "what is given counts"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("digits-gnap-3k", "did you mean digits-gnap-2k"), ("somewhere/net", "name a file, or one of")],
)
def test_a_network_that_is_not_there_is_an_error(name: str, remedy: str) -> None:
    with pytest.raises(FileError, match=f"there is no network {name}: {remedy}"):
        elastic.load(name)


def test_files_of_others_are_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(convnet().state_dict(), path)
    with pytest.raises(FileError, match="its metadata says nothing of a network"):
        elastic.load(path)
    torch.save({}, path)
    with pytest.raises(FileError, match="it is no whole safetensors file"):
        elastic.load(path)
    with pytest.raises(FileError, match=r"there is no model.safetensors in"):
        elastic.load(tmp_path)
    with pytest.raises(FileError, match="make the folder"):
        elastic.save(convnet(), tmp_path / "none/net")
    with pytest.raises(OptionError, match="about has a Tensor as 'mean'"):
        elastic.save(convnet(), path, {"mean": torch.ones(1)})
    assert len(elastic.load(Path("digits-gnap-2k"))) == 1


@pytest.mark.parametrize("name", sorted(BUILDERS.keys() - {"from_torchvision", "from_timm"}))
def test_what_a_configuration_builds_is_built_again(name: str) -> None:
    node = {"_target_": f"elastic.models.{name}", "_partial_": True}
    model = describe_model(node, 3, 7)
    assert model is not None
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in build_model(json.loads(json.dumps(model))).state_dict().items()}
        expected = BUILDERS[name](in_channels=3, classes=7).state_dict()
    assert shapes == {n: t.shape for n, t in expected.items()}


def test_another_programs_builder_is_not_described() -> None:
    assert describe_model({"_target_": "my_models.net"}, 3, 10) is None
    assert describe_model({"_target_": "elastic.models.narrow.Builder"}, 3, 10) is None
    inner = {"_target_": "elastic.models.vgg16_bn", "width": 8}
    narrow = {"_target_": "elastic.models.narrow.narrow", "model": inner, "fraction": 0.5}
    assert describe_model(narrow, 3, 10) == describe_model(inner, 3, 10)
    with pytest.raises(OptionError):
        build_model({})
