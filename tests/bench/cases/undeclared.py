"""Models that declare no signature, as most people's: it is found by running them.

Each has evaluation data, whose arrays are called as the parameters of ``forward``.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .case import Case, Should, saved
from .nets import state_of

_MADE: list[tuple[type[nn.Module], Should, dict[str, np.ndarray], str]] = []
_RNG = np.random.default_rng(5)


def _float(*shape: int) -> np.ndarray:
    return _RNG.normal(size=shape).astype(np.float32)


X = {"x": _float(10, 8)}
SERIES = {"series": _float(10, 24, 4)}
IDS = {"ids": _RNG.integers(0, 30, (10, 6))}


def _kind(
    data: dict[str, np.ndarray], should: Should = "release", says: str = ""
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def note(model: type[nn.Module]) -> type[nn.Module]:
        _MADE.append((model, should, data, says))
        return model

    return note


def all_cases() -> Iterator[Case]:
    for model, should, data, says in _MADE:
        state = functools.cache(functools.partial(state_of, model))
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", model.__name__).lower()

        def write(folder: Path, data: dict[str, np.ndarray] = data) -> Path:
            np.savez(folder / "data.npz", **data)
            return folder / "data.npz"

        yield Case(
            f"found: {words}",
            should,
            saved(state),
            f"{__name__}:{model.__name__}",
            lambda state=state: [state()],
            data=write if data else None,
            says=says,
        )
    for name in ("net", "signal"):
        yield _in_a_file(name)


def _in_a_file(name: str) -> Case:
    """A model in a file beside its checkpoint, with a part of it in another."""
    part = """
        from torch import nn

        def head():
            return nn.Linear(8, 3)
        """
    whole = """
        from torch import nn
        from its_parts import head

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = head()

            def forward(self, x):
                return self.head(x)

        if __name__ == "__main__":
            raise SystemExit("trains")
        """

    def write(folder: Path) -> Path:
        (folder / "its_parts.py").write_text(textwrap.dedent(part))
        (folder / f"{name}.py").write_text(textwrap.dedent(whole))
        torch.save({f"head.{n}": v for n, v in _linear().items()}, folder / "net.pt")
        return folder / "net.pt"

    def data(folder: Path) -> Path:
        np.savez(folder / "data.npz", **X)
        return folder / "data.npz"

    def reference() -> nn.Module:
        network = nn.Module()
        network.head = nn.Linear(8, 3)
        return network

    return Case(
        f"found: in a file {name}.py",
        "release",
        write,
        f"{{folder}}/{name}.py:Net",
        lambda: [{f"head.{n}": v for n, v in _linear().items()}],
        reference,
        data=data,
    )


def _linear() -> dict[str, Tensor]:
    return state_of(nn.Linear, 8, 3)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)


@_kind(X)
class OneTensor(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@_kind({"features": X["x"]})
class AnotherNameForOneArray(OneTensor):
    pass


@_kind(X)
class Tuple(_Head):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        found = self.head(x)
        return found, found.softmax(-1)


@_kind(X)
class Dictionary(_Head):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = self.head(x)
        return {"logits": found, "best": found.argmax(-1), "sure": found.amax(-1) > 0}


@_kind(X)
class Nested(_Head):
    def forward(self, x: Tensor) -> dict[str, Any]:
        found = self.head(x)
        return {"heads": [{"y": found}, {"y": found + 1}], "raw": {"x": x}}


@dataclass
class Found:
    logits: Tensor
    hidden: Tensor | None = None
    loss: float | None = None


@_kind(X)
class DataclassOfTensors(_Head):
    def forward(self, x: Tensor) -> Found:
        return Found(self.head(x))


Distribution = namedtuple("Distribution", ["mean", "scale"])


@_kind(X)
class NamedTuple(_Head):
    def forward(self, x: Tensor) -> Distribution:
        found = self.head(x)
        return Distribution(found, found.exp())


@_kind(X)
class ConstantOutput(_Head):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.arange(6.0).view(3, 2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.anchors


@_kind(X)
class ScalarOutput(_Head):
    """A temperature comes out beside the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.head(x) / self.temperature, "temperature": self.temperature.exp()}


@_kind({"right": _float(10, 8), "left": _float(10, 8)})
class TwoInputs(_Head):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(left - 2 * right)


@_kind({"a": _float(10, 8), "b": _float(10, 8)})
class KeywordsOnly(_Head):
    def forward(self, *, b: Tensor, a: Tensor) -> Tensor:
        return self.head(a - 2 * b)


@_kind(X)
class OptionalMask(_Head):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        found = self.head(x) * scale
        return found if mask is None else found * mask


@_kind({**X, "mask": np.ones((10, 3), dtype=bool)})
class OptionalMaskGiven(OptionalMask):
    pass


@_kind(SERIES)
class SeriesOfAnyLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(series.transpose(1, 2))).mean(2))


@_kind(SERIES)
class SeriesOfOneLength(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(96, 3)

    def forward(self, series: Tensor) -> Tensor:
        return self.head(series.flatten(1))


@_kind({"image": _float(6, 3, 16, 16)})
class FullyConvolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(image)))


@_kind({"image": _float(4, 3, 8, 8)})
class BatchOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(image.reshape(1, 192))


@_kind(IDS)
class Words(nn.Module):
    """Ids beyond the table's end fail."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).mean(1))


@_kind({**IDS, "attention_mask": np.ones((10, 6), dtype=np.int64)})
class WordsWithMask(Words):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        keep = attention_mask.unsqueeze(-1).float()
        return self.head((self.embed(ids) * keep).sum(1) / keep.sum(1).clamp(min=1))


@_kind({"image": _RNG.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)})
class Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image.permute(0, 3, 1, 2) / 255).mean((2, 3))


@_kind(X)
class ChangesItsInput(_Head):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5).add_(1)
        return self.head(x)


@_kind(X, "refuse", says="otherwise|random|each time|chance")
class Random(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + torch.rand_like(x))


@_kind(X, "refuse")
class NormalizedOverBatch(_Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((x - x.mean(0)) / x.std(0))


@_kind({"y": X["x"], "z": X["x"]}, "refuse", says="y, z|z, y|x")
class NoArrayOfItsNames(OneTensor):
    pass


@_kind({"x": _float(10, 5)}, "refuse", says="8|5")
class ArrayOfAnotherWidth(OneTensor):
    pass


@_kind({}, "either")
class NoData(OneTensor):
    pass


@_kind(X, "refuse", says="str|text|tensor")
class GivesText(_Head):
    def forward(self, x: Tensor) -> str:
        return str(self.head(x).shape)
