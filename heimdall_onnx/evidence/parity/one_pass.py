"""One pass over the evaluation data: what both models answer, collected batch by batch.

A pass can be pickled and merged with others, so that several processes each take a part of the
data. However it is parted, the merged pass says what a single one says, bit by bit, as long as the
parts begin where batches do; only quantiles are estimates (`evidence.parity.statistics`). Its size
does not grow with the number of samples.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, Floats, in_batches
from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.ground import GroundAccumulator, GroundReport, middle_of
from heimdall_onnx.evidence.parity.report import THIS_PROCESS
from heimdall_onnx.evidence.parity.rounding import Rounding
from heimdall_onnx.evidence.parity.statistics import (
    Accumulator,
    ErrorAccumulator,
    ErrorStatistics,
    added,
)
from heimdall_onnx.evidence.parity.tolerance import EVALUATION, Limit, limit_of
from heimdall_onnx.evidence.parity.uncertainty import (
    UncertaintyAccumulator,
    UncertaintyReport,
    answers_positions,
)
from heimdall_onnx.evidence.quality.contract import Judged, Scores, judge_quality
from heimdall_onnx.evidence.quality.metric import POSITIONS, Metric
from heimdall_onnx.model.inference import run_onnx, run_pytorch
from heimdall_onnx.model.signature import Signature

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import nn

PLOTTED_SAMPLES = 2000
# Of answers that are judged all together, and so are kept.
_RANKED_SAMPLES = 10_000


class Models(NamedTuple):
    """Both models as functions of named arrays, and how PyTorch's rounds."""

    pytorch: Callable[[Arrays], Arrays]
    onnx: Callable[[Arrays], Arrays]
    rounding: Rounding

    @classmethod
    def of(cls, model: nn.Module, session: InferenceSession, signature: Signature) -> Models:
        """A PyTorch model and an open ONNX file."""
        return cls(
            partial(_in_rows, partial(run_pytorch, model, signature=signature)),
            partial(_in_rows, partial(run_onnx, session, signature=signature)),
            Rounding(model, signature),
        )

    def run(self, batch: Arrays, signature: Signature) -> tuple[Arrays, Arrays]:
        """What both answer.

        Raises:
            EvidenceError: If one can't run, or the outputs have different shapes.
        """
        expected, found = self.pytorch(batch), self.onnx(batch)
        count = len(next(iter(batch.values())))
        for spec in signature.outputs:
            usual, other = expected[spec.name].shape, found[spec.name].shape
            if usual != other:
                why = "an axis is frozen inside the graph"
                if usual[:1] != (count,):
                    why = "the graph finds another number of rows"
                raise EvidenceError(
                    f"{spec.name} has shape {other} where PyTorch gives {usual}: {why}"
                )
        return expected, found


def _in_rows(run: Callable[[Arrays], Arrays], batch: Arrays) -> Arrays:
    return {name: np.atleast_1d(array) for name, array in run(batch).items()}


@dataclass(frozen=True)
class PassSettings:
    """What every part of a pass must have in common.

    Attributes:
        signature: The model's.
        limits: What an element of each output may be off by.
        loose: Outputs that have not one entry for each sample, such as however many were found.
        batch_size: Samples in a call.
        samples: Of the whole data.
        labelled: Whether positions are answered and the true ones are known.
        middle: The constant answer that the task error is held against, degrees; None without
            labels.
        reference_rows: Samples to keep for the float64 reference.
        metrics: What both models' answers are judged by.
    """

    signature: Signature
    limits: Mapping[str, Limit]
    loose: frozenset[str]
    batch_size: int
    samples: int
    labelled: bool
    middle: tuple[float, float] | None
    reference_rows: tuple[int, ...]
    metrics: tuple[Metric, ...] = ()

    def spread(self, samples: int) -> frozenset[int]:
        """The first samples of evenly spaced batches with at most so many."""
        # The beginning of the data may be a single event.
        size = self.batch_size
        batches = -(-self.samples // size)
        spaced = np.linspace(0, batches - 1, min(batches, max(1, samples // size)))
        return frozenset((size * spaced.astype(np.int64)).tolist())


def pass_settings(
    data: EvaluationData,
    signature: Signature,
    *,
    tolerance: float,
    batch_size: int,
    reference_samples: int,
    pytorch: Callable[[Arrays], Arrays],
    metrics: tuple[Metric, ...] = (),
) -> PassSettings:
    """The settings of a pass over all of ``data``, some of which ``pytorch`` is run on."""
    rows = np.linspace(0, data.count - 1, min(reference_samples, data.count)).astype(int)
    limits, loose = {}, set()
    batches = [batch for _, batch in in_batches(data.rows(np.unique(rows)), max(batch_size, 1))]
    counts = [len(next(iter(batch.values()))) for batch in batches]
    answers = [pytorch(batch) for batch in batches]
    for spec in signature.outputs:
        found = [answer[spec.name] for answer in answers]
        if any(array.shape[:1] != (n,) for array, n in zip(found, counts, strict=True)):
            loose.add(spec.name)
        limits[spec.name] = limit_of(found, spec.shape, tolerance)
    return PassSettings(
        signature=signature,
        limits=limits,
        loose=frozenset(loose),
        batch_size=min(max(batch_size, 1), data.count),
        samples=data.count,
        labelled=answers_positions(data, signature),
        middle=middle_of(data.positions, data.meta),
        reference_rows=tuple(map(int, np.unique(rows))),
        metrics=metrics,
    )


class WorstBatch(NamedTuple):
    """The batch with the largest error in units of what is allowed.

    Attributes:
        excess: That error.
        first: Index of its first sample.
        inputs: Its inputs.
        kind: What kind of inputs they are.
        factor: What the tolerance is multiplied by on these.
    """

    excess: float
    first: int
    inputs: Arrays
    kind: str = EVALUATION
    factor: float = 1.0


def _worse(one: WorstBatch, other: WorstBatch) -> WorstBatch:
    """The one with the larger error; of equally bad ones the first of the data."""
    return min(one, other, key=lambda found: (-found.excess, found.first))


class EvaluationPass(Accumulator):
    """What was found on the samples that were added.

    Attributes:
        worst: The batch with the largest error.
        evaluated_by: Who ran the models, in words.
    """

    merging: ClassVar = {
        **dict.fromkeys(("_outputs", "_ground", "_uncertainty"), added),
        **dict.fromkeys(("_reference", "_kept", "_scores"), operator.ior),
        "worst": _worse,
    }

    def __init__(self, settings: PassSettings) -> None:
        signature = settings.signature
        self._settings = settings
        self._outputs = tuple(
            ErrorAccumulator(spec, settings.limits[spec.name]) for spec in signature.outputs
        )
        self._ground = tuple(
            GroundAccumulator(settings.middle)
            for spec in signature.outputs
            if spec == signature.position_output and spec.shape[1:] == (2,)
        )
        self._uncertainty = tuple(
            UncertaintyAccumulator(who, signature)
            for who in ("PyTorch", "ONNX")
            if settings.labelled
        )
        self._reference_rows = np.array(settings.reference_rows, np.int64)
        self._plotted = settings.spread(PLOTTED_SAMPLES)
        self._ranked = settings.spread(_RANKED_SAMPLES)
        # By the index of their first sample, since parts come in any order.
        self._reference: dict[int, tuple[Arrays, Arrays, Arrays]] = {}
        self._kept: dict[int, tuple[Arrays, Arrays]] = {}
        # By the place of a metric too.
        self._scores: dict[tuple[int, int], Scores] = {}
        self.worst = WorstBatch(-1.0, 0, {})
        self.evaluated_by = THIS_PROCESS

    def update(
        self,
        first: int,
        batch: Arrays,
        expected: Arrays,
        found: Arrays,
        truth: Arrays,
        spread: Callable[[], Mapping[str, Floats]] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            first: Index of its first sample in the whole data.
            batch: Its inputs.
            expected: The PyTorch model's outputs.
            found: The ONNX model's.
            truth: What is true of the samples, as `EvaluationData.batches` gives it.
            spread: As `ErrorAccumulator` takes it.
        """
        signature = self._settings.signature
        largest = max(
            accumulator.update(expected[spec.name], found[spec.name], first, spread)
            for spec, accumulator in zip(signature.outputs, self._outputs, strict=True)
        )
        self.worst = _worse(self.worst, WorstBatch(largest, first, batch))
        for ground in self._ground:
            position = signature.position_output
            assert position is not None
            ground.update(expected[position.name], found[position.name], truth.get(POSITIONS))
        for told, outputs in zip(self._uncertainty, (expected, found), strict=False):
            told.update(outputs, truth[POSITIONS], first)
        for place, metric in enumerate(self._settings.metrics):
            if metric.ranked is None or first in self._ranked:
                self._scores[place, first] = Scores.of(metric, expected, found, truth)
        self._keep(first, batch, expected, found)

    def _keep(self, first: int, batch: Arrays, expected: Arrays, found: Arrays) -> None:
        count = len(next(iter(batch.values())))
        loose = self._settings.loose
        if first in self._plotted:
            # Figures are of samples: of what belongs to none there is nothing to draw.
            nothing = dict.fromkeys(loose, np.empty((count, 0)))
            self._kept[first] = expected | nothing, found | nothing
        inside = (self._reference_rows >= first) & (self._reference_rows < first + count)
        if inside.any():
            rows = slice(None) if loose else self._reference_rows[inside] - first
            inputs, single, answers = (
                {name: array[rows] for name, array in named.items()}
                for named in (batch, expected, found)
            )
            self._reference[first] = inputs, single, answers

    def outputs(self, data: EvaluationData) -> tuple[ErrorStatistics, ...]:
        """Statistics per output, in the signature's order; the worst samples with their shards."""
        return tuple(
            replace(
                found,
                worst=tuple(replace(w, shard=data.shard_of(w.sample)) for w in found.worst),
            )
            for found in (accumulator.result() for accumulator in self._outputs)
        )

    def ground(self) -> GroundReport | None:
        """Positions in metres; None where no output holds positions."""
        return self._ground[0].result() if self._ground else None

    def uncertainty(self) -> tuple[UncertaintyReport, ...]:
        """Of the PyTorch and of the ONNX model; empty without labels or positions."""
        return tuple(accumulator.result() for accumulator in self._uncertainty)

    def quality(self, data: EvaluationData, contract: Quality) -> tuple[Judged, ...]:
        """What the ONNX model loses by each metric."""
        judged = []
        for place, metric in enumerate(self._settings.metrics):
            parts = {first: s for (one, first), s in self._scores.items() if one == place}
            rows = [np.arange(first, first + len(parts[first].found)) for first in sorted(parts)]
            scores = Scores.joined([parts[first] for first in sorted(parts)])
            scores = scores.beside(np.concatenate(rows), data.weights, data.groups)
            judged.append(judge_quality(metric, scores, contract))
        return tuple(judged)

    def reference(self) -> list[tuple[Arrays, Arrays, Arrays]]:
        """Inputs and both models' outputs of the reference rows, in order."""
        return [self._reference[first] for first in sorted(self._reference)]

    def kept_rows(self) -> npt.NDArray[np.int64]:
        """Which samples `kept` has, in order."""
        name = self._settings.signature.outputs[0].name
        return np.concatenate(
            [
                np.arange(first, first + len(self._kept[first][0][name]))
                for first in sorted(self._kept)
            ]
        )

    def kept(self, side: int) -> Arrays:
        """Outputs of PyTorch (0) or ONNX (1) on evenly spaced batches, for figures."""
        batches = [self._kept[first][side] for first in sorted(self._kept)]
        return {
            spec.name: np.concatenate([batch[spec.name] for batch in batches])
            for spec in self._settings.signature.outputs
        }


def pass_over(
    models: Models,
    data: EvaluationData,
    settings: PassSettings,
    rows: range,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationPass:
    """Take both models over some of the data, a batch at a time.

    Args:
        models: Both models.
        data: The whole data.
        settings: Of the whole pass.
        rows: Which samples; begins where a batch does.
        progress: Called with (samples done, samples in all).

    Raises:
        DataError: If the data can't be read.
        EvidenceError: If a model can't run on a batch, or the outputs have different shapes.
        StoreError: If the store of a dataset fails.
    """
    found = EvaluationPass(settings)
    for part, batch, truth in data.batches(settings.batch_size, rows):
        expected, answers = models.run(batch, settings.signature)
        spread = models.rounding.spread(batch, expected, settings.limits)
        found.update(part.start, batch, expected, answers, truth, spread)
        if progress is not None:
            progress(part.stop - rows.start, len(rows))
    return found
