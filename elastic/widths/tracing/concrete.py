"""Trace what asks for sizes: what the example's shape decides is computed when it is asked for.

The graph then holds a node that expects the same answer: for another shape it raises an error.
"""

import builtins
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, wraps
from types import CodeType, FrameType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from elastic.errors import StructureError
from elastic.widths.copying import ATOMS
from elastic.widths.tracing.meta import drop_data, make_meta_copy
from elastic.widths.tracing.shapes import infer_call, infer_layer
from elastic.widths.tracing.sizes import note_computed_sizes

Instruction = tuple[CodeType, int]  # the place in the code where a frame is

# Functions that make a tensor of given sizes: torch.fx does not see them where these are traced numbers.
FACTORIES = tuple("ones zeros full empty arange rand randn linspace eye tensor as_tensor".split())
# Methods that take sizes or types, which torch.fx does not see where the forward makes the tensor itself.
SIZED = tuple(
    "expand broadcast_to repeat tile view reshape narrow select type "
    "new_zeros new_ones new_empty new_full".split()
)
NUMPY = {"axis", "out"}  # how NumPy's functions call a method of what is no array
PLACE = "place"  # in a node's `meta`: the module in whose forward it is
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Methods that torch.fx puts its own in place of while it traces.
PATCHED = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}


def expect_same(value: object, expected: object) -> None:
    """Raise StructureError where a traced network would have gone another way.

    Raises:
        StructureError: the input is of another shape than that for which the network was traced.
    """
    if value != expected:
        raise StructureError(
            f"the network was traced for inputs of another shape ({expected} there is {value} here): "
            "give it inputs of the example's shape"
        )


def expect_default(value: object, default: object, name: str) -> None:
    """Raise StructureError where a traced network is given another value than the one it was traced with.

    Raises:
        StructureError: always then.
    """
    if type(value) is not type(default) or value != default:
        raise StructureError(
            f"the network was traced with {name}={default!r}, as it is by default: leave it out"
        )


def changes_tensor(node: fx.Node) -> bool:
    """Tell whether a node calls a method that changes its tensor, perhaps also its shape: `unsqueeze_`."""
    name = str(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.endswith("__")


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
    """Answer with a number where Python insists on one."""

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
    pass


# What NumPy and torch look for to tell what something is, beside `__array__`.
LOOKED_FOR = ("__array", "__cuda_array", "_is_param", "_is_buffer")


class _AskedProxy(_Asked, fx.Proxy):
    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        if k.startswith(LOOKED_FOR):
            raise AttributeError(k)
        return _AskedAttribute(self, k)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


class ConcreteTracer(fx.Tracer):
    """Trace, and compute what the forward asks for from the shapes of an example.

    Attributes:
        answers: what it has been told, in order; `known_answers`, those of another trace, are told instead.
    """

    def __init__(self, inputs: Sequence[Tensor] = (), known_answers: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.answers: list[Any] = []
        self._known_answers = None if known_answers is None else iter(known_answers)
        self._inputs, self._values = inputs, dict[fx.Node, Any]()
        self._replica: nn.Module | None = None
        self._asked: list[tuple[fx.Node, Instruction]] = []  # since the last node, and by whom
        self._place = ""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make placeholders of the inputs; what else a forward may be given is what it is by default."""
        if not self._inputs:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        args: list[Any] = [self.root]
        left = len(self._inputs)
        defaults = []
        for parameter in list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]:
            name, default = parameter.name, parameter.default
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += [self.create_proxy("placeholder", f"{name}_{i}", (), {}) for i in range(left)]
                left = 0
            elif parameter.kind in POSITIONAL and (left or default is parameter.empty):
                args.append(self.create_proxy("placeholder", name, (), {}))
                left -= 1
            elif type(default) in ATOMS:
                defaults.append((self.create_proxy("placeholder", name, (default,), {}), default, name))
        for given in defaults:
            self.create_proxy("call_function", expect_default, given, {})
        return root_fn, args

    # In these, torch.fx's own search all tensors of the model for each one that is read, copy a stack of
    # modules for each node, and try many types for each argument.

    @cached_property
    def _names(self) -> dict[int, str]:
        """Name the model's parameters and buffers, by their identity."""
        tensors = [*self.root.named_parameters(), *self.root.named_buffers()]
        return {id(tensor): name for name, tensor in reversed(tensors)}

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Make a node of a tensor that is read, once."""
        name = self._names.get(id(attr_val)) if isinstance(attr_val, Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
        return parameter_proxy_cache[name]

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a node of a layer that stays whole, and look into any other module."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        outer, self._place = self._place, path
        try:
            return forward(*args, **kwargs)
        finally:
            self._place = outer

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Make a node that knows where it is."""
        node = super().create_node(*args, **kwargs)
        node.meta[PLACE] = self._place
        return node

    def create_arg(self, a: Any) -> Any:
        """Make what a node keeps of an argument."""
        kind = type(a)
        if kind in ATOMS:
            return a
        if kind is tuple or kind is list:
            return kind(map(self.create_arg, a))
        if kind is TrainingFlag:
            return a.pass_on()
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Make a node; a number that torch has looked at only to see that it is one was not asked for."""
        if args[:2] == ("call_method", "prod") and args[3].keys() == NUMPY:  # `np.prod(x.shape)`
            args = ("call_function", math.prod, args[2], {})
        asked, self._asked = self._asked, []
        frame: FrameType | None = sys._getframe(1)
        callers: set[Instruction] = set()
        while asked and frame is not None:
            callers.add((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        for node, caller in asked:
            if caller in callers:
                self.graph.erase_node(node)
        return super().create_proxy(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _AskedProxy(node, self) if self._inputs else fx.Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.ask(obj)) if self._inputs else super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self._answer(obj.node) if self._inputs else None
        parts: Any = obj
        if isinstance(value, Tensor) and value.dim():
            return iter([parts[i] for i in range(len(parts))])
        if not isinstance(value, tuple | list):
            return super().iter(obj)
        return iter([parts[i] for i in range(len(value))])

    def ask(self, proxy: fx.Proxy, caller: Instruction | None = None) -> Any:
        """Compute a number from the example's shape, and let the graph expect it.

        Args:
            caller: the place in the code that asks.

        Raises:
            TraceError: it depends on the data.
        """
        value = self._answer(proxy.node)
        if not isinstance(value, bool | int | float):
            raise fx.proxy.TraceError("it asks for what depends on the data")
        expected = self.create_proxy("call_function", expect_same, (proxy, value), {})
        if caller is not None:
            self._asked.append((expected.node, caller))
        return value

    def ask_numbers(self, proxy: fx.Proxy) -> Any:
        """Compute a number from the example's shape, or each of a shape's; see `ask`."""
        is_shape = isinstance(self._answer(proxy.node), tuple | list)
        return [self.ask(part) for part in self.iter(proxy)] if is_shape else self.ask(proxy)

    def stands_for_tensor(self, node: fx.Node) -> bool:
        """Tell whether a node gives a tensor, as far as that can be computed."""
        try:
            return isinstance(self._answer(node), Tensor)
        except Exception:  # it is the model's own, and told where the model is run
            return False

    def _answer(self, node: fx.Node) -> Any:
        """Tell what a node gives, or what it gave when the same forward was traced before."""
        known = self._known_answers
        self.answers.append(self._evaluate(node) if known is None else next(known, None))
        return self.answers[-1]

    def _evaluate(self, node: fx.Node) -> Any:
        """Compute what a node gives, without data."""
        if self._replica is None:
            with _untraced():
                self._replica = make_meta_copy(self.root)
        seen, needed, pending = set[fx.Node](), set[fx.Node](), [node]
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            # What a method has changed may be of another shape by now.
            pending += (user for user in source.users if changes_tensor(user) and user.args[0] is source)
            if source not in self._values:
                needed.add(source)
                pending += source.all_input_nodes
        inputs = dict(zip(node.graph.find_nodes(op="placeholder"), self._inputs, strict=False))
        with torch.no_grad(), _untraced():
            for source in (n for n in node.graph.nodes if n in needed):
                self._values[source] = self._compute(source, inputs)
        return self._values[node]

    def _compute(self, node: fx.Node, inputs: dict[fx.Node, Tensor]) -> Any:
        assert self._replica is not None
        args = map_arg(node.args, self._values.__getitem__)
        kwargs = map_arg(node.kwargs, self._values.__getitem__)
        target: Any = node.target
        if node.op == "placeholder":
            return inputs[node] if node in inputs else node.args[0]
        if node.op == "get_attr":
            path, _, name = target.rpartition(".")
            owner = self._replica.get_submodule(path)
            value = getattr(owner, name) if hasattr(owner, name) else getattr(self.root, name)
            return drop_data(value)
        if node.op == "call_module":
            layer = self._replica.get_submodule(target)
            value = infer_layer(layer, args, kwargs)
            return layer(*args, **kwargs) if value is None else value
        if (value := infer_call(target, args, kwargs)) is not None:
            return value
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return drop_data(target(*args, **kwargs))


@contextmanager
def _untraced() -> Iterator[None]:
    """Let modules be called for their values, in the middle of a trace."""
    before = [getattr(nn.Module, name) for name in PATCHED]
    try:
        for name, method in PATCHED.items():
            setattr(nn.Module, name, method)
        with note_computed_sizes():  # what torch computes with is not the forward's
            yield
    finally:
        for name, method in zip(PATCHED, before, strict=True):
            setattr(nn.Module, name, method)


@contextmanager
def pass_for_tensors() -> Iterator[None]:
    """Let a forward that asks `isinstance(x, Tensor)` find a tensor where a traced value stands for one.

    Such a value has no `__class__` that says so: torch's own code in C would take it for a tensor's memory.
    """
    ask, tensor = builtins.isinstance, torch.empty(0, device="meta")

    def is_instance(value: Any, kinds: Any) -> bool:
        if type(value) is not _AskedProxy or ask(value, kinds) or not ask(tensor, kinds):
            return ask(value, kinds)
        tracer: Any = value.tracer
        return bool(tracer.stands_for_tensor(value.node))

    try:
        builtins.isinstance = is_instance  # type: ignore[assignment]
        yield
    finally:
        builtins.isinstance = ask


@contextmanager
def trace_factories(tracer: fx.Tracer) -> Iterator[None]:
    """Let functions that make tensors, and methods of tensors made so, be traced with traced numbers."""
    before = {name: getattr(torch, name) for name in FACTORIES}
    try:
        for name, function in before.items():
            setattr(torch, name, _make_traceable(tracer, function, "call_function", function))
        for name in SIZED:
            setattr(Tensor, name, _make_traceable(tracer, getattr(Tensor, name), "call_method", name))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)
        for name in SIZED:
            if name in vars(Tensor):  # its base has torch's own
                delattr(Tensor, name)


def _make_traceable(
    tracer: fx.Tracer, function: Callable[..., Any], kind: str, target: Any
) -> Callable[..., Any]:
    @wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
            return tracer.create_proxy(kind, target, args, kwargs)
        return function(*args, **kwargs)

    return make
