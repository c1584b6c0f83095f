"""Run the compiled kernel under checkers of memory and of undefined behaviour, on random sizes, beside masks.

    python -m elastic.experiments.tools.trials.kernel <library> <seed> <trials>

is what a part of it does in a process of its own, into which the checkers are loaded before all else.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from math import isqrt
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.activations import GRADED, find_active
from elastic.dynamic.skipping import blocks, compiling, tiles
from elastic.dynamic.skipping.active import Active
from elastic.dynamic.skipping.compiling import FLAGS, SOURCES, Kernel
from elastic.dynamic.skipping.convolution import MAX_TAPS, ActiveConv2d
from elastic.dynamic.skipping.head import ActiveHead
from elastic.dynamic.skipping.layers import activate_kernels, max_pool
from elastic.experiments.tools.trials import Part

CLAIM = "no access beyond memory, nothing undefined, and the masked result"
CHECKERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
RUNTIMES = ("libasan.so", "libubsan.so")
# What a compiler may use decides how long the kernel's vectors are; longer ones it puts together.
PROCESSORS = {"AVX-512": "-D__AVX512F__", "AVX2": "-mno-avx512f", "SSE": "-mno-avx512f -mno-avx2 -mno-avx"}
check_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)  # Winograd sums other numbers
TIMEOUT_S = 3600


def try_kernel(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Carry out random layers, a share for each kind of processor."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        part.fail(f"there is no C++ compiler '{compiler[0]}'")
        return
    for name, flags in PROCESSORS.items():
        library, share = folder / f"{name}.so", -(-trials // len(PROCESSORS))
        command = [
            *compiler,
            *FLAGS,
            *CHECKERS,
            *flags.split(),
            str(SOURCES / "active.cpp"),
            "-o",
            str(library),
        ]
        subprocess.run(command, check=True, capture_output=True)
        _try_processor(part, name, library, share, random, compiler)


def _try_processor(
    part: Part, name: str, library: Path, trials: int, random: Random, compiler: list[str]
) -> None:
    """Carry out layers in a process with the checkers; each that it counts has been right."""
    paths = [
        subprocess.run([*compiler, f"-print-file-name={runtime}"], check=True, capture_output=True, text=True)
        for runtime in RUNTIMES
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtime.stdout.strip() for runtime in paths),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until it ends
    }
    command = [sys.executable, "-W", "ignore", "-m", __name__, str(library), str(random.randrange(2**31))]
    process = subprocess.run(
        [*command, str(trials)], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    kinds = process.stdout.split()
    for kind in kinds:
        part.count(f"{name}: {kind}")
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it ended"]
        errors = [line for line in lines if "ERROR" in line or "runtime error" in line]
        part.fail(f"{name}, layer {len(kinds)}: {(errors or lines)[-1]}")


# --- in the process with the checkers -------------------------------------------------------------


def run_layers(random: Random, trials: int) -> None:
    """Carry out random layers, a quarter of them in processes forked from this one."""
    total = 0
    while total < trials:
        count, forked = min(50, trials - total), random.random() < 0.25
        seed = random.randrange(2**31)
        if not forked:
            _run_some(seed, count, threads=random.choice((1, 1, 2, 3)))
        elif process := os.fork():
            if code := os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]):
                sys.exit(code)
        else:
            _run_some(
                seed, count, threads=1
            )  # a pool of threads does not come through a fork, torch's neither
            sys.stdout.flush()
            os._exit(0)
        total += count


def _run_some(seed: int, count: int, threads: int) -> None:
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    random = Random(seed)
    for _ in range(count):
        kind = random.choices(tuple(KINDS), (7, 2, 1, 1, 1))[0]
        KINDS[kind](random)
        print(kind, flush=True)


def _convolve(random: Random) -> None:
    """Convolve any size; what is not active is not a number, and must not be looked at."""
    algorithm = random.choice((tiles.PIXELS, tiles.PIXELS, tiles.TILES, tiles.STRIPS))
    tiled = algorithm != tiles.PIXELS
    max_size = isqrt(MAX_TAPS)
    size = (3, 3) if tiled else (_draw(random, max_size), _draw(random, max_size))
    stride, pad = 1 if tiled else _draw(random, 4), random.randint(0, 3)
    height, width = (max(taps - 2 * pad, _draw(random, 40)) for taps in size)
    batch, channels, kernels = _draw(random, 6), _draw(random, 40), _draw(random, 70)
    conv = nn.Conv2d(channels, kernels, size, stride, pad, bias=random.random() < 0.5)
    x_BCHW = torch.randn(batch, channels, height, width)
    reads, writes = (_activate(random, batch, number) for number in (channels, kernels))
    on_BC11, gate_BK11 = _spread(reads) != 0, _spread(writes)
    expected = conv(x_BCHW * on_BC11) * gate_BK11
    residual = torch.randn_like(expected) if random.random() < 0.5 else None
    expected = expected if residual is None else expected + residual
    relu = random.random() < 0.5
    expected = (expected.relu() if relu else expected) * (gate_BK11 != 0)
    junk_BCHW = torch.where(on_BC11, x_BCHW, torch.nan)
    if random.random() < 0.3:
        junk_BCHW = junk_BCHW.contiguous(memory_format=torch.channels_last)
    zeros = random.random() < 0.5
    with patch.object(tiles, "choose_algorithm", lambda *_: algorithm):
        actual = ActiveConv2d(conv, relu, zeros)(junk_BCHW, reads, writes, residual)
    actual = actual if zeros else torch.where(gate_BK11 != 0, actual, 0.0)
    check_close(actual, expected)


def _convolve_blocks(random: Random) -> None:
    """Convolve all channels by a weight of which blocks are zero, however little that saves."""
    algorithm, size = random.choice((tiles.PIXELS, tiles.TILES, tiles.STRIPS)), random.choice((1, 3, 5))
    size, stride = (size, _draw(random, 3)) if algorithm == tiles.PIXELS else (3, 1)
    batch, channels, kernels = _draw(random, 6), _draw(random, 40), _draw(random, 70)
    conv = nn.Conv2d(channels, kernels, size, stride, random.randint(0, 3))
    rows = random.choice((1, 4, 8))  # outputs of a block
    is_open = torch.rand(-(-kernels // rows), channels) < random.random()
    conv.weight.mul_(is_open.repeat_interleave(rows, 0)[:kernels, :, None, None])
    x_BCHW = torch.randn(batch, channels, size + random.randint(0, 30), size + random.randint(0, 30))
    expected = conv(x_BCHW)
    residual = torch.randn_like(expected) if random.random() < 0.5 else None
    choose = patch.object(tiles, "choose_algorithm", lambda *_: algorithm)
    with choose, patch.object(blocks, "WORTH", torch.inf):
        actual = ActiveConv2d(conv, relu=True)(x_BCHW, residual=residual)
    check_close(actual, (expected if residual is None else expected + residual).relu())


def _switch(random: Random) -> None:
    batch, channels, kernels = _draw(random, 6), _draw(random, 40), _draw(random, 70)
    x_BCHW, reads = torch.randn(batch, channels, _draw(random, 20), _draw(random, 20)), None
    if random.random() < 0.5:
        reads = _activate(random, batch, channels)
        x_BCHW = x_BCHW * (_spread(reads) != 0)
    weight_KC, bias_K = torch.randn(kernels, channels), torch.randn(kernels)
    within_2C = torch.tensor([[-0.5], [0.5]]).repeat(1, channels)
    activation: Any = random.choice(("soft", *GRADED))
    actual = activate_kernels(x_BCHW, reads, weight_KC, bias_K, within_2C, activation)
    scores_BK = F.linear(x_BCHW.mean((2, 3)).clamp(*within_2C), weight_KC, bias_K)
    clear = scores_BK.abs().min() > 1e-4  # else rounding decides
    if clear:
        check_close(actual.gate_BK, GRADED.get(activation, find_active)(scores_BK))


def _pool(random: Random) -> None:
    size, stride = _draw(random, 4), _draw(random, 4)
    batch, channels = _draw(random, 6), _draw(random, 40)
    x_BCHW = torch.randn(batch, channels, size + random.randint(0, 30), size + random.randint(0, 30))
    reads = _activate(random, batch, channels)
    on_BC11 = _spread(reads) != 0
    padding = random.randint(0, size // 2)
    actual = max_pool(torch.where(on_BC11, x_BCHW, torch.nan), reads, size, stride, padding, zeros=True)
    torch.testing.assert_close(actual, F.max_pool2d(x_BCHW, size, stride, padding) * on_BC11, rtol=0, atol=0)


def _classify(random: Random) -> None:
    batch, channels, pools = _draw(random, 6), _draw(random, 40), random.random() < 0.5
    x_BCHW = torch.randn(batch, channels, _draw(random, 20), _draw(random, 20))
    features_BN = (x_BCHW.mean((2, 3), keepdim=True) if pools else x_BCHW).flatten(1)
    linear = nn.Linear(features_BN.shape[1], _draw(random, 70), bias=random.random() < 0.5)
    check_close(ActiveHead(linear, pools)(x_BCHW), linear(features_BN))


KINDS: dict[str, Callable[[Random], None]] = {
    "convolution": _convolve,
    "blocks": _convolve_blocks,
    "switch": _switch,
    "pooling": _pool,
    "head": _classify,
}


def _draw(random: Random, maximum: int) -> int:
    """Draw a size from 1, small ones more often: they cost less, and borders are there."""
    return random.randint(1, random.randint(1, maximum))


def _activate(random: Random, batch: int, channels: int) -> Active:
    """Choose active channels at random, none of some samples' too."""
    share = random.random()
    gate_BK = torch.rand(batch, channels).clamp(min=0.1) * (torch.rand(batch, channels) < share)
    return Active.from_gates(gate_BK)


def _spread(active: Active) -> Tensor:
    return active.gate_BK[:, :, None, None]


def main(library: str, seed: str, trials: str) -> None:
    kernel = Kernel(Path(library))
    with patch.object(compiling, "load_kernel", lambda: kernel), torch.no_grad():
        run_layers(Random(int(seed)), int(trials))


if __name__ == "__main__":
    main(*sys.argv[1:])
