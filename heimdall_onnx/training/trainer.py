"""The loop around a training: checkpoints, progress, and Lightning kept quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.trainer.states import TrainerStatus
from torch.utils.data import DataLoader

from heimdall_onnx.common.errors import CheckpointError, HeimdallError
from heimdall_onnx.common.files import replace_file
from heimdall_onnx.common.logs import OnProgress, get_logger
from heimdall_onnx.common.signals import was_interrupted
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.model.checkpoint import read_plain
from heimdall_onnx.training.module import TrainingModule
from heimdall_onnx.training.result import LAST

log = get_logger(__name__)

KEPT_CHECKPOINTS = 3
_CLIP = 1.0
_FOREIGN = "{} is a checkpoint, but not one that `heimdall-onnx train` can go on from:"
_START = "Give it as --checkpoint without --resume-training to start from its weights"

Sink = Callable[[list[dict[str, float]]], None]


class _Strict(BaseModel):
    """Read from untrusted bytes: no type is converted into another. What is not used may differ."""

    model_config = ConfigDict(strict=True, frozen=True)


class _About(_Strict):
    # What else there is comes along: who goes on compares it.
    model_config = ConfigDict(extra="allow")

    parameters: dict[str, Any]
    dataset_digest: str
    run_id: str = ""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0


class _Epoch(_Strict):
    # Losses and distances of a training that diverged are no numbers.
    epoch: Annotated[float, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
    train_loss: float
    val_loss: float
    val_median_error_m: float
    learning_rate: float
    seconds: float
    samples_per_s: float


class _Training(_Strict):
    about: _About
    history: Annotated[list[_Epoch], FailFast(), Field(max_length=1_000_000)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    stopped: Literal["early stopping", "time"] | None


class _State(_Strict):
    """What is used of a callback's state; only those that keep checkpoints have any of it."""

    best_model_path: str = ""
    best_k_models: dict[str, Any] = {}


class _Record(_Strict):
    training: _Training
    callbacks: dict[str, _State] = {}


def fit(
    module: TrainingModule,
    train: DataLoader[Any],
    validation: DataLoader[Any],
    *,
    folder: Path,
    precision: str,
    resume: Path | None,
    report: OnProgress | None,
    sink: Sink | None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Train to the end; ``last.ckpt`` in ``folder`` then says how it went.

    Args:
        module: What to train.
        train: Batches to train on.
        validation: Batches to choose checkpoints by.
        folder: Gets ``last.ckpt`` and the best three.
        precision: Lightning's name of it.
        resume: A ``last.ckpt`` to go on from.
        report: Called with the share of the work done and what is being done.
        sink: Called with the epochs so far, when the checkpoint that holds them is complete.
        callbacks: Of Lightning, beside those that do all this.

    Raises:
        KeyboardInterrupt: If it was interrupted; ``last.ckpt`` is that of the last whole epoch.
        CheckpointError: If ``resume`` can't be gone on from.
        DataError: If a checkpoint can't be written.
    """
    module.batches, chosen = train, module.chosen
    interactive = report is None and sys.stderr.isatty()
    own: list[Callback] = [
        *callbacks,
        EarlyStopping("val_loss", patience=chosen.patience, mode="min", check_finite=True),
        _Best(folder),
        _Last(folder),
        _Watch(report, sink, speak=report is None and not interactive),
        *([_Bar()] if interactive else []),
    ]
    sharing: Any = torch.multiprocessing
    strategy = sharing.get_sharing_strategy()
    with quiet():
        trainer = Trainer(
            accelerator=chosen.accelerator,
            devices=chosen.devices,
            strategy="auto" if chosen.devices == 1 else "ddp_spawn",
            precision=precision,  # type: ignore[arg-type]
            max_epochs=chosen.epochs,
            callbacks=own,
            plugins=[PlainCheckpoints(), LightningEnvironment()],
            gradient_clip_val=_CLIP,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_progress_bar=interactive,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            default_root_dir=folder,
        )
        try:
            if chosen.devices > 1:
                # By descriptor, PyTorch names the one of a storage that two tensors share twice,
                # which Python refuses.
                sharing.set_sharing_strategy("file_system")
            trainer.fit(
                module, train, validation, ckpt_path=resume and str(resume), weights_only=True
            )
        except SystemExit as error:
            # What Lightning makes of Ctrl-C.
            if trainer.state.status is not TrainerStatus.INTERRUPTED:
                raise
            raise KeyboardInterrupt from error
        except Exception as error:
            # PyTorch's writer of checkpoints, interrupted, reports that its file is incomplete.
            if was_interrupted(error):
                raise KeyboardInterrupt from error
            # With several devices the work is done by other processes, on copies of the module.
            restored = resume is None or module.started or chosen.devices > 1
            if restored or isinstance(error, HeimdallError):
                raise
            raise CheckpointError(
                f"{resume} can't be gone on from: restoring it failed with "
                f"{type(error).__name__}: {shown(str(error), 1000)}. {_START}"
            ) from error
        finally:
            sharing.set_sharing_strategy(strategy)


def precision_of(accelerator: str) -> str:
    """Mixed precision where the device has it: bfloat16, else float16, on CUDA."""
    if accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "32-true"
    return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"


def read_training(path: Path) -> dict[str, Any]:
    """What a checkpoint of this training entry records of its training.

    Raises:
        CheckpointError: If it can't be read, holds code, or was not written by this entry; every
            problem of what it records is named.
    """
    content = read_plain(path)
    if not isinstance(content, Mapping) or "training" not in content:
        raise CheckpointError(f"{_FOREIGN.format(path)} it does not record the training. {_START}")
    record = _record_of(content, path)
    paths = [s.best_model_path for n, s in record.callbacks.items() if n.startswith(_Best.__name__)]
    best = path.parent / Path(paths[0]).name if paths and paths[0] else None
    # One level deep: a small file can hold a value that is endless once it is copied.
    return {
        **dict(record.training),
        "about": dict(record.training.about),
        "history": [dict(entry) for entry in record.training.history],
        "best": best,
        "weights_only": "optimizer_states" not in content,
    }


def _record_of(content: Mapping[str, Any], path: Path) -> _Record:
    """The part of a checkpoint that is used, of the types that it is used as."""
    try:
        return _Record.model_validate(dict(content))
    except ValidationError as error:
        problems = [
            f"{shown('.'.join(map(str, e['loc'])))}: {shown(e['msg'])}, found {shown(e['input'])}"
            for e in error.errors(include_url=False, include_context=False)
        ]
        raise CheckpointError(
            f"{_FOREIGN.format(path)} what it records is not what is written for a training:"
            f"{listed(problems)}\n{_START}"
        ) from None


class PlainCheckpoints(TorchCheckpointIO):
    """Checkpoints that are complete or absent, and are read without running code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write beside ``path``, then rename."""
        with replace_file(Path(path)) as file:
            torch.save(checkpoint, file)
            if Path(path).name == LAST:  # what is lost with the machine's power costs an epoch
                file.flush()
                os.fsync(file.fileno())

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read tensors and plain values, and nothing else.

        Raises:
            CheckpointError: If it does not record what is written for a training.
        """
        loaded: dict[str, Any] = read_plain(path)
        if "callbacks" in loaded:  # not in the weights that spawned processes hand back
            _record_of(loaded, Path(path))
            # Where the folder has been moved, its checkpoints have moved with it.
            for state in loaded["callbacks"].values():
                if "dirpath" in state:
                    _move(state, Path(path).parent)
        return loaded


class _Best(ModelCheckpoint):
    """The best three by validation loss: weights, and what the model is built with."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            "epoch-{epoch:04d}-loss-{val_loss:.4f}",
            monitor="val_loss",
            save_top_k=KEPT_CHECKPOINTS,
            save_weights_only=True,
            auto_insert_metric_name=False,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class _Last(ModelCheckpoint):
    """The end of each epoch with all that going on takes. Comes after the best, which it records.

    Lightning's own ``save_last`` leaves out the epochs that are not among the best.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            LAST.removesuffix(".ckpt"),
            save_top_k=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class _Watch(Callback):
    """Tells the callers how far it is."""

    def __init__(self, report: OnProgress | None, sink: Sink | None, *, speak: bool) -> None:
        self._report, self._sink, self._speak = report, sink, speak
        self._spoken = -1.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._report is not None:
            assert isinstance(pl_module, TrainingModule)
            share = pl_module.share(trainer.global_step)
            self._report(share, f"training, epoch {pl_module.epoch + 1}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pour(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pour(trainer, pl_module)

    def _pour(self, trainer: Trainer, module: LightningModule) -> None:
        # Not sooner: what is logged must not be more than what a resumed training starts from.
        assert isinstance(module, TrainingModule)
        history = module.progress.history
        if not history or not trainer.is_global_zero:
            return
        if self._sink is not None:
            self._sink(history)
        if self._speak and history[-1]["epoch"] > self._spoken:
            epoch, self._spoken = history[-1], history[-1]["epoch"]
            log.info(
                "epoch",
                of=trainer.max_epochs,
                epoch=int(epoch["epoch"]) + 1,
                train_loss=round(epoch["train_loss"], 4),
                val_loss=round(epoch["val_loss"], 4),
                km=round(epoch["val_median_error_m"] / 1000, 1),
                samples_per_s=round(epoch["samples_per_s"]),
            )


class _Bar(TQDMProgressBar):
    """Lightning's bar on standard error, in each process: standard output is the result's."""

    def init_train_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_train_tqdm()

    def init_validation_tqdm(self) -> Tqdm:
        with redirect_stdout(sys.stderr):
            return super().init_validation_tqdm()


def _move(state: dict[str, Any], folder: Path) -> None:
    """Point a checkpoint callback's state at the files' names in ``folder``."""

    def moved(path: Any) -> str:
        return str(folder / Path(str(path)).name) if path else ""

    state["dirpath"] = os.path.realpath(folder)
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        state[name] = moved(state.get(name))
    models = state.get("best_k_models")
    state["best_k_models"] = {moved(p): v for p, v in (models or {}).items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advice to itself: it is about its own defaults, which are chosen here."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in (
                ".*does not have many workers",
                ".*exists and is not empty",
                ".*GPU available but not used",
                ".*smaller than the logging interval",
                ".*isinstance.treespec, LeafSpec.",
                ".*in eval mode at the start of training",
                ".*lr_scheduler.step.. before",
            ):
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
