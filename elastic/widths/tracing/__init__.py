"""Trace a model with torch.fx: without its data, in one mode or in both."""

from elastic.widths.tracing.by_mode import list_graphs
from elastic.widths.tracing.checks import PassingChecks
from elastic.widths.tracing.graph import (
    describe_node,
    get_layer,
    get_operation_name,
    preserve_attributes,
    trace,
)
from elastic.widths.tracing.meta import BATCH_NORM, drop_data, make_meta_copy, run_without_data
from elastic.widths.tracing.modes import (
    sync_traced,
    trace_both_modes,
    trace_modes,
)
from elastic.widths.tracing.norms import find_following_norms

__all__ = [
    "BATCH_NORM",
    "PassingChecks",
    "describe_node",
    "drop_data",
    "find_following_norms",
    "get_layer",
    "get_operation_name",
    "list_graphs",
    "make_meta_copy",
    "preserve_attributes",
    "run_without_data",
    "sync_traced",
    "trace",
    "trace_both_modes",
    "trace_modes",
]
