"""What happens to a signal between a transmitter and receivers: loss, delay, Doppler, fading."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Floats

SPEED_OF_LIGHT = 299_792_458.0  # m/s, exact (SI)
_SINUSOIDS = 16
_STEPS_A_CYCLE = 32


@dataclass(frozen=True)
class IonosphericConditions:
    """A state of the ionosphere, as modems are tested in.

    Attributes:
        name: ITU's name for it.
        delay_spread_s: Delay between the two paths.
        doppler_spread_hz: Width (2σ) of the Doppler spectrum of each path.
    """

    name: str
    delay_spread_s: float
    doppler_spread_hz: float


# ITU-R F.1487, Annex 3, mid-latitudes.
CONDITIONS = (
    IonosphericConditions("quiet", 0.5e-3, 0.1),
    IonosphericConditions("moderate", 1e-3, 0.5),
    IonosphericConditions("disturbed", 2e-3, 1.0),
)


def loss_db(distance_m: Floats, *, exponent: float, reference_m: float) -> Floats:
    """Loss beyond that at ``reference_m`` by the log-distance model: 10·n·log10(d / d0).

    Rappaport, Wireless Communications, 2nd ed., 4.9. The exponent of a ground wave far beyond the
    numerical distance is 4, since its field falls with the square of the distance (Norton, Proc.
    IRE 24, 1936, 1367-1387); the loss by the earth's curvature is left out. Distances below 1 km
    count as 1 km.
    """
    return np.asarray(10 * exponent * np.log10(np.maximum(distance_m, 1e3) / reference_m))


def doppler_hz(
    frequency_hz: float, speed_m_s: float, course_deg: float, azimuth_deg: Floats
) -> Floats:
    """Shift f·v·cos(course - azimuth) / c by a transmitter that moves, to first order in v / c.

    Rappaport, as above, (5.2). The angle is that between the course and the path to a receiver.
    """
    towards = np.cos(np.radians(course_deg - azimuth_deg))
    return np.asarray(frequency_hz * speed_m_s * towards / SPEED_OF_LIGHT)


def rayleigh_gains(
    rng: np.random.Generator, shape: tuple[int, ...], times_s: Floats, doppler_spread_hz: float
) -> npt.NDArray[np.complex64]:
    """Complex Gaussian gains of unit mean power with a Gaussian Doppler spectrum.

    The tap gains of Watterson, Juroshek and Bensema, IEEE Trans. Commun. Technol. 18, 1970,
    792-803, as ITU-R F.1487, Annex 1 takes them: autocorrelation exp(-2(πσt)²), where the spread
    is 2σ. Made as a sum of sinusoids at frequencies drawn from the spectrum (Hoeher, IEEE Trans.
    Veh. Technol. 41, 1992, 461-468), with Gaussian amplitudes, so that a gain is Rayleigh at any
    number of them.

    Args:
        rng: Source of all randomness.
        shape: How many independent gains.
        times_s: Where to evaluate them, evenly spaced and ascending.
        doppler_spread_hz: 2σ of the spectrum.

    Returns:
        ``shape`` + (times,).
    """
    begin, end = times_s[0], times_s[-1]
    knots = np.linspace(begin, end, 2 + int((end - begin) * doppler_spread_hz * _STEPS_A_CYCLE))
    hertz = rng.normal(0, doppler_spread_hz / 2, (*shape, _SINUSOIDS, 1))
    parts = rng.standard_normal((*shape, _SINUSOIDS, 2)) / np.sqrt(2 * _SINUSOIDS)
    turning = np.exp(2j * np.pi * hertz * knots)
    slow = (parts.view(np.complex128) * turning).sum(axis=-2).reshape(-1, knots.size)
    gains = np.stack([np.interp(times_s, knots, row) for row in slow])
    return gains.astype(np.complex64).reshape(*shape, len(times_s))
