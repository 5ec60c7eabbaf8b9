"""Whether a machine ran at one speed while it was measured.

Percentiles of a run take its calls as draws from one distribution. Heat, another tenant or a model
that is still warming up move it meanwhile, and then they describe no state of the machine at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WINDOWS = 5
TOLERANCE = 0.10
_COMPARED = 3
# A median of fewer calls says more about its noise than about the machine.
_MIN_WINDOW_CALLS = 10


@dataclass(frozen=True)
class Stationarity:
    """How the latency moved while it was measured.

    Attributes:
        medians_ms: Median latency of each window, in order of time, milliseconds.
        spread: Highest minus lowest median of the last three windows, relative to their median.
        early: How far the median of an earlier window lies at most from the median of those three,
            relative to it; 0 where there is no earlier one.
        tolerance: The largest spread at which the measurement counts as stationary.
    """

    medians_ms: tuple[float, ...]
    spread: float
    early: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the last three windows agree within the tolerance."""
        return self.spread <= self.tolerance

    @property
    def sentence(self) -> str:
        """What was found, in words for a report."""
        if not self.holds:
            *first, last = (f"{median:.3g}" for median in self.medians_ms[-_COMPARED:])
            return (
                "the machine was not stationary: the medians of the last three windows, "
                f"{', '.join(first)} and {last} ms, are {_percent(self.spread)} apart "
                f"(limit {self.tolerance:.0%})"
            )
        agree = f"the last three windows agree within {_percent(self.spread)}"
        if self.early > self.tolerance:
            agree += f", but earlier ones are up to {_percent(self.early)} off"
        return agree


def check_stationarity(
    samples_ms: Floats,
    blocks: npt.NDArray[np.int64] | None = None,
    *,
    windows: int = WINDOWS,
    tolerance: float = TOLERANCE,
) -> Stationarity | None:
    """Compare the median latency of windows of time; None from too few calls for three windows.

    As NVIDIA's Perf Analyzer decides that a measurement is stable: the last three agree within
    10% (docs/cli.md of triton-inference-server/perf_analyzer, ``--stability-percentage``). Here
    they are windows of one run, and medians, so that a single slow call decides nothing.

    Args:
        samples_ms: Latency of every call in order of time, milliseconds, shape (calls,).
        blocks: Index of the block that each call belongs to, shape (calls,), ascending; no window
            ends within a block. None: every call for itself.
        windows: Into how many the calls are split; fewer where a window would have less than ten
            calls.
        tolerance: The largest spread that counts as stationary, as a fraction of the median.
    """
    if blocks is None:
        blocks = np.arange(samples_ms.size)
    _, starts = np.unique(blocks, return_index=True)
    count = min(windows, samples_ms.size // _MIN_WINDOW_CALLS, starts.size)
    if count < _COMPARED:
        return None
    firsts = [int(part[0]) for part in np.array_split(starts, count)]
    medians = np.array([np.median(window) for window in np.split(samples_ms, firsts[1:])])
    last = medians[-_COMPARED:]
    middle = np.median(last)
    return Stationarity(
        medians_ms=tuple(map(float, medians)),
        spread=float(np.ptp(last) / middle),
        early=float(np.abs(medians[:-_COMPARED] / middle - 1).max(initial=0)),
        tolerance=tolerance,
    )


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}"
