"""A small trained checkpoint and its evaluation data, so that a fresh machine has both.

`make_demo` simulates transmissions and trains the smallest reference model on them through the
training entry point, within a budget of wall-clock time. It needs no service, and logs nowhere.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.common.files import hash_file, replace_file
from heimdall_onnx.common.logs import OnProgress, get_logger
from heimdall_onnx.common.parameters import ReleaseParameters

log = get_logger(__name__)


_VERSION = 2  # of simulation and training; another one makes an old demo be made anew
_EVENTS_PER_SECOND = 15
_FEWEST_EVENTS, _MOST_EVENTS = 96, 1800
_EVALUATING = 0.02  # share of the budget
_UNCERTAINTY_MAX = 10.0  # degrees: at the start of training the model knows that little
_FILES = {"checkpoint": "demo.ckpt", "eval_data": "demo-eval.npz"}
_MEASURED = ("median_error_m", "baseline_median_error_m")
_RECORD = "demo.json"


@dataclass(frozen=True)
class Demo:
    """A trained checkpoint, its evaluation data, and what it has learnt.

    Attributes:
        checkpoint: In the layout of PyTorch Lightning.
        eval_data: Labelled events that training has not seen, ``.npz``.
        median_error_m: Median error on the ground over ``eval_data``, in metres.
        baseline_median_error_m: The same for always answering the training centroid.
        reused: Whether it was there already.
    """

    model: ClassVar[str] = "heimdall_onnx:LocalizationNet"

    checkpoint: Path
    eval_data: Path
    median_error_m: float
    baseline_median_error_m: float
    reused: bool = False

    def completing(self, given: ReleaseParameters) -> dict[str, str]:
        """What a release of it takes where nothing was given."""
        return {
            "checkpoint": given.checkpoint or str(self.checkpoint),
            "model": given.model or self.model,
            "eval_data": given.eval_data or str(self.eval_data),
        }


def make_demo(
    folder: Path | str,
    *,
    seconds: float = 120.0,
    seed: int = 0,
    backbone_size: str = "atto",
    progress: OnProgress | None = None,
) -> Demo:
    """Train the demo checkpoint, or take the one of the same seed that ``folder`` already holds.

    The evaluation data depend on seed and budget alone; the weights also depend on how many steps
    the machine manages in the time. ``demo.json``, written last, records both files' SHA-256.

    Args:
        folder: Gets ``demo.ckpt``, ``demo-eval.npz`` and ``demo.json``.
        seconds: Budget of wall-clock time for making a new one; a very small one is exceeded by the
            few seconds that simulation and evaluation take.
        seed: Seed of simulation and training.
        backbone_size: Of the reference model; larger ones need a larger budget to learn as much.
        progress: Called with the share of the work done, 0 to 1, and what is being done.

    Raises:
        ParameterError: If ``seconds`` is not positive, the seed negative, or there is no such size.
        DataError: If the files can't be written.
    """
    # Imported here and below: whoever has a checkpoint imports this too, and simulates nothing.
    from heimdall_onnx.localization.simulate import CHANNEL

    if not 0 < seconds < math.inf:
        raise ParameterError(f"demo: seconds must be positive, found {seconds!r}")
    folder = Path(folder)
    recipe = {
        "version": _VERSION,
        "seed": seed,
        "channel": CHANNEL,
        "model": {"backbone_size": backbone_size, "uncertainty_max": _UNCERTAINTY_MAX},
    }
    existing = existing_demo(folder, recipe)
    if existing is not None:
        log.info("demo.reused", checkpoint=str(existing.checkpoint))
        return existing
    return _make(folder, recipe, seconds, progress or (lambda share, what: None))


def _make(folder: Path, recipe: dict[str, Any], seconds: float, progress: OnProgress) -> Demo:
    from heimdall_onnx.localization.simulate import simulate_dataset
    from heimdall_onnx.training.parameters import TrainingParameters
    from heimdall_onnx.training.train import train

    began = time.monotonic()
    events = max(_FEWEST_EVENTS, min(_MOST_EVENTS, round(_EVENTS_PER_SECOND * seconds)))
    share = 0.0

    def say(done: float, what: str) -> None:
        nonlocal share  # two measures of time: steps, and the clock
        share = min(1.0, max(share, done))
        progress(share, what)

    say(0.0, "simulating events")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(prefix=".demo-", dir=folder)
    except OSError as error:
        raise DataError(f"{folder} can't be written: {error}") from error
    with work as name:
        data = Path(name) / "data"
        simulate_dataset(
            data,
            events=events,
            seed=recipe["seed"],
            progress=lambda _, what: say((time.monotonic() - began) / seconds, what),
        )
        gone = time.monotonic() - began
        left = max((1 - _EVALUATING) * seconds - gone, _EVALUATING * seconds)
        result = train(
            TrainingParameters(
                data_dir=str(data),
                checkpoint_dir=str(Path(name) / "training"),
                model_kwargs=recipe["model"],
                learning_rate=2e-3,
                seed=recipe["seed"],
                # The clock ends it, not the number of epochs.
                epochs=100_000,
                patience=100_000,
                max_time=left,
                validation_split=0.1,
                test_split=0.15,
                release=False,
            ),
            report=lambda part, what: say((gone + part * left) / (gone + left), what),
        )
        demo = Demo(
            checkpoint=folder / _FILES["checkpoint"],
            eval_data=folder / _FILES["eval_data"],
            median_error_m=result.median_error_m,
            baseline_median_error_m=result.baseline_median_error_m,
        )
        _write(demo, result.best, result.eval_data, recipe)
    log.info("demo.made", **{k: v for k, v in asdict(demo).items() if not isinstance(v, Path)})
    return demo


def _write(demo: Demo, checkpoint: Path, eval_data: Path, recipe: dict[str, Any]) -> None:
    """The checkpoint, the evaluation data, and last the record that both are complete."""
    for source, target in ((eval_data, demo.eval_data), (checkpoint, demo.checkpoint)):
        with source.open("rb") as made, replace_file(target) as file:
            shutil.copyfileobj(made, file)
    result = {name: getattr(demo, name) for name in _MEASURED}
    record = {"recipe": recipe, "result": result, "sha256": _digests(demo)}
    with replace_file(demo.checkpoint.with_name(_RECORD)) as file:
        file.write(json.dumps(record, indent=2).encode())


def existing_demo(folder: Path, recipe: dict[str, Any]) -> Demo | None:
    """The demo that an equal call has left complete, or None."""
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        demo = Demo(
            checkpoint=folder / _FILES["checkpoint"],
            eval_data=folder / _FILES["eval_data"],
            **{name: record["result"][name] for name in _MEASURED},
            reused=True,
        )
        complete = record["recipe"] == recipe and record["sha256"] == _digests(demo)
    except (OSError, DataError, ValueError, KeyError, TypeError) as error:
        # Absent, or cut off while it was written: made anew either way.
        log.debug("demo.none_to_reuse", folder=str(folder), reason=str(error))
        return None
    return demo if complete else None


def _digests(demo: Demo) -> dict[str, str]:
    return {name: hash_file(getattr(demo, name)) for name in _FILES}
