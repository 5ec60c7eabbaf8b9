"""The roofline: how far each variant is from what the machine allows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from heimdall_onnx.common.text import count_of, name, number
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.variants.roofline import Roofline, RooflineRow
from heimdall_onnx.report.plot.chart import Chart, Color, log_axis, new_figure, plain, styled

# Of each precision: colour, marker, line.
_STYLES = dict(
    zip(
        ("f32", "int8", "bf16", "f16"),
        zip(Color.ELEMENTS, "osD^", ("-", "--", "-.", ":"), strict=True),
        strict=True,
    )
)
_NAME_GAP = 0.065  # of the height of the axes
_WITHOUT_PEAK = (Color.QUIET, "X", ":")


@dataclass(frozen=True)
class _Point:
    """Where a run lies, and how it is called."""

    row: RooflineRow
    label: str
    intensity: float
    rate: float
    floor_rate: float | None


@unless_not_measured
@styled
def roofline(report: Roofline | None) -> Chart | None:
    """How far from its floor does each run, and is it arithmetic or memory that sets the floor?

    The roofs are what the machine was measured to reach; a line leads from each run up to the rate
    at which it would take no longer than its floor. Weights that the cache keeps are not bound by
    the slope. None where there is no run, or no arithmetic to be counted.
    """
    if report is None or not report.rows or not report.work.flops:
        return None
    points = [_point(report, row) for row in report.rows]
    title = _answer(report, points)
    figure = new_figure(title, _subtitle(report), height=max(3.6, 0.9 + 0.22 * len(points)))
    axes = figure.subplots()
    ridges = [peak / report.machine.bandwidth_gb_s for peak in report.machine.peaks.values()]
    across = [*ridges, *(point.intensity for point in points)]
    up = [*report.machine.peaks.values(), *(p.floor_rate for p in points if p.floor_rate)]
    low, high = min(across) / 4, max(across) * 4
    rates = [point.rate for point in points]
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min([*rates, *up]) / 3, max([*rates, *up]) * 1.6)
    _draw_roofs(axes, report, low, high)
    _draw_points(axes, points)
    for axis in (axes.xaxis, axes.yaxis):
        log_axis(axis)
    axes.set_xlabel("operations per byte of weights")
    axes.set_ylabel("10⁹ operations a second")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, handlelength=2.6)
    return Chart(figure, title, _alt(report, points))


def _point(report: Roofline, row: RooflineRow) -> _Point:
    work = report.work.flops * row.batch_size
    several = len({other.batch_size for other in report.rows}) > 1
    return _Point(
        row,
        name(row.name) + (f", batch {row.batch_size}" if several else ""),
        work / row.size_bytes,
        work / row.measured_ms / 1e6,
        work / row.floor.ms / 1e6 if row.floor and row.floor.ms else None,
    )


def _draw_roofs(axes: Axes, report: Roofline, low: float, high: float) -> None:
    bandwidth, peaks = report.machine.bandwidth_gb_s, report.machine.peaks
    end = max(peaks.values(), default=bandwidth * high) / bandwidth
    slope, label = [bandwidth * low, bandwidth * end], f"memory: {number(bandwidth, 3)} GB/s"
    axes.plot([low, end], slope, color=Color.QUIET, label=label, gid="memory")
    for precision, peak in peaks.items():
        color, marker, line = _STYLES.get(precision, _WITHOUT_PEAK)
        axes.plot(
            [peak / bandwidth, high],
            [peak, peak],
            color=color,
            ls=line,
            marker=marker,
            markevery=[],
            label=f"{plain(precision)}: {number(peak, 3)} · 10⁹/s",
            gid=f"peak {precision}",
        )


def _draw_points(axes: Axes, points: list[_Point]) -> None:
    # The names stand beside the axes, so that none covers another however close the runs are.
    order = sorted(range(len(points)), key=lambda i: points[i].rate)
    bottom, top = np.log(axes.get_ylim())
    heights = [(np.log(points[i].rate) - bottom) / (top - bottom) for i in order]
    for place, index in zip(_apart(heights), order, strict=True):
        point = points[index]
        color, marker, line = _STYLES.get(point.row.precision, _WITHOUT_PEAK)
        if point.floor_rate is not None:
            axes.plot(
                [point.intensity] * 2,
                [point.rate, point.floor_rate],
                color=color,
                ls=line,
                lw=1.0,
                marker="_",
                markevery=[1],
                ms=10,
                gid=f"gap {point.label}",
            )
        axes.plot(
            point.intensity,
            point.rate,
            marker,
            color=color,
            ms=7,
            mfc=color if point.floor_rate is not None else "none",
            gid=f"run {point.label}",
        )
        axes.annotate(
            plain(f"{point.label}: {_times(point.row)}"),
            (point.intensity, point.rate),
            xytext=(1.03, place),
            textcoords="axes fraction",
            va="center",
            size=9,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.5, "relpos": (0, 0.5)},
        ).set_gid(f"name {point.label}")


def _apart(heights: list[float]) -> list[float]:
    """Ascending ``heights`` moved so far apart that names fit between them, within the axes."""
    gap = min(_NAME_GAP, 0.96 / max(1, len(heights) - 1))
    places: list[float] = []
    for height in heights:
        places.append(max(height, places[-1] + gap if places else 0.02))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], 0.98 - gap * (len(places) - 1 - i))
    return places


def _times(row: RooflineRow) -> str:
    return "no floor" if row.ratio is None else f"{number(row.ratio)}×"


def _answer(report: Roofline, points: list[_Point]) -> str:
    known = [point for point in points if point.row.ratio is not None]
    if not known:
        precisions = sorted({row.precision for row in report.rows})
        return f"No run has a floor: no peak was measured for {', '.join(precisions)}"
    nearest, *_, farthest = sorted([*known, known[0]], key=lambda p: p.row.ratio or 0.0)
    if len(known) == 1:
        floor = nearest.row.floor
        assert floor is not None
        return (
            f"{nearest.label} takes {_times(nearest.row)} the time that {floor.bound} allows, "
            f"{number(nearest.row.measured_ms)} ms of at least {number(floor.ms)} ms"
        )
    return (
        f"{nearest.label} is nearest to its floor {_of(nearest)}, "
        f"{farthest.label} farthest {_of(farthest)}"
    )


def _of(point: _Point) -> str:
    assert point.row.floor is not None
    return f"({_times(point.row)} of {number(point.row.floor.ms)} ms)"


def _subtitle(report: Roofline) -> str:
    machine, work = report.machine, report.work
    bound = [row.floor.bound for row in report.rows if row.floor]
    parts = [
        f"{count_of(machine.threads, 'thread')}, roofs as measured",
        f"{number(work.flops / 1e9)} · 10⁹ operations a sample, "
        f"{number(work.parameters / 1e6)} million weights",
    ]
    if bound:
        parts.append(f"floor set by compute in {bound.count('compute')} of {len(bound)} runs")
    parts.append(
        f"only weights beyond {number(machine.cache_bytes / 1e6)} MB of cache count as traffic, "
        "so a floor may lie above the slope"
    )
    if any(row.ratio is not None and row.ratio < 1 for row in report.rows):
        parts.append("below 1×: a run did less than was counted, or the roofs were disturbed")
    missing = sorted({row.precision for row in report.rows if row.floor is None})
    if missing:
        parts.append(f"no peak was measured for {', '.join(missing)}")
    return " · ".join(parts)


def _alt(report: Roofline, points: list[_Point]) -> str:
    peaks = ", ".join(f"{p} {number(v, 3)}" for p, v in report.machine.peaks.items())
    parts = [
        f"Memory {number(report.machine.bandwidth_gb_s, 3)} GB/s; peaks in 10⁹ operations a "
        f"second: {peaks}."
    ]
    for point in points:
        row, floor = point.row, point.row.floor
        beside = (
            f"floor {number(floor.ms, 3)} ms ({floor.bound}), {_times(row)}"
            if floor
            else f"no peak was measured for {row.precision}"
        )
        parts.append(
            f"{point.label}: {number(row.measured_ms, 3)} ms, {beside}; {number(point.rate, 3)} · "
            f"10⁹ operations a second at {number(point.intensity, 3)} per byte."
        )
    return " ".join(parts)
