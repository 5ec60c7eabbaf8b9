"""Transmitted signals at complex baseband, drawn at random: what a receiver may hear.

Each is an envelope of unit mean power about the carrier's own frequency. Speech and music are
stood in for by noise of their bandwidth, which has their spectrum's width and no content.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy import fft

Complex = npt.NDArray[np.complex64]

_ROLL_OFF = 0.35
_RAMP_S = 0.005  # rise and fall of a keyed carrier


def keyed_carrier(rng: np.random.Generator, samples: int, rate_hz: float) -> Complex:
    """On-off keying in Morse code's rhythm at 10 to 30 words a minute.

    A dash is three dots, the gaps are one dot within a letter, three between letters and seven
    between words (ITU-R M.1677-1, part I, 2); a dot lasts 1.2 s over the words a minute.
    """
    dot = 1.2 / rng.uniform(10, 30) * rate_hz
    count = int(samples / (2 * dot)) + 2
    marks = rng.choice((1, 3), count)
    gaps = rng.choice((1, 3, 7), count, p=(0.6, 0.3, 0.1))
    edges = np.cumsum(np.stack([marks, gaps], axis=1).reshape(-1)) * dot
    on = np.searchsorted(edges, np.arange(samples), side="right") % 2 == 0
    return _unit_power(_smooth(on.astype(np.float32), _RAMP_S * rate_hz))


def amplitude_modulation(rng: np.random.Generator, samples: int, rate_hz: float) -> Complex:
    """A carrier with both sidebands, 60 % modulated: 1 + m·a(t) (Carson, Proc. IRE 10, 1922)."""
    audio = np.clip(_audio(rng, samples, rng.uniform(1e3, 3e3) / rate_hz), -1.6, 1.6)
    return _unit_power(1 + np.float32(0.6) * audio)


def frequency_modulation(rng: np.random.Generator, samples: int, rate_hz: float) -> Complex:
    """Narrow-band FM of 0.5 to 1.5 kHz rms deviation: exp(j2π∫Δf·a(t)dt) (Carson, as above)."""
    audio = _audio(rng, samples, 2e3 / rate_hz)
    turns = np.cumsum(audio, dtype=np.float64) * rng.uniform(500, 1500) / rate_hz
    return np.asarray(np.exp(2j * np.pi * (turns % 1)), np.complex64)


def second_marks(rng: np.random.Generator, samples: int, rate_hz: float) -> Complex:
    """Pulse-width keyed amplitude, as DCF77 sends time.

    At each second the amplitude falls to 15 % for 0.1 s (a zero) or 0.2 s (a one) (Bauch, Hetzel
    and Piester, PTB-Mitteilungen 119, 2009, no. 3, 217-240). The phase modulation is left out.
    """
    seconds = np.arange(samples) / rate_hz + rng.uniform(0, 1)
    lengths = rng.choice((0.1, 0.2), int(seconds[-1]) + 1)
    low = seconds % 1 < lengths[seconds.astype(np.int64)]
    envelope = np.where(low, np.float32(0.15), np.float32(1))
    return _unit_power(_smooth(envelope, _RAMP_S * rate_hz))


def phase_keying(rng: np.random.Generator, samples: int, rate_hz: float, phases: int) -> Complex:
    """Random symbols at 50 to 1200 baud, shaped by a root-raised-cosine of roll-off 0.35.

    Proakis and Salehi, Digital Communications, 5th ed., 9.2-1, (9.2-28): the square root of that
    spectrum, applied where it is defined, in the frequency domain.
    """
    spacing = int(rate_hz / rng.uniform(50, 1200))
    symbols = np.exp(2j * np.pi * rng.integers(0, phases, samples // spacing + 1) / phases)
    pulses = np.zeros(fft.next_fast_len(samples + 16 * spacing), np.complex64)
    pulses[: symbols.size * spacing : spacing] = symbols
    frequency = np.abs(fft.fftfreq(pulses.size)) * spacing  # 1 is the symbol rate
    edge = np.clip((frequency - (1 - _ROLL_OFF) / 2) / _ROLL_OFF, 0, 1)
    shape = np.cos(np.pi / 2 * edge).astype(np.float32)
    return _unit_power(fft.ifft(fft.fft(pulses) * shape)[:samples])


MODULATIONS: dict[str, Callable[[np.random.Generator, int, float], Complex]] = {
    "cw": keyed_carrier,
    "am": amplitude_modulation,
    "fm": frequency_modulation,
    "bpsk": partial(phase_keying, phases=2),
    "qpsk": partial(phase_keying, phases=4),
    "time signal": second_marks,
}


def _audio(rng: np.random.Generator, samples: int, bandwidth: float) -> npt.NDArray[np.float32]:
    """Noise of unit power up to ``bandwidth``, as a share of the sample rate."""
    size = fft.next_fast_len(samples, real=True)
    spectrum = np.zeros(size // 2 + 1, np.complex64)
    count = int(bandwidth * size)
    spectrum[1:count] = rng.standard_normal((count - 1, 2), np.float32).view(np.complex64)[:, 0]
    audio = fft.irfft(spectrum, size)[:samples]
    return np.asarray(audio / audio.std(), np.float32)


def _smooth(envelope: npt.NDArray[np.float32], length: float) -> npt.NDArray[np.float32]:
    """Steps turned into raised-cosine edges."""
    weights = np.hanning(int(length) + 2).astype(np.float32)
    return np.convolve(envelope, weights / weights.sum(), mode="same")


def _unit_power(envelope: npt.NDArray[np.inexact]) -> Complex:
    power = np.mean(np.abs(envelope) ** 2)
    return np.asarray(envelope / np.sqrt(max(power, 1e-6)), np.complex64)
