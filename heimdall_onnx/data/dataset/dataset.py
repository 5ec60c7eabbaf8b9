"""Datasets of labelled inputs: one Zarr v3 group of sharded arrays, sample axis first.

Zarr holds any number of n-dimensional arrays of any plain dtype, and inside a few large files
(shards) every row can be read by itself, so that shuffles and resumed epochs are exact; Dask opens
it as it is. Parquet would flatten the arrays, and WebDataset's archives are read in sequence and
shuffled within a buffer only.

```
DATASET/                 attributes: schema_version, meta, receivers, arrays, digest
  inputs/NAME            one array per input of the model
  positions              (N, 2) float64, degrees latitude and longitude; where they are known
  labels                 (N, …) any dtype, what is true of each sample; where it is known
  weights                (N,) float64, what each sample counts; where they differ
  event                  (N,) int64, the event of each sample, counted from 0
  event_names            the events' names as UTF-8, each ended by a newline
```

Samples of one event (a transmission, or recordings that overlap) never fall into two parts of a
split. The layout is Zarr's core specification 3.0 with its codecs `sharding_indexed`, `bytes` and
`zstd`, https://zarr-specs.readthedocs.io/en/latest/v3/core/.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.data.dataset.files import Files, files_at
from heimdall_onnx.data.dataset.schema import (
    EVENT,
    EVENT_NAMES,
    HEADER,
    INPUTS,
    LABELS,
    POSITIONS,
    WEIGHTS,
    GroupFile,
    header_problems,
    label_problems,
)
from heimdall_onnx.data.dataset.shards import (
    ArrayReader,
    ArraySpec,
    read_zarr,
    refuse,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.data.evaluation_file import FeatureSet


@dataclass(frozen=True)
class Split:
    """Rows of a dataset, sorted; no event has rows in two parts.

    Attributes:
        train: Rows to train on, int64.
        validation: Rows to choose the best checkpoint by.
        test: Rows that training never sees.
    """

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def open_dataset(
    address: Path | str, *, labels: bool = True, client: S3Client | None = None
) -> Dataset:
    """Open a dataset in a folder, or in the bucket at ``s3://bucket/folder``; reads no inputs.

    What is read is not trusted: dtypes are plain ones, codecs those that are written here, counts
    agree, labels are finite and on the globe, and the header fits its own digest.
    `Dataset.verify` holds the values against it too.

    Args:
        address: The folder or the address.
        labels: Read and check labels and events at once, which all have to fit into memory. Without
            that they are read when they are asked for.
        client: Client of the store; by default one of the environment's.

    Raises:
        DataError: If it is no such dataset; every problem is named.
        StoreError: If the store fails.
    """
    dataset = Dataset(files_at(address, client))
    if labels:
        found = label_problems(dataset.positions, dataset.event, dataset.event_names)
        refuse(dataset.address, found)
    return dataset


class Dataset:
    """A dataset; made by `open_dataset`.

    Pickled, it is its address and digest: each process opens the files for itself.

    Attributes:
        files: Its files.
        count: Number of samples, N.
        meta: Provenance and feature parameters.
        receivers: Positions of receivers by name, degrees latitude and longitude.
        arrays: Dtype, shape and SHA-256 of each array in the group by its name.
        digest: SHA-256 of all of it (names, dtypes, shapes, values in order, ``meta``, receivers),
            whatever the chunks.
    """

    def __init__(self, files: Files) -> None:
        self.files = files
        header = read_zarr(files, HEADER, TypeAdapter(GroupFile), "dataset").attributes
        self.arrays: dict[str, ArraySpec] = dict(header.arrays)
        refuse(files.address, header_problems(header))
        self.meta, self.receivers = dict(header.meta), dict(header.receivers)
        self.digest = header.digest
        self.count = self.arrays[EVENT].shape[0]
        self.readers = {name: ArrayReader(files, name, spec) for name, spec in self.arrays.items()}

    @property
    def address(self) -> str:
        """Its folder, or its address in the bucket."""
        return self.files.address

    @property
    def path(self) -> Path:
        """Its folder on disk.

        Raises:
            DataError: If it is in the bucket.
        """
        if self.address.startswith("s3://"):
            raise DataError(f"expected a dataset on disk, found {self.address}; download it first")
        return Path(self.address)

    @cached_property
    def positions(self) -> npt.NDArray[np.float64] | None:
        """True positions (N, 2) float64, degrees latitude and longitude, or None."""
        return self.readers[POSITIONS][:] if POSITIONS in self.arrays else None

    @cached_property
    def event(self) -> npt.NDArray[np.int64]:
        """Number of each sample's event (N,), int64."""
        return self.readers[EVENT][:]

    @cached_property
    def event_names(self) -> tuple[str, ...]:
        """The events' names, in the order of their numbers."""
        text = self.readers[EVENT_NAMES][:].tobytes().decode(errors="replace")
        return tuple(text.split("\n")[:-1])

    def __repr__(self) -> str:
        return f"<Dataset {self.address} of {self.count} samples, {self.digest[:12]}…>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.files, self.digest)

    def rows(self, indices: npt.ArrayLike) -> Arrays:
        """The inputs of some samples, in the order asked for.

        Raises:
            DataError: If an index is out of range, or a file is damaged or holds NaN or Inf.
        """
        wanted = np.asarray(indices, np.int64).reshape(-1)
        return {n.removeprefix(INPUTS): self.readers[n].rows(wanted) for n in self._input_names()}

    def split(self, *, validation: float, test: float = 0.1, seed: int = 0) -> Split:
        """Divide the samples by event.

        An event's part follows from a hash of the seed and its name alone, so that an event stays
        in its part whatever is added later. Shares are therefore met on average only.

        Args:
            validation: Share of the events, 0 to 1; 0 means none.
            test: Share of the events.
            seed: Another one gives another division.

        Raises:
            ParameterError: If the shares are out of range.
            DataError: If a part that was asked for gets no event.
        """
        if not (0 <= validation < 1 and 0 <= test < 1 and validation + test < 1):
            raise ParameterError(
                "the shares of validation and test must be at least 0 and less than 1 together, "
                f"found {validation!r} and {test!r}"
            )
        part = _parts(self.event_names, validation, test, seed)
        asked = {"train": True, "validation": validation > 0, "test": test > 0}
        if empty := [n for i, n in enumerate(asked) if asked[n] and not (part == i).any()]:
            raise DataError(
                f"dataset {self.address}: with seed {seed} no event falls into {', '.join(empty)} "
                f"({len(self.event_names)} events, shares of validation {validation:g} and test "
                f"{test:g}); take another seed, larger shares, or more events"
            )
        rows = part[self.event]
        return Split(*(np.flatnonzero(rows == i).astype(np.int64) for i in range(3)))

    def verify(self) -> None:
        """Read everything and hold it against the digest.

        Raises:
            DataError: With every array whose values are not those that were written, or NaN or
                Inf.
        """
        problems = (self.problem_of(name) for name in self.arrays)
        refuse(self.address, filter(None, problems))

    def problem_of(self, name: str) -> str:
        """What is wrong with the values of an array, in words; empty where nothing is."""
        try:
            sha256 = self.readers[name].sha256()
        except DataError as error:
            return str(error)
        expected = self.arrays[name].sha256
        return "" if sha256 == expected else f"{name}: expected SHA-256 {expected}, found {sha256}"

    def write_evaluation_data(
        self, path: Path | str, rows: npt.ArrayLike, **meta: Any
    ) -> FeatureSet:
        """Write some samples as the ``.npz`` that a release evaluates on.

        Args:
            path: The file; one that exists is replaced.
            rows: Which samples, e.g. those of `Split.test`; they have to fit into memory.
            **meta: Added to the dataset's ``meta``, e.g. ``centre``.

        Raises:
            DataError: If there are no rows, or the file can't be written.
        """
        # Imported here, since SciPy takes a second that the processes that only read do without.
        from heimdall_onnx.data.evaluation_file import SCHEMA, receiver_list, write_feature_file

        wanted = np.asarray(rows, np.int64).reshape(-1)
        if not wanted.size:
            raise DataError(f"dataset {self.address}: no samples to write to {path}")
        arrays: Arrays = self.rows(wanted)
        known = (POSITIONS, LABELS, WEIGHTS)
        arrays |= {n: self.readers[n][wanted] for n in known if n in self.arrays}
        arrays["groups"] = self.event[wanted]
        all_meta = {"schema": SCHEMA, **self.meta, "receivers": receiver_list(self.receivers)}
        if isinstance(events := self.meta.get("events"), list):
            named = {self.event_names[i] for i in np.unique(self.event[wanted])}
            all_meta["events"] = [
                e for e in events if not isinstance(e, dict) or e.get("event") in named
            ]
        all_meta["dataset"] = {"digest": self.digest, "samples": self.count}
        return write_feature_file(Path(path), arrays, {**all_meta, **meta})

    def file_names(self) -> Iterator[str]:
        """Every file that belongs to it; what else lies there is none of it."""
        for name, reader in self.readers.items():
            yield f"{name}/{HEADER}"
            yield from reader.shards
        yield HEADER

    @property
    def shards(self) -> int:
        """Number of files that hold values."""
        return sum(len(file.shards) for file in self.readers.values())

    @property
    def stored_bytes(self) -> int:
        """Bytes of these files."""
        return sum(self.files.seen[s][0] for file in self.readers.values() for s in file.shards)

    def _input_names(self) -> list[str]:
        return [name for name in self.arrays if name.startswith(INPUTS)]


def _open_again(files: Files, digest: str) -> Dataset:
    dataset = Dataset(files)
    if dataset.digest != digest:
        raise DataError(
            f"dataset {files.address} was replaced while it was in use: expected digest {digest}, "
            f"found {dataset.digest}"
        )
    return dataset


def _parts(events: Sequence[str], validation: float, test: float, seed: int) -> npt.NDArray[Any]:
    """0, 1 or 2 for each event: train, validation or test."""
    hashes = (hashlib.sha256(f"{seed}\n{event}".encode()).digest()[:8] for event in events)
    drawn = np.array([int.from_bytes(h, "big") / 2**64 for h in hashes])
    return np.where(drawn < test, 2, np.where(drawn < test + validation, 1, 0))
