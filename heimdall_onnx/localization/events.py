"""Events: recordings of one transmission by several receivers, put together and aligned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.text import listed
from heimdall_onnx.localization.recordings import Recording, Samples, wrap_week

CHANNELS = 3  # of the reference model, one for each receiver
SAME_EVENT_SECONDS = 60.0

_RATE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AlignedRecordings:
    """Simultaneous samples of several receivers.

    Attributes:
        recordings: The recordings, one per row of ``iq``.
        iq: Complex samples (receivers, samples) of the span that all recordings cover.
        sample_rate_hz: Common rate.
        method: What the alignment rests on: ``"gnss"`` (time stamps), ``"start"`` (file names, to
            the second) or ``"first sample"``.
        skipped_samples: Samples of each recording before the common span.
    """

    recordings: tuple[Recording, ...]
    iq: Samples = field(repr=False)
    sample_rate_hz: float
    method: str
    skipped_samples: tuple[int, ...]


def group_recordings(recordings: Sequence[Recording]) -> list[tuple[Recording, ...]]:
    """Put recordings of the same event together, three in each.

    If all start times are known, an event is the recordings of one tuned frequency that start
    within 60 s; events come in the order of time. Otherwise each three recordings in the order
    given are one. Within an event the order given is kept, since it says which receiver feeds
    which channel.

    Raises:
        DataError: If the groups don't come out at three, or hold a recording twice; with what
            was grouped how.
    """
    if all(r.start is not None for r in recordings):
        groups, how = _group_by_start(recordings), f"start times within {SAME_EVENT_SECONDS:g} s"
    else:
        starts = range(0, len(recordings), CHANNELS)
        groups = [tuple(recordings[i : i + CHANNELS]) for i in starts]
        how = "the order given, as not every file name tells a start time"
    problems = [
        f"group {number}: {len(group)} recordings ({', '.join(r.path.name for r in group)})"
        for number, group in enumerate(groups, 1)
        if len(group) != CHANNELS
    ]
    problems += [
        f"group {number} holds the same recording twice ({', '.join(r.path.name for r in group)})"
        for number, group in enumerate(groups, 1)
        if len({r.sha256 for r in group}) < len(group)
    ]
    if problems or not groups:
        raise DataError(
            f"expected {CHANNELS} recordings of different receivers for each event, one per "
            f"channel; {len(recordings)} recordings were grouped by {how}. "
            f"Found:{listed(problems or ['no recordings'])}"
        )
    return groups


def align_recordings(recordings: Sequence[Recording]) -> AlignedRecordings:
    """Cut recordings of one event to the span that all of them cover.

    GNSS time stamps align to the sample if all recordings have them, else the start times from the
    file names to the second; without either, the recordings are taken to start together.

    Raises:
        DataError: If sample rates or tuned frequencies differ, or the recordings don't overlap.
    """
    names = ", ".join(r.path.name for r in recordings)
    rates = [r.sample_rate_hz for r in recordings]
    if max(rates) > min(rates) * (1 + _RATE_TOLERANCE):
        raise DataError(f"recordings of one event have different sample rates: {rates} ({names})")
    frequencies = {r.frequency_hz for r in recordings} - {None}
    if len(frequencies) > 1:
        raise DataError(
            f"recordings of one event are tuned to different frequencies: "
            f"{sorted(f for f in frequencies if f is not None)} Hz ({names})"
        )
    method, starts = _relative_starts(recordings)
    skips = [round((max(starts) - s) * r) for s, r in zip(starts, rates, strict=True)]
    length = min(r.iq.size - skip for r, skip in zip(recordings, skips, strict=True))
    if length <= 0:
        spans = "; ".join(
            f"{r.path.name} covers {s:.3f} to {s + r.iq.size / r.sample_rate_hz:.3f} s"
            for r, s in zip(recordings, starts, strict=True)
        )
        raise DataError(f"recordings of one event don't overlap (aligned by {method}): {spans}")
    iq = np.stack([r.iq[k : k + length] for r, k in zip(recordings, skips, strict=True)])
    return AlignedRecordings(
        tuple(recordings), iq, float(np.mean(rates)), method, tuple(map(int, skips))
    )


def _group_by_start(recordings: Sequence[Recording]) -> list[tuple[Recording, ...]]:
    def key(item: tuple[int, Recording]) -> tuple[int, datetime]:
        assert item[1].start is not None
        return item[1].frequency_hz or 0, item[1].start

    groups: list[list[tuple[int, Recording]]] = []
    for item in sorted(enumerate(recordings), key=key):
        if groups:
            (frequency, first), (own, start) = key(groups[-1][0]), key(item)
            if own == frequency and (start - first).total_seconds() <= SAME_EVENT_SECONDS:
                groups[-1].append(item)
                continue
        groups.append([item])
    groups.sort(key=lambda group: key(group[0])[1])
    return [tuple(r for _, r in sorted(group, key=lambda item: item[0])) for group in groups]


def _relative_starts(recordings: Sequence[Recording]) -> tuple[str, list[float]]:
    gnss = [r.gnss_start_s for r in recordings if r.gnss_start_s is not None]
    if len(gnss) == len(recordings):
        return "gnss", wrap_week(np.subtract(gnss, gnss[0])).tolist()
    starts = [r.start for r in recordings if r.start is not None]
    if len(starts) == len(recordings):
        return "start", [(s - starts[0]).total_seconds() for s in starts]
    return "first sample", [0.0] * len(recordings)
