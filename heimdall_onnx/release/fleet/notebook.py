"""What the notebook of a fleet imports."""

from heimdall_onnx.release.fleet import tables
from heimdall_onnx.release.fleet.plots import pareto
from heimdall_onnx.release.fleet.report import read_outcomes

__all__ = ["pareto", "read_outcomes", "tables"]
