"""IQ recordings, read from KiwiSDR and plain WAV files.

A KiwiSDR in IQ mode writes a RIFF file in which a 10-byte ``kiwi`` chunk with a GNSS time stamp
precedes every ``data`` chunk of 512 samples. WAV libraries return a single ``data`` chunk, 43 ms of
the recording; therefore this module walks the chunks itself. Plain WAV is left to SciPy.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.io import wavfile

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.logs import get_logger

log = get_logger(__name__)

MAX_FILE_BYTES = 512 * 2**20
# Twice what a KiwiSDR would put into the largest file.
MAX_CHUNKS = 1_000_000

_SECONDS_PER_WEEK = 604_800.0
_NO_FIX = 255
_NAME = re.compile(r"(?P<start>\d{8}T\d{6}Z)_(?P<frequency>\d+)(?:_(?P<receiver>.+))?_iq\.wav")
_FULL_SCALE = {"int16": 2.0**15, "int32": 2.0**31, "float32": 1.0, "float64": 1.0}

Samples = npt.NDArray[np.complex64]
Chunk = tuple[bytes, int, memoryview]


@dataclass(frozen=True)
class Recording:
    """One receiver's recording without gaps.

    Attributes:
        path: The file.
        iq: Complex samples, 1-D complex64, full scale ±1.
        sample_rate_hz: Rate from the file's header.
        start: UTC time of the first sample to the second, from the file name; None if the name
            does not tell.
        receiver: Name of the receiver, from the file name; None if the name does not tell.
        frequency_hz: Tuned frequency, from the file name; None if the name does not tell.
        gnss_start_s: GPS second of the week of the first sample; None without GNSS time stamps.
        dropped_samples: Samples left out because they don't connect to the longest gap-free part.
        sha256: SHA-256 of the file.
    """

    path: Path
    iq: Samples = field(repr=False)
    sample_rate_hz: float
    start: datetime | None
    receiver: str | None
    frequency_hz: int | None
    gnss_start_s: float | None
    dropped_samples: int
    sha256: str


def read_recording(path: Path | str) -> Recording:
    """Read a KiwiSDR IQ recording or a plain two-channel IQ WAV file; its content decides which.

    Time stamps in a KiwiSDR file also show lost blocks, and that its first blocks are often left
    over from an earlier connection. Joining what is not adjacent would put clicks into the
    spectrum, and refusing the file would refuse nearly all of them; therefore only the longest
    gap-free part is kept, and the rest is counted in ``dropped_samples``. A file without usable
    stamps (the receiver had no position fix) is kept whole.

    Args:
        path: The file; ``YYYYmmddTHHMMSSZ_FREQUENCY_RECEIVER_iq.wav`` tells start, tuned frequency
            and receiver.

    Raises:
        DataError: If the file can't be read, is larger than 512 MiB, or is not such a recording.
    """
    path = Path(path)
    content = _read_bytes(path)
    chunks = list(_walk_chunks(memoryview(content), path))
    if any(name == b"kiwi" for name, _, _ in chunks):
        iq, rate, lead, gnss_start, dropped = _read_kiwi(chunks, path)
    else:
        iq, rate = _read_plain(content, chunks, path)
        lead, gnss_start, dropped = 0, None, 0
    if iq.size == 0:
        raise DataError(f"{path} holds no samples")
    if not np.isfinite(iq).all():
        raise DataError(f"{path} holds NaN or Inf samples")
    start, receiver, frequency = _read_name(path.name)
    if start is not None:
        start += timedelta(seconds=int(lead / rate))
    if dropped:
        log.info("recording.gaps", file=path.name, dropped_samples=dropped, samples=iq.size)
    digest = hashlib.sha256(content).hexdigest()
    return Recording(path, iq, rate, start, receiver, frequency, gnss_start, dropped, digest)


def wrap_week(seconds: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Time differences across the end of the GPS week, brought back to ±half a week."""
    half = _SECONDS_PER_WEEK / 2
    return (np.asarray(seconds, np.float64) + half) % _SECONDS_PER_WEEK - half


def _read_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"recording {path} is not a file")
        with path.open("rb") as file:
            content = file.read(min(path.stat().st_size, MAX_FILE_BYTES) + 1)
    except OSError as error:
        raise DataError(f"recording {path} can't be read: {error}") from error
    if len(content) > MAX_FILE_BYTES:
        raise DataError(
            f"recording {path} is larger than {MAX_FILE_BYTES >> 20} MiB; split it into parts"
        )
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise DataError(
            f"recording {path} is not a RIFF/WAVE file: it starts with {bytes(content[:12])!r}"
            if content
            else f"recording {path} is empty"
        )
    return content


def _walk_chunks(content: memoryview, path: Path) -> Iterator[Chunk]:
    """Identifier, byte offset and payload of the chunks that matter here."""
    offset = 12
    for number in itertools.count():
        if offset >= len(content):
            return
        if number == MAX_CHUNKS:
            raise DataError(
                f"recording {path} is damaged: it has more than {MAX_CHUNKS:,} chunks, the last "
                f"of them at byte {offset} of {len(content)}"
            )
        header = bytes(content[offset : offset + 8])
        size = int.from_bytes(header[4:8], "little")
        left = len(content) - offset - 8
        if len(header) < 8 or size > left:
            raise DataError(
                f"recording {path} is truncated or damaged: the chunk {header[:4]!r} at byte "
                f"{offset} should hold {size} bytes, {max(left, 0)} are left"
            )
        if header[:4] in (b"fmt ", b"kiwi", b"data"):
            yield header[:4], offset, content[offset + 8 : offset + 8 + size]
        offset += 8 + size + size % 2


def _read_kiwi(chunks: list[Chunk], path: Path) -> tuple[Samples, float, int, float | None, int]:
    """Samples, rate, samples dropped before them, GPS second of the first, all dropped."""
    rate = float(_kiwi_rate(chunks, path))
    stamps, blocks = _kiwi_blocks(chunks, path)
    if not blocks:
        raise DataError(f"{path} holds no samples")
    lengths = np.array([len(block) // 4 for block in blocks])
    seconds = stamps["second"] + 1e-9 * stamps["nanosecond"]
    first, last, gnss_start = 0, len(blocks), None
    if (stamps["fix_age"] != _NO_FIX).any() and np.unique(seconds).size > 1:
        first, last = _longest_run(seconds, lengths, rate)
        gnss_start = float(seconds[first])
    values = np.frombuffer(b"".join(blocks[first:last]), "<i2").astype(np.float32)
    iq = (values / np.float32(_FULL_SCALE["int16"])).view(np.complex64)
    return iq, rate, int(lengths[:first].sum()), gnss_start, int(lengths.sum()) - iq.size


def _kiwi_rate(chunks: list[Chunk], path: Path) -> int:
    payload = next((payload for name, _, payload in chunks if name == b"fmt "), None)
    if payload is None or len(payload) < 16:
        raise DataError(f"{path} has no complete `fmt ` chunk")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", payload[:16])
    if (code, channels, bits) != (1, 2, 16) or rate == 0:
        raise DataError(
            f"{path}: expected KiwiSDR IQ samples (PCM, 2 channels, 16 bit), found format {code}, "
            f"{channels} channels, {bits} bit, {rate} Hz; record with `-m iq`"
        )
    return int(rate)


def _kiwi_blocks(chunks: list[Chunk], path: Path) -> tuple[npt.NDArray[np.void], list[memoryview]]:
    """Time stamps and sample blocks, one of each per pair of chunks."""
    stamps, blocks = [], []
    stamp = None
    for name, offset, payload in chunks:
        if name == b"kiwi":
            stamp = bytes(payload)
        elif name == b"data":
            if stamp is None or len(stamp) != 10 or len(payload) % 4:
                raise DataError(
                    f"{path} is damaged: the data chunk at byte {offset} ({len(payload)} bytes) "
                    "should hold whole 4-byte IQ samples and follow a 10-byte time stamp"
                )
            stamps.append(stamp)
            blocks.append(payload)
            stamp = None
    fields = [("fix_age", "u1"), ("unused", "u1"), ("second", "<u4"), ("nanosecond", "<u4")]
    return np.frombuffer(b"".join(stamps), fields), blocks


def _longest_run(
    seconds: npt.NDArray[np.float64], lengths: npt.NDArray[np.int64], rate: float
) -> tuple[int, int]:
    """First block and end of the longest run of blocks whose stamps follow on each other."""
    expected = lengths[:-1] / rate
    late = np.abs(wrap_week(np.diff(seconds)) - expected) > expected / 2
    edges = [0, *(np.flatnonzero(late) + 1).tolist(), len(lengths)]
    return max(itertools.pairwise(edges), key=lambda run: int(lengths[slice(*run)].sum()))


def _read_plain(content: bytes, chunks: list[Chunk], path: Path) -> tuple[Samples, float]:
    offsets = [offset for name, offset, _ in chunks if name == b"data"]
    declared = 8 + int.from_bytes(content[4:8], "little")
    if len(offsets) != 1 or offsets[0] >= declared:
        raise DataError(
            f"recording {path}: expected one `data` chunk within the {declared} bytes that the "
            f"RIFF header declares, found `data` chunks at bytes {offsets}"
        )
    try:
        with warnings.catch_warnings(), np.errstate(over="ignore"):
            # Recorders add chunks of their own (`auxi`, `LIST`) that SciPy skips with a warning;
            # float64 samples beyond float32 become Inf, which the caller reports.
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            rate, values = wavfile.read(io.BytesIO(content))
            full_scale = _FULL_SCALE.get(values.dtype.name, np.nan)
            scaled = np.ascontiguousarray((values / full_scale).astype(np.float32))
    except (ValueError, TypeError, ZeroDivisionError, struct.error) as error:
        raise DataError(f"recording {path} can't be decoded as WAV: {error}") from error
    channels = values.shape[1] if values.ndim == 2 else 1
    if channels != 2 or np.isnan(full_scale) or not rate:
        raise DataError(
            f"recording {path}: expected 2 channels (I and Q) of 16-, 24- or 32-bit PCM or float "
            f"samples, found {channels} of {values.dtype} at {rate} Hz"
        )
    return scaled.view(np.complex64)[:, 0], float(rate)


def _read_name(name: str) -> tuple[datetime | None, str | None, int | None]:
    match = _NAME.fullmatch(name)
    if match is None:
        return None, None, None
    try:
        start = datetime.strptime(match["start"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    except ValueError:  # digits that are no date: the name only looks like the pattern
        return None, None, None
    return start, match["receiver"], int(match["frequency"])
