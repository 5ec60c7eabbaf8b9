"""Evaluation data as a file: an ``.npz`` with its inputs, their labels and where they are from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.files import hash_file, replace_file
from heimdall_onnx.common.logs import get_logger

log = get_logger(__name__)

SCHEMA = 1


@dataclass(frozen=True)
class FeatureSet:
    """A file of features.

    Attributes:
        path: The ``.npz``.
        count: Number of windows.
        sha256: SHA-256 of the file.
        meta: Provenance and parameters, as the file records them.
    """

    path: Path
    count: int
    sha256: str
    meta: dict[str, Any] = field(repr=False)


def write_feature_file(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], meta: dict[str, Any]
) -> FeatureSet:
    """Write arrays and ``meta`` as one ``.npz``, completely or not at all.

    Args:
        path: The file; one that exists is replaced.
        arrays: The model's inputs by name and, where they are known, ``positions``; samples first.
        meta: Provenance and parameters, JSON.

    Raises:
        DataError: If the file can't be written.
    """
    text = json.dumps(meta, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with replace_file(path) as file:
        # NumPy gives every member the same fixed date, so equal arrays give equal bytes.
        np.savez(file, **arrays, meta=np.array(text))  # type: ignore[arg-type]
    sha256 = hash_file(path)
    count = len(next(iter(arrays.values())))
    log.info("features.written", file=path.name, windows=count, sha256=sha256)
    return FeatureSet(path, count, sha256, meta)


def receiver_list(sites: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Receivers as the ``meta`` of a feature file lists them."""
    return [
        {"name": name, "latitude": float(lat), "longitude": float(lon)}
        for name, (lat, lon) in sites.items()
    ]
