"""Signed mel spectrograms: from complex samples to what the reference model sees of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view
from scipy import fft
from scipy.signal.windows import hann
from scipy.sparse import csr_array

from heimdall_onnx.common.errors import ParameterError

_CONSTANT = 1e-9  # a smaller standard deviation, in decades, is rounding


@dataclass(frozen=True)
class FeatureParameters:
    """How samples become features; recorded in every file of features.

    Attributes:
        n_fft: Samples of one Fourier transform, and of its Hann window.
        hop_length: Samples from one frame to the next.
        n_mels: Bands of the signed mel filter bank.
        n_frames: Frames of one window; windows share no frame.
        channels: ``"receivers"``: three receivers of one event, each the power spectrum of its
            complex signal. ``"iqm"``: I, Q and magnitude of one receiver, three real signals. I
            or Q alone shows a tone's distance from the carrier but not its side (the spectrum is
            mirrored), and the magnitude of a tone is constant, whatever its frequency; what
            depends on the sign of a frequency, or on several sites, can be learnt from
            ``"receivers"`` only.
        log_floor: Smallest band power before the logarithm, relative to a full-scale tone. The
            default, -140 dB, is below the rounding noise of 16-bit samples.

    Raises:
        ParameterError: If a value is out of range; every one is named.
    """

    n_fft: int = 1024
    hop_length: int = 512
    n_mels: int = 128
    n_frames: int = 32
    channels: Literal["receivers", "iqm"] = "receivers"
    log_floor: float = 1e-14

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be an integer from {low} to {high}, found {value!r}"
            for name, value, low, high in (
                ("n_fft", self.n_fft, 16, 2**20),
                ("hop_length", self.hop_length, 1, self.n_fft),
                ("n_mels", self.n_mels, 1, 4096),
                ("n_frames", self.n_frames, 1, 4096),
            )
            if not isinstance(value, int) or not low <= value <= high
        ]
        if self.channels not in ("receivers", "iqm"):
            problems.append(f"channels must be 'receivers' or 'iqm', found {self.channels!r}")
        if not 0 < self.log_floor < 1:
            problems.append(f"log_floor must lie between 0 and 1, found {self.log_floor!r}")
        if problems:
            raise ParameterError("feature parameters: " + "; ".join(problems))

    @property
    def window_samples(self) -> int:
        """Samples that one window looks at."""
        return self.n_fft + (self.n_frames - 1) * self.hop_length


def mel_windows(
    signals: npt.NDArray[np.complexfloating[Any, Any]],
    sample_rate_hz: float,
    parameters: FeatureParameters,
) -> npt.NDArray[np.float32]:
    """Features of the consecutive windows that fit into simultaneous signals.

    Args:
        signals: Complex samples (channels, samples), full scale ±1.
        sample_rate_hz: Their rate.
        parameters: How to compute the features.

    Returns:
        (windows, channels, n_mels, n_frames); no window if the signals are too short.

    Raises:
        ParameterError: If a mel band stays empty; the message says which ``n_fft`` to take.
    """
    step = parameters.n_frames * parameters.hop_length
    starts = range(0, signals.shape[-1] - parameters.window_samples + 1, step)
    shape = (0, signals.shape[0], parameters.n_mels, parameters.n_frames)
    windows = [
        normalize(
            log_mel(signals[:, s : s + parameters.window_samples], sample_rate_hz, parameters)
        )
        for s in starts
    ]
    return np.stack(windows) if windows else np.empty(shape, np.float32)


def log_mel(
    signals: npt.NDArray[np.complexfloating[Any, Any]],
    sample_rate_hz: float,
    parameters: FeatureParameters,
) -> npt.NDArray[np.float64]:
    """Logarithm (base 10) of the mel-band powers of one window each.

    The short-time Fourier transform is that of the complex signal, so +f and -f are told apart.

    Args:
        signals: Complex samples (…, `FeatureParameters.window_samples`).
        sample_rate_hz: Their rate.
        parameters: How to compute the features.

    Returns:
        (…, n_mels, n_frames), not normalized.
    """
    window = hann(parameters.n_fft, sym=False)
    # Frame p starts at sample p * hop_length and none reaches beyond the signal.
    frames = sliding_window_view(signals, parameters.n_fft, axis=-1)
    frames = frames[..., :: parameters.hop_length, :][..., : parameters.n_frames, :]
    spectrum = fft.fft(frames * (window / window.sum()), axis=-1)
    power = spectrum.real**2 + spectrum.imag**2
    # A frequency is in two bands at most: a sparse product takes a tenth of a dense one's time.
    bank = _sparse_filters(sample_rate_hz, parameters.n_fft, parameters.n_mels)
    by_frequency = np.moveaxis(power, -1, 0)  # from (…, frames, n_fft)
    bands = np.asarray(bank @ by_frequency.reshape(parameters.n_fft, -1))
    bands = np.moveaxis(bands.reshape(parameters.n_mels, *by_frequency.shape[1:]), 0, -2)
    return np.asarray(np.log10(np.maximum(bands, parameters.log_floor)), np.float64)


@lru_cache(maxsize=16)
def _sparse_filters(sample_rate_hz: float, n_fft: int, n_mels: int) -> Any:
    # In the order of the transform: from 0 up, then the negative frequencies.
    bank = fft.ifftshift(signed_mel_filters(sample_rate_hz, n_fft, n_mels), axes=1)
    return csr_array(bank)


def normalize(features: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Mean 0 and standard deviation 1 over the last two axes; a constant channel becomes zeros."""
    centred = features - features.mean(axis=(-2, -1), keepdims=True)
    spread = centred.std(axis=(-2, -1), keepdims=True)
    constant = spread < _CONSTANT
    scaled = np.where(constant, 0.0, centred / np.where(constant, 1.0, spread))
    return scaled.astype(np.float32)


def signed_mel_filters(sample_rate_hz: float, n_fft: int, n_mels: int) -> npt.NDArray[np.float64]:
    """Triangular bands equally spaced in sgn(f)·mel(|f|) from -fs/2 to +fs/2.

    mel(f) = 2595 log10(1 + f / 700 Hz) is HTK's formula (Young et al., The HTK Book, 5.4, after
    O'Shaughnessy, Speech Communication: Human and Machine, 1987). The bands are narrowest at the
    tuned frequency (24.5 Hz apart at 12 kHz and 128 bands) and widest at the edges. Audio
    libraries build banks for the positive frequencies of real signals only, whence this one.

    Returns:
        (n_mels, n_fft), peak 1, for frequencies in ascending order.

    Raises:
        ParameterError: If a band holds no frequency of the transform; with the ``n_fft`` to take.
    """
    bank = _filters(sample_rate_hz, n_fft, n_mels)
    empty = np.flatnonzero(bank.sum(axis=1) == 0)
    if empty.size:
        enough = n_fft
        while (_filters(sample_rate_hz, enough, n_mels).sum(axis=1) == 0).any():
            enough *= 2
        raise ParameterError(
            f"{empty.size} of {n_mels} mel bands hold no frequency with n_fft={n_fft} at "
            f"{sample_rate_hz:g} Hz; take n_fft={enough}"
        )
    return bank


def _filters(sample_rate_hz: float, n_fft: int, n_mels: int) -> npt.NDArray[np.float64]:
    hertz = np.fft.fftshift(np.fft.fftfreq(n_fft, 1 / sample_rate_hz))
    mels = np.sign(hertz) * _mel(np.abs(hertz))
    edge = _mel(np.float64(sample_rate_hz / 2))
    centres, spacing = np.linspace(-edge, edge, n_mels + 2, retstep=True)
    distance = np.abs(mels[None, :] - centres[1:-1, None]) / spacing
    return np.asarray(np.maximum(0.0, 1.0 - distance), np.float64)


def _mel(hertz: Any) -> Any:
    return 2595.0 * np.log10(1.0 + hertz / 700.0)
