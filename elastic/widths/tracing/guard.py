"""Hold a network against its trace, for which numbers, flags and modes are what they were."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elastic.errors import StructureError
from elastic.widths.copying import ATOMS
from elastic.widths.tracing.constants import MISSING, Attribute
from elastic.widths.tracing.graph import trace
from elastic.widths.tracing.norms import drop_counters

REMEDY = "keep it in a buffer, a tensor, which a trace reads each time"
MODES = {True: "training", False: "evaluation"}


class _Constant(NamedTuple):
    """Hold an attribute, what it is for the trace, and that as a text: containers may change."""

    attribute: Attribute
    module: nn.Module
    value: Any
    text: str


class Guard:
    """Raise StructureError where a traced network is called for which something else was constant.

    It is a hook of that network. A copy that keeps it asks the same modules; one that is stored asks none.

    Args:
        model: the network that has been traced.
        example: the inputs by which it was.
        codes: of its traces, by mode: in training, in evaluation.
        reads: the attributes that are constants, of the trace of either mode.
        modes: the paths of the modules whose modes its forward asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Tensor, ...] = (),
        codes: Mapping[bool, str] | None = None,
        reads: Mapping[bool, Iterable[Attribute]] | None = None,
        modes: Iterable[str] = (),
    ) -> None:
        self._model, self._example, self._codes = model, example, codes or {}
        modules = dict(model.named_modules())
        self._constants = {mode: _list_constants(modules, group) for mode, group in (reads or {}).items()}
        self._parts = {path: modules[path] for path in sorted(modes)}
        self._followed = {frozenset[str]()}  # parts that were in another mode, which has made no difference

    def __call__(self, traced: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():  # it is about the network as it is now
            return
        for attribute, module, value, text in self._constants.get(traced.training, ()):
            now = vars(module).get(attribute.name, MISSING)
            if not (now is value and type(now) in ATOMS) and repr(now) != text:
                raise StructureError(
                    f"'{attribute}' was {text} when the network was traced, which goes on computing with it, "
                    f"and is {'missing' if now is MISSING else repr(now)} now: set it before, or {REMEDY}"
                )
        mode = self._model.training
        parts = frozenset(path for path, part in self._parts.items() if part.training != mode)
        if parts not in self._followed:
            self._check_modes(parts)
            self._followed.add(parts)

    def _check_modes(self, parts: Iterable[str]) -> None:
        """Raise StructureError where the network is another one since parts of it are in another mode."""
        now = trace(self._model, *self._example)
        drop_counters(now)
        mode = self._model.training
        if now.code != self._codes[mode]:
            raise StructureError(
                f"'{min(parts)}' is in {MODES[not mode]} while the network is in {MODES[mode]}, which its "
                "trace does not follow: let the network's own train(mode) set that, before it is traced"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (nn.Identity(),)


def _list_constants(modules: Mapping[str, nn.Module], attributes: Iterable[Attribute]) -> list[_Constant]:
    constants = []
    for attribute in sorted(attributes):
        module = modules[attribute.path]
        value = vars(module)[attribute.name]
        constants.append(_Constant(attribute, module, value, repr(value)))
    return constants
