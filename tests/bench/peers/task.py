"""What a form of the model costs in the task, as one figure that a peer's own search can follow.

Needs NumPy and pyproj only, so that it runs in every peer's environment. The figures are those of
`heimdall_onnx.evidence.variants.accuracy`, by which the table judges in the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pyproj import Geod

INPUT, OUTPUTS = "mel_spectrogram", ("positions", "uncertainties")
# Median and 95th percentile of the error, and the likelihood, may each lose this share.
LIMIT = 1.01
# Without labels: the 99th percentile of the displacement, in predicted deviations.
DISPLACEMENT = 0.25
_BATCH = 8
_WGS84 = Geod(ellps="WGS84")


def read(path: Path | str) -> tuple[Any, Any]:
    """Inputs of an ``.npz``, and its true positions, or None without labels."""
    with np.load(path) as archive:
        return archive[INPUT], archive.get("positions")


def answers(run: Callable[[Any], Mapping[str, Any]], inputs: Any) -> dict[str, Any]:
    """Outputs of ``run`` for all rows of ``inputs``, a few at a time."""
    parts = [run(inputs[start : start + _BATCH]) for start in range(0, len(inputs), _BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in OUTPUTS}


def growth(reference: Mapping[str, Any], found: Mapping[str, Any], truth: Any) -> float:
    """The largest growth of the task's figures: 1 as good as ``reference``, `LIMIT` still equal.

    Args:
        reference: ``positions`` and ``uncertainties`` (N, 2) of the fp32 model, in degrees.
        found: The same of another form of it.
        truth: True positions (N, 2), degrees latitude and longitude. With None it is the
            displacement that counts, on a scale on which `DISPLACEMENT` is `LIMIT`.
    """
    if not all(np.isfinite(found[name]).all() for name in OUTPUTS):
        return float("inf")
    if truth is None:
        moved = np.abs(_away(found["positions"], reference["positions"]))
        deviations = np.quantile((moved / reference["uncertainties"]).max(axis=1), 0.99)
        return 1 + (LIMIT - 1) * float(deviations) / DISPLACEMENT
    before, after = (_figures(outputs, truth) for outputs in (reference, found))
    return float(max(after[0] / before[0], 1 + after[1] - before[1]))


def errors_m(positions: Any, truth: Any) -> Any:
    """Distance in metres between positions (N, 2), degrees latitude and longitude, by row."""
    here, there = (np.clip(p[:, 0].astype(float), -90, 90) for p in (positions, truth))
    longitudes = (p[:, 1].astype(float) for p in (positions, truth))
    east, west = longitudes
    return np.asarray(_WGS84.inv(east, here, west, there)[2])


def _away(positions: Any, others: Any) -> Any:
    """Differences (N, 2) in degrees, longitudes the short way round."""
    away = positions.astype(float) - others
    away[:, 1] = (away[:, 1] + 180) % 360 - 180
    return away


def _figures(found: Mapping[str, Any], truth: Any) -> tuple[float, float]:
    """Median of the error in metres, mean negative log-likelihood in nats."""
    metres, sigma = errors_m(found["positions"], truth), found["uncertainties"].astype(float)
    terms = 0.5 * (_away(found["positions"], truth) / sigma) ** 2 + np.log(sigma)
    nll = (terms + 0.5 * np.log(2 * np.pi)).sum(axis=1).mean()
    return float(np.quantile(metres, 0.5, method="inverted_cdf")), float(nll)
