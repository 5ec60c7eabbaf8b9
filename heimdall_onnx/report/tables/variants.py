"""Tables of the variants: how they were made, judged, timed and tuned."""

from __future__ import annotations

from collections.abc import Iterator

from IPython.display import Markdown

from heimdall_onnx.common.parameters import FP32
from heimdall_onnx.common.text import distance, escape_markdown, number
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.variants.roofline import Roofline, RooflineRow
from heimdall_onnx.evidence.variants.search import JudgedVariant, VariantsReport
from heimdall_onnx.evidence.variants.tuning import LATENCY, THROUGHPUT
from heimdall_onnx.report.tables.latency import percentile_text, ratio_text, throughput_text
from heimdall_onnx.report.tables.table import megabytes, table, value_text


@unless_not_measured
def variants_table(report: VariantsReport | None) -> Markdown:
    """Every variant with its size, speed and cost in accuracy, the recommended one first."""
    if report is None:
        return Markdown("No variants were asked for (parameter `variants`).")
    head = (
        "variant",
        "verdict",
        "size, MB",
        f"p50 at batch {report.against_pytorch.batch_size}, ms",
        "× fp32",
        f"samples/s at batch {report.batch_size}",
        "cold start, ms",
        "displacement p99",
        "median error",
        "NLL, nats",
    )
    order = sorted(report.judged, key=lambda v: (v.name != report.recommended, not v.passed))
    found = table(head, [tuple(_variant_row(report, variant)) for variant in order])
    best = report.against_pytorch.speedup
    said = (
        f"**{report.recommended}** is recommended: {best.ratio:.2f}× PyTorch "
        f"({best.low:.2f} to {best.high:.2f}), {report.best.what}."
    )
    reasons = "\n".join(
        f"- {v.name}, {v.status}: {escape_markdown(v.reason)}" for v in order if not v.passed
    )
    return Markdown("\n\n".join(filter(None, (said, found.data, reasons))))


def _variant_row(report: VariantsReport, variant: JudgedVariant) -> Iterator[str]:
    yield variant.name + (", recommended" if variant.name == report.recommended else "")
    yield variant.status
    yield megabytes(variant.size_bytes) if variant.size_bytes else "–"
    measured, accuracy = variant.latency, variant.accuracy
    if measured is None:
        yield from ("–",) * 4
    else:
        own = measured.on_device_ms
        apart = "" if own is None else f", {number(own, 3)} without the way to the GPU and back"
        yield percentile_text(measured.second, 50.0) + apart
        yield "1" if variant.name == FP32 else ratio_text(measured.speedup)
        yield throughput_text(measured.throughput[1])
        yield f"{measured.second.load_ms + measured.second.first_call_ms:,.0f}"
    if accuracy is None:
        yield from ("the reference",) * 3 if variant.name == FP32 else ("–",) * 3
        return
    moved, task, before = accuracy.displacement_p99_m, accuracy.task, accuracy.reference
    yield f"noise {max(accuracy.noise):.2g}" if moved is None else distance(moved)
    if task is None or before is None:
        yield from ("no labels",) * 2
        return
    # A perfect reference can't grow by a share.
    grown = f" ({task.median_m / before.median_m - 1:+.2%})" if before.median_m > 0 else ""
    yield f"{distance(task.median_m)}{grown}"
    if task.nll is None or before.nll is None:
        yield "none predicted"
    else:
        yield f"{task.nll:.4f} ({task.nll - before.nll:+.4f})"


@unless_not_measured
def calibration_table(report: VariantsReport | None) -> Markdown | None:
    """What calibrated and what judged, which are never the same samples."""
    if report is None:
        return None
    split, limits = report.calibration, report.limits
    return table(
        ("judged by", "value"),
        [
            ("calibrated on", f"{split.samples} samples of {split.source}"),
            ("SHA-256 of these", split.sha256),
            ("judged on", f"{split.evaluation.count} other samples of {split.evaluation.source}"),
            ("left out, being among the former", split.left_out),
            ("median and p95 of the error may grow by", f"{limits.error_growth:.1%}"),
            ("negative log-likelihood may grow by", f"{limits.nll_growth:.1%}, or of one nat"),
            ("without labels, p99 of the displacement", f"≤ {limits.displacement_sigma:g} σ"),
            ("without positions, relative error of outputs", f"≤ {limits.output_noise:.1%}"),
        ],
    )


@unless_not_measured
def variant_parity_table(report: VariantsReport | None) -> Markdown | None:
    """Parity of every variant with fp32, output by output; it decides nothing here."""
    if report is None:
        return None
    return table(
        ("variant", "output", "MAE", "p99", "maximum", "1 − cosine", "kept in float"),
        [
            (
                variant.name,
                output.output,
                *(value_text(output, name) for name in ("mean", "p99", "maximum", "cosine")),
                ", ".join(variant.kept_in_float) or "nothing",
            )
            for variant in report.judged
            if variant.accuracy is not None
            for output in variant.accuracy.outputs
        ],
    )


@unless_not_measured
def tuning_table(report: VariantsReport | None) -> Markdown | None:
    """Which session options were tried on the recommended variant, and what they gained."""
    if report is None:
        return None
    sizes = {LATENCY: report.against_pytorch.batch_size, THROUGHPUT: report.batch_size}
    return table(
        (f"options of {report.recommended}", "for", "speedup", "kept"),
        [
            (
                trial.option,
                f"{purpose}, batch {sizes[purpose]}",
                ratio_text(trial.speedup),
                "yes" if trial.kept else "no",
            )
            for purpose, trials in report.best.tuning.items()
            for trial in trials
        ],
    )


@unless_not_measured
def roofline_table(report: Roofline | None) -> Markdown | None:
    """What the machine reaches, and each run beside the least time that it allows."""
    if report is None:
        return None
    machine = report.machine
    reached = table(
        (f"this machine, {machine.threads} threads", "value"),
        [
            ("instruction sets", ", ".join(machine.instruction_sets) or "unknown"),
            ("last-level cache", f"{machine.cache_bytes / 1e6:,.1f} MB"),
            ("reading from memory", f"{machine.bandwidth_gb_s:,.1f} GB/s"),
            *(
                (f"matrix product, {precision}", f"{peak:,.0f} · 10⁹ operations/s")
                for precision, peak in machine.peaks.items()
            ),
            ("operations of the model", f"{number(report.work.flops / 1e9, 3)} · 10⁹ a sample"),
        ],
    )
    head = (
        "variant",
        "multiplies in",
        "batch",
        "MB",
        "latency, ms",
        "floor, ms",
        "set by",
        "latency / floor",
    )
    rows = table(head, [_roofline_row(row) for row in report.rows])
    return Markdown(f"{reached.data}\n\n{rows.data}")


def _roofline_row(row: RooflineRow) -> tuple[object, ...]:
    floor = (
        (number(row.floor.ms, 3), row.floor.bound, f"{row.ratio:.2f}")
        if row.floor
        else ("unknown", f"no peak was measured for {row.precision}", "unknown")
    )
    size = megabytes(row.size_bytes)
    return (row.name, row.precision, row.batch_size, size, number(row.measured_ms, 3), *floor)
