"""What a lossy variant costs in the task, and the gates that decide whether that is allowed.

As MLPerf Inference does, a variant is judged by the quality of its answers to the task rather than
by the distance of its numbers: its score must stay within 1% of the reference model's (Reddi et
al., "MLPerf Inference Benchmark", ISCA 2020, section III).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, Floats, in_batches, whole
from heimdall_onnx.common.parameters import AccuracyLimits
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.ground import difference_degrees, distance_m
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator, ErrorStatistics
from heimdall_onnx.evidence.parity.tolerance import limit_of, span_of
from heimdall_onnx.evidence.parity.uncertainty import negative_log_likelihood
from heimdall_onnx.evidence.ratios import error_ratio
from heimdall_onnx.model.signature import Signature

_BATCH = 8
# A log-likelihood has no zero of its own: below one nat a share of it means nothing.
_LEAST_NATS = 1.0


@dataclass(frozen=True)
class TaskScore:
    """How good positions are, where the true ones are known.

    Attributes:
        median_m: Median localization error in metres.
        p95_m: Its 95th percentile.
        nll: Mean negative log-likelihood of the true position in nats, the errors in latitude and
            longitude taken as independent normal with the predicted deviations in degrees; None
            where the model predicts none.
    """

    median_m: float
    p95_m: float
    nll: float | None


@dataclass(frozen=True)
class AccuracyFigures:
    """A variant's answers beside those of the fp32 model, as a release records them.

    Attributes:
        samples: Samples compared.
        outputs: Parity statistics per output, in the signature's order.
        noise: Relative error per output: RMS of the difference over the RMS of the reference about
            its mean.
        displacement_p50_m: Median distance between both positions in metres; None without
            positions, as are the next two.
        displacement_p99_m: 99th percentile of it.
        displacement_max_m: Largest.
        displacement_sigma_p99: 99th percentile of the displacement in predicted standard
            deviations, the larger one of the two axes; None where none are predicted.
        task: The variant's score; None without labels.
        reference: The fp32 model's score.
    """

    samples: int
    outputs: tuple[ErrorStatistics, ...] = field(repr=False)
    noise: tuple[float, ...]
    displacement_p50_m: float | None
    displacement_p99_m: float | None
    displacement_max_m: float | None
    displacement_sigma_p99: float | None
    task: TaskScore | None
    reference: TaskScore | None


@dataclass(frozen=True)
class Accuracy(AccuracyFigures):
    """A variant's answers beside those of the fp32 model, sample by sample too.

    Attributes:
        broken: Outputs with NaN, Inf or values out of their range where the reference has none.
        errors_m: Localization error of the variant per sample; empty without labels.
        reference_errors_m: The same of the fp32 model.
    """

    broken: tuple[str, ...]
    errors_m: Floats = field(repr=False)
    reference_errors_m: Floats = field(repr=False)


def answers_of(run: Callable[[Arrays], Arrays], inputs: Arrays) -> Arrays:
    """The outputs of a model for all rows of ``inputs``, eight at a time."""
    found = [run(batch) for _, batch in in_batches(inputs, _BATCH)]
    return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}


def judge_accuracy(
    reference: Arrays, found: Arrays, data: EvaluationData, signature: Signature
) -> Accuracy:
    """Hold a variant's answers against those of the fp32 model.

    Args:
        reference: Outputs of the fp32 model for every sample of ``data``.
        found: Outputs of the variant for the same samples.
        data: With the true positions where they are known.
        signature: Which output is what.
    """
    statistics, noise, broken = [], [], []
    for spec in signature.outputs:
        a, b = reference[spec.name], found[spec.name]
        accumulator = ErrorAccumulator(spec, limit_of([a], spec.shape, 1e-5))
        accumulator.update(a, b, 0)
        statistics.append(accumulator.result())
        finite = np.isfinite(a)
        middle = np.where(finite, a, 0.0).sum(axis=0) / np.maximum(finite.sum(axis=0), 1)
        noise.append(relative_error(a - middle, b - middle))
        if problem := _problem(spec.range, a, b):
            broken.append(f"{spec.name}: {problem}")
    position = signature.position_output
    moved = sigmas = None
    task = score = None
    errors = reference_errors = np.empty(0)
    if position is not None:
        # A geodesic to nowhere is an error in PROJ; the gate on finite outputs has refused it.
        sides = (outputs[position.name] for outputs in (reference, found))
        a, b = (np.where(np.isfinite(side), side, 0.0) for side in sides)
        moved = distance_m(a, b)
        claimed = signature.deviations(reference)
        if claimed is not None:
            sigmas = np.max(np.abs(difference_degrees(b, a)) / claimed, axis=1)
        if data.positions is not None:
            truth = whole(data.positions)
            score, reference_errors = _score(a, claimed, truth)
            task, errors = _score(b, signature.deviations(found), truth)
    return Accuracy(
        samples=data.count,
        outputs=tuple(statistics),
        noise=tuple(noise),
        displacement_p50_m=_quantile(moved, 0.5),
        displacement_p99_m=_quantile(moved, 0.99),
        displacement_max_m=_quantile(moved, 1.0),
        displacement_sigma_p99=_quantile(sigmas, 0.99),
        task=task,
        reference=score,
        broken=tuple(broken),
        errors_m=errors,
        reference_errors_m=reference_errors,
    )


def accuracy_gates(accuracy: Accuracy, limits: AccuracyLimits) -> tuple[Gate, ...]:
    """The gates of a lossy variant: by the task with labels, else by displacement or noise."""
    sound = Gate.none_of("finite and in range", accuracy.broken)
    samples = f"{accuracy.samples} samples"
    task, reference = accuracy.task, accuracy.reference
    if task is not None and reference is not None:
        most = 1 + limits.error_growth
        paired = error_ratio(accuracy.errors_m, accuracy.reference_errors_m, most)
        gates = [
            _growth(
                "median localization error",
                reference.median_m,
                task.median_m,
                most,
                f"{samples}, 95% {paired.low:.3f} to {paired.high:.3f}",
            ),
            _growth("p95 of the localization error", reference.p95_m, task.p95_m, most, samples),
        ]
        if task.nll is not None and reference.nll is not None:
            allowed = limits.nll_growth * max(abs(reference.nll), _LEAST_NATS)
            gates.append(
                Gate.at_most(
                    "growth of the negative log-likelihood, nats",
                    allowed,
                    task.nll - reference.nll,
                    f"{reference.nll:.4f} to {task.nll:.4f} over {samples}",
                )
            )
        return (sound, *gates)
    if accuracy.displacement_sigma_p99 is not None:
        gate = Gate.at_most(
            "p99 of the displacement, in predicted deviations",
            limits.displacement_sigma,
            accuracy.displacement_sigma_p99,
            f"{accuracy.displacement_p99_m:,.0f} m over {samples}, without labels",
        )
        return (sound, gate)
    return (
        sound,
        *(
            Gate.at_most(f"relative error of {output.output}", limits.output_noise, noise, samples)
            for output, noise in zip(accuracy.outputs, accuracy.noise, strict=True)
        ),
    )


def _growth(what: str, reference: float, found: float, most: float, samples: str) -> Gate:
    # Two perfect answers are equally good.
    ratio = found / reference if reference > 0 else (1.0 if found == 0 else np.inf)
    return Gate.at_most(
        f"{what}, ratio to fp32",
        most,
        float(ratio),
        f"{reference:,.1f} to {found:,.1f} m, {samples}",
    )


def _score(
    positions: npt.NDArray[Any], deviations: Floats | None, truth: Floats
) -> tuple[TaskScore, Floats]:
    errors = distance_m(positions, truth)
    nll = None
    if deviations is not None:
        residual = difference_degrees(positions, truth)
        nll = float(negative_log_likelihood(residual, deviations).mean())
    return TaskScore(float(np.median(errors)), float(np.quantile(errors, 0.95)), nll), errors


def relative_error(reference: npt.NDArray[Any], found: npt.NDArray[Any]) -> float:
    """RMS of the difference over RMS of the reference; infinite where shapes or NaN differ."""
    if reference.shape != found.shape:
        return float("inf")
    a, b = reference.astype(np.float64), found.astype(np.float64)
    numbers = np.isfinite(a) | ((a != b) & ~(np.isnan(a) & np.isnan(b)))
    a, b = a[numbers], b[numbers]
    scale = float(np.linalg.norm(a))
    error = float(np.linalg.norm(b - a))
    if not np.isfinite(error):
        return float("inf")
    return error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))


def _problem(
    span: tuple[float, float] | None, reference: npt.NDArray[Any], found: npt.NDArray[Any]
) -> str:
    lost = int((np.isfinite(reference) & ~np.isfinite(found)).sum())
    if lost:
        return f"{lost} of {found.size} elements are NaN or Inf"
    if span is None:
        return ""
    low, high = span_of(span, found.dtype)
    inside = (reference >= low) & (reference <= high)
    outside = int((((found < low) | (found > high)) & inside).sum())
    return f"{outside} of {found.size} elements are outside {list(span)}" if outside else ""


def _quantile(values: Floats | None, rank: float) -> float | None:
    return None if values is None else float(np.quantile(values, rank))
