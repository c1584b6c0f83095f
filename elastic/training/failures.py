"""Say, where a program fails in a run, what the run has changed that it may have failed over."""

import re

from elastic.errors import ElasticError
from elastic.pruning.gates import iterate_gates
from elastic.training.locating import make_prefix
from elastic.training.structure import Structure

ABOUT_SHAPES = re.compile("shape|size|channel|dimension|zip")


def explain_failure(error: BaseException, structure: Structure) -> None:
    """Note on an error about shapes what has changed, that a program may read on its own."""
    is_about_shapes = isinstance(error, RuntimeError | ValueError) and ABOUT_SHAPES.search(str(error))
    if not is_about_shapes or isinstance(error, ElasticError):
        return
    changed = _list_changed(structure)
    if changed:
        error.add_note(
            f"'{structure.path}' has other channels than at first ({', '.join(changed[-2:])}). If the "
            "program reads them beside the network's forward, let callbacks follow the part alone whose "
            f"output it reads, which keeps its channels: FollowNetwork('{make_prefix(structure.path)}…')"
        )
    if structure.alike and (changed or any(iterate_gates(structure.net))):
        error.add_note(
            f"Parameters of '{structure.path}' are others than at first. If the program keeps another "
            f"network in step with it, name that: FollowNetwork('{structure.path}', copies={structure.alike})"
        )


def _list_changed(structure: Structure) -> list[str]:
    """List the widths that have another size than at first, with both."""
    levels, start = structure.levels, structure.start_sizes
    sizes = structure.widths.sizes() if levels is None else levels.sizes[structure.level]
    changed = [name for name, size in sizes.items() if start.get(name, size) != size]
    return [f"{name}: {start[name]} → {sizes[name]}" for name in changed]
