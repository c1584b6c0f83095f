"""Let levels follow what a program sets in the network's modules while it trains: a rate of dropout, say."""

from collections.abc import Sequence

from torch import nn

from elastic.levels.cutting import iterate_norms

Settings = dict[tuple[str, str], float | str]  # (module, attribute) -> its value
# Of these types alone: whole numbers, flags and the like may tell what a forward has kept in its modules,
# which is each level's own.
KINDS = {float, str}


def read_settings(net: nn.Module) -> Settings:
    """Read the numbers and texts that modules hold."""
    return {
        (path, name): value
        for path, module in net.named_modules()
        for name, value in vars(module).items()
        if type(value) in KINDS
    }


def follow_settings(net: nn.Module, levels: Sequence[nn.Module], before: Settings) -> Settings:
    """Set in levels what has been set in their network since, and return what it has now."""
    settings = read_settings(net)
    for (path, name), value in settings.items() - before.items():
        for level in levels:
            setattr(level.get_submodule(path), name, value)
    return settings


def follow_modes(net: nn.Module, level: nn.Module) -> None:
    """Bring the parts of a level into the modes of the network's, but for norms, which are its own."""
    if all(module.training == net.training for module in net.modules()):
        return
    norms = {norm for _, norm in iterate_norms(net)}
    for module, part in zip(net.modules(), level.modules(), strict=True):
        if module not in norms:
            part.training = module.training
