"""How each operation carries channel axes from its inputs to its output.

A value's *axes* are one entry a dimension: an `Axis` where the dimension holds channels that may change,
`None` where it does not (batch, space, the model's input). A rule takes the `Tracker` and the traced
node and returns the output's axes; an operation without a rule fixes all that it reads, by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from elastic.widths.union import Axis

Axes = tuple[Axis | None, ...]
LAYER = ""  # in place of a tensor's name: what the layer's own attributes say
Rule = Callable[[Any, fx.Node], Any]  # the Any is elastic.widths.Tracker, which imports this file


def axes(arg: Any) -> Axes:
    return arg.meta["axes"] if isinstance(arg, fx.Node) and arg.meta.get("axes") is not None else ()


def value(arg: Any) -> Any:
    return arg.meta["value"] if isinstance(arg, fx.Node) else arg


def tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if n.meta.get("axes") is not None]


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def dims(arg: Any, ndim: int) -> list[int]:
    given = range(ndim) if arg is None else (arg,) if isinstance(arg, int) else arg
    return [d % ndim for d in given]


# --- layers ---------------------------------------------------------------------------------------


def convolution(t: Any, node: fx.Node) -> Axes:
    module, name, x = t.layer(node), str(node.target), axes(node.args[0])
    channel = len(x) - module.weight.dim() + 1
    read, groups = x[channel], module.groups
    depthwise = groups > 1 and groups == module.in_channels
    written = t.new(name, "weight", "depthwise" if depthwise else "out")
    t.slot(name, "bias", 0, "per_channel", written)
    if depthwise:
        t.meet(written, None if read is None else np.repeat(read, len(written) // groups), node)
    else:
        if groups > 1:
            t.elements.tie(written, groups)
            read = None if read is None else t.elements.tie(read, groups)
        t.slot(name, "weight", 1, "in", read)
    return (*x[:channel], written, *(None for _ in x[channel + 1 :]))


def linear(t: Any, node: fx.Node) -> Axes:
    name, x = str(node.target), axes(node.args[0])
    written = t.new(name, "weight", "out")
    t.slot(name, "bias", 0, "per_channel", written)
    t.slot(name, "weight", 1, "in", x[-1])
    return (*x[:-1], written)


def per_channel(layer: nn.Module) -> list[str]:
    """The tensors of a norm, or the norm itself where it has none."""
    names = ("weight", "bias", "running_mean", "running_var")
    return [name for name in names if getattr(layer, name, None) is not None] or [LAYER]


def channel_norm(t: Any, node: fx.Node) -> Axes:
    """Batch and instance norm, and PReLU: one scalar (of each kind) a channel."""
    x = axes(node.args[0])
    if not isinstance(t.layer(node), nn.PReLU) or t.layer(node).num_parameters > 1:
        for tensor in per_channel(t.layer(node)):
            t.slot(str(node.target), tensor, 0, "per_channel", x[1])
    return x


def group_norm(t: Any, node: fx.Node) -> Axes:
    module, x = t.layer(node), axes(node.args[0])
    each = module.num_groups == module.num_channels > 1
    if x[1] is not None and not each:
        t.elements.tie(x[1], module.num_groups)
        t.elements.mix(x[1], f"{node.target} (GroupNorm) normalises over its channels")
    for tensor in per_channel(module):
        t.slot(str(node.target), tensor, 0, "depthwise" if each else "per_channel", x[1])
    return x


def layer_norm(t: Any, node: fx.Node) -> Axes:
    x, over = axes(node.args[0]), len(t.layer(node).normalized_shape)
    for i, axis in enumerate(x[-over:]):
        t.elements.mix(axis, f"{node.target} (LayerNorm) normalises over its channels")
        for tensor in per_channel(t.layer(node)):
            t.slot(str(node.target), tensor, i, "per_channel", axis)
    return x


# --- shapes ---------------------------------------------------------------------------------------


def reshape(t: Any, node: fx.Node) -> Axes:
    """view, reshape, flatten, unflatten: match groups of dimensions of equal product.

    A size written as a number fixes the channels it counts; a size computed from the tensor's own shape,
    or -1, follows them. One axis may be cut by constant factors (channel shuffle): the cuts are tied.
    """
    x, before, after = axes(node.args[0]), value(node.args[0]).shape, node.meta["value"].shape
    out: list[Axis | None] = []
    for old, new in match(before, after):
        group = [x[d] for d in old]
        if all(axis is None for axis in group):
            out += [None] * len(new)
            continue
        merged = merge(group, [before[d] for d in old])
        free = [d for d in new if t.follows(node, d) or after[d] == 1]
        long = [d for d in free if after[d] > 1] or free[: merged is not None and merged.size == 1]
        if merged is None or len(long) != 1:
            t.fix(node, group, "fixes the number of channels")
            out += [None] * len(new)
            continue
        cut = np.moveaxis(merged.reshape([after[d] for d in new]), new.index(long[0]), -1)
        axis = t.elements.tie(cut.reshape(-1), cut.size // after[long[0]])
        out += [axis if d == long[0] else None for d in new]
    return tuple(out)


def match(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pair runs of dimensions whose sizes multiply to the same number, shortest runs first."""
    pairs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old: list[int] = []
        new: list[int] = []
        a = b = 1
        while not (old and new and a == b):
            if j >= len(after) and i >= len(before):
                break
            if j >= len(after) or (i < len(before) and (not old or (new and a <= b))):
                old.append(i)
                a, i = a * before[i], i + 1
            else:
                new.append(j)
                b, j = b * after[j], j + 1
        if pairs and (not old or not new):  # trailing dimensions of size 1 belong to the last run
            pairs[-1] = (pairs[-1][0] + old, pairs[-1][1] + new)
        else:
            pairs.append((old, new))
    return pairs


def merge(group: Sequence[Axis | None], sizes: Sequence[int]) -> Axis | None:
    """The one axis of several dimensions flattened together, or None where two of them hold channels."""
    held = [d for d, axis in enumerate(group) if axis is not None]
    if len(held) != 1:
        return None
    axis = group[held[0]]
    shape = [1] * len(sizes)
    shape[held[0]] = -1
    assert axis is not None
    return np.broadcast_to(axis.reshape(shape), sizes).reshape(-1)


def permute(t: Any, node: fx.Node) -> Axes:
    x = axes(node.args[0])
    order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
    return tuple(x[d] for d in order)  # type: ignore[index]


def transpose(t: Any, node: fx.Node) -> Axes:
    x = list(axes(node.args[0]))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    x[a], x[b] = x[b], x[a]
    return tuple(x)


def squeeze(t: Any, node: fx.Node) -> Axes:
    x, shape = axes(node.args[0]), value(node.args[0]).shape
    gone = [d for d in dims(argument(node, 1, "dim"), len(x)) if shape[d] == 1]
    told = argument(node, 1, "dim") is not None
    t.fix(node, [x[d] for d in gone] if told else x, "drops a dimension of one channel")
    return tuple(axis for d, axis in enumerate(x) if d not in gone)


def unsqueeze(t: Any, node: fx.Node) -> Axes:
    x = list(axes(node.args[0]))
    x.insert(argument(node, 1, "dim") % (len(x) + 1), None)
    return tuple(x)


def reduce(t: Any, node: fx.Node) -> Axes:
    """mean, sum, amax, …: over space it leaves channels alone, over channels it fixes them."""
    x = axes(node.args[0])
    over = dims(argument(node, 1, "dim"), len(x))
    t.fix(node, [x[d] for d in over], "reduces over channels")
    if len(node.meta["value"].shape) == len(x):
        return tuple(None if d in over else axis for d, axis in enumerate(x))
    return tuple(axis for d, axis in enumerate(x) if d not in over)


def along_dim(t: Any, node: fx.Node) -> Axes:
    """softmax and its like: they mix one dimension."""
    x = axes(node.args[0])
    dim = getattr(t.layer(node), "dim", 1) if node.op == "call_module" else argument(node, 1, "dim")
    t.fix(node, x if dim is None else [x[dim]], "mixes channels")
    return x


def same(t: Any, node: fx.Node) -> Axes:
    """Pooling, padding, resizing: the first input's channels pass through."""
    x, before = axes(node.args[0]), value(node.args[0]).shape
    after = node.meta["value"].shape
    changed = [x[d] for d in range(len(x)) if before[d] != after[d]]
    t.fix(node, changed, "changes the number of channels")
    return tuple(None if before[d] != after[d] else axis for d, axis in enumerate(x))


# --- several tensors ------------------------------------------------------------------------------


def pointwise(t: Any, node: fx.Node) -> Axes:
    """Additions, multiplications, activations: broadcast dimensions meet."""
    shape = node.meta["value"].shape
    out: list[Axis | None] = [None] * len(shape)
    inputs = tensors(node)
    for d in range(1, len(shape) + 1):
        meeting = [(axes(n)[-d], value(n).shape[-d]) for n in inputs if len(axes(n)) >= d]
        full = [axis for axis, size in meeting if size == shape[-d] and (size > 1 or axis is not None)]
        t.fix(node, [axis for axis, size in meeting if size < shape[-d]], "broadcasts one channel over many")
        for axis in full[1:]:
            t.meet(full[0], axis, node)
        out[-d] = full[0] if full else None
    return tuple(out)


def concatenate(t: Any, node: fx.Node) -> Axes:
    parts: Any = node.args[0]
    dim = argument(node, 1, "dim", 0)
    out = list(axes(parts[0]))
    for d in range(len(out)):
        if d != dim % len(out):
            for part in parts[1:]:
                t.meet(out[d], axes(part)[d], node)
    ends = [axes(part)[dim] for part in parts]
    if all(axis is None for axis in ends):
        return tuple(out)
    whole = [
        t.constant(value(p).shape[dim], node) if a is None else a for p, a in zip(parts, ends, strict=True)
    ]
    out[dim] = np.concatenate(whole)
    return tuple(out)


def split(t: Any, node: fx.Node) -> tuple[Axes, ...]:
    """chunk and split: equal parts stay equal (they are tied); sizes written as numbers fix them."""
    x, dim = list(axes(node.args[0])), argument(node, 2, "dim", 0)
    sizes = [part.shape[dim] for part in node.meta["value"]]
    axis = x[dim]
    if axis is not None:
        counted = t.operation(node) == "split" and not isinstance(node.args[1], fx.Node)
        if counted or len(set(sizes)) > 1:
            t.fix(node, [axis], "fixes the number of channels")
        else:
            t.elements.tie(axis, len(sizes))
    ends = np.cumsum(sizes)
    return tuple(
        tuple(None if a is None else a[e - s : e] if d == dim % len(x) else a for d, a in enumerate(x))
        for s, e in zip(sizes, ends, strict=True)
    )


def getitem(t: Any, node: fx.Node) -> Any:
    held, index = axes(node.args[0]), node.args[1]
    if not isinstance(value(node.args[0]), Tensor):
        return held[index] if held and isinstance(index, int) else None
    items = list(index) if isinstance(index, tuple) else [index]
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(held) - len(items) + 1 + items.count(None))
    out: list[Axis | None] = []
    rest = list(held)
    for item in items:
        if item is None:
            out.append(None)
            continue
        axis = rest.pop(0)
        if isinstance(item, slice):
            out.append(part(t, node, axis, item))
        else:
            t.fix(node, [axis], "picks single channels")
    return (*out, *rest)


def part(t: Any, node: fx.Node, axis: Axis | None, item: slice) -> Axis | None:
    """One slice of a dimension: whole, or one of equal parts computed from the size, else fixed."""
    if axis is None or item == slice(None):
        return axis
    start, stop, step = (value(bound) for bound in (item.start, item.stop, item.step))
    taken = axis[start:stop:step]
    counted = any(isinstance(bound, int) and bound for bound in (item.start, item.stop))
    if counted or step not in (None, 1) or len(axis) % len(taken) or (start or 0) % len(taken):
        t.fix(node, [axis], "fixes the number of channels")
    else:
        t.elements.tie(axis, len(axis) // len(taken))
    return taken


def fixed(t: Any, node: fx.Node) -> Any:
    """Whatever has no rule: all that it reads keeps its size."""
    for n in tensors(node):
        t.fix(node, flat(n.meta["axes"]), "cannot be followed")
    out = node.meta["value"]
    return tuple(None for _ in out.shape) if isinstance(out, Tensor) else None


def flat(nested: Any) -> list[Axis]:
    if nested is None:
        return []
    return [nested] if isinstance(nested, np.ndarray) else [a for part in nested for a in flat(part)]


LAYERS: list[tuple[tuple[type, ...], Rule]] = [
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    ((nn.Linear,), linear),
    ((nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.PReLU), channel_norm),
    ((nn.GroupNorm,), group_norm),
    ((nn.LayerNorm,), layer_norm),
    ((nn.Flatten, nn.Unflatten), reshape),
    ((nn.Softmax, nn.LogSoftmax, nn.Softmax2d), along_dim),
    (
        (
            *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
            *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
            *(nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.Upsample),
        ),
        same,
    ),
    (
        (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
            *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.LogSigmoid),
            *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
        ),
        pointwise,
    ),
]

POINTWISE = """
    add sub mul truediv div iadd isub imul itruediv rsub neg pow sqrt rsqrt exp log abs square maximum minimum
    relu relu6 leaky_relu elu selu celu gelu silu mish sigmoid tanh hardtanh hardswish hardsigmoid softplus
    clamp clip dropout dropout1d dropout2d dropout3d feature_dropout contiguous clone detach to float half
    bfloat16 double type type_as expand_as stochastic_depth where lerp addcmul
""".split()
SAME = """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d boolean_dispatch interpolate pad
""".split()

FUNCTIONS: dict[str, Rule] = {
    **dict.fromkeys(POINTWISE, pointwise),
    **dict.fromkeys(SAME, same),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten"), reshape),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std"), reduce),
    **dict.fromkeys(("softmax", "log_softmax"), along_dim),
    **dict.fromkeys(("cat", "concat", "concatenate"), concatenate),
    **dict.fromkeys(("chunk", "split"), split),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), transpose),
    "permute": permute,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "getitem": getitem,
}


def rule_for(module: nn.Module | None, name: str) -> Rule:
    if module is None:
        return FUNCTIONS.get(name, fixed)
    return next((rule for types, rule in LAYERS if isinstance(module, types)), fixed)
