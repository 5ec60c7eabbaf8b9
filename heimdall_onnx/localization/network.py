"""The reference model: radio-source localization from the mel spectrograms of three receivers.

The backbone is ConvNeXt (Liu et al., "A ConvNet for the 2020s", CVPR 2022), for training on a few
processor cores in the size atto (Woo et al., "ConvNeXt V2", CVPR 2023, table of sizes). Its
parameters carry the names that torchvision gives them, so that weights published in that layout
load strictly, but torchvision itself is not needed.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name the field uses

from heimdall_onnx.common.errors import CheckpointError, ParameterError
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.localization.frame import LocalFrame
from heimdall_onnx.model.checkpoint import load_weights
from heimdall_onnx.model.signature import Signature, TensorSpec

_WEIGHTS_URL = "https://download.pytorch.org/models/convnext_{}.pth"
_LAYER_SCALE = 1e-6
_EPS = 1e-6


def localization_signature(uncertainty_range: tuple[float, float] = (0.01, 1.0)) -> Signature:
    """Signature of the reference model with the given limits of its uncertainties, in degrees."""
    return Signature(
        inputs=(TensorSpec("mel_spectrogram", "float32", ("batch", 3, 128, 32)),),
        outputs=(
            TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES),
            TensorSpec(
                "uncertainties",
                "float32",
                ("batch", 2),
                unit=DEGREES,
                range=uncertainty_range,
                sigma_of="positions",
            ),
        ),
    )


LOCALIZATION_SIGNATURE = localization_signature()


@dataclass(frozen=True)
class _Size:
    """One published size of ConvNeXt.

    Attributes:
        channels: Channels of the four stages.
        depths: Blocks of the four stages.
        stochastic_depth: Probability with which the last block is skipped in training.
        weights: Published name and start of the SHA-256 of the ImageNet weights; None where none
            are published in this layout.
    """

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    stochastic_depth: float
    weights: str | None


BACKBONES = {
    "large": _Size((192, 384, 768, 1536), (3, 3, 27, 3), 0.5, "large-ea097f82"),
    "medium": _Size((128, 256, 512, 1024), (3, 3, 27, 3), 0.5, "base-6075fbad"),
    "small": _Size((96, 192, 384, 768), (3, 3, 27, 3), 0.4, "small-0c510722"),
    "tiny": _Size((96, 192, 384, 768), (3, 3, 9, 3), 0.1, "tiny-983f1562"),
    "atto": _Size((40, 80, 160, 320), (2, 2, 6, 2), 0.1, None),
}


class LocalizationNet(nn.Module):
    """Position and uncertainty of a transmitter from one mel spectrogram per receiver.

    ``forward`` takes ``mel_spectrogram`` (batch, 3, 128, 32) and returns ``positions`` (batch, 2)
    in degrees latitude and longitude, unbounded, and ``uncertainties`` (batch, 2) in degrees
    within [uncertainty_min, uncertainty_max]. A batch of 0 gives empty outputs.

    With a centroid and a scale the heads answer in units of a `LocalFrame`, which turns them into
    degrees inside the graph; that is what training sets. Without them the heads answer in degrees.

    Args:
        pretrained: ``True`` downloads the published ImageNet weights of the backbone (cached by
            ``torch.hub``); a path loads such a file, whose classifier is left out; ``False``
            initializes at random and touches neither disk nor network.
        freeze_backbone: Train the heads only.
        uncertainty_min: Smallest uncertainty, in degrees, above 0.
        uncertainty_max: Largest uncertainty, in degrees. Both limits hold for calibrated ones as
            well: what calibrating would take beyond them stays at the limit.
        backbone_size: ``"large"``, ``"medium"`` (published as base), ``"small"``, ``"tiny"`` or
            ``"atto"``.
        centroid: Latitude and longitude of the frame's origin, degrees; with ``scale_m``.
        scale_m: Metres of one unit of the frame; with ``centroid``.

    Attributes:
        signature: The model's inputs and outputs, with these limits.
        backbone_size: As given.
        frame: The frame; None where the heads answer in degrees.

    Raises:
        ParameterError: If the size is unknown, the uncertainties' limits are not in order, or
            centroid and scale make no frame.
        CheckpointError: If the pretrained weights can't be had or don't fit.
    """

    def __init__(
        self,
        pretrained: bool | str | Path = False,
        freeze_backbone: bool = False,
        uncertainty_min: float = 0.01,
        uncertainty_max: float = 1.0,
        backbone_size: str = "large",
        centroid: Sequence[float] | None = None,
        scale_m: float | None = None,
    ) -> None:
        super().__init__()
        size = _checked_size(backbone_size)
        if not (0 < uncertainty_min < uncertainty_max and math.isfinite(uncertainty_max)):
            raise ParameterError(
                "the uncertainties' limits must satisfy 0 < uncertainty_min < uncertainty_max; "
                f"found uncertainty_min={uncertainty_min!r}, uncertainty_max={uncertainty_max!r}"
            )
        self.backbone_size = backbone_size
        # JSON knows 10 where 10.0 is meant, and clamp can't be exported with one of each.
        self.uncertainty_min = float(uncertainty_min)
        self.uncertainty_max = float(uncertainty_max)
        self.signature = localization_signature((self.uncertainty_min, self.uncertainty_max))
        features = _features(size)
        if pretrained is not False:
            _load_features(features, size, pretrained)
        self.backbone = nn.Sequential(features, nn.AdaptiveAvgPool2d(1))
        self.position_head = _head(size.channels[-1])
        self.uncertainty_head = _head(size.channels[-1])
        self.frame = _frame(centroid, scale_m)
        if freeze_backbone:
            self.backbone.requires_grad_(False)

    def forward(self, mel_spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (batch, 2) and uncertainties (batch, 2), both in degrees."""
        positions, spread = self._heads(mel_spectrogram)
        if self.frame is not None:
            positions, spread = self.frame(positions, spread)
        return positions, self._limited(spread, self.uncertainty_min, self.uncertainty_max)

    def local(self, mel_spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets (batch, 2) and deviations (batch, 2), both in units of the frame, uncalibrated.

        Raises:
            ParameterError: If the model has no frame.
        """
        if self.frame is None:
            raise ParameterError("the model has no frame: build it with a centroid and a scale_m")
        offsets, spread = self._heads(mel_spectrogram)
        units = self.frame.degrees_per_unit
        return offsets, self._limited(
            spread.to(units.dtype), self.uncertainty_min / units, self.uncertainty_max / units
        )

    def augment(self, mel_spectrogram: Tensor) -> tuple[Tensor]:
        """Other inputs with the same answer, for training: mirrored in time or in frequency.

        Which end of the band or of the window is which says nothing about the place.
        """
        mirrored = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
        return (mel_spectrogram.flip(mirrored),)

    def _heads(self, mel_spectrogram: Tensor) -> tuple[Tensor, Tensor]:
        pooled = self.backbone(mel_spectrogram).flatten(1)
        return self.position_head(pooled), F.softplus(self.uncertainty_head(pooled))

    def _limited(self, spread: Tensor, low: Any, high: Any) -> Tensor:
        if not self.training:
            return spread.clamp(low, high)
        limited: Tensor = _Clamp.apply(spread, low, high)  # type: ignore[no-untyped-call]
        return limited

    def get_params_count(self) -> dict[str, int]:
        """Number of parameters: ``total``, ``trainable`` and ``frozen``."""
        total = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return {"total": total, "trainable": trainable, "frozen": total - trainable}


class _Clamp(torch.autograd.Function):
    """Clamping whose gradient still leads back into the range; that of ``clamp`` is 0 outside."""

    @staticmethod
    def forward(context: Any, value: Tensor, low: Any, high: Any) -> Tensor:
        context.save_for_backward(value < low, value > high)
        return value.clamp(low, high)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        below, above = context.saved_tensors
        (gradient,) = gradients
        # Descent goes against the gradient: below the range a positive one leads further down.
        outward = (below & (gradient > 0)) | (above & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


class _LayerNorm2d(nn.LayerNorm):
    """Layer normalization over the channels of (batch, channels, height, width)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, value: Tensor) -> Tensor:
        return value.permute(self.order)


class _StochasticDepth(nn.Module):
    """Skip a residual branch at random, per sample, in training (Huang et al., ECCV 2016)."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, branch: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return branch
        survival = 1 - self.probability
        rows = branch.new_empty(branch.shape[0], 1, 1, 1).bernoulli_(survival)
        return branch * rows / survival


class _Block(nn.Module):
    """A ConvNeXt block: depthwise 7×7, then an inverted bottleneck on the channels."""

    def __init__(self, channels: int, skip_probability: float) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels),
            _Permute(0, 2, 3, 1),
            nn.LayerNorm(channels, eps=_EPS),
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            _Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), _LAYER_SCALE))
        self.stochastic_depth = _StochasticDepth(skip_probability)

    def forward(self, value: Tensor) -> Tensor:
        branch: Tensor = self.stochastic_depth(self.layer_scale * self.block(value))
        return value + branch


def _features(size: _Size) -> nn.Sequential:
    """The convolutional part: the stem, then four stages with downsampling between them."""
    channels = size.channels
    stem = nn.Sequential(
        nn.Conv2d(3, channels[0], kernel_size=4, stride=4), _LayerNorm2d(channels[0], eps=_EPS)
    )
    layers: list[nn.Module] = [stem]
    last, first = sum(size.depths) - 1, 0
    for stage, depth in enumerate(size.depths):
        if stage:
            before, after = channels[stage - 1], channels[stage]
            norm = _LayerNorm2d(before, eps=_EPS)
            layers.append(nn.Sequential(norm, nn.Conv2d(before, after, kernel_size=2, stride=2)))
        # Deeper blocks are skipped more often, from 0 at the first, linearly.
        skips = [size.stochastic_depth * block / last for block in range(first, first + depth)]
        layers.append(nn.Sequential(*(_Block(channels[stage], skip) for skip in skips)))
        first += depth
    features = nn.Sequential(*layers)
    for module in features.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return features


def _head(features: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, 128),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(128, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, 2),
    )


def _checked_size(name: str) -> _Size:
    size = BACKBONES.get(name)
    if size is None:
        raise ParameterError(f"backbone_size must be one of {', '.join(BACKBONES)}; found {name!r}")
    return size


def _frame(centroid: Sequence[float] | None, scale_m: float | None) -> LocalFrame | None:
    if centroid is None and scale_m is None:
        return None
    if centroid is None or scale_m is None:
        raise ParameterError(
            "centroid and scale_m make a frame together; found "
            f"centroid={centroid!r}, scale_m={scale_m!r}"
        )
    return LocalFrame(centroid, scale_m)


def _load_features(features: nn.Module, size: _Size, pretrained: bool | str | Path) -> None:
    if pretrained is not True:
        load_weights(features, str(pretrained))
        return
    if size.weights is None:
        raise CheckpointError(
            "no weights are published for this size in torchvision's layout; use "
            "pretrained=False, or give a file's path"
        )
    url = _WEIGHTS_URL.format(size.weights)
    try:
        # It announces the download on standard output, which belongs to the caller's result.
        with contextlib.redirect_stdout(sys.stderr):
            published = torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True, progress=False
            )
    except Exception as error:  # the network's errors, and those of a broken file in the cache
        raise CheckpointError(
            f"the published weights can't be had from {url}: {error}. Download the file by other "
            "means and give its path as pretrained, or use pretrained=False."
        ) from error
    own = {key: value for key, value in published.items() if key.startswith("features.")}
    features.load_state_dict({key.removeprefix("features."): own[key] for key in own})
