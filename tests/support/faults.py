"""Models over a set of receivers, one without a fault and others with one each.

The faults are those that models of several inputs, masks and ids have brought with them; all of
them train and answer without an error.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec

FEATURES = TensorSpec("features", "float32", ("batch", "receivers", 3))
STATIONS = TensorSpec("stations", "int64", ("batch", "receivers"), range=(0, 4))
MASK = TensorSpec("mask", "bool", ("batch", "receivers"), masks=("features", "stations"))
POSITION = TensorSpec("position", "float32", ("batch", 2), unit=DEGREES)
LOG_VARIANCE = TensorSpec(
    "log_variance", "float32", ("batch", 2), range=(-8.0, 8.0), log_variance_of="position"
)
SET = Signature(
    (FEATURES, STATIONS, MASK),
    (POSITION, LOG_VARIANCE),
    (Axis("receivers", lengths=(1, 2, 3, 8), permutable=True),),
)


class SetNet(nn.Module):
    """Features and an embedding of each receiver, pooled over those that are not masked."""

    signature = SET

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.encoder = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width))
            self.stations = nn.Embedding(5, width)
            self.head = nn.Linear(width, 2)
            self.spread = nn.Linear(width, 2)
        self.eval()

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        """(batch, receivers, width) of the receivers one by one."""
        return self.encoder(features) + self.stations(stations)

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        """The mean of those that are not masked."""
        seen = values.masked_fill(mask[..., None], 0.0)
        return seen.sum(1) / (~mask).sum(1, keepdim=True).clamp(min=1)

    def answer(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(pooled), self.spread(pooled).clamp(-8.0, 8.0)

    def forward(self, features: Tensor, stations: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.answer(self.pool(self.encode(features, stations, mask), mask))


class InvertedMaskNet(SetNet):
    """Takes True for what may be seen."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        return super().pool(values, ~mask)


class HalfMaskedNet(SetNet):
    """Masks the features where it pools, but centres them over all receivers before."""

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        return super().encode(features - features.mean(1, keepdim=True), stations, mask)


class PaddedMeanNet(SetNet):
    """Divides by how many receivers there are, the masked ones among them."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        return values.masked_fill(mask[..., None], 0.0).sum(1) / mask.shape[1]


class BakedIdNet(SetNet):
    """Looks one station up for all, as a Python number."""

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(features) + self.stations.weight[stations[0, 0].item()]


class NeighbourNet(SetNet):
    """Attends along the wrong axis: ``batch_first`` was forgotten, and no shape complains."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.attention = nn.MultiheadAttention(8, 2)
        self.eval()

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        values = super().encode(features, stations, mask)
        return values + self.attention(values, values, values, need_weights=False)[0]


class CrowdNet(SetNet):
    """Divides by how many receivers have heard something in the whole batch."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        return super().pool(values, mask) * (~mask).sum().clamp(min=1) ** -0.5


class LoopNet(SetNet):
    """Goes through the receivers in a loop, which an exporter unrolls."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        total = torch.zeros_like(values[:, 0])
        for receiver in range(values.shape[1]):
            total = total + values[:, receiver].masked_fill(mask[:, receiver, None], 0.0)
        return total / (~mask).sum(1, keepdim=True).clamp(min=1)


class TableNet(SetNet):
    """Adds a row of a table to each receiver, so that it matters which is the first.

    As it makes a number of the length, TorchScript keeps that; torch.export follows it.
    """

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(int(features.shape[1]), dtype=features.dtype)
        return super().encode(features, stations, mask) + 0.1 * places[None, :, None].cos()


class BranchNet(SetNet):
    """Treats few receivers differently from many."""

    def pool(self, values: Tensor, mask: Tensor) -> Tensor:
        if values.shape[1] > 4:
            return super().pool(values, mask)
        return 2.0 * super().pool(values, mask)


class BearingNet(SetNet):
    """Uses the angle of the first two features, which ONNX has no operator for.

    What the exporters make of quotients and arcs is NaN at the origin up to opset 17; from 18 on
    it is not, but at every opset it is on the other side of the cut for (0, x < 0).
    """

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        angle = torch.atan2(features[..., 0], features[..., 1])
        return super().encode(features, stations, mask) + angle[..., None]


class SafeBearingNet(SetNet):
    """Uses the angle's cosine and sine, which need no angle; both are 0 at the origin."""

    def encode(self, features: Tensor, stations: Tensor, mask: Tensor) -> Tensor:
        east, north = features[..., :1], features[..., 1:2]
        length = (east.square() + north.square()).sqrt().clamp(min=1e-6)
        return super().encode(features, stations, mask) + east / length - north / length


def renamed(names: Mapping[str, str], base: type[SetNet] = SetNet) -> SetNet:
    """`SetNet` with inputs called otherwise in its signature."""
    from dataclasses import replace

    model = base()
    model.signature = replace(  # type: ignore[misc]
        SET,
        inputs=tuple(
            replace(
                spec,
                name=names.get(spec.name, spec.name),
                masks=tuple(names.get(n, n) for n in spec.masks),
            )
            for spec in SET.inputs
        ),
    )
    return model
