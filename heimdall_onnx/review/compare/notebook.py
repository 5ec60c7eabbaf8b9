"""What the notebook of a comparison imports."""

from heimdall_onnx.common.parameters import read_notebook_as
from heimdall_onnx.review.compare import plots as figures
from heimdall_onnx.review.compare import tables
from heimdall_onnx.review.compare.pair import (
    ComparisonParameters,
    compare_pair,
    conclude,
    open_pair,
    prepare,
    record_comparison,
    time_pair,
)

__all__ = [
    "ComparisonParameters",
    "compare_pair",
    "conclude",
    "figures",
    "open_pair",
    "prepare",
    "read_notebook_as",
    "record_comparison",
    "tables",
    "time_pair",
]
