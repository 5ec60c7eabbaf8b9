"""A model of this project as PyTorch Lightning trains it.

The loss is the negative log-likelihood of a normal distribution with the predicted deviations (Nix
and Weigend, "Estimating the mean and variance of the target probability distribution", ICNN 1994).
Its gradient for a position is divided by the predicted variance, so that a network that has called
a sample hard stops learning it; each term is therefore weighted by the variance to the power β,
through which no gradient flows (Seitzer et al., "On the Pitfalls of Heteroscedastic Uncertainty
Estimation with Probabilistic Neural Networks", ICLR 2022). What is reported, and what checkpoints
are chosen by, is the likelihood without weights.

Whatever is drawn at random in an epoch follows from the seed and the epoch's number alone, so an
epoch that a killed training had begun is the same when it is begun again.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, default_convert
from torch.utils.data import Dataset as TorchDataset
from torchmetrics.aggregation import CatMetric

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.data.dataset.dataset import Dataset
from heimdall_onnx.evidence.geodesy import error_m
from heimdall_onnx.localization.frame import LocalFrame
from heimdall_onnx.model.inference import InputOrder, input_order, named_outputs
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.training.parameters import TrainingParameters

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# What an optimizer's decay is for: weights that are multiplied with inputs.
_DECAYED = (nn.Linear, nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)  # noqa: SLF001

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

Batch = tuple[dict[str, Tensor], Tensor, Tensor]


@dataclass
class TrainingProgress:
    """How far a training has come; plain values, kept in its checkpoints.

    Attributes:
        about: What is being trained, on what and how.
        history: One entry for each finished epoch.
        seconds: Wall-clock time, earlier sittings included.
        stopped: Why it ended before its last epoch: ``"early stopping"`` or ``"time"``.
    """

    about: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str | None = None


class Objective:
    """From inputs to the loss, for any model with positions and their spread.

    A model with a ``frame`` (a `LocalFrame`) and a method ``local`` is trained in the frame's
    units, any other one in degrees. Inputs and outputs go by name, as a release takes them, see
    `model.inference.input_order`; ``local`` gets each input as the parameter of that name,
    or, where it does not name them all, what ``forward`` gets.

    Args:
        model: The model.
        signature: Which output is what.
        beta: See `TrainingParameters`.

    Raises:
        ParameterError: If the model answers no positions, or no spread of them.
    """

    def __init__(self, model: nn.Module, signature: Signature, beta: float) -> None:
        position, spread = signature.position_output, signature.sigma_output
        if position is None or spread is None or position.shape[1:] != (2,):
            found = "; ".join(spec.describe() for spec in signature.outputs)
            raise ParameterError(
                f"{type(model).__name__} can't be trained: its signature must have an output "
                "(batch, 2) in degrees latitude and longitude, and one that is the standard "
                f"deviation or the log variance of it (sigma_of, log_variance_of); found {found}"
            )
        self.position: TensorSpec = position
        self.spread: TensorSpec = spread
        self._signature, self._model, self._beta = signature, model, beta
        frame = getattr(model, "frame", None)
        self._local: Any = getattr(model, "local", None)
        framed = isinstance(frame, LocalFrame) and callable(self._local)
        self.frame: LocalFrame | None = frame if framed else None
        self._order = input_order(model, signature.input_names)
        self._local_order = self.order_of(self._local) if callable(self._local) else self._order

    def order_of(self, method: Callable[..., Any]) -> InputOrder:
        """How another method of the model takes the inputs, in the order of its parameters."""
        names = {spec.name for spec in self._signature.inputs}
        parameters = inspect.signature(method).parameters.values()
        named = tuple(p.name for p in parameters if p.name in names and p.kind in _BY_NAME)
        return InputOrder((), named) if names == set(named) else self._order

    def targets(self, positions: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """What the network is to answer (N, 2): units of the frame, or degrees."""
        values = positions if self.frame is None else self.frame.normalize(positions)
        return values.astype(np.float32)

    def answers(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Positions and deviations (batch, 2), both as `targets`."""
        if self.frame is not None:
            offsets, deviations = self._local_order.call(self._local, inputs)
            return offsets.float(), deviations.float()
        outputs = self._outputs(inputs)
        positions, spread = outputs[self.position.name].float(), outputs[self.spread.name].float()
        if self.spread.log_variance_of is not None:
            spread = torch.exp(0.5 * spread)
        return positions, spread.reshape(len(positions), -1).expand_as(positions)

    def _outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = self._order.call(self._model, inputs)
        return named_outputs(self._model, result, self._signature)

    def degrees(self, answers: Tensor, deviations: Tensor) -> npt.NDArray[Any]:
        """Positions (batch, 2) in degrees."""
        if self.frame is not None:
            answers, _ = self.frame(answers, deviations)
        return answers.detach().cpu().double().numpy()

    def losses(self, answers: Tensor, deviations: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What is minimized, and the plain likelihood: means over samples and coordinates, nats."""
        residuals = answers - targets
        if self.frame is None:  # longitudes in degrees: the short way round
            north, east = residuals.unbind(1)
            residuals = torch.stack([north, torch.remainder(east + 180, 360) - 180], 1)
        nats = 0.5 * (residuals / deviations).square() + deviations.log() + _HALF_LOG_2PI
        weights = deviations.detach().pow(2 * self._beta)
        return (nats * weights).mean(), nats.detach().mean()


class TrainingModule(LightningModule):
    """Trains a model with an `Objective`.

    A model's own method ``augment``, where it has one, gives other inputs with the same answers, in
    training only. It takes them as ``local`` does and returns as many in the same order. A frame's
    calibration belongs to weights that are about to change, and is put back to 1; who goes on finds
    it in the checkpoint as it was.

    Args:
        model: The model.
        objective: Its loss.
        chosen: How it is fitted.
        hyper_parameters: Arguments of the model's constructor, for the checkpoint; plain values.
        progress: Is brought up to date, and kept in the checkpoints.
        positions: True positions (N, 2) in degrees of all rows of the dataset.
        began: When this sitting began, by the monotonic clock.

    Attributes:
        batches: What it is trained on, set before it is: how many there are makes the schedule.
        started: Whether what a checkpoint holds has been restored, and training has begun.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        chosen: TrainingParameters,
        hyper_parameters: Mapping[str, Any],
        progress: TrainingProgress,
        positions: npt.NDArray[np.float64],
        began: float,
    ) -> None:
        super().__init__()
        self.batches: DataLoader[Any] | None = None
        self.started = False
        self.model = model
        self.objective = objective
        self.chosen = chosen
        self.progress = progress
        self.positions = positions
        self._hyper_parameters = dict(hyper_parameters)
        self._augment: Any = getattr(model, "augment", None)
        if objective.frame is not None:
            objective.frame.deviation_scale.fill_(1.0)
        self._began = self._epoch_began = began
        self._validated_in = 0.0
        self._steps = 1
        # The seconds of earlier sittings; why the last one ended is no reason to end this one.
        self._carried, progress.stopped = progress.seconds, None
        self._sums = {"train": torch.zeros(2), "val": torch.zeros(2)}
        # Of all devices: the mean of medians is no median.
        self.errors = CatMetric(nan_strategy="disable").set_dtype(torch.float64)
        self._found: dict[str, float] = {}

    @property
    def epoch(self) -> int:
        """Number of the epoch, from 0; right from the first batch that is fetched for it."""
        progress: Any = self.trainer.fit_loop.epoch_progress.current
        return int(progress.processed)

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training, earlier sittings included."""
        return self._carried + time.monotonic() - self._began

    def configure_optimizers(self) -> Any:
        """AdamW, and a learning rate that follows steps or time, whichever is further gone."""
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, self.chosen.weight_decay),
            lr=self.chosen.learning_rate,
            fused=self.trainer.precision != "16-mixed" and self.device.type in ("cpu", "cuda"),
        )
        # Lightning's own estimate would start the workers before it knows the epoch to go on from.
        batches = 1 if self.batches is None else len(self.batches)
        self._steps = max(1, batches * (self.trainer.max_epochs or 1))

        def factor(step: int) -> float:
            # The middle of the step: both the first and the last one learn something.
            return rate_factor(self.share(step + 0.5), self.chosen.warmup)

        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    def on_train_start(self) -> None:
        """Say that it has begun."""
        self.started = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Draw what the epoch draws from the seed and the epoch's number."""
        if batch_idx == 0:
            self._epoch_began = time.monotonic()
            self._sums["train"] = torch.zeros(2, dtype=torch.float64, device=self.device)
            torch.manual_seed(seed_of(self.chosen.seed, self.epoch, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        inputs, targets, _ = batch
        if self._augment is not None:
            order = self.objective.order_of(self._augment)
            changed = order.call(self._augment, inputs)
            inputs = dict(zip((*order.positional, *order.keywords), changed, strict=True))
        loss, nats = self.objective.losses(*self.objective.answers(inputs), targets)
        self._add("train", nats, len(targets))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End the training when its time is over."""
        limit = self.chosen.max_time
        if limit is not None and self.seconds + self._validated_in >= limit:
            self.progress.stopped = "time"
            self.trainer.should_stop = True

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._validation_began = time.monotonic()
        self._sums["val"] = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.errors.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Likelihood and distance of a batch."""
        inputs, targets, rows = batch
        answers, deviations = self.objective.answers(inputs)
        _, nats = self.objective.losses(answers, deviations, targets)
        self._add("val", nats, len(targets))
        degrees = self.objective.degrees(answers, deviations)
        self.errors.update(error_m(degrees, self.positions[rows.cpu().numpy()]))

    def on_validation_epoch_end(self) -> None:
        """Hand the losses to the bar, and to those who choose checkpoints."""
        losses = {"train_loss": self._mean("train"), "val_loss": self._mean("val")}
        median = float(np.median(self.errors.compute().cpu().numpy()))
        self.log_dict(losses | {"km": median / 1000}, prog_bar=True, logger=False)
        self._found = losses | {"val_median_error_m": median}
        self._validated_in = time.monotonic() - self._validation_began

    def on_train_epoch_end(self) -> None:
        """Write the epoch down, before its checkpoint is saved."""
        seconds = time.monotonic() - self._epoch_began
        samples = self._sums["train"][1].item() * self.trainer.world_size
        self.progress.history.append(
            {
                "epoch": float(self.current_epoch),
                **self._found,
                "learning_rate": float(self.optimizers().param_groups[0]["lr"]),  # type: ignore[union-attr]
                "seconds": seconds,
                "samples_per_s": samples / max(seconds - self._validated_in, 1e-9),
            }
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what building the model again and going on takes; plain values only."""
        if self.trainer.should_stop and self.progress.stopped is None:
            self.progress.stopped = "early stopping"
        checkpoint["hyper_parameters"] = dict(self._hyper_parameters)
        checkpoint["training"] = {
            "about": self.progress.about,
            "history": [dict(entry) for entry in self.progress.history],
            "seconds": self.seconds,
            "stopped": self.progress.stopped,
        }

    def share(self, step: float) -> float:
        """Share of the training that is over after ``step`` steps: of steps or of time, 0 to 1."""
        limit = self.chosen.max_time
        timed = 0.0 if limit is None else self.seconds / max(limit - self._validated_in, 1e-9)
        return min(1.0, max(step / self._steps, timed))

    def _add(self, part: str, nats: Tensor, count: int) -> None:
        self._sums[part] += torch.stack([nats.double() * count, nats.new_tensor(count).double()])

    def _mean(self, part: str) -> float:
        total, count = self.trainer.strategy.reduce(self._sums[part].clone(), reduce_op="sum")
        return float(total / count)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters with decay, and without: norms, biases, scales, embeddings."""
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad and not any(parameter is p for p in decayed[True]):
                decayed[isinstance(module, _DECAYED) and parameter.ndim > 1].append(parameter)
    return [
        {"params": decayed[True], "weight_decay": weight_decay},
        {"params": decayed[False], "weight_decay": 0.0},
    ]


def rate_factor(share: float, warmup: float) -> float:
    """Part of the learning rate after a share of the training: up a line, then down a cosine.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
    without restarts; Goyal et al., "Accurate, Large Minibatch SGD", 2017, for the warm-up.
    """
    if share < warmup:
        return share / warmup
    down = min(1.0, (share - warmup) / max(1 - warmup, 1e-9))
    return 0.5 * (1 + math.cos(math.pi * down))


def seed_of(*numbers: int) -> int:
    """A seed that differs in every way from that of other numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class TrainingRows(TorchDataset[Any]):
    """Rows of a dataset with their targets, a whole batch at a time.

    Args:
        dataset: Where the inputs are.
        rows: Which rows.
        targets: What the network is to answer to each of them, (rows, 2).
        names: The inputs that the model takes.
        cache: Whether to keep the inputs in memory.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: npt.NDArray[np.int64],
        targets: npt.NDArray[np.float32],
        names: Sequence[str],
        *,
        cache: bool,
    ) -> None:
        self.dataset, self.rows, self._names = dataset, rows, tuple(names)
        self._targets = torch.from_numpy(targets)
        self._cached = self._read(rows) if cache else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: Sequence[int]) -> Batch:
        """Inputs, targets and rows of the dataset at ``places``."""
        chosen = torch.as_tensor(places)
        rows = self.rows[chosen.numpy()]
        if self._cached is None:
            inputs = {name: torch.from_numpy(a) for name, a in self._read(rows).items()}
        else:
            inputs = {n: torch.from_numpy(a)[chosen] for n, a in self._cached.items()}
        return inputs, self._targets[chosen], torch.from_numpy(rows)

    def _read(self, rows: npt.NDArray[np.int64]) -> Arrays:
        found = self.dataset.rows(rows)
        return {name: found[name] for name in self._names}


class EpochOrder(Sampler[int]):
    """An order for each epoch that follows from the seed and its number; a device's share of it.

    Args:
        count: Number of rows.
        seed: Of the order.
        module: Knows the epoch, and which of how many devices this is.
        shuffled: Whether the order changes at all.
    """

    def __init__(self, count: int, seed: int, module: TrainingModule, *, shuffled: bool) -> None:
        self._count, self._seed, self._module, self._shuffled = count, seed, module, shuffled

    def __iter__(self) -> Iterator[int]:
        order = np.arange(self._count)
        if self._shuffled:
            order = np.random.default_rng([self._seed, self._module.epoch]).permutation(order)
        rank, world = self._share()
        return iter(order[rank::world][: len(self)].tolist())

    def __len__(self) -> int:
        world = self._share()[1]
        # Equally many for each device while training, since they wait for each other.
        return self._count // world if self._shuffled else math.ceil(self._count / world)

    def _share(self) -> tuple[int, int]:
        with contextlib.suppress(RuntimeError):  # not attached to a trainer yet
            return self._module.global_rank, self._module.trainer.world_size
        return 0, 1


def make_loader(
    rows: TrainingRows,
    module: TrainingModule,
    *,
    workers: int,
    shuffled: bool,
) -> DataLoader[Any]:
    """A loader of batches; in training a last, incomplete one is left out.

    Workers are forked from a clean server process, not from this one, whose threads would not
    come along, and stay over the epochs.
    """
    size = min(module.chosen.batch_size, max(1, len(rows) // module.chosen.devices))
    processes: dict[str, Any] = {}
    if workers:
        processes = {
            "num_workers": workers,
            "multiprocessing_context": "forkserver",
            "persistent_workers": True,
        }
    return DataLoader(
        rows,
        batch_size=size,
        sampler=EpochOrder(len(rows), module.chosen.seed, module, shuffled=shuffled),
        drop_last=shuffled,
        collate_fn=default_convert,  # a batch was read as one
        pin_memory=torch.cuda.is_available(),
        # Of its own: the draws of a loader must not move those of the epoch.
        generator=torch.Generator().manual_seed(module.chosen.seed),
        **processes,
    )
