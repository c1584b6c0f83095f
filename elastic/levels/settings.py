"""Let levels follow what a program sets in the network's modules while it trains: a rate of dropout, say."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from elastic.levels.cutting import iterate_norms

# Of these types alone: whole numbers, flags and the like may tell what a forward has kept in its modules,
# which is each level's own.
KINDS = {float, str}


@dataclass
class _Setting:
    """Hold a number or a text: the attributes that it is among, in the network and in its levels."""

    name: str
    value: Any
    attributes: dict[str, Any]
    of_levels: list[dict[str, Any]]

    def share(self) -> None:
        """Set it in the levels."""
        for attributes in self.of_levels:
            attributes[self.name] = self.value


class Settings:
    """Hold the numbers and texts of a network's modules, to see which a program sets.

    Args:
        levels: those below the network.
    """

    def __init__(self, net: nn.Module, levels: Sequence[nn.Module]) -> None:
        parts = [dict(pair_modules(net, level)) for level in levels]
        self._settings = [
            _Setting(name, value, vars(module), [vars(pairs[module]) for pairs in parts if module in pairs])
            for module in net.modules()
            for name, value in vars(module).items()
            if type(value) in KINDS
        ]
        for setting in self._settings:
            setting.share()

    def follow(self) -> None:
        """Set in the levels what has been set in the network since."""
        for setting in self._settings:
            value = setting.attributes.get(setting.name)
            if value is not setting.value and type(value) in KINDS:
                setting.value = value
                setting.share()


def pair_modules(net: nn.Module, level: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Pair the modules of a network with a level's, by path; the network may have been given more since."""
    parts = dict(level.named_modules())
    return [(module, parts[path]) for path, module in net.named_modules() if path in parts]


def follow_modes(net: nn.Module, level: nn.Module) -> None:
    """Bring the parts of a level into the modes of the network's, but for norms, which are its own."""
    if all(module.training == net.training for module in net.modules()):
        return
    norms = {norm for _, norm in iterate_norms(net)}
    for module, part in pair_modules(net, level):
        if module not in norms:
            part.training = module.training
