"""A network whose layers are told, one by one, which channels of what they read are active.

Convolutions take the addition and the ReLU behind them.
"""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import ASKS_FOR_SHAPE, keeps_zero
from elastic.dynamic.modules import KernelActivation, RandomActivation, iterate_modules
from elastic.dynamic.skipping.active import Active, ActiveConv2d, activate_kernels, max_pool
from elastic.dynamic.skipping.inference import prepare_for_inference
from elastic.dynamic.skipping.native import compiled, interrupt
from elastic.errors import StructureError
from elastic.widths.tracing import get_layer, get_operation_name

ADD = (operator.add, torch.add)
IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
RESHAPING = {"flatten", "view", "reshape"}  # what keeps zeros, but not the places of channels


class ActiveSwitch(nn.Module):
    """A kernel activation module at inference: maps and the active ones among them → the kernels engaged.

    Its set of weights is looked up for each input, so that another one may be chosen between requests.
    """

    def __init__(self, module: KernelActivation) -> None:
        super().__init__()
        self.module = module
        self.folded = [head.folded() for head in module.heads]  # type: ignore[operator]

    def forward(self, x_BCHW: Tensor, reads: Active | None = None) -> Active:
        if isinstance(self.module, RandomActivation):
            interrupt()  # what it draws is drawn anew each time
            x_BCHW = x_BCHW if reads is None else reads.shut(x_BCHW)
            return Active.of(self.module(x_BCHW).flatten(1))
        weight_KC, bias_K, within_2C = self.folded[self.module.active_set]
        return activate_kernels(x_BCHW, reads, weight_KC, bias_K, within_2C, self.module.choice)


class ActiveMaxPool2d(nn.Module):
    def __init__(self, size: int, stride: int) -> None:
        super().__init__()
        self.size, self.stride, self.zeros = size, stride, True

    def forward(self, x_BCHW: Tensor, reads: Active) -> Tensor:
        return max_pool(x_BCHW, reads, self.size, self.stride, self.zeros)


def scale(x_BCHW: Tensor, active: Active) -> Tensor:
    """Maps times their gates."""
    return active.scale(x_BCHW)


def rewrite(net: nn.Module, way: str | None = None) -> fx.GraphModule:
    """A network that is told, layer by layer, which channels are active.

    Raises:
        StructureError: it is not in fp32 on the CPU, or it only contains a network with modules.
    """
    _check(net)
    traced = prepare_for_inference(net)
    best = way or ("stock" if compiled() is None else "kernel")
    return _Rewriter(traced, best).run()


def _check(net: nn.Module) -> None:
    if any(iterate_modules(net)) and not isinstance(net, fx.GraphModule):
        raise StructureError(
            f"{type(net).__name__} only contains a network with kernel activation modules: give that itself"
        )
    for parameter in net.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise StructureError(
                f"kernels are skipped in fp32 on the CPU, not in {parameter.dtype} on {parameter.device}: "
                "convert the network with .float().cpu()"
            )


class _Rewriter:
    """Replaces what a traced network calls by what knows which channels are active."""

    def __init__(self, traced: fx.GraphModule, way: str) -> None:
        self.traced, self.graph, self.way = traced, traced.graph, way
        self.active: dict[fx.Node, fx.Node] = {}  # a tensor's node -> that of its active channels
        self.gone: set[fx.Node] = set()
        self.count = 0

    def run(self) -> fx.GraphModule:
        for node in list(self.graph.nodes):
            if node in self.gone:
                continue
            layer = self._layer(node)
            if isinstance(layer, KernelActivation):
                self._replace([node], ActiveSwitch(layer), (node.args[0], self._reads(node)))
            elif isinstance(layer, nn.Conv2d) and node.args and ActiveConv2d.takes(layer):
                self._convolution(node, layer)
            elif isinstance(layer, nn.MaxPool2d) and _plain(layer) and self._reads(node) is not None:
                pool = ActiveMaxPool2d(_one(layer.kernel_size), _one(layer.stride))
                self._replace([node], pool, (node.args[0], self._reads(node)), self._reads(node))
            elif self._shuts(node):
                node.target, gate = scale, node.args[1]
                self.active[node] = gate
            elif keeps_zero(self.traced, node) and not self._reshapes(node) and self._reads(node):
                self.active[node] = self._reads(node)  # type: ignore[assignment]
        self._leave_what_nobody_reads()
        self.traced.delete_all_unused_submodules()
        self.graph.lint()
        self.traced.recompile()
        return self.traced

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return get_layer(self.traced, node)

    def _reads(self, node: fx.Node) -> fx.Node | None:
        read = node.args[0] if node.args else None
        return self.active.get(read) if isinstance(read, fx.Node) else None

    def _shuts(self, node: fx.Node) -> bool:
        gate = node.args[1] if node.target is torch.mul and len(node.args) == 2 else None
        return isinstance(gate, fx.Node) and isinstance(self._layer(gate), ActiveSwitch)

    def _reshapes(self, node: fx.Node) -> bool:
        return isinstance(self._layer(node), nn.Flatten) or get_operation_name(node) in RESHAPING

    def _replace(
        self, chain: list[fx.Node], made: nn.Module, args: tuple[Any, ...], active: fx.Node | None = None
    ) -> None:
        """Call `made` in the place of nodes of which each alone reads the one before."""
        name, self.count = f"active{self.count}", self.count + 1
        self.traced.add_submodule(name, made)
        with self.graph.inserting_before(chain[-1]):
            node = self.graph.call_module(name, args)
        chain[-1].replace_all_uses_with(node)
        for old in reversed(chain):
            self.graph.erase_node(old)
        self.gone.update(chain)
        if active is not None:
            self.active[node] = active

    def _convolution(self, node: fx.Node, conv: nn.Conv2d) -> None:
        chain, writes, residual, relu = [node], None, None, False
        user = self._next(chain)
        if user is not None and self._shuts(user) and user.args[0] is node:
            chain, writes = [*chain, user], user.args[1]
        user = self._next(chain)
        if user is not None and writes is None and (other := _added(user, node)) is not None:
            chain, residual = [*chain, user], other
        user = self._next(chain)
        if user is not None and _is_relu(self._layer(user), user):
            chain, relu = [*chain, user], True
        made = ActiveConv2d(conv, relu, True, self.way)
        args = (node.args[0], self._reads(node), writes, residual)
        self._replace(chain, made, args, writes)  # type: ignore[arg-type]

    def _next(self, chain: list[fx.Node]) -> fx.Node | None:
        """Who alone reads what a chain ends with, if all of it may be carried out as late as that."""
        if len(chain[-1].users) != 1:
            return None
        (user,) = chain[-1].users
        between = chain[0].next
        while between is not user:
            if between not in chain and _in_place(self._layer(between), between):
                return None  # it might change what the chain reads
            between = between.next
        return user

    def _leave_what_nobody_reads(self) -> None:
        """Maps that are not active have to be zeros only where something reads them that does not know."""
        for node in reversed(list(self.graph.nodes)):
            layer = self._layer(node)
            if isinstance(layer, ActiveConv2d | ActiveMaxPool2d):
                layer.zeros = not all(self._knows(user, node) for user in node.users)

    def _knows(self, user: fx.Node, node: fx.Node) -> bool:
        layer = self._layer(user)
        known = isinstance(layer, ActiveConv2d | ActiveMaxPool2d | ActiveSwitch)
        return known and node in self.active and user.args[:2] == (node, self.active[node])


def _added(user: fx.Node, node: fx.Node) -> fx.Node | None:
    """What else is added, where a node is the sum of two tensors."""
    adds = user.target in ADD or (user.target is operator.iadd and user.args[0] is node)
    if user.op == "call_function" and adds and len(user.args) == 2 and not user.kwargs:
        others = [arg for arg in user.args if arg is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node) and not _counts(others[0]):
            return others[0]
    return None


def _counts(node: fx.Node) -> bool:
    """Whether a node is a number, made of a tensor's shape."""
    made_of = node.all_input_nodes
    made = node.op == "call_function" and bool(made_of) and all(map(_counts, made_of))
    return made or get_operation_name(node) in ASKS_FOR_SHAPE


def _is_relu(layer: nn.Module | None, node: fx.Node) -> bool:
    return type(layer) is nn.ReLU or (layer is None and get_operation_name(node).strip("_") == "relu")


def _in_place(layer: nn.Module | None, node: fx.Node) -> bool:
    """Whether a node may change what it reads: by its layer, its name (`relu_`, `iadd`), a flag or `out`."""
    if layer is not None:
        return bool(getattr(layer, "inplace", False))
    flags = any(value is True for value in (*node.args, *node.kwargs.values()))
    return node.target in IN_PLACE or get_operation_name(node).endswith("_") or flags or "out" in node.kwargs


def _plain(pool: nn.MaxPool2d) -> bool:
    sizes = (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    square = all(isinstance(value, int) or len(set(value)) == 1 for value in sizes)
    simple = _one(pool.padding) == 0 and _one(pool.dilation) == 1
    return square and simple and not pool.ceil_mode


def _one(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])
