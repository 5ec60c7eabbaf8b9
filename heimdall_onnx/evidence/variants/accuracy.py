"""What a variant costs in the task, and the gates that decide whether that is allowed.

As MLPerf Inference does, a variant is judged by the quality of its answers to the task rather than
by the distance of its numbers (Reddi et al., "MLPerf Inference Benchmark", ISCA 2020, section III).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, Floats, in_batches, whole
from heimdall_onnx.common.parameters import AccuracyLimits, Quality
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.geodesy import difference_degrees, distance_m
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator, ErrorStatistics
from heimdall_onnx.evidence.parity.tolerance import limit_of, span_of
from heimdall_onnx.evidence.quality.contract import Judged, Scores, judge_quality
from heimdall_onnx.evidence.quality.metric import metrics_for
from heimdall_onnx.model.signature import Signature

_BATCH = 8


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
        quality: What the variant loses in the task by each metric; empty without labels.
    """

    samples: int
    outputs: tuple[ErrorStatistics, ...] = field(repr=False)
    noise: tuple[float, ...]
    displacement_p50_m: float | None
    displacement_p99_m: float | None
    displacement_max_m: float | None
    displacement_sigma_p99: float | None
    quality: tuple[Judged, ...] = ()


@dataclass(frozen=True)
class Accuracy(AccuracyFigures):
    """A variant's answers beside those of the fp32 model, and what is wrong with them.

    Attributes:
        broken: Outputs with NaN, Inf or values out of their range where the reference has none.
    """

    broken: tuple[str, ...] = ()


def answers_of(run: Callable[[Arrays], Arrays], inputs: Arrays) -> Arrays:
    """The outputs of a model for all rows of ``inputs``, eight at a time."""
    found = [run(batch) for _, batch in in_batches(inputs, _BATCH)]
    return {name: np.concatenate([outputs[name] for outputs in found]) for name in found[0]}


def judge_accuracy(
    reference: Arrays,
    found: Arrays,
    data: EvaluationData,
    signature: Signature,
    contract: Quality,
    error_share: float = 1.0,
) -> Accuracy:
    """Hold a variant's answers against those of the fp32 model.

    Args:
        reference: Outputs of the fp32 model for every sample of ``data``.
        found: Outputs of the variant for the same samples.
        data: With what is true of the samples, where it is known.
        signature: Which output is what.
        contract: How much may be lost in the task.
        error_share: As for `judge_quality`.
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
    if position is not None:
        # A geodesic to nowhere is an error in PROJ; the gate on finite outputs has refused it.
        sides = (outputs[position.name] for outputs in (reference, found))
        a, b = (np.where(np.isfinite(side), side, 0.0) for side in sides)
        moved = distance_m(a, b)
        claimed = signature.deviations(reference)
        if claimed is not None:
            sigmas = np.max(np.abs(difference_degrees(b, a)) / claimed, axis=1)
    truth = {name: whole(rows) for name, rows in data.truth.items()}
    every = np.arange(data.count)
    judged = [
        judge_quality(
            metric,
            Scores.of(metric, reference, found, truth).beside(every, data.weights, data.groups),
            contract,
            error_share,
        )
        for metric in metrics_for(contract.metric, signature, truth)
    ]
    return Accuracy(
        samples=data.count,
        outputs=tuple(statistics),
        noise=tuple(noise),
        displacement_p50_m=_quantile(moved, 0.5),
        displacement_p99_m=_quantile(moved, 0.99),
        displacement_max_m=_quantile(moved, 1.0),
        displacement_sigma_p99=_quantile(sigmas, 0.99),
        quality=tuple(judged),
        broken=tuple(broken),
    )


def accuracy_gates(accuracy: Accuracy, limits: AccuracyLimits) -> tuple[Gate, ...]:
    """The gates of a variant: by the task with labels, else by displacement or noise."""
    sound = Gate.none_of("finite and in range", accuracy.broken)
    samples = f"{accuracy.samples} samples"
    if accuracy.quality:
        return (sound, *(judged.gate for judged in accuracy.quality))
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
