"""The networks that come with the package: each is there, and does what its card says."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate

import elastic
from elastic.data import Digits, ImageData
from elastic.errors import OptionError
from elastic.experiments.tools.summary import measure_network
from elastic.files.cards import write_card
from elastic.files.packing import read_about
from elastic.files.zoo import ZOO, find_file, list_zoo, read_card
from elastic.training.tasks import Classification
from tests.runs import configure

NAMES = {"digits-gnap-2k", "mnist-gnap-3k", "mnist-gnap-6k", "cifar10-gnap-157k"} | {
    f"cifar10-resnet20-{kind}" for kind in ("levels", "dynamic")
}


def check(name: str, data: ImageData) -> None:
    """Measure a network on the test split: it is as its file and its card say."""
    network = elastic.load(name)
    assert (list(data.mean), list(data.std)) == (network.about["mean"], network.about["std"])
    measured, said = measure_network(network, data, Classification(10)), network.about["measured"]
    assert measured["test/acc"] == pytest.approx(said["test/acc"], abs=2e-4)
    assert all(measured[key] == said[key] for key in ("params", "params_dense", "macs"))
    assert measured["macs_dynamic"] == pytest.approx(said["macs_dynamic"], rel=1e-3)
    assert data.class_names == network.about["classes"]
    for level, row in zip(measured["levels"], said.get("levels", []), strict=True):
        assert level["test/acc"] == pytest.approx(row["test/acc"], abs=2e-4)
        assert (level["params"], level["macs"]) == (row["params"], row["macs"])


def test_the_digits_do_what_their_card_says() -> None:
    check("digits-gnap-2k", Digits(mean=[0.305], std=[0.376]))


@pytest.mark.data
@pytest.mark.parametrize("name", sorted(NAMES - {"digits-gnap-2k"}))
def test_each_does_what_its_card_says(tmp_path: Path, name: str) -> None:
    check(name, instantiate(configure(tmp_path, f"data={name.partition('-')[0]}").data))


def test_each_has_its_card_and_a_wheel_has_room_for_all() -> None:
    assert set(list_zoo()) == NAMES
    for name in NAMES:
        about = read_about(find_file(name))
        assert read_card(name) == write_card(name, about), "python -m experiments.cards"
        head = yaml.safe_load(read_card(name).split("---\n")[1])
        assert head["license"] == "apache-2.0" and head["datasets"] == [about["made"]["data"]]
        assert {"command", "seed", "git"} <= about["made"].keys() and "latency" in about
    assert sum(path.stat().st_size for path in ZOO.iterdir()) < 8e6


@pytest.mark.parametrize("about", [{"licence": 3}, {"made": None}, {"mean": 0.5, "std": 0.5}, {"summary": 3}])
def test_what_a_card_cannot_say_is_one_line(about: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"no card, since `about` says what cannot be \(.*\): say"):
        write_card("net", about)


def test_names_of_classes_may_be_numbers() -> None:
    assert "| Classes | 3, 7 |" in write_card("net", {"classes": [3, 7]})
