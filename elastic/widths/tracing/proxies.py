"""Stand for values while a forward is traced, and answer where Python insists on one."""

import operator
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

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


class Asked:
    """Answer with a number, where Python insists on one, or names it."""

    def __index__(self) -> int:
        caller = sys._getframe(1)
        return int(self.tracer.ask(self, (caller.f_code, caller.f_lasti)))  # type: ignore[attr-defined]

    __int__ = __index__

    def __float__(self) -> float:
        """Give a number for good."""
        return float(self.tracer.ask(self))  # type: ignore[attr-defined]

    def __format__(self, spec: str) -> str:
        tracer = self.tracer  # type: ignore[attr-defined]
        is_number = isinstance(tracer.find(self.node), int | float)  # type: ignore[attr-defined]
        return format(tracer.ask(self) if is_number else repr(self), spec)

    def __str__(self) -> str:
        return format(self)

    def __round__(self, digits: int | None = None) -> float:
        return round(float(self), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        number: Any = self
        return number // other, number % other

    def __len__(self) -> int:
        tracer = self.tracer  # type: ignore[attr-defined]
        return int(tracer.ask(tracer.create_proxy("call_function", len, (self,), {})))

    def __contains__(self, item: Any) -> bool:
        tracer = self.tracer  # type: ignore[attr-defined]
        return bool(tracer.ask(tracer.create_proxy("call_function", operator.contains, (self, item), {})))

    def __iadd__(self, other: Any) -> Any:
        return self._assign(operator.iadd, other)

    def __isub__(self, other: Any) -> Any:
        return self._assign(operator.isub, other)

    def __imul__(self, other: Any) -> Any:
        return self._assign(operator.imul, other)

    def __itruediv__(self, other: Any) -> Any:
        return self._assign(operator.itruediv, other)

    def _assign(self, operation: Callable[[Any, Any], Any], other: Any) -> Any:
        """Keep that a tensor is changed, which torch.fx takes for a new one."""
        return self.tracer.create_proxy("call_function", operation, (self, other), {})  # type: ignore[attr-defined]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})  # type: ignore[attr-defined]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Give NumPy a number, or those of a shape, for good."""
        return np.asarray(self.tracer.ask_numbers(self), dtype)  # type: ignore[attr-defined]


class _AskedAttribute(Asked, fx.proxy.Attribute):
    """Stand for an attribute, or a method, of what an operation gives."""


class _LookupKey(_AskedAttribute):
    """Stand for an attribute by which a forward may look something up, and which it may name."""

    kind: type

    def __eq__(self, other: object) -> Any:
        if self.tracer.is_over:  # type: ignore[attr-defined]
            return self is other  # a cache may hold it still
        return self.value == other if isinstance(other, self.kind) else super().__eq__(other)

    def __ne__(self, other: object) -> Any:
        return self.value != other if isinstance(other, self.kind) else super().__ne__(other)

    def __hash__(self) -> int:
        return hash(self.value)

    def __format__(self, spec: str) -> str:
        return format(str(self.value), spec)

    @property
    def value(self) -> Any:
        return self.tracer.find(self.node)  # type: ignore[attr-defined]


class _Type(_LookupKey):
    """Stand for the type of a tensor's entries."""

    kind = torch.dtype


class _Device(_LookupKey):
    """Stand for where a tensor is: a forward that asks is told where the model is while it is traced.

    What it decides by that holds on any other device, too: it is how to compute, not what.
    """

    kind = torch.device

    def __getattr__(self, k: str) -> Any:
        return getattr(self.value, k) if k in ("type", "index") else super().__getattr__(k)

    @property
    def value(self) -> Any:
        return self.tracer.device  # type: ignore[attr-defined]


KEYS = {"dtype": _Type, "device": _Device}
DEVICES = {"is_cpu": "cpu", "is_cuda": "cuda", "is_mps": "mps", "is_xpu": "xpu"}
TOLD = {"ndim", "dim", "requires_grad", *DEVICES}  # of a tensor, as Python's own values
# What NumPy and torch look for to tell what something is, beside `__array__`.
LOOKED_FOR = ("__array", "__cuda_array", "_is_param", "_is_buffer")


class AskedProxy(Asked, fx.Proxy):
    """Stand for what an operation gives; the tracer, a `ConcreteTracer`, knows what that is."""

    def __getattr__(self, k: str) -> Any:
        if k.startswith(LOOKED_FOR):
            raise AttributeError(k)
        tracer: Any = self.tracer
        value = tracer.find(self.node) if k in TOLD else None
        if not isinstance(value, Tensor):
            return KEYS.get(k, _AskedAttribute)(self, k)
        if k in DEVICES:
            return tracer.device.type == DEVICES[k]
        if k == "requires_grad":  # what is done for the gradient's sake is no part of what is computed
            return False
        tracer.expect_dimensions()
        number = value.dim()
        return number if k == "ndim" else lambda: number

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep an assignment to a tensor's data as a node of its own."""
        if name == "data":
            self.tracer.create_proxy("call_function", setattr, (self, name, value), {})
        else:
            super().__setattr__(name, value)
