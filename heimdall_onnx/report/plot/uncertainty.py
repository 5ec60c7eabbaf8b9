"""Whether the claimed uncertainty is honest, and how sharp it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from heimdall_onnx.common.text import count_of, distance, metre_scale, name, number, share
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.uncertainty import GATED, NOMINAL, Calibration, UncertaintyReport
from heimdall_onnx.evidence.ratios import CONFIDENCE
from heimdall_onnx.report.plot.chart import (
    Chart,
    Color,
    legend_below,
    log_axis,
    new_figure,
    styled,
)

_STYLES = {"PyTorch": (Color.PYTORCH, "-", "o"), "ONNX": (Color.ONNX, "--", "X")}


@styled
def reliability(
    report: ParityReport, members: Sequence[UncertaintyReport] | None = None
) -> Chart | None:
    """Do the claimed ellipses hold as many true positions as they say, and how large are they?

    Left the reliability diagram: the share of true positions in the ellipse of each probability;
    on the diagonal a claim is honest, below it too narrow. The band is where an honest model of
    independent samples lies with 95 %, probability by probability. Right the distribution of
    the localization error, beside the one that it would have if the ONNX model's claims were true,
    and of the radius of its 90 % ellipses: the further left, the sharper. None without labels or
    without predicted deviations.

    Args:
        report: With the figures of both models.
        members: Those of an ensemble's members, drawn thin.
    """
    calibrated = [(r, r.calibration) for r in report.uncertainty if r.calibration is not None]
    onnx = next(((r, c) for r, c in calibrated if r.who == "ONNX"), None)
    if onnx is None:
        return None
    alone = [(r, r.calibration) for r in members or () if r.calibration is not None]
    title = _answer(*onnx)
    subtitle = (
        f"{name(report.source, 60)}, {count_of(onnx[0].samples, 'labelled sample')} · "
        f"calibration error {number(onnx[1].calibration_error)}, negative log-likelihood "
        f"{number(onnx[1].nll, 3)} nats"
    )
    figure = new_figure(title, subtitle, height=3.9)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    _draw_diagram(left, calibrated, alone, onnx[0].samples)
    _draw_distributions(right, calibrated, onnx[1])
    alt = " ".join(_described(r, c) for r, c in (*calibrated, *alone))
    return Chart(figure, title, alt)


def _answer(report: UncertaintyReport, calibration: Calibration) -> str:
    coverage = calibration.coverage_of(GATED)
    found = f"The {share(GATED)} ellipse holds {share(coverage.observed)} of the true positions"
    if calibration.nonfinite:
        return (
            f"{found}; {calibration.nonfinite:,} of {count_of(report.samples, 'sample')} without "
            "a usable position or claim"
        )
    ends = f"({share(coverage.low)} to {share(coverage.high)})"
    if coverage.verdict == "as claimed":
        return f"{found} {ends}, which does not contradict its claim"
    return f"{found} {ends}: {coverage.verdict}"


def _described(report: UncertaintyReport, calibration: Calibration) -> str:
    held = ", ".join(
        f"{share(c.nominal)} ellipse {share(c.observed)} ({share(c.low)} to {share(c.high)})"
        for c in calibration.coverage
    )
    return (
        f"{report.who}: median error {distance(report.median_m)}, 95th percentile "
        f"{distance(report.p95_m)}; {held}; median radius of the 90% ellipse "
        f"{distance(calibration.radius_p50_m)}, negative log-likelihood "
        f"{number(calibration.nll, 3)} nats."
    )


def _draw_diagram(
    axes: Axes,
    calibrated: Sequence[tuple[UncertaintyReport, Calibration]],
    alone: Sequence[tuple[UncertaintyReport, Calibration]],
    samples: int,
) -> None:
    from scipy import stats

    claimed = 100 * np.array(NOMINAL)
    tail = (1 - CONFIDENCE) / 2
    low, high = (100 * stats.binom.ppf(q, samples, NOMINAL) / samples for q in (tail, 1 - tail))
    axes.fill_between(
        claimed, low, high, color=Color.INK, alpha=0.1, lw=0, label="honest, 95%", gid="band"
    )
    axes.plot([0, 100], [0, 100], color=Color.INK, lw=1, ls=":", gid="diagonal")
    for index, (_, calibration) in enumerate(alone):
        axes.plot(
            claimed,
            100 * np.array(calibration.reliability),
            color=Color.QUIET,
            lw=0.8,
            alpha=0.7,
            label=None if index else "members",
            gid=f"member {index + 1}",
        )
    for report, calibration in calibrated:
        color, style, marker = _STYLES[report.who]
        axes.plot(
            claimed,
            100 * np.array(calibration.reliability),
            color=color,
            ls=style,
            label=report.who,
            gid=report.who,
        )
        if report.who == "ONNX":
            _mark_coverage(axes, calibration, color, marker)
    axes.set(xlim=(0, 100), ylim=(0, 100), aspect="equal", anchor="N")
    axes.set(xlabel="probability claimed (%)", ylabel="true positions inside (%)")
    axes.set_title("Reliability")
    axes.text(94, 4, "overconfident", ha="right", va="bottom", size=9, color=Color.QUIET)
    axes.text(4, 96, "underconfident", ha="left", va="top", size=9, color=Color.QUIET)
    _legend(axes)


def _mark_coverage(axes: Axes, calibration: Calibration, color: str, marker: str) -> None:
    for coverage in calibration.coverage:
        middle = 100 * coverage.observed
        ends = [[middle - 100 * coverage.low], [100 * coverage.high - middle]]
        axes.errorbar(
            100 * coverage.nominal,
            middle,
            yerr=ends,
            fmt=marker,
            color=color,
            lw=1.2,
            zorder=4,
            gid=f"coverage {coverage.nominal:g}",
            clip_on=False,
        )


def _draw_distributions(
    axes: Axes,
    calibrated: Sequence[tuple[UncertaintyReport, Calibration]],
    claims: Calibration,
) -> None:
    errors = [error for report, _ in calibrated for error in report.error_quantiles_m]
    values = np.array([*errors, *claims.radius_quantiles_m, *claims.claimed_error_quantiles_m])
    drawn = values[np.isfinite(values) & (values > 0)]
    factor, unit = metre_scale(float(np.median(drawn)) if drawn.size else 1.0)
    # At the lowest ranks a few lucky answers would take half of the axis.
    low = float(np.quantile(drawn, 0.02)) / factor if drawn.size else 0.5
    high = float(drawn.max()) / factor if drawn.size else 2.0
    for report, _ in calibrated:
        color, style, _ = _STYLES[report.who]
        _curve(axes, report.error_quantiles_m, factor, f"error, {report.who}", color, style)
    for quantiles, label, style in (
        (claims.claimed_error_quantiles_m, "error as claimed", "-."),
        (claims.radius_quantiles_m, "radius of 90% ellipse", ":"),
    ):
        _curve(axes, quantiles, factor, label, Color.INK, style)
    axes.set(xscale="log", xlim=(low / 1.15, high * 1.15), ylim=(0, 100))
    log_axis(axes.xaxis)
    axes.set(xlabel=f"distance ({unit})", ylabel="samples at or below (%)")
    axes.set_title("Error and claim")
    _legend(axes)


def _curve(
    axes: Axes, quantiles: Sequence[float], factor: float, label: str, color: str, style: str
) -> None:
    values = np.array(quantiles) / factor
    finite = np.isfinite(values)
    ranks = 100 * np.array(NOMINAL)
    axes.plot(values[finite], ranks[finite], color=color, ls=style, label=label, gid=label)


def _legend(axes: Axes) -> None:
    legend_below(axes, 0.19, ncols=2, handlelength=1.8)
