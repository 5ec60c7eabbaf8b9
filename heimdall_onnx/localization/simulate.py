"""Simulated events: a transmission between three real receiver sites, as these record it.

The signal of one of several modulations (`modulation`) reaches each site r as

    x_r(t) = g_r·e^{j2πf_r(t - τ_r)}·e^{-j2πf_cτ_r}·Σ_i h_ri(t - τ_r)·s(t - τ_r - δ_i) + n_r(t)

with the gain g_r of a ground wave (log-distance model), log-normal shadowing and a transmitter's
power that varies; the delay τ_r along the geodesic; the shift f_r by the transmitter's oscillator,
its motion and the receiver's clock; and three paths: the steady ground wave, and two by the
ionosphere that fade as Rayleigh processes (Watterson's model), so that the sum is Rician
(`propagation`). Both are filtered to the receiver's passband and rounded to 16 bits at 12 kHz.

Features normalize absolute levels away. What they leave of the distance is the contrast between
signal, noise inside the passband and quantization floor outside of it, as KiwiSDR recordings
show it. The delays are in the samples, since those recordings are aligned by GNSS; a power
spectrum does not show them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import fft

from heimdall_onnx.common.arrays import Floats
from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.logs import OnProgress
from heimdall_onnx.common.machine import usable_processors
from heimdall_onnx.data.dataset.dataset import Dataset, open_dataset
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.evidence.geodesy import geodesics
from heimdall_onnx.localization.mel import FeatureParameters, mel_windows
from heimdall_onnx.localization.modulation import MODULATIONS
from heimdall_onnx.localization.propagation import (
    CONDITIONS,
    SPEED_OF_LIGHT,
    doppler_hz,
    loss_db,
    rayleigh_gains,
)

# The sites of the KiwiSDR recordings of DCF77 of 2020-08-13, degrees latitude and longitude.
RECEIVERS = {
    "HB9ODP": (46.499351, 8.798828),
    "JO51xl": (51.466044, 11.977189),
    "pa0rdt": (51.500500, 3.600690),
}
SAMPLE_RATE_HZ = 12_000.0
PARAMETERS = FeatureParameters()
CHANNEL = {
    "frequency_hz": 1_850_000.0,
    "snr_db_at_300_km": 12.0,  # mean over the sampled band
    "path_loss_exponent": 4.0,
    "power_db": 1.0,  # standard deviation of the transmitter's power, the same for all sites
    "shadowing_db": 1.5,  # standard deviation, each site's own
    "rician_k": 10.0,  # power of the ground wave over that of both other paths
    "oscillator_ppm": 1.0,  # standard deviation, of the transmitter
    "receiver_ppm": 0.01,  # standard deviation, of a clock held by GNSS
    "speed_m_s": 30.0,  # the fastest
    "ionospheric_doppler_hz": 0.2,  # standard deviation, of the layer's motion
    "carrier_offset_hz": 2000.0,
    "passband_hz": 4000.0,
    "noise_rms": 1e-3,  # of full scale; 16 bits then put the quantization floor 40 dB below it
    "agc_rms": 0.2,  # louder input is turned down to this
    "region_scale": 1.4,  # the sites' triangle, enlarged about its middle
}

_MARGIN = 256  # samples before and after, which delays and filters reach into
_ROLL_OFF_HZ = 300.0
_FULL_SCALE = 2.0**15
_FINE = 128
EVENTS_A_STEP = 64  # events between reports of progress


@dataclass(frozen=True)
class SimulatedEvent:
    """One transmission as all sites record it at the same time.

    Attributes:
        iq: Complex samples (sites, samples), complex64, full scale ±1, in steps of 2⁻¹⁵.
        position: True latitude and longitude, degrees.
        modulation: One of `MODULATIONS`.
        conditions: ITU's name for the state of the ionosphere.
        carrier_offset_hz: Carrier less tuned frequency, as sent.
        shifts_hz: By how much each site receives it shifted (sites,), by oscillators and motion.
        snr_db: Signal over noise at each site (sites,) over the sampled band, before fading.
        delays_s: Propagation delay to each site (sites,).
    """

    iq: npt.NDArray[np.complex64] = field(repr=False)
    position: tuple[float, float]
    modulation: str
    conditions: str
    carrier_offset_hz: float
    shifts_hz: tuple[float, ...]
    snr_db: tuple[float, ...]
    delays_s: tuple[float, ...]


def simulate_event(
    rng: np.random.Generator,
    position: tuple[float, float] | None = None,
    *,
    windows: int = 1,
    modulation: str | None = None,
) -> SimulatedEvent:
    """Simulate one transmission.

    Args:
        rng: Source of all randomness.
        position: Latitude and longitude of the transmitter, degrees; None draws one, uniformly in
            the sites' triangle enlarged by ``CHANNEL["region_scale"]``.
        windows: How many windows of features to record.
        modulation: One of `MODULATIONS`; None draws one.

    Raises:
        ParameterError: If there is no such modulation, or less than one window.
    """
    if windows < 1 or modulation not in (None, *MODULATIONS):
        raise ParameterError(
            f"expected at least one window and a modulation of {', '.join(MODULATIONS)}; found "
            f"{windows} and {modulation!r}"
        )
    sites = np.array(list(RECEIVERS.values()))
    where = draw_position(rng, sites) if position is None else np.array(position, np.float64)
    kind = modulation or str(rng.choice(list(MODULATIONS)))
    conditions = CONDITIONS[rng.integers(len(CONDITIONS))]
    metres, azimuth = geodesics(where, sites)
    level = (
        level_db(where, sites)
        + rng.normal(0, CHANNEL["power_db"])
        + rng.normal(0, CHANNEL["shadowing_db"], len(sites))
    )
    carrier = CHANNEL["frequency_hz"]
    shifts = (
        carrier * 1e-6 * rng.normal(0, CHANNEL["oscillator_ppm"])
        + carrier * 1e-6 * rng.normal(0, CHANNEL["receiver_ppm"], len(sites))
        + doppler_hz(carrier, rng.uniform(0, CHANNEL["speed_m_s"]), rng.uniform(0, 360), azimuth)
    )
    offset = rng.uniform(-1, 1) * CHANNEL["carrier_offset_hz"]
    step = PARAMETERS.n_frames * PARAMETERS.hop_length
    samples = PARAMETERS.window_samples + (windows - 1) * step
    size = fft.next_fast_len(samples + 2 * _MARGIN)
    times = np.arange(size) / SAMPLE_RATE_HZ
    sent = MODULATIONS[kind](rng, size, SAMPLE_RATE_HZ)
    # As it arrives first, and later by the delay spread.
    spread = _delay(size, np.array([0.0, conditions.delay_spread_s]))
    paths = np.asarray(fft.ifft(fft.fft(sent) * spread))
    faded = fade(rng, paths, times, conditions.doppler_spread_hz)
    faded *= _phasors((offset + shifts) / SAMPLE_RATE_HZ, size)
    delays = metres / SPEED_OF_LIGHT
    arrived = fft.fft(faded) * _delay(size, delays)
    # The carrier's phase after so many cycles on the way.
    gain = 10 ** (level / 20) * np.exp(-2j * np.pi * (carrier * delays % 1))
    arrived *= gain.astype(np.complex64)[:, None]
    recorded = _record(rng, arrived)[:, _MARGIN : _MARGIN + samples]
    return SimulatedEvent(
        iq=recorded,
        position=(float(where[0]), float(where[1])),
        modulation=kind,
        conditions=conditions.name,
        carrier_offset_hz=float(offset),
        shifts_hz=tuple(shifts.tolist()),
        snr_db=tuple(level.tolist()),
        delays_s=tuple(delays.tolist()),
    )


def simulate_numbered(seed: int, number: int, windows: int) -> SimulatedEvent:
    """An event of a seed, which depends on these alone; see `simulate_event`."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    return simulate_event(rng, windows=windows)


def simulate_dataset(
    path: Path | str,
    *,
    events: int,
    windows_per_event: int = 1,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> Dataset:
    """Write a dataset of simulated transmissions, each one event.

    Equal seeds give equal digests, and the first events of a longer dataset are a shorter one's.
    Memory does not depend on their number.

    Args:
        path: The folder to make; must not exist.
        events: Number of transmissions.
        windows_per_event: Samples of each.
        seed: Seed of all randomness.
        progress: Called with the share of the work done, 0 to 1, and what is being done.

    Raises:
        ParameterError: If a number is out of range.
        DataError: If ``path`` exists, or can't be written.
        UnavailableError: Without the package Zarr.
    """
    problems = [
        f"{name} must be at least {least}, found {value!r}"
        for name, value, least in (
            ("events", events, 1),
            ("windows_per_event", windows_per_event, 1),
            ("seed", seed, 0),
        )
        if value < least
    ]
    if problems:
        raise ParameterError("simulation: " + "; ".join(problems))
    meta = {
        "provenance": "simulated",
        "seed": seed,
        "windows_per_event": windows_per_event,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "channel": CHANNEL,
        "features": asdict(PARAMETERS),
    }

    def make(number: int) -> tuple[npt.NDArray[np.float32], tuple[float, float]]:
        event = simulate_numbered(seed, number, windows_per_event)
        return mel_windows(event.iq, SAMPLE_RATE_HZ, PARAMETERS), event.position

    say = progress or (lambda share, what: None)
    # NumPy and SciPy let go of the interpreter where they compute, so threads use the cores.
    with (
        create_dataset(path, meta=meta, receivers=RECEIVERS) as writer,
        ThreadPoolExecutor(usable_processors()) as pool,
    ):
        for first in range(0, events, EVENTS_A_STEP):
            say(first / events, "simulating events")
            numbers = range(first, min(first + EVENTS_A_STEP, events))
            made = list(pool.map(make, numbers))
            windows = np.concatenate([features for features, _ in made])
            positions = np.repeat([where for _, where in made], windows_per_event, axis=0)
            names = [f"simulated-{seed}-{n}" for n in numbers for _ in range(windows_per_event)]
            writer.append({"mel_spectrogram": windows}, positions, names)
    say(1.0, "simulating events")
    return open_dataset(path)


def level_db(position: Sequence[float] | Floats, sites: Floats) -> Floats:
    """Mean signal-to-noise ratio over the sampled band at each site, without shadowing."""
    metres, _ = geodesics(position, sites)
    return np.asarray(
        CHANNEL["snr_db_at_300_km"]
        - loss_db(metres, exponent=CHANNEL["path_loss_exponent"], reference_m=300e3)
    )


def draw_position(rng: np.random.Generator, sites: Floats) -> Floats:
    """A place, drawn uniformly from the enlarged triangle of the sites."""
    middle = sites.mean(axis=0)
    corners = middle + CHANNEL["region_scale"] * (sites - middle)
    return np.asarray(rng.dirichlet(np.ones(3)) @ corners)


def _phasors(turns: Floats, count: int, first: int = 0) -> npt.NDArray[np.complex64]:
    """e^{j2π·turns·n} for n = ``first``, ``first`` + 1, … (turns, count).

    As products of a coarse and a fine step, which takes a tenth of as many exponentials' time.
    """
    coarse = first + np.arange(0, count, _FINE)
    steps = np.exp(2j * np.pi * turns[:, None] * coarse)[..., None]
    fine = np.exp(2j * np.pi * turns[:, None] * np.arange(_FINE))[:, None]
    product = steps.astype(np.complex64) * fine.astype(np.complex64)
    return np.asarray(product.reshape(len(turns), -1)[:, :count])


def _delay(size: int, seconds: Floats) -> npt.NDArray[np.complex64]:
    """Transfer functions (delays, size) that delay by fractions of a sample, exactly in band."""
    ascending = _phasors(-seconds * SAMPLE_RATE_HZ / size, size, first=-(size // 2))
    return np.asarray(fft.ifftshift(ascending, axes=-1))


def fade(
    rng: np.random.Generator,
    paths: npt.NDArray[np.complex64],
    times: Floats,
    doppler_spread_hz: float,
) -> npt.NDArray[np.complex64]:
    """Sum of the paths with their gains at each site (sites, samples), of unit mean power.

    The ground wave arrives with the first of the two ionospheric paths.
    """
    sites, k = len(RECEIVERS), CHANNEL["rician_k"]
    gains = rayleigh_gains(rng, (sites, 2), times, doppler_spread_hz)
    shift = rng.normal(0, CHANNEL["ionospheric_doppler_hz"], sites)
    gains *= _phasors(shift / SAMPLE_RATE_HZ, len(times))[:, None]
    gains *= np.float32(np.sqrt(1 / (2 * (k + 1))))
    gains[:, 0] += np.float32(np.sqrt(k / (k + 1)))
    return np.asarray(gains[:, 0] * paths[0] + gains[:, 1] * paths[1])


def _record(
    rng: np.random.Generator, arrived: npt.NDArray[np.complex64]
) -> npt.NDArray[np.complex64]:
    """Noise added, filtered, turned down where it is too loud, and rounded to 16 bits.

    Args:
        rng: Source of the noise.
        arrived: Spectra (sites, size) of the signals, in units of the noise's deviation.
    """
    count, size = arrived.shape
    passband = _passband(size)
    # White noise has a white spectrum, so it is drawn there, of unit power in the passband.
    parts = rng.standard_normal((count, size, 2), np.float32)
    inside = np.float32(np.sqrt(size / 2 / np.mean(passband**2)))
    spectrum = (arrived + inside * parts.view(np.complex64)[..., 0]) * passband
    heard = fft.ifft(spectrum)
    rms = CHANNEL["noise_rms"] * np.sqrt(np.mean(np.abs(heard) ** 2, axis=-1, keepdims=True))
    gain = CHANNEL["noise_rms"] * np.minimum(1.0, CHANNEL["agc_rms"] / rms)
    steps = (heard * (_FULL_SCALE * gain).astype(np.float32)).view(np.float32)
    np.rint(steps, out=steps)
    np.clip(steps, -_FULL_SCALE, _FULL_SCALE - 1, out=steps)
    return np.asarray((steps / np.float32(_FULL_SCALE)).view(np.complex64))


@lru_cache(maxsize=8)
def _passband(size: int) -> npt.NDArray[np.float32]:
    """1 up to the passband's edge, then down a cosine."""
    beyond = np.abs(fft.fftfreq(size, 1 / SAMPLE_RATE_HZ)) - CHANNEL["passband_hz"]
    edge = np.clip(beyond / _ROLL_OFF_HZ, 0, 1)
    return np.asarray(0.5 * (1 + np.cos(np.pi * edge)), np.float32)
