"""Simulated transmissions as the reference model sees them."""

from __future__ import annotations

import numpy as np

from heimdall_onnx.localization.mel import log_mel, normalize
from heimdall_onnx.localization.simulate import (
    PARAMETERS,
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
