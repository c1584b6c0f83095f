"""Stand for values while a forward is traced, and answer where Python insists on one."""

import operator
import sys
from types import CodeType
from typing import Any, Literal

import numpy as np
import torch
from torch import fx

Instruction = tuple[CodeType, int]  # the place in the code where a frame is


class TrainingFlag:
    """Stand for `self.training`, true while a forward is traced, and know what it has been used for.

    Attributes:
        use: it "decides" where the forward goes, or is "passed" on to an operation; None of anything else.
    """

    def __init__(self) -> None:
        self.use: Literal["passed", "decides"] | None = None

    def __bool__(self) -> bool:
        self.use = "decides"
        return True

    def pass_on(self) -> bool:
        """Be an argument of an operation."""
        self.use = self.use or "passed"
        return True


class _Asked:
    """Answer with a number, where Python insists on one."""

    def __index__(self) -> int:
        caller = sys._getframe(1)
        return int(self.tracer.ask(self, (caller.f_code, caller.f_lasti)))  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        """Give a number for good."""
        return float(self.tracer.ask(self))  # type: ignore[attr-defined]

    def __round__(self, digits: int | None = None) -> float:
        return round(float(self), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        number: Any = self
        return number // other, number % other

    def __len__(self) -> int:
        tracer = self.tracer  # type: ignore[attr-defined]
        return int(tracer.ask(tracer.create_proxy("call_function", len, (self,), {})))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Give NumPy a number, or those of a shape, for good."""
        return np.asarray(self.tracer.ask_numbers(self), dtype)  # type: ignore[attr-defined]


class _AskedAttribute(_Asked, fx.proxy.Attribute):
    """Stand for an attribute, or a method, of what an operation gives."""


class _Type(_AskedAttribute):
    """Stand for the type of a tensor's entries, also where a forward looks something up by it."""

    def __hash__(self) -> int:
        return hash(self.tracer.compute(self))  # type: ignore[attr-defined]


class _Device(_AskedAttribute):
    """Stand for where a tensor is: a forward that asks is told where the model is while it is traced.

    What it decides by that holds on any other device, too: it is how to compute, not what.
    """

    def __getattr__(self, k: str) -> Any:
        return getattr(self._place, k) if k in ("type", "index") else super().__getattr__(k)

    def __eq__(self, other: object) -> Any:
        return self._place == other if isinstance(other, torch.device) else super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        return self._place != other if isinstance(other, torch.device) else super().__ne__(other)

    def __hash__(self) -> int:
        return hash(self._place)

    def __str__(self) -> str:
        return str(self._place)

    @property
    def _place(self) -> torch.device:
        place: torch.device = self.tracer.device  # type: ignore[attr-defined]
        return place


ATTRIBUTES = {"dtype": _Type, "device": _Device}
DEVICES = {"is_cpu": "cpu", "is_cuda": "cuda", "is_mps": "mps", "is_xpu": "xpu"}
# What NumPy and torch look for to tell what something is, beside `__array__`.
LOOKED_FOR = ("__array", "__cuda_array", "_is_param", "_is_buffer")


class AskedProxy(_Asked, fx.Proxy):
    """Stand for what an operation gives; the tracer, a `ConcreteTracer`, knows what that is."""

    def __getattr__(self, k: str) -> Any:
        if k.startswith(LOOKED_FOR):
            raise AttributeError(k)
        tracer: Any = self.tracer
        if k in ("ndim", "dim") and tracer.stands_for_tensor(self.node):
            number = tracer.ask(_AskedAttribute(self, "ndim"))  # a forward may look things up by it
            return number if k == "ndim" else lambda: number
        if k in DEVICES and tracer.stands_for_tensor(self.node):
            return tracer.device.type == DEVICES[k]
        return ATTRIBUTES.get(k, _AskedAttribute)(self, k)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})
