"""A small trained checkpoint and its evaluation data, so that a fresh machine has both.

`make_demo` fits the smallest reference model to simulated captures within a budget of wall-clock
time. A training entry point on real data can replace this module; all that the rest needs of it
are the two files.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from heimdall_onnx.errors import ParameterError
from heimdall_onnx.features import (
    SCHEMA,
    receiver_list,
    replace_file,
    write_feature_file,
)
from heimdall_onnx.fit import BATCH, Captures, Progress, fit
from heimdall_onnx.ground import distance_m
from heimdall_onnx.logs import get_logger
from heimdall_onnx.simulate import CHANNEL, PARAMETERS, RECEIVERS, simulate_captures

log = get_logger(__name__)

_VERSION = 1  # of simulation and training; another one makes an old demo be made anew
_LARGEST_POOL = 2048
_SIMULATING = 0.2  # share of the budget
_FILES = {"checkpoint": "demo.ckpt", "eval_data": "demo-eval.npz"}
_RECORD = "demo.json"


@dataclass(frozen=True)
class Demo:
    """A trained checkpoint, its evaluation data, and what it has learnt.

    Attributes:
        checkpoint: In the layout of PyTorch Lightning.
        eval_data: Labelled captures that training has not seen, ``.npz``.
        train_samples: Number of captures trained on.
        eval_samples: Number of captures in ``eval_data``.
        steps: Optimizer steps, without and with the residual blocks.
        epochs: How often training saw each capture, on average.
        median_error_m: Median error on the ground over ``eval_data``, in metres.
        baseline_median_error_m: The same for always answering the mean training position.
        seconds: Wall-clock time that making it took.
        reused: Whether it was there already.
    """

    checkpoint: Path
    eval_data: Path
    train_samples: int
    eval_samples: int
    steps: tuple[int, int]
    epochs: float
    median_error_m: float
    baseline_median_error_m: float
    seconds: float
    reused: bool = False


def make_demo(
    folder: Path | str,
    *,
    seconds: float = 100.0,
    seed: int = 0,
    eval_samples: int = 256,
    progress: Progress | None = None,
) -> Demo:
    """Train the demo checkpoint, or take the one of the same seed that ``folder`` already holds.

    The evaluation data depend on the seed alone; the weights also depend on how many steps the
    machine manages in the time. ``demo.json``, written last, records both files' SHA-256.

    Args:
        folder: Gets ``demo.ckpt``, ``demo-eval.npz`` and ``demo.json``.
        seconds: Budget of wall-clock time for making a new one; a very small one is exceeded by the
            few seconds that evaluation takes.
        seed: Seed of simulation and training.
        eval_samples: Number of captures to evaluate on.
        progress: Called with the share of the work done, 0 to 1, and what is being done.

    Raises:
        ParameterError: If ``seconds`` or ``eval_samples`` is not positive, or the seed negative.
        DataError: If the files can't be written.
    """
    _check(seconds, seed, eval_samples)
    folder = Path(folder)
    recipe = {
        "version": _VERSION,
        "seed": seed,
        "eval_samples": eval_samples,
        "channel": CHANNEL,
    }
    existing = _existing(folder, recipe)
    if existing is not None:
        log.info("demo.reused", checkpoint=str(existing.checkpoint))
        return existing
    return _make(folder, recipe, seconds, progress or (lambda share, what: None))


def _make(folder: Path, recipe: dict[str, Any], seconds: float, progress: Progress) -> Demo:
    began, seed = time.monotonic(), recipe["seed"]
    progress(0.0, "simulating captures")
    unseen = _simulate([seed, 1], recipe["eval_samples"])
    pool = _simulate([seed, 0], _LARGEST_POOL, end=began + _SIMULATING * seconds)
    centre = pool.positions.mean(0)
    gone = time.monotonic() - began
    fitted = fit(
        pool,
        unseen.features,
        seconds=max(seconds - gone, 0.1),
        seed=seed,
        progress=lambda share, what: progress(
            min(1.0, (gone + share * max(seconds - gone, 0.0)) / seconds), what
        ),
    )
    answers = fitted.positions.numpy()
    truth = unseen.positions.numpy()
    demo = Demo(
        checkpoint=folder / _FILES["checkpoint"],
        eval_data=folder / _FILES["eval_data"],
        train_samples=len(pool.positions),
        eval_samples=len(truth),
        steps=fitted.steps,
        epochs=sum(fitted.steps) * BATCH / len(pool.positions),
        median_error_m=_median_error(answers, truth),
        baseline_median_error_m=_median_error(np.broadcast_to(centre.numpy(), truth.shape), truth),
        seconds=time.monotonic() - began,
    )
    _write(demo, fitted.model, unseen, centre, recipe)
    log.info("demo.made", **{k: v for k, v in asdict(demo).items() if not isinstance(v, Path)})
    return demo


def _check(seconds: float, seed: int, eval_samples: int) -> None:
    problems = []
    if not (math.isfinite(seconds) and seconds > 0):
        problems.append(f"seconds must be positive, found {seconds!r}")
    if seed < 0:
        problems.append(f"seed must not be negative, found {seed!r}")
    if eval_samples < 1:
        problems.append(f"eval_samples must be at least 1, found {eval_samples!r}")
    if problems:
        raise ParameterError("demo: " + "; ".join(problems))


def _simulate(seed: Sequence[int], count: int, *, end: float = math.inf) -> Captures:
    """Up to ``count`` captures, at least one batch of them, until the time ``end``."""
    rng = np.random.default_rng(seed)
    features: list[npt.NDArray[np.float32]] = []
    positions: list[npt.NDArray[np.float64]] = []
    left = count
    while left and (not features or time.monotonic() < end):
        batch, where = simulate_captures(rng, min(BATCH, left))
        features.append(batch)
        positions.append(where)
        left -= len(where)
    return Captures(
        torch.from_numpy(np.concatenate(features)), torch.from_numpy(np.concatenate(positions))
    )


def _median_error(answers: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    return float(np.median(distance_m(answers, truth)))


def _write(
    demo: Demo, model: nn.Module, unseen: Captures, centre: Tensor, recipe: dict[str, Any]
) -> None:
    """The checkpoint, the evaluation data, and last the record that both are complete."""
    meta = {
        "schema": SCHEMA,
        "provenance": "simulated",
        "seed": recipe["seed"],
        "channel": CHANNEL,
        "features": asdict(PARAMETERS),
        "receivers": receiver_list(RECEIVERS),
        "centre": centre.tolist(),
    }
    arrays = {"mel_spectrogram": unseen.features.numpy(), "positions": unseen.positions.numpy()}
    write_feature_file(demo.eval_data, arrays, meta)
    content = {
        "epoch": math.floor(demo.epochs),
        "global_step": sum(demo.steps),
        "pytorch-lightning_version": "2.5.5",
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "hyper_parameters": {"backbone_size": "tiny", "seed": recipe["seed"]},
    }
    with replace_file(demo.checkpoint) as file:
        torch.save(content, file)
    result = {k: v for k, v in asdict(demo).items() if k not in (*_FILES, "reused")}
    record = {"recipe": recipe, "result": result, "sha256": _digests(demo)}
    with replace_file(demo.checkpoint.with_name(_RECORD)) as file:
        file.write(json.dumps(record, indent=2).encode())


def _existing(folder: Path, recipe: dict[str, Any]) -> Demo | None:
    """The demo that an equal call has left complete, or None."""
    try:
        record = json.loads((folder / _RECORD).read_bytes())
        result = record["result"]
        demo = Demo(
            checkpoint=folder / _FILES["checkpoint"],
            eval_data=folder / _FILES["eval_data"],
            **{**result, "steps": tuple(result["steps"]), "reused": True},
        )
        complete = record["recipe"] == recipe and record["sha256"] == _digests(demo)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Absent, or cut off while it was written: made anew either way.
        log.debug("demo.none_to_reuse", folder=str(folder), reason=str(error))
        return None
    return demo if complete else None


def _digests(demo: Demo) -> dict[str, str]:
    digests = {}
    for name in _FILES:
        with getattr(demo, name).open("rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
