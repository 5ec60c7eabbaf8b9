"""Every figure of the report, each drawn from the dataclass of its step.

A figure answers one question and its title is the answer. Each function returns a `Chart`, or
None where the question does not arise:

    from heimdall_onnx import plot
    plot.parity_scatter(report).save("parity.png")
"""

from heimdall_onnx.plot.chart import Chart
from heimdall_onnx.plot.distribution import error_distribution
from heimdall_onnx.plot.grid import parity_grid
from heimdall_onnx.plot.positions import position_map
from heimdall_onnx.plot.scatter import parity_scatter
from heimdall_onnx.plot.task import task_error
from heimdall_onnx.plot.timing import latency, latency_over_time

__all__ = [
    "Chart",
    "error_distribution",
    "latency",
    "latency_over_time",
    "parity_grid",
    "parity_scatter",
    "position_map",
    "task_error",
]
