"""What a run trains in, where it is left to the machine."""

import pytest
import torch

from elastic.experiments.tools import hardware
from elastic.experiments.tools.hardware import choose_precision


@pytest.mark.parametrize(
    ("cpu", "vectors", "matrices", "expected"),
    [
        ("Intel(R) Xeon(R) Processor, 2 threads", True, True, "bf16-mixed"),
        ("Intel(R) Xeon(R) Processor, 2 threads", True, False, "32-true"),
        ("AMD EPYC 9B45, 2 threads", True, False, "bf16-mixed"),
        ("AMD EPYC 7B13, 2 threads", False, False, "32-true"),
        ("CPU", False, False, "32-true"),
    ],
)
def test_a_cpu_trains_in_what_it_is_faster_in(
    monkeypatch: pytest.MonkeyPatch, cpu: str, vectors: bool, matrices: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: matrices)
    monkeypatch.setattr(hardware, "find_cpu", lambda: cpu)
    assert choose_precision("auto") == expected
    assert choose_precision("16-mixed") == "16-mixed"
