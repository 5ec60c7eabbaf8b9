"""What the parity figures share: the outputs worth drawing, and parity in one sentence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import DEGREES, after, count_of, name, number
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.model.signature import TensorSpec
from heimdall_onnx.report.plot.chart import Color

_OUTPUTS_SHOWN = 4
ELEMENT_MARKERS = ("o", "^", "s", "D")


@dataclass(frozen=True)
class OutputColumn:
    """One output as it is drawn.

    Attributes:
        spec: From the signature.
        statistics: Over the whole evaluation data.
        reference: The PyTorch model's values, (samples, elements); empty if not comparable.
        value: The ONNX model's values, of the same shape.
        shapes: What the shapes are if they differ, else empty.
        of_position: Whether it is the spread of a position, whose elements it shares.
    """

    spec: TensorSpec
    statistics: ErrorStatistics
    reference: Floats
    value: Floats
    shapes: str
    of_position: bool = False

    @property
    def elements(self) -> list[str]:
        """What to call the elements of a sample; empty if they are too many to tell apart."""
        width = self.reference.shape[1]
        names = element_names(self.spec, width, of_position=self.of_position)
        return names if 1 < width <= len(ELEMENT_MARKERS) else []


def element_names(spec: TensorSpec, width: int, *, of_position: bool) -> list[str]:
    """What to call the elements of an output with so many of them.

    Args:
        spec: The output.
        width: Elements of a sample.
        of_position: Whether it is the spread of a position, whose elements it shares.
    """
    if (spec.unit == DEGREES or of_position) and width == 2:
        return ["latitude", "longitude"]
    return [f"element {i}" for i in range(width)]


def worst_columns(report: ParityReport) -> list[OutputColumn]:
    """The outputs that are drawn, in the signature's order: the worst, if they are many."""
    columns = []
    for spec, statistics in zip(report.signature.outputs, report.evaluation, strict=True):
        a, b = report.pytorch[spec.name], report.onnx[spec.name]
        shapes = "" if a.shape == b.shape else f"PyTorch gives {a.shape}, ONNX {b.shape}"
        if shapes:
            a = b = np.empty((0, 1))
        columns.append(
            OutputColumn(
                spec,
                statistics,
                a.astype(np.float64).reshape(len(a), math.prod(a.shape[1:])),
                b.astype(np.float64).reshape(len(b), math.prod(b.shape[1:])),
                shapes,
                spec is report.signature.sigma_output,
            )
        )
    shown = sorted(columns, key=lambda c: -c.statistics.excess)[:_OUTPUTS_SHOWN]
    return [column for column in columns if column in shown]


def worst_and_some(error: Floats, count: int) -> npt.NDArray[np.intp]:
    """The elements to draw: all, or of many the worst half and an even choice of the rest."""
    if error.size <= count:
        return np.arange(error.size)
    worst = np.argsort(-error, kind="stable")[: count // 2]
    even = np.linspace(0, error.size - 1, math.ceil(count / 2)).astype(int)
    return np.union1d(worst, even)


def draw_points(
    axes: Axes, x: npt.ArrayLike, y: npt.ArrayLike, place: int, label: str, gid: str, **style: Any
) -> None:
    """The points of one element or output, the ``place``-th of those that are told apart."""
    color = style.pop("color", Color.ELEMENTS[place])
    axes.plot(x, y, ELEMENT_MARKERS[place], color=color, label=label or None, gid=gid, **style)


def describe_source(report: ParityReport, columns: list[OutputColumn]) -> str:
    """The data behind a figure, and which outputs of many it shows."""
    text = f"{name(report.source, 60)}, {count_of(report.samples, 'sample')}"
    text += f" in batches of {report.cells[0].batch_size}"
    outputs = len(report.signature.outputs)
    if len(columns) < outputs:
        text += f" · the {len(columns)} outputs of {outputs} with the largest differences"
    return text


def describe_errors(report: ParityReport) -> str:
    """The error statistics of every output in words."""
    return " ".join(
        f"{o.output}: {o.count} elements, mean absolute error {number(o.mean, 3)}, median "
        f"{number(o.p50, 3)}, p99 {number(o.p99, 3)}, p99.9 {number(o.p999, 3)}, largest "
        f"{number(o.maximum, 3)}{after(o.unit)}, {o.violations} beyond tolerance, "
        f"{o.nonfinite_mismatches} not comparable."
        for o in report.evaluation
    )


def worst_output(columns: list[OutputColumn]) -> ErrorStatistics:
    """The output with the largest difference; in units of the tolerance if units differ."""
    alike = len({column.spec.unit for column in columns}) == 1
    found = (column.statistics for column in columns)
    return max(found, key=lambda o: np.nan_to_num(o.maximum, nan=-1.0) if alike else o.excess)


def parity_answer(report: ParityReport, columns: list[OutputColumn]) -> str:
    """Whether the evaluation data's elements agree, in one sentence."""
    differing = next((c for c in columns if c.shapes), None)
    if differing is not None:
        return f"{name(differing.spec.name)} can't be compared: {differing.shapes}"
    count = sum(o.count for o in report.evaluation)
    worst = worst_output(columns)
    where = f" in {name(worst.output)}" if len(report.evaluation) > 1 else ""
    bad = sum(o.violations for o in report.evaluation)
    mismatches = sum(o.nonfinite_mismatches for o in report.evaluation)
    if mismatches:
        return (
            f"{bad:,} of {count:,} elements beyond tolerance, {mismatches:,} of them NaN or Inf "
            "in one model only"
        )
    if bad:
        return (
            f"{bad:,} of {count:,} elements beyond tolerance; largest difference "
            f"{number(worst.maximum)}{after(worst.unit)}{where}"
        )
    if math.isnan(worst.maximum):
        return f"Nothing to compare: all {count:,} elements are NaN or Inf in both models"
    if all(o.maximum == 0 for o in report.evaluation):
        return f"No difference: all {count:,} elements are equal"
    return (
        f"Largest difference {number(worst.maximum)}{after(worst.unit)}{where}: all {count:,} "
        "elements within tolerance"
    )
