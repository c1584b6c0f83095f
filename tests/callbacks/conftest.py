"""Keep runs of callbacks' tests to what callbacks do."""

from collections.abc import Iterator

import pytest

import elastic.experiments.train


@pytest.fixture(autouse=True, scope="module")
def no_picture() -> Iterator[None]:
    """Leave out the picture of a run's history: it takes as long as the run, and has its own tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elastic.experiments.train, "draw_history", lambda *_: None)
        yield
