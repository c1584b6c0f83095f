"""Kernel activation modules: kernels of a convolution that are switched on or off for each input.

A module looks at what a convolution reads and says which of its kernels this input needs (LKAM:
Theodorakopoulos et al., Parsimonious Inference on CNNs, arXiv 1701.05221, and Dynamic Pruning of CNN
Networks, IISA 2019). A kernel that is off leaves a map of zeros, which need not be read. Here the modules are
attached to any CNN, for training and as the reference; `elastic.skipping` executes what they leave.

The source's module is a 1×1 convolution, global average pooling, a sigmoid and a threshold of one half. The
first two are linear, so the maps are averaged first here: the same scores for height · width times less work.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from elastic.active import engaged
from elastic.errors import StructureError
from elastic.trace import BATCH_NORM, trace
from elastic.widths import Width, Widths

Choice = Literal["straight_through", "soft", "gumbel"]
MODULES = "kams"  # where a network holds them
START = 2.0  # σ(2) = 0.88: nearly open, or training would collapse before the kernels know anything

# What keeps zeros: maps that are off stay off on their way to what reads them.
KEEPS_ZERO: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh),
    *(nn.Hardswish, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d, nn.ZeroPad2d),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
KEEPS_ZERO_BY_NAME = set(
    """
    relu relu6 leaky_relu elu selu celu gelu silu mish tanh hardswish flatten view reshape dropout dropout2d
    max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d boolean_dispatch mean contiguous
    """.split()
)
ASKS_FOR_SHAPE = {"size", "getattr", "dim"}


@dataclass(frozen=True)
class Site:
    """The layers that a width's kernels are in: who computes them, who reads their maps, who follows each."""

    writer: str
    readers: tuple[str, ...]
    each: tuple[str, ...]  # depthwise convolutions


class Head(nn.Module):
    """Scores of kernels: linear in the means of the maps.

    The means are normalised over the batch, without parameters, or the scores would differ little from input
    to input and a module learn to engage the same kernels for all. In evaluation that is linear, too.
    """

    def __init__(self, reads: int, kernels: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(reads, affine=False), nn.Linear(reads, kernels)
        nn.init.constant_(self.linear.bias, START)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        score_BK: Tensor = self.linear(self.norm(x_BCHW.mean((2, 3))))
        return score_BK

    @torch.no_grad()
    def folded(self) -> tuple[Tensor, Tensor]:
        """weight_KC and bias_K of the same scores, from the means as they are."""
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        weight_KC = self.linear.weight / (self.norm.running_var + self.norm.eps).sqrt()
        return weight_KC, self.linear.bias - weight_KC @ self.norm.running_mean


class KernelActivation(nn.Module):
    """x_BCHW, what the convolution reads → gate_BK11, 1 for the kernels to be executed, else 0.

    Args:
        site: the layers that it concerns.
        reads, kernels: C and K.
        sets: how many sets of weights it has, trained with different gains; `chosen` says which one rules.
        choice: how it learns. "straight_through": 0 or 1 forward, the sigmoid's gradient backward.
            "soft": the sigmoid of score / `temperature`, to be annealed. "gumbel": 0 or 1 of the score plus
            logistic noise (the control; Jang et al., arXiv 1611.01144). In evaluation it is always 0 or 1,
            and the strongest kernel is never off.

    Attributes:
        gate_BK: what it last said, for the loss.
    """

    kind = "input"  # what it looks at

    def __init__(
        self, site: Site, reads: int, kernels: int, sets: int = 1, choice: Choice = "straight_through"
    ) -> None:
        super().__init__()
        if choice not in get_args(Choice):
            raise StructureError(
                f"kernels cannot be chosen by '{choice}': use one of {', '.join(get_args(Choice))}"
            )
        if sets < 1:
            raise StructureError(f"{sets} sets of modules: there must be 1 or more")
        self.site, self.choice, self.temperature, self.chosen = site, choice, 1.0, 0
        self.heads = nn.ModuleList(Head(reads, kernels) for _ in range(sets))
        self.gate_BK = torch.ones(0, kernels)

    def scores(self, x_BCHW: Tensor) -> Tensor:
        score_BK: Tensor = self.heads[self.chosen](x_BCHW)
        return score_BK

    def forward(self, x_BCHW: Tensor) -> Tensor:
        score_BK = self.scores(x_BCHW)
        self.gate_BK = self._learn(score_BK) if self.training else engaged(score_BK)
        return self.gate_BK[:, :, None, None]

    def _learn(self, score_BK: Tensor) -> Tensor:
        if self.choice == "soft":
            return torch.sigmoid(score_BK / self.temperature)
        if self.choice == "gumbel":
            even_BK = torch.rand_like(score_BK).clamp(1e-6, 1 - 1e-6)
            score_BK = score_BK + torch.logit(even_BK)
        soft_BK = torch.sigmoid(score_BK)
        return engaged(score_BK.detach()) + soft_BK - soft_BK.detach()


class ConstantActivation(KernelActivation):
    """A control: it sees nothing, so that it engages the same kernels for every input."""

    kind = "constant"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for head in self.heads:
            assert isinstance(head, Head)
            nn.init.zeros_(head.linear.weight).requires_grad_(False)


class RandomActivation(ConstantActivation):
    """A control: each kernel is on as often as its sigmoid says, whatever the input is."""

    kind = "random"

    def forward(self, x_BCHW: Tensor) -> Tensor:
        score_BK = self.scores(x_BCHW)
        noise_BK = torch.logit(torch.rand_like(score_BK).clamp(1e-6, 1 - 1e-6))
        self.gate_BK = self._learn(score_BK) if self.training else engaged(score_BK + noise_BK)
        return self.gate_BK[:, :, None, None]


KINDS = {made.kind: made for made in (KernelActivation, ConstantActivation, RandomActivation)}


def attach(
    net: nn.Module,
    widths: Widths,
    names: Iterable[str] | None = None,
    sets: int = 1,
    choice: Choice = "straight_through",
    kind: str = "input",
) -> fx.GraphModule:
    """The network with a kernel activation module for each width; its layers are shared, under their names.

    Args:
        names: the widths whose kernels are switched; by default all that can be.
        kind: what the modules look at: the "input", or as controls nothing ("constant", "random").

    Raises:
        StructureError: the kernels of a width asked for cannot be switched, or of none can.
    """
    if kind not in KINDS:
        raise StructureError(f"modules cannot look at '{kind}': set kind to {', '.join(KINDS)}")
    traced = trace(net)
    found = {name: _site(traced, widths[name]) for name in (widths if names is None else names)}
    refused = {name: site for name, site in found.items() if isinstance(site, str)}
    if refused and (names is not None or len(refused) == len(found)):
        name, why = next(iter(refused.items()))
        raise StructureError(f"the kernels of '{name}' cannot be switched off: {why}")
    traced.add_submodule(MODULES, nn.ModuleDict())
    for site in (site for site in found.values() if isinstance(site, Site)):
        conv = traced.get_submodule(site.writer)
        assert isinstance(conv, nn.Conv2d)
        module = KINDS[kind](site, conv.in_channels, conv.out_channels, sets, choice)
        path = f"{MODULES}.{site.writer.replace('.', '/')}"
        traced.add_submodule(path, module.to(conv.weight.device))
        _insert(traced, site, path)
    traced.graph.lint()
    traced.recompile()
    return traced


def modules(net: nn.Module) -> Iterator[KernelActivation]:
    return (module for module in net.modules() if isinstance(module, KernelActivation))


def choose(net: nn.Module, chosen: int) -> None:
    """Let one of the sets of modules rule, from the next input on.

    Raises:
        StructureError: there is no such set, or there are no modules.
    """
    found = list(modules(net))
    sets = min((len(module.heads) for module in found), default=0)
    if not 0 <= chosen < sets:
        has = f"0 … {sets - 1}" if sets else "none"
        raise StructureError(f"there is no set {chosen} of kernel activation modules: the network has {has}")
    for module in found:
        module.chosen = chosen


# --- where modules go -----------------------------------------------------------------------------


def _calls(traced: fx.GraphModule, path: str) -> list[fx.Node]:
    return [node for node in traced.graph.nodes if node.op == "call_module" and node.target == path]


def _normed(traced: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The batch norm that alone reads a layer, or the layer."""
    after = next(iter(node.users), None)
    alone = len(node.users) == 1 and after is not None and after.op == "call_module"
    return after if alone and isinstance(_layer(traced, after), BATCH_NORM) else node  # type: ignore[return-value, arg-type]


def _layer(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def keeps_zero(traced: fx.GraphModule, node: fx.Node) -> bool:
    layer = _layer(traced, node)
    if layer is not None:
        return isinstance(layer, KEEPS_ZERO)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.strip("_") in KEEPS_ZERO_BY_NAME


def _site(traced: fx.GraphModule, width: Width) -> Site | str:
    """Where a width's kernels are, or why they cannot be switched."""
    writers = {slot.module for slot in width.role("out")}
    if len(writers) != 1:
        return f"its maps are sums, {' and '.join(sorted(writers)[:2])} write them"
    if width.mixed is not None:
        return width.mixed
    (writer,) = writers
    layer: nn.Module | None = traced.get_submodule(writer)
    calls = _calls(traced, writer)
    assert layer is not None
    if type(layer) is not nn.Conv2d or layer.groups > 1:
        return f"{writer} ({type(layer).__name__}) is no ordinary convolution"
    if len(calls) != 1:
        return f"{writer} is used {len(calls)} times"
    if width.size != layer.out_channels:
        return f"it is a part of the channels of {writer}"
    each: list[str] = []
    readers: list[str] = []
    waiting = [_normed(traced, calls[0])]
    while waiting:
        for user in waiting.pop().users:
            path, layer = str(user.target), _layer(traced, user)
            if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1:
                each.append(path)
                waiting.append(_normed(traced, user))
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                readers.append(path)
            elif keeps_zero(traced, user):
                waiting.append(user)
            elif getattr(user.target, "__name__", user.target) not in ASKS_FOR_SHAPE:
                return f"{user.name} does more with its maps than to read them"
    return Site(writer, tuple(dict.fromkeys(readers)), tuple(each))


def _insert(traced: fx.GraphModule, site: Site, path: str) -> None:
    """Say which kernels are on before the convolution, and shut the others' maps behind it and its norm."""
    (conv,) = _calls(traced, site.writer)
    with traced.graph.inserting_before(conv):
        gate = traced.graph.call_module(path, (conv.args[0],))
    for layer in (site.writer, *site.each):
        (call,) = _calls(traced, layer)
        end = _normed(traced, call)
        with traced.graph.inserting_after(end):
            shut = traced.graph.call_function(torch.mul, (end, gate))
        for user in [user for user in end.users if user is not shut]:
            user.replace_input_with(end, shut)
