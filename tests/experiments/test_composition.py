"""Data × model × schedule: every pair of choices works together, or is refused in one line.

All triples would be hundreds of runs; here every pair of choices of two groups occurs in some run.
"""

from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from elastic.experiments.tools.errors import THEIRS, format_error
from elastic.experiments.train import train
from tests.generated import generate
from tests.runs import CONF, configure

SCHEDULES = (
    *("static", "[growth]", "[gates]", "[growth,gates]", "[magnitude]", "joint", "reconstruct", "dynamic"),
)
GENERATED = ("digits", "shapes", "mnist", "cifar10", "imagenette", "folder")
MODELS = tuple(sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
# What these need beside their choice; 32 pixels where a set has no size of its own.
MORE = {
    "[magnitude]": ["callbacks.magnitude.budget=2300"],
    "reconstruct": ["trainer.max_epochs=7"],
    "joint": [],
    "imagenette": ["data.size=32"],
    "folder": ["data.size=32"],
    "vgg16_bn": ["model.width=8"],
    "alexnet": ["model.width=8"],
    "resnet56": ["model.width=4"],
    "resnet20": ["model.width=4"],
    "narrow": ["model.model.width=8"],
    "separable": ["model.width=4"],
}


def covering() -> list[tuple[str, str, str]]:
    """Triples in which every pair occurs, chosen greedily."""
    groups = (GENERATED, MODELS, SCHEDULES)
    two = combinations([[(i, choice) for choice in group] for i, group in enumerate(groups)], 2)
    left = {pair for pairs in two for pair in product(*pairs)}
    found = []
    triples = list(product(*groups))

    def new(triple: tuple[str, ...]) -> set[Any]:
        return set(combinations(enumerate(triple), 2)) & left

    while left:
        best = max(triples, key=lambda triple: len(new(triple)))
        left -= new(best)
        found.append(best)
    return found


def test_every_pair_is_covered() -> None:
    chosen = covering()
    for (i, a), (j, b) in combinations(enumerate((GENERATED, MODELS, SCHEDULES)), 2):
        assert {(t[i], t[j]) for t in chosen} == set(product(a, b))
    assert len(chosen) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(("data", "model", "schedule"), covering())
def test_it_runs_or_is_refused_in_one_line(tmp_path: Path, data: str, model: str, schedule: str) -> None:
    more = [option for choice in (data, model, schedule) for option in MORE.get(choice, [])]
    given = [
        *(f"data={data}", f"model={model}", f"schedule={schedule}", "trainer.max_epochs=1"),
        *("callbacks.progress=null", "trainer.accelerator=cpu", "trainer.precision=32-true"),
        "trainer.log_every_n_steps=1",
        *("+trainer.limit_train_batches=2", "+trainer.limit_val_batches=1", "+trainer.limit_test_batches=1"),
        *generate(data, tmp_path / "data"),
        *more,
    ]
    try:
        summary = train(configure(tmp_path / "run", *given), tmp_path / "run")
    except THEIRS as error:
        said = format_error(error)
        why = (
            *("does not run on an example", "3 colours", "no width", "none is left"),
            *("are no class numbers for outputs of", "needs timm, which is not installed"),
            "cannot be switched off: layer_norm",
        )
        assert any(reason in said for reason in why) and "\n" not in said, said
    else:
        assert summary["data"] == data and summary["params"] > 0
