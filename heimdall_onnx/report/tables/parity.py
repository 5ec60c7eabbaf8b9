"""Tables of parity: errors, worst samples, uncertainty, resolution, departure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from IPython.display import Markdown

from heimdall_onnx.common.text import apart, escape_markdown, number, share
from heimdall_onnx.evidence.parity.departure import Departure
from heimdall_onnx.evidence.parity.ground import MIDDLE
from heimdall_onnx.evidence.parity.report import THIS_PROCESS, ParityReport
from heimdall_onnx.evidence.parity.uncertainty import REPORTED, UncertaintyReport
from heimdall_onnx.report.tables.table import table, value_text


def parity_table(report: ParityReport) -> Markdown:
    """Error statistics per output over the whole evaluation data."""
    labels: list[tuple[str, str]] = [
        ("elements", "count"),
        ("mean (MAE)", "mean"),
        ("median", "p50"),
        ("p99", "p99"),
        ("p99.9", "p999"),
        ("maximum", "maximum"),
        ("ULP, median", "ulp_p50"),
        ("ULP, p99.9", "ulp_p999"),
        ("1 − cosine", "cosine"),
        ("beyond tolerance", "violations"),
        ("NaN or Inf on one side", "nonfinite_mismatches"),
    ]
    head = ("absolute error", *(f"{o.output} ({o.unit or 'no unit'})" for o in report.evaluation))
    found = table(
        head, [(label, *(value_text(o, name) for o in report.evaluation)) for label, name in labels]
    )
    if report.evaluated_by == THIS_PROCESS:
        return found
    return Markdown(f"{found.data}\n\nEvaluated by {report.evaluated_by}.")


def worst_table(report: ParityReport) -> Markdown:
    """The evaluation samples that differ most in units of what is allowed there."""
    sharded = any(w.shard for o in report.evaluation for w in o.worst)
    return table(
        (
            *("output", "sample", *(("shard",) if sharded else ())),
            *("error", "× what is allowed", "PyTorch", "ONNX"),
        ),
        [
            (
                o.output,
                w.sample,
                *((w.shard,) if sharded else ()),
                f"{w.error:.3g}",
                f"{w.excess:.3g}",
                *map(", ".join, zip(*map(apart, w.reference, w.value), strict=True)),
            )
            for o in report.evaluation
            for w in o.worst[:4]
        ],
    )


def uncertainty_table(
    parity: ParityReport, members: Sequence[UncertaintyReport] | None = None
) -> Markdown:
    """Localization error and worth of the claimed uncertainty, of each model and member."""
    if not parity.uncertainty:
        return Markdown(
            "No true positions, or no positions predicted: how far off the answers are, and "
            "whether the claimed uncertainty is honest, is not known."
        )
    constant = [task for task in parity.ground.task if task.who == MIDDLE] if parity.ground else []
    shown = (*parity.uncertainty, *(members or ()))
    said = [
        f"{report.who}: assessed on {report.samples:,} evenly spaced samples of these."
        for report in members or ()
        if report.samples < parity.uncertainty[0].samples
    ]
    said += [
        f"{report.who}: {report.calibration.nonfinite:,} of {report.samples:,} samples have no "
        "usable position or deviations; no ellipse holds them."
        for report in shown
        if report.calibration is not None and report.calibration.nonfinite
    ]
    found = table(
        (
            f"{parity.uncertainty[0].samples:,} labelled samples",
            "median error, m",
            "p95, m",
            *(f"{share(p)} ellipse holds" for p in REPORTED),
            "calibration error",
            "NLL, nats",
            "median radius of the 90% ellipse, m",
            "RMS of residual/σ, latitude and longitude",
        ),
        [
            *(tuple(_uncertainty_row(report)) for report in shown),
            *(
                (task.who, number(task.median_m, 3), number(task.p95_m, 3), *("–",) * 7)
                for task in constant
            ),
        ],
    )
    return Markdown("\n\n".join((found.data, *said)))


def _uncertainty_row(report: UncertaintyReport) -> Iterator[str]:
    yield from (report.who, number(report.median_m, 3), number(report.p95_m, 3))
    calibration = report.calibration
    if calibration is None:
        yield from ("none predicted",) * 7
        return
    yield from map(str, calibration.coverage)
    yield from (
        f"{calibration.calibration_error:.3f}",
        f"{calibration.nll:.4f}",
        number(calibration.radius_p50_m, 3),
        ", ".join(f"{z:.2f}" for z in calibration.z_rms),
    )


def resolution_table(parity: ParityReport) -> Markdown | None:
    """What one ULP and the tolerance mean on the ground; None without positions."""
    found = parity.ground.resolution if parity.ground else None
    if found is None:
        return None
    return table(
        (f"at {found.place[0]:.2f}°, {found.place[1]:.2f}°", "of latitude, m", "of longitude, m"),
        [
            (f"one ULP of {found.dtype}", *(number(m) for m in found.ulp_m)),
            (
                f"tolerance, {found.tolerance_degrees:g}°",
                *(number(m) for m in found.tolerance_m),
            ),
        ],
    )


def departure_table(report: ParityReport, departure: Departure | None) -> Markdown:
    """The first module whose output differs, if parity failed."""
    if all(gate.passed for gate in report.gates()):
        return Markdown("Every parity gate holds: there is no departure to look for.")
    if departure is None:
        return Markdown(
            f"**No module departs** on {escape_markdown(report.worst_where)} with ONNX Runtime's "
            "graph optimizations off. Look for a fault in a fusion, for rows that influence each "
            "other, or for a difference too small to be told from rounding inside the network."
        )
    pytorch, onnx = apart(departure.pytorch_value, departure.onnx_value)
    return table(
        ("first departing module", departure.scope or "the model itself"),
        [
            ("type", departure.module_type),
            ("largest error", f"{departure.max_abs_error:.3g}"),
            ("largest magnitude", f"{departure.reference_magnitude:.3g}"),
            ("PyTorch there", pytorch),
            ("ONNX there", onnx),
            ("operators around it", ", ".join(departure.operators)),
            ("inputs", report.worst_where),
        ],
    )
