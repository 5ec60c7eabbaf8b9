"""Evaluation data: the inputs on which the ONNX model must agree with the PyTorch one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.errors import DataError
from heimdall_onnx.examples import examples_of
from heimdall_onnx.npz import Rows, read_npz, whole
from heimdall_onnx.signature import Arrays, Signature
from heimdall_onnx.untrusted import shown

SYNTHETIC_SAMPLES = 64


@dataclass(frozen=True)
class EvaluationData:
    """Inputs of the model, sample axis first, and what is known about them.

    Attributes:
        inputs: One array per input of the signature, N samples each; large ones of a file are
            read row by row.
        positions: True positions (N, 2) in degrees latitude and longitude, or None.
        meta: Provenance and feature parameters as the file records them.
        source: File name, or ``"synthetic inputs"``.
        sha256: SHA-256 of the file; None for synthetic inputs.
        receivers: Name to (latitude, longitude) in degrees, where the file gives them.
    """

    inputs: Mapping[str, Rows] = field(repr=False)
    positions: npt.NDArray[np.float64] | None = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    source: str
    sha256: str | None
    receivers: dict[str, tuple[float, float]]

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(next(iter(self.inputs.values())).shape[0])

    @property
    def synthetic(self) -> bool:
        """Whether the inputs are random numbers rather than data."""
        return self.sha256 is None

    @property
    def provenance(self) -> str:
        """Where the inputs come from, as far as the file says."""
        if self.synthetic:
            return str(self.meta.get("provenance", "seeded random numbers"))
        said = str(self.meta.get("provenance", "not recorded"))
        try:
            recordings = [r for event in self.meta["events"] for r in event["recordings"]]
            starts = sorted(r["start"] for r in recordings if r["start"])
            names = sorted({r["receiver"] for r in recordings if r["receiver"]})
            since = f", from {starts[0]}" if starts else ""
            return f"{len(recordings)} {said}{since}, of {', '.join(names) or 'unnamed receivers'}"
        except (KeyError, TypeError):
            return said

    def rows(self, indices: npt.ArrayLike) -> Arrays:
        """The inputs at ``indices``, taken modulo the number of samples."""
        wrapped = np.asarray(indices) % self.count
        return {name: array[wrapped] for name, array in self.inputs.items()}

    def batches(self, size: int) -> Iterator[tuple[slice, Arrays]]:
        """All samples in order, at most ``size`` at a time."""
        for start in range(0, self.count, size):
            part = slice(start, min(start + size, self.count))
            yield part, {name: array[part] for name, array in self.inputs.items()}

    def head(self, count: int) -> EvaluationData:
        """The first ``count`` samples."""
        if count >= self.count:
            return self
        return EvaluationData(
            {name: array[:count] for name, array in self.inputs.items()},
            None if self.positions is None else self.positions[:count],
            self.meta,
            self.source,
            self.sha256,
            self.receivers,
        )


def load_evaluation_data(
    path: Path | str | None, signature: Signature, model: object = None
) -> EvaluationData:
    """Read an ``.npz`` with one array per input, or make synthetic inputs where there is none.

    Args:
        path: The file; ``positions`` (N, 2) and ``meta`` (JSON text) in it are optional. None
            gives 64 seeded samples.
        signature: What the arrays must fit.
        model: Makes the samples where it has a method for that; see `heimdall_onnx.examples`.

    Raises:
        DataError: If the file can't be read or does not fit; every problem is named.
    """
    if path is None:
        examples = examples_of(model, signature)
        made_by = f"seeded examples of {type(model).__name__}'s own making"
        meta = {"provenance": made_by} if examples.own else {}
        synthetic = examples.valid(SYNTHETIC_SAMPLES)
        return EvaluationData(synthetic, None, meta, "synthetic inputs", None, {})
    path = Path(path)
    arrays, sha256 = _read_npz(path)
    wanted = [spec.name for spec in signature.inputs]
    inputs = {name: arrays[name] for name in wanted if name in arrays}
    problems: list[str] = []
    count = None
    try:
        count = signature.check_inputs(inputs or arrays, str(path))
    except DataError as error:
        problems.append(str(error))
    else:
        problems += unknown_ids(inputs, signature)
    positions = _read_positions(arrays, count, problems)
    meta = _read_meta(arrays, problems)
    receivers = _read_receivers(meta, problems)
    if problems:
        raise DataError(f"evaluation data {path} can't be used:\n  - " + "\n  - ".join(problems))
    return EvaluationData(inputs, positions, meta, path.name, sha256, receivers)


def unknown_ids(inputs: Mapping[str, Rows], signature: Signature) -> Iterator[str]:
    """Integers beyond their range, which a model would look up where nothing is, in words."""
    for spec in signature.inputs:
        if spec.range is None or not np.issubdtype(np.dtype(spec.dtype), np.integer):
            continue
        ids = whole(inputs[spec.name])
        beyond = (ids < spec.range[0]) | (ids > spec.range[1])
        rows = np.flatnonzero(beyond.reshape(len(ids), -1).any(axis=1))
        if rows.size:
            yield (
                f"`{spec.name}` must be in [{spec.range[0]:g}, {spec.range[1]:g}], as the model "
                f"declares; {ids[beyond].min()} to {ids[beyond].max()} are in {rows.size} samples, "
                f"first in sample {rows[0]}"
            )


def _read_npz(path: Path) -> tuple[dict[str, Rows], str]:
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            return read_npz(file), sha256
    except Exception as error:  # zipfile, zlib and NumPy share no narrower base
        reason = shown(str(error) or type(error).__name__, 400)
        raise DataError(
            f"evaluation data {path} can't be read: {reason}. Expected an .npz of "
            "plain arrays, one per input of the model, as `heimdall-onnx features` writes it"
        ) from error


def _read_meta(arrays: Mapping[str, Rows], problems: list[str]) -> dict[str, Any]:
    if "meta" not in arrays:
        return {}
    try:
        meta = json.loads(str(whole(arrays["meta"])[()]))
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits too
        problems.append(f"`meta` is not JSON text: {shown(str(error))}")
        return {}
    if not isinstance(meta, dict):
        problems.append(f"`meta` must be a JSON object, found {type(meta).__name__}")
        return {}
    if (centre := meta.get("centre")) is not None:
        try:
            latitude, longitude = map(float, centre)
        except (TypeError, ValueError, OverflowError):
            latitude = longitude = float("nan")
        if not (abs(latitude) <= 90 and abs(longitude) <= 180):
            problems.append(
                f"`meta.centre` must be a latitude and a longitude, found {shown(centre)}"
            )
    return meta


def _read_positions(
    arrays: Mapping[str, Rows], count: int | None, problems: list[str]
) -> npt.NDArray[np.float64] | None:
    if "positions" not in arrays:
        return None
    positions = whole(arrays["positions"])
    samples = positions.shape[:1] if count is None else (count,)
    if positions.shape != (*samples, 2) or not np.issubdtype(positions.dtype, np.floating):
        problems.append(
            f"`positions` must be floating-point degrees of shape ({count or 'samples'}, 2), found "
            f"{positions.dtype} {positions.shape}"
        )
        return None
    degrees = positions.astype(np.float64)
    elsewhere = np.flatnonzero(~(np.abs(degrees) <= (90.0, 180.0)).all(axis=1))
    if elsewhere.size:
        problems.append(
            "`positions` must be latitudes in [-90, 90] and longitudes in [-180, 180]; they are "
            f"not in {elsewhere.size} samples, first in sample {elsewhere[0]}"
        )
    return degrees


def _read_receivers(meta: dict[str, Any], problems: list[str]) -> dict[str, tuple[float, float]]:
    try:
        return {
            str(entry["name"]): (float(entry["latitude"]), float(entry["longitude"]))
            for entry in meta.get("receivers", [])
        }
    except (TypeError, KeyError, ValueError, OverflowError) as error:
        problems.append(
            "`meta.receivers` must be a list of objects with name, latitude and "
            f"longitude ({shown(repr(error))})"
        )
        return {}
