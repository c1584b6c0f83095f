"""Checks of the data, by which a forward may raise an error, are passed; a graph that is run makes them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.dynamic import attach_modules, make_skipping
from elastic.errors import StructureError
from elastic.surgery.reindexing import grow_index, reindex
from elastic.widths.discovery import discover
from tests.elastic.widths.checks import CHECKS, REPORTS
from tests.elastic.widths.odd import Forward, between
from tests.elastic.zoo import conv

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAN = torch.full_like(X, torch.nan)


@torch.no_grad()
@pytest.mark.parametrize("check", [*CHECKS, *REPORTS])
def test_a_network_that_checks_its_maps_is_followed(check: Forward) -> None:
    torch.manual_seed(0)
    net = between(check).eval()
    expected = net(X)
    widths = discover(net, X, check=True)
    assert set(widths) == {"stem", "last"}
    reindex(net, widths, {name: grow_index(width.size, 2) for name, width in widths.items()})
    torch.testing.assert_close(net(X), expected)


@torch.no_grad()
@pytest.mark.parametrize("check", CHECKS)
def test_its_kernels_can_be_switched_and_it_goes_on_checking(check: Forward) -> None:
    torch.manual_seed(0)
    net = between(check).eval()
    skipping = make_skipping(attach_modules(net, discover(net, X)).eval())
    assert skipping(X).shape == (2, 5)
    with pytest.raises(Exception) as own:
        net(NAN)
    with pytest.raises(StructureError, match="forward raises an error for this input"):
        skipping(NAN)
    assert not isinstance(own.value, StructureError)


@torch.no_grad()
@pytest.mark.parametrize("report", REPORTS)
def test_what_a_forward_only_reports_hinders_no_graph(report: Forward) -> None:
    torch.manual_seed(0)
    net = between(report).eval()
    skipping = make_skipping(attach_modules(net, discover(net, X)).eval())
    assert skipping(NAN).isnan().all()


def refuse_nan(module: nn.Module, args: Any, output: Tensor) -> None:
    if torch.isnan(output).any():
        raise ValueError(f"{module} gives no numbers")


def test_a_hook_may_check_a_layers_maps() -> None:
    net = between(lambda m, y: m.side(y), side=conv(8, 8)).eval()
    net.side.register_forward_hook(refuse_nan)
    widths = discover(net, X, check=True)
    assert set(widths) == {"stem", "side", "last"}
    with pytest.raises(ValueError, match="gives no numbers"), torch.no_grad():
        net(NAN)


def refuse_early(module: Any, args: Any, output: Tensor) -> None:
    if not module.is_ready:
        raise RuntimeError


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_number_that_a_layer_holds_answers_for_itself(is_ready: bool) -> None:
    net = between(lambda m, y: m.side(y), side=conv(8, 8)).eval()
    net.side.register_buffer("is_ready", torch.tensor(is_ready))
    net.side.register_forward_hook(refuse_early)
    assert ("side" in discover(net, X)) == is_ready


def go_on(m: Any, y: Tensor) -> Tensor:
    if y.mean() > 0:
        y = y * 2
    return y


def return_early(m: Any, y: Tensor) -> Tensor:
    if y.mean() > 0:
        return y * 2
    return y


def repeat(m: Any, y: Tensor) -> Tensor:
    while y.abs().max() > 1:
        y = y / 2
    return y


def keep_before(m: Any, y: Tensor) -> Tensor:
    if torch.isnan(y).any():
        m.failed = True
        raise ValueError
    return y


def report_and_change(m: Any, y: Tensor) -> Tensor:
    if y.mean() > 0:
        print("positive")
        y = y * 2
    return y


def call_its_own(m: Any, y: Tensor) -> Tensor:
    if y.mean() > 0:
        m.train(print is None)
    return y


def report_either_way(m: Any, y: Tensor) -> Tensor:
    if y.mean() > 0:
        print("positive")
    else:
        print("negative")
    return y


def raise_always(m: Any, y: Tensor) -> Tensor:
    if y.mean() > 0:
        raise ValueError
    raise TypeError


@pytest.mark.parametrize(
    "choose",
    [
        go_on,
        return_early,
        repeat,
        keep_before,
        raise_always,
        report_and_change,
        call_its_own,
        report_either_way,
    ],
)
def test_what_decides_more_is_refused(choose: Forward) -> None:
    with pytest.raises(StructureError, match="what depends on the data"):
        discover(between(choose), X)


@torch.no_grad()
def test_a_number_that_the_data_decide_may_be_computed_with() -> None:
    torch.manual_seed(0)
    net = between(lambda m, y: y / y.abs().max().item()).eval()
    expected = net(X)
    widths = discover(net, X, check=True)
    assert set(widths) == {"stem", "last"} and "max()" in str(widths["stem"].mixed)
    reindex(net, widths, {name: torch.arange(width.size).flip(0) for name, width in widths.items()})
    torch.testing.assert_close(net(X), expected)
