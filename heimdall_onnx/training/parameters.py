"""The parameters of a training: one model for the entry point and the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.parameters import ModelKwargs, Parameters, check_as
from heimdall_onnx.common.text import listed, shown

# What going on must find as it was, or the epochs would not be those of one training.
FIXED = (
    *("model", "model_kwargs", "batch_size", "learning_rate", "weight_decay", "warmup", "beta"),
    *("validation_split", "test_split", "split_seed", "seed", "patience", "devices"),
)
# Of a release that follows a training: what the training sets.
BY_TRAINING = frozenset(
    {"publish", "output_dir", "checkpoint", "eval_data", "model", "model_kwargs", "run_id"}
)
# Of a release: what has an option of its own; the others are given with -p.
NAMED = ("name", "profile", "alias", "bucket", "prefix", "tolerance", "variants")


class TrainingParameters(Parameters):
    """What is trained, on what, and how.

    Attributes:
        data_dir: A dataset, as `heimdall-onnx data` writes it.
        epochs: At most.
        batch_size: Samples in a step, on each device.
        learning_rate: AdamW's, at the end of the warm-up.
        weight_decay: AdamW's.
        warmup: Share of the training over which the learning rate rises.
        beta: Power of the predicted variance that weights the likelihood, 0 to 1; 0 is the plain
            likelihood. See `training.module`.
        patience: Epochs without a better validation loss before it ends.
        validation_split: Share of the events to choose the best checkpoint by.
        test_split: Share of the events that training never sees.
        num_workers: Processes that read data; none where the data fit into memory.
        accelerator: Lightning's name of it.
        devices: Number of devices.
        threads: Of PyTorch on the CPU; 0 takes one for each processor. Beside other programs that
            compute, several only wait for each other, and 1 is faster.
        max_time: Wall-clock seconds until the evaluation, all sittings together; the learning rate
            comes down with them.
        checkpoint_dir: For what is made; a folder below the settings' home by default.
        checkpoint: Weights to start from, or the checkpoint to go on from or to release.
        resume_training: Go on from ``last.ckpt`` of the folder, or from ``checkpoint``.
        export_only: Release ``checkpoint``, or the best of the folder, without training.
        experiment_name: MLflow experiment; that of the settings by default.
        run_name_prefix: What the name of the MLflow run begins with.
        model: The class, ``package.module:Class``.
        model_kwargs: Its constructor's arguments; a mapping, or JSON text of one.
        seed: Of initialization, order and dropout.
        split_seed: Of the division into parts; members of an ensemble need the same one, or they
            are judged on events that others of them were trained on.
        release: Whether to release the best checkpoint in the end.
    """

    data_dir: str = ""
    epochs: int = Field(100, ge=1, le=1_000_000)
    batch_size: int = Field(32, ge=2, le=65536)
    learning_rate: float = Field(1e-3, gt=0, le=10)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)
    beta: float = Field(0.5, ge=0, le=1)
    patience: int = Field(10, ge=1)
    validation_split: float = Field(0.2, gt=0, lt=1)
    test_split: float = Field(0.1, gt=0, lt=1)
    num_workers: int = Field(4, ge=0, le=1024)
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = "auto"
    devices: int = Field(1, ge=1, le=1024)
    threads: int = Field(0, ge=0, le=1024)
    max_time: float | None = Field(None, gt=0)
    checkpoint_dir: str = ""
    checkpoint: str = ""
    resume_training: bool = False
    export_only: bool = False
    experiment_name: str = Field("", max_length=200)
    run_name_prefix: str = Field("train", min_length=1, max_length=100)
    model: str = "heimdall_onnx:LocalizationNet"
    model_kwargs: ModelKwargs = Field(default_factory=dict)
    seed: int = Field(0, ge=0, lt=2**63)
    split_seed: int = Field(0, ge=0)
    release: bool = True

    @field_validator("model_kwargs")
    @classmethod
    def _names_arguments(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unfit := [name for name in value if not name.isidentifier()]:
            raise ValueError(f"no names of arguments: {shown(', '.join(map(repr, unfit)))}")
        return value

    def problems(self) -> list[str]:
        """What does not hold together, beyond each value's own range."""
        found = []
        if self.validation_split + self.test_split >= 1:
            found.append(
                "validation_split and test_split leave nothing to train on: expected a sum below "
                f"1, found {self.validation_split:g} + {self.test_split:g}"
            )
        if self.resume_training and self.export_only:
            found.append("resume_training and export_only exclude each other")
        if (self.resume_training or self.export_only) and not (
            self.checkpoint or self.checkpoint_dir
        ):
            flag = "resume_training" if self.resume_training else "export_only"
            found.append(f"{flag} needs checkpoint or checkpoint_dir: which training is meant?")
        if (
            self.resume_training
            and self.checkpoint
            and self.checkpoint_dir
            and Path(self.checkpoint).expanduser().resolve().parent
            != Path(self.checkpoint_dir).expanduser().resolve()
        ):
            found.append(
                "a training goes on in its own folder: give checkpoint or checkpoint_dir; found "
                f"{shown(self.checkpoint)} and {shown(self.checkpoint_dir)}"
            )
        if self.checkpoint and not Path(self.checkpoint).is_file():
            found.append(f"checkpoint: expected a file, found none at {shown(self.checkpoint)}")
        if not self.data_dir and not self.export_only:
            found.append("data_dir is missing: expected a dataset, as `heimdall-onnx data` writes")
        return found


def check_training(values: Mapping[str, Any]) -> TrainingParameters:
    """Make parameters of ``values``.

    Raises:
        ParameterError: Naming everything that can't be used, at once.
    """
    parameters = check_as(TrainingParameters, values)
    if found := parameters.problems():
        raise ParameterError(f"these parameters can't be used:{listed(found)}")
    return parameters
