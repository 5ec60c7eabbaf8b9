"""From files with IQ recordings to a file of the reference model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.data.evaluation_file import SCHEMA, FeatureSet, receiver_list, write_feature_file
from heimdall_onnx.localization.events import AlignedRecordings, align_recordings, group_recordings
from heimdall_onnx.localization.mel import FeatureParameters, mel_windows
from heimdall_onnx.localization.recordings import Recording, read_recording

log = get_logger(__name__)


def write_features(
    recordings: Sequence[Path | str],
    output: Path | str,
    *,
    parameters: FeatureParameters | None = None,
    position: tuple[float, float] | None = None,
    receivers: Mapping[str, tuple[float, float]] | None = None,
) -> FeatureSet:
    """Turn recordings into an ``.npz`` of model inputs with their provenance.

    The file holds ``mel_spectrogram`` (N, 3, n_mels, n_frames) float32, ``meta`` (JSON text) and,
    if ``position`` is given, ``positions`` (N, 2). Equal input gives equal bytes. An existing
    file is replaced, once the new one is complete.

    Args:
        recordings: IQ recordings, see `read_recording`; three of each event with
            ``channels="receivers"``, in the order of the model's channels.
        output: The file to write.
        parameters: None means `FeatureParameters()`.
        position: True position of the transmitter in degrees latitude and longitude, the same for
            all recordings; stored as float64, since float32 rounds to half a metre.
        receivers: Positions of receivers by name, e.g. ``{"JO51xl": (51.466, 11.977)}``.

    Raises:
        DataError: If a recording can't be used, recordings don't form events, none is long enough
            for a window, or the output can't be written. All unreadable recordings are named.
        ParameterError: If a position is out of range, a receiver is in no recording, or a mel band
            stays empty at these parameters.
    """
    parameters = parameters or FeatureParameters()
    sites = dict(receivers or {})
    check_positions(position, sites)
    read = read_all(recordings)
    check_receivers(sites, read)
    single = parameters.channels == "iqm"
    groups = [(recording,) for recording in read] if single else group_recordings(read)
    events, windows = [], []
    for event in map(align_recordings, groups):
        iq = event.iq
        if single:
            iq = np.stack([iq[0].real, iq[0].imag, np.abs(iq[0])]).astype(np.complex64)
        found = mel_windows(iq, event.sample_rate_hz, parameters)
        windows.append(found)
        events.append(event_provenance(event, found.shape[0], sites))
        log.info("features.event", windows=found.shape[0], alignment=event.method)
    features = np.concatenate(windows) if windows else np.empty(0, np.float32)
    if features.size == 0:
        raise DataError(too_short(read, parameters))
    meta = {
        "schema": SCHEMA,
        "provenance": "recordings",
        "features": asdict(parameters),
        "events": events,
        "receivers": receiver_list(sites),
    }
    arrays = {"mel_spectrogram": features}
    if position is not None:
        arrays["positions"] = np.tile(np.array(position, np.float64), (len(features), 1))
    return write_feature_file(Path(output), arrays, meta)


def read_all(
    paths: Sequence[Path | str],
    *,
    samples: bool = True,
    progress: Callable[[float], None] = lambda share: None,
) -> list[Recording]:
    """All recordings, with or without their samples.

    Args:
        paths: The files.
        samples: Whether to keep the samples.
        progress: Called with the share of the files read.

    Raises:
        DataError: With every file that can't be used.
    """
    read, problems = [], []
    for number, path in enumerate(paths):
        progress(number / len(paths))
        try:
            recording = read_recording(path)
        except DataError as error:
            problems.append(str(error))
            continue
        read.append(recording if samples else replace(recording, iq=recording.iq[:0].copy()))
    if problems:
        raise DataError("\n".join(problems))
    return read


def event_provenance(
    event: AlignedRecordings, windows: int, sites: Mapping[str, tuple[float, float]]
) -> dict[str, Any]:
    """What ``meta`` says of an event: its recordings, and how they were put together."""
    return {
        "windows": windows,
        "alignment": event.method,
        "recordings": [
            {
                "file": r.path.name,
                "sha256": r.sha256,
                "start": r.start.isoformat() if r.start else None,
                "receiver": r.receiver,
                "position": [*map(float, site)] if (site := sites.get(r.receiver or "")) else None,
                "frequency_hz": r.frequency_hz,
                "sample_rate_hz": r.sample_rate_hz,
                "gnss_start_s": r.gnss_start_s,
                "samples": r.iq.size,
                "dropped_samples": r.dropped_samples,
                "skipped_samples": skipped,
            }
            for r, skipped in zip(event.recordings, event.skipped_samples, strict=True)
        ],
    }


def too_short(recordings: Sequence[Recording], parameters: FeatureParameters) -> str:
    """The error message where no event gives a window."""
    lengths = ", ".join(
        f"{r.path.name}: {r.iq.size} samples ({r.dropped_samples} dropped at gaps)"
        for r in recordings
    )
    return (
        f"no event is long enough for a window of {parameters.window_samples} simultaneous "
        f"samples; found {lengths or 'no recordings'}"
    )


def check_positions(
    position: tuple[float, float] | None, sites: Mapping[str, tuple[float, float]]
) -> None:
    """Refuse what is not on the globe.

    Raises:
        ParameterError: With every position that is out of range.
    """
    named = {**sites, **({"position": position} if position is not None else {})}
    problems = [
        f"{name}: {pair!r}"
        for name, pair in named.items()
        if len(pair) != 2 or not (abs(pair[0]) <= 90 and abs(pair[1]) <= 180)
    ]
    if problems:
        raise ParameterError(
            "positions must be degrees latitude (±90) and longitude (±180), found "
            + "; ".join(problems)
        )


def check_receivers(sites: Mapping[str, object], recordings: Sequence[Recording]) -> None:
    """Refuse positions of receivers that recorded nothing.

    Raises:
        ParameterError: With their names.
    """
    known = {r.receiver for r in recordings if r.receiver}
    unknown = sorted(set(sites) - known)
    if unknown:
        raise ParameterError(
            f"positions are given for receivers {unknown}, which no recording's name has; found "
            f"{sorted(known) or 'none'}"
        )
