"""Models that are hard to export or to judge, each for a kind, and at which opset what is right.

Where a graph can't be right it has to be refused; where it is as right as PyTorch it has to be
released, whatever makes it look otherwise.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from .case import Case, Should, declared, saved
from .nets import state_of

_MADE: list[tuple[type[nn.Module], Mapping[int, Should], str]] = []
_X, _Y = "x float32 batch,8", "y float32 batch,3"
_IMAGE = "image float32 batch,3,8,8 0..1"
_SERIES = "series float32 batch,time,4"


def _kind(
    should: Should | Mapping[int, Should],
    takes: str = _X,
    gives: str = _Y,
    *opsets: int,
    says: str = "",
    **lengths: tuple[int, ...],
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Declares a model's signature, and what should happen to it at which opset."""

    def declare(model: type[nn.Module]) -> type[nn.Module]:
        model.signature = declared(takes, gives, **lengths)  # type: ignore[assignment]
        expected = dict.fromkeys(opsets or (20,), should) if isinstance(should, str) else should
        _MADE.append((model, expected, says))
        return model

    return declare


def all_cases() -> Iterator[Case]:
    for model, expected, says in _MADE:
        state = functools.cache(functools.partial(state_of, model))
        words = re.sub(
            r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", model.__name__
        ).lower()
        for opset, should in expected.items():
            yield Case(
                f"{words}, opset {opset}",
                should,
                saved(state),
                f"{__name__}:{model.__name__}",
                lambda state=state: [state()],
                opset=opset,
                says=says,
                probes=getattr(model, "probes", None),
                shown=getattr(model, "shown", None),
            )


class _Bare(nn.Module):
    """Computes with what it is given only; a checkpoint holds something, though."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("version", torch.tensor([2]))


def _head(inputs: int = 8, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))


# Inputs changed in place.


@_kind("release", _IMAGE, _Y, 20, 17)
class InPlaceScaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("middle", torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1))
        self.head = _head(192)

    def forward(self, image: Tensor) -> Tensor:
        image.sub_(self.middle).mul_(4)
        return self.head(image.flatten(1))


@_kind("release", _X, _Y, 20, 17)
class InPlaceOnASlice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        x[:, 2:5] *= 0.1
        x[:, 0] = 1.0
        return self.head(x)


@_kind("release", _X, _Y, 20, 17)
class PlusEquals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        x /= 2
        return self.head(x)


@_kind({20: "release", 14: "refuse"})
class MaskOnAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("broken", torch.tensor([True, False, False, True]))
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        x.view(-1, 2, 4).masked_fill_(self.broken, 0.0)
        return self.head(x)


@_kind({20: "release", 17: "refuse"})
class ViewAddedTo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        x.reshape(-1, 4, 2)[..., 1].add_(2.0)
        return self.head(x)


@_kind({20: "release", 17: "refuse"})
class ChunksClamped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        low, _ = x.chunk(2, 1)
        low.clamp_(min=0)
        return self.head(x)


@_kind("release", _X, "y float32 batch,3; given float32 batch,8", 20, 17)
class InputGivenBack(nn.Module):
    """Returns what it has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.head(x)
        return y, x.relu_()


# Integers of any size and sign.

_INTS = "minutes int64 batch,4"


@_kind({20: "release", 17: "refuse", 14: "refuse"}, _INTS)
class FlooredHours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, minutes: Tensor) -> Tensor:
        return self.head(torch.cat([minutes // 60, minutes % 60], 1) / 30)


@_kind("release", _INTS, "rest int64 batch,4; sign int64 batch,4", 20, 17, 14)
class RemainderOfNegatives(_Bare):
    def forward(self, minutes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.remainder(minutes, 7), torch.fmod(minutes, -7)


@_kind({20: "release", 17: "refuse"}, _INTS, "half int64 batch,4; low int64 batch,4")
class ShiftedNegatives(_Bare):
    def forward(self, minutes: Tensor) -> tuple[Tensor, Tensor]:
        return minutes >> 2, minutes & 15


@_kind("release", f"{_INTS} -500..500", "a int64 batch,4; b float32 batch,4", 20, 14)
class TruncatedOrFloored(_Bare):
    def forward(self, minutes: Tensor) -> tuple[Tensor, Tensor]:
        return torch.div(minutes, 24, rounding_mode="trunc"), torch.round(minutes / 2)


@_kind("release", "ms int64 batch,2 0..4000000000000", "day int64 batch,2", 20, 14)
class LargeTimes(_Bare):
    def forward(self, ms: Tensor) -> Tensor:
        return ms // 1000 % 86400


@_kind("release", "ids int64 batch,5", _Y, 20, 17)
class IdsWithoutRange(nn.Module):
    """A table of two rows only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(2, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).sum(1))

    @staticmethod
    def probes(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
        yield {"ids": rng.integers(0, 2, (4, 5))}


# Ways that depend on the data.


def _shifted(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    for shift in (0, -3, 3, 30):
        yield {"x": (rng.normal(size=(4, 8)) + shift).astype(np.float32)}


class _Branching(nn.Module):
    probes = staticmethod(_shifted)

    def __init__(self) -> None:
        super().__init__()
        self.head = _head()


@_kind("refuse", _X, _Y, 20, 17, says="branch|data-dependent")
class BranchNeverTaken(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() < -2:
            x = x - x.mean(1, keepdim=True)
        return self.head(x)


@_kind("refuse", _X, _Y, 20, 17, says="branch|data-dependent")
class BranchByItem(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        if x.max().item() > 2:
            x = x / 10
        return self.head(x)


@_kind("refuse", _X, _Y, 20, 17)
class BranchByPythonFloat(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        level = float(x.abs().mean())
        return self.head(x if level < 2 else x / level)


@_kind("refuse", _X, _Y, 20, 17)
class LoopOnData(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        while x.abs().max() > 6:
            x = x / 2
        return self.head(x)


@_kind("refuse", _X, _Y, 20, 17)
class BranchInAnd(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        loud = bool((x > 2).any()) and x.shape[1] == 8
        return self.head(x * (0.1 if loud else 1.0))


@_kind("refuse", _X, _Y, 20, 17)
class ListOfData(_Branching):
    """Goes through numbers as Python has them."""

    def forward(self, x: Tensor) -> Tensor:
        scale = max(x[0].tolist())
        return self.head(x / (1 + abs(scale)))


@_kind("refuse", _X, _Y, 20, 17)
class ScaledByPythonNumber(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x / (1 + float(x.abs().amax())))


@_kind("release", _X, _Y, 20, 17)
class AssertsOnly(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all(), "no numbers"
        if x.ndim != 2:
            raise ValueError("two axes are expected")
        return self.head(x)


@_kind("release", _X, _Y, 20, 17)
class ChosenByWhere(_Branching):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.where(x.mean(1, keepdim=True) < -2, x + 3, x))


# Small outputs, and axes of which nothing is said.


@_kind({20: "release", 17: "refuse"}, _SERIES, "delay float32 batch,2", time=(8, 16, 32))
class MicrosecondDelays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, series: Tensor) -> Tensor:
        return self.out(torch.tanh(self.body(series)).sum(1) / int(series.shape[1])) * 1e-6


@_kind({20: "release", 17: "refuse"}, _SERIES, "strain float32 batch,2", time=(8, 16, 32))
class NanoStrains(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 2)

    def forward(self, series: Tensor) -> Tensor:
        return 1e-9 * self.out(series.square().sum(1) / len(series[0]))


@_kind("release", _X, "strain float32 batch,2", 20, 17)
class TinyButRight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 1e-9 * self.out(x)


@_kind({20: "release", 17: "refuse"}, _SERIES, "probabilities float32 batch,1000 0..1")
class ThousandClasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Linear(4, 16), nn.Linear(16, 1000)

    def forward(self, series: Tensor) -> Tensor:
        pooled = torch.relu(self.body(series)).sum(1) / int(series.shape[1])
        return self.out(4 * pooled).softmax(-1)


@_kind("release", _SERIES, _Y, 20, 17)
class AxisNotDeclared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv1d(4, 6, 3, padding=1), _head(6)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(self.body(series.transpose(1, 2)).mean(2))


@_kind("refuse", _SERIES, _Y, 20, 17)
class AxisFrozen(nn.Module):
    """Built for sixteen steps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _head(64)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(series.reshape(-1, 64))


@_kind("refuse", _SERIES, _Y, 20, 17, time=(4, 10, 20))
class BranchOnLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head(4)

    def forward(self, series: Tensor) -> Tensor:
        if series.shape[1] > 8:
            series = series[:, ::2] * 2
        return self.head(series.mean(1))


@_kind(
    "refuse", "image float32 batch,3,height,width", _Y, 20, 17, height=(9, 12, 20), width=(10, 16)
)
class PooledToThree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 4, 3, padding=1), _head(36)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.body(image), 3).flatten(1))


# State that a call changes.


@_kind("refuse", _X, _Y, 20, 17, says="level|changes")
class RunningLevel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.zeros(8))
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        self.level.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return self.head(x - self.level)


@_kind("refuse", _X, _Y, 20, 17, says="scale|changes|ready|branch")
class InitializedByData(nn.Module):
    """As ActNorm of flows: the first batch decides."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ready", torch.tensor(False))
        self.scale = nn.Parameter(torch.ones(8))
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.scale.data.copy_(1 / x.std(0, correction=0).add(0.1))
            self.ready.fill_(True)
        return self.head(x * self.scale)


@_kind("refuse", _X, _Y, 20, 17, says="last|changes")
class RememberedState(nn.Module):
    """Takes the last batch's answer along, in a buffer that is no part of the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(8), persistent=False)
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        self.last = 0.5 * self.last + x.mean(0)
        return self.head(x + self.last)


@_kind("either", _X, _Y, 20, 17)
class CountsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x)


@_kind("release", _X, _Y, 20, 17)
class CountsCallsInTraining(CountsCalls):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.head(x)


@_kind("release", _SERIES, "y float32 batch,time,4", 20, 17, time=(3, 5, 9))
class CachedPositions(nn.Module):
    """Keeps the encoding of the longest series so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(0, 4), persistent=False)
        self.head = nn.Linear(4, 4)

    def forward(self, series: Tensor) -> Tensor:
        length = series.shape[1]
        if len(self.table) < length:
            self.table = torch.arange(length)[:, None] / torch.tensor([1.0, 2.0, 4.0, 8.0])
        return self.head(series + self.table[:length].sin())


# Chance, and statistics of the batch.


@_kind("refuse", _X, _Y, 20, 17, says="random|each time|otherwise")
class ActiveDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(x, 0.3))


@_kind("refuse", _X, _Y, 20, 17, says="random|each time|otherwise")
class AddedNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + 0.2 * torch.randn_like(x))


@_kind("refuse", _X, _Y, 20, 17, says="random|each time|otherwise")
class SampledLatent(nn.Module):
    """As a variational autoencoder that samples in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), _head(4)

    def forward(self, x: Tensor) -> Tensor:
        mean, log = self.body(x).chunk(2, 1)
        return self.head(torch.normal(mean, (0.5 * log).exp()))


@_kind("refuse", _IMAGE, _Y, 20, 17, says="batch|rows")
class BatchStatistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)
        self.head = _head(192)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(image).flatten(1))


@_kind("refuse", _X, _Y, 20, 17, says="batch|rows")
class CentredOverBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x - x.mean(0))


# Masks and infinities.

_FRAMES = f"{_SERIES}; padding bool batch,time hides series"


class _Encoder(nn.Module):
    def __init__(self, nested: bool = True) -> None:
        super().__init__()
        self.widen = nn.Linear(4, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.head = nn.Linear(8, 3)

    def encoded(self, series: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(self.widen(series), src_key_padding_mask=padding)

    def forward(self, series: Tensor, padding: Tensor) -> Tensor:
        keep = (~padding).unsqueeze(-1).float()
        return self.head((self.encoded(series, padding) * keep).sum(1) / keep.sum(1))


@_kind({20: "release", 14: "refuse"}, _FRAMES, _Y, time=(2, 5, 9))
class EncoderPooled(_Encoder):
    pass


@_kind("release", _FRAMES, _Y, time=(2, 5, 9))
class EncoderPooledFlat(_Encoder):
    def __init__(self) -> None:
        super().__init__(nested=False)


@_kind({20: "release", 14: "refuse"}, _FRAMES, "y float32 batch,time,3", time=(2, 5, 9))
class EncoderOfAllFrames(_Encoder):
    """What stands at hidden places is nobody's promise."""

    def forward(self, series: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoded(series, padding))

    @staticmethod
    def shown(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return ~inputs["padding"]


@_kind({20: "release", 17: "refuse"}, _FRAMES, _Y, time=(2, 5, 9))
class AttentionWithPadding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.widen, self.norm = nn.Linear(4, 8), nn.LayerNorm(8)
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, series: Tensor, padding: Tensor) -> Tensor:
        x = self.norm(self.widen(series))
        found, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        return self.head(found.masked_fill(padding[..., None], 0).sum(1))


@_kind("release", _FRAMES, _Y, 20, 17, time=(2, 5, 9))
class LargestOfShown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, series: Tensor, padding: Tensor) -> Tensor:
        hidden = self.body(series).masked_fill(padding[..., None], -torch.inf)
        return self.head(hidden.amax(1))


@_kind("release", _SERIES, "y float32 batch,time,4", 20, 17, time=(2, 5, 9))
class LinearBiases(nn.Module):
    """As ALiBi: distances are subtracted, and -inf for what is to come."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, series: Tensor) -> Tensor:
        q, k, v = self.qkv(series).chunk(3, -1)
        place = torch.arange(series.shape[1])
        away = (place[:, None] - place[None]).float()
        bias = torch.where(away < 0, -torch.inf, -0.5 * away)
        return (q @ k.transpose(1, 2) / 2 + bias).softmax(-1) @ v


_WORDS = "ids int64 batch,length 0..39; mask int64 batch,length 0..1"


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(40, 8), nn.Linear(8, 6)


@_kind("release", _WORDS, "embedding float32 batch,6", 20, 17, length=(2, 4, 10))
class MeanOfKeptWords(_Words):
    """1 keeps a word; a row may keep none, which PyTorch answers with NaN."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        keep = mask.unsqueeze(-1).float()
        pooled = (self.out(self.embed(ids)) * keep).sum(1) / keep.sum(1)
        return F.normalize(pooled, dim=-1)


@_kind("release", _WORDS, "embedding float32 batch,6", length=(2, 4, 10))
class MeanOfExamples(MeanOfKeptWords):
    """Says itself which masks there are."""

    @staticmethod
    def example_inputs(count: int, rng: np.random.Generator, lengths: Mapping[str, int]) -> dict:
        length = lengths["length"]
        kept = rng.integers(1, length + 1, (count, 1)) > np.arange(length)
        return {"ids": rng.integers(0, 40, (count, length)), "mask": kept.astype(np.int64)}


@_kind("release", _WORDS, "embedding float32 batch,6", 20, 17, length=(2, 4, 10))
class AttentionToKept(_Words):
    """As Transformers: the smallest number is added where the mask is 0."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        bias = (1 - mask[:, None].float()) * torch.finfo(torch.float32).min
        return self.out(((x @ x.transpose(1, 2)) / 3 + bias).softmax(-1) @ x)[:, 0]


# Lengths that belong to an axis.

_WITH_LENGTHS = "series float32 batch,time,4; lengths int64 batch 1..9"


def _with_lengths(rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    for time in (4, 6, 9):
        series = rng.normal(size=(5, time, 4)).astype(np.float32)
        yield {"series": series, "lengths": rng.integers(1, time + 1, 5)}


@_kind("release", _WITH_LENGTHS, _Y, 20, 17, time=(4, 6, 9))
class LastValidStep(nn.Module):
    probes = staticmethod(_with_lengths)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        last = (lengths - 1).view(-1, 1, 1).expand(-1, 1, 6)
        return self.head(self.body(series).cumsum(1).gather(1, last).squeeze(1))


@_kind("release", _WITH_LENGTHS, _Y, 20, 17, time=(4, 6, 9))
class MaskOfLengths(LastValidStep):
    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        keep = torch.arange(series.shape[1])[None] < lengths[:, None]
        return self.head((self.body(series) * keep[..., None]).sum(1) / lengths[:, None])


@_kind("refuse", _WITH_LENGTHS, _Y, 20, 17, time=(4, 6, 9))
class PackedSequence(nn.Module):
    probes = staticmethod(_with_lengths)

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            series, lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.rnn(packed)[1][0])


# What has no reference in float64, and recurrences.


@_kind("release", _SERIES, _Y, 20, 17, time=(2, 4, 12))
class ZeroStates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 3)

    def forward(self, series: Tensor) -> Tensor:
        state = [torch.zeros(4, series.size(0), 6).to(series.device) for _ in range(2)]
        return self.head(self.rnn(series, tuple(state))[0][:, -1])


@_kind(
    {20: "refuse", 17: "release"},
    _SERIES,
    "y float32 batch,3; state float32 batch,6",
    says="[Oo]pset 17",
    time=(2, 4, 12),
)
class PlainRecurrences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.gru = nn.LSTM(4, 6, batch_first=True), nn.GRU(6, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        found, (hidden, _) = self.rnn(series)
        return self.head(self.gru(found)[0][:, -1]), hidden[-1]


@_kind("release", _X, "tokens int64 batch,5; logits float32 batch,5,7", 20, 17)
class GreedyDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(7, 4), nn.GRUCell(4, 8), nn.Linear(8, 7)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        token = torch.zeros(x.shape[0], dtype=torch.int64)
        steps = []
        for _ in range(5):
            x = self.cell(self.embed(token), x)
            steps.append(self.out(x))
            token = steps[-1].argmax(-1)
        logits = torch.stack(steps, 1)
        return logits.argmax(-1), logits


@_kind("release", _X, _Y, 20, 17)
class Float32Inside(nn.Module):
    """As Llama's norm: in float32 whatever comes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.ones(8)), _head()

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        return self.head(self.weight * wide.type_as(x))


@_kind("release", _X, _Y, 20, 17)
class Float32Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.linspace(0, 1, 8, dtype=torch.float32)
        return self.head(torch.addmm(steps, x, torch.eye(8)) + torch.tensor([0.5]))


@_kind(
    {20: "release", 17: "refuse"},
    "image uint8 batch,8,8,3 0..255; number int64 batch 0..9",
    "boxes float32 batch,4,2; anchors float32 batch,4,2",
)
class BytesAndUnusedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 2, 4, 4)
        self.register_buffer("anchors", torch.arange(8.0).view(4, 2))

    def forward(self, image: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(image.permute(0, 3, 1, 2).float() / 255).flatten(2).transpose(1, 2)
        return found + self.anchors, self.anchors.expand(len(image), -1, -1)


@_kind("release", "x float16 batch,8", "y float16 batch,3", 20, 17)
class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head().half()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@_kind("release", "image float16 batch,3,8,8 0..1", "y float16 batch,3", 20, 17)
class HalfConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU())
        self.body = nn.Sequential(body, nn.Flatten(), nn.Linear(216, 3)).half()

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image).softmax(-1)


@_kind("either", _X, _Y, 20, 17)
class BrainFloatInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.bfloat16()).float()


@_kind("release", "x float64 batch,8", "y float64 batch,3", 20, 17)
class DoublePrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


# What can't be pickled, and names of old.


@_kind("release", _X, _Y, 20, 17)
class ParametrizedWeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x))


@_kind({20: "release", 17: "refuse"})
class ParametrizedSpectralNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = parametrizations.spectral_norm(nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x))


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


@_kind("release", _X, _Y, 20, 17)
class OwnParametrization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)
        parametrize.register_parametrization(self.head, "weight", Positive())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@_kind("refuse", _X, _Y, 20, 17)
class OrthogonalWeights(nn.Module):
    """Made by an exponential of a matrix, which ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.head = parametrizations.orthogonal(nn.Linear(8, 8)), _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.turn(x))


@_kind("release")
class HoldsALock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock, self.head = threading.Lock(), _head()
        self.steps = (n for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@_kind(
    "release",
    "mel float32 batch,4,frames",
    "wave float32 batch,1,samples -1..1",
    20,
    17,
    frames=(4, 7, 12),
)
class OldVocoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            norm = nn.utils.weight_norm
            self.first = norm(nn.Conv1d(4, 8, 3, padding=1))
            self.up = norm(nn.ConvTranspose1d(8, 4, 4, 2, padding=1))
            self.last = norm(nn.Conv1d(4, 1, 3, padding=1))

    def forward(self, mel: Tensor) -> Tensor:
        found = F.leaky_relu(self.up(F.leaky_relu(self.first(mel), 0.1)), 0.1)
        return torch.tanh(4 * self.last(found))


# Ranges that rounding touches.


@_kind("release", _X, "y float32 batch,40 -1..1", 20, 17)
class TanhInRange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 40)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(3 * self.out(x))


@_kind("release", _X, "y float32 batch,40 0..1; sum float32 batch 0..1", 20, 17)
class SoftmaxInRange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 40)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.out(5 * x).softmax(-1)
        return found, found.sum(-1).clamp(max=1)


@_kind(
    "release",
    _X,
    "unit float32 batch,3 -1..1; angle float32 batch -3.141592653589793..3.141592653589793",
    20,
    17,
)
class UnitVectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = F.normalize(self.out(x), dim=-1)
        return found, torch.atan2(found[:, 0], found[:, 1])


# Ties, and as many rows as there are.


@_kind(
    "release",
    "points float32 batch,count,2",
    "features float32 batch,count,6; edges int64 batch,count,3",
    20,
    17,
    count=(4, 7, 16),
)
class NearestNeighbours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = _head(4, 6)

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        away = (points[:, :, None] - points[:, None]).square().sum(-1)
        edges = away.topk(3, largest=False).indices
        flat = edges.flatten(1)[..., None].expand(-1, -1, 2)
        near = points.gather(1, flat).unflatten(1, edges.shape[1:])
        own = points[:, :, None].expand_as(near)
        return self.mlp(torch.cat([own, near - own], -1)).amax(2), edges


@_kind(
    "release",
    "image float32 batch,3,16,16 0..1",
    "boxes float32 batch,5,4; scores float32 batch,5 0..1",
    20,
    17,
)
class BestCells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU())
        self.heat, self.box = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.body(image)
        best = self.heat(found).sigmoid().flatten(1).topk(5)
        boxes = self.box(found).flatten(2).transpose(1, 2)
        return boxes.gather(1, best.indices[..., None].expand(-1, -1, 4)), best.values


@_kind("release", _X, "order int64 batch,8; sorted float32 batch,8", 20, 17)
class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.mix(x).sort(dim=1, descending=True)
        return found.indices, found.values


@_kind(
    "release",
    "image float32 batch,3,height,width 0..1",
    "classes int64 batch,height,width",
    20,
    17,
    height=(16, 24, 32),
    width=(16, 40),
)
class ClassMap(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        found = self.head(self.down(image))
        return F.interpolate(
            found, size=image.shape[-2:], mode="bilinear", align_corners=True
        ).argmax(1)


@_kind("either", "image float32 batch,3,16,16", "boxes float32 found,5", 20, 17)
class RowsAboveThreshold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 5, 4, 4)

    def forward(self, image: Tensor) -> Tensor:
        found = self.body(image).flatten(2).transpose(1, 2).reshape(-1, 5)
        return found[found[:, 4] > 0]


@_kind("either", _X, "places int64 found,2", 20, 17)
class PlacesOfPeaks(_Bare):
    def forward(self, x: Tensor) -> Tensor:
        return (x > 0.5).nonzero()


# Batches, outputs and arguments of other forms.


@_kind("release", "image float32 1,3,8,8", "y float32 1,3", 20, 17)
class OneAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head(192)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.view(1, -1))


@_kind("release", "x float32 4,8", "y float32 4,3", 20, 17)
class FourAtATime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.view(4, 8))


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


@_kind(
    "release", "ids int64 batch,length 0..19", "logits float32 batch,3", 20, 17, length=(2, 5, 9)
)
class DataclassAnswer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None, hidden: bool = False) -> Answer:
        found = self.embed(ids)
        return Answer(self.out(found.mean(1)), found if hidden else None)


Pair = namedtuple("Pair", ["mean", "scale"])


@_kind("release", _X, "mean float32 batch,2; scale float32 batch,2", 20, 17)
class NamedPair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head(8, 4)

    def forward(self, x: Tensor) -> Pair:
        mean, scale = self.head(x).chunk(2, 1)
        return Pair(mean, F.softplus(scale))


@_kind(
    "release",
    "a float32 batch,4; b float32 batch,4",
    "first float32 batch,4; all float32 batch,4",
    20,
    17,
)
class ByKeyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, *, a: Tensor, b: Tensor) -> dict[str, Any]:
        return {"all": self.mix(a) - b, "first": self.mix(a)}


@_kind(
    "release",
    "x float32 batch,8",
    "answer.y float32 batch,3; answer.parts.low float32 batch,3",
    20,
    17,
)
class NestedAnswer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = _head()

    def forward(self, x: Tensor) -> dict[str, Any]:
        found = self.head(x)
        return {"answer": {"y": found, "parts": {"low": found - 1}}}


# Operators.


@_kind(
    {20: "release", 17: "refuse"},
    "image float32 batch,1,10,12",
    "warped float32 batch,1,10,12",
    says="20",
)
class Warped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Sequential(nn.Flatten(), nn.Linear(120, 6), nn.Tanh())
        self.register_buffer("same", torch.eye(2, 3))

    def forward(self, image: Tensor) -> Tensor:
        theta = self.same + 0.2 * self.loc(image).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)
        return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


@_kind(
    {20: "release", 17: "refuse"},
    "words int64 batch,length 0..49",
    _Y,
    says="[Oo]pset 20",
    length=(1, 4, 9),
)
class PaddedBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(50, 6, mode="mean", padding_idx=0), nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.bag(words))


_GROUPED = "x float32 batch,6,4; who int64 batch,6 0..2"


@_kind({20: "release", 17: "refuse"}, _GROUPED, "counts float32 batch,3")
class Accumulated(_Bare):
    def forward(self, x: Tensor, who: Tensor) -> Tensor:
        rows = torch.arange(len(x))[:, None].expand_as(who)
        zeros = torch.zeros(len(x), 3)
        return zeros.index_put((rows, who), x.sum(-1), accumulate=True)


@_kind({20: "release", 17: "refuse"}, _GROUPED, "sums float32 batch,3,4; peaks float32 batch,3,4")
class Scattered(_Bare):
    def forward(self, x: Tensor, who: Tensor) -> tuple[Tensor, Tensor]:
        index = who[..., None].expand(-1, -1, 4)
        zeros = torch.zeros(len(x), 3, 4)
        return (
            zeros.scatter_add(1, index, x),
            zeros.scatter_reduce(1, index, x, "amax", include_self=True),
        )


@_kind(
    {20: "refuse", 17: "either"},
    "x float32 batch,6,4",
    "mixed float32 batch,6,4; spread float32 batch,4; bins int64 batch,6,4; away float32 batch,6,6",
)
class ManyOperators(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("edges", torch.tensor([-1.0, 0.0, 1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mixed = torch.einsum("...i,ij->...j", x.roll(1, 1).flip(2), self.weight).cumsum(1)
        return mixed, x.std(1), torch.bucketize(x, self.edges), torch.cdist(x, x)


@_kind("refuse", "x float32 batch,12,8", "y float32 batch,12,8", 20, 17)
class FourierMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(x + torch.fft.fft2(x).real))


@_kind({20: "release", 17: "refuse"}, "wave float32 batch,64", "power float32 batch,9,9")
class Spectrogram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(16))

    def forward(self, wave: Tensor) -> Tensor:
        found = torch.stft(wave, 16, 8, window=self.window, return_complex=True)
        return found.abs().square()


@_kind(
    {20: "release", 17: "refuse"},
    "x float32 batch,3,height,width",
    "y float32 batch,3,height,width",
    height=(8, 12),
    width=(8, 10, 16),
)
class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(3, 4, 3),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
            nn.GroupNorm(2, 4),
            nn.GELU(),
            nn.Conv2d(4, 12, 1),
            nn.PixelShuffle(2),
            nn.PixelUnshuffle(2),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, :3] + x


@_kind(
    "release",
    "image float32 batch,1,height,width",
    "mask float32 batch,1,height,width 0..1",
    20,
    17,
)
class SmallUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU())
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        high = self.first(image)
        low = self.up(self.second(F.max_pool2d(high, 2)))
        low = F.pad(low, (0, high.shape[3] - low.shape[3], 0, high.shape[2] - low.shape[2]))
        return torch.sigmoid(self.out(torch.cat([high, low], 1)))


@_kind("release", _IMAGE, "y float32 batch,5", 20, 17)
class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.Hardswish(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image)


@_kind(
    "release",
    "ids int64 batch,length 0..30",
    "logits float32 batch,length,31",
    20,
    17,
    length=(1, 4, 9),
)
class TiedLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, 8, padding_idx=0)
        self.mix, self.out = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Linear(8, 31)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        found = self.embed(ids)
        return self.out(found + self.mix(found))


@_kind("release", "x float32 batch,2,12", _Y, 20, 17)
class LazyModules(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyConv1d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@_kind("release", _X, "log float32 batch; powers float32 batch,8", 20, 17)
class IllConditioned(nn.Module):
    """Loses digits on large inputs, in PyTorch as much as elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.mix(x)
        return found.logsumexp(1), found.pow(3) - found.pow(3).mean(1, keepdim=True)
