"""The inputs that a quantizer sees, and those that judge it: never the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data.evaluation import EvaluationData


@dataclass(frozen=True, kw_only=True)
class CalibrationFigures:
    """What ranges were calibrated on, as a release records it.

    Attributes:
        source: Where the calibration inputs come from.
        rows: Their rows in that source, ascending.
        sha256: SHA-256 over the calibration inputs' bytes, in the order of their names.
        left_out: Evaluation samples that equal a calibration input and therefore do not judge.
    """

    source: str
    rows: tuple[int, ...] = field(repr=False)
    sha256: str
    left_out: int

    @property
    def samples(self) -> int:
        """Calibration inputs."""
        return len(self.rows)


@dataclass(frozen=True, kw_only=True)
class CalibrationSplit(CalibrationFigures):
    """Evaluation data in two parts without a common input.

    Attributes:
        inputs: What ranges are calibrated on, one array per input.
        evaluation: What variants are judged on.
        file_sha256: SHA-256 of the file that they come from, as it was read; None for none.
    """

    inputs: Arrays = field(repr=False)
    evaluation: EvaluationData = field(repr=False)
    file_sha256: str | None


def split_calibration(
    data: EvaluationData,
    *,
    samples: int,
    judged: int,
    seed: int = 0,
    calibration: EvaluationData | None = None,
) -> CalibrationSplit:
    """Set calibration inputs apart.

    Args:
        data: Evaluation data, N samples.
        samples: Calibration inputs wanted; at most half of the data is taken for them.
        judged: Evaluation samples wanted, at most; drawn evenly where there are more.
        seed: Of the draw.
        calibration: Inputs to calibrate on instead; evaluation samples equal to one of them are
            left out.

    Raises:
        DataError: If no sample is left to judge with.
    """
    rng = np.random.default_rng(seed)
    source = data if calibration is None else calibration
    most = data.count // 2 if calibration is None else source.count
    chosen = np.sort(rng.permutation(source.count)[: min(samples, most)])
    rest = np.arange(data.count)
    if calibration is None:
        rest = np.setdiff1d(rest, chosen)
    if chosen.size == 0 or rest.size == 0:
        raise DataError(
            f"{data.source} has {data.count} samples: expected at least two, one to calibrate on "
            "and one to judge with"
        )
    inputs = source.rows(chosen)
    seen = set(_row_hashes(inputs))
    rest = rest[np.unique(np.linspace(0, rest.size - 1, min(judged, rest.size)).astype(int))]
    held = data.rows(rest)
    fresh = np.array([digest not in seen for digest in _row_hashes(held)])
    if not fresh.any():
        raise DataError(
            f"every sample of {data.source} is among the calibration inputs of {source.source}: "
            "there is nothing left to judge with"
        )
    kept = rest[fresh]
    inputs_of = {name: array[fresh] for name, array in held.items()}
    evaluation = replace(data.taken(kept), inputs=inputs_of)
    content = b"".join(_bytes(inputs[name]) for name in sorted(inputs))
    return CalibrationSplit(
        inputs=inputs,
        evaluation=evaluation,
        source=source.source,
        rows=tuple(map(int, chosen)),
        sha256=hashlib.sha256(content).hexdigest(),
        file_sha256=source.sha256,
        left_out=int((~fresh).sum()),
    )


def _row_hashes(inputs: Arrays) -> list[bytes]:
    count = len(next(iter(inputs.values())))
    return [
        hashlib.sha256(b"".join(_bytes(inputs[name][row]) for name in sorted(inputs))).digest()
        for row in range(count)
    ]


def _bytes(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()
