"""Mel spectrograms: what the model sees of a signal."""

import numpy as np
import pytest

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.localization.mel import (
    FeatureParameters,
    log_mel,
    mel_windows,
    normalize,
    signed_mel_filters,
)

RATE = 12_000.0
PARAMETERS = FeatureParameters()


def tone(hertz, samples=PARAMETERS.window_samples, noise=0.01, seed=0):
    rng = np.random.default_rng(seed)
    parts = rng.standard_normal((samples, 2)) * noise
    return np.exp(2j * np.pi * hertz * np.arange(samples) / RATE) + parts @ [1, 1j]


def window(*signals, parameters=PARAMETERS):
    found = mel_windows(np.stack(signals).astype(np.complex64), RATE, parameters)
    assert found.shape[0] == 1
    return found[0]


class TestParameters:
    @pytest.mark.parametrize(
        "change",
        [
            {"n_fft": 8},
            {"n_fft": 1024.0},
            {"hop_length": 0},
            {"hop_length": 2048},
            {"n_mels": 0},
            {"n_frames": 0},
            {"channels": "mono"},
            {"log_floor": 0.0},
            {"log_floor": float("nan")},
        ],
    )
    def test_those_out_of_range_are_refused_by_name(self, change):
        with pytest.raises(ParameterError, match=next(iter(change))):
            FeatureParameters(**change)

    def test_all_problems_are_named_at_once(self):
        with pytest.raises(ParameterError, match=r"n_fft.*channels.*log_floor"):
            FeatureParameters(n_fft=1, channels="x", log_floor=2)


class TestFilters:
    def test_every_band_holds_a_frequency_and_none_is_lost_between(self):
        bank = signed_mel_filters(RATE, 1024, 128)
        assert bank.shape == (128, 1024)
        assert (bank.sum(axis=1) > 0).all()
        hertz = np.fft.fftshift(np.fft.fftfreq(1024, 1 / RATE))
        inner = np.abs(hertz) < 5500
        np.testing.assert_allclose(bank[:, inner].sum(axis=0), 1)

    def test_bands_are_narrowest_at_the_tuned_frequency_and_mirrored(self):
        bank = signed_mel_filters(RATE, 4096, 128)
        hertz = np.fft.fftshift(np.fft.fftfreq(4096, 1 / RATE))
        centres = (bank @ hertz) / bank.sum(axis=1)
        spacing = np.diff(centres)
        assert spacing.argmin() == 63
        assert spacing.min() == pytest.approx(24.5, abs=1)
        assert spacing.max() > 200
        np.testing.assert_allclose(centres, -centres[::-1], atol=3)

    def test_the_scale_is_htk_s(self):
        bank = signed_mel_filters(RATE, 2**16, 128)
        hertz = np.fft.fftshift(np.fft.fftfreq(2**16, 1 / RATE))
        edge = 2595 * np.log10(1 + 6000 / 700)
        expected = 700 * (10 ** ((edge * (127 - 64.5) / 64.5) / 2595) - 1)  # last but one band
        assert hertz[bank[126].argmax()] == pytest.approx(expected, abs=0.2)

    def test_an_empty_band_says_which_transform_to_take(self):
        with pytest.raises(ParameterError, match="take n_fft=256") as error:
            signed_mel_filters(RATE, 128, 128)
        assert "of 128 mel bands hold no frequency with n_fft=128 at 12000 Hz" in str(error.value)
        assert signed_mel_filters(RATE, 256, 128).shape == (128, 256)


class TestWindows:
    def test_shape_dtype_and_normalization(self):
        found = window(tone(-1000), tone(0), tone(2500))
        assert found.shape == (3, 128, 32)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.mean(axis=(1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(found.std(axis=(1, 2)), 1, rtol=1e-5)

    @pytest.mark.parametrize(("one", "other"), [(1000, -1000), (500, 600), (-40, 0)])
    def test_two_tones_give_different_features(self, one, other):
        first, second = window(tone(one), tone(other)).mean(axis=2)
        assert first.argmax() != second.argmax()
        assert np.abs(first - second).max() > 1

    @pytest.mark.parametrize("hertz", [-4000, -1000, -30, 30, 1000, 4000])
    def test_a_tone_appears_in_the_band_of_its_frequency(self, hertz):
        bank = signed_mel_filters(RATE, 1024, 128)
        axis = np.fft.fftshift(np.fft.fftfreq(1024, 1 / RATE))
        bands = bank[:, np.abs(axis - hertz).argmin()]
        brightest = window(tone(hertz))[0].mean(axis=1).argmax()
        assert brightest == bands.argmax()

    def test_frames_follow_time(self):
        signal = tone(1000)
        signal[: signal.size // 2] *= 1e-3
        energy = window(signal)[0][84:100].max(axis=0)
        assert energy[:15].max() < energy[17:].min()

    def test_windows_share_no_frame_and_cover_the_signal(self):
        step = PARAMETERS.n_frames * PARAMETERS.hop_length
        signal = tone(700, PARAMETERS.window_samples + 2 * step)[None].astype(np.complex64)
        found = mel_windows(signal, RATE, PARAMETERS)
        assert found.shape[0] == 3
        alone = mel_windows(signal[:, step : step + PARAMETERS.window_samples], RATE, PARAMETERS)
        np.testing.assert_array_equal(found[1], alone[0])
        assert mel_windows(signal[:, :-1], RATE, PARAMETERS).shape[0] == 2

    def test_a_signal_that_is_too_short_gives_no_window(self):
        signal = np.ones((3, PARAMETERS.window_samples - 1), np.complex64)
        assert mel_windows(signal, RATE, PARAMETERS).shape == (0, 3, 128, 32)

    def test_the_power_is_that_of_the_windowed_transform(self):
        parameters = FeatureParameters(n_fft=1000, hop_length=300, n_mels=20, n_frames=3)
        signal = tone(123, parameters.window_samples, noise=0.3)
        weights = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1000) / 1000)
        frames = [signal[s : s + 1000] * weights / weights.sum() for s in (0, 300, 600)]
        power = np.abs(np.fft.fftshift(np.fft.fft(frames, axis=1), axes=1)) ** 2
        expected = np.log10(signed_mel_filters(RATE, 1000, 20) @ power.T)
        np.testing.assert_allclose(log_mel(signal, RATE, parameters), expected, rtol=1e-9)

    def test_a_full_scale_tone_is_0_db_and_silence_is_the_floor(self):
        assert log_mel(tone(0, noise=0), RATE, PARAMETERS).max() == pytest.approx(0, abs=0.2)
        silence = np.zeros(PARAMETERS.window_samples, np.complex64)
        assert (log_mel(silence, RATE, PARAMETERS) == -14).all()

    def test_a_silent_channel_becomes_zeros_beside_others(self):
        found = window(tone(100), np.zeros(PARAMETERS.window_samples))
        assert (found[1] == 0).all()
        assert np.isfinite(found).all()

    def test_a_constant_is_zeros_even_where_its_mean_is_rounded(self):
        assert (normalize(np.full((2, 128, 32), -13.7)) == 0).all()
