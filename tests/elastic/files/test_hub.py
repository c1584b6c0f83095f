"""Hugging Face's conventions, without its servers: a folder goes there and comes back."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic
from elastic.errors import FileError
from elastic.models import convnet


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.delitem(sys.modules, "elastic.files.hub", raising=False)
    with pytest.raises(FileError, match="huggingface_hub is not installed: install the extra `hub`"):
        elastic.Network.from_pretrained("user/name")


def test_a_folder_holds_the_network_its_configuration_and_its_card(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    network = elastic.load("cifar10-resnet20-levels")
    network.save_pretrained(tmp_path / "levels")
    names = {"model.safetensors", "config.json", "README.md"}
    assert {path.name for path in (tmp_path / "levels").iterdir()} == names
    again, x = elastic.Network.from_pretrained(tmp_path / "levels"), torch.randn(2, 3, 32, 32)
    assert again.about == network.about == json.loads((tmp_path / "levels/config.json").read_text())
    for level in range(4):
        assert torch.equal(again.run(x, level), network.run(x, level))
    card = hub.ModelCard.load(tmp_path / "levels/README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "elastic-cnn"
    assert card.data.eval_results[0].metric_value == pytest.approx(0.9032)


def test_a_network_of_ones_own_is_brought(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    net, x = convnet([4, 6]).eval(), torch.randn(2, 1, 8, 8)
    elastic.Network(net).save_pretrained(tmp_path / "net")
    again = elastic.Network.from_pretrained(tmp_path / "net", net=convnet([4, 6]), example=x)
    assert torch.equal(again.run(x), net(x))


def test_a_repository_gets_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
    from huggingface_hub import hub_mixin

    sent: dict[str, str] = {}

    class Service:
        def __init__(self, **_: Any) -> None: ...

        def create_repo(self, repo_id: str, **_: Any) -> Any:
            return type("Address", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: str, **_: Any) -> str:
            sent.update({path.name: path.read_bytes()[:20] for path in Path(folder_path).iterdir()})
            sent["card"] = Path(folder_path, "README.md").read_text()
            return f"https://host/{repo_id}"

    monkeypatch.setattr(hub_mixin, "HfApi", Service)
    assert elastic.load("digits-gnap-2k").push_to_hub("me/digits") == "https://host/me/digits"
    assert {"model.safetensors", "config.json", "README.md"} < set(sent)
    assert 'elastic.Network.from_pretrained("me/digits")' in sent["card"]


def test_what_cannot_be_read_or_sent_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("elastic.files.hub", reason="the extra `hub` is not installed")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no way\nto the service")

    monkeypatch.setattr(hub.HubNetwork, "from_pretrained", fail)
    monkeypatch.setattr(hub.HubNetwork, "push_to_hub", fail)
    with pytest.raises(FileError, match=r"me/x cannot be read \(no way\): name a folder"):
        elastic.Network.from_pretrained("me/x")
    with pytest.raises(FileError, match=r"me/x cannot be written \(no way\): log in"):
        elastic.load("digits-gnap-2k").push_to_hub("me/x")
    with pytest.raises(FileError, match=r"there is no model\.safetensors in"):
        elastic.Network.from_pretrained(tmp_path)
