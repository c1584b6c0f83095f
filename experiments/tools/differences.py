"""Compare two arms seed by seed: how much they differ by, how sure that is, and a paired t test of it."""

import statistics
from dataclasses import dataclass

from scipy.stats import t as student

from elastic.experiments.tools.arms import Arm
from elastic.experiments.tools.tables import compute_sd

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Hold by how much an arm differs from another over the seeds that both have.

    Attributes:
        pairs: how many seeds those are.
        mean: of the differences.
        margin: half of the mean's confidence interval; None of a single pair.
        p: of a paired, two-sided t test; None of a single pair.
    """

    pairs: int
    mean: float
    margin: float | None = None
    p: float | None = None


def compute_difference(arm: Arm, other: Arm) -> Difference | None:
    """Compute by how much the metric of `arm` differs from that of `other`, an arm judged by the same one.

    Returns:
        None where there is nothing to compare: the same arm, or no seed that both have a figure of.
    """
    if arm is other:
        return None
    key = arm.metric
    ours, theirs = (
        {str(run["seed"]): run[key] for run in compared.runs if None not in (run.get("seed"), run.get(key))}
        for compared in (arm, other)
    )
    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    if not differences:
        return None
    n, mean = len(differences), statistics.mean(differences)
    if n == 1:
        return Difference(n, mean)
    error = compute_sd(differences) / n**0.5
    margin = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    p = 2 * float(student.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Difference(n, mean, margin, p)
