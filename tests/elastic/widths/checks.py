"""Forwards that check their maps, in a module whose assertions stay as they are written."""

import logging
import warnings
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def assert_finite(m: Any, y: Tensor) -> Tensor:
    assert torch.isfinite(y).all()
    return y


def assert_with_a_message(m: Any, y: Tensor) -> Tensor:
    assert not torch.isnan(y).any(), f"no numbers: {y}"
    return y


def assert_several(m: Any, y: Tensor) -> Tensor:
    assert torch.isfinite(y.sum()) and -1e6 < y.min() < 1e6 and y.shape[2] == 8
    return y


def assert_equal(m: Any, y: Tensor) -> Tensor:
    assert torch.allclose(y, y)
    assert torch.equal(y, y.clone())
    return y


def raise_error(m: Any, y: Tensor) -> Tensor:
    if torch.isnan(y).any() or y.abs().max() > 1e6:
        raise ValueError(f"{y} is too large")
    return y


def raise_unless(m: Any, y: Tensor) -> Tensor:
    if y.max().item() < 1e6:
        y = y * 2
    else:
        message = f"{y.mean()} is too large"
        print(message)
        raise RuntimeError(message)
    return y if y.shape[2] > 4 else y * 3


def raise_in_a_loop(m: Any, y: Tensor) -> Tensor:
    for _ in range(2):
        while True:
            if not torch.isfinite(y).all():
                raise FloatingPointError
            break
        y = y / 2
    return y


CHECKS = (
    *(assert_finite, assert_with_a_message, assert_several, assert_equal),
    *(raise_error, raise_unless, raise_in_a_loop),
)


def print_a_line(m: Any, y: Tensor) -> Tensor:
    if torch.isnan(y).any():
        print("no numbers", y.shape)
    return y


def warn_and_log(m: Any, y: Tensor) -> Tensor:
    if not torch.isfinite(y).all():
        warnings.warn(f"{y.mean()} is no number", stacklevel=2)
        logger.error("in %s", y.shape)
    return y * 2


def report(y: Tensor) -> None:
    if y.abs().max() > 1e6:
        print("large")


def call_a_report(m: Any, y: Tensor) -> Tensor:
    report(y)
    return y


REPORTS = (print_a_line, warn_and_log, call_a_report)
