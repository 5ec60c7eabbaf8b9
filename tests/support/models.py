"""Tiny models with declared signatures; each exports in a fraction of a second.

With this folder on ``sys.path`` they can be named as a user's own: ``models:SmallNet``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.localization.network import LocalizationNet
from heimdall_onnx.model.signature import Signature, TensorSpec

SIGNAL = TensorSpec("signal", "float32", ("batch", 2, 8, 8))
POSITIONS = TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES)
SPREAD = TensorSpec(
    "spread", "float32", ("batch", 2), unit=DEGREES, range=(0.01, 1.0), sigma_of="positions"
)


def declare(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Signature:
    return Signature(tuple(inputs), tuple(outputs))


class SmallLocalizationNet(LocalizationNet):
    """The reference model's signature on a backbone that exports in no time."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        pooled = self.linear(x.mean((2, 3)))
        return pooled, torch.sigmoid(pooled) * 0.9 + 0.05

    signature = LocalizationNet(backbone_size="atto").signature


class SmallNet(nn.Module):
    """A convolutional net with two heads; the same weights each time."""

    signature = declare([SIGNAL], [POSITIONS, SPREAD])

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Conv2d(2, width, 3, padding=1),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
            )
            self.position_head = nn.Linear(width, 2)
            self.spread_head = nn.Linear(width, 2)
        self.eval()

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(signal)
        spread = nn.functional.softplus(self.spread_head(found))
        return self.position_head(found), spread.clamp(0.01, 1.0)


class FaultyNet(SmallNet):
    """`SmallNet` with ``fault(signal, positions, spread)`` done to its outputs."""

    def __init__(self, fault: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        return self.fault(signal, *super().forward(signal))


class BatchNormalizingNet(SmallNet):
    """Normalizes over everything in the batch, so that a row's answer depends on the others."""

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        centred = signal - signal.mean()
        return super().forward(centred / (centred.square().mean().sqrt() + 1e-6))


class UnclampedNet(SmallNet):
    """Its second output leaves the range that the signature promises."""

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        positions, spread = super().forward(signal)
        return positions, spread + 1.0


class BranchingNet(SmallNet):
    """Its control flow depends on what is in the input, which no tracer can follow."""

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(-signal if signal.sum() > 0 else signal)


class DictNet(SmallNet):
    """Returns its outputs by name, in another order than the signature's."""

    def forward(self, signal: Tensor) -> dict[str, Tensor]:
        positions, spread = super().forward(signal)
        return {"spread": spread, "positions": positions}


class IntegerNet(nn.Module):
    """Takes integers that are no amplitudes beside a signal, and returns integers."""

    signature = declare(
        [TensorSpec("values", "float32", ("batch", 4)), TensorSpec("station", "int64", ("batch",))],
        [TensorSpec("level", "int64", ("batch", 4), range=(-1000, 1000))],
    )

    def __init__(self) -> None:
        super().__init__()
        # Few stations: a scaled index would lie outside.
        self.register_buffer("gain", torch.tensor([[1.0], [2.0], [3.0]]))

    def forward(self, values: Tensor, station: Tensor) -> Tensor:
        return (values * self.gain[station]).round().to(torch.int64)


class NaNNet(nn.Module):
    """NaN where its input is negative, -Inf where it is zero."""

    signature = declare(
        [TensorSpec("x", "float32", ("batch", 3))], [TensorSpec("y", "float32", ("batch", 3))]
    )

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


class BlockNet(nn.Module):
    """Residual blocks between a stem and two heads; one block is hard to round.

    In it a single channel is a thousand times as large as the others, so that eight bits for all
    of them leave nothing of what the others carry.
    """

    signature = declare([SIGNAL], [POSITIONS, SPREAD])
    hard = 1

    def __init__(self, blocks: int = 3, width: int = 32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.stem = nn.Linear(128, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(blocks)
        )
        self.position_head = nn.Linear(width, 2)
        self.spread_head = nn.Linear(width, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                size = 0.6 / parameter.shape[-1] ** 0.5
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
            hard = self.blocks[self.hard]
            hard[0].bias[0] = 1000.0
            hard[2].weight *= 3.0  # much depends on it
            hard[2].weight[:, 0] = 0.0
            self.position_head.bias.copy_(torch.tensor([48.0, 9.0]))

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor]:
        # With a further axis, linear layers are exported as products of matrices, as in ConvNeXt.
        value = self.stem(signal.flatten(1).unsqueeze(1))
        for block in self.blocks:
            value = value + block(value)
        value = value.squeeze(1)
        spread = 0.01 + 0.99 * torch.sigmoid(self.spread_head(value))
        return self.position_head(value), spread
