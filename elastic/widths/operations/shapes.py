"""Follow channels where dimensions change places, come, or go."""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from elastic.widths.operations.interface import (
    Axes,
    NotFollowed,
    Tracked,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_operation_name,
    get_shape,
    get_value,
    list_arguments,
    list_axes,
    normalize_dims,
)

ORDER = "depends on the order of its channels"


def permute(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a permutation of all dimensions."""
    x = get_axes(get_input(node))
    order = list_arguments(node, 1, "dims")
    return tuple(x[int(get_value(d))] for d in order)


def transpose(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow two dimensions that change places."""
    x = list(get_axes(get_input(node)))
    first, second = get_argument(node, 1, "dim0", "axis0"), get_argument(node, 2, "dim1", "axis1")
    x[first], x[second] = x[second], x[first]
    return tuple(x)


def transpose_last(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `t()`, which only two dimensions have, and `mT`."""
    x = get_axes(get_input(node))
    return (*x[:-2], *reversed(x[-2:]))


def read_attribute(tracker: Tracker, node: fx.Node) -> Tracked:
    """Follow `x.mT`, `x.T` of two dimensions, `x.data`, `x.real`, and one of several results (`values`)."""
    source, name = get_input(node), get_argument(node, 1)
    results = get_value(source)
    if isinstance(results, tuple):
        tracked: Any = source.meta["axes"]
        tracker.drop(list_axes(tracked))  # what is not picked is not read here
        places = [place for place, part in enumerate(results) if part is getattr(results, name)]
        return tracked[places[0]] if tracked and places else None
    if name in ("data", "real", "imag"):
        return get_axes(source)
    if name != "mT" and (name != "T" or len(get_shape(node)) != 2):
        raise NotFollowed("is none that is known")
    return transpose_last(tracker, node)


def split_complex(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `view_as_real`: both parts lie in a last dimension of their own."""
    return (*get_axes(get_input(node)), None)


def join_complex(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow `view_as_complex`: the last dimension holds both parts."""
    *x, last = get_axes(get_input(node))
    tracker.fix([last], node, "joins channels to complex numbers")
    return tuple(x)


def accumulate(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow sums along a dimension, where each entry depends on those before it."""
    x = get_axes(get_input(node))
    tracker.fix([x[get_argument(node, 1, "dim")]], node, ORDER)
    return x


def cut_triangle(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow tril and triu, which leave zeros on one side of the diagonal of the last two dimensions."""
    x = get_axes(get_input(node))
    tracker.fix(x[-2:], node, ORDER)
    return x


def normalize_neighbours(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow local response norm: each channel is divided by what those beside it hold."""
    x = get_axes(get_input(node))
    tracker.fix([x[1]], node, ORDER)
    return x


def squeeze(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow dimensions of size 1 that go: a width of one channel would go with them, for good."""
    source, dims = get_input(node), get_argument(node, 1, "dim")
    x, shape = get_axes(source), get_shape(source)
    unit_dims = [d for d in normalize_dims(dims, len(x)) if shape[d] == 1]
    # Without a dimension it would drop any axis, were it of one channel.
    tracker.fix(x if dims is None else [x[d] for d in unit_dims], node, "drops a dimension of one channel")
    return tuple(axis for d, axis in enumerate(x) if d not in unit_dims)


def unsqueeze(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a dimension that comes."""
    x = list(get_axes(get_input(node)))
    x.insert(get_argument(node, 1, "dim") % (len(x) + 1), None)
    return tuple(x)


def reduce(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow mean, sum, amax and their like: over space they leave channels alone, else they mix them."""
    return reduce_over(tracker, node, get_axes(get_input(node)), get_argument(node, 1, "dim"))


def reduce_over(
    tracker: Tracker, node: fx.Node, x: Axes, dims: int | Sequence[int] | None, ndim: int | None = None
) -> Axes:
    """Follow statistics over given dimensions; `ndim` is that of the results, where they are several."""
    over = normalize_dims(dims, len(x))
    tracker.mix([x[d] for d in over], node, "takes statistics over its channels")
    if (len(get_shape(node)) if ndim is None else ndim) == len(x):
        return tuple(None if d in over else axis for d, axis in enumerate(x))
    return tuple(axis for d, axis in enumerate(x) if d not in over)


def mix_dimension(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow softmax and its like: they take statistics over one dimension."""
    x = get_axes(get_input(node))
    if node.op == "call_module":
        dim = getattr(
            tracker.get_layer(node, nn.Module), "dim", -3
        )  # Softmax2d has none: channels before space
    else:
        dim = get_argument(node, 1, "dim")
    if dim is None:
        tracker.fix(x, node, "mixes channels")
    else:
        tracker.mix([x[dim]], node, "normalises over its channels")
    return x


def move_dimensions(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow movedim: dimensions go to other places, the others keep their order."""
    x = get_axes(get_input(node))
    source, target = get_argument(node, 1, "source"), get_argument(node, 2, "destination")
    pairs = dict(zip(normalize_dims(target, len(x)), normalize_dims(source, len(x)), strict=True))
    others = iter(d for d in range(len(x)) if d not in pairs.values())
    return tuple(x[pairs[d] if d in pairs else next(others)] for d in range(len(x)))


def measure_norm(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow vector norms: over space they leave channels alone, else they mix them."""
    return reduce_over(tracker, node, get_axes(get_input(node)), get_argument(node, 2, "dim"))


def normalize(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow division by a vector's norm."""
    x = get_axes(get_input(node))
    dim = get_argument(node, 2, "dim", default=1)
    tracker.mix([x[d] for d in normalize_dims(dim, len(x))], node, "normalises over its channels")
    return x


def bound_norms(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow renorm, which bounds the norm of each slice along a dimension."""
    x = get_axes(get_input(node))
    dim = get_argument(node, 2, "dim") % len(x)
    tracker.mix([axis for d, axis in enumerate(x) if d != dim], node, "bounds a norm over its channels")
    return x


def reduce_twice(tracker: Tracker, node: fx.Node) -> tuple[Axes, Axes]:
    """Follow var_mean and its like, which give two results."""
    x, ndim = get_axes(get_input(node)), len(get_value(node)[0].shape)
    axes = reduce_over(tracker, node, x, get_argument(node, 1, "dim"), ndim)
    return axes, axes


def reorder(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow flip and roll: they change the order along dimensions, which may not be that of channels."""
    x = get_axes(get_input(node))
    last = "flip" not in get_operation_name(node)
    dims = get_argument(node, 1 + last, "dims")
    if not last and not isinstance(dims, tuple | list):
        dims = list_arguments(node, 1, "dims")
    tracker.fix([x[d] for d in normalize_dims(dims, len(x))], node, "changes the order of its channels")
    return x
