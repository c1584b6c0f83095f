"""Measure what a network is and costs: parameters, MACs, time, memory, energy."""

from elastic.measure.counts import Census, census, count_macs, count_params, count_params_dense
from elastic.measure.machine import RunCost, measure_latency_ms, measure_memory_mb

__all__ = [
    "Census",
    "RunCost",
    "census",
    "count_macs",
    "count_params",
    "count_params_dense",
    "measure_latency_ms",
    "measure_memory_mb",
]
