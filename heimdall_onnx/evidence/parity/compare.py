"""Parity: where, by how much and on which inputs the ONNX model differs from the PyTorch one.

The documented gate (mean absolute error) hides single bad elements, so it never stands alone:
elements, non-finite values, the noise floor of float32 and batch independence are gated as well,
and where the signature declares more, that too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime import InferenceSession
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from heimdall_onnx.common.arrays import Arrays, in_batches
from heimdall_onnx.common.errors import EvidenceError, ParameterError, UnavailableError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import EvaluationWorkers
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.departure import Departure, first_departure
from heimdall_onnx.evidence.parity.depth import DepthProfile, depth_profile
from heimdall_onnx.evidence.parity.invariance import (
    SAMPLES,
    Limit,
    check_masks,
    check_orders,
    excess,
)
from heimdall_onnx.evidence.parity.one_pass import (
    Models,
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
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator
from heimdall_onnx.evidence.parity.tolerance import EVALUATION, RTOL, tolerance_factor
from heimdall_onnx.model.copies import copy_model
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session, run_pytorch
from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)
SMALL_BATCH_SAMPLES = 12


def compare_outputs(
    model: nn.Module,
    onnx: Path | InferenceSession,
    data: EvaluationData,
    signature: Signature,
    *,
    tolerance: float = 1e-5,
    batch_size: int = 8,
    reference_samples: int = 32,
    progress: Callable[[int, int], None] | None = None,
    workers: EvaluationWorkers | None = None,
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
            (ten times that on adversarial inputs), in the outputs' units.
        batch_size: The largest batch size; 1, 2 and 3 are compared as well.
        reference_samples: Evaluation samples, evenly spaced, for the float64 reference.
        progress: Called with (samples done, samples in all) over the evaluation data.
        workers: Who takes the models over the evaluation data, a dataset, and holds all of it
            against its digest; by default this process does the former.

    Raises:
        DataError: If the model's own examples do not fit the signature.
        InvalidModelError: If ONNX Runtime can't load the file.
        ParameterError: If there are workers and ``onnx`` is a session.
        UnavailableError: If there are workers, without the package distributed.
        EvidenceError: If a model can't run on an input of the signature's shape, PyTorch's not in
            float64, or the outputs have different shapes.
    """
    session = open_session(onnx, spinning=False) if isinstance(onnx, Path) else onnx
    examples = Examples(signature, model)
    models = Models.of(model, session, signature)
    del session
    largest = max(batch_size, 1)
    settings = pass_settings(
        data,
        signature,
        tolerance=tolerance,
        batch_size=largest,
        reference_samples=reference_samples,
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
    run = _Pair(models, signature, tolerance, found.worst)
    del models
    for size in sorted({1, 2, 3, largest} - {first}):
        cells.append(run.compare(EVALUATION, first_rows(data, size), size))
    for size in sorted({1, 2, 3, largest}):
        for kind, inputs, valid in further_kinds(data, examples, size):
            cells.append(run.compare(kind, inputs, size, valid=valid))
    independence = _batch_independence(run, data, examples)
    declared = (
        dict(zip(("PyTorch", "ONNX"), run.models, strict=True)),
        signature,
        examples,
        data.rows(np.arange(SAMPLES)),
        Limit(tolerance, RTOL),
    )
    masks, orders = check_masks(*declared), check_orders(*declared)
    del run.models, declared
    report = ParityReport(
        signature=signature,
        source=data.source,
        samples=data.count,
        tolerance=tolerance,
        rtol=RTOL,
        cells=tuple(cells),
        noise_floor=_noise_floor(model, signature, found.reference()),
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
        worst_factor=run.worst.factor,
        evaluated_by=found.evaluated_by,
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


def locate_departure(report: ParityReport, model: nn.Module, onnx_path: Path) -> Departure | None:
    """Name the first module whose output differs, on the worst inputs, if a parity gate failed.

    Returns:
        None where every parity gate holds, or where no module departs with the graph
        optimizations off: the fault then lies in a fusion of ONNX Runtime's, between the rows of
        a batch, or below what can be told from rounding inside the network.
    """
    if all(gate.passed for gate in report.gates()):
        return None
    return first_departure(model, onnx_path, report.worst_inputs, tolerance=report.tolerance)


def trace_depth(report: ParityReport, model: nn.Module, onnx_path: Path) -> DepthProfile | None:
    """The error along the network on the worst inputs; None where every parity gate holds."""
    if all(gate.passed for gate in report.gates()):
        return None
    return depth_profile(
        model,
        onnx_path,
        report.worst_inputs,
        tolerance=report.tolerance,
        where=report.worst_where,
    )


@dataclass
class _Pair:
    """Both models side by side, and what is remembered of them while batches stream by."""

    models: Models
    signature: Signature
    tolerance: float
    worst: WorstBatch

    def compare(self, kind: str, inputs: Arrays, size: int, *, valid: bool = False) -> ParityCell:
        factor = tolerance_factor(kind, valid)
        limit = Limit(factor * self.tolerance, factor * RTOL)
        accumulators = [
            ErrorAccumulator(spec, atol=limit.atol, rtol=limit.rtol)
            for spec in self.signature.outputs
        ]
        count = next(iter(inputs.values())).shape[0]
        for start, batch in in_batches(inputs, size):
            expected, found = self.models.run(batch, self.signature)
            largest = max(
                accumulator.update(expected[spec.name], found[spec.name], start)
                for spec, accumulator in zip(self.signature.outputs, accumulators, strict=True)
            )
            if largest > self.worst.excess:
                self.worst = WorstBatch(largest, start, batch, kind, factor)
        return ParityCell(kind, size, count, tuple(a.result() for a in accumulators), valid)


def _noise_floor(
    model: nn.Module, signature: Signature, reference: Sequence[tuple[Arrays, Arrays, Arrays]]
) -> tuple[NoiseFloor, ...]:
    double = copy_model(model).double()
    batches, single, found = zip(*reference, strict=True)
    exact = [_run_double(double, batch, signature) for batch in batches]
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    floors = []
    for spec in signature.outputs:
        if not np.issubdtype(np.dtype(spec.dtype), np.floating):
            continue
        truth, pytorch, onnx = (
            np.concatenate([outputs[spec.name].ravel() for outputs in side])
            for side in (exact, single, found)
        )
        # NaN and Inf have a gate of their own.
        finite = np.isfinite(truth) & np.isfinite(pytorch)
        truth = truth[finite].astype(np.float64)
        compared = (np.abs(onnx[finite] - truth), np.abs(pytorch[finite] - truth), np.abs(truth))
        ours, theirs, magnitude = (
            float(each.mean()) if truth.size else math.nan for each in compared
        )
        ulp = float(np.spacing(onnx.dtype.type(magnitude)))
        floors.append(NoiseFloor(spec.name, samples, ours, theirs, ulp))
    return tuple(floors)


class _InDouble(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Has in float64 what a model's own code asks for in less: states, casts, constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def raised(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value.double()
            less = isinstance(value, torch.dtype) and value.is_floating_point
            return torch.float64 if less else value

        args, kwargs = tree_map(raised, (args, kwargs or {}))
        return tree_map(raised, func(*args, **kwargs))


def _run_double(model: nn.Module, batch: Arrays, signature: Signature) -> Arrays:
    inputs = {
        name: array.astype(np.float64) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in batch.items()
    }
    try:
        return run_pytorch(model, inputs, signature)
    except EvidenceError as error:
        log.info("the model asks for less than float64 and gets it", reason=str(error))
    try:
        with _InDouble():  # type: ignore[no-untyped-call]
            return run_pytorch(model, inputs, signature)
    except EvidenceError as error:
        raise EvidenceError(
            f"no reference in float64, against which rounding is measured: {error}. The model's "
            "code must leave the precision of its inputs and weights alone"
        ) from error


def _batch_independence(run: _Pair, data: EvaluationData, examples: Examples) -> BatchIndependence:
    # A constant row must be among the neighbours: z-scored ones share mean and spread with the
    # row itself, which hides a normalization that runs over the batch.
    found = [BatchIndependence(0.0, 0.0, "none", run.signature.outputs[0].name, 0)]
    for row in range(min(3, data.count)):
        one = data.rows([row])
        alone = run.models.onnx(one)
        neighbours = {**examples.adversarial(one), EVALUATION: data.rows([row + 1])}
        for kind, other in neighbours.items():
            beside = run.models.onnx(
                {name: np.concatenate([other[name], one[name], other[name]]) for name in one}
            )
            for spec in run.signature.outputs:
                allowed = Limit(run.tolerance, RTOL)
                moved, error = excess(alone[spec.name], beside[spec.name][1:2], allowed)
                found.append(BatchIndependence(error, moved, kind, spec.name, 0))
    return replace(max(found, key=lambda one: one.excess), comparisons=len(found) - 1)
