"""Let Python and torch take traced values for tensors and numbers, while a forward is traced."""

import builtins
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce, wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from elastic.widths.tracing.meta import leave_out_checks
from elastic.widths.tracing.proxies import Asked

if TYPE_CHECKING:
    from elastic.widths.tracing.concrete import ConcreteTracer

# Functions that make a tensor of given sizes, or tell of a type: torch.fx does not see them where these are
# traced.
FACTORIES = tuple(
    "ones zeros full empty arange linspace eye tensor as_tensor finfo iinfo broadcast_shapes".split()
)
CONSTRUCTORS = tuple(
    f"{kind}Tensor" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
)
# These make other numbers each time.
RANDOM = tuple("rand randn randint randperm normal bernoulli multinomial poisson".split())
RANDOM_METHODS = tuple("bernoulli bernoulli_ uniform_ normal_ random_ exponential_ multinomial".split())
# Methods that take sizes or types, which torch.fx does not see where the forward makes the tensor itself.
SIZED = tuple(
    "expand broadcast_to repeat tile view reshape narrow select type "
    "new_zeros new_ones new_empty new_full".split()
)


@contextmanager
def pass_for_values() -> Iterator[None]:
    """Let a forward that asks `isinstance(x, Tensor)` find a tensor where a traced value stands for one.

    So it finds a number, or a shape. Such a value has no `__class__` that says so: torch's own code in C
    would take it for a tensor's memory.
    """
    ask = builtins.isinstance
    samples = (torch.empty(0, device="meta"), 1, 0.5, torch.Size(), torch.float32, torch.device("cpu"))

    def is_instance(value: Any, kinds: Any) -> bool:
        if not issubclass(type(value), Asked) or (ask(value, kinds) and kinds is not Iterable):
            return ask(value, kinds)
        return any(ask(sample, kinds) for sample in samples) and ask(value.tracer.find(value.node), kinds)

    try:
        builtins.isinstance = is_instance  # type: ignore[assignment]
        yield
    finally:
        builtins.isinstance = ask


@contextmanager
def leave_modules() -> Iterator[None]:
    """Let a forward that moves modules of its own, `self.blur.to(x.device)(x)`, find them moved."""
    move = nn.Module.to
    try:
        nn.Module.to = lambda module, *_, **__: module  # type: ignore[method-assign,assignment]
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@contextmanager
def leave_out_old_hooks(model: nn.Module) -> Iterator[None]:
    """Let modules with backward hooks of the old kind be traced: these ask for a gradient's function."""
    hooked = {m: m._backward_hooks for m in model.modules() if m._is_full_backward_hook is False}
    try:
        for module in hooked:
            module._backward_hooks = OrderedDict()
        yield
    finally:
        for module, hooks in hooked.items():
            module._backward_hooks = hooks


@contextmanager
def trace_distributions() -> Iterator[None]:
    """Let a forward make distributions of traced values, and draw of them as many samples as these have.

    It would ask of values whether they may be, and of shapes for numbers.
    """
    extend = Distribution._extended_shape

    def extend_traced(distribution: Distribution, sample_shape: Any = ()) -> Any:
        parts = (sample_shape, distribution.batch_shape, distribution.event_shape)
        if not has_traced(parts):
            return extend(distribution, sample_shape)
        return reduce(operator.add, [part for part in parts if has_traced(part) or len(part)])

    try:
        Distribution._extended_shape = extend_traced  # type: ignore[method-assign,assignment]
        with leave_out_checks():
            yield
    finally:
        Distribution._extended_shape = extend  # type: ignore[method-assign]


@contextmanager
def trace_wrappers() -> Iterator[None]:
    """Let traced values be given to what insists on tensors: `Variable` of old, and TorchScript's functions.

    The latter are traced as the Python that they were made of.
    """
    script: Any = torch.jit.ScriptFunction
    kind: Any = type(torch.autograd.Variable)
    call_script = script.__call__

    def call_function(function: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(function, "_torchdynamo_inline") and has_traced(args, kwargs):
            return function._torchdynamo_inline(*args, **kwargs)
        return call_script(function, *args, **kwargs)

    def make_variable(variable: Any, *args: Any, **kwargs: Any) -> Any:
        return args[0] if has_traced(args[:1]) else type.__call__(variable, *args, **kwargs)

    try:
        script.__call__, kind.__call__ = call_function, make_variable
        yield
    finally:
        script.__call__ = call_script
        del kind.__call__


@contextmanager
def trace_constructors() -> Iterator[None]:
    """Let the constructors of old, `torch.FloatTensor(sizes)`, be traced with traced numbers."""
    places = [(owner, name) for owner in (torch, torch.cuda) for name in CONSTRUCTORS if hasattr(owner, name)]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    construct = Tensor.__new__

    def make(kind: type[Tensor], *args: Any, **kwargs: Any) -> Any:
        if kind is Tensor and has_traced(args):
            return _make_tensor(args, dtype=torch.get_default_dtype())
        return construct(kind, *args, **kwargs)

    try:
        Tensor.__new__ = make  # type: ignore[method-assign,assignment]
        for owner, name, kind in before:
            device = "cuda" if owner is torch.cuda else "cpu"
            setattr(owner, name, Constructor(name, (), {"kind": kind, "device": device}))
        yield
    finally:
        del Tensor.__new__  # its base has torch's own
        for owner, name, kind in before:
            setattr(owner, name, kind)


class Constructor(type):
    """Stand for a type of tensors, whose own class takes no other call."""

    kind: Any
    device: str

    @property
    def dtype(cls) -> torch.dtype:
        """Get the type of the entries."""
        dtype: torch.dtype = cls.kind.dtype
        return dtype

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if not has_traced(args):
            return cls.kind(*args, **kwargs)
        return _make_tensor(args, dtype=cls.dtype, device=cls.device)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, cls.kind)


def _make_tensor(args: Sequence[Any], **options: Any) -> Any:
    """Make a tensor as constructors of old do: of a list of numbers, or of sizes."""
    make: Any = torch.tensor if isinstance(args[0], list) else torch.empty
    return make(*args, **options)


@contextmanager
def trace_factories(tracer: "ConcreteTracer", draws: bool) -> Iterator[None]:
    """Let functions that make tensors, and methods of tensors made so, be traced with traced numbers.

    Args:
        draws: whether random numbers are drawn each time, also where nothing that is traced says how many.
    """
    before = {name: getattr(torch, name) for name in (*FACTORIES, *RANDOM)}
    methods = (*SIZED, *RANDOM_METHODS)
    try:
        for name, function in before.items():
            always = draws and name in RANDOM
            setattr(torch, name, _make_traceable(tracer, function, "call_function", function, always))
        for name in methods:
            always = draws and name in RANDOM_METHODS
            setattr(Tensor, name, _make_traceable(tracer, getattr(Tensor, name), "call_method", name, always))
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)
        for name in methods:
            if name in vars(Tensor):  # its base has torch's own
                delattr(Tensor, name)


def _make_traceable(
    tracer: "ConcreteTracer", function: Callable[..., Any], kind: str, target: Any, always: bool
) -> Callable[..., Any]:
    @wraps(function)
    def make(*args: Any, **kwargs: Any) -> Any:
        args = tuple(a.dtype if type(a) is Constructor else a for a in args)
        if has_traced(args, kwargs) or (always and not tracer.is_computing):
            return tracer.create_proxy(kind, target, args, kwargs)
        return function(*args, **kwargs)

    return make


def has_traced(*arguments: Any) -> bool:
    """Tell whether a traced value is among arguments."""
    return any(isinstance(value, fx.Proxy) for value in tree_leaves(arguments))
