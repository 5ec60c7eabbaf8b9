"""Where in the network the error begins and what becomes of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from heimdall_onnx.common.text import apart, count_of, name, number
from heimdall_onnx.evidence.parity.departure import Departure, DepthProfile, ModuleDifference
from heimdall_onnx.report.plot.chart import Chart, Color, log_axis, new_figure, plain, say, styled

_LABELS = 14
_OPERATORS_SHOWN = 4


@styled
def error_along_depth(profile: DepthProfile | None, departure: Departure | None) -> Chart | None:
    """Where in the network does the error begin, and does it grow or heal from there?

    Each point is the output of a module, in the order in which the graph computes them, in units
    of the error from which on it departs. None where every parity gate holds.
    """
    if profile is None:
        return None
    title = _answer(profile, departure)
    subtitle = (
        f"On {profile.where or 'the worst inputs'}, without graph optimization · "
        f"{count_of(len(profile.modules), 'module')} compared"
    )
    if profile.skipped:
        subtitle += f", {profile.skipped:,} fused or folded into others"
    figure = new_figure(title, subtitle, height=4.2)
    axes = figure.subplots()
    if profile.modules:
        _draw(axes, profile.modules, departure)
    else:
        say(axes, "the graph has no module's output as a value of its own")
    alt = "; ".join(
        f"{m.scope}: {number(m.max_abs_error)} ({number(m.excess)}× the limit)"
        for m in profile.modules
        if m.excess > 1
    )
    return Chart(figure, title, f"Beyond the limit: {alt or 'none'}.")


def _answer(profile: DepthProfile, departure: Departure | None) -> str:
    if departure is None:
        inside = next((m for m in profile.modules if m.excess > 1), None)
        if inside is not None:
            return (
                f"Modules depart from {name(inside.scope, 60)} on, {number(inside.excess)}× what "
                "the tolerance allows, but at the outputs no more is left of it than that"
            )
        if not profile.modules:
            return "No module could be compared: look at the optimization levels"
        return (
            "No module departs without graph optimization: look at the optimization levels, and "
            "at rows that influence each other"
        )
    times = f"{number(departure.excess)}× what the tolerance allows"
    where = f"{name(departure.scope, 60)} ({departure.module_type})"
    return f"The error begins in {where}: {number(departure.max_abs_error)}, {times}"


def _draw(axes: Axes, modules: tuple[ModuleDifference, ...], departure: Departure | None) -> None:
    excess = np.array([m.excess for m in modules])
    finite = excess[np.isfinite(excess) & (excess > 0)]
    low = min(float(finite.min(initial=1e-2)), 0.1) / 3
    high = max(float(finite.max(initial=1.0)), 1.0) * 30
    drawn = np.clip(np.nan_to_num(excess, nan=high, posinf=high / 3), low, high)
    xs = np.arange(len(modules))
    axes.axhspan(low / 3, 1.0, color="#E8F5F1", lw=0)
    axes.axhline(1.0, color=Color.INK, ls="--", lw=1.2, gid="limit")
    axes.plot(xs, drawn, color=Color.QUIET, lw=0.8, zorder=2)
    beyond = excess > 1
    for mask, color, marker, label in (
        (~beyond, Color.ELEMENTS[0], "o", "agrees"),
        (beyond, Color.ONNX, "X", "departs"),
    ):
        axes.plot(xs[mask], drawn[mask], marker, color=color, label=label, gid=label, zorder=3)
    at = next((i for i, m in enumerate(modules) if departure and m.scope == departure.scope), None)
    if departure is not None:
        _mark(axes, departure, None if at is None else (at, drawn[at]), len(modules))
    axes.set(yscale="log", ylim=(low / 2, high * 3), xlim=(-0.7, len(modules) - 0.3))
    log_axis(axes.yaxis)
    axes.set_ylabel("error / what the tolerance allows")
    ticks = _ticks(len(modules), at)
    scopes = [modules[i].scope for i in ticks]
    labels = [plain(scope if len(scope) <= 24 else f"…{scope[-23:]}") for scope in scopes]
    axes.set_xticks(ticks, labels, rotation=35, ha="right")
    axes.set_xlabel("module, in the order of execution")
    axes.grid(visible=False, axis="x")
    axes.legend(loc="lower right", ncols=2, frameon=True)


def _mark(axes: Axes, departure: Departure, point: tuple[int, float] | None, modules: int) -> None:
    around = departure.operators[:_OPERATORS_SHOWN]
    more = ", …" if len(departure.operators) > len(around) else ""
    values = "PyTorch {}, ONNX {}".format(*apart(departure.pytorch_value, departure.onnx_value))
    text = f"{name(departure.scope, 48)}\n{values}\n{name(', '.join(around), 60)}{more}"
    if point is None:  # folded into others: it is named, and has no point of its own
        axes.text(0.02, 0.97, plain(text), va="top", size=9, transform=axes.transAxes)
        return
    ring: dict[str, Any] = {"ms": 15, "mfc": "none", "mec": Color.INK, "mew": 1.6}
    axes.plot(*point, "o", gid="departure", zorder=4, **ring)
    left = point[0] > modules / 2
    axes.annotate(
        plain(text),
        point,
        xytext=(0.02 if left else 0.98, 0.97),
        textcoords="axes fraction",
        ha="left" if left else "right",
        va="top",
        size=9,
        arrowprops={"arrowstyle": "-", "color": Color.INK, "lw": 0.8},
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 2},
    )


def _ticks(modules: int, at: int | None) -> list[int]:
    """Evenly spaced modules, and the one that departs in place of its neighbours."""
    even = np.unique(np.linspace(0, modules - 1, min(_LABELS, modules)).astype(int))
    if at is None:
        return [int(i) for i in even]
    gap = math.ceil(modules / (2 * _LABELS))
    return sorted({at, *(int(i) for i in even if abs(i - at) > gap)})
