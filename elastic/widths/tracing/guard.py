"""Hold a network against its trace, for which numbers, flags and modes are what they were."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from elastic.errors import StructureError
from elastic.widths.copying import ATOMS
from elastic.widths.mode import preserve_modes
from elastic.widths.tracing.constants import CONSTANT, MISSING, Attribute
from elastic.widths.tracing.graph import trace
from elastic.widths.tracing.norms import drop_counters

REMEDY = "keep it in a buffer, a tensor, which a trace reads each time"
MODES = {True: "training", False: "evaluation"}


class _Constant:
    """Hold an attribute, and what it is for the trace.

    Attributes:
        text: of its value then; containers may change.
        harmless: that of the latest other value, if it has made no difference.
    """

    def __init__(self, attribute: Attribute, module: nn.Module) -> None:
        self.attribute, self.module = attribute, module
        self.value = vars(module)[attribute.name]
        self.text, self.harmless = repr(self.value), ""

    def find_other(self) -> str | None:
        """Find what it is now, as a text, where that may make a difference."""
        current = vars(self.module).get(self.attribute.name, MISSING)
        if current is self.value and type(current) in ATOMS:
            return None
        text = "missing" if current is MISSING else repr(current)
        return None if text in (self.text, self.harmless) else text


class Guard:
    """Raise StructureError where a traced network is called for which something else was constant.

    It is a hook of that network. Where something has changed since, the network is traced again, to see
    whether that makes a difference. A copy that keeps the hook asks the same modules; one that is stored asks
    none.

    Args:
        model: the network that has been traced.
        example: the inputs by which it was.
        traces: of it, by mode: in training, in evaluation.
        reads: the attributes that are constants, of the trace of either mode.
        modes: the paths of the modules whose modes its forward asks for.
    """

    def __init__(
        self,
        model: nn.Module,
        example: tuple[Tensor, ...] = (),
        traces: Mapping[bool, fx.GraphModule] | None = None,
        reads: Mapping[bool, Iterable[Attribute]] | None = None,
        modes: Iterable[str] = (),
    ) -> None:
        self._model, self._example = model, example
        self._signatures = {mode: sign(traced) for mode, traced in (traces or {}).items()}
        modules = dict(model.named_modules())
        self._constants = {
            mode: [_Constant(attribute, modules[attribute.path]) for attribute in sorted(group)]
            for mode, group in (reads or {}).items()
        }
        self._parts = {path: modules[path] for path in sorted(modes)}
        self._followed = {frozenset[str]()}  # parts that were in another mode, which has made no difference

    def __call__(self, traced: nn.Module, inputs: Any) -> None:
        if torch.compiler.is_compiling():  # it is about the network as it is now
            return
        for constant in self._constants.get(traced.training, ()):
            text = constant.find_other()
            if text is not None:
                self._check_constant(constant, text, traced.training)
                constant.harmless = text
        mode = self._model.training
        parts = frozenset(path for path, part in self._parts.items() if part.training != mode)
        if parts not in self._followed:
            self._check_parts(parts, mode)
            self._followed.add(parts)

    def _check_constant(self, constant: _Constant, text: str, mode: bool) -> None:
        with preserve_modes(self._model):
            self._model.train(mode)
            if self._is_same(mode):
                return
        raise StructureError(
            f"'{constant.attribute}' was {constant.text} when the network was traced, which goes on "
            f"computing with it, and is {text} now: set it before, or {REMEDY}"
        )

    def _check_parts(self, parts: Iterable[str], mode: bool) -> None:
        if not self._is_same(mode):
            raise StructureError(
                f"'{min(parts)}' is in {MODES[not mode]} while the network is in {MODES[mode]}, which its "
                "trace does not follow: let the network's own train(mode) set that, before it is traced"
            )

    def _is_same(self, mode: bool) -> bool:
        """Tell whether the network's trace in a mode is what it was."""
        graph = trace(self._model, *self._example)
        drop_counters(graph)
        return sign(graph).is_like(self._signatures[mode])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Guard, (nn.Identity(),)


class Signature(NamedTuple):
    """Hold what a trace computes, to be compared with another.

    Attributes:
        constants: the tensors that the forward has made while it was traced.
    """

    code: str
    constants: list[Tensor]

    def is_like(self, other: "Signature") -> bool:
        """Tell whether two traces compute the same."""
        return self.code == other.code and all(map(torch.equal, self.constants, other.constants))


def sign(traced: fx.GraphModule) -> Signature:
    """Make the signature of a trace as it is now: it may be edited."""
    names = [str(node.target) for node in traced.graph.find_nodes(op="get_attr")]
    return Signature(traced.code, [getattr(traced, name) for name in names if name.startswith(CONSTANT)])
