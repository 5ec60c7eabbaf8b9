"""Parity sample by sample, for a person at an open notebook.

The figures of the report show which errors there are; this says which sample is behind one of them,
and what both models answer to it. What is shown first was compared already; further kinds of input
and batch sizes are run when they are asked for, so that nothing waits for what nobody looks at.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from onnxruntime import InferenceSession
from torch import nn

from heimdall_onnx.common.arrays import Arrays, Floats, in_batches
from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.geodesy import error_m
from heimdall_onnx.evidence.parity.compare import first_rows, further_kinds
from heimdall_onnx.evidence.parity.one_pass import Models
from heimdall_onnx.evidence.parity.report import ParityReport
from heimdall_onnx.evidence.parity.statistics import worst_elements
from heimdall_onnx.evidence.parity.tolerance import EVALUATION, tolerance_factor
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session


@dataclass(frozen=True)
class ExploredSample:
    """One sample with both models' answers.

    Attributes:
        kind: As in `ParityCell`.
        batch_size: Samples in the call that it was part of.
        factor: What the tolerance is multiplied by there.
        index: Its index; of evaluation data its row there.
        shard: The file of a dataset that it is in; empty where there is none.
        inputs: One array per input, without the batch axis.
        pytorch: The PyTorch model's outputs, without the batch axis.
        onnx: The ONNX model's.
        metres: Between both positions; None for a model without positions.
        truth_m: Metres from the true position to PyTorch's and to ONNX's; None where it is not
            known.
    """

    kind: str
    batch_size: int
    factor: float
    index: int
    shard: str
    inputs: Arrays = field(repr=False)
    pytorch: Arrays = field(repr=False)
    onnx: Arrays = field(repr=False)
    metres: float | None
    truth_m: tuple[float, float] | None


class Exploration:
    """Samples of a parity report, each with its inputs and answers when it is asked for.

    Of the evaluation data these are the samples that the report kept for its figures, two thousand
    at most, and those with the largest errors; any other one can be looked up by its index.

    Args:
        parity: What was found.
        data: The evaluation data that it was found on.
        model: The PyTorch model, in eval mode.
        onnx_path: The ONNX file; opened when a model has to run.
    """

    def __init__(
        self,
        parity: ParityReport,
        data: EvaluationData,
        model: nn.Module,
        onnx_path: Path,
    ) -> None:
        self.parity, self.data, self.signature = parity, data, parity.signature
        self._model, self._onnx_path = model, onnx_path
        self._examples = Examples(parity.signature, model)
        self._cells: dict[tuple[str, int], pd.DataFrame] = {}
        self._known = {(cell.kind, cell.batch_size): cell for cell in parity.cells}
        position = self.signature.position_output
        self._position = position.name if position and position.shape[1:] == (2,) else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of input that were compared, the evaluation data first."""
        return tuple(dict.fromkeys(kind for kind, _ in self._known))

    def batch_sizes(self, kind: str) -> tuple[int, ...]:
        """The batch sizes at which a kind was compared, the one with most samples first."""
        return tuple(size for known, size in self._known if known == kind)

    def count(self, kind: str, batch_size: int) -> int:
        """How many samples of a kind there are at a batch size."""
        cell = self._known[self._checked(kind, batch_size)]
        return min(cell.samples, self.data.count) if kind == EVALUATION else cell.samples

    def cell(self, kind: str, batch_size: int) -> pd.DataFrame:
        """Largest errors of the samples of a kind at a batch size.

        Both models run over them, some ten samples, unless the report has kept their answers.

        Returns:
            A row for each output and sample: ``kind`` and ``batch_size``; ``factor`` that the
            tolerance is multiplied by there; ``output``; ``number`` of the sample; ``reference``,
            ``value``, ``error`` and ``excess`` of the element that differs most, as in
            `WorstElements`; ``metres`` between both models' positions, NaN where there are none.

        Raises:
            DataError: If the data can't be read, or the model's own examples do not fit.
            EvidenceError: If a model can't run.
            InvalidModelError: If ONNX Runtime can't load the file.
            ParameterError: If there is no such kind or batch size.
        """
        key = self._checked(kind, batch_size)
        if key not in self._cells:
            self._cells[key] = self._kept_cell() if self._is_first(key) else self._run_cell(*key)
        return self._cells[key]

    def sample(self, kind: str, batch_size: int, index: int) -> ExploredSample:
        """A sample with its inputs and what both models answer to it.

        Unless the report has kept these answers, both models run over the batch that it is in.

        Raises:
            DataError: As `cell`; so are the others.
            EvidenceError: As `cell`.
            InvalidModelError: As `cell`.
            ParameterError: If there is no such sample.
        """
        key = self._checked(kind, batch_size)
        count = self.count(kind, batch_size)
        if not 0 <= index < count:
            raise ParameterError(
                f"{kind} at batch {batch_size} has the samples 0 to {count - 1}, found {index}"
            )
        batch, place = self._batch_of(key, index)
        inputs = {name: array[place] for name, array in batch.items()}
        kept = self.parity.place_of(index) if self._is_first(key) else None
        if kept is None:
            pytorch, onnx = self._models.run(batch, self.signature)
        else:
            place, pytorch, onnx = kept, self.parity.pytorch, self.parity.onnx
        answers = [{n: a[place : place + 1] for n, a in side.items()} for side in (pytorch, onnx)]
        metres = self._metres(*answers)
        return ExploredSample(
            kind=kind,
            batch_size=batch_size,
            factor=self._factor(key),
            index=index,
            shard=self.data.shard_of(index) if kind == EVALUATION else "",
            inputs=inputs,
            pytorch={name: array[0] for name, array in answers[0].items()},
            onnx={name: array[0] for name, array in answers[1].items()},
            metres=None if metres is None else float(metres[0]),
            truth_m=self._off_by(kind, index, *answers),
        )

    def _checked(self, kind: str, batch_size: int) -> tuple[str, int]:
        if (kind, batch_size) not in self._known:
            raise ParameterError(
                f"{kind!r} was not compared at batch {batch_size}; compared were "
                + "; ".join(
                    f"{k} at {', '.join(map(str, self.batch_sizes(k)))}" for k in self.kinds
                )
            )
        return kind, batch_size

    def _is_first(self, key: tuple[str, int]) -> bool:
        return key == next(iter(self._known))

    def _factor(self, key: tuple[str, int]) -> float:
        return tolerance_factor(key[0], self._known[key].valid)

    @functools.cached_property
    def _session(self) -> InferenceSession:
        # As for the comparison: threads that spin would take the processor from PyTorch.
        return open_session(self._onnx_path, spinning=False)

    @property
    def _models(self) -> Models:
        return Models.of(self._model, self._session, self.signature)

    def _inputs(self, kind: str, size: int) -> Arrays:
        """The inputs of a cell other than the first."""
        if kind == EVALUATION:
            return first_rows(self.data, size)
        made = further_kinds(self.data, self._examples, size)
        return next(inputs for found, inputs, _ in made if found == kind)

    def _batch_of(self, key: tuple[str, int], index: int) -> tuple[Arrays, int]:
        """The batch that a sample was compared in, and its place there."""
        kind, size = key
        part = slice(index // size * size, (index // size + 1) * size)
        if self._is_first(key):
            rows = np.arange(part.start, min(part.stop, self.data.count))
            return self.data.rows(rows), index - part.start
        inputs = self._inputs(kind, size)
        return {name: array[part] for name, array in inputs.items()}, index - part.start

    def _kept_cell(self) -> pd.DataFrame:
        parity = self.parity
        key = next(iter(self._known))
        parts = [self._explored(key, parity.plotted, parity.pytorch, parity.onnx)]
        worst = {w.sample for output in parity.evaluation for w in output.worst}
        size = key[1]
        for start in sorted({s // size * size for s in worst if parity.place_of(s) is None}):
            batch, _ = self._batch_of(key, start)
            rows = start + np.arange(len(next(iter(batch.values()))))
            parts.append(self._explored(key, rows, *self._models.run(batch, self.signature)))
        return pd.concat(parts, ignore_index=True)

    def _run_cell(self, kind: str, size: int) -> pd.DataFrame:
        inputs, count = self._inputs(kind, size), self.count(kind, size)
        parts = []
        for start, batch in in_batches(inputs, size):
            pytorch, onnx = self._models.run(batch, self.signature)
            # Rows that fill the last batch are those of the beginning once more.
            rows = np.arange(start, min(start + size, count))
            sides = ({n: a[: len(rows)] for n, a in side.items()} for side in (pytorch, onnx))
            parts.append(self._explored((kind, size), rows, *sides))
        return pd.concat(parts, ignore_index=True)

    def _explored(
        self, key: tuple[str, int], samples: npt.NDArray[Any], pytorch: Arrays, onnx: Arrays
    ) -> pd.DataFrame:
        factor, metres = self._factor(key), self._metres(pytorch, onnx)
        shared = {
            "kind": key[0],
            "batch_size": key[1],
            "factor": factor,
            "number": samples,
            "metres": np.nan if metres is None else metres,
        }
        parts = []
        for spec in self.signature.outputs:
            limit = self.parity.limit(spec.name).times(factor)
            worst = worst_elements(pytorch[spec.name], onnx[spec.name], limit)
            parts.append(pd.DataFrame({**shared, "output": spec.name, **worst._asdict()}))
        return pd.concat(parts, ignore_index=True)

    def _metres(self, pytorch: Arrays, onnx: Arrays) -> Floats | None:
        if self._position is None:
            return None
        a, b = pytorch[self._position], onnx[self._position]
        metres = np.full(len(a), np.nan)
        known = np.isfinite(a).all(axis=1) & np.isfinite(b).all(axis=1)
        metres[known] = error_m(b[known], a[known])
        return metres

    def _off_by(
        self, kind: str, index: int, pytorch: Arrays, onnx: Arrays
    ) -> tuple[float, float] | None:
        if kind != EVALUATION or self._position is None or self.data.positions is None:
            return None
        truth = self.data.positions[index : index + 1]
        off = [float(error_m(side[self._position], truth)[0]) for side in (pytorch, onnx)]
        return off[0], off[1]
