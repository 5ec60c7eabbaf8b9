"""The figures of a release that are logged as metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from heimdall_onnx.common.verdict import NotMeasured

if TYPE_CHECKING:
    from heimdall_onnx.evidence.latency.benchmark import LatencyReport
    from heimdall_onnx.evidence.parity.report import ParityReport

# MLflow makes a section of charts of what comes before a name's last slash, so that what is to be
# compared stands side by side, and writes two decimals, so that each has a unit that suits it.
# Those of outputs come first: an output may be called as anything.
_MILLIONTHS, _MIB = 1e6, 2.0**-20
# What `ONNXExporter.test_onnx_inference` documents, so that runs are looked for by these names too.
_DOCUMENTED = re.compile(r"\w[\w .:-]*_mae|speedup|inference_time_(pytorch|onnx)_ms", re.ASCII)
# What MLflow takes no name with; a slash within an output's name would make another section.
_NOT_IN_NAMES = re.compile(r"[^\w .:-]", re.ASCII)
_PATHS = tuple(
    (re.compile(pattern), path, factor)
    for pattern, path, factor in (
        (r"(.+)_mae", r"parity/\1_mae_1e-6", _MILLIONTHS),
        (r"(.+)_max_abs_error", r"parity/\1_max_1e-6", _MILLIONTHS),
        (r"(.+)_p99_abs_error", r"parity/\1_p99_1e-6", _MILLIONTHS),
        (r"displacement_p99_m", r"parity/displacement_p99_m", 1.0),
        (r"quality_(.+)", r"quality/\1", 1.0),
        (r"speedup", r"speedup/ratio", 1.0),
        (r"speedup_(low|high)", r"speedup/ratio_\1", 1.0),
        (r"inference_time_(pytorch|onnx)_ms", r"latency/\1_p50_ms", 1.0),
        (r"inference_memory_(pytorch|onnx)_bytes", r"memory/\1_peak_mib", _MIB),
        (r"error_(.+_(?:median|p95)_m)", r"position_error/\1", 1.0),
        (r"(nll|calibration_error)_(.+)", r"uncertainty/\2_\1", 1.0),
        (r"sharpness_(.+)_m", r"uncertainty/\1_sharpness_m", 1.0),
        (r"coverage_(\d+)_(.+)", r"uncertainty/\2_coverage_\1", 1.0),
    )
)


def summarize_metrics(
    parity: ParityReport, latency: LatencyReport | NotMeasured
) -> dict[str, float]:
    """Parity and latency as flat metrics, finite ones only, under names that stay the same.

    Those of latency are missing where it was not measured.
    """
    metrics: dict[str, float] = {}
    if not isinstance(latency, NotMeasured):
        metrics = {
            "speedup": latency.speedup.ratio,
            "speedup_low": latency.speedup.low,
            "speedup_high": latency.speedup.high,
            "inference_time_pytorch_ms": latency.pytorch.median_ms,
            "inference_time_onnx_ms": latency.onnx.median_ms,
            "inference_memory_pytorch_bytes": latency.pytorch.peak_memory_bytes,
            "inference_memory_onnx_bytes": latency.onnx.peak_memory_bytes,
        }
    for output in parity.evaluation:
        metrics |= {
            f"{output.output}_mae": output.mean,
            f"{output.output}_max_abs_error": output.maximum,
            f"{output.output}_p99_abs_error": output.p99,
        }
    for judged in parity.quality:
        name = _NOT_IN_NAMES.sub("_", judged.metric)
        metrics |= {
            f"quality_{name}_pytorch": judged.reference,
            f"quality_{name}_onnx": judged.value,
            f"quality_{name}_loss": judged.loss,
            f"quality_{name}_loss_high": judged.high,
        }
    if parity.ground is not None:
        metrics["displacement_p99_m"] = parity.ground.displacement_p99_m
        for task in parity.ground.task:
            who = task.who.lower().replace(" ", "_")
            metrics[f"error_{who}_median_m"] = task.median_m
            metrics[f"error_{who}_p95_m"] = task.p95_m
    for found in parity.uncertainty:
        if found.calibration is not None:
            who = found.who.lower()
            metrics[f"nll_{who}"] = found.calibration.nll
            metrics[f"calibration_error_{who}"] = found.calibration.calibration_error
            metrics[f"sharpness_{who}_m"] = found.calibration.radius_p50_m
            for coverage in found.calibration.coverage:
                metrics[f"coverage_{100 * coverage.nominal:.0f}_{who}"] = coverage.observed
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}


def run_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of `summarize_metrics` as an MLflow run has them.

    Each gets a path by which MLflow groups its charts, and a unit that can be read in them:
    ``parity/positions_mae_1e-6`` is in millionths of the output's unit, ``memory/onnx_peak_mib`` in
    MiB. The documented ones (`ONNXExporter.test_onnx_inference`) stay beside them as they are, and
    a name that is none of ours stays alone.
    """
    documented = {name: value for name, value in metrics.items() if _DOCUMENTED.fullmatch(name)}
    return documented | dict(_in_charts(name, value) for name, value in metrics.items())


def _in_charts(name: str, value: float) -> tuple[str, float]:
    for pattern, path, factor in _PATHS:
        if found := pattern.fullmatch(_NOT_IN_NAMES.sub("_", name)):
            return found.expand(path), factor * value
    return name, value
