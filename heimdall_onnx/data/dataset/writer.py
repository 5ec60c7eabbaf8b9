"""Writing a dataset: complete or absent, in constant memory."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed
from heimdall_onnx.data.dataset.schema import (
    DATASET_VERSION,
    EVENT,
    EVENT_NAMES,
    INPUTS,
    LABELS,
    POSITIONS,
    WEIGHTS,
    digest_of,
    sample_problems,
)
from heimdall_onnx.data.dataset.shards import ArrayWriter, describe_rows, import_extra

log = get_logger(__name__)


@contextmanager
def create_dataset(
    path: Path | str,
    *,
    meta: Mapping[str, Any],
    receivers: Mapping[str, tuple[float, float]] | None = None,
) -> Iterator[DatasetWriter]:
    """Write a dataset: complete when the block ends without an error, otherwise absent.

    Memory holds one shard of each array and the events' names, however much is appended.

    Args:
        path: The folder to make; must not exist.
        meta: Provenance and feature parameters, JSON. What is known only at the end goes into the
            writer's ``meta``.
        receivers: Positions of receivers by name, degrees latitude and longitude.

    Raises:
        DataError: If the folder exists or can't be written, nothing was appended, or ``meta`` is
            no JSON.
        UnavailableError: Without the package Zarr.
    """
    import_extra("zarr")
    path = Path(path)
    if path.exists():
        raise DataError(f"dataset {path} exists already; delete it, or write to another folder")
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o755)  # mkdtemp's 0700 would hide the result from other users
        writer = DatasetWriter(temporary, dict(meta), dict(receivers or {}))
        yield writer
        digest = writer.finish()
        temporary.rename(path)
    except OSError as error:
        raise DataError(f"dataset {path} can't be written: {error}") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    log.info("dataset.written", path=path.name, samples=writer.count, digest=digest)


class DatasetWriter:
    """Takes samples in any portions; made by `create_dataset`.

    Attributes:
        meta: What will be recorded as ``meta``; may be added to until the block ends.
        count: Samples appended so far.
    """

    def __init__(
        self, folder: Path, meta: dict[str, Any], receivers: dict[str, tuple[float, float]]
    ) -> None:
        self._root = import_extra("zarr").create_group(folder, zarr_format=3)
        self._arrays: dict[str, ArrayWriter] = {}
        self._rows: dict[str, str] = {}
        self._events: dict[str, int] = {}
        self._receivers = receivers
        self.meta = meta
        self.count = 0

    def append(
        self,
        inputs: Mapping[str, npt.NDArray[Any]],
        positions: npt.NDArray[np.floating[Any]] | None,
        events: Sequence[str],
        *,
        labels: npt.NDArray[Any] | None = None,
        weights: npt.NDArray[np.floating[Any]] | None = None,
    ) -> None:
        """Add samples.

        Args:
            inputs: One array per input of the model, samples first; names, dtypes and shapes of
                a sample as in the first call.
            positions: (n, 2) degrees latitude and longitude; None in every call or in none.
            events: The name of each sample's event.
            labels: What is true of each sample (n, …); as positions.
            weights: What each sample counts (n,), positive; as positions.

        Raises:
            DataError: With everything about the samples that can't be written; none of them is.
        """
        rows = {f"{INPUTS}{name}": np.asarray(array) for name, array in inputs.items()}
        if positions is not None:
            rows[POSITIONS] = np.asarray(positions, np.float64)
        if labels is not None:
            rows[LABELS] = np.asarray(labels)
        if weights is not None:
            rows[WEIGHTS] = np.asarray(weights, np.float64)
        problems = sample_problems(rows, events)
        now = {name: describe_rows(array) for name, array in rows.items()}
        before = self._rows or now
        problems += [
            f"{name} was {before.get(name, 'absent')} in the samples before, "
            f"now it is {now.get(name, 'absent')}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if problems:
            raise DataError(
                f"samples from number {self.count} on can't be written:" + listed(problems)
            )
        if not events:
            return
        self._rows = now
        numbers = [self._events.setdefault(name, len(self._events)) for name in events]
        rows[EVENT] = np.array(numbers, np.int64)
        for name, array in rows.items():
            if name not in self._arrays:
                self._arrays[name] = ArrayWriter(self._root, name, array)
            self._arrays[name].append(array)
        self.count += len(events)

    def finish(self) -> str:
        """Write what is left and the header; returns the digest.

        Raises:
            DataError: If nothing was appended, or ``meta`` is no JSON.
        """
        if not self.count:
            raise DataError("nothing was appended: a dataset needs at least one sample")
        text = "".join(f"{name}\n" for name in self._events).encode()
        names = np.frombuffer(text, np.uint8)
        self._arrays[EVENT_NAMES] = ArrayWriter(self._root, EVENT_NAMES, names)
        self._arrays[EVENT_NAMES].append(names)
        header = {
            "schema_version": DATASET_VERSION,
            "meta": self.meta,
            "receivers": {name: [float(v) for v in p] for name, p in self._receivers.items()},
            "arrays": {name: array.finish() for name, array in self._arrays.items()},
        }
        try:
            digest = digest_of(header)
        except (TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the dataset's `meta` can't be written as JSON: {error}") from error
        self._root.update_attributes({**header, "digest": digest})
        return digest
