"""What a training has left: its files, its figures, and how to read them again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, field_serializer

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.text import shown
from heimdall_onnx.release.result import ReleaseResult

BEST, LAST, EVAL_DATA, TRAINING_RECORD = "best.ckpt", "last.ckpt", "eval.npz", "training.json"
DIVERGED = "diverged"

# JSON has no NaN.
_Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class TrainingResult(BaseModel, frozen=True):
    """How a training ended; `to_dict` is JSON-serialisable.

    What was measured of the best checkpoint is NaN, empty or None where another one is chosen.

    Attributes:
        folder: Where everything is.
        best: The best checkpoint by validation loss; where the model has a frame, with its
            deviations calibrated on the validation part.
        last: The last one, to go on from.
        eval_data: The held-out events, ``.npz``.
        history: One entry for each epoch: ``epoch``, ``train_loss``, ``val_loss`` (negative
            log-likelihood in nats per coordinate, in units of the frame, or in degrees without
            one), ``val_median_error_m``, ``learning_rate``, ``seconds``, ``samples_per_s``.
        best_epoch: Number of the best epoch, from 0.
        stopped: ``"early stopping"``, ``"time"``, ``"diverged"`` where the last validation loss is
            not finite, or None after all epochs.
        seconds: Wall-clock time of the training, earlier sittings included.
        samples: Rows of each part: ``train``, ``validation``, ``test``.
        median_error_m: Median localization error of the best checkpoint on the held-out events.
        p95_error_m: Its 95th percentile.
        baseline_median_error_m: Median error of always answering the training centroid.
        coverage: Share of the held-out positions in the ellipse of each probability.
        nll: Mean negative log-likelihood of the held-out positions, nats, density over degrees.
        dataset_digest: SHA-256 of the dataset's content.
        sha256: Of each file, by its name.
        run_id: MLflow run; empty where nothing was logged.
        release: How the release ended; None without one.
    """

    folder: Path
    best: Path
    last: Path
    eval_data: Path
    history: tuple[dict[str, _Number], ...] = Field(repr=False)
    best_epoch: int
    stopped: str | None
    seconds: float
    samples: dict[str, int]
    median_error_m: _Number
    p95_error_m: _Number
    baseline_median_error_m: float
    coverage: dict[str, float]
    nll: float | None
    dataset_digest: str
    sha256: dict[str, str]
    run_id: str = ""
    release: ReleaseResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; a number that is not finite is None."""
        return dict(json.loads(self.model_dump_json()))

    @field_serializer("release")
    def _as_it_is_printed(self, release: ReleaseResult | None) -> dict[str, Any] | None:
        return None if release is None else release.to_dict()


def read_result(folder: Path, checkpoint: str = "") -> TrainingResult:
    """What `train` has left in ``folder``, with another checkpoint of it as the best if given.

    Raises:
        CheckpointError: If there is no finished training, a file of it was changed, or the
            checkpoint is none of it.
    """
    record = folder / TRAINING_RECORD
    try:
        found = TrainingResult.model_validate_json(record.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder} holds no finished training: {record} can't be read "
            f"({shown(str(error))}). Train first, or go on with --resume-training"
        ) from error
    # Where the folder has been moved, its files have moved with it.
    here = {name: folder / getattr(found, name).name for name in ("best", "last", "eval_data")}
    update: dict[str, Any] = {**here, "folder": folder, "release": None}
    if checkpoint:
        update["best"] = Path(checkpoint)
        if update["best"].name != found.best.name:
            unknown = dict.fromkeys(("median_error_m", "p95_error_m"), math.nan)
            update |= {**unknown, "coverage": {}, "nll": None}
    result, sha256 = found.model_copy(update=update), found.sha256
    for path in (result.best, result.eval_data):
        known = sha256.get(path.name)
        if known is None or path.resolve().parent != folder.resolve():
            raise CheckpointError(
                f"{path} is not a file of this training, which {record} records; release it with "
                "`heimdall-onnx release`, or give one of "
                f"{', '.join(shown(name) for name in sha256 if name.endswith('.ckpt'))}"
            )
        if not path.is_file() or hash_file(path) != known:
            state = "was changed since" if path.is_file() else "is missing, which was there when"
            raise CheckpointError(f"{path} {state} the training ended")
    return result
