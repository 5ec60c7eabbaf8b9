"""Propagation: each formula against a value worked out by hand, or the statistics it promises."""

import numpy as np
import pytest

from heimdall_onnx.evidence.geodesy import geodesics
from heimdall_onnx.localization.propagation import (
    CONDITIONS,
    SPEED_OF_LIGHT,
    doppler_hz,
    loss_db,
    rayleigh_gains,
)


def test_a_degree_along_a_meridian_and_its_direction():
    metres, azimuth = geodesics((50.0, 9.0), np.array([[51.0, 9.0], [50.0, 10.0], [49.0, 9.0]]))
    # WGS-84: 111 239 m from 50° to 51°, 71 696 m along the parallel, the geodesic 2 m less.
    np.testing.assert_allclose(metres[:2], [111_239, 71_695], atol=3)
    np.testing.assert_allclose(azimuth % 360, [0, 89.617, 180], atol=0.01)


@pytest.mark.parametrize("exponent", [2, 4])
def test_the_loss_is_the_exponent_s_decades(exponent):
    metres = np.array([30e3, 300e3, 3000e3])
    found = loss_db(metres, exponent=exponent, reference_m=300e3)
    np.testing.assert_allclose(found, [-10 * exponent, 0, 10 * exponent])


def test_the_loss_is_bounded_at_the_transmitter():
    near = loss_db(np.array([0.0, 10.0, 1e3]), exponent=4, reference_m=1e3)
    assert near.tolist() == [0, 0, 0]


def test_doppler_is_positive_towards_and_none_across():
    shifts = doppler_hz(10e6, 30.0, 90.0, np.array([90.0, 270.0, 0.0]))
    expected = 10e6 * 30 / SPEED_OF_LIGHT
    np.testing.assert_allclose(shifts, [expected, -expected, 0], atol=1e-12)


class TestFading:
    @pytest.mark.parametrize("conditions", CONDITIONS, ids=lambda c: c.name)
    def test_gains_are_rayleigh_with_the_spectrum_s_autocorrelation(self, conditions):
        spread = conditions.doppler_spread_hz
        times = np.linspace(0, 1 / spread, 5)
        gains = rayleigh_gains(np.random.default_rng(0), (5000,), times, spread)
        power = np.abs(gains) ** 2
        np.testing.assert_allclose(power.mean(axis=0), 1, atol=0.07)
        np.testing.assert_allclose((power**2).mean(axis=0), 2, atol=0.3)  # of an exponential
        correlation = (gains * gains[:, :1].conj()).mean(axis=0)
        expected = np.exp(-2 * (np.pi * spread / 2 * times) ** 2)
        np.testing.assert_allclose(correlation, expected, atol=0.06)

    def test_gains_are_independent(self):
        times = np.linspace(0, 1, 3)
        gains = rayleigh_gains(np.random.default_rng(0), (5000, 2), times, 0.5)
        assert gains.shape == (5000, 2, 3)
        assert abs((gains[:, 0] * gains[:, 1].conj()).mean()) < 0.05

    def test_between_its_knots_a_gain_is_followed_closely(self):
        times = np.linspace(0, 10, 4001)
        gains = rayleigh_gains(np.random.default_rng(1), (1,), times, 1.0)[0]
        spectrum = np.abs(np.fft.fft(gains * np.hanning(4001))) ** 2
        beyond = np.abs(np.fft.fftfreq(4001, times[1])) > 3  # six deviations
        assert spectrum[beyond].sum() / spectrum.sum() < 1e-4
