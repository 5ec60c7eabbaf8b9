"""How far and in which direction the export moves each position."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.ticker import MaxNLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import count_of, distance, metre_scale
from heimdall_onnx.evidence.parity.ground import km_per_degree, offset_km
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.report.plot.chart import Color, legend_below


def draw_displacement(axes: Axes, pytorch: Floats, onnx: Floats, report: ParityReport) -> None:
    """Draw the displacement from PyTorch's to ONNX's positions, both in degrees (N, 2).

    Each sample is a point; circles hold half and 99% of all samples, and a dashed box shows what
    the tolerance allows.
    """
    ground = report.ground
    assert ground is not None
    moved = _moved_m(pytorch, onnx)
    largest = float(np.hypot(moved[:, 0], moved[:, 1]).max(initial=0.0))
    north, east = _allowed_m(pytorch, report)
    factor, unit = metre_scale(largest or max(north, east))
    axes.scatter(
        moved[:, 0] / factor,
        moved[:, 1] / factor,
        s=18,
        color=Color.INK,
        alpha=0.35,
        lw=0,
        gid="moved",
    )
    handles = []
    for label, radius, style in (
        ("50%", ground.displacement_p50_m, "-"),
        ("99%", ground.displacement_p99_m, "-."),
    ):
        text = f"{label}: {distance(radius)}"
        handles.append(Line2D([], [], color=Color.QUIET, ls=style, lw=1.2, label=text))
        if radius > 0 and math.isfinite(radius):
            circle = Circle((0, 0), radius / factor, fill=False, ec=Color.QUIET, ls=style, lw=1.2)
            circle.set_gid(label)
            axes.add_patch(circle)
    reach = 1.25 * largest / factor
    needed = 1.2 * max(north, east) / factor
    # A box far beyond every displacement would shrink these to a dot: it is then only named.
    outside = largest > 0 and needed > 5 * reach
    _draw_allowed(axes, north / factor, east / factor)
    where = ", out of view" if outside else ""
    handles.append(
        Line2D([], [], color=Color.INK, ls="--", lw=1.2, label=_allowed_label(north, east) + where)
    )
    reach = reach if outside else max(reach, needed)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.set_aspect("equal", anchor="N")
    axes.set(xlabel=f"moved east ({unit})", ylabel=f"moved north ({unit})")
    axes.set_title(f"Displacement, {count_of(len(moved), 'sample')}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    legend_below(axes, 0.22, handles=handles)


def _moved_m(pytorch: Floats, onnx: Floats) -> Floats:
    """East and north in metres (N, 2) of ONNX's positions as seen from PyTorch's."""
    offsets = [
        offset_km(b[None], (float(np.clip(a[0], -90, 90)), float(a[1])))[0]
        for a, b in zip(pytorch, onnx, strict=True)
    ]
    return 1000 * np.array(offsets).reshape(-1, 2)


def _allowed_m(pytorch: Floats, report: ParityReport) -> tuple[float, float]:
    """Metres north and east that the tolerance allows at the median position."""
    allowed = report.tolerance + report.rtol * np.median(np.abs(pytorch), axis=0)
    north, east = km_per_degree(float(np.clip(np.median(pytorch[:, 0]), -90, 90)))
    return 1000 * north * float(allowed[0]), 1000 * east * float(allowed[1])


def _allowed_label(north: float, east: float) -> str:
    return f"tolerance: ±{distance(north)} north,\n±{distance(east)} east"


def _draw_allowed(axes: Axes, north: float, east: float) -> None:
    box = Rectangle((-east, -north), 2 * east, 2 * north, fill=False, ec=Color.INK, ls="--", lw=1.2)
    box.set_gid("tolerance")
    axes.add_patch(box)
