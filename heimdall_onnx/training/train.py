"""The training entry point: from a dataset to the best checkpoint, and on to its release.

`train` divides a dataset by event, fits a model to one part, chooses the best checkpoint by
another, measures it on the third, which training has not seen, and writes that one as the
evaluation data of a release. Everything goes into one MLflow run, which the release carries.

```
CHECKPOINT_DIR/
  last.ckpt                     end of the last whole epoch, with all that going on takes
  epoch-0007-loss-1.2345.ckpt   the best three: weights and the model's arguments
  best.ckpt                     the best of them, its deviations calibrated
  eval.npz                      the held-out events, to release with
  training.json                 what came out, with the SHA-256 of each file above
```
"""

from __future__ import annotations

import importlib.util
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from heimdall_onnx.common.errors import ParameterError, UnavailableError
from heimdall_onnx.common.logs import OnProgress
from heimdall_onnx.common.parameters import ReleaseParameters, check_parameters
from heimdall_onnx.common.text import listed
from heimdall_onnx.training.parameters import TrainingParameters as TrainingParameters
from heimdall_onnx.training.parameters import check_training as check_training
from heimdall_onnx.training.result import DIVERGED
from heimdall_onnx.training.result import TrainingResult as TrainingResult
from heimdall_onnx.training.result import read_result as read_result

if TYPE_CHECKING:
    from heimdall_onnx.services.settings import Settings


def train(
    parameters: TrainingParameters,
    settings: Settings | None = None,
    *,
    release: ReleaseParameters | None = None,
    report: OnProgress | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train a model, measure it on held-out events and, if asked for, release it.

    The dataset is read once before, to hold it against its digest, which takes about as long as
    reading it for an epoch. PyTorch's global generator is afterwards as it was.

    Args:
        parameters: What to train.
        settings: Where MLflow and the store are; None logs nowhere, and releases nothing.
        release: What else a release takes: name, alias, profile and the like.
        report: Called with the share of the training done, 0 to 1, and what is being done; it
            takes the place of the progress bar.
        progress: Show the release's progress on standard error.

    Returns:
        What came out. A release that failed is in it, with its exit code; checkpoint and data stay
        and can be released again with ``export_only``. A training that diverged, ``stopped`` says
        so, is not released: that its best checkpoint of before is good is for a person to judge,
        who can release it with ``export_only``.

    Raises:
        ParameterError: If the parameters do not hold together, or not with the model.
        DataError: If the dataset can't be used.
        CheckpointError: If the checkpoint to start, go on from or release can't be used.
        UnavailableError: If Lightning or Zarr is not installed.
        EvidenceError: If the training diverged before it had any finite validation loss.
        ServiceError: If MLflow or the store can't be reached.
        KeyboardInterrupt: On Ctrl-C or SIGTERM; the checkpoint of the last whole epoch stays, and a
            note of the exception says how to go on, as with every error after the first epoch.
    """
    if found := parameters.problems():
        raise ParameterError(f"these parameters can't be used:{listed(found)}")
    if parameters.release and settings is None and not parameters.export_only:
        parameters = parameters.model_copy(update={"release": False})
    for package in ("pytorch_lightning", "zarr"):
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(
                f"training needs the package {package}: pip install 'heimdall-onnx[train]'"
            )
    if settings is not None and (name := parameters.experiment_name):
        settings = settings.model_copy(update={"experiment_name": name})
    if parameters.export_only:
        if settings is None:
            raise ParameterError("export_only releases, which needs settings")
        result = read_result(_folder_of(parameters, settings), parameters.checkpoint)
        return _released(result, parameters, settings, release, progress)
    from heimdall_onnx.common.signals import first_signal_interrupts
    from heimdall_onnx.training.run import TrainingRun

    with first_signal_interrupts():
        folder = _folder_of(parameters, settings)
        result = TrainingRun(parameters, folder, settings, report).execute()
    if not parameters.release or settings is None or result.stopped == DIVERGED:
        return result
    return _released(result, parameters, settings, release, progress)


def _folder_of(parameters: TrainingParameters, settings: Settings | None) -> Path:
    if parameters.checkpoint_dir:
        return Path(parameters.checkpoint_dir).expanduser().absolute()
    if parameters.checkpoint and (parameters.resume_training or parameters.export_only):
        return Path(parameters.checkpoint).absolute().parent
    home = Path(".heimdall") if settings is None else settings.home
    return home.absolute() / "training" / f"{datetime.now(UTC):%Y%m%d_%H%M%S}-{uuid4().hex[:8]}"


def _released(
    result: TrainingResult,
    parameters: TrainingParameters,
    settings: Settings,
    release: ReleaseParameters | None,
    progress: bool,
) -> TrainingResult:
    """The result with its release, which logs into the training's run."""
    from heimdall_onnx.release.runner import release_checkpoint

    given = {} if release is None else release.model_dump(exclude_unset=True)
    given |= {
        "checkpoint": str(result.best),
        "eval_data": str(result.eval_data),
        "model": parameters.model,
        "model_kwargs": parameters.model_kwargs,
        "run_id": result.run_id,
    }
    done = release_checkpoint(check_parameters(given), settings, progress=progress)
    return result.model_copy(update={"release": done})
