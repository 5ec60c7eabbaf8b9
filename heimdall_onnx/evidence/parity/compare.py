"""Parity: where, by how much and on which inputs the ONNX model differs from the PyTorch one.

The documented gate (mean absolute error) hides single bad elements, so it never stands alone:
elements, non-finite values, the noise floor of float32 and batch independence are gated as well,
and where the signature declares more, that too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime import InferenceSession
from torch import nn

from heimdall_onnx.common.arrays import Arrays, Floats, in_batches
from heimdall_onnx.common.errors import EvidenceError, ParameterError, UnavailableError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import TOLERANCE, EvaluationWorkers, Quality
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.invariance import (
    SAMPLES,
    check_masks,
    check_orders,
    excess,
)
from heimdall_onnx.evidence.parity.one_pass import (
    Models,
    PassSettings,
    WorstBatch,
    pass_over,
    pass_settings,
)
from heimdall_onnx.evidence.parity.report import (
    BatchIndependence,
    NoiseFloor,
    ParityCell,
    ParityReport,
)
from heimdall_onnx.evidence.parity.rounding import SPREAD_FACTOR, Rounding
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator
from heimdall_onnx.evidence.parity.tolerance import EVALUATION, RTOL, tolerance_factor
from heimdall_onnx.evidence.quality.metric import metrics_for
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.signature import Signature, TensorSpec

log = get_logger(__name__)
SMALL_BATCH_SAMPLES = 12


def compare_outputs(
    model: nn.Module,
    onnx: Path | InferenceSession,
    data: EvaluationData,
    signature: Signature,
    *,
    tolerance: float = TOLERANCE,
    batch_size: int = 8,
    reference_samples: int = 32,
    progress: Callable[[int, int], None] | None = None,
    workers: EvaluationWorkers | None = None,
    quality: Quality | None = None,
) -> ParityReport:
    """Compare the ONNX model with the PyTorch model on evaluation data and adversarial inputs.

    Statistics are streamed, so memory does not grow with the number of samples.

    Args:
        model: The PyTorch model, in eval mode.
        onnx: The ONNX file, which is opened as it will be deployed and closed before the float64
            reference takes twice the model's memory; or a session that is open already.
        data: Evaluation inputs, N samples.
        signature: Names, dtypes and ranges of inputs and outputs.
        tolerance: Limit of the mean absolute error and absolute part of the element tolerance
            (ten times that on adversarial inputs), in the outputs' units; of an output whose mean
            magnitude is below 0.1 so much less. Beyond it lies no fault where PyTorch differs as
            much from itself when it rounds otherwise.
        batch_size: The largest batch size; 1, 2 and 3 are compared as well.
        reference_samples: Evaluation samples, evenly spaced, for the float64 reference.
        progress: Called with (samples done, samples in all) over the evaluation data.
        workers: Who takes the models over the evaluation data, a dataset, and holds all of it
            against its digest; by default this process does the former.
        quality: By what the answers are judged beside what is true of the samples, and how much may
            be lost; where it names no metric, by what suits the labels, if there are any.

    Raises:
        DataError: If the model's own examples do not fit the signature.
        InvalidModelError: If ONNX Runtime can't load the file.
        ParameterError: If there are workers and ``onnx`` is a session, or there is no such metric.
        UnavailableError: If there are workers, without the package distributed.
        EvidenceError: If a model can't run on an input of the signature's shape, or the outputs
            have different shapes.
    """
    session = open_session(onnx, spinning=False) if isinstance(onnx, Path) else onnx
    examples, quality = Examples(signature, model), quality or Quality()
    models = Models.of(model, session, signature)
    del session
    largest = max(batch_size, 1)
    settings = pass_settings(
        data,
        signature,
        tolerance=tolerance,
        batch_size=largest,
        reference_samples=reference_samples,
        pytorch=models.pytorch,
        metrics=metrics_for(quality.metric, signature, data.truth),
    )
    first = settings.batch_size
    if workers is None:
        found = pass_over(models, data, settings, range(data.count), progress)
    elif not isinstance(onnx, Path):
        raise ParameterError("workers need the ONNX file; a session can't be sent to them")
    else:
        try:
            from heimdall_onnx.evidence.parity.workers import evaluate_on
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"workers need the package {error.name}: pip install 'heimdall-onnx[fleet]'"
            ) from error
        found = evaluate_on(workers, model, onnx, data, settings, progress)
    cells = [ParityCell(EVALUATION, first, data.count, found.outputs(data))]
    run = _Pair(models, settings, found.worst)
    rounding = models.rounding
    del models
    for size in sorted({1, 2, 3, largest} - {first}):
        cells.append(run.compare(EVALUATION, first_rows(data, size), size))
    for size in sorted({1, 2, 3, largest}):
        for kind, inputs, valid in further_kinds(data, examples, size):
            cells.append(run.compare(kind, inputs, size, valid=valid))
    independence = _batch_independence(run, data, examples)
    declared = (
        dict(zip(("PyTorch", "ONNX"), run.models[:2], strict=True)),
        signature,
        examples,
        data.rows(np.arange(SAMPLES)),
        run.excess_at,
    )
    masks, orders = check_masks(*declared), check_orders(*declared)
    del run.models, declared
    floors = _noise_floor(rounding, settings, found.reference())
    report = ParityReport(
        signature=signature,
        source=data.source,
        samples=data.count,
        tolerance=tolerance,
        rtol=RTOL,
        cells=tuple(cells),
        noise_floor=floors,
        independence=independence,
        ground=found.ground(),
        pytorch=found.kept(0),
        onnx=found.kept(1),
        worst_inputs=run.worst.inputs,
        worst_where=f"{run.worst.kind}, batch {len(next(iter(run.worst.inputs.values())))}",
        masks=masks,
        orders=orders,
        valid_inputs=examples.declared,
        uncertainty=found.uncertainty(),
        quality=found.quality(data, quality),
        worst_factor=run.worst.factor,
        evaluated_by=found.evaluated_by,
        notes=tuple(_notes(model, rounding)),
        plotted=found.kept_rows(),
    )
    log.info(
        "compared",
        samples=data.count,
        cells=len(cells),
        mean_error={o.output: o.mean for o in report.evaluation},
    )
    return report


def first_rows(data: EvaluationData, size: int) -> Arrays:
    """The evaluation inputs that are compared at another batch size than the largest.

    Whole batches only: a shorter one at the end would be another batch size.
    """
    return data.rows(np.arange(-(-min(SMALL_BATCH_SAMPLES, data.count) // size) * size))


def further_kinds(
    data: EvaluationData, examples: Examples, size: int
) -> Iterator[tuple[str, Arrays, bool]]:
    """Every kind of input beside the evaluation data that is compared at a batch size.

    Yields:
        Its name, its inputs, and whether they are ordinary ones, at a further length.
    """
    count = max(size, 2)
    further = examples.at_other_lengths(count, seed=size)
    for kind, inputs in examples.adversarial(data.rows(np.arange(count))).items():
        if kind not in further:
            yield kind, inputs, False
    for kind, inputs in further.items():
        yield kind, inputs, True


@dataclass
class _Pair:
    """Both models side by side, and what is remembered of them while batches stream by."""

    models: Models
    settings: PassSettings
    worst: WorstBatch
    asked: tuple[Arrays, Callable[[], dict[str, Floats]]] = ({}, dict)

    def compare(self, kind: str, inputs: Arrays, size: int, *, valid: bool = False) -> ParityCell:
        factor = tolerance_factor(kind, valid)
        signature, limits = self.settings.signature, self.settings.limits
        accumulators = [
            ErrorAccumulator(spec, limits[spec.name].times(factor)) for spec in signature.outputs
        ]
        count = next(iter(inputs.values())).shape[0]
        for start, batch in in_batches(inputs, size):
            expected, found = self.models.run(batch, signature)
            spread = self.models.rounding.spread(batch, expected, limits)
            largest = max(
                accumulator.update(expected[spec.name], found[spec.name], start, spread)
                for spec, accumulator in zip(signature.outputs, accumulators, strict=True)
            )
            if largest > self.worst.excess:
                self.worst = WorstBatch(largest, start, batch, kind, factor)
        return ParityCell(kind, size, count, tuple(a.result() for a in accumulators), valid)

    def excess_at(
        self, inputs: Arrays, name: str, before: npt.NDArray[Any], after: npt.NDArray[Any]
    ) -> tuple[float, float]:
        """The `excess` of an answer to ``inputs`` where it is beyond PyTorch's own rounding too."""
        found = excess(before, after, limit := self.settings.limits[name])
        if found[0] > 1.0:
            if self.asked[0] is not inputs:
                expected, limits = self.models.pytorch(inputs), self.settings.limits
                self.asked = inputs, self.models.rounding.spread(inputs, expected, limits)
            found = excess(before, after, limit, self.asked[1]()[name])
        return found


def _notes(model: nn.Module, rounding: Rounding) -> Iterator[str]:
    if any(isinstance(m, nn.MultiheadAttention | nn.TransformerEncoder) for m in model.modules()):
        yield "PyTorch ran without its fast path of attention, which answers 0 for what is padded."
    if rounding.raised:
        yield "Casts, constants and states of less precision went on in float64 in the reference."
    if rounding.halved:
        yield "Parts run in half precision: what PyTorch's rounding to that leaves open is allowed."
    if rounding.missing:
        yield f"PyTorch's rounding was measured without float64, in which {rounding.missing}."


def _noise_floor(
    rounding: Rounding, settings: PassSettings, reference: Sequence[tuple[Arrays, Arrays, Arrays]]
) -> tuple[NoiseFloor, ...]:
    samples = sum(len(next(iter(batch.values()))) for batch, _, _ in reference)
    moved = [rounding.spread(batch, single, settings.limits) for batch, single, _ in reference]
    try:
        exact = [rounding.exact(batch) for batch, _, _ in reference]
    except EvidenceError as error:
        rounding.missing = str(error)
        exact = []
    floors = []
    for spec in settings.signature.outputs:
        name = spec.name
        if np.dtype(spec.dtype).kind != "f":
            continue

        def joined(sides: Iterable[Arrays], name: str = name) -> Floats:
            return np.concatenate([side[name].ravel() for side in sides]).astype(np.float64)

        pytorch, onnx = joined(r[1] for r in reference), joined(r[2] for r in reference)
        truth = joined(exact) if exact else pytorch
        if truth.shape != pytorch.shape:
            continue  # it finds another number of rows
        # NaN and Inf have a gate of their own.
        finite = np.isfinite(truth) & np.isfinite(pytorch)
        sides = [side[finite] for side in (truth, pytorch, onnx)]
        floor = _floor(spec, samples, sides)
        if not exact or floor.onnx_error > floor.limit:
            apart = (joined(answers() for answers in moved) / SPREAD_FACTOR)[finite]
            settled = apart <= replace(settings.limits[name], shares=1.0).allowed(sides[0])
            settled = settled if settled.any() else np.isfinite(apart)
            sides = [side[settled] for side in sides]
            floor = _floor(spec, samples, sides, rounded=float(apart[settled].mean()))
        floors.append(floor)
    return tuple(floors)


def _floor(
    spec: TensorSpec, samples: int, sides: Sequence[Floats], rounded: float = 0.0
) -> NoiseFloor:
    truth, pytorch, onnx = sides
    compared = (np.abs(onnx - truth), np.abs(pytorch - truth), np.abs(truth))
    ours, theirs, magnitude = (float(each.mean()) if truth.size else math.nan for each in compared)
    ulp = float(np.spacing(np.dtype(spec.dtype).type(magnitude)))
    return NoiseFloor(spec.name, samples, ours, max(theirs, rounded), ulp)


def _batch_independence(run: _Pair, data: EvaluationData, examples: Examples) -> BatchIndependence:
    # A constant row must be among the neighbours: z-scored ones share mean and spread with the
    # row itself, which hides a normalization that runs over the batch.
    settings = run.settings
    names = [s.name for s in settings.signature.outputs if s.name not in settings.loose]
    found = [BatchIndependence(0.0, 0.0, "none", settings.signature.outputs[0].name, 0)]
    for row in range(min(3, data.count)):
        one = data.rows([row])
        alone = run.models.onnx(one)
        neighbours = {**examples.adversarial(one), EVALUATION: data.rows([row + 1])}
        for kind, other in neighbours.items():
            beside = run.models.onnx(
                {name: np.concatenate([other[name], one[name], other[name]]) for name in one}
            )
            for name in names:
                moved, error = run.excess_at(one, name, alone[name], beside[name][1:2])
                found.append(BatchIndependence(error, moved, kind, name, 0))
    return replace(max(found, key=lambda one: one.excess), comparisons=len(found) - 1)
