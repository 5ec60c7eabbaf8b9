"""Every figure of a release's report, each drawn from the dataclass of its step.

A figure answers one question and its title is the answer. Each function returns a `Chart`, or
None where the question does not arise, or what it was given if that says why nothing was measured:

    from heimdall_onnx.report import plot
    plot.parity_scatter(report).save("parity.png")
"""

from collections.abc import Callable

from heimdall_onnx.report.plot.chart import Chart
from heimdall_onnx.report.plot.depth import error_along_depth
from heimdall_onnx.report.plot.errors import error_by_magnitude, errors_by_sample
from heimdall_onnx.report.plot.latency import latency, pair_latency, throughput
from heimdall_onnx.report.plot.parity import parity_grid, parity_scatter
from heimdall_onnx.report.plot.positions import position_map
from heimdall_onnx.report.plot.quality import quality
from heimdall_onnx.report.plot.runtime import operator_times, optimization_levels
from heimdall_onnx.report.plot.uncertainty import reliability
from heimdall_onnx.report.plot.variants import noise_along_depth, variants
from heimdall_onnx.report.plot.worst import worst_inputs

__all__ = [
    "Chart",
    "error_along_depth",
    "error_by_magnitude",
    "errors_by_sample",
    "latency",
    "noise_along_depth",
    "operator_times",
    "optimization_levels",
    "pair_latency",
    "parity_grid",
    "parity_scatter",
    "position_map",
    "quality",
    "reliability",
    "throughput",
    "variants",
    "worst_inputs",
]

# Notebooks of earlier releases, which are run again long after, draw these.
_EARLIER = {
    *("error_distribution", "latency_over_time", "members_disagreement", "operators"),
    *("release_cost", "roofline", "task_error"),
}


def __getattr__(name: str) -> Callable[..., None]:
    if name in _EARLIER:
        return lambda *_: None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
