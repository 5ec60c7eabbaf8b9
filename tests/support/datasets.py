"""Small datasets of every kind of input, in chunks of a few rows and shards of a few chunks."""

from __future__ import annotations

import numpy as np
import pytest

from heimdall_onnx.data.dataset import shards
from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.data.dataset.writer import create_dataset

COUNT = 90
META = {"provenance": "drawn", "features": {"n_fft": 1024}}
RECEIVERS = {"HB9ODP": (46.499351, 8.798828), "pa0rdt": (51.5, 3.60069)}


def samples(count=COUNT, seed=0):
    rng = np.random.default_rng(seed)
    inputs = {
        "features": rng.standard_normal((count, 2, 3), np.float32),
        "mask": rng.random((count, 4)) < 0.5,
        "receiver": rng.integers(-3, 9, (count, 4)),
        "iq": (rng.standard_normal((count, 5)) + 1j).astype(np.complex64),
        "scalar": rng.standard_normal(count),
    }
    positions = rng.uniform(-80, 80, (count, 2))
    return inputs, positions, [f"event {i // 3}" for i in range(count)]


def write(path, data, step=COUNT, **changes):
    inputs, positions, events = data
    arguments = {"meta": META, "receivers": RECEIVERS, **changes}
    with create_dataset(path, **arguments) as writer:
        for start in range(0, len(events), step):
            part = slice(start, start + step)
            rows = {name: array[part] for name, array in inputs.items()}
            writer.append(rows, None if positions is None else positions[part], events[part])
    return open_dataset(path)


def write_in_small_shards(path, data):
    """So that little data has many chunks and many shards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "CHUNK_BYTES", 96)
        patch.setattr(shards, "SHARD_BYTES", 700)
        return write(path, data, step=7)
