"""Requests over HTTP: the elastic network answers, nothing is lost, numbers are what they are called."""

import base64
import csv
import io
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import elastic
from elastic.data import Digits
from elastic.errors import FileError, OptionError
from elastic.experiments import load_test
from elastic.experiments.host import check_port, end_children, host_network
from elastic.experiments.load_test import HEAD, Reply, list_servers, make_requests, score, send_load
from elastic.experiments.tools.signals import SIGNALS, Interrupted, raise_on_signals
from elastic.levels.cascade import run_cascade
from elastic.levels.refining import SURE
from elastic.models import convnet

ABOUT = {
    "model": {"builder": "convnet", "options": {"channels": [4, 6], "in_channels": 1, "classes": 10}},
    "input": [1, 8, 8],
}


def test_the_score_counts_what_is_in_time_and_what_is_lost() -> None:
    replies = [Reply(float(k), accuracy=0.5, level=k % 2) for k in range(1, 100)]
    cells = dict(zip(HEAD[1:], score([*replies, Reply(30_000.0)], deadline=50), strict=True))
    assert cells["in time (%)"] == "50.0" and cells["right in time (%)"] == "25.0"
    assert (cells["p50 (ms)"], cells["p95 (ms)"], cells["p99 (ms)"]) == ("50.0", "95.0", "99.0")
    assert (cells["levels"], cells["requests"], cells["lost"]) == ("0 1", "100", "1")


def test_without_its_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "litserve", None)
    with pytest.raises(FileError, match="litserve is not installed: install the extra `serve`"):
        host_network("digits-gnap-2k")
    with pytest.raises(FileError, match="there is no network none"):
        host_network("none")


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(OptionError, match=f"port={port} cannot be listened at .*: name another"):
            check_port(port)
    check_port(port)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_servers_processes_before_it_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    killed = []
    child = type("Child", (), {"kill": lambda self: killed.append(self)})()
    monkeypatch.setattr(multiprocessing, "active_children", lambda: [child])
    with pytest.raises(Interrupted) as caught, raise_on_signals(), end_children():
        os.kill(os.getpid(), number)
        pytest.fail("a signal was lost")
    caught.value.arrival.set()
    assert killed[0] is child


def send(*images: Any) -> dict[str, Any]:
    return {"images": [base64.b64encode(image).decode() for image in images]}


def write(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def test_requests_are_read_as_training_images_are_and_what_is_none_is_said() -> None:
    pytest.importorskip("litserve", reason="the extra `serve` is not installed")
    from fastapi import HTTPException

    from elastic.experiments.tools.levels_api import LevelsAPI

    api = LevelsAPI("digits-gnap-2k", 20.0, 0, 1)
    api.setup("cpu")
    torch.set_flush_denormal(False)  # as other tests have it
    bytes_HW = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    wide = Image.fromarray(np.pad(bytes_HW, ((0, 0), (4, 4))))  # whose middle is cut out
    deep = Image.fromarray(bytes_HW.astype(np.uint16) * 257)
    x_BCHW = api.decode_request(send(*map(write, (Image.fromarray(bytes_HW), wide, deep))))
    assert torch.equal(x_BCHW[0], x_BCHW[1]) and torch.equal(x_BCHW[0], x_BCHW[2])
    floats = Image.fromarray(np.zeros((8, 8), np.float32))
    huge = Image.new("1", (20_000, 20_000))  # which Pillow takes for an attack
    for request, text in [
        (send(write(floats, "TIFF")), "unknown range"),
        (send(write(huge)), "base64 of an image file"),
        (send(write(deep)[:-30]), "base64 of an image file"),
        ({"images": []}, "base64 of an image file"),
    ]:
        with pytest.raises(HTTPException) as caught:
            api.decode_request(request)
        assert caught.value.status_code == 422 and text in caught.value.detail


IMAGES = {**ABOUT, "mean": [0.5], "std": [0.5], "classes": [*"0123456789"]}
ELSE: dict[str, tuple[dict[str, Any], str]] = {
    "signals": ({"input": [1, 64]}, "takes inputs of [1, 64]: name a network of images of 1 or 3 channels"),
    "several inputs": (
        {"input": [["float32", 1, 8, 8], ["int64"]]},
        "name a network of images of 1 or 3 channels",
    ),
    "another sd": ({"std": [0.5, 0.5, 0.5]}, "no mean and sd for each of 1 channels"),
    "fewer classes": ({"classes": ["a", "b"]}, "says 2 classes, and answers with a tensor of (1, 10)"),
}


@pytest.mark.parametrize("what", ELSE)
def test_what_does_not_tell_classes_of_images_is_refused_before_it_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    pytest.importorskip("litserve", reason="the extra `serve` is not installed")
    from elastic.experiments.tools.levels_api import read_levels

    about, text = ELSE[what]
    net, path = convnet([4, 6]), tmp_path / "net"
    elastic.save(net, path, IMAGES)
    assert len(read_levels(str(path), None)[0]) == 1
    network = elastic.Network(net, about={**IMAGES, **about})
    monkeypatch.setattr(elastic, "load", lambda source: network)  # which would not build a network of signals
    with pytest.raises(FileError) as caught:
        read_levels(str(path), None)
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_smallest_level_is_unsure_of_is_refined_where_that_is_asked_for() -> None:
    pytest.importorskip("litserve", reason="the extra `serve` is not installed")
    from elastic.experiments.tools.levels_api import LevelsAPI

    source = "cifar10-resnet20-levels"
    api = LevelsAPI(source, 10_000.0, None, 16, refine=True)
    api.setup("cpu")
    torch.set_flush_denormal(False)
    x_BCHW = 10 * torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = [net.eval() for net in elastic.load(source).nets]
    with torch.no_grad():
        wanted_BK, index_B = run_cascade([levels[0], levels[-1]], x_BCHW, SURE)
    logits_BK, level = api.predict(x_BCHW)
    assert torch.allclose(logits_BK, wanted_BK, atol=1e-3)
    assert level == len(levels) - 1 and 0 < index_B.sum() < len(index_B)


@pytest.mark.parametrize(("source", "level"), [("digits-gnap-2k", None), ("cifar10-resnet20-levels", 1)])
def test_one_level_has_nothing_to_refine(source: str, level: int | None) -> None:
    pytest.importorskip("litserve", reason="the extra `serve` is not installed")
    with pytest.raises(OptionError, match="takes two levels, and there is one to answer: leave it out"):
        host_network(source, level=level, refine=True)


def test_a_network_of_one_level_has_no_server_that_refines() -> None:
    assert list_servers(1) == {"elastic": {}, "level 0": {"level": 0}}
    assert list(list_servers(2)) == ["elastic", "refining", "level 0", "level 1"]


def test_requests_end_with_the_test_images_and_need_to_know_them(tmp_path: Path) -> None:
    data = Digits(batch_size=8)
    data.prepare_data()
    assert [len(labels) for _, labels in make_requests(data, 200)] == [200, 160]
    elastic.save(convnet([4, 6]), tmp_path / "net", ABOUT)
    with pytest.raises(FileError, match=r"does not say its data, made\.data: name a run's network"):
        send_load(str(tmp_path / "net"))


@pytest.mark.slow
def test_every_request_is_answered_on_a_loaded_machine(tmp_path: Path) -> None:
    pytest.importorskip("litserve", reason="the extra `serve` is not installed")
    send_load("digits-gnap-2k", deadline=2000, rate=10, seconds=1, images=4, csv=tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert [row["server"] for row in rows] == ["elastic", "level 0"]
    for row in rows:
        assert (row["requests"], row["lost"], row["levels"]) == ("30", "0", "0")
        assert float(row["right in time (%)"]) > 90


def test_a_server_that_ends_at_once_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_test.sys, "executable", "false")
    with (
        pytest.raises(FileError, match="the server has ended as it started"),
        load_test.start_server("digits-gnap-2k", 40, 1),
    ):
        pass
