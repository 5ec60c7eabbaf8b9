"""Fitting the reference model to labelled captures within a budget of wall-clock time.

The budget allows a few hundred steps on two cores, too few for the whole network. ConvNeXt's
residual blocks start scaled by 1e-6, so the network without them is the same function at a
twentieth of the cost. It is trained that way first, which is stochastic depth (Huang et al., ECCV
2016) taken to its end, and then with all blocks, whose scales grow until they take part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from heimdall_onnx.localization_net import LocalizationNet

Progress = Callable[[float, str], None]

BATCH = 32
_BN_BATCHES = 4
_WITH_SPREAD, _WITHOUT_BLOCKS = 0.3, 0.45  # shares of the time gone when these begin and end


@dataclass(frozen=True)
class Captures:
    """Labelled inputs of the model.

    Attributes:
        features: (N, 3, 128, 32) float32.
        positions: (N, 2) float64, degrees latitude and longitude.
    """

    features: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Fitted:
    """A trained model.

    Attributes:
        model: In eval mode.
        steps: Optimizer steps without and with the residual blocks.
        positions: Its answers (M, 2) to the unseen features, degrees latitude and longitude.
    """

    model: LocalizationNet
    steps: tuple[int, int]
    positions: Tensor


def fit(
    captures: Captures, unseen: Tensor, *, seconds: float, seed: int, progress: Progress
) -> Fitted:
    """Train ``LocalizationNet("tiny")`` on the CPU.

    PyTorch's global generator and thread count are afterwards as they were.

    Args:
        captures: What to train on.
        unseen: Features (M, 3, 128, 32) to answer in the end.
        seconds: Wall-clock time to be ready in, answers included. At least two steps of each
            stage are made, however little it is.
        seed: Seed of initialization and training.
        progress: Called after each step with the share of the time gone, and what is being done.
    """
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return _fit(captures, unseen, seconds, progress)
        finally:
            torch.set_num_threads(threads)


def _fit(captures: Captures, unseen: Tensor, seconds: float, progress: Progress) -> Fitted:
    model = LocalizationNet(backbone_size="tiny")
    answer = model.position_head[-1]
    assert isinstance(answer, nn.Linear)
    with torch.no_grad():
        answer.bias.copy_(captures.positions.mean(0))  # start from the best constant answer
    loop = _Loop(model, captures, seconds, progress)
    with _without_blocks(model):
        loop.choose_threads()
        first = loop.run(_groups(model, 2e-3, 2e-3), until=_WITHOUT_BLOCKS)
    batches = torch.split(unseen, BATCH)
    reserve = _BN_BATCHES + len(batches)
    second = loop.run(_groups(model, 2e-4, 1e-3), until=1.0, reserve=reserve)
    # With few steps the running averages lag behind the weights.
    update_bn(torch.split(captures.features[: _BN_BATCHES * BATCH], BATCH), model)
    progress(1.0, "evaluating")
    model.eval()
    # With the same number of threads, since the time kept free was measured with it.
    with torch.inference_mode():
        positions = torch.cat([model(batch)[0] for batch in batches])
    return Fitted(model, (first, second), positions)


def _groups(model: nn.Module, rate: float, scale_rate: float) -> list[dict[str, Any]]:
    """Parameters for the optimizer, the residual blocks' scales at a rate of their own."""
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not n.endswith("layer_scale")], "lr": rate},
        {"params": [p for n, p in named if n.endswith("layer_scale")], "lr": scale_rate},
    ]


@contextmanager
def _without_blocks(model: nn.Module) -> Iterator[None]:
    """Take the residual blocks out of the network, and put them back in the end."""
    blocks = {n: m for n, m in model.named_modules() if hasattr(m, "layer_scale")}
    for name in blocks:
        model.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        for name, block in blocks.items():
            model.set_submodule(name, block)


class _Loop:
    """Optimizer steps against the clock."""

    def __init__(
        self, model: nn.Module, captures: Captures, seconds: float, progress: Progress
    ) -> None:
        self._model = model
        self._features = captures.features
        self._positions = captures.positions.float()
        self._spread = self._positions.std(0)
        self._began, self._seconds, self._progress = time.monotonic(), seconds, progress

    def choose_threads(self) -> None:
        """Take one thread where more only wait for each other, as they do on a loaded machine."""
        fastest: dict[int, float] = {}
        for threads in (torch.get_num_threads(), 1) * 3:
            torch.set_num_threads(threads)
            start = time.monotonic()
            torch.autograd.backward(self._loss(with_spread=False))
            fastest[threads] = min(time.monotonic() - start, fastest.get(threads, math.inf))
        torch.set_num_threads(min(fastest, key=lambda threads: fastest[threads]))

    def run(self, groups: list[dict[str, Any]], *, until: float, reserve: int = 0) -> int:
        """Steps of AdamW until a share of the time is gone, at least two; returns their number.

        The learning rate rises and falls with the clock, not with the steps, so that a slower
        machine goes through the same cycle. The time of ``reserve`` batches of inference is kept
        free, each taken as a third of the average step, less the first, which allocates memory.
        """
        peaks = [group["lr"] for group in groups]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.05, fused=True)
        start, end = time.monotonic(), self._began + until * self._seconds
        steps, share, first = 0, 0.0, start
        while share < 1 or steps < 2:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * _cycle(share)
            optimizer.zero_grad()
            loss = self._loss(with_spread=self._gone() > _WITH_SPREAD)
            torch.autograd.backward(loss)
            optimizer.step()
            steps += 1
            now = time.monotonic()
            first = now if steps == 1 else first
            left = reserve / 3 * (now - first) / max(1, steps - 1)
            share = min(1.0, (now - start) / max(end - left - start, 1e-9))
            self._progress(min(1.0, self._gone()), f"training, loss {loss.item():.2f}")
        return steps

    def _gone(self) -> float:
        return (time.monotonic() - self._began) / self._seconds

    def _loss(self, *, with_spread: bool) -> Tensor:
        """Squared error in units of the labels' spread, plus the uncertainties' likelihood.

        The Gaussian likelihood trains the uncertainties only: it would slow the positions down
        where they are still far off. Mirroring time or frequency leaves the position as it is.
        """
        rows = torch.randint(len(self._positions), (BATCH,))
        mirrored = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
        answers, sigma = self._model(self._features[rows].flip(mirrored))
        error = answers - self._positions[rows]
        loss: Tensor = (error / self._spread).pow(2).mean()
        if with_spread:
            loss = loss + 0.1 * (0.5 * (error.detach() / sigma).pow(2) + sigma.log()).mean()
        return loss


def _cycle(share: float) -> float:
    """One cycle of the learning rate: up over the first tenth, then down a cosine."""
    return min(1.0, 0.05 + share / 0.1) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
