"""Saliency: what kernels' maps weigh, and modules that are fitted to it in closed form."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import entropy
from torch import Tensor, fx, nn

from elastic.dynamic.attaching import attach_modules
from elastic.dynamic.modules import WITHIN, iterate_modules
from elastic.dynamic.saliency import MIN_ENTROPY, RIDGE, STEEPNESS, Saliency, solve_ridge
from elastic.errors import OptionError
from elastic.widths.discovery import discover
from tests.elastic.zoo import randomised

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """One convolution that is gated, with a norm and without an odd layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.second, self.head = nn.Conv2d(6, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def attached(kind: str = "input", activation: str = "hard") -> tuple[nn.Module, fx.GraphModule]:
    torch.manual_seed(0)
    net = randomised(Branch()).eval()
    return net, attach_modules(net, discover(net, X), ["first"], activation=activation, kind=kind).eval()  # type: ignore[arg-type]


def saliency_by_hand(net: nn.Module, x: Tensor) -> Tensor:
    """What the docstring says, kernel by kernel."""
    with torch.no_grad():
        maps = F.relu(net.norm(net.first(x)))  # type: ignore[operator]
        own = [maps[:, k].flatten(1).norm(dim=1) * net.second.weight[:, k].norm() for k in range(6)]  # type: ignore[union-attr, index]
    s_NK = torch.stack(own, dim=1)
    return s_NK / s_NK.mean(1, keepdim=True)


def test_saliency_is_the_norm_of_a_map_times_that_of_the_weights_that_read_it() -> None:
    net, dynamic = attached()
    saliency = Saliency(dynamic)
    (module,) = iterate_modules(dynamic)
    for head in module.iterate_heads():
        head.linear.bias.data = torch.tensor([1.0, -1, 1, -1, 1, -1])  # what is off is measured, too
    dynamic(X)
    torch.testing.assert_close(saliency.measure(module), saliency_by_hand(net, X))


def test_the_ridge_is_that_of_least_squares_with_rows_for_the_weights() -> None:
    generator = torch.Generator().manual_seed(1)
    x_NC = torch.randn(50, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 2
    y_NK = torch.randn(50, 3, generator=generator)
    weight_KC, bias_K = solve_ridge(x_NC, y_NK, ridge=0.3)
    rows = np.hstack([x_NC.double().numpy(), np.ones((50, 1))])
    penalty = np.hstack([np.sqrt(0.3 * 50) * np.eye(4), np.zeros((4, 1))])
    right = np.vstack([y_NK.double().numpy(), np.zeros((4, 3))])
    expected, *_ = np.linalg.lstsq(np.vstack([rows, penalty]), right, rcond=None)
    np.testing.assert_allclose(weight_KC, expected[:4].T, rtol=1e-8)
    np.testing.assert_allclose(bias_K, expected[4], rtol=1e-8)


def test_modules_are_fitted_to_saliency_with_every_kernel_on() -> None:
    """Scores are what numpy predicts, up to one threshold; the network computes what it did."""
    net, dynamic = attached()
    threshold = float(Saliency(dynamic).fit(X.split(16)))
    mean_NC = X.mean((2, 3))
    normed_NC = ((mean_NC - mean_NC.mean(0)) / (mean_NC.var(0) + 1e-5).sqrt()).clamp(-WITHIN, WITHIN)
    target_NK = STEEPNESS * saliency_by_hand(net, X)
    weight_KC, bias_K = solve_ridge(normed_NC, target_NK, RIDGE)
    (module,) = iterate_modules(dynamic)
    with torch.no_grad():
        outputs = dynamic(X)
        expected = normed_NC.double() @ weight_KC.T + bias_K
        torch.testing.assert_close(module.score_BK.double() + threshold, expected, rtol=1e-4, atol=1e-4)
        assert float(module.score_BK.min()) == pytest.approx(module.start, abs=1e-3)
        torch.testing.assert_close(outputs, net(X))
    assert (module.score_BK.std(0) > 0).all()


@pytest.mark.parametrize("batches", [[], [X[:1]]])
def test_what_has_no_spread_is_nothing_to_fit_to(batches: list[Tensor]) -> None:
    _, dynamic = attached()
    with pytest.raises(OptionError, match="what inputs differ by: give two or more, or set start to order"):
        Saliency(dynamic).fit(batches)
    assert all(torch.isfinite(tensor).all() for tensor in dynamic.state_dict().values())


def test_contrast_shrinks_what_inputs_differ_by_and_leaves_the_mean() -> None:
    """Least squares are linear: fitted scores deviate from their mean by as much less."""
    scores = []
    for contrast in (1.0, 0.25):
        _, dynamic = attached()
        threshold = Saliency(dynamic, contrast).fit(X.split(16))
        dynamic(X)
        (module,) = iterate_modules(dynamic)
        scores.append(module.score_BK.detach() + threshold)
    whole, part = scores
    torch.testing.assert_close(part.mean(0), whole.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(part - part.mean(0), 0.25 * (whole - whole.mean(0)), rtol=1e-3, atol=1e-4)


def test_inputs_are_weighed_by_the_entropy_of_what_is_said_of_them() -> None:
    """Against scipy; on average they weigh 1, and an input that is sure does not vanish."""
    _, dynamic = attached()
    score_BK = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)) * 3
    score_BK[4] = 1e4 * torch.eye(7)[0]
    entropy_B = np.maximum(entropy(score_BK.double().softmax(1).numpy(), axis=1), MIN_ENTROPY)
    for power in (0.5, 2.0):
        weight_B1 = Saliency(dynamic, difficulty=power).weigh_inputs(score_BK)
        assert isinstance(weight_B1, Tensor)
        np.testing.assert_allclose(
            weight_B1[:, 0], entropy_B**power / np.mean(entropy_B**power), rtol=1e-4, atol=1e-6
        )
    pixels_BKHW = score_BK[..., None, None].expand(-1, -1, 2, 3)  # a class each
    again_B1 = Saliency(dynamic, difficulty=2.0).weigh_inputs((pixels_BKHW, None))
    torch.testing.assert_close(again_B1, weight_B1)


@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_modules_are_fitted_to_what_is_difficult(contrast: float) -> None:
    """What they are fitted to is saliency times the input's weight; without contrast in one order for all."""
    net, dynamic = attached()
    saliency = Saliency(dynamic, contrast, difficulty=1.0)
    weight_N1 = torch.cat([saliency.weigh_inputs(net(x)) for x in X.split(16)])  # type: ignore[misc]
    said_NK = saliency_by_hand(net, X)
    target_NK = STEEPNESS * weight_N1 * (said_NK if contrast else said_NK.mean(0))
    threshold = saliency.fit(X.split(16))
    dynamic(X)
    (module,) = iterate_modules(dynamic)
    (head,) = module.iterate_heads()
    with torch.no_grad():
        weight_KC, bias_K = solve_ridge(head.look(X.mean((2, 3))), target_NK)
        expected_NK = head.look(X.mean((2, 3))) @ weight_KC.T.float() + bias_K
    torch.testing.assert_close(
        module.score_BK.detach() + threshold, expected_NK.float(), rtol=1e-4, atol=1e-4
    )


def test_modules_that_see_nothing_are_fitted_to_the_mean() -> None:
    net, dynamic = attached("constant")
    threshold = Saliency(dynamic).fit(X.split(16))
    dynamic(X)
    (module,) = iterate_modules(dynamic)
    mean_K = STEEPNESS * saliency_by_hand(net, X).mean(0)
    torch.testing.assert_close(module.score_BK.detach() + threshold, mean_K.expand(64, -1))


@pytest.mark.parametrize("difficulty", [0.0, 2.0])
def test_saliency_teaches_the_heads_alone_and_leaves_off_where_they_know_it(difficulty: float) -> None:
    _, dynamic = attached()
    dynamic.train()
    saliency, (module,) = Saliency(dynamic, difficulty=difficulty), iterate_modules(dynamic)
    module.is_steady = True
    x = X.clone().requires_grad_()
    output = dynamic(x)
    saliency.compute_loss(torch.tensor(0.0), output).backward()
    assert x.grad is None and all(p.grad is None for p in dynamic.first.parameters())
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())
    known = STEEPNESS * saliency.measure(module) * saliency.weigh_inputs(output)
    module.score_BK = known - 0.7
    assert float(saliency.compute_loss(torch.tensor(0.7), output)) == pytest.approx(0, abs=1e-10)
    assert not difficulty or float(saliency.compute_loss(torch.tensor(0.7), 0 * output)) > 1e-3


def test_a_steady_choice_does_not_depend_on_the_batch_and_is_that_of_evaluation() -> None:
    _, dynamic = attached()
    (module,) = iterate_modules(dynamic)
    Saliency(dynamic).fit(X.split(16))
    module.is_steady = True
    module.train()(X)
    scores = module.score_BK
    assert not torch.equal(module.train()(X[:8] + 1), torch.zeros(0))  # statistics follow
    moved = module.get_head().norm.running_mean.clone()  # type: ignore[union-attr, operator]
    assert not torch.allclose(moved, X.mean((0, 2, 3)), atol=1e-3)
    module.train()(X[:1])
    alone = module.score_BK
    module.eval()(X)
    torch.testing.assert_close(alone, module.score_BK[:1])
    assert not torch.allclose(scores, module.score_BK)
