"""Know numbers that modules hold as attributes, wherever a traced forward gives them to an operation.

`torch.split(x, self.width, 1)` is given a number, and a graph would hold no more than that. While a model is
traced its whole numbers are `SizeAttribute`s, which know what would have to change. What a forward computes
or decides by other than their multiples (`self.conv.out_channels ** -0.5`) is noted, where Python asks the
number itself; see `elastic.widths.computed` for the rest.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from torch import fx, nn

# Of torch's own layers only these count channels: those on which their tensors have these roles.
STOCK = {
    **dict.fromkeys(("in_channels", "in_features"), ("in", "depthwise")),
    **dict.fromkeys(("out_channels", "out_features"), ("out", "depthwise")),
    **dict.fromkeys(("num_features", "num_channels", "num_parameters"), ("per_channel", "depthwise")),
    **dict.fromkeys(("groups", "num_groups"), ("depthwise",)),
    "normalized_shape": ("per_channel",),
}


class AttributePlace(NamedTuple):
    """Say which number of which attribute: `number` counts within a tuple or a list."""

    module: str
    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.module}.{self.name}".lstrip(".")


class SizeAttribute(int):
    """Be a whole number that is `factor` times an attribute of a module.

    A product of two is a multiple of either, as long as the other one stays: `others` are these views of it.
    """

    place: AttributePlace
    factor: Fraction
    others: tuple["SizeAttribute", ...]

    def __new__(
        cls,
        value: int,
        place: AttributePlace,
        factor: Fraction = Fraction(1),
        others: tuple["SizeAttribute", ...] = (),
    ) -> "SizeAttribute":
        self = super().__new__(cls, int.__int__(value))
        self.place, self.factor, self.others = place, factor, others
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (int.__int__(self), self.place, self.factor, self.others)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, fx.Proxy):  # the node has the attribute
            return other.tracer.create_proxy("call_function", operator.mul, (self, other), {})
        if not _is_scale(other):
            return _note(operator.mul)(self, other)
        scaled = self._scale(Fraction(int.__int__(other)))
        if not isinstance(other, SizeAttribute):
            return scaled
        last = other._scale(Fraction(int.__int__(self)))  # which of `heads * size` counts channels
        others = (*last.others, SizeAttribute(scaled, scaled.place, scaled.factor), *scaled.others)
        return SizeAttribute(last, last.place, last.factor, others)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        if not _is_scale(other) or int.__mod__(self, other):
            return _note(operator.floordiv)(self, other)
        return self._scale(Fraction(1, int.__int__(other)))

    def _scale(self, factor: Fraction) -> "SizeAttribute":
        value = int.__int__(self) * factor
        others = tuple(other._scale(factor) for other in self.others)
        return SizeAttribute(int(value), self.place, self.factor * factor, others)


_NOTED: list[set[AttributePlace]] = []  # by the traces that are under way, the innermost last


def _note(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Note the attributes that an operation is given, which makes a number of them that follows none."""

    def compute(*numbers: Any) -> Any:
        if _NOTED:
            sizes = (number for number in numbers if isinstance(number, SizeAttribute))
            _NOTED[-1].update(view.place for size in sizes for view in (size, *size.others))
        return operation(*(int.__int__(n) if isinstance(n, SizeAttribute) else n for n in numbers))

    return compute


def _compare(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let a traced number do the comparison, whose node then has the attribute."""
    compare = _note(operation)
    return lambda self, other: operation(other, self) if isinstance(other, fx.Proxy) else compare(self, other)


def _reverse(operation: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: operation(other, self)


_TWO_SIDED = {name: getattr(operator, name) for name in ("add", "sub", "truediv", "mod", "pow")}
_TWO_SIDED |= {name: getattr(operator, name) for name in ("xor", "lshift", "rshift")}
_TWO_SIDED |= {"and": operator.and_, "or": operator.or_, "divmod": divmod}
_ONE_SIDED = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "neg", "pos", "invert")}
_ONE_SIDED |= {"abs": abs, "round": round, "trunc": math.trunc, "floor": math.floor, "ceil": math.ceil}
for _name, _operation in _TWO_SIDED.items():
    setattr(SizeAttribute, f"__{_name}__", _note(_operation))
    setattr(SizeAttribute, f"__r{_name}__", _note(_reverse(_operation)))
for _name, _operation in _ONE_SIDED.items():
    setattr(SizeAttribute, f"__{_name}__", _note(_operation))
for _name in ("eq", "ne"):
    setattr(SizeAttribute, f"__{_name}__", _compare(getattr(operator, _name)))
SizeAttribute.__rfloordiv__ = _note(_reverse(operator.floordiv))  # type: ignore[method-assign]
SizeAttribute.__float__ = _note(float)  # type: ignore[method-assign]
SizeAttribute.__int__ = _note(int)  # type: ignore[method-assign]
SizeAttribute.__hash__ = int.__hash__  # type: ignore[method-assign]


@contextmanager
def note_computed_sizes() -> Iterator[set[AttributePlace]]:
    """Note the attributes that are computed with, other than by multiples."""
    _NOTED.append(noted := set[AttributePlace]())
    try:
        yield noted
    finally:
        _NOTED.pop()


def _is_scale(other: Any) -> bool:
    # While a model is traced, `isinstance` takes a traced number for an int.
    return issubclass(type(other), int) and not isinstance(other, bool) and int.__gt__(other, 0)


def is_stock(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own layers, or derives from one."""
    kinds = (kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn."))
    return next(kinds) is not nn.Module


@contextmanager
def tag_sizes(
    model: nn.Module, sizes: Mapping[AttributePlace, int] | None = None
) -> Iterator[set[AttributePlace]]:
    """Let the whole numbers that a model's modules hold know where they are from; give those that are read.

    Args:
        sizes: what some of them are instead, meanwhile.
    """
    before: list[tuple[dict[str, Any], str, Any]] = []
    tagged: dict[tuple[int, str], Any] = {}
    try:
        for path, module in model.named_modules():
            attributes, is_stock = vars(module), type(module).__module__.startswith("torch.nn.")
            for name in STOCK & attributes.keys() if is_stock else list(attributes):
                value = attributes[name]
                if _is_size(value):
                    before.append((attributes, name, value))
                    attributes[name] = tagged[id(module), name] = _tag(path, name, value, sizes or {})
        with _watch_reads(tagged) as read:
            yield read
    finally:
        for attributes, name, value in before:
            attributes[name] = value


@contextmanager
def _watch_reads(tagged: Mapping[tuple[int, str], Any]) -> Iterator[set[AttributePlace]]:
    """Note which attributes are read, by the identity of their module and their name."""
    read, names = set[AttributePlace](), {name for _, name in tagged}

    def get(module: nn.Module, name: str) -> Any:
        if name in names and (id(module), name) in tagged:
            value = tagged[id(module), name]
            numbers = value if isinstance(value, tuple | list) else (value,)
            read.update(number.place for number in numbers if isinstance(number, SizeAttribute))
        return super(nn.Module, module).__getattribute__(name)

    setattr(nn.Module, "__getattribute__", get)  # noqa: B010
    try:
        yield read
    finally:
        delattr(nn.Module, "__getattribute__")


def _is_size(value: Any) -> bool:
    if type(value) in (tuple, list):
        return len(value) > 0 and all(type(part) is int for part in value) and any(part > 1 for part in value)
    return type(value) is int and value > 1


def _tag(path: str, name: str, value: Any, sizes: Mapping[AttributePlace, int]) -> Any:
    if isinstance(value, int):
        place = AttributePlace(path, name, 0)
        return SizeAttribute(sizes.get(place, value), place)
    places = (AttributePlace(path, name, i) for i in range(len(value)))
    return type(value)(
        SizeAttribute(sizes.get(place, part), place) if part > 1 else part
        for place, part in zip(places, value, strict=True)
    )


def write_size(module: nn.Module, name: str, index: int, size: int) -> None:
    """Give an attribute, or one of its numbers, another value."""
    value = vars(module)[name]
    if isinstance(value, int):
        vars(module)[name] = size
    else:
        vars(module)[name] = type(value)([*value[:index], size, *value[index + 1 :]])
