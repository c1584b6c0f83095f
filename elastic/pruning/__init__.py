"""Prune: gates that close by gradient descent, budgets that steer them, and compaction."""

from elastic.pruning.budget import Budget
from elastic.pruning.compaction import compact
from elastic.pruning.gates import attach_gates

__all__ = ["Budget", "attach_gates", "compact"]
