"""Simulated transmissions as the reference model sees them."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from heimdall_onnx.localization.mel import log_mel, normalize
from heimdall_onnx.localization.simulate import (
    CHANNEL,
    PARAMETERS,
    RECEIVERS,
    SAMPLE_RATE_HZ,
    SimulatedEvent,
    simulate_event,
    simulate_numbered,
)


def simulate_captures(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (count, 3, 128, 32) and true positions (count, 2), a window of each."""
    events = [simulate_event(rng) for _ in range(count)]
    features = [normalize(log_mel(event.iq, SAMPLE_RATE_HZ, PARAMETERS)) for event in events]
    return np.stack(features), np.array([event.position for event in events])


def simulate_events(count: int, *, windows: int, seed: int) -> list[SimulatedEvent]:
    """Events 0 to ``count`` - 1 of a seed."""
    return [simulate_numbered(seed, number, windows) for number in range(count)]


FIRST_START = datetime(2026, 1, 4, tzinfo=UTC)  # a Sunday, when a GPS week begins
GPS_AHEAD_S = 18  # of UTC, since 2017
BLOCK = 512


def write_recordings(
    events: Sequence[SimulatedEvent], folder: Path, first: int = 0
) -> list[list[Path]]:
    """What each site recorded as a KiwiSDR writes it, two minutes apart: the files of each."""
    made = []
    for number, event in enumerate(events, first):
        start = FIRST_START + number * timedelta(seconds=120)
        seconds = (start - FIRST_START).total_seconds() + GPS_AHEAD_S
        name = f"{start:%Y%m%dT%H%M%SZ}_{CHANNEL['frequency_hz']:.0f}_{{}}_iq.wav"
        made.append([folder / name.format(receiver) for receiver in RECEIVERS])
        for path, iq in zip(made[-1], event.iq, strict=True):
            write_recording(path, iq, rate=int(SAMPLE_RATE_HZ), gnss_start_s=seconds)
    return made


def write_positions(
    path: Path, events: Sequence[SimulatedEvent], recordings: Sequence[Sequence[Path]]
) -> Path:
    """Where each recording's transmitter was, as `data features --positions` reads it."""
    pairs = ((file, e.position) for e, own in zip(events, recordings, strict=True) for file in own)
    lines = (f"{file.name},{place[0]!r},{place[1]!r}\n" for file, place in pairs)
    path.write_text("recording,latitude,longitude\n" + "".join(lines))
    return path


def write_recording(path: Path, iq: np.ndarray, *, rate: int, gnss_start_s: float) -> None:
    """Samples in 16 bits, in blocks of 512 that each follow a time stamp."""
    steps = np.rint(np.ascontiguousarray(iq, np.complex64).view(np.float32) * 2.0**15)
    values = steps.astype("<i2").reshape(-1, 2)
    parts = [b"WAVE", chunk(b"fmt ", struct.pack("<HHIIHH", 1, 2, rate, 4 * rate, 4, 16))]
    for first in range(0, len(values), BLOCK):
        seconds = (gnss_start_s + first / rate) % 604_800
        stamp = struct.pack("<BBII", 1, 0, int(seconds), round(seconds % 1 * 1e9) % 10**9)
        parts.append(chunk(b"kiwi", stamp))
        parts.append(chunk(b"data", values[first : first + BLOCK].tobytes()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chunk(b"RIFF", b"".join(parts)))


def chunk(name: bytes, payload: bytes) -> bytes:
    return name + struct.pack("<I", len(payload)) + payload
