"""IQ recordings and events: what is read, what is refused, what is put together."""

import os
import struct
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.localization import recordings as module
from heimdall_onnx.localization.events import align_recordings, group_recordings
from heimdall_onnx.localization.recordings import read_recording

RATE = 12_000
BLOCK = 512
NAME = "20200813T065220Z_77500_{}_iq.wav"


def chunk(name, payload, size=None):
    return name + struct.pack("<I", len(payload) if size is None else size) + payload


def riff(*chunks):
    body = b"WAVE" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def fmt(code=1, channels=2, rate=RATE, bits=16):
    align = channels * bits // 8
    return chunk(b"fmt ", struct.pack("<HHIIHH", code, channels, rate, rate * align, align, bits))


def stamp(seconds, age=1):
    whole = int(seconds)
    return chunk(b"kiwi", struct.pack("<BBII", age, 0, whole, round((seconds - whole) * 1e9)))


def numbered(start, count):
    """Samples whose I counts up, so that any of them can be recognised."""
    values = np.zeros((count, 2), "<i2")
    values[:, 0] = (start + np.arange(count)) % 30_000
    return values


def kiwi(times, ages=None, first=0):
    """A KiwiSDR file with one block at each of ``times``; samples are numbered from ``first``."""
    ages = ages or [1] * len(times)
    parts = [fmt()]
    for i, (time, age) in enumerate(zip(times, ages, strict=True)):
        parts += [
            stamp(time % 604_800, age),
            chunk(b"data", numbered(first + i * BLOCK, BLOCK).tobytes()),
        ]
    return riff(*parts)


def steady(start, blocks):
    return [start + i * BLOCK / RATE for i in range(blocks)]


def counted(iq):
    return np.rint(iq.real * 2**15).astype(int)


@pytest.fixture
def save(tmp_path):
    def write(content, name="recording.wav"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def real_recordings():
    folder = os.environ.get("HEIMDALL_RECORDINGS")
    if not folder:
        pytest.skip("HEIMDALL_RECORDINGS is not set: no real recordings to read")
    paths = sorted(Path(folder).rglob("*_iq.wav"))
    if not paths:
        pytest.skip(f"no *_iq.wav below HEIMDALL_RECORDINGS={folder}")
    return paths


class TestKiwi:
    def test_all_blocks_are_read_not_only_the_first(self, save):
        recording = read_recording(save(kiwi(steady(1000.25, 5))))
        assert recording.iq.dtype == np.complex64
        assert counted(recording.iq).tolist() == list(range(5 * BLOCK))
        assert recording.gnss_start_s == pytest.approx(1000.25, abs=1e-9)
        assert recording.sample_rate_hz == RATE
        assert recording.dropped_samples == 0

    def test_full_scale_is_one_and_i_comes_before_q(self, save):
        block = np.zeros((BLOCK, 2), "<i2")
        block[0] = (-(2**15), 2**14)
        content = riff(fmt(), stamp(5), chunk(b"data", block.tobytes()))
        assert read_recording(save(content)).iq[0] == np.complex64(-1 + 0.5j)

    def test_stale_first_blocks_are_dropped(self, save):
        times = [0.0, 300.5, *steady(1000, 4)]
        recording = read_recording(save(kiwi(times)))
        assert recording.gnss_start_s == 1000
        assert recording.dropped_samples == 2 * BLOCK
        assert counted(recording.iq)[0] == 2 * BLOCK

    @pytest.mark.parametrize(("before", "after", "kept"), [(3, 6, slice(3, 9)), (6, 3, slice(6))])
    def test_the_longest_part_without_a_gap_is_kept(self, save, before, after, kept):
        times = steady(1000, before) + steady(1000 + (before + 1) * BLOCK / RATE, after)
        recording = read_recording(save(kiwi(times)))
        expected = np.arange(9 * BLOCK)[kept.start and kept.start * BLOCK : kept.stop * BLOCK]
        assert counted(recording.iq).tolist() == expected.tolist()
        assert recording.dropped_samples == 3 * BLOCK

    def test_the_start_moves_with_a_long_gap(self, save):
        times = steady(1000, 30) + steady(2000, 40)  # 30 blocks take 1.28 s
        recording = read_recording(save(kiwi(times), NAME.format("A")))
        assert recording.start == datetime(2020, 8, 13, 6, 52, 21, tzinfo=UTC)

    def test_clock_corrections_below_half_a_block_are_no_gap(self, save):
        times = [*steady(1000, 3), *steady(1000 + 3.2 * BLOCK / RATE, 3)]
        assert read_recording(save(kiwi(times))).dropped_samples == 0

    def test_the_end_of_the_gps_week_is_no_gap(self, save):
        recording = read_recording(save(kiwi(steady(604_800 - 2 * BLOCK / RATE, 5))))
        assert recording.dropped_samples == 0
        assert recording.iq.size == 5 * BLOCK

    @pytest.mark.parametrize("times", [[0.0] * 4, [1.0, 9.0, 40.0, 3.0]])
    def test_without_a_fix_all_is_kept_and_the_stamps_are_not_believed(self, save, times):
        recording = read_recording(save(kiwi(times, ages=[255] * 4)))
        assert recording.iq.size == 4 * BLOCK
        assert recording.gnss_start_s is None

    def test_a_stamp_without_samples_at_the_end_is_no_error(self, save):
        content = riff(kiwi(steady(10, 2))[12:], stamp(11))
        assert read_recording(save(content)).iq.size == 2 * BLOCK


class TestPlain:
    @pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
    def test_sample_formats_are_scaled_alike(self, tmp_path, dtype):
        iq = np.array([[0.5, -0.25], [-0.125, 0.75]])
        scale = {"int16": 2**15, "int32": 2**31}.get(dtype, 1)
        path = tmp_path / "plain.wav"
        wavfile.write(path, RATE, (iq * scale).astype(dtype))
        recording = read_recording(path)
        assert recording.iq.tolist() == [0.5 - 0.25j, -0.125 + 0.75j]
        assert (recording.gnss_start_s, recording.start, recording.receiver) == (None, None, None)

    def test_24_bit_samples_are_scaled_alike(self, save):
        samples = b"".join(v.to_bytes(3, "little", signed=True) for v in (2**22, -(2**21)))
        content = riff(fmt(bits=24), chunk(b"data", samples))
        assert read_recording(save(content)).iq.tolist() == [0.5 - 0.25j]

    def test_chunks_of_other_programs_are_skipped(self, save):
        content = riff(fmt(), chunk(b"auxi", b"\0" * 36), chunk(b"data", numbered(0, 8).tobytes()))
        assert counted(read_recording(save(content)).iq).tolist() == list(range(8))


class TestName:
    def test_it_gives_start_frequency_and_receiver(self, save):
        recording = read_recording(save(kiwi(steady(1, 2)), NAME.format("JO51xl")))
        assert recording.start == datetime(2020, 8, 13, 6, 52, 20, tzinfo=UTC)
        assert (recording.frequency_hz, recording.receiver) == (77500, "JO51xl")

    def test_the_receiver_may_be_missing(self, save):
        recording = read_recording(save(kiwi(steady(1, 2)), "20200813T065220Z_77500_iq.wav"))
        assert (recording.frequency_hz, recording.receiver) == (77500, None)

    @pytest.mark.parametrize("name", ["x.wav", "20201399T065220Z_77500_A_iq.wav"])
    def test_another_name_gives_nothing(self, save, name):
        recording = read_recording(save(kiwi(steady(1, 2)), name))
        assert (recording.start, recording.frequency_hz, recording.receiver) == (None,) * 3


DATA = chunk(b"data", numbered(0, 8).tobytes())


class TestBadFiles:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"", "is empty"),
            (b"ID3\x04" + b"\0" * 60, "not a RIFF/WAVE file"),
            (b"RIFF", "not a RIFF/WAVE file"),
            (kiwi(steady(1, 3))[:-100], "truncated or damaged.*should hold 2048 bytes, 1948"),
            (riff(fmt(), DATA)[:-5], "truncated or damaged"),
            (riff(fmt(), DATA, b"dat"), "truncated or damaged"),
            (riff(fmt(), chunk(b"data", b"\0" * 8, size=0xFFFF_FFFF)), "hold 4294967295 bytes, 8"),
            (riff(fmt(channels=1), DATA), "expected 2 channels.*found 1"),
            (riff(fmt(channels=4), DATA), "expected 2 channels.*found 4"),
            (riff(fmt(bits=8), DATA), "found 2 of uint8"),
            (riff(fmt(code=85), DATA), "can't be decoded as WAV"),
            (riff(fmt(channels=0), DATA), "can't be decoded as WAV|expected 2 channels"),
            (riff(fmt(rate=0), DATA), "at 0 Hz"),
            (riff(fmt(), chunk(b"data", b"")), "no samples"),
            (riff(fmt()), "one `data` chunk"),
            (riff(fmt(), DATA, DATA), "one `data` chunk"),
            (b"RIFF\0\0\0\0" + riff(fmt(), DATA)[8:], "8 bytes that the RIFF header declares"),
            (riff(fmt(3, bits=32), chunk(b"data", struct.pack("<2f", np.nan, 0))), "NaN or Inf"),
            (riff(fmt(3, bits=64), chunk(b"data", struct.pack("<2d", 1e300, 0))), "NaN or Inf"),
            (riff(fmt(), stamp(1)), "no samples"),
            (riff(stamp(1), DATA), "no complete `fmt ` chunk"),
            (riff(fmt(channels=1), stamp(1), DATA), "1 channels.*record with `-m iq`"),
            (riff(fmt(), stamp(1), DATA, DATA), "follow a 10-byte time stamp"),
            (riff(fmt(), chunk(b"kiwi", b"\0" * 8), DATA), "follow a 10-byte time stamp"),
            (riff(fmt(), stamp(1), chunk(b"data", b"\0" * 6)), "whole 4-byte IQ samples"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_they_are_refused_in_plain_words(self, save, content, says):
        with pytest.raises(DataError, match=f"(?s)recording.wav.*({says})"):
            read_recording(save(content))

    def test_missing_files_and_folders_are_refused(self, tmp_path):
        with pytest.raises(DataError, match="not a file"):
            read_recording(tmp_path)
        with pytest.raises(DataError, match="not a file"):
            read_recording(tmp_path / "missing.wav")

    def test_a_file_beyond_the_limit_is_refused(self, save, monkeypatch):
        content = kiwi(steady(1, 2))
        monkeypatch.setattr(module, "MAX_FILE_BYTES", len(content))
        assert read_recording(save(content)).iq.size == 2 * BLOCK
        monkeypatch.setattr(module, "MAX_FILE_BYTES", len(content) - 1)
        with pytest.raises(DataError, match="larger than"):
            read_recording(save(content))

    def test_more_chunks_than_a_recording_has_are_refused(self, save, monkeypatch):
        monkeypatch.setattr(module, "MAX_CHUNKS", 100)
        assert read_recording(save(kiwi(steady(1, 49)))).iq.size == 49 * BLOCK
        with pytest.raises(DataError, match="more than 100 chunks, the last of them at byte"):
            read_recording(save(kiwi(steady(1, 50))))


@pytest.fixture
def recording(save):
    """A maker of distinct recordings that start when they are told to."""
    template = read_recording(save(kiwi(steady(1000, 4)), NAME.format("A")))

    def make(name, seconds=0, **changes):
        return replace(
            template,
            path=Path(f"{name}.wav"),
            receiver=name,
            sha256=name,
            start=template.start + timedelta(seconds=seconds),
            **changes,
        )

    return make


def names(groups):
    return ["".join(r.receiver for r in group) for group in groups]


class TestGroups:
    def test_start_times_form_events_and_the_order_given_stays_within(self, recording):
        late = [recording(n, 3600 + i) for i, n in enumerate("CAB")]
        early = [recording("Z", 50), recording("X", 0), recording("Y", 60)]
        mixed = [late[0], early[0], late[1], early[1], early[2], late[2]]
        assert names(group_recordings(mixed)) == ["ZXY", "CAB"]

    def test_frequencies_recorded_at_once_are_different_events(self, recording):
        mixed = [recording(f"{n}", frequency_hz=f) for n in "ABC" for f in (60_000, 77_500)]
        mixed = [replace(r, sha256=str(i)) for i, r in enumerate(mixed)]
        groups = group_recordings(mixed)
        assert names(groups) == ["ABC", "ABC"]
        assert [{r.frequency_hz for r in group} for group in groups] == [{60_000}, {77_500}]

    def test_without_start_times_the_order_given_decides(self, recording):
        unnamed = [replace(recording(n), start=None) for n in "CBAFED"]
        assert names(group_recordings(unnamed)) == ["CBA", "FED"]

    def test_events_that_are_not_complete_are_listed(self, recording):
        two = [recording("A"), recording("B"), *(recording(n, 61) for n in "CDEF")]
        with pytest.raises(DataError) as error:
            group_recordings(two)
        assert "start times within 60 s" in str(error.value)
        assert "group 1: 2 recordings (A.wav, B.wav)" in str(error.value)
        assert "group 2: 4 recordings (C.wav, D.wav, E.wav, F.wav)" in str(error.value)

    def test_a_count_without_start_times_that_is_no_multiple_is_listed(self, recording):
        with pytest.raises(DataError, match=r"order given.*\n.*group 2: 1 recordings \(D.wav\)"):
            group_recordings([replace(recording(n), start=None) for n in "ABCD"])

    def test_the_same_recording_twice_is_refused(self, recording):
        with pytest.raises(DataError, match="same recording twice"):
            group_recordings([recording("A"), recording("B"), recording("A")])

    def test_no_recordings_are_refused(self):
        with pytest.raises(DataError, match="no recordings"):
            group_recordings([])


class TestAlignment:
    def test_gnss_stamps_bring_equal_samples_together(self, save):
        # All three record the same counter, starting 0, 700 and 300 samples into it.
        starts = (0, 700, 300)
        group = [
            read_recording(
                save(kiwi(steady(604_799.98 + s / RATE, 6), first=s), NAME.format(f"R{s}"))
            )
            for s in starts
        ]
        aligned = align_recordings(group)
        assert aligned.method == "gnss"
        assert aligned.skipped_samples == (700, 0, 400)
        assert aligned.iq.shape == (3, 6 * BLOCK - 700)
        for row in aligned.iq:
            np.testing.assert_array_equal(counted(row), np.arange(700, 6 * BLOCK))

    def test_one_recording_without_stamps_leaves_the_start_times(self, recording):
        iq = np.zeros(3 * RATE, np.complex64)
        group = [recording("A", 1, gnss_start_s=None, iq=iq), recording("B", 0, iq=iq)]
        aligned = align_recordings(group)
        assert (aligned.method, aligned.skipped_samples) == ("start", (0, RATE))
        assert aligned.iq.shape == (2, 2 * RATE)

    def test_without_any_time_the_first_samples_meet(self, recording):
        group = [replace(recording(n), gnss_start_s=None, start=None) for n in "AB"]
        aligned = align_recordings(group)
        assert (aligned.method, aligned.skipped_samples) == ("first sample", (0, 0))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"gnss_start_s": 2000.0}, "don't overlap.*B.wav covers 1000.000 to"),
            ({"sample_rate_hz": 48_000.0}, "different sample rates"),
            ({"frequency_hz": 60_000}, r"different frequencies: \[60000, 77500\]"),
        ],
    )
    def test_what_does_not_fit_together_is_refused(self, recording, changes, says):
        with pytest.raises(DataError, match=says):
            align_recordings([recording("A"), recording("B", **changes)])


class TestRealRecordings:
    def test_they_are_read_to_their_end(self):
        for path in real_recordings():
            recording = read_recording(path)
            blocks = path.read_bytes().count(b"kiwi\x0a\0\0\0")
            assert recording.iq.size + recording.dropped_samples == blocks * BLOCK
            assert recording.dropped_samples in (BLOCK, 2 * BLOCK)  # stale blocks at the start
            assert 28 < recording.iq.size / recording.sample_rate_hz < 31

    def test_their_stamps_agree_with_their_names(self):
        for path in real_recordings():
            recording = read_recording(path)
            start = recording.start
            second = (start.isoweekday() % 7) * 86_400 + start.hour * 3600
            second += start.minute * 60 + start.second + 18  # GPS was 18 s ahead of UTC since 2017
            assert abs(recording.gnss_start_s - second) < 1

    def test_they_form_events_aligned_by_stamps(self):
        groups = group_recordings([read_recording(path) for path in real_recordings()])
        for group in groups:
            aligned = align_recordings(group)
            assert aligned.method == "gnss"
            assert aligned.iq.shape[1] > 28 * aligned.sample_rate_hz
