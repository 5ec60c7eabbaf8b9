"""Simulated captures: transmitters between three real receiver sites, as features.

What a receiver records is a modulated carrier at 12 kHz complex baseband plus noise, passed through
the same features as a recording. The channel: received power falls with distance by the
log-distance model with exponent 4 (Rappaport, Wireless Communications, 2nd ed., 4.9; 4 is the
two-ray exponent over ground, 4.6), with log-normal shadowing, and Rician fading over the window.

The features' normalization removes absolute levels. What it leaves of the distance is the contrast
between signal, noise inside the receiver's passband and quantization floor outside of it, as
KiwiSDR recordings show it. Delays stay out, since a power spectrum doesn't show them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from pyproj import Geod
from scipy import fft

from heimdall_onnx.mel import FeatureParameters, log_mel, normalize

Floats = npt.NDArray[np.float64]
Complex = npt.NDArray[np.complexfloating]

# The sites of the KiwiSDR recordings of DCF77 of 2020-08-13, degrees latitude and longitude.
RECEIVERS = {
    "HB9ODP": (46.499351, 8.798828),
    "JO51xl": (51.466044, 11.977189),
    "pa0rdt": (51.500500, 3.600690),
}
SAMPLE_RATE_HZ = 12_000.0
PARAMETERS = FeatureParameters()
CHANNEL = {
    "snr_db_at_300_km": 12.0,  # mean over the sampled band
    "path_loss_exponent": 4.0,
    "shadowing_db": 1.5,
    "rician_k": 10.0,
    "oscillator_offset_hz": 3.0,  # standard deviation, Doppler included
    "carrier_offset_hz": 2000.0,
    "passband_hz": 4000.0,
    "floor_db": -40.0,  # quantization noise relative to the noise in the passband
    "region_scale": 1.4,  # the sites' triangle, enlarged about its middle
}


def simulate_captures(
    rng: np.random.Generator, count: int
) -> tuple[npt.NDArray[np.float32], Floats]:
    """Features and true positions of simulated transmissions.

    Args:
        rng: Source of all randomness.
        count: Number of captures, at least 1; each takes about 1 MB while it is computed.

    Returns:
        Features (count, 3, 128, 32) and positions (count, 2) in degrees latitude and longitude.
    """
    sites = np.array(list(RECEIVERS.values()))
    middle = sites.mean(axis=0)
    corners = middle + CHANNEL["region_scale"] * (sites - middle)
    positions = rng.dirichlet(np.ones(3), count) @ corners  # uniform in the triangle
    received = np.stack([_receive(rng, position, sites) for position in positions])
    return normalize(log_mel(received, SAMPLE_RATE_HZ, PARAMETERS)), positions


def level_db(position: Floats, sites: Floats) -> Floats:
    """Mean signal-to-noise ratio over the sampled band at each site, without shadowing."""
    count = len(sites)
    metres = Geod(ellps="WGS84").inv(
        np.full(count, position[1]), np.full(count, position[0]), sites[:, 1], sites[:, 0]
    )[2]
    ratio = np.maximum(metres, 1e3) / 300e3
    return np.asarray(
        CHANNEL["snr_db_at_300_km"] - 10 * CHANNEL["path_loss_exponent"] * np.log10(ratio)
    )


def _receive(rng: np.random.Generator, position: Floats, sites: Floats) -> Complex:
    """One transmission as all sites record it, (sites, samples)."""
    count, samples = len(sites), PARAMETERS.window_samples
    level = level_db(position, sites) + rng.normal(0, CHANNEL["shadowing_db"], count)
    offset_hz = rng.normal(0, CHANNEL["oscillator_offset_hz"], (count, 1))
    turns = offset_hz * np.arange(samples) / SAMPLE_RATE_HZ
    gain = 10 ** (level[:, None] / 20) * _fading(rng, count, samples)
    signal = (gain * np.exp(2j * np.pi * turns) * _transmit(rng, samples)).astype(np.complex64)
    # White noise has a white spectrum, so it is drawn there: at full power inside the passband,
    # and at that of the quantization floor outside.
    inside = np.abs(fft.fftfreq(samples, 1 / SAMPLE_RATE_HZ)) < CHANNEL["passband_hz"]
    scale = np.where(inside, 1.0, 10 ** (CHANNEL["floor_db"] / 20)) * np.sqrt(samples / 2)
    parts = rng.standard_normal((count, samples, 2), np.float32)
    noise = parts.view(np.complex64)[..., 0] * scale.astype(np.float32)
    return np.asarray(fft.ifft(fft.fft(signal, axis=-1) * inside + noise, axis=-1))


def _transmit(rng: np.random.Generator, samples: int) -> Complex:
    """A carrier of unit mean power, modulated one of four ways, off the tuned frequency."""
    kind = rng.choice(("cw", "am", "fm", "psk"))
    envelope: Complex | Floats
    if kind == "cw":
        envelope = _symbols(rng, samples, rng.uniform(8, 25), (0, 1, 1))
    elif kind == "am":
        envelope = 1 + 0.6 * np.clip(_audio(rng, samples, rng.uniform(1e3, 3e3)), -1.6, 1.6)
    elif kind == "fm":
        deviation_hz = rng.uniform(500, 1500)
        phase = np.cumsum(_audio(rng, samples, 2e3)) * deviation_hz / SAMPLE_RATE_HZ
        envelope = np.exp(2j * np.pi * phase)
    else:
        envelope = _symbols(rng, samples, rng.uniform(50, 1200), (1, 1j, -1, -1j))
    power = np.mean(np.abs(envelope) ** 2)
    offset_hz = rng.uniform(-1, 1) * CHANNEL["carrier_offset_hz"]
    carrier = offset_hz * np.arange(samples) / SAMPLE_RATE_HZ + rng.uniform()
    return np.asarray(envelope / np.sqrt(power) * np.exp(2j * np.pi * carrier))


def _symbols(
    rng: np.random.Generator, samples: int, baud: float, alphabet: tuple[complex, ...]
) -> Complex:
    """Random symbols at ``baud``, their edges smoothed over a quarter of a symbol."""
    index = (np.arange(samples) * baud / SAMPLE_RATE_HZ).astype(int)
    drawn = rng.choice(alphabet, index[-1] + 1)
    drawn[0] = alphabet[-1]  # never silent throughout
    edge = np.hanning(max(2, int(SAMPLE_RATE_HZ / baud / 4)) + 2)
    return np.asarray(np.convolve(drawn[index], edge / edge.sum(), mode="same"))


def _audio(rng: np.random.Generator, samples: int, bandwidth_hz: float) -> Floats:
    """Noise of unit power below ``bandwidth_hz``."""
    spectrum = fft.rfft(rng.standard_normal(samples))
    spectrum[int(bandwidth_hz / SAMPLE_RATE_HZ * samples) :] = 0
    audio = fft.irfft(spectrum, samples)
    return np.asarray(audio / audio.std())


def _fading(rng: np.random.Generator, count: int, samples: int) -> Complex:
    """Rician gains of unit mean power that change within about a third of a second."""
    knots = np.linspace(0, samples, 5)
    scattered = rng.standard_normal((count, 5, 2)).view(np.complex128)[..., 0] / np.sqrt(2)
    moving = np.stack([np.interp(np.arange(samples), knots, row) for row in scattered])
    k = CHANNEL["rician_k"]
    return np.asarray(np.sqrt(k / (k + 1)) + np.sqrt(1 / (k + 1)) * moving)
