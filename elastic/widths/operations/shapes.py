"""Follow channels where dimensions change places, come, or go."""

from torch import fx, nn

from elastic.widths.operations.interface import (
    Axes,
    Tracker,
    get_argument,
    get_axes,
    get_input,
    get_shape,
    list_arguments,
    normalize_dims,
)


def permute(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a permutation of all dimensions."""
    x = get_axes(get_input(node))
    order = list_arguments(node, 1, "dims")
    return tuple(x[d] for d in order)


def transpose(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow two dimensions that change places."""
    x = list(get_axes(get_input(node)))
    first, second = get_argument(node, 1, "dim0", "axis0"), get_argument(node, 2, "dim1", "axis1")
    x[first], x[second] = x[second], x[first]
    return tuple(x)


def squeeze(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow dimensions of size 1 that go: a width of one channel would go with them, for good."""
    source, dims = get_input(node), get_argument(node, 1, "dim", "axis")
    x, shape = get_axes(source), get_shape(source)
    dropped = [d for d in normalize_dims(dims, len(x)) if shape[d] == 1]
    # Without a dimension it would drop any axis, were it of one channel.
    tracker.fix(x if dims is None else [x[d] for d in dropped], node, "drops a dimension of one channel")
    return tuple(axis for d, axis in enumerate(x) if d not in dropped)


def unsqueeze(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow a dimension that comes."""
    x = list(get_axes(get_input(node)))
    x.insert(get_argument(node, 1, "dim") % (len(x) + 1), None)
    return tuple(x)


def reduce(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow mean, sum, amax and their like: over space they leave channels alone, else they mix them."""
    x = get_axes(get_input(node))
    over = normalize_dims(get_argument(node, 1, "dim", "axis"), len(x))
    tracker.mix([x[d] for d in over], node, "takes statistics over its channels")
    if len(get_shape(node)) == len(x):
        return tuple(None if d in over else axis for d, axis in enumerate(x))
    return tuple(axis for d, axis in enumerate(x) if d not in over)


def mix_dimension(tracker: Tracker, node: fx.Node) -> Axes:
    """Follow softmax and its like: they mix one dimension."""
    x = get_axes(get_input(node))
    if node.op == "call_module":
        dim = getattr(
            tracker.get_layer(node, nn.Module), "dim", -3
        )  # Softmax2d has none: channels before space
    else:
        dim = get_argument(node, 1, "dim")
    tracker.fix(x if dim is None else [x[dim]], node, "mixes channels")
    return x
