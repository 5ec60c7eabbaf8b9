"""The tables of the report, as Markdown, from the dataclasses of the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from IPython.display import Markdown

from heimdall_onnx.benchmark import ContenderLatency, LatencyReport
from heimdall_onnx.checkpoint import LoadedModel
from heimdall_onnx.compare import ParityReport
from heimdall_onnx.departure import Departure
from heimdall_onnx.environment import Environment
from heimdall_onnx.evaluation import EvaluationData
from heimdall_onnx.export import ExportResult
from heimdall_onnx.gates import escape_markdown
from heimdall_onnx.parameters import ReleaseParameters
from heimdall_onnx.publish import RegisteredRelease, Skipped, UploadedRelease
from heimdall_onnx.signature import TensorSpec
from heimdall_onnx.statistics import ErrorStatistics
from heimdall_onnx.validate import ModelInfo


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Markdown:
    """A Markdown table; every cell is shown as inert text."""
    lines = [[escape_markdown(str(cell)) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines))


def parameters_table(parameters: ReleaseParameters) -> Markdown:
    """Every parameter with its value."""
    return table(("parameter", "value"), parameters.model_dump(mode="json").items())


def checkpoint_table(loaded: LoadedModel) -> Markdown:
    """The model that was loaded and the file it came from."""
    parameters = sum(p.numel() for p in loaded.model.parameters())
    return table(
        ("checkpoint", ""),
        [
            ("file", loaded.path.name),
            ("SHA-256", loaded.sha256),
            ("layout", loaded.layout),
            ("model", loaded.model_spec),
            ("arguments", loaded.model_kwargs),
            ("parameters", f"{parameters:,}"),
            *((f"input {i}", _spec(s)) for i, s in enumerate(loaded.signature.inputs, 1)),
            *((f"output {i}", _spec(s)) for i, s in enumerate(loaded.signature.outputs, 1)),
        ],
    )


def evaluation_table(data: EvaluationData) -> Markdown:
    """The evaluation inputs and where they come from."""
    return table(
        ("evaluation data", ""),
        [
            ("source", data.source),
            ("provenance", data.provenance),
            ("SHA-256", data.sha256 or "none: seeded random numbers"),
            ("samples", data.count),
            ("labelled", "no" if data.positions is None else "yes, true positions are known"),
            ("receivers with a position", ", ".join(data.receivers) or "none"),
        ],
    )


def export_table(exported: ExportResult) -> Markdown:
    """The file that was written."""
    return table(
        ("export", ""),
        [
            ("exporter", exported.exporter),
            ("opset", exported.opset),
            ("size", f"{exported.size_bytes / 1e6:,.1f} MB"),
            ("external data", ", ".join(p.name for p in exported.external_data) or "none"),
            ("SHA-256", exported.sha256),
            ("time", f"{exported.seconds:.1f} s"),
        ],
    )


def validation_table(info: ModelInfo) -> Markdown:
    """What the file says of itself."""
    most = sorted(info.operators.items(), key=lambda item: -item[1])[:8]
    return table(
        ("file", ""),
        [
            ("opset", info.opset_version),
            ("IR version", info.ir_version),
            ("producer", f"{info.producer_name} {info.producer_version}"),
            ("operators", f"{sum(info.operators.values())}: {_counts(most)}, …"),
            *(("input", f"{t.name}: {t.dtype} {_shape(t.shape)}") for t in info.inputs),
            *(("output", f"{t.name}: {t.dtype} {_shape(t.shape)}") for t in info.outputs),
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
    return table(
        head, [(label, *(_value(o, name) for o in report.evaluation)) for label, name in labels]
    )


def worst_table(report: ParityReport) -> Markdown:
    """The evaluation samples with the largest errors."""
    return table(
        ("output", "sample", "largest error", "PyTorch", "ONNX"),
        [
            (
                o.output,
                w.sample,
                f"{w.error:.3g}",
                ", ".join(f"{v:.7g}" for v in w.reference),
                ", ".join(f"{v:.7g}" for v in w.value),
            )
            for o in report.evaluation
            for w in o.worst[:4]
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


def latency_table(report: LatencyReport) -> Markdown:
    """Latency of both contenders with intervals, and what stands beside it."""
    both = (report.pytorch, report.onnx)
    wanted = sorted({p.percentile for c in both for p in c.percentiles})
    return table(
        (f"batch {report.batch_size}, {report.threads} threads", *(c.name for c in both)),
        [
            *((f"p{p:g}, ms", *(_percentile(c, p) for c in both)) for p in wanted),
            ("mean, ms", *(f"{c.mean_ms:.2f}" for c in both)),
            ("counted calls", *(c.samples_ms.size for c in both)),
            ("loading the model, ms", *(f"{c.load_ms:.0f}" for c in both)),
            ("first call, ms", *(f"{c.first_call_ms:.1f}" for c in both)),
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
            ("load average before and after", *(f"{v:.2f}" for v in report.load_average)),
        ],
    )


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
        ("environment", ""),
        [
            ("Python", environment.python),
            ("system", environment.system),
            ("processor", f"{environment.cpu}, {environment.processors} in use"),
            ("commit", environment.git_commit or "not a git checkout"),
            (
                "uncommitted changes",
                {True: "yes", False: "no", None: "unknown"}[environment.git_dirty],
            ),
            *environment.packages.items(),
        ],
    )


def _value(statistics: ErrorStatistics, name: str) -> str:
    value = getattr(statistics, name)
    if name == "cosine":
        return f"{1 - value:.2g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _percentile(contender: ContenderLatency, wanted: float) -> str:
    found = contender.percentile(wanted)
    if found is None:
        return "too few calls"
    return f"{found.value_ms:.2f} ({found.low_ms:.2f} to {found.high_ms:.2f})"


def _spec(spec: TensorSpec) -> str:
    unit = f", {spec.unit}" if spec.unit else ""
    span = f", in [{spec.range[0]:g}, {spec.range[1]:g}]" if spec.range else ""
    return spec.describe() + unit + span


def _shape(shape: Sequence[int | str]) -> str:
    return f"({', '.join(map(str, shape))})"


def _counts(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts)
