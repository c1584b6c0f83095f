"""Say, where a program fails in a run, what the run has changed that it may have failed over."""

import re

from elastic.errors import ElasticError
from elastic.training.locating import make_prefix
from elastic.training.structure import Structure

ABOUT_SHAPES = re.compile("shape|size|channel|dimension")


def explain_failure(error: BaseException, structure: Structure) -> None:
    """Note on an error about shapes which channels have changed, that a program may read on its own."""
    levels, start = structure.levels, structure.start_sizes
    sizes = structure.widths.sizes() if levels is None else levels.sizes[structure.level]
    changed = [name for name, size in sizes.items() if start.get(name, size) != size]
    is_about_shapes = isinstance(error, RuntimeError) and ABOUT_SHAPES.search(str(error))
    if changed and is_about_shapes and not isinstance(error, ElasticError):
        changes = ", ".join(f"{name}: {start[name]} → {sizes[name]}" for name in changed[-2:])
        error.add_note(
            f"'{structure.path}' has other channels than at first ({changes}). If the program "
            "reads them beside the network's forward, let callbacks follow the part alone whose output it "
            f"reads, which keeps its channels: FollowNetwork('{make_prefix(structure.path)}…')"
        )
