"""Training throughput against loops one would write oneself: ``training.py [ROUNDS]``.

The same model (atto), batches, loss and optimizer three ways: a loop in plain PyTorch, a bare
Lightning loop, and the training entry. Data are in memory and nobody uses workers. Both Lightning
loops validate and save a checkpoint after each epoch, the plain one does neither. They take turns,
in an order that changes from round to round. Prints samples per second of each round as JSON, by
the clock and by the processor's time: on a busy machine only the latter says much.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from scipy import stats
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.data.dataset.writer import create_dataset
from heimdall_onnx.localization.frame import placement_of
from heimdall_onnx.localization.network import LocalizationNet
from heimdall_onnx.training.module import Objective, TrainingModule, TrainingProgress, TrainingRows
from heimdall_onnx.training.module import make_loader as our_loader
from heimdall_onnx.training.parameters import TrainingParameters
from heimdall_onnx.training.trainer import fit, quiet

BATCH, TRAIN, VALIDATION, EPOCHS, ROUNDS = 32, 768, 64, 1, 6
RATE, DECAY, CLIP = 1e-3, 0.05, 1.0
ENTRY, LIGHTNING, PLAIN = "training entry", "bare Lightning", "plain PyTorch"
CLOCK, PROCESSOR = "samples/s", "samples/s of processor time"
PAIRS = {
    f"{CLOCK}: {ENTRY} / {LIGHTNING}": (CLOCK, ENTRY, LIGHTNING, 0.95),
    f"{PROCESSOR}: {ENTRY} / {LIGHTNING}": (PROCESSOR, ENTRY, LIGHTNING, 0.95),
    f"{CLOCK}: {ENTRY} / {PLAIN}": (CLOCK, ENTRY, PLAIN, None),
}
Rate = tuple[float, float]


class Bench:
    """One model's data, and the three ways."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        count = TRAIN + VALIDATION
        inputs = rng.standard_normal((count, 3, 128, 32), np.float32)
        positions = np.array([50.0, 9.0]) + rng.normal(0, 1.5, (count, 2))
        with create_dataset(folder / "data", meta={}) as writer:
            events = [str(i) for i in range(count)]
            writer.append({"mel_spectrogram": inputs}, positions, events)
        self.folder, self.positions = folder, positions
        self.dataset = open_dataset(folder / "data")
        self.inputs = torch.from_numpy(inputs)
        self.centroid, self.scale_m = placement_of(positions)
        model = self.model()
        self.targets = torch.from_numpy(Objective(model, model.signature, 0.5).targets(positions))

    def model(self) -> LocalizationNet:
        torch.manual_seed(0)
        place = {"centroid": self.centroid, "scale_m": self.scale_m}
        return LocalizationNet(backbone_size="atto", **place).train()

    def entry(self) -> Rate:
        """Rates of the training entry."""
        module, parts = self.module()
        loaders = [
            our_loader(rows, module, workers=0, shuffled=shuffled)
            for rows, shuffled in zip(parts, (True, False), strict=True)
        ]
        clock = Clock()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            fit(
                module,
                *loaders,
                folder=Path(folder),
                precision="32-true",
                resume=None,
                report=lambda share, what: None,
                sink=lambda history: None,
                callbacks=[clock],
            )
        return clock.rate

    def module(self) -> tuple[TrainingModule, list[TrainingRows]]:
        model = self.model()
        objective = Objective(model, model.signature, 0.5)
        parameters = TrainingParameters(
            learning_rate=RATE,
            weight_decay=DECAY,
            batch_size=BATCH,
            epochs=EPOCHS,
            patience=EPOCHS,
            accelerator="cpu",
        )
        module = TrainingModule(
            model, objective, parameters, {}, TrainingProgress(), self.positions, time.monotonic()
        )
        chosen = np.split(np.arange(TRAIN + VALIDATION), [TRAIN])
        targets = self.targets.numpy()
        names = ["mel_spectrogram"]
        return module, [
            TrainingRows(self.dataset, r, targets[r], names, cache=True) for r in chosen
        ]

    def lightning(self) -> Rate:
        """Rates of a bare Lightning loop."""
        whole = TensorDataset(self.inputs, self.targets)
        train, validation = torch.utils.data.random_split(whole, [TRAIN, VALIDATION])
        clock = Clock()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder, quiet():
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=EPOCHS,
                gradient_clip_val=CLIP,
                callbacks=[clock],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                default_root_dir=folder,
            )
            trainer.fit(
                Bare(self.model()),
                DataLoader(train, BATCH, shuffle=True),
                DataLoader(validation, BATCH),
            )
        return clock.rate

    def plain(self) -> Rate:
        """Rates of a loop in plain PyTorch."""
        model = self.model()
        optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=True)
        began = time.perf_counter(), time.process_time()
        for _ in range(EPOCHS):
            for rows in torch.randperm(TRAIN).split(BATCH):
                optimizer.zero_grad()
                loss = nll(*model.local(self.inputs[rows]), self.targets[rows])
                torch.autograd.backward(loss)
                clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
        return rate_since(began)


class Bare(LightningModule):
    """As little as Lightning takes."""

    def __init__(self, model: LocalizationNet) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nll(*self.model.local(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nll(*self.model.local(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), RATE, weight_decay=DECAY, fused=True)


class Clock(Callback):
    """From the first batch to the end, checkpoints and validation included."""

    rate: Rate = (math.nan, math.nan)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter(), time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rate = rate_since(self._began)


def rate_since(began: Rate) -> Rate:
    """Samples per second of the clock, and of the processor."""
    now = time.perf_counter(), time.process_time()
    return EPOCHS * TRAIN / (now[0] - began[0]), EPOCHS * TRAIN / (now[1] - began[1])


def nll(answers: torch.Tensor, deviations: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (0.5 * ((answers - targets) / deviations) ** 2 + deviations.log()).mean()


def ratios(found: dict[str, list[float]], of: str, to: str) -> tuple[float, ...]:
    """Of each round."""
    return tuple(a / b for a, b in zip(found[of], found[to], strict=True))


def interval(values: tuple[float, ...]) -> tuple[float, float]:
    """Student's 95 % confidence interval of the mean ratio, on its logarithm."""
    logs = np.log(values)
    half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / math.sqrt(len(logs))
    return float(np.exp(logs.mean() - half)), float(np.exp(logs.mean() + half))


def main(rounds: int) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        ways: dict[str, Callable[[], Rate]] = {
            ENTRY: bench.entry,
            LIGHTNING: bench.lightning,
            PLAIN: bench.plain,
        }
        for way in ways.values():
            way()  # what the first one imports and allocates counts for nobody
        found: dict[str, dict[str, list[float]]]
        found = {by: {name: [] for name in ways} for by in (CLOCK, PROCESSOR)}
        for turn in range(rounds):
            names = [*ways][turn % 3 :] + [*ways][: turn % 3]
            for name in names if turn % 2 else names[::-1]:
                for by, rate in zip((CLOCK, PROCESSOR), ways[name](), strict=True):
                    found[by][name].append(rate)
    print(json.dumps({**found, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else ROUNDS)
