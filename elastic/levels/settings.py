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


class Settings:
    """Hold the numbers and texts of a network's modules, to see which a program sets.

    Args:
        levels: those below the network.
    """

    def __init__(self, net: nn.Module, levels: Sequence[nn.Module]) -> None:
        self._settings = [
            _Setting(name, value, vars(module), [vars(level.get_submodule(path)) for level in levels])
            for path, module in net.named_modules()
            for name, value in vars(module).items()
            if type(value) in KINDS
        ]

    def follow(self) -> None:
        """Set in the levels what has been set in the network since."""
        for setting in self._settings:
            now = setting.attributes.get(setting.name)
            if now is not setting.value and type(now) in KINDS:
                setting.value = now
                for attributes in setting.of_levels:
                    attributes[setting.name] = now


def follow_modes(net: nn.Module, level: nn.Module) -> None:
    """Bring the parts of a level into the modes of the network's, but for norms, which are its own."""
    if all(module.training == net.training for module in net.modules()):
        return
    norms = {norm for _, norm in iterate_norms(net)}
    for module, part in zip(net.modules(), level.modules(), strict=True):
        if module not in norms:
            part.training = module.training
