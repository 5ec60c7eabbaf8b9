"""The tables of the report, as Markdown, from the dataclasses of the steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from IPython.display import Markdown
from pydantic import BaseModel

from heimdall_onnx.benchmark import ContenderLatency, LatencyReport, PairLatency
from heimdall_onnx.checkpoint import LoadedModel
from heimdall_onnx.compare import ParityReport
from heimdall_onnx.cores import Cores
from heimdall_onnx.departure import Departure
from heimdall_onnx.ensemble_cost import MemberComparison
from heimdall_onnx.environment import Environment
from heimdall_onnx.evaluation import EvaluationData
from heimdall_onnx.evaluation_pass import THIS_PROCESS
from heimdall_onnx.export import ExportResult
from heimdall_onnx.gates import escape_markdown, unless_not_measured
from heimdall_onnx.ground import MIDDLE
from heimdall_onnx.machine_watch import MachineState
from heimdall_onnx.parameters import FP32
from heimdall_onnx.publish import RegisteredRelease, Skipped, UploadedRelease
from heimdall_onnx.roofline import Roofline, RooflineRow
from heimdall_onnx.signature import Axis, TensorSpec
from heimdall_onnx.single_stream import (
    Throughput,
    early_stopping_estimate,
    min_queries,
    offline_throughput,
)
from heimdall_onnx.stationarity import check_stationarity
from heimdall_onnx.statistics import ErrorStatistics
from heimdall_onnx.uncertainty import REPORTED, UncertaintyReport
from heimdall_onnx.validate import ModelInfo
from heimdall_onnx.variants import JudgedVariant, VariantsReport
from heimdall_onnx.words import distance, number, share


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markdown:
    """A Markdown table; every cell that is not Markdown of our own is shown as inert text."""
    lines = [
        [c.data if isinstance(c, Markdown) else escape_markdown(str(c)) for c in row]
        for row in (head, *rows)
    ]
    lines.insert(1, ["---"] * len(head))
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def parameters_table(parameters: BaseModel) -> Markdown:
    """Every parameter with its value."""
    return table(("parameter", "value"), parameters.model_dump(mode="json").items())


def checkpoint_table(loaded: LoadedModel) -> Markdown:
    """The model that was loaded and the file it came from."""
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return table(
        ("checkpoint", "value"),
        [
            ("file", loaded.path.name),
            ("SHA-256", loaded.sha256),
            *(
                (
                    f"member {i}, as the checkpoint records",
                    f"{member.file}, SHA-256 {member.sha256}",
                )
                for i, member in enumerate(loaded.members, 1)
            ),
            ("layout", loaded.layout),
            ("model", loaded.model_spec),
            ("arguments", loaded.model_kwargs),
            ("parameters", f"{parameters:,}"),
            ("signature declared by", loaded.signature_source),
            *((f"input {i}", _spec(s)) for i, s in enumerate(loaded.signature.inputs, 1)),
            *((f"output {i}", _spec(s)) for i, s in enumerate(loaded.signature.outputs, 1)),
            *((f"axis {i}", _axis(a)) for i, a in enumerate(loaded.signature.dynamic_axes, 1)),
        ],
    )


def evaluation_table(data: EvaluationData) -> Markdown:
    """The evaluation inputs and where they come from."""
    return table(
        ("evaluation data", "value"),
        [
            ("source", data.source),
            ("provenance", data.provenance),
            *((("address", data.dataset.address),) if data.dataset else ()),
            ("SHA-256", data.sha256 or "none: seeded random numbers"),
            ("samples", data.count),
            *(
                (f"input {name}", f"{array.dtype} {shape_text(array.shape)}")
                for name, array in data.inputs.items()
            ),
            ("labelled", "no" if data.positions is None else "yes, true positions are known"),
            ("receivers with a position", ", ".join(data.receivers) or "none"),
        ],
    )


def export_table(exported: ExportResult) -> Markdown:
    """The file that was written."""
    return table(
        ("export", "value"),
        [
            ("exporter", exported.exporter),
            ("opset", exported.opset),
            ("size", f"{megabytes(exported.size_bytes)} MB"),
            ("external data", ", ".join(p.name for p in exported.external_data) or "none"),
            ("SHA-256", exported.sha256),
            ("time", f"{exported.seconds:.1f} s"),
        ],
    )


def validation_table(info: ModelInfo) -> Markdown:
    """What the file says of itself."""
    most = sorted(info.operators.items(), key=lambda item: -item[1])[:8]
    return table(
        ("file", "value"),
        [
            ("opset", info.opset_version),
            ("IR version", info.ir_version),
            ("producer", f"{info.producer_name} {info.producer_version}"),
            ("operators", f"{sum(info.operators.values())}: {counts_text(most)}, …"),
            *(("input", f"{t.name}: {t.dtype} {shape_text(t.shape)}") for t in info.inputs),
            *(("output", f"{t.name}: {t.dtype} {shape_text(t.shape)}") for t in info.outputs),
            ("signature", "; ".join(info.signature_problems) or "as declared"),
        ],
    )


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
                ", ".join(f"{v:.7g}" for v in w.reference),
                ", ".join(f"{v:.7g}" for v in w.value),
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
    return table(
        ("first departing module", departure.scope or "the model itself"),
        [
            ("type", departure.module_type),
            ("largest error", f"{departure.max_abs_error:.3g}"),
            ("largest magnitude", f"{departure.reference_magnitude:.3g}"),
            ("PyTorch there", f"{departure.pytorch_value:.7g}"),
            ("ONNX there", f"{departure.onnx_value:.7g}"),
            ("operators around it", ", ".join(departure.operators)),
            ("inputs", report.worst_where),
        ],
    )


@unless_not_measured
def latency_table(report: LatencyReport) -> Markdown:
    """Latency of both contenders with intervals, and what stands beside it."""
    both = (report.pytorch, report.onnx)
    wanted = sorted({p.percentile for c in both for p in c.percentiles})
    return table(
        (f"batch {report.batch_size}, {report.threads} threads", *(c.name for c in both)),
        [
            *((f"p{p:g}, ms", *(percentile_text(c, p) for c in both)) for p in wanted),
            ("p90 after MLPerf's single stream, 99% confidence, ms", *map(_single_stream, both)),
            ("mean, ms", *(f"{c.mean_ms:.2f}" for c in both)),
            ("counted calls", *(c.samples_ms.size for c in both)),
            ("loading the model, ms", *(f"{c.load_ms:.0f}" for c in both)),
            ("first call, ms", *(f"{c.first_call_ms:.1f}" for c in both)),
            *(
                (
                    f"samples per second at batch {batch.batch_size}",
                    *(
                        throughput_text(offline_throughput(ms, batch.batch_size))
                        for ms in (batch.pytorch_ms, batch.onnx_ms)
                    ),
                )
                for batch in report.batches
            ),
            (
                "peak memory of the process, MB",
                *(f"{c.peak_memory_bytes / 1e6:,.0f}" for c in both),
            ),
            (
                f"speedup ({report.confidence:.0%} interval)",
                "1",
                f"{report.speedup.ratio:.2f} ({report.speedup.low:.2f} to "
                f"{report.speedup.high:.2f}), {report.speedup.pairs} pairs of blocks",
            ),
            ("stationary", *map(_steadiness, both)),
        ],
    )


@unless_not_measured
def pair_table(report: PairLatency) -> Markdown:
    """Latency of two ONNX models that took turns, the one in the ratio's denominator first."""
    both, ratio = (report.second, report.first), report.speedup
    wanted = sorted({p.percentile for c in both for p in c.percentiles})
    return table(
        (f"batch {report.batch_size}", *(c.name for c in both)),
        [
            *((f"p{p:g}, ms", *(percentile_text(c, p) for c in both)) for p in wanted),
            ("mean, ms", *(f"{c.mean_ms:.2f}" for c in both)),
            ("counted calls", *(c.samples_ms.size for c in both)),
            ("loading the model, ms", *(f"{c.load_ms:.0f}" for c in both)),
            ("first call, ms", *(f"{c.first_call_ms:.1f}" for c in both)),
            (
                "peak memory of the process, MB",
                *(f"{c.peak_memory_bytes / 1e6:,.0f}" for c in both),
            ),
            (
                f"latency beside {both[0].name} (95% interval)",
                "1",
                f"{ratio.ratio:.3f} ({ratio.low:.3f} to {ratio.high:.3f}), {ratio.pairs} pairs of "
                "blocks",
            ),
            ("stationary", *map(_steadiness, both)),
        ],
    )


@unless_not_measured
def member_table(found: MemberComparison | None) -> Markdown | None:
    """What an ensemble costs beside one of its members; None for a model without members."""
    if found is None:
        return None
    latency, sides = found.latency, found.sides
    ratio = latency.speedup
    return table(
        (f"batch {latency.batch_size}", *(side.name for side in sides)),
        [
            ("networks", found.members, 1),
            ("p50, ms", *(percentile_text(side, 50.0) for side in sides)),
            (
                "latency beside the single member",
                f"{ratio.ratio:.2f} ({ratio.low:.2f} to {ratio.high:.2f}), {ratio.pairs} pairs of "
                "blocks",
                "1",
            ),
            ("loading the model, ms", *(f"{side.load_ms:.0f}" for side in sides)),
            (
                "peak memory of the process, MB",
                *(f"{side.peak_memory_bytes / 1e6:,.0f}" for side in sides),
            ),
            (
                "size of the file, MB",
                *(f"{size / 1e6:,.1f}" for size in (found.size_bytes, found.member_size_bytes)),
            ),
        ],
    )


@unless_not_measured
def machine_table(report: LatencyReport | PairLatency | MachineState | None) -> Markdown:
    """Which machine it was, and what it did while latency was measured on it.

    Notebooks of older versions give the state alone.
    """
    state = report.machine if isinstance(report, LatencyReport | PairLatency) else report
    rows = [*_machine_rows(state)]
    if isinstance(report, LatencyReport):
        rows = [*_core_rows(report.cores), *rows]
    if not rows:
        return Markdown("The machine was not watched.")
    return table(("machine", "while it was measured"), rows)


def _core_rows(cores: Cores | None) -> Iterator[tuple[str, str]]:
    if cores is None:
        return
    yield "measured on", str(cores)
    yield (
        "exclusively ours",
        "yes, held against other measurements"
        if cores.exclusive
        else "not held: other measurements may have run there (parameter `exclusive_cores`)",
    )


def _machine_rows(machine: MachineState | None) -> Iterator[tuple[str, str]]:
    if machine is None:
        return
    yield "watched", f"{machine.seconds:.1f} s"
    yield (
        "load average before and after",
        f"{machine.load_before:.2f} and {machine.load_after:.2f}",
    )
    frequency = machine.frequency_mhz
    yield (
        "processor frequency, MHz",
        "the machine does not tell"
        if frequency is None
        else "median {1:,.0f} ({0:,.0f} to {2:,.0f})".format(*frequency),
    )
    yield (
        "processors busy, with everything that ran",
        _share(machine.busy_share, "watched too shortly"),
    )
    yield (
        "taken by other virtual machines (steal)",
        _share(machine.steal_share, "the system does not count it"),
    )
    yield (
        "periods held back by a CPU quota",
        "the system does not count them" if machine.throttled is None else f"{machine.throttled:,}",
    )
    for gpu in machine.gpus or ():
        clocks, powers = (
            " and ".join("not told" if value is None else f"{value:,.0f}" for value in pair)
            for pair in (gpu.sm_clock_mhz, gpu.power_w)
        )
        yield f"GPU {gpu.index} before and after", f"SM clock {clocks} MHz, power {powers} W"


def _share(share: float | None, unknown: str) -> str:
    return unknown if share is None else f"{share:.1%}"


def _single_stream(contender: ContenderLatency) -> str:
    found = early_stopping_estimate(contender.samples_ms)
    if found is None:
        return f"too few calls, {min_queries()} needed"
    return f"{found.value_ms:.2f} ({found.discarded} slowest of {found.queries} left out)"


def _steadiness(contender: ContenderLatency) -> str:
    found = check_stationarity(contender.samples_ms, contender.blocks)
    return "too few calls" if found is None else found.sentence


def throughput_text(found: Throughput) -> str:
    """Samples per second with their interval."""
    return f"{found.samples_per_second:,.1f} ({found.low:,.1f} to {found.high:,.1f})"


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
        speedup = measured.speedup
        inside = measured.on_device_ms
        apart = "" if inside is None else f", {inside:.2f} without the way to the GPU and back"
        yield percentile_text(measured.second, 50.0) + apart
        yield (
            "1"
            if variant.name == FP32
            else f"{speedup.ratio:.2f} ({speedup.low:.2f} to {speedup.high:.2f})"
        )
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
    return table(
        (f"options of {report.recommended}", "for", "speedup", "kept"),
        [
            (
                trial.option,
                f"{tuning.purpose}, batch {tuning.batch_size}",
                f"{trial.speedup.ratio:.2f} ({trial.speedup.low:.2f} to {trial.speedup.high:.2f})",
                "yes" if trial.kept else "no",
            )
            for tuning in report.best.tunings
            for trial in tuning.trials
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
            ("operations of the model", f"{fixed(report.work.flops / 1e9)} · 10⁹ a sample"),
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
        (fixed(row.floor.ms), row.floor.bound, f"{row.ratio:.2f}")
        if row.floor
        else ("unknown", f"no peak was measured for {row.precision}", "unknown")
    )
    size = megabytes(row.size_bytes)
    return (row.name, row.precision, row.batch_size, size, f"{row.measured_ms:.2f}", *floor)


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
    return table(
        ("registered model", registered.model_name),
        [("version", registered.model_version), ("source", registered.source)],
    )


def environment_table(environment: Environment) -> Markdown:
    """Versions, processor and code of this run."""
    return table(
        ("environment", "value"),
        [
            ("Python", environment.python),
            ("system", environment.system),
            ("processor", f"{environment.cpu}, {environment.processors} in use"),
            ("instruction sets", ", ".join(environment.instruction_sets) or "unknown"),
            ("commit", environment.git_commit or "not a git checkout"),
            (
                "uncommitted changes",
                {True: "yes", False: "no", None: "unknown"}[environment.git_dirty],
            ),
            *environment.packages.items(),
        ],
    )


def value_text(statistics: ErrorStatistics, name: str) -> str:
    """One statistic of an output's error."""
    value = getattr(statistics, name)
    if name == "cosine":
        return f"{1 - value:.2g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def percentile_text(contender: ContenderLatency, wanted: float) -> str:
    """A percentile of the latency with its interval, or that too few calls show it."""
    found = contender.percentile(wanted)
    if found is None:
        return "too few calls"
    return f"{found.value_ms:.2f} ({found.low_ms:.2f} to {found.high_ms:.2f})"


def _spec(spec: TensorSpec) -> str:
    parts = [spec.describe()]
    if spec.unit:
        parts.append(spec.unit)
    if spec.range:
        parts.append(f"in [{spec.range[0]:g}, {spec.range[1]:g}]")
    if spec.masks:
        parts.append(f"where true, {', '.join(spec.masks)} are masked")
    if spec.sigma_of:
        parts.append(f"standard deviation of {spec.sigma_of}")
    if spec.log_variance_of:
        parts.append(f"logarithm of the variance of {spec.log_variance_of}")
    return ", ".join(parts)


def _axis(axis: Axis) -> str:
    order = ", in any order" if axis.permutable else ""
    return f"{axis.name}: dynamic, tried at {', '.join(map(str, sorted(axis.lengths)))}{order}"


def megabytes(size_bytes: int) -> str:
    """A size in megabytes."""
    return f"{size_bytes / 1e6:,.1f}" if size_bytes >= 1e6 else number(size_bytes / 1e6)


def fixed(value: float) -> str:
    """A number with two places, or significant digits where it is small."""
    return f"{value:,.2f}" if value >= 0.1 else number(value)


def shape_text(shape: Sequence[int | str]) -> str:
    """A shape as a tuple."""
    return f"({', '.join(map(str, shape))})"


def counts_text(counts: Iterable[tuple[str, int]]) -> str:
    """Counts with what they count."""
    return ", ".join(f"{count} {name}" for name, count in counts)
