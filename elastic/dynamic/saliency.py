"""Measure what each kernel's map weighs in the layers that read it, and fit modules to that.

The saliency of a kernel for an input is the norm of its map times the norm of the weights that read it, in
parts of the mean over the layer's kernels. Modules that predict it choose well before anything has been
trained by its loss, and kernels that are off have a signal, too.

Shapes: B inputs of a batch, N of all, C maps that a convolution reads, K kernels.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import MODULES, measure_reading_weights
from elastic.dynamic.calls import find_calls
from elastic.dynamic.maps import average_maps, list_positions
from elastic.dynamic.modules import KernelActivation, iterate_modules
from elastic.dynamic.zeros import name_operation
from elastic.errors import OptionError
from elastic.widths.hooks import quiet_hooks
from elastic.widths.inputs import Example, list_inputs
from elastic.widths.leaves import list_tensors
from elastic.widths.mode import preserve_modes

STEEPNESS = 4.0  # of scores: so many for one mean saliency
MIN_ENTROPY = 1e-3  # nats, below which an input is not easier
RIDGE = 1e-3  # of the fit, in parts of the features' variance


class Saliency:
    """Measure the saliency of kernels in each call of a network with kernel activation modules.

    Maps are caught where they are whole, before gates cut them.

    Args:
        net: from `attach_modules`.
        contrast: how much of what an input's saliency differs by from the mean over inputs modules are
            taught; at 0 all inputs have one order of kernels.
        difficulty: the power of an input's difficulty that its saliency is multiplied by, see
            `weigh_inputs`; at 0 none engages more than others by it.
    """

    def __init__(self, net: fx.GraphModule, contrast: float = 1.0, difficulty: float = 0.0) -> None:
        self.net, self.contrast, self.difficulty = net, contrast, difficulty
        self.modules = list(iterate_modules(net))
        self._maps: dict[str, Tensor] = {}
        self._rectified: dict[str, bool] = {}
        self._hooks = [self._catch(module.site.writer) for module in self.modules]

    def _catch(self, writer: str) -> Any:
        (gate,) = find_calls(self.net, f"{MODULES}.{writer.replace('.', '/')}")
        gated = next(iter(gate.users))
        end = gated.args[0]
        assert isinstance(end, fx.Node)
        self._rectified[writer] = any(name_operation(self.net, user) == "relu" for user in gated.users)

        def keep(layer: nn.Module, inputs: Any, maps: Tensor) -> None:
            self._maps[writer] = maps.detach()

        return self.net.get_submodule(str(end.target)).register_forward_hook(keep)

    @torch.no_grad()
    def measure(self, module: KernelActivation) -> Tensor:
        """Measure saliency_BK of a module's kernels in the last call."""
        site = module.site
        maps = self._maps[site.writer].float()
        maps = maps.relu() if self._rectified[site.writer] else maps
        norm_BK = torch.linalg.vector_norm(maps, dim=list_positions(maps, site.axis))
        saliency_BK = norm_BK * measure_reading_weights(self.net, site, norm_BK.shape[1]).sqrt()
        return saliency_BK / saliency_BK.mean(1, keepdim=True).clamp(min=1e-12)

    @torch.no_grad()
    def weigh_inputs(self, output: Any) -> Tensor | float:
        """Weigh inputs by how difficult they are: weight_B1, which is 1 on average; or 1 for all.

        It is a power of the entropy of the classes' probabilities: where a network is sure, few kernels are
        worth their work.

        Args:
            output: what the network has said of them: scores of classes, in dimension 1, or several such,
                of which the first counts.
        """
        if not self.difficulty:
            return 1.0
        score_BK = list_tensors(output)[0].float()
        entropy_B = torch.special.entr(score_BK.softmax(1)).sum(1)
        entropy_B1 = entropy_B.reshape(len(score_BK), -1).mean(1, keepdim=True)  # over pixels, if there are
        weight_B1: Tensor = entropy_B1.clamp(min=MIN_ENTROPY).pow(self.difficulty)
        return weight_B1 / weight_B1.mean()

    def compute_targets(self, saliency_BK: Tensor, weight_B1: Tensor | float) -> Tensor:
        """Compute what scores are to be, up to the threshold."""
        mean_1K = saliency_BK.mean(0, keepdim=True)
        return STEEPNESS * weight_B1 * torch.lerp(mean_1K, saliency_BK, self.contrast)

    def compute_loss(self, threshold: Tensor, output: Any) -> Tensor:
        """Compute how far the last call's scores are from what saliency says, in squares.

        Args:
            threshold: how much lower scores are, from `fit`.
            output: what the network has said in that call.
        """
        weight_B1 = self.weigh_inputs(output)
        losses = [
            (module.score_BK.float() - self.compute_targets(self.measure(module), weight_B1) + threshold)
            .square()
            .mean()
            for module in self.modules
        ]
        return torch.stack(losses).sum()

    def remove(self) -> None:
        """Catch maps no longer."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def fit(self, batches: Iterable[Example]) -> Tensor:
        """Fit every head to saliency in closed form, least squares, with the network as it is without gates.

        Heads of modules that see nothing get the mean.

        Returns:
            The threshold: how much lower scores are than what saliency says. All are as high as scores start.

        Raises:
            OptionError: there are fewer than two inputs.
        """
        fits = [_Fit(module, self) for module in self.modules]
        with preserve_modes(self.net), quiet_hooks(self.net):
            hooks = [module.register_forward_hook(_open) for module in self.modules]
            for module, fit in zip(self.modules, fits, strict=True):
                hooks.append(module.register_forward_pre_hook(fit.note_input))
            self.net.eval()
            for batch in batches:
                weight_B1 = self.weigh_inputs(self.net(*list_inputs(batch)))
                for fit in fits:
                    fit.add(weight_B1)
            for hook in hooks:
                hook.remove()
        if sum(len(mean_BC) for mean_BC in fits[0].means) < 2:  # which have no spread
            raise OptionError(
                "modules are fitted to what inputs differ by: give two or more, or set start to order"
            )
        lowest = torch.stack([fit.solve() for fit in fits]).min()
        threshold = lowest - self.modules[0].start
        for module in self.modules:
            for head in module.iterate_heads():
                head.linear.bias.sub_(threshold)
        return threshold


class _Fit:
    """Gather what a module's head looks at and what saliency says, and solve for its weights."""

    def __init__(self, module: KernelActivation, saliency: Saliency) -> None:
        self.module, self.saliency = module, saliency
        self.mean_BC = torch.empty(0)
        self.means: list[Tensor] = []
        self.saliencies: list[Tensor] = []
        self.weights: list[Tensor] = []

    def note_input(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.mean_BC = average_maps(inputs[0].float(), self.module.site.axis)

    def add(self, weight_B1: Tensor | float) -> None:
        self.weights.append(torch.ones_like(self.mean_BC[:, :1]) * weight_B1)
        self.means.append(self.mean_BC)
        self.saliencies.append(self.saliency.measure(self.module))

    def solve(self) -> Tensor:
        """Give every head its weights; return the lowest score of all."""
        mean_NC = torch.cat(self.means)
        target_NK = self.saliency.compute_targets(torch.cat(self.saliencies), torch.cat(self.weights))
        target_NK = self.module.average_together(target_NK)
        score_NK = target_NK.mean(0, keepdim=True)
        for head in self.module.iterate_heads():
            head.norm.running_mean.copy_(mean_NC.mean(0))  # type: ignore[union-attr]
            head.norm.running_var.copy_(mean_NC.var(0))  # type: ignore[union-attr]
            if head.linear.weight.requires_grad:
                feature_NC = head.look(mean_NC.to(head.linear.weight.dtype))
                weight_KC, bias_K = solve_ridge(feature_NC, target_NK)
                head.linear.weight.copy_(weight_KC)
                head.linear.bias.copy_(bias_K)
                score_NK = head.linear(feature_NC)
            else:
                head.linear.bias.copy_(score_NK[0])
        return score_NK.min()


def solve_ridge(x_NC: Tensor, y_NK: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Solve for weight_KC and bias_K: least squared error, plus `ridge` a squared weight and row of x."""
    x_NC, y_NK = x_NC.double(), y_NK.double()
    x_mean_C, y_mean_K = x_NC.mean(0), y_NK.mean(0)
    x_NC, y_NK = x_NC - x_mean_C, y_NK - y_mean_K
    gram_CC = x_NC.T @ x_NC + ridge * len(x_NC) * torch.eye(
        x_NC.shape[1], dtype=x_NC.dtype, device=x_NC.device
    )
    weight_KC = torch.linalg.solve(gram_CC, x_NC.T @ y_NK).T
    return weight_KC, y_mean_K - weight_KC @ x_mean_C


def _open(module: nn.Module, inputs: Any, gates: Tensor) -> Tensor:
    """Replace gates, so that all maps pass."""
    return torch.ones_like(gates)
