"""Transmitted signals: power, bandwidth, and what makes each the modulation it is."""

import numpy as np
import pytest

from heimdall_onnx.localization.modulation import MODULATIONS

RATE = 12_000.0
SAMPLES = 17_500


def send(name, seed=0, samples=SAMPLES):
    return MODULATIONS[name](np.random.default_rng(seed), samples, RATE)


@pytest.mark.parametrize("name", MODULATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_unit_power_near_the_carrier(name, seed):
    sent = send(name, seed)
    assert (sent.dtype, sent.shape) == (np.complex64, (SAMPLES,))
    assert np.mean(np.abs(sent) ** 2) == pytest.approx(1, rel=1e-3)
    power = np.abs(np.fft.fft(sent)) ** 2
    inside = np.abs(np.fft.fftfreq(SAMPLES, 1 / RATE)) < 4000
    assert power[inside].sum() / power.sum() > 0.9


@pytest.mark.parametrize("name", MODULATIONS)
def test_equal_seeds_send_the_same_and_others_do_not(name):
    np.testing.assert_array_equal(send(name, 1), send(name, 1))
    assert np.abs(send(name, 1) - send(name, 2)).max() > 0.1


def test_a_keyed_carrier_is_on_or_off():
    level = np.abs(send("cw")) / np.abs(send("cw")).max()
    assert ((level < 0.01) | (level > 0.99)).mean() > 0.8
    assert 0.3 < (level > 0.5).mean() < 0.8


def test_am_keeps_its_carrier_and_its_phase():
    sent = send("am")
    assert np.abs(sent.imag).max() < 1e-6
    assert sent.real.min() > 0
    assert np.mean(sent) ** 2 > 0.7


def test_fm_has_a_constant_envelope():
    np.testing.assert_allclose(np.abs(send("fm")), 1, atol=1e-3)


@pytest.mark.parametrize(("name", "phases"), [("bpsk", 2), ("qpsk", 4)])
def test_the_phases_power_removes_phase_keying(name, phases):
    """Raised to the number of phases, a line appears at the carrier; to half of it, none."""
    sent = send(name)
    lines = [abs(np.mean(sent**power)) for power in (phases // 2, phases)]
    assert lines[1] > 0.3
    assert lines[0] < 0.1


def test_a_matched_filter_finds_symbols_without_interference():
    rng = np.random.default_rng(0)
    sent = MODULATIONS["bpsk"](rng, 12_000, RATE)
    spacing = int(RATE / np.random.default_rng(0).uniform(50, 1200))
    frequency = np.abs(np.fft.fftfreq(sent.size)) * spacing
    edge = np.clip((frequency - (1 - 0.35) / 2) / 0.35, 0, 1)
    received = np.fft.ifft(np.fft.fft(sent) * np.cos(np.pi / 2 * edge))
    symbols = received[::spacing][20:-20]
    np.testing.assert_allclose(np.abs(symbols), np.abs(symbols).mean(), rtol=0.05)


def test_second_marks_fall_to_15_percent_for_a_tenth_or_two_of_each_second():
    sent = np.abs(send("time signal", samples=120_000))
    low = sent < 0.5 * sent.max()
    assert sent.min() / sent.max() == pytest.approx(0.15, abs=1e-3)
    begins = np.flatnonzero(np.diff(low.astype(int)) == 1)
    np.testing.assert_allclose(np.diff(begins), RATE, atol=2)
    ends = np.flatnonzero(np.diff(low.astype(int)) == -1)
    lengths = (ends[ends > begins[0]][: len(begins)] - begins[: len(ends)]) / RATE
    assert {round(float(length), 2) for length in lengths[:-1]} <= {0.1, 0.2}
