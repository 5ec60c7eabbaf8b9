"""Simulated events: what of the position is in them, and that recordings of them say the same."""

import numpy as np
import pytest
from captures import (
    FIRST_START,
    GPS_AHEAD_S,
    simulate_captures,
    simulate_events,
    write_positions,
    write_recordings,
)

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.localization import simulate
from heimdall_onnx.localization.dataset import ingest_recordings
from heimdall_onnx.localization.events import align_recordings
from heimdall_onnx.localization.features import write_features
from heimdall_onnx.localization.mel import mel_windows
from heimdall_onnx.localization.modulation import MODULATIONS
from heimdall_onnx.localization.recordings import read_recording
from heimdall_onnx.localization.simulate import (
    CHANNEL,
    PARAMETERS,
    RECEIVERS,
    SAMPLE_RATE_HZ,
    level_db,
    simulate_dataset,
    simulate_event,
)

SITES = np.array(list(RECEIVERS.values()))


def event(seed=0, **arguments):
    return simulate_event(np.random.default_rng(seed), **arguments)


@pytest.fixture
def clear(monkeypatch):
    """A channel that only delays and attenuates."""
    for name, value in {
        "snr_db_at_300_km": 60.0,
        "power_db": 0.0,
        "shadowing_db": 0.0,
        "rician_k": 1e9,
        "oscillator_ppm": 0.0,
        "receiver_ppm": 0.0,
        "speed_m_s": 0.0,
    }.items():
        monkeypatch.setitem(CHANNEL, name, value)


class TestCaptures:
    def test_they_fit_the_model(self):
        features, positions = simulate_captures(np.random.default_rng(0), 3)
        assert (features.shape, features.dtype) == ((3, 3, 128, 32), np.float32)
        assert np.isfinite(features).all()
        assert positions.shape == (3, 2)

    def test_equal_seeds_give_equal_captures_and_others_do_not(self):
        first, second, third = (simulate_captures(np.random.default_rng(s), 2) for s in (4, 4, 5))
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])
        assert np.abs(first[0] - third[0]).max() > 1

    def test_positions_fill_the_enlarged_triangle_of_the_sites(self):
        rng = np.random.default_rng(0)
        positions = np.stack([simulate.draw_position(rng, SITES) for _ in range(4000)])
        np.testing.assert_allclose(positions.mean(axis=0), SITES.mean(axis=0), atol=0.15)
        reach = CHANNEL["region_scale"] * (SITES - SITES.mean(axis=0))
        assert (positions.min(axis=0) >= SITES.mean(axis=0) + reach.min(axis=0)).all()
        assert np.ptp(positions, axis=0) == pytest.approx(np.ptp(reach, axis=0), rel=0.1)

    def test_the_position_can_be_learnt_from_each_site_s_contrast(self):
        """Quantiles of the levels and a quadratic fit: well below always answering the middle."""
        features, positions = simulate_captures(np.random.default_rng(0), 150)
        levels = np.quantile(features.mean(axis=-1), [0.02, 0.25, 0.5, 0.9, 1], axis=-1)
        known = np.moveaxis(levels, 0, -1).reshape(len(features), -1)
        known = (known - known.mean(axis=0)) / known.std(axis=0)
        rows, columns = np.triu_indices(known.shape[1])
        terms = np.hstack([np.ones((len(known), 1)), known, known[:, rows] * known[:, columns]])
        train, test = slice(0, 100), slice(100, None)
        middle = positions[train].mean(axis=0)
        left = terms[train].T @ terms[train] + 10 * np.eye(terms.shape[1])
        fit = np.linalg.solve(left, terms[train].T @ (positions[train] - middle))
        error = np.median(distance_m(terms[test] @ fit + middle, positions[test]))
        constant = np.broadcast_to(middle, positions[test].shape)
        assert error < 0.5 * np.median(distance_m(constant, positions[test]))


class TestEvent:
    def test_the_level_falls_by_40_db_a_decade(self):
        degree_m = 111_200
        near, far = (
            level_db(SITES[0] - [metres / degree_m, 0], SITES[:1])[0] for metres in (50e3, 500e3)
        )
        assert near - far == pytest.approx(40, abs=0.2)

    @pytest.mark.parametrize("modulation", ["fm", "bpsk", "qpsk"])
    def test_the_delays_are_in_the_samples(self, clear, modulation):
        """The slope of the cross-spectrum's phase is the difference of the delays."""
        found = event(1, position=(47.5, 8.5), modulation=modulation)
        spectra = np.fft.fft(found.iq * np.hanning(found.iq.shape[1]), axis=-1)
        hertz = np.fft.fftfreq(found.iq.shape[1], 1 / SAMPLE_RATE_HZ)
        for other in (1, 2):
            expected = found.delays_s[other] - found.delays_s[0]
            aligned = spectra[other] * spectra[0].conj() * np.exp(2j * np.pi * hertz * expected)
            strong = np.abs(aligned) > 0.05 * np.abs(aligned).max()
            phase = np.angle(aligned[strong] / aligned[strong].mean())
            slope = np.polyfit(hertz[strong], phase, 1, w=np.abs(aligned[strong]))[0]
            assert abs(slope / (2 * np.pi)) < 0.02 / SAMPLE_RATE_HZ
            assert abs(expected) > 3 / SAMPLE_RATE_HZ  # a wrong one would be seen

    def test_the_levels_are_in_the_samples(self, clear, monkeypatch):
        monkeypatch.setitem(CHANNEL, "agc_rms", 1e9)
        monkeypatch.setitem(CHANNEL, "snr_db_at_300_km", 20.0)
        found = event(2, position=(49.5, 8.0), modulation="fm")
        heard = 10 * np.log10(np.mean(np.abs(found.iq) ** 2, axis=-1) / CHANNEL["noise_rms"] ** 2)
        np.testing.assert_allclose(heard, found.snr_db, atol=0.5)
        np.testing.assert_allclose(found.snr_db, level_db((49.5, 8.0), SITES))

    def test_each_site_hears_the_carrier_at_its_own_shift(self, clear, monkeypatch):
        monkeypatch.setitem(CHANNEL, "receiver_ppm", 20.0)
        found = event(3, position=(49.5, 8.0), modulation="time signal")
        window = np.hanning(found.iq.shape[1])
        spectra = np.abs(np.fft.fft(found.iq * window, 2**19, axis=-1))
        heard = np.fft.fftfreq(2**19, 1 / SAMPLE_RATE_HZ)[spectra.argmax(axis=-1)]
        np.testing.assert_allclose(
            heard, found.carrier_offset_hz + np.array(found.shifts_hz), atol=0.1
        )
        assert np.ptp(found.shifts_hz) > 1

    def test_noise_and_quantization_floor_are_40_db_apart(self, monkeypatch):
        monkeypatch.setitem(CHANNEL, "snr_db_at_300_km", -200.0)
        found = event(4)
        assert np.sqrt(np.mean(np.abs(found.iq) ** 2)) == pytest.approx(1e-3, rel=0.03)
        power = np.abs(np.fft.fft(found.iq * np.hanning(found.iq.shape[1]), axis=-1)) ** 2
        hertz = np.abs(np.fft.fftfreq(found.iq.shape[1], 1 / SAMPLE_RATE_HZ))
        inside, outside = power[:, hertz < 3900].mean(), power[:, hertz > 4500].mean()
        assert 10 * np.log10(inside / outside) == pytest.approx(40, abs=1)

    def test_samples_are_those_of_16_bits(self):
        steps = event(5, position=tuple(SITES[0])).iq.view(np.float32) * 2**15
        np.testing.assert_array_equal(steps, np.rint(steps))
        assert -(2**15) <= steps.min() < steps.max() < 2**15

    def test_a_loud_transmitter_is_turned_down(self):
        near = event(5, position=tuple(SITES[0]), modulation="fm")
        rms = np.sqrt(np.mean(np.abs(near.iq) ** 2, axis=-1))
        assert rms[0] == pytest.approx(CHANNEL["agc_rms"], rel=0.01)
        assert rms[1:].max() < 0.1

    def test_fading_leaves_the_mean_power(self):
        rng = np.random.default_rng(0)
        times = np.arange(2048) / SAMPLE_RATE_HZ
        paths = np.ones((2, 2048), np.complex64)
        power = [np.abs(simulate.fade(rng, paths, times, 1.0)[:, 0]) ** 2 for _ in range(500)]
        assert np.mean(power) == pytest.approx(1, abs=0.07)

    @pytest.mark.parametrize("name", MODULATIONS)
    def test_every_modulation_can_be_asked_for(self, name):
        assert event(0, modulation=name).modulation == name

    def test_more_windows_take_more_samples(self):
        found = event(0, windows=3)
        assert mel_windows(found.iq, SAMPLE_RATE_HZ, PARAMETERS).shape[0] == 3

    @pytest.mark.parametrize("bad", [{"windows": 0}, {"modulation": "ssb"}])
    def test_what_there_is_not_is_refused(self, bad):
        with pytest.raises(ParameterError, match="at least one window and a modulation of cw, am"):
            event(**bad)


class TestRecordings:
    def test_they_read_back_as_the_event(self, tmp_path):
        found = event(0, windows=2)
        recordings = [read_recording(path) for path in write_recordings([found], tmp_path)[0]]
        aligned = align_recordings(recordings)
        assert aligned.method == "gnss"
        assert [r.receiver for r in recordings] == list(RECEIVERS)
        assert {r.start for r in recordings} == {FIRST_START}
        assert recordings[0].frequency_hz == CHANNEL["frequency_hz"]
        assert recordings[0].gnss_start_s == GPS_AHEAD_S
        np.testing.assert_array_equal(aligned.iq, found.iq)

    def test_they_give_the_same_features(self, tmp_path):
        first, second = simulate_events(2, windows=1, seed=3)
        paths = [path for files in write_recordings([first, second], tmp_path) for path in files]
        made = write_features(paths, tmp_path / "f.npz")
        with np.load(made.path) as file:
            for row, one in zip(file["mel_spectrogram"], (first, second), strict=True):
                expected = mel_windows(one.iq, SAMPLE_RATE_HZ, PARAMETERS)[0]
                np.testing.assert_array_equal(row, expected)


class TestDataset:
    def test_equal_seeds_give_equal_digests(self, tmp_path):
        one, same, other = (
            simulate_dataset(tmp_path / name, events=3, windows_per_event=2, seed=seed)
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        )
        assert one.digest == same.digest != other.digest
        assert (one.count, len(one.event_names)) == (6, 3)
        assert one.receivers == RECEIVERS
        assert one.meta["provenance"] == "simulated"
        assert not set(one.event_names) & set(other.event_names)
        one.verify()

    def test_the_first_events_of_a_longer_one_are_the_same(self, tmp_path, monkeypatch):
        monkeypatch.setattr(simulate, "EVENTS_A_STEP", 3)
        longer = simulate_dataset(tmp_path / "long", events=7, seed=1)
        shorter = simulate_dataset(tmp_path / "short", events=4, seed=1)
        rows = np.arange(4)
        np.testing.assert_array_equal(
            longer.rows(rows)["mel_spectrogram"], shorter.rows(rows)["mel_spectrogram"]
        )
        np.testing.assert_array_equal(longer.positions[:4], shorter.positions)
        assert longer.event_names[: len(shorter.event_names)] == shorter.event_names
        assert longer.event[:4].tolist() == shorter.event.tolist()

    def test_a_dataset_of_its_recordings_holds_the_same(self, tmp_path):
        made = simulate_dataset(tmp_path / "a", events=3, windows_per_event=2)
        events = simulate_events(3, windows=2, seed=0)
        written = write_recordings(events, tmp_path / "r")
        table = write_positions(tmp_path / "positions.csv", events, written)
        files = [path for paths in written for path in paths]
        read = ingest_recordings(files, tmp_path / "b", positions=table)
        for name in ("inputs/mel_spectrogram", "positions", "event"):
            assert read.arrays[name] == made.arrays[name]

    def test_progress_goes_from_0_to_1(self, tmp_path):
        shares = []
        simulate_dataset(tmp_path / "a", events=1, progress=lambda share, _: shares.append(share))
        assert (shares[0], shares[-1]) == (0, 1)

    def test_every_number_out_of_range_is_named(self, tmp_path):
        with pytest.raises(ParameterError, match=r"events.*windows_per_event.*seed"):
            simulate_dataset(tmp_path / "a", events=0, windows_per_event=0, seed=-1)
