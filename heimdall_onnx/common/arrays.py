"""Arrays by name, and rows of them read in parts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]

Floats = npt.NDArray[np.float64]

IN_MEMORY_BYTES = 256 << 20
PART_BYTES = 8 << 20
# Of each array, which are enough to see what of a model depends on the batch.
FIRST_ROWS = 3
# What an array is called that has no name in its file; `numpy.savez` calls one "arr_0".
UNNAMED = ("", "arr_0")


class RowReader(Protocol):
    """An array whose rows come into memory when they are indexed, and have no NaN or Inf then.

    Attributes:
        dtype: Element type.
        shape: Rows first.
        ndim: Number of axes.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    ndim: int

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]: ...


Rows = npt.NDArray[Any] | RowReader


def parts(array: Rows) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """All rows in order, some megabytes at a time, each part with the index of its first row."""
    row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
    step = max(1, PART_BYTES // max(row_bytes, 1))
    for start in range(0, array.shape[0], step):
        yield start, array[start : start + step]


def in_batches(inputs: Arrays, size: int) -> Iterator[tuple[int, Arrays]]:
    """Rows of all inputs together, ``size`` at a time, each batch with the index of its first."""
    for start in range(0, len(next(iter(inputs.values()))), size):
        yield start, {name: array[start : start + size] for name, array in inputs.items()}


def whole(array: Rows) -> npt.NDArray[Any]:
    """All of an array, in memory."""
    return array if isinstance(array, np.ndarray) else array[:]
