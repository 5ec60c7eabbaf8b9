"""Positions on the ground: where they lie, and how far and in which direction they move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patches import Circle, Ellipse, Rectangle
from matplotlib.ticker import MaxNLocator

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.text import count_of, distance, metre_scale, name
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.geodesy import metres_per_degree, offset_km
from heimdall_onnx.evidence.parity.ground import mean_place
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    legend_below,
    new_figure,
    note,
    say,
    styled,
)
from heimdall_onnx.report.plot.outputs import worst_and_some

_LABELLED_SHOWN = 60  # with true positions and the lines to them, more can't be read
_UNLABELLED_SHOWN = 200
_ELLIPSES_SHOWN = 10
_MOVED_SHOWN = 2000
_HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


@dataclass(frozen=True)
class _Positions:
    """The samples with finite positions in both models, in degrees (N, 2).

    Attributes:
        pytorch: The PyTorch model's.
        onnx: The ONNX model's.
        sigma: The ONNX model's standard deviations, or None.
        truth: True positions, or None.
        left_out: Samples without a finite position in both models.
        mapped: Indices of the evenly spaced samples that the map shows.
        origin: The middle of the map.
    """

    pytorch: Floats
    onnx: Floats
    sigma: Floats | None
    truth: Floats | None
    left_out: int
    mapped: npt.NDArray[np.intp]
    origin: tuple[float, float]


@styled
def position_map(report: ParityReport, data: EvaluationData) -> Chart | None:
    """Where are the positions, and how far does the export move them?

    Left, the positions of both models in kilometres about their middle, with a subset of the
    predicted standard deviations as ellipses, true positions and receivers where they are known.
    The two models can hardly be told apart there, so right is the displacement from PyTorch's to
    ONNX's position, on a scale of its own. None if no output holds positions.
    """
    if report.ground is None:
        return None
    positions = _positions(report, data)
    title = _map_answer(report, positions)
    source = (
        f"{name(report.source, 60)} · map: {len(positions.mapped)} of {report.samples:,} samples"
    )
    if len(positions.mapped) == 0:
        figure = new_figure(title, source, height=0.6)
        say(figure.subplots(), "There is nothing to draw.")
        return Chart(figure, title, _map_alt(report, data))
    about = f", azimuthal equidistant about {coordinates(positions.origin)}"
    figure = new_figure(title, source + about, height=4.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    _draw_map(left, positions, data)
    percentiles = report.ground.displacement_p50_m, report.ground.displacement_p99_m
    allowed = _allowed_m(positions.pytorch, report)
    draw_displacement(right, positions.pytorch, positions.onnx, percentiles, allowed)
    return Chart(figure, title, _map_alt(report, data))


def _map_alt(report: ParityReport, data: EvaluationData) -> str:
    ground = report.ground
    assert ground is not None
    text = (
        f"Displacement between PyTorch and ONNX over {report.samples} samples: median "
        f"{distance(ground.displacement_p50_m)}, p99 {distance(ground.displacement_p99_m)}, "
        f"largest {distance(ground.displacement_max_m)}."
    )
    places = "; ".join(f"{who} at {coordinates(place)}" for who, place in data.receivers.items())
    return f"{text} Receivers: {places}." if places else text


def _positions(report: ParityReport, data: EvaluationData) -> _Positions:
    spec = report.signature.position_output
    assert spec is not None
    pytorch, onnx = (side[spec.name].astype(np.float64) for side in (report.pytorch, report.onnx))
    if pytorch.shape != onnx.shape:
        pytorch = onnx = np.full((len(pytorch), 2), np.nan)
    finite = np.isfinite(pytorch).all(axis=1) & np.isfinite(onnx).all(axis=1)
    rows = np.flatnonzero(finite)
    sigma = _sigma(report)
    truth = None if data.positions is None else data.positions[report.plotted[rows]]
    shown = min(rows.size, _UNLABELLED_SHOWN if truth is None else _LABELLED_SHOWN)
    mapped = np.linspace(0, rows.size - 1, shown).astype(np.intp)
    points = [pytorch[rows][mapped], *([] if truth is None else [truth[mapped]])]
    points += [np.array(list(data.receivers.values()))] if data.receivers else []
    return _Positions(
        pytorch=pytorch[rows],
        onnx=onnx[rows],
        sigma=None if sigma is None else sigma[rows],
        truth=truth,
        left_out=int((~finite).sum()),
        mapped=mapped,
        origin=mean_place(np.concatenate(points)) or (0.0, 0.0),
    )


def _sigma(report: ParityReport) -> Floats | None:
    if any(report.pytorch[name].shape != array.shape for name, array in report.onnx.items()):
        return None
    return report.signature.deviations(report.onnx)


def coordinates(place: tuple[float, float]) -> str:
    """Latitude and longitude of ``place`` as a map gives them."""
    latitude, longitude = place
    return (
        f"{abs(latitude):.2f}° {'N' if latitude >= 0 else 'S'}, "
        f"{abs(longitude):.2f}° {'E' if longitude >= 0 else 'W'}"
    )


def _map_answer(report: ParityReport, positions: _Positions) -> str:
    ground = report.ground
    assert ground is not None
    if not len(positions.onnx):
        return "No position is finite in both models"
    missing = f"; {positions.left_out:,} not finite" if positions.left_out else ""
    if ground.displacement_max_m == 0:
        return f"The export moves no position{missing}"
    most, bulk = distance(ground.displacement_max_m), distance(ground.displacement_p99_m)
    if not math.isfinite(ground.displacement_max_m):
        return f"The export moves 99% of the finite positions by at most {bulk}{missing}"
    return (
        f"The export moves positions by at most {most}"
        + (f", 99% of them by at most {bulk}" if bulk != most else "")
        + missing
    )


def _draw_map(axes: Axes, positions: _Positions, data: EvaluationData) -> None:
    mapped, origin = positions.mapped, positions.origin
    pytorch = offset_km(positions.pytorch[mapped], origin)
    onnx = offset_km(positions.onnx[mapped], origin)
    truth = None if positions.truth is None else offset_km(positions.truth[mapped], origin)
    if truth is not None:
        draw_lines(axes, truth, onnx, "errors")
    _draw_ellipses(axes, positions, onnx)
    sides = (pytorch, "PyTorch", Color.PYTORCH), (onnx, "ONNX", Color.ONNX)
    draw_places(axes, sides, truth, 1.0 if len(mapped) <= _LABELLED_SHOWN else 0.5)
    _draw_receivers(axes, data, origin)
    legend_below(axes, 0.17, ncols=3)


def draw_lines(axes: Axes, start: Floats, end: Floats, gid: str) -> None:
    """Thin lines from places (N, 2) to others."""
    lines = list(np.stack([start, end], axis=1))
    axes.add_collection(
        LineCollection(lines, colors=Color.QUIET, linewidths=0.7, gid=gid, zorder=1)
    )


def draw_places(
    axes: Axes,
    sides: tuple[tuple[Floats, str, str], tuple[Floats, str, str]],
    truth: Floats | None,
    scale: float = 1.0,
) -> None:
    """A map of the same samples on two sides, the first with rings and the second with crosses.

    Args:
        axes: Where to.
        sides: East and north in kilometres (N, 2), name and colour of each.
        truth: The true places, where they are known.
        scale: Of the marks.
    """
    if truth is not None:
        east, north = truth.T
        axes.scatter(east, north, s=14, marker="D", color=Color.INK, label="true", gid="true")
    for (points, who, color), filled in zip(sides, (False, True), strict=True):
        axes.scatter(
            points[:, 0],
            points[:, 1],
            s=scale * (24 if filled else 80),
            marker="X" if filled else "o",
            facecolors=color if filled else "none",
            edgecolors="none" if filled else color,
            linewidths=1.3 * scale**0.5,
            label=who,
            gid=who,
            zorder=4,
        )
    axes.set_aspect("equal", adjustable="datalim", anchor="N")
    axes.margins(0.08)
    axes.set(xlabel="east (km)", ylabel="north (km)", title="Positions")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))


def _draw_ellipses(axes: Axes, positions: _Positions, onnx: Floats) -> None:
    if positions.sigma is None:
        return
    count = len(positions.mapped)
    label: str | None = "1σ, ONNX"
    for index in np.unique(np.linspace(0, count - 1, min(count, _ELLIPSES_SHOWN)).astype(int)):
        sigma = positions.sigma[positions.mapped[index]]
        if not np.isfinite(sigma).all():
            continue
        north, east = metres_per_degree(positions.onnx[positions.mapped[index], 0])
        ellipse = Ellipse(
            (float(onnx[index, 0]), float(onnx[index, 1])),
            2 * float(sigma[1] * east) / 1000,
            2 * float(sigma[0] * north) / 1000,
            fill=False,
            edgecolor=Color.ONNX,
            linewidth=0.9,
            linestyle="--",
            label=label,
            gid="sigma",
        )
        axes.add_patch(ellipse)
        label = None


def _draw_receivers(axes: Axes, data: EvaluationData, origin: tuple[float, float]) -> None:
    if not data.receivers:
        return
    places = offset_km(np.array(list(data.receivers.values())), origin)
    axes.scatter(
        places[:, 0],
        places[:, 1],
        s=90,
        marker="^",
        color=Color.INK,
        edgecolors="white",
        linewidths=1,
        label="receiver",
        gid="receivers",
        zorder=5,
    )
    for receiver, place in zip(data.receivers, places, strict=True):
        at = float(place[0]), float(place[1])
        note(axes, name(receiver, 20), at, (0, 8), ha="center", path_effects=_HALO, zorder=6)


def draw_displacement(
    axes: Axes,
    before: Floats,
    after: Floats,
    percentiles: tuple[float, float],
    allowed: tuple[float, float] | None = None,
) -> None:
    """Draw how far and in which direction positions move.

    Each sample is a point, of many the farthest and an even choice of the rest.

    Args:
        axes: Where to.
        before: Finite positions in degrees (N, 2).
        after: Where these have moved.
        percentiles: Metres that half and 99% of all samples move by at most, drawn as circles.
        allowed: Metres north and east that are tolerated, drawn as a box.
    """
    moved = 1000 * offset_km(after, (np.clip(before[:, 0], -90, 90), before[:, 1]))
    radii = np.hypot(moved[:, 0], moved[:, 1])
    largest = float(radii.max(initial=0.0))
    factor, unit = metre_scale(largest or max(allowed or (1.0,)))
    east, north = moved[worst_and_some(radii, _MOVED_SHOWN)].T / factor
    axes.scatter(east, north, s=18, color=Color.INK, alpha=0.35, lw=0, gid="moved")
    for who, metres, style in zip(("50%", "99%"), percentiles, ("-", "-."), strict=True):
        radius = metres / factor if math.isfinite(metres) else 0.0
        text = f"{who}: {distance(metres)}"
        axes.add_patch(
            Circle((0, 0), radius, fill=False, ec=Color.QUIET, ls=style, lw=1.2, label=text)
        )
    reach = 1.25 * largest / factor
    if allowed is not None:
        up, across = (metres / factor for metres in allowed)
        needed = 1.2 * max(up, across)
        # A box far beyond every displacement would shrink these to a dot: it is then only named.
        outside = largest > 0 and needed > 5 * reach
        reach = reach if outside else max(reach, needed)
        text = f"tolerance: ±{distance(allowed[0])} north,\n±{distance(allowed[1])} east"
        if outside:
            text += ", out of view"
        box = Rectangle((-across, -up), 2 * across, 2 * up, fill=False, label=text, gid="tolerance")
        box.set(edgecolor=Color.INK, linestyle="--", linewidth=1.2)
        axes.add_patch(box)
    reach = reach or 1.0
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    axes.set_aspect("equal", anchor="N")
    axes.set(xlabel=f"moved east ({unit})", ylabel=f"moved north ({unit})")
    axes.set_title(f"Displacement, {count_of(len(moved), 'sample')}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    legend_below(axes, 0.22)


def _allowed_m(pytorch: Floats, report: ParityReport) -> tuple[float, float]:
    """Metres north and east that the tolerance allows at the median position."""
    allowed = report.tolerance + report.rtol * np.median(np.abs(pytorch), axis=0)
    north, east = metres_per_degree(np.median(pytorch[:, 0]))
    return float(north * allowed[0]), float(east * allowed[1])
