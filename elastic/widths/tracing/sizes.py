"""Know numbers that modules hold as attributes, wherever a traced forward gives them to an operation.

`torch.split(x, self.width, 1)` is given a number, and a graph would hold no more than that. While a model is
traced its whole numbers are `SizeAttribute`s, which know what would have to change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

# Of torch's own layers only these count channels.
STOCK = {"in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_groups"}
STOCK |= {"num_channels", "normalized_shape", "num_parameters"}


class AttributePlace(NamedTuple):
    """Say which number of which attribute: `number` counts within a tuple or a list."""

    module: str
    name: str
    number: int


class SizeAttribute(int):
    """Be a whole number that is `factor` times an attribute of a module."""

    place: AttributePlace
    factor: Fraction

    def __new__(cls, value: int, place: AttributePlace, factor: Fraction = Fraction(1)) -> "SizeAttribute":
        self = super().__new__(cls, value)
        self.place, self.factor = place, factor
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (int(self), self.place, self.factor)

    def __mul__(self, other: Any) -> Any:
        value = int(self) * other
        return SizeAttribute(value, self.place, self.factor * other) if _is_scale(other) else value

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        value = int(self) // other
        is_whole = _is_scale(other) and value * other == int(self)
        return SizeAttribute(value, self.place, self.factor / int(other)) if is_whole else value


def _is_scale(other: Any) -> bool:
    return isinstance(other, int) and not isinstance(other, bool) and other > 0


@contextmanager
def tag_sizes(model: nn.Module) -> Iterator[None]:
    """Let the whole numbers that a model's modules hold know where they are from."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            attributes, is_stock = vars(module), type(module).__module__.startswith("torch.nn.")
            for name, value in list(attributes.items()):
                if (not is_stock or name in STOCK) and _is_size(value):
                    before.append((attributes, name, value))
                    attributes[name] = _tag(path, name, value)
        yield
    finally:
        for attributes, name, value in before:
            attributes[name] = value


def _is_size(value: Any) -> bool:
    if type(value) in (tuple, list):
        return len(value) > 0 and all(type(part) is int for part in value) and any(part > 1 for part in value)
    return type(value) is int and value > 1


def _tag(path: str, name: str, value: Any) -> Any:
    if isinstance(value, int):
        return SizeAttribute(value, AttributePlace(path, name, 0))
    return type(value)(
        SizeAttribute(part, AttributePlace(path, name, i)) if part > 1 else part
        for i, part in enumerate(value)
    )


def write_size(module: nn.Module, name: str, index: int, size: int) -> None:
    """Give an attribute, or one of its numbers, another value."""
    value = vars(module)[name]
    if isinstance(value, int):
        vars(module)[name] = size
    else:
        vars(module)[name] = type(value)([*value[:index], size, *value[index + 1 :]])
