"""Simulated captures: what of the position is in them."""

import numpy as np
import pytest

from heimdall_onnx import simulate
from heimdall_onnx.simulate import CHANNEL, RECEIVERS, level_db, simulate_captures

SITES = np.array(list(RECEIVERS.values()))


def test_captures_fit_the_model():
    features, positions = simulate_captures(np.random.default_rng(0), 3)
    assert features.shape == (3, 3, 128, 32)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert positions.shape == (3, 2)


def test_equal_seeds_give_equal_captures_and_others_do_not():
    first, second, third = (simulate_captures(np.random.default_rng(s), 2) for s in (4, 4, 5))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert np.abs(first[0] - third[0]).max() > 1


def test_positions_fill_the_enlarged_triangle_of_the_sites(monkeypatch):
    monkeypatch.setattr(simulate, "log_mel", lambda received, *_: received.real[..., :4, None])
    monkeypatch.setattr(simulate, "_receive", lambda *_: np.zeros((3, 8), np.complex64))
    _, positions = simulate_captures(np.random.default_rng(0), 4000)
    np.testing.assert_allclose(positions.mean(axis=0), SITES.mean(axis=0), atol=0.15)
    reach = CHANNEL["region_scale"] * (SITES - SITES.mean(axis=0))
    assert (positions.min(axis=0) >= SITES.mean(axis=0) + reach.min(axis=0)).all()
    assert np.ptp(positions, axis=0) == pytest.approx(np.ptp(reach, axis=0), rel=0.1)


def test_the_level_falls_by_40_db_a_decade():
    site = SITES[:1]
    degree_m = 111_200
    near, far = (
        level_db(site[0] - [metres / degree_m, 0], site)[0] for metres in (50_000, 500_000)
    )
    assert near - far == pytest.approx(40, abs=0.2)
    assert level_db(site[0], site)[0] == level_db(site[0] + 1e-3, site)[0]  # not without bound


def test_the_nearest_receiver_shows_the_greatest_contrast():
    """The channels are normalized, so the position can only be in their contrast."""
    rng = np.random.default_rng(1)
    passband = slice(14, 114)
    contrasts = {}
    for name, position in (("at HB9ODP", SITES[0]), ("at pa0rdt", SITES[2])):
        received = [simulate._receive(rng, position + 0.3, SITES) for _ in range(24)]
        mel = simulate.log_mel(np.stack(received), 12_000.0, simulate.PARAMETERS)
        level = mel.mean(axis=-1)[..., passband]
        contrasts[name] = (level.max(axis=-1) - np.median(level, axis=-1)).mean(axis=0)
    assert contrasts["at HB9ODP"].argmax() == 0
    assert contrasts["at pa0rdt"].argmax() == 2


@pytest.mark.parametrize("seed", range(8))
def test_what_is_sent_has_unit_power_near_the_tuned_frequency(seed):
    sent = simulate._transmit(np.random.default_rng(seed), 16_896)
    assert np.mean(np.abs(sent) ** 2) == pytest.approx(1)
    power = np.abs(np.fft.fft(sent)) ** 2
    inside = np.abs(np.fft.fftfreq(sent.size, 1 / 12_000)) < CHANNEL["passband_hz"]
    assert power[inside].sum() / power.sum() > 0.9


def test_fading_has_unit_mean_power():
    gains = simulate._fading(np.random.default_rng(0), 2000, 64)
    assert np.mean(np.abs(gains[:, 0]) ** 2) == pytest.approx(1, rel=0.05)
