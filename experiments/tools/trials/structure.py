"""Change networks at random: their outputs stay where they must, and each can be saved and read."""

import copy
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.dynamic.attaching import attach_modules
from elastic.errors import ElasticError
from elastic.experiments.tools.trials import Part
from elastic.files.network import Network
from elastic.levels.nested import Levels
from elastic.levels.sizes import level_sizes
from elastic.models import convnet
from elastic.models.resnet import resnet
from elastic.pruning.compaction import compact
from elastic.pruning.gates import Grain, attach_gates, iterate_gates
from elastic.surgery.depth import deepen, find_stages
from elastic.surgery.reindexing import grow_index, reindex, split_index
from elastic.widths.discovery import discover
from elastic.widths.width import Widths

CLAIM = "outputs are equal where they must be, and what is saved comes back"
CHANGES = 10  # of a network, one after the other
LARGEST = 24  # channels of a width: what splits and grows all the time would fill the memory
TOLERANCE = 1e-3  # relative to the largest output: of fp32 over ten changes


class Mixed(nn.Module):
    """Join grouped, depthwise and concatenated convolutions, with two outputs."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 2 * a, 3, padding=1), nn.BatchNorm2d(2 * a), nn.ReLU())
        self.grouped = nn.Conv2d(2 * a, 2 * a, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(2 * a, 2 * a, 3, padding=1, groups=2 * a)
        self.side = nn.Sequential(nn.Conv2d(2 * a, b, 1), nn.PReLU(b))
        self.joined = nn.Conv2d(2 * a + b, b, 3, padding=1)
        self.norm = nn.BatchNorm2d(b)
        self.first, self.second = nn.Linear(b, 5), nn.Linear(b, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stem(x)
        h = h + self.grouped(h)
        h = torch.cat([torch.relu(self.depthwise(h)), self.side(h)], 1)
        h = torch.relu(self.norm(self.joined(h))).mean((2, 3))
        return self.first(h), self.second(h)


class Gated(nn.Module):
    """Weigh channels by what all of them say (squeeze and excitation) in a residual branch."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, a, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(a, b, 3, padding=1), nn.Conv2d(b, a, 1)
        self.squeeze, self.excite = nn.Conv2d(a, b, 1), nn.Conv2d(b, a, 1)
        self.norm, self.head = nn.GroupNorm(1, a), nn.Linear(a, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        branch = self.outer(torch.relu(self.inner(h)))
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(branch.mean((2, 3), keepdim=True)))))
        return self.head(torch.relu(h + branch * scale).mean((2, 3)))


class Attentive(nn.Module):
    """Let places attend to each other, beside a residual path, with an output at each of two depths."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.stem, self.early = nn.Conv2d(3, a, 3, padding=1), nn.Linear(a, 3)
        self.query, self.key, self.value = nn.Linear(a, b), nn.Linear(a, b), nn.Linear(a, a + b)
        self.out, self.head = nn.Linear(a + b, a), nn.Linear(a, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        attended = F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h), scale=0.5)
        return self.early(h.mean(1)), self.head(torch.relu(h + self.out(attended)).mean(1))


class Subject:
    """Hold a network under trial, how it was first built, and its widths."""

    def __init__(self, random: Random, folder: Path) -> None:
        self.random, self.file = random, folder / "network.safetensors"
        self.generator = torch.Generator().manual_seed(random.randrange(2**31))
        a, b = random.randint(2, 6), random.randint(2, 6)
        builders: list[Callable[[], nn.Module]] = [
            lambda: convnet([a, b, a + b], [1], 3, 5),
            lambda: resnet(blocks=1, width=a, in_channels=3, classes=5),
            lambda: Attentive(a, b),
            lambda: Mixed(a, b),
            lambda: Gated(a, b),
        ]
        self.build = random.choice(builders)
        torch.manual_seed(self.generator.initial_seed())  # weights, too, follow from the seed
        self.net = _randomise(self.build(), self.generator).eval()
        self.x = torch.randn(2, 3, 8, 8, generator=self.generator)
        self.widths: Widths = discover(self.net, self.x)

    def choose_width(self, separate: bool = False) -> tuple[str, int]:
        """Choose a width at random; a separate one if asked, whose fresh channels nothing feels."""
        names = [name for name, width in self.widths.items() if width.mixed is None or not separate]
        name = self.random.choice(names)
        return name, self.widths[name].size

    def run(self, net: nn.Module | None = None) -> list[Tensor]:
        with torch.no_grad():
            output: Any = (net or self.net)(self.x)
        return [output] if isinstance(output, Tensor) else list(output)


def try_structure(part: Part, trials: int, random: Random, folder: Path) -> None:
    """Change random networks by random sequences; each change is a trial."""
    while part.trials < trials:
        subject = Subject(random, folder)
        changes: list[str] = []
        for _ in range(min(CHANGES, trials - part.trials)):
            change = random.choice(list(KEEPING | ALTERING))
            changes.append(change)
            if not _try_once(part, subject, change, changes):
                break
        else:
            _compare_widths(part, subject, changes)


def _try_once(part: Part, subject: Subject, change: str, changes: list[str]) -> bool:
    before = subject.run()
    history = f"{type(subject.net).__name__}, {' '.join(changes)}"
    try:
        (KEEPING | ALTERING)[change](subject)
        after = subject.run()
        if change not in FOLLOWED:
            subject.widths = discover(subject.net, subject.x)
    except ElasticError as error:
        if "\n" in str(error):
            part.fail(f"{history}: {error}")
            return False
        part.count("refused by name")
        return False
    except Exception as error:
        part.fail(f"{history}: {type(error).__name__} {error}")
        return False
    difference = max(_compare(a, b) for a, b in zip(before, after, strict=True))
    if not all(output.isfinite().all() for output in after) or (change in KEEPING and difference > TOLERANCE):
        part.fail(f"{history}: outputs differ by {difference:.1e}")
        return False
    part.count("equal outputs" if change in KEEPING else "changed as asked")
    return True


def _compare_widths(part: Part, subject: Subject, changes: list[str]) -> None:
    """Compare the widths that were followed through changes with those that are found anew."""
    if subject.widths.sizes() != discover(subject.net, subject.x).sizes():
        part.fail(
            f"{type(subject.net).__name__}, {' '.join(changes)}: its widths are not those that are found"
        )


def _compare(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-3))


# --- changes that keep outputs -------------------------------------------------------------------


def _grow(subject: Subject) -> None:
    name, size = subject.choose_width(separate=True)
    if size < LARGEST:
        index = grow_index(size, subject.random.randint(1, 3))
        reindex(subject.net, subject.widths, {name: index}, generator=subject.generator)


def _grow_and_prune(subject: Subject) -> None:
    name, size = subject.choose_width()
    reindex(subject.net, subject.widths, {name: grow_index(size, 2)}, generator=subject.generator)
    reindex(subject.net, subject.widths, {name: list(range(size))})


def _split(subject: Subject) -> None:
    name, size = subject.choose_width(separate=True)
    if size < LARGEST:
        reindex(subject.net, subject.widths, {name: split_index(size, 1, subject.generator)})


def _permute(subject: Subject) -> None:
    name, size = subject.choose_width()
    reindex(subject.net, subject.widths, {name: torch.randperm(size, generator=subject.generator)})


def _deepen(subject: Subject) -> None:
    stages = list(find_stages(subject.net))
    if stages:
        stage = subject.random.choice(stages)
        if len(subject.net.get_submodule(stage)) < 5:  # type: ignore[arg-type]
            deepen(subject.net, subject.widths, stage, generator=subject.generator)


def _save_and_load(subject: Subject) -> None:
    _restore(subject, Network(subject.net))


def _make_levels(subject: Subject) -> None:
    """Nest levels, save them, and read them back: each is the one that was saved."""
    sizes = level_sizes(subject.net, subject.widths, subject.x, [0.5])
    levels = Levels(copy.deepcopy(subject.net), copy.deepcopy(subject.widths), sizes)
    _restore(subject, Network(levels))


def _attach(subject: Subject) -> None:
    """Attach kernel activation modules, save them, and read them back."""
    net = copy.deepcopy(subject.net)
    sets = subject.random.randint(1, 2)
    _restore(subject, Network(net, [attach_modules(net, discover(net, subject.x), sets=sets).eval()]))


def _restore(subject: Subject, network: Network) -> None:
    """Save a network and read it into one as it was first built; what is read is tried on from here."""
    for net in network.nets:
        net.eval()
    expected = [subject.run(network.plain(k)) for k in range(len(network))]
    expected += [subject.run(network.dynamic(set=k)) for k in range(network.sets)]
    network.save(subject.file)
    again = Network.load(subject.file, subject.build(), subject.x)
    actual = [subject.run(again.plain(k)) for k in range(len(again))]
    actual += [subject.run(again.dynamic(set=k)) for k in range(again.sets)]
    pairs = zip(chain(*expected), chain(*actual), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise AssertionError("what was read is not what was saved")
    if len(again) == 1 and not again.sets:
        subject.net = again.plain()


# --- changes that alter outputs ------------------------------------------------------------------


def _prune(subject: Subject) -> None:
    name, size = subject.choose_width()
    if size > 1:
        removed = subject.random.randrange(size)
        reindex(subject.net, subject.widths, {name: [i for i in range(size) if i != removed]})


def _grow_any(subject: Subject) -> None:
    """Grow a width that may be one of which a norm, or a product, feels each channel."""
    name, size = subject.choose_width()
    if size < LARGEST:
        reindex(subject.net, subject.widths, {name: grow_index(size, 2)}, generator=subject.generator)


def _gate_and_compact(subject: Subject) -> None:
    """Close some gates; the compacted network is the gated one."""
    net = copy.deepcopy(subject.net)
    grain: Any = subject.random.choice(get_args(Grain))
    attach_gates(net, discover(net, subject.x), grain)
    for _, _, gate in iterate_gates(net):
        shut = torch.rand(gate.score.shape, generator=subject.generator) < 0.3
        gate.score.data = gate.score.data.where(~shut, torch.tensor(-1.0))
    gated = subject.run(net)
    compacted = compact(net, subject.x).eval()
    difference = max(_compare(a, b) for a, b in zip(gated, subject.run(compacted), strict=True))
    if difference > TOLERANCE:
        raise AssertionError(f"the compacted network differs from the gated one by {difference:.1e}")
    subject.net = compacted


def _randomise(net: nn.Module, generator: torch.Generator) -> nn.Module:
    """Move norms and their statistics from where they start, so that one left behind is seen."""
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return net


KEEPING: dict[str, Callable[[Subject], None]] = {
    "grow": _grow,
    "grow+prune": _grow_and_prune,
    "split": _split,
    "permute": _permute,
    "deepen": _deepen,
    "save+load": _save_and_load,
    "levels": _make_levels,
    "attach": _attach,
}
FOLLOWED = ("grow", "grow any", "grow+prune", "split", "permute", "prune")  # which widths follow
ALTERING: dict[str, Callable[[Subject], None]] = {
    "prune": _prune,
    "grow any": _grow_any,
    "gate+compact": _gate_and_compact,
}
