"""Trace what asks for sizes: what the example's shape decides is computed when it is asked for.

The graph then holds a node that expects the same answer: for another shape it raises an error.
"""

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from types import FrameType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from elastic.widths.copying import ATOMS
from elastic.widths.tracing.autocast import REGIONS, Region
from elastic.widths.tracing.checks import find_passing
from elastic.widths.tracing.expecting import (
    changes_tensor,
    depends_on_inputs,
    expect_default,
    expect_held,
    expect_passed,
    expect_same,
    is_drawn,
)
from elastic.widths.tracing.gradients import GRADIENT
from elastic.widths.tracing.meta import (
    FORWARD,
    compute_without_data,
    has_own_forward,
    make_meta_copy,
)
from elastic.widths.tracing.objects import list_arguments, make_constructor
from elastic.widths.tracing.patching import Constructor
from elastic.widths.tracing.proxies import AskedProxy, Instruction, TrainingFlag
from elastic.widths.tracing.sizes import note_computed_sizes

NUMPY = {"axis", "out"}  # how NumPy's functions call a method of what is no array
ALIASES = {"axis": "dim", "keepdims": "keepdim"}  # NumPy's names, which torch takes for its own
PRODUCT = math.prod  # which torch.fx puts its own in place of while it traces
DRAWN: Any = 1  # leaves in what is left out at random where a smaller number is drawn, or zero
DRAWS = "it decides by a number that it draws, which a graph cannot"
DATA = "it asks for what depends on the data"
TENSOR_TYPE = type(torch.FloatTensor)
PLACE = "place"  # in a node's `meta`: the module in whose forward it is
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
# Methods that torch.fx puts its own in place of while it traces.
PATCHED = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}


class ConcreteTracer(fx.Tracer):
    """Trace, and compute what the forward asks for from the shapes of an example.

    Attributes:
        answers: what it has been told, in order; `known_answers`, those of another trace, are told instead.
        is_over: whether the trace has ended.
        is_computing: whether what runs is no part of the forward, but computes what that asks for.
        has_own_gradient: whether a function with a gradient of its own is run.
        regions: of autocast, that the forward is in.
        runs: whether the graph is to be run. One that is not goes one of the ways that a forward may take by
            numbers that it draws.
    """

    def __init__(
        self, inputs: Sequence[Tensor] = (), known_answers: Sequence[Any] | None = None, runs: bool = False
    ) -> None:
        super().__init__()
        self.runs = runs
        self.answers: list[Any] = []
        self.regions: list[Region] = []
        self.is_over = self.is_computing = self.has_own_gradient = self._expects_dimensions = False
        self._known_answers = None if known_answers is None else iter(known_answers)
        self._inputs, self._values = inputs, dict[fx.Node, Any]()
        self._replica: nn.Module | None = None
        self._questions: list[tuple[fx.Node, Instruction]] = []  # since the last node, and by whom
        self._place = ""

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make placeholders of the inputs; what else a forward may be given is what it is by default."""
        if has_own_forward(self.root):
            root_fn = _make_method(self.root)
        if not self._inputs:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        args: list[Any] = [self.root]
        remaining = len(self._inputs)
        defaults = []
        for parameter in list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]:
            name, default = parameter.name, parameter.default
            if parameter.kind is parameter.VAR_POSITIONAL:
                args += [self.create_proxy("placeholder", f"{name}_{i}", (), {}) for i in range(remaining)]
                remaining = 0
            elif parameter.kind in POSITIONAL and (remaining or default is parameter.empty):
                args.append(self.create_proxy("placeholder", name, (), {}))
                remaining -= 1
            elif type(default) in ATOMS:
                defaults.append((self.create_proxy("placeholder", name, (default,), {}), default, name))
        for expectation in defaults:
            self.create_proxy("call_function", expect_default, expectation, {})
        return root_fn, args

    # In these, torch.fx's own search all tensors of the model for each one that is read, copy a stack of
    # modules for each node, and try many types for each argument.

    @cached_property
    def device(self) -> torch.device:
        """Return where the model is."""
        tensors = (*self.root.parameters(), *self.root.buffers())
        places = [tensor.device for tensor in tensors if not tensor.is_meta]
        return places[0] if places else torch.device("cpu")

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
            _get_signature(type(m).forward).bind(m, *args, **kwargs)  # a forward may try what a layer takes
            return self.create_proxy("call_module", path, args, kwargs)
        outer, self._place = self._place, path
        try:
            return forward(*args, **kwargs)
        finally:
            self._place = outer

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], *details: Any, **options: Any
    ) -> fx.Node:
        """Make a node that knows where it is, and what gradient and precision it has there."""
        if kind == "call_method" or _is_torchs(target):
            kwargs = {ALIASES.get(name, name): value for name, value in kwargs.items()}
        node = super().create_node(kind, target, args, kwargs, *details, **options)
        node.meta[PLACE], node.meta[REGIONS] = self._place, tuple(self.regions)
        node.meta[GRADIENT] = "own" if self.has_own_gradient else torch.is_grad_enabled()
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
        if isinstance(a, np.generic):
            return a.item()
        if kind is TENSOR_TYPE or kind is Constructor:
            return a.dtype  # `x.type(torch.FloatTensor)`, whose place is the model's
        if isinstance(a, dict) and kind is not dict and (arguments := list_arguments(a)) is not None:
            args, kwargs = arguments
            return self.create_node("call_function", kind, self.create_arg(args), self.create_arg(kwargs))
        if isinstance(a, fx.Proxy):
            return a.node
        try:
            return super().create_arg(a)
        except NotImplementedError:  # torch.fx knows no such class
            attributes = self.create_arg(dict(getattr(a, "__dict__", {})))
            if isinstance(a, nn.Module) or not any(type(leaf) is fx.Node for leaf in tree_leaves(attributes)):
                raise
        return self.create_node("call_function", make_constructor(kind), (), attributes)

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        """Make a node; a number that torch has looked at only to see that it is one was not asked for."""
        if args[:2] == ("call_method", "prod") and args[3].keys() == NUMPY:  # `np.prod(x.shape)`
            args = ("call_function", PRODUCT, args[2], {})
        if args[:2] == ("call_method", "item") and not self.runs and is_drawn(args[2][0].node):
            return DRAWN
        questions, self._questions = self._questions, []
        frame: FrameType | None = sys._getframe(1)
        callers: set[Instruction] = set()
        while questions and frame is not None:
            callers.add((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        for node, caller in questions:
            if caller in callers:
                self.graph.erase_node(node)
        return super().create_proxy(*args, **kwargs)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return AskedProxy(node, self) if self._inputs else fx.Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Answer what the example's shape decides, and what is asked only to raise an error, or to report."""
        if not self._inputs:
            return super().to_bool(obj)
        try:
            return bool(self.ask(obj))
        except fx.proxy.TraceError:
            caller = sys._getframe(2)  # of the proxy's `__bool__`
            passing = find_passing(caller.f_code, caller.f_lasti)
            if passing is None:
                raise
        if passing.raises:
            self.create_proxy("call_function", expect_passed, (obj, passing.answer), {})
        return passing.answer

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
            TraceError: it depends on the data, or on random numbers and the graph is to be run.
        """
        if is_drawn(proxy.node):
            if self.runs:
                raise fx.proxy.TraceError(DRAWS)
            return DRAWN
        value = self._answer(proxy.node)
        if isinstance(value, Tensor) and not value.is_meta and value.numel() == 1:
            value = value.item()  # of a number that the forward's modules hold
        if not isinstance(value, bool | int | float):
            raise fx.proxy.TraceError(DATA)
        expect = expect_same if depends_on_inputs(proxy.node) else expect_held
        expected = self.create_proxy("call_function", expect, (proxy, value), {})
        if caller is not None:
            self._questions.append((expected.node, caller))
        return value

    def ask_numbers(self, proxy: fx.Proxy) -> Any:
        """Compute a number from the example's shape, or each of a shape's; see `ask`."""
        is_shape = isinstance(self._answer(proxy.node), tuple | list)
        return [self.ask(part) for part in self.iter(proxy)] if is_shape else self.ask(proxy)

    def expect_dimensions(self) -> None:
        """Let the graph expect inputs of as many dimensions as the example's: others follow from these."""
        if self._expects_dimensions:
            return
        self._expects_dimensions = True
        for node in self.graph.find_nodes(op="placeholder"):
            if isinstance(self._evaluate(node), Tensor):
                self.ask(self.create_proxy("call_function", getattr, (self.proxy(node), "ndim"), {}))

    def find(self, node: fx.Node) -> Any:
        """Find what a node gives, for good; None where that cannot be computed."""
        try:
            return self._answer(node)
        except Exception:  # it is the model's own, and told where the model is run
            return None

    def gives_tensor(self, node: fx.Node) -> bool:
        """Tell whether a node gives a tensor, as it does where that cannot be computed."""
        try:
            return isinstance(self._evaluate(node), Tensor)
        except Exception:  # as in `find`
            return True

    def _answer(self, node: fx.Node) -> Any:
        """Tell what a node gives, or what it gave when the same forward was traced before."""
        known_answers = self._known_answers
        self.answers.append(self._evaluate(node) if known_answers is None else next(known_answers, None))
        return self.answers[-1]

    def copy_model(self, model: nn.Module) -> None:
        """Copy the model that is asked for what its nodes give; as it is now, if this is not done before."""
        self._replica = make_meta_copy(model)
        for module in self._replica.modules():  # while the mode is watched, in training, they have none
            vars(module).setdefault("training", True)

    def _evaluate(self, node: fx.Node) -> Any:
        """Compute what a node gives, without data."""
        if self._replica is None:
            with _untraced():
                self.copy_model(self.root)
        assert self._replica is not None
        visited, sources, pending = set[fx.Node](), set[fx.Node](), [node]
        while pending:
            source = pending.pop()
            if source in visited:
                continue
            visited.add(source)
            # What a method has changed may be of another shape by now.
            pending += (user for user in source.users if changes_tensor(user) and user.args[0] is source)
            if source not in self._values:
                sources.add(source)
                pending += source.all_input_nodes
        inputs = dict(zip(node.graph.find_nodes(op="placeholder"), self._inputs, strict=False))
        self.is_computing = True
        try:
            with torch.no_grad(), _untraced():
                for source in (n for n in node.graph.nodes if n in sources):
                    self._values[source] = self._compute(source, inputs)
        except (RuntimeError, TypeError) as error:
            if re.search("meta (tensor|device)", str(error), re.IGNORECASE):
                raise fx.proxy.TraceError(DATA) from error
            raise
        finally:
            self.is_computing = False
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
            return getattr(owner, name) if hasattr(owner, name) else getattr(self.root, name)
        layer = self._replica.get_submodule(target) if node.op == "call_module" else None
        return compute_without_data(node, layer, args, kwargs)


@cache
def _get_signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _is_torchs(target: Any) -> bool:
    """Tell whether a function is torch's, and not one that has an argument of NumPy's name."""
    library = (getattr(target, "__module__", None) or "torch").partition(".")[0]
    return callable(target) and library == "torch" and "quantize" not in getattr(target, "__name__", "")


def _make_method(module: nn.Module) -> Callable[..., Any]:
    """Make a method of what a program has put in the place of a module's forward."""
    forward: Callable[..., Any] = vars(module)[FORWARD]
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return forward.__func__

    def method(_: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    own = inspect.signature(forward)
    first = inspect.Parameter("module", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = own.replace(parameters=[first, *own.parameters.values()])  # type: ignore[attr-defined]
    return method


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
