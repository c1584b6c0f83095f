"""Answer a batch by the smallest level, and go on with what it is least sure of while there is time.

An anytime cascade: see `elastic.levels.cascade`. Where a deadline leaves no room for the largest level on all
inputs, there mostly is room for it on those that need it.
"""

import time

import torch
from torch import Tensor

from elastic.levels.cascade import check_scores, measure_confidence
from elastic.levels.runtime import HEADROOM, Runtime
from elastic.widths.inputs import Example, count_batch, list_inputs, select_samples

# A level that is so sure of a class is as often right as a larger one.
SURE = 0.99
PART = 8  # inputs between two looks at the clock
# What the slowest part counts for after each request: others take the machine away now and then, and a missed
# deadline costs more than some answers of the small level.
FADING = 0.8


class RefiningRuntime(Runtime):
    """Run the smallest level on all inputs, and the largest on the least sure ones while there is time.

    For levels that tell classes (scores in dimension 1). Use it as `Runtime`; budgets of memory and energy
    say which level is the largest.

    Args:
        levels, example, joules: see `Runtime`.

    Example::

        serve = RefiningRuntime(levels, example)
        serve.within(latency_ms=20)
        logits_BK = serve(x_BCHW)
    """

    _input_s = 0.0  # of the largest level for one input: the slowest part, which fades

    @torch.inference_mode()
    def answer(self, x: Example, left_ms: float | None = None) -> tuple[Tensor, int]:
        """Answer inputs, and say which level was the largest that did.

        Args:
            x: an input, batch first, or several.
            left_ms: of the deadline, for a request that has waited, and that nobody wants too late.

        Raises:
            Late: with `left_ms`, not even the smallest level is expected to be in time.
            StructureError: the smallest level answers with anything but scores of classes.
        """
        begin = time.perf_counter()
        self._give_up(left_ms)
        deadline_ms = self.deadline_ms if left_ms is None else left_ms
        logits_BK = check_scores(self.levels[0](*list_inputs(x))).clone()
        self.observe(0, 1e3 * (time.perf_counter() - begin) * self.batch / max(1, count_batch(x)))
        end = None if deadline_ms is None else begin + HEADROOM * deadline_ms / 1e3
        return logits_BK, self._refine(x, logits_BK, end)

    def _refine(self, x: Example, logits_BK: Tensor, end: float | None) -> int:
        """Let the largest level answer what is least sure, until a time of the clock."""
        level, expected_s = 0, 1e-3 * self.costs[self.allowed].latency_ms * self.slowdown / self.batch
        self._input_s *= FADING
        for part_N in list_unsure(logits_BK).split(PART):
            start, count = time.perf_counter(), len(part_N)
            is_late = end is not None and start + max(expected_s, self._input_s) * count > end
            if not count or self.allowed == 0 or is_late:
                break
            logits_BK[part_N] = self.levels[self.allowed](*select_samples(x, part_N))
            level = self.allowed
            self._input_s = max(self._input_s, (time.perf_counter() - start) / count)
        return level


def list_unsure(logits_BK: Tensor) -> Tensor:
    """List the inputs whose class is not sure, the least sure first."""
    confidence_B = measure_confidence(logits_BK)
    order_B = confidence_B.argsort()
    return order_B[confidence_B[order_B] < SURE]
