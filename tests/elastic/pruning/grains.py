"""Grains of gates, and the zoo's networks at each of them: by default at one, the others are slow."""

import pytest

from elastic.pruning.gates import Grain
from tests.elastic.zoo import CASES

GRAINS: tuple[Grain, ...] = ("weight", "kernel", "block", "channel")
every_grain = pytest.mark.parametrize("grain", GRAINS)
every_case_and_grain = pytest.mark.parametrize(
    ("case", "grain"),
    [
        pytest.param(
            case, grain, id=f"{name}-{grain}", marks=() if (i + j) % len(GRAINS) == 0 else pytest.mark.slow
        )
        for i, (name, case) in enumerate(CASES.items())
        for j, grain in enumerate(GRAINS)
    ],
)
