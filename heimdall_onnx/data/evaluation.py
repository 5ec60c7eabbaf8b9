"""Evaluation data: the inputs on which the ONNX model must agree with the PyTorch one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import (
    FIRST_ROWS,
    IN_MEMORY_BYTES,
    UNNAMED,
    Arrays,
    Rows,
    in_batches,
    parts,
)
from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import meant, shown
from heimdall_onnx.data.dataset.dataset import Dataset, open_dataset
from heimdall_onnx.data.dataset.schema import (
    EVENT,
    HEADER,
    INPUTS,
    LABELS,
    POSITIONS,
    WEIGHTS,
    beyond_globe,
    weight_problems,
)
from heimdall_onnx.data.files import converted, read_arrays, type_of
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)

SYNTHETIC_SAMPLES = 64
META, GROUPS = "meta", "groups"
READ_BYTES = 8 << 20


@dataclass(frozen=True)
class EvaluationData:
    """Inputs of the model, sample axis first, and what is known about them.

    Attributes:
        inputs: One array per input of the signature, N samples each; large ones of a file are
            mapped, those of a dataset read row by row.
        positions: True positions (N, 2) in degrees latitude and longitude, or None; those of a
            dataset are read as its inputs are.
        meta: Provenance and feature parameters as the file records them.
        source: Name of the file or the dataset, or ``"synthetic inputs"``.
        sha256: SHA-256 of the file, or the dataset's digest; None for synthetic inputs.
        receivers: Name to (latitude, longitude) in degrees, where the file gives them.
        dataset: The dataset that the samples are the first of; None for a file.
        conversions: From which to which type inputs were converted, in words.
        labels: What is true of each sample (N, …), for the metrics of its task; or None.
        weights: What each sample counts (N,), positive; None where all count the same.
        groups: Which samples belong together (N,), of any values; None where each stands for
            itself. Those of a dataset belong to its events.
    """

    inputs: Mapping[str, Rows] = field(repr=False)
    positions: Rows | None = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    source: str
    sha256: str | None
    receivers: dict[str, tuple[float, float]]
    dataset: Dataset | None = field(default=None, repr=False)
    conversions: tuple[str, ...] = ()
    labels: Rows | None = field(default=None, repr=False)
    weights: Rows | None = field(default=None, repr=False)
    groups: Rows | None = field(default=None, repr=False)

    @property
    def truth(self) -> dict[str, Rows]:
        """What is known of the samples: ``"positions"`` and ``"labels"``, as far as they are."""
        known = {POSITIONS: self.positions, LABELS: self.labels}
        return {name: rows for name, rows in known.items() if rows is not None}

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
        """Where the inputs come from, as far as the file says, and what was converted."""
        if self.synthetic:
            return str(self.meta.get("provenance", "seeded random numbers"))
        return "; ".join((self._recorded, *self.conversions))

    @property
    def _recorded(self) -> str:
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

    def batches(
        self, size: int, rows: range | None = None
    ) -> Iterator[tuple[slice, Arrays, Arrays]]:
        """Samples in order, at most ``size`` at a time: which, their inputs and their `truth`.

        Args:
            size: Samples in a batch.
            rows: Which samples; all by default.
        """
        rows = range(self.count) if rows is None else rows
        step = size * max(1, READ_BYTES // max(size * self.row_bytes, 1))
        for first in range(rows.start, rows.stop, step):
            # Some megabytes at a time: of data in a bucket every read is a request.
            read = slice(first, min(first + step, rows.stop))
            inputs = {name: array[read] for name, array in self.inputs.items()}
            known = {name: rows[read] for name, rows in self.truth.items()}
            for start, batch in in_batches(inputs, size):
                part = slice(first + start, min(first + start + size, read.stop))
                yield part, batch, {n: rows[start : start + size] for n, rows in known.items()}

    @property
    def row_bytes(self) -> int:
        """What the inputs of a sample take."""
        return sum(a.dtype.itemsize * math.prod(a.shape[1:]) for a in self.inputs.values())

    def shard_of(self, sample: int) -> str:
        """The file of a dataset that a sample's first input is in; empty where there is none."""
        if self.dataset is None:
            return ""
        reader = self.dataset.readers[f"{INPUTS}{next(iter(self.inputs))}"]
        return reader.shards[sample // reader.shard_rows]

    def head(self, count: int) -> EvaluationData:
        """The first ``count`` samples."""
        return self.taken(slice(0, count)) if count < self.count else self

    def spread(self, count: int) -> EvaluationData:
        """At most ``count`` samples and 256 MiB, evenly spaced; in memory where there are more."""
        count = min(count, max(1, IN_MEMORY_BYTES // max(self.row_bytes, 1)))
        if count >= self.count:
            return self
        return replace(
            self.taken(np.linspace(0, self.count - 1, count).astype(np.int64)), dataset=None
        )

    def taken(self, rows: slice | npt.NDArray[np.int64]) -> EvaluationData:
        """Some of the samples."""
        named = {n: getattr(self, n) for n in (POSITIONS, LABELS, WEIGHTS, GROUPS)}
        beside: dict[str, Any] = {n: a[rows] for n, a in named.items() if a is not None}
        inputs = {name: array[rows] for name, array in self.inputs.items()}
        return replace(self, inputs=inputs, **beside)


def load_evaluation_data(
    path: Path | str | Dataset | None,
    signature: Signature,
    model: object = None,
    *,
    verify: bool = True,
    ignore: Sequence[str] = (),
) -> EvaluationData:
    """Read evaluation data, or make synthetic inputs where there is none.

    Args:
        path: A file or Zarr group as `read_arrays` takes them with one array per input, in which
            ``positions`` (N, 2), ``labels`` (N, …), ``weights`` (N,), ``groups`` (N,) and ``meta``
            (JSON text) are optional; or a dataset, open or in a folder or at
            ``s3://bucket/folder``, of which only what is asked for comes into memory. None gives 64
            seeded samples.
        signature: What the arrays must fit.
        model: Makes the samples where it has a method for that; see `model.examples`.
        verify: Read all of a dataset and hold it against its digest; who does without must do so
            before anything is said of it.
        ignore: Arrays of a file that are meant to be used by nothing.

    Raises:
        DataError: If it can't be read or does not fit; every problem is named.
        StoreError: If the store of a dataset fails.
    """
    if path is None:
        examples = Examples(signature, model)
        made_by = f"seeded examples of {type(model).__name__}'s own making"
        meta = {"provenance": made_by} if examples.own else {}
        if ends := examples.integers:
            meta["provenance"] = f"seeded random numbers, integers from {ends[0]} to {ends[1]}"
        synthetic = examples.valid(SYNTHETIC_SAMPLES)
        return EvaluationData(synthetic, None, meta, "synthetic inputs", None, {})
    if isinstance(path, Dataset) or is_dataset(path):
        # Labels are read as the inputs are, since there may be more than memory holds.
        dataset = path if isinstance(path, Dataset) else open_dataset(path, labels=False)
        return _of_dataset(dataset, signature, verify=verify)
    if str(path).startswith("s3://"):
        raise DataError(
            f"expected evaluation data in a file, found {path}; only datasets are read from a "
            "bucket"
        )
    path = Path(path)
    arrays, sha256 = read_arrays(path)
    if len(arrays) == len(signature.inputs) == 1 and (name := next(iter(arrays))) in UNNAMED:
        arrays = {signature.inputs[0].name: arrays[name]}
    specs = [spec for spec in signature.inputs if spec.name in arrays]
    found = {spec.name: converted(arrays[spec.name], spec.dtype) for spec in specs}
    conversions = tuple(
        f"{name} converted from {type_of(arrays[name])} to {array.dtype}"
        for name, array in found.items()
        if array.dtype != arrays[name].dtype
    )
    problems: list[str] = []
    known = (*signature.input_names, POSITIONS, LABELS, WEIGHTS, GROUPS, META)
    problems += [
        f"nothing uses {shown(name)}: {meant(name, known)}; name it as it is expected, leave it "
        "out, or say that nothing is to use it (--ignore)"
        for name in sorted(arrays.keys() - {*known, *ignore} if found else ())
    ]
    problems += [
        f"there is no array {shown(name)} to be ignored" for name in ignore if name not in arrays
    ]
    inputs, count = _checked_inputs(found or arrays, signature, path, problems)
    beside = {n: a for n, a in arrays.items() if n not in {*signature.input_names, *ignore}}
    positions = _read_positions(beside, count, problems)
    meta = _read_meta(beside, problems)
    receivers = _read_receivers(meta, problems)
    judged = _read_labels(beside, count, problems)
    _require_none(problems, path)
    return EvaluationData(
        inputs, positions, meta, path.name, sha256, receivers, conversions=conversions, **judged
    )


def first_rows(path: Path | str | None, ignore: Sequence[str] = ()) -> Arrays | None:
    """The first rows of every array of evaluation data, as `derive_signature` looks at them.

    Args:
        path: As for `load_evaluation_data`; None gives None.
        ignore: Arrays that nothing is to use.

    Raises:
        DataError: If it can't be read.
        StoreError: If the store of a dataset fails.
    """
    if path is None:
        return None
    arrays: Mapping[str, Rows]
    if is_dataset(path):
        readers = open_dataset(path, labels=False).readers
        arrays = {n.removeprefix(INPUTS): r for n, r in readers.items() if n.startswith(INPUTS)}
    else:
        arrays = read_arrays(Path(path))[0]
    first = {
        name: array[:FIRST_ROWS]
        for name, array in arrays.items()
        if array.ndim and name not in (POSITIONS, LABELS, WEIGHTS, GROUPS, *ignore)
    }
    return {
        name: converted(rows, "float32" if type_of(rows) == "bfloat16" else rows.dtype.name)
        for name, rows in first.items()
        if len(rows) and (rows.dtype.kind in "fiub" or type_of(rows) == "bfloat16")
    }


def is_dataset(path: Path | str) -> bool:
    """Whether evaluation data there are a dataset: a folder, or one in a bucket."""
    text = str(path)
    if text.startswith("s3://"):
        return not text.endswith(".npz")
    if not text or not Path(path).is_dir():
        return False
    # A group of another tool lacks what the header of a dataset says of itself.
    header = Path(path) / HEADER
    return not header.is_file() or '"digest"' in header.read_text(errors="replace")


def _of_dataset(dataset: Dataset, signature: Signature, *, verify: bool) -> EvaluationData:
    path, problems = dataset.address, list[str]()
    arrays = {name.removeprefix(INPUTS): reader for name, reader in dataset.readers.items()}
    inputs, count = _checked_inputs(arrays, signature, path, problems)
    positions = arrays.get(POSITIONS)
    if positions is not None:
        problems += beyond_globe(positions)
    if (weights := arrays.get(WEIGHTS)) is not None:
        problems += weight_problems(weights)
    _check_centre(dataset.meta, problems)
    _require_none(problems, path)
    if verify:
        dataset.verify()
    log.info("dataset opened", address=dataset.address, samples=count, digest=dataset.digest)
    return EvaluationData(
        inputs,
        positions,
        dataset.meta,
        PurePosixPath(dataset.address).name,
        dataset.digest,
        dataset.receivers,
        dataset,
        labels=arrays.get(LABELS),
        weights=weights,
        groups=arrays[EVENT],
    )


def _checked_inputs(
    arrays: Mapping[str, Rows], signature: Signature, path: Path | str, problems: list[str]
) -> tuple[dict[str, Rows], int | None]:
    """The model's inputs among the arrays, and their number where they fit."""
    wanted = [spec.name for spec in signature.inputs]
    inputs = {name: arrays[name] for name in wanted if name in arrays}
    try:
        count = signature.check_inputs(inputs or arrays, str(path))
    except DataError as error:
        problems.append(str(error))
        return inputs, None
    problems += unknown_ids(inputs, signature)
    return inputs, count


def _require_none(problems: list[str], path: Path | str) -> None:
    if problems:
        raise DataError(f"evaluation data {path} can't be used:\n  - " + "\n  - ".join(problems))


def unknown_ids(inputs: Mapping[str, Rows], signature: Signature) -> Iterator[str]:
    """Integers beyond their range, which a model would look up where nothing is, in words."""
    for spec in signature.inputs:
        if spec.range is None or not np.issubdtype(np.dtype(spec.dtype), np.integer):
            continue
        low, high = spec.range
        rows, least, most = [np.empty(0, np.intp)], [], []
        for start, ids in parts(inputs[spec.name]):
            beyond = (ids < low) | (ids > high)
            if beyond.any():
                rows.append(start + np.flatnonzero(beyond.reshape(len(ids), -1).any(axis=1)))
                least.append(int(ids[beyond].min()))
                most.append(int(ids[beyond].max()))
        if least:
            found = np.concatenate(rows)
            yield (
                f"`{spec.name}` must be in [{low:g}, {high:g}], as the model declares; "
                f"{min(least)} to {max(most)} are in {found.size} samples, first in sample "
                f"{found[0]}"
            )


def _read_meta(arrays: Arrays, problems: list[str]) -> dict[str, Any]:
    if META not in arrays:
        return {}
    try:
        meta = json.loads(str(arrays[META][()]))
    except (ValueError, RecursionError) as error:  # ValueError: a number of too many digits too
        problems.append(f"`meta` is not JSON text: {shown(str(error))}")
        return {}
    if not isinstance(meta, dict):
        problems.append(f"`meta` must be a JSON object, found {type(meta).__name__}")
        return {}
    _check_centre(meta, problems)
    return meta


def _check_centre(meta: Mapping[str, Any], problems: list[str]) -> None:
    if (centre := meta.get("centre")) is None:
        return
    try:
        latitude, longitude = map(float, centre)
    except (TypeError, ValueError, OverflowError):
        latitude = longitude = float("nan")
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        problems.append(f"`meta.centre` must be a latitude and a longitude, found {shown(centre)}")


def _read_positions(
    arrays: Arrays, count: int | None, problems: list[str]
) -> npt.NDArray[np.float64] | None:
    if POSITIONS not in arrays:
        return None
    positions = arrays[POSITIONS]
    samples = positions.shape[:1] if count is None else (count,)
    if positions.shape == (*samples, 1, 2):
        positions = positions[:, 0]
    if positions.shape != (*samples, 2) or positions.dtype.kind not in "fiu":
        problems.append(
            f"`positions` must be degrees of shape ({count or 'samples'}, 2), found "
            f"{positions.dtype} {positions.shape}"
        )
        return None
    degrees = positions.astype(np.float64)
    problems += beyond_globe(degrees)
    return degrees


def _read_labels(arrays: Arrays, count: int | None, problems: list[str]) -> dict[str, Any]:
    """Labels, weights and groups, as far as there are any."""
    found: dict[str, Any] = {name: arrays.get(name) for name in (LABELS, WEIGHTS, GROUPS)}
    for name, array in found.items():
        if array is None:
            continue
        words = name == GROUPS and array.dtype.kind in "US"
        if array.dtype.kind not in "fiub" and not words:
            problems.append(f"`{name}` must be numbers, found {array.dtype}")
        elif array.shape[:1] != (count or len(np.atleast_1d(array)),) or (
            name != LABELS and array.ndim != 1
        ):
            problems.append(
                f"`{name}` must have one entry for each of {count} samples, found the shape "
                f"{array.shape}"
            )
        elif name == LABELS and array.dtype.kind == "f" and not np.isfinite(array).all():
            problems.append("`labels` have NaN or Inf: leave samples out that have no label")
        elif name == WEIGHTS:
            problems += weight_problems(array)
    return found


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
