"""Two models of the kinds that localization by several receivers grows beside spectrograms.

Both take a set of receivers of any number, some of them masked, and answer with a position. Their
weights are the same each time. With this folder on ``sys.path`` they can be named as a
user's own: ``families:Triangulator``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.localization.frame import LocalFrame
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

CENTROID = (50.0, 10.0)
SCALE_M = 200_000.0
RECEIVERS_KNOWN = 12
_MASKED = -1e9  # far below any score; exp of it is 0 in float32 and float64

FEATURES = TensorSpec("receiver_features", "float32", ("batch", "receivers", 6), range=(-3.0, 3.0))
SIGNAL_MASK = TensorSpec(
    "signal_mask", "bool", ("batch", "receivers"), masks=("receiver_features",)
)
POSITION = TensorSpec("position", "float32", ("batch", 2), unit=DEGREES)
LOG_VARIANCE = TensorSpec(
    "log_variance",
    "float32",
    ("batch", 2),
    unit="ln(degrees²)",
    log_variance_of="position",
)
TRIANGULATION = Signature(
    inputs=(FEATURES, SIGNAL_MASK),
    outputs=(POSITION, LOG_VARIANCE),
    axes=(Axis("receivers", lengths=(1, 2, 3, 8), permutable=True),),
)


class SetAttention(nn.Module):
    """Self-attention within a set of receivers; those that are masked are never looked at.

    After Lee et al., "Set Transformer" (ICML 2019), section 3.1, with normalization first.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mixed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        seen = self.norm(x)
        query, key, value = (
            part(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores.masked_fill(mask[:, None, None, :], _MASKED)
        looked = torch.softmax(scores, dim=-1) @ value
        x = x + self.out(looked.transpose(1, 2).flatten(2))
        return x + self.mix(self.norm_mixed(x))


class Pooling(nn.Module):
    """One vector of a set, by attention with a learned query over what is not masked."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.score(x).squeeze(-1).masked_fill(mask, _MASKED)
        weights = torch.softmax(scores, dim=-1)
        return (weights.unsqueeze(1) @ x).squeeze(1), weights


class Answer(nn.Module):
    """Position in degrees and logarithm of its variance in degrees squared."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.offset, self.spread = nn.Linear(width, 2), nn.Linear(width, 2)
        self.frame = LocalFrame(CENTROID, SCALE_M)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        deviations = torch.exp(0.5 * self.spread(x).clamp(-8.0, 2.0))
        positions, degrees = self.frame(torch.tanh(self.offset(x)), deviations)
        return positions, degrees


class Triangulator(nn.Module):
    """A small set transformer over receivers, which may come in any order and number.

    Takes ``receiver_features`` (B, N, 6): north and east of the receiver in units of 200 km,
    signal-to-noise ratio, received power, and sine and cosine of the bearing, each standardized;
    and ``signal_mask`` (B, N), True where a receiver has heard nothing.
    """

    signature = TRIANGULATION

    def __init__(self, width: int = 32, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.embed = nn.Linear(6, width)
            self.layers = nn.ModuleList(SetAttention(width, heads) for _ in range(depth))
            self.pool = Pooling(width)
            self.answer = Answer(width)
        self.eval()

    def forward(self, receiver_features: Tensor, signal_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(receiver_features)
        for layer in self.layers:
            x = layer(x, signal_mask)
        positions, deviations = self.answer(self.pool(x, signal_mask)[0])
        return positions, 2 * torch.log(deviations)


class UndeclaredMultiModalNet(nn.Module):
    """Complex baseband, features, place and identity of each receiver, joined by attention.

    It declares nothing, as a class that was written for training only.

    Takes ``iq`` (B, N, 2, T), in-phase and quadrature; ``features`` (B, N, 6);
    ``receiver_positions`` (B, N, 2) in degrees; ``receiver_ids`` (B, N), 0 to 11; ``mask`` (B, N),
    True = masked. Returns by name the position, its deviations, and how much each receiver counted.
    """

    def __init__(self, width: int = 24, heads: int = 4) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.waves = nn.Sequential(
                nn.Conv1d(2, 8, 7, stride=2, padding=3),
                nn.GELU(),
                nn.Conv1d(8, width, 5, stride=2, padding=2),
                nn.GELU(),
            )
            self.features = nn.Linear(6, width)
            self.places = nn.Linear(2, width)
            self.identity = nn.Embedding(RECEIVERS_KNOWN, width)
            self.layer = SetAttention(width, heads)
            self.pool = Pooling(width)
            self.answer = Answer(width)
        self.register_buffer("centroid", torch.tensor(CENTROID))
        self.eval()

    def forward(
        self,
        iq: Tensor,
        features: Tensor,
        receiver_positions: Tensor,
        receiver_ids: Tensor,
        mask: Tensor,
    ) -> dict[str, Tensor]:
        heard = self.waves(iq.flatten(0, 1)).mean(dim=-1)
        x = (
            heard.reshape(iq.shape[0], iq.shape[1], -1)
            + self.features(features)
            + self.places(receiver_positions - self.centroid)
            + self.identity(receiver_ids)
        )
        pooled, weights = self.pool(self.layer(x, mask), mask)
        positions, deviations = self.answer(pooled)
        return {"weights": weights, "positions": positions, "uncertainties": deviations}


MULTI_MODAL = Signature(
    inputs=(
        TensorSpec("iq", "float32", ("batch", "receivers", 2, "time"), range=(-1.0, 1.0)),
        TensorSpec("features", "float32", ("batch", "receivers", 6)),
        TensorSpec(
            "receiver_positions",
            "float32",
            ("batch", "receivers", 2),
            unit=DEGREES,
            range=(5.0, 55.0),
        ),
        TensorSpec("receiver_ids", "int64", ("batch", "receivers"), range=(0, RECEIVERS_KNOWN - 1)),
        TensorSpec(
            "mask",
            "bool",
            ("batch", "receivers"),
            masks=("iq", "features", "receiver_positions", "receiver_ids"),
        ),
    ),
    outputs=(
        TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES),
        TensorSpec("uncertainties", "float32", ("batch", 2), unit=DEGREES, sigma_of="positions"),
        TensorSpec("weights", "float32", ("batch", "receivers"), range=(0.0, 1.0)),
    ),
    axes=(
        Axis("receivers", lengths=(1, 2, 5), permutable=True),
        Axis("time", lengths=(16, 33, 64)),
    ),
)


class MultiModalNet(UndeclaredMultiModalNet):
    """The same with everything declared: signature, and inputs as receivers would give them."""

    signature = MULTI_MODAL

    @staticmethod
    def example_inputs(count: int, rng: np.random.Generator, lengths: Mapping[str, int]) -> Arrays:
        """A carrier with noise at each receiver; receivers around the middle; some masked."""
        receivers, time = lengths["receivers"], lengths["time"]
        shape = (count, receivers)
        phase = 2 * np.pi * rng.uniform(-0.2, 0.2, (*shape, 1)) * np.arange(time)
        phase = phase + rng.uniform(0, 2 * np.pi, (*shape, 1))
        iq = 0.5 * np.stack([np.cos(phase), np.sin(phase)], axis=2)
        mask = rng.random(shape) < 0.25
        mask[np.arange(count), rng.integers(0, receivers, count)] = False  # one has heard it
        return {
            "iq": (iq + rng.uniform(-0.3, 0.3, iq.shape)).astype(np.float32),
            "features": rng.standard_normal((*shape, 6)).astype(np.float32),
            "receiver_positions": (np.array(CENTROID) + rng.uniform(-1.5, 1.5, (*shape, 2))).astype(
                np.float32
            ),
            "receiver_ids": rng.integers(0, RECEIVERS_KNOWN, shape),
            "mask": mask,
        }

    @staticmethod
    def adversarial_inputs(base: Arrays, rng: np.random.Generator) -> dict[str, Arrays]:
        """Receivers that are silent, overdriven, all in one place, or alone."""
        alone = np.ones_like(base["mask"])
        alone[np.arange(len(alone)), rng.integers(0, alone.shape[1], len(alone))] = False
        middle = np.broadcast_to(np.float32(CENTROID), base["receiver_positions"].shape)

        def changed(**arrays: Any) -> Arrays:
            return {**base, **arrays}

        return {
            "silence": changed(iq=np.zeros_like(base["iq"])),
            "overdriven": changed(iq=np.clip(100 * base["iq"], -1, 1)),
            "one place": changed(receiver_positions=middle.copy()),
            "all masked but one": changed(mask=alone),
        }


def make_triangulation_data(count: int, receivers: int, seed: int = 0) -> dict[str, Any]:
    """Labelled evaluation data: inputs of a `Triangulator` and the positions they belong to."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(-1, 1, (count, receivers, 2))
    truth = rng.uniform(-0.8, 0.8, (count, 1, 2))
    offset = truth - places
    distance = np.linalg.norm(offset, axis=-1)
    power = -2.0 * np.log10(distance + 0.05) + 0.1 * rng.standard_normal(distance.shape)
    snr = power + 0.2 * rng.standard_normal(distance.shape)
    north, east = np.moveaxis(offset, -1, 0)
    bearing = np.arctan2(east, north) + 0.05 * rng.standard_normal(distance.shape)
    features = [*np.moveaxis(places, -1, 0), snr, power, np.sin(bearing), np.cos(bearing)]
    mask = rng.random((count, receivers)) < 0.2
    mask[np.arange(count), rng.integers(0, receivers, count)] = False
    frame = LocalFrame(CENTROID, SCALE_M)
    with torch.inference_mode():
        offsets = torch.from_numpy(truth[:, 0, :])
        positions, _ = frame.double()(offsets, offsets)
    return {
        "receiver_features": np.stack(features, axis=-1).astype(np.float32),
        "signal_mask": mask,
        "positions": positions.numpy(),
    }
