"""Every table of a release's report, each made from the dataclass of its step.

Those whose rows have names of their own stand in ``tables.md.j2``; the others are made here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from IPython.display import Markdown

from heimdall_onnx.archive.record import RegisteredRelease, Skipped, UploadedRelease
from heimdall_onnx.common.parameters import FP32
from heimdall_onnx.common.templates import inert_macros
from heimdall_onnx.common.text import (
    apart,
    distance,
    escape_markdown,
    markdown_table,
    number,
    share,
)
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.latency.benchmark import LatencyReport, PairLatency
from heimdall_onnx.evidence.latency.contenders import ContenderLatency
from heimdall_onnx.evidence.latency.statistics import (
    Speedup,
    Throughput,
    offline_throughput,
)
from heimdall_onnx.evidence.parity.ground import MIDDLE
from heimdall_onnx.evidence.parity.report import THIS_PROCESS, ParityReport
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.evidence.parity.uncertainty import REPORTED, UncertaintyReport
from heimdall_onnx.evidence.quality.contract import Judged
from heimdall_onnx.evidence.variants.tuning import LATENCY, THROUGHPUT

if TYPE_CHECKING:
    from pydantic import BaseModel

    from heimdall_onnx.common.environment import Environment
    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.evidence.costs import StepCost
    from heimdall_onnx.evidence.latency.figures import MemberFigures
    from heimdall_onnx.evidence.parity.departure import Departure
    from heimdall_onnx.evidence.variants.roofline import Roofline
    from heimdall_onnx.evidence.variants.search import JudgedVariant, VariantsReport
    from heimdall_onnx.model.checkpoint import LoadedModel
    from heimdall_onnx.model.onnx.export import ExportResult
    from heimdall_onnx.model.onnx.validate import ModelInfo


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markdown:
    """A Markdown table; every cell that is not Markdown of our own is shown as inert text."""
    first, *others = (
        [c.data if isinstance(c, Markdown) else escape_markdown(str(c)) for c in row]
        for row in (head, *rows)
    )
    return Markdown(markdown_table(first, others))


@functools.cache
def _templates() -> object:
    filters: dict[str, Callable[..., object]] = {
        "apart": apart,
        "megabytes": _megabytes,
        "offline": offline_throughput,
        "percentile": percentile_text,
        "ratio": _ratio_text,
        "shape": lambda shape: f"({', '.join(map(str, shape))})",
        "throughput": _throughput_text,
    }
    return inert_macros(Path(__file__).with_suffix(".md.j2"), filters)


def _from_template(name: str, *values: object) -> Markdown:
    return Markdown(getattr(_templates(), name)(*values).strip())


def __getattr__(name: str) -> Callable[..., None]:
    # Notebooks of earlier releases, which are run again long after, show these.
    if name in {"resolution_table", "variant_parity_table"}:
        return lambda *_: None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# What goes in.


def parameters_table(parameters: BaseModel) -> Markdown:
    """Every parameter with its value."""
    return table(("parameter", "value"), parameters.model_dump(mode="json").items())


def checkpoint_table(loaded: LoadedModel) -> Markdown:
    """The model that was loaded and the file it came from.

    Raises:
        DataError: If it declares no signature, and none is found.
    """
    # Here, since IPython can't show an error out of a template.
    _ = loaded.signature
    return _from_template("checkpoint", loaded, sum(p.numel() for p in loaded.model.parameters()))


def evaluation_table(data: EvaluationData) -> Markdown:
    """The evaluation inputs and where they come from."""
    return _from_template("evaluation", data)


def export_table(exported: ExportResult) -> Markdown:
    """The file that was written."""
    return _from_template("export", exported)


def validation_table(info: ModelInfo) -> Markdown:
    """What the file says of itself."""
    return _from_template("validation", info)


# Parity.


def parity_table(report: ParityReport) -> Markdown:
    """Error statistics per output over the whole evaluation data."""
    labels = {
        "elements": "count",
        "mean (MAE)": "mean",
        "median": "p50",
        "p99": "p99",
        "p99.9": "p999",
        "maximum": "maximum",
        "ULP, median": "ulp_p50",
        "ULP, p99.9": "ulp_p999",
        "1 − cosine": "cosine",
        "beyond tolerance": "violations",
        "left open by PyTorch's own rounding": "left_open",
        "NaN or Inf on one side": "nonfinite_mismatches",
    }
    head = ("absolute error", *(f"{o.output} ({o.unit or 'no unit'})" for o in report.evaluation))
    rows = [(what, *(value_text(o, n) for o in report.evaluation)) for what, n in labels.items()]
    found = table(head, rows)
    notes = list(map(escape_markdown, report.notes))
    if report.evaluated_by != THIS_PROCESS:
        notes.append(f"Evaluated by {report.evaluated_by}.")
    return Markdown("\n\n".join([found.data, *notes]))


def value_text(statistics: ErrorStatistics, name: str) -> str:
    """One statistic of an output's error."""
    value = getattr(statistics, name)
    if name == "cosine":
        return f"{1 - value:.2g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


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


def quality_table(parity: ParityReport) -> Markdown:
    """What the ONNX model loses in its task beside the PyTorch model, by each metric."""
    if not parity.quality:
        return Markdown(
            "What is true of the samples is not known (arrays `labels` or `positions` in the "
            "evaluation data): how good the answers are in their task, and whether a variant or "
            "another version is worse, can't be judged."
        )
    head = ("metric", "PyTorch", "ONNX", "loss", "may be lost", "is", "samples", "interval by")
    rows = [
        (
            judged.metric,
            number(judged.reference, 4),
            number(judged.value, 4),
            _loss_text(judged),
            judged.said(judged.max_loss),
            judged.missing or judged.outcome,
            f"{judged.samples:,}{judged.grouped}",
            judged.method,
        )
        for judged in parity.quality
    ]
    return table(head, rows)


def _loss_text(judged: Judged) -> str:
    ends = " to ".join(map(judged.said, (judged.low, judged.high)))
    return f"{judged.said(judged.loss)} ({ends}, each with {100 * judged.confidence:.3g}%)"


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


def departure_table(report: ParityReport, departure: Departure | None) -> Markdown:
    """The first module whose output differs, if parity failed."""
    return _from_template("departure", report, departure)


# Latency.


@unless_not_measured
def latency_table(report: LatencyReport) -> Markdown:
    """Latency of both contenders with intervals, and what stands beside it."""
    return _from_template("latency", report, report.pytorch, report.onnx)


@unless_not_measured
def pair_table(report: PairLatency) -> Markdown:
    """Latency of two ONNX models that took turns, the one in the ratio's denominator first."""
    return _from_template("pair", report, report.second, report.first)


@unless_not_measured
def member_table(found: MemberFigures | None) -> Markdown | None:
    """What an ensemble costs beside one of its members; None for a model without members."""
    return found and _from_template("member", found, *found.latency.contenders)


@unless_not_measured
def machine_table(report: PairLatency) -> Markdown:
    """Which machine it was, and what it did while latency was measured on it."""
    cores = report.cores if isinstance(report, LatencyReport) else None
    return _from_template("machine", report.machine, cores)


def _ratio_text(speedup: Speedup, places: int = 2) -> str:
    ends = f"{speedup.low:.{places}f} to {speedup.high:.{places}f}"
    return f"{speedup.ratio:.{places}f} ({ends})"


def _throughput_text(found: Throughput) -> str:
    return f"{found.samples_per_second:,.1f} ({found.low:,.1f} to {found.high:,.1f})"


def percentile_text(contender: ContenderLatency, wanted: float) -> str:
    """A percentile of the latency with its interval, or that too few calls show it."""
    found = contender.percentile(wanted)
    if found is None:
        return "too few calls"
    value, low, high = (number(ms, 3) for ms in (found.value_ms, found.low_ms, found.high_ms))
    return f"{value} ({low} to {high})"


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f}" if size_bytes >= 1e6 else number(size_bytes / 1e6)


# Variants.


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
        "loss in the task",
    )
    order = sorted(report.judged, key=lambda v: (v.name != report.recommended, not v.passed))
    found = table(head, [tuple(_variant_row(report, variant)) for variant in order])
    best = _ratio_text(report.against_pytorch.speedup).replace(" ", "× PyTorch ", 1)
    said = f"**{report.recommended}** is recommended: {best}, {report.best.what}."
    reasons = [f"{v.name}, {v.status}: {v.reason}" for v in order if not v.passed]
    reasons += [
        f"{v.name} keeps in float: {', '.join(v.kept_in_float)}" for v in order if v.kept_in_float
    ]
    listed = "\n".join(f"- {escape_markdown(reason)}" for reason in reasons)
    return Markdown("\n\n".join(filter(None, (said, found.data, listed))))


def _variant_row(report: VariantsReport, variant: JudgedVariant) -> Iterator[str]:
    yield variant.name + (", recommended" if variant.name == report.recommended else "")
    yield variant.status
    yield _megabytes(variant.size_bytes) if variant.size_bytes else "–"
    measured, accuracy = variant.latency, variant.accuracy
    if measured is None:
        yield from ("–",) * 4
    else:
        own = measured.on_device_ms
        apart = "" if own is None else f", {number(own, 3)} without the way to the GPU and back"
        yield percentile_text(measured.second, 50.0) + apart
        yield "1" if variant.name == FP32 else _ratio_text(measured.speedup)
        yield _throughput_text(measured.throughput[1])
        yield f"{measured.second.load_ms + measured.second.first_call_ms:,.0f}"
    if accuracy is None:
        yield from ("the reference",) * 2 if variant.name == FP32 else ("–",) * 2
        return
    moved = accuracy.displacement_p99_m
    yield f"noise {max(accuracy.noise):.2g}" if moved is None else distance(moved)
    yield "; ".join(map(_loss, accuracy.quality)) or "no labels"


def _loss(judged: Judged) -> str:
    return f"{judged.metric} {_loss_text(judged)}, {judged.outcome}"


@unless_not_measured
def calibration_table(report: VariantsReport | None) -> Markdown | None:
    """What calibrated and what judged, which are never the same samples."""
    return report and _from_template("calibration", report.calibration, report.limits)


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
                _ratio_text(trial.speedup),
                "yes" if trial.kept else "no",
            )
            for purpose, trials in report.best.tuning.items()
            for trial in trials
        ],
    )


@unless_not_measured
def roofline_table(report: Roofline | None) -> Markdown | None:
    """What the machine reaches, and each run beside the least time that it allows."""
    return report and _from_template("roofline", report)


# What was published.


def upload_table(uploaded: UploadedRelease | Skipped) -> Markdown | Skipped:
    """What lies in the release folder."""
    if isinstance(uploaded, Skipped):
        return uploaded
    return table(
        ("object", "bytes", "SHA-256, read back"),
        [(o.uri, f"{o.size_bytes:,}", o.sha256) for o in uploaded.objects],
    )


def registry_table(registered: RegisteredRelease | Skipped) -> Markdown | Skipped:
    """The version in the registry."""
    if isinstance(registered, Skipped):
        return registered
    return _from_template("registered", registered)


def cost_table(costs: Sequence[StepCost]) -> Markdown:
    """What each step took, longest first, and this process's largest memory meanwhile."""
    total = sum(cost.seconds for cost in costs)
    return table(
        (f"step, of {number(total)} s until here", "seconds", "peak memory, MB"),
        [
            (
                c.step,
                f"{c.seconds:,.1f}",
                _megabytes(c.peak_memory_bytes) if c.peak_memory_bytes else "unknown",
            )
            for c in sorted(costs, key=lambda cost: -cost.seconds)
        ],
    )


def environment_table(environment: Environment) -> Markdown:
    """Versions, processor and code of this run."""
    return _from_template("environment", environment)
