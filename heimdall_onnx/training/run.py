"""One sitting of a training: find where to go on, fit, calibrate, measure, log."""

from __future__ import annotations

import inspect
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from heimdall_onnx.common.environment import capture_environment
from heimdall_onnx.common.errors import (
    CheckpointError,
    DataError,
    EvidenceError,
    HeimdallError,
    ParameterError,
)
from heimdall_onnx.common.files import hash_file, replace_file
from heimdall_onnx.common.logs import OnProgress, get_logger
from heimdall_onnx.common.machine import usable_processors
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.data.dataset.dataset import Dataset, Split, open_dataset
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.parity.ground import middle_of
from heimdall_onnx.evidence.parity.uncertainty import assess_model
from heimdall_onnx.localization.frame import calibration_of, placement_of
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.construction import import_model
from heimdall_onnx.model.signature import signature_of
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.training.module import (
    Objective,
    TrainingModule,
    TrainingProgress,
    TrainingRows,
    make_loader,
)
from heimdall_onnx.training.parameters import FIXED, TrainingParameters
from heimdall_onnx.training.result import (
    BEST,
    DIVERGED,
    EVAL_DATA,
    LAST,
    TRAINING_RECORD,
    TrainingResult,
)
from heimdall_onnx.training.trainer import fit, precision_of, read_training

if TYPE_CHECKING:
    from heimdall_onnx.services.registry import MLflowTracker

log = get_logger(__name__)

# Rows below this are read once and kept; above it they are streamed.
CACHE_BYTES = 1 << 30


class TrainingRun:
    """One sitting of a training, from its parameters to its result.

    Args:
        parameters: What to train.
        folder: For what is made; with ``last.ckpt`` of an earlier sitting if it is to go on.
        settings: Where MLflow is; None logs nowhere.
        report: Called with the share of the training done, and what is being done.
    """

    def __init__(
        self,
        parameters: TrainingParameters,
        folder: Path,
        settings: Settings | None,
        report: OnProgress | None,
    ) -> None:
        self.parameters, self.settings, self.report = parameters, settings, report
        self.folder = folder
        self.progress = TrainingProgress()
        self.resume: Path | None = None
        self.tracker: MLflowTracker | None = None
        self.run_id = ""
        self._opened = False
        self._poured = -1
        self._threads = 0
        self._began = time.monotonic()

    def execute(self) -> TrainingResult:
        """Do all of it; raises what `training.train.train` says."""
        dataset = open_dataset(self.parameters.data_dir)
        split = self._split(dataset)
        self._begin(dataset)
        status = "FAILED"
        try:
            # Reads everything once, 350 MB a second; what is recorded of it is then true.
            dataset.verify()
            if self.settings is not None:
                self._open_run()
            self.progress.about["run_id"] = self.run_id
            with _own_randomness(self.parameters.seed):
                result = self._train(dataset, split)
            status = "FAILED" if result.stopped == DIVERGED else "FINISHED"
        except (KeyboardInterrupt, HeimdallError) as error:
            if isinstance(error, KeyboardInterrupt):
                status = "KILLED"
            if (self.folder / LAST).is_file():
                error.add_note(
                    "the last whole epoch is kept; go on with the same options and "
                    f"--resume-training --checkpoint-dir {shlex.quote(str(self.folder))}"
                )
            raise
        finally:
            if self.tracker is not None and self._opened:
                from heimdall_onnx.release.publish import close_own_run

                close_own_run(self.tracker, self.run_id, status)
        return result

    def _split(self, dataset: Dataset) -> Split:
        chosen = self.parameters
        try:
            return dataset.split(
                validation=chosen.validation_split, test=chosen.test_split, seed=chosen.split_seed
            )
        except DataError as error:
            error.add_note("the seed of the division is --split-seed")
            raise

    def _begin(self, dataset: Dataset) -> None:
        """Find what to go on from, or refuse to overwrite it."""
        chosen = Path(self.parameters.checkpoint or self.folder / LAST)
        about = {
            "parameters": self.parameters.model_dump(mode="json", include=set(FIXED)),
            "dataset_digest": dataset.digest,
            "device": _device_of(self.parameters.accelerator),
            "precision": precision_of(self.parameters.accelerator),
        }
        if self.parameters.resume_training:
            recorded = read_training(chosen)
            if recorded["weights_only"]:
                raise CheckpointError(
                    f"{chosen} holds weights only; go on from {LAST} beside it, or start from its "
                    "weights without --resume-training"
                )
            self._check_same(recorded["about"], about)
            self.resume = chosen
            self.progress.history = [dict(entry) for entry in recorded["history"]]
            self.progress.seconds, self.progress.stopped = recorded["seconds"], recorded["stopped"]
            self.run_id = str(recorded["about"].get("run_id", ""))
            self._threads = int(recorded["about"].get("threads") or 0)
        elif (self.folder / LAST).exists():
            raise ParameterError(
                f"{self.folder} holds a training already: go on with --resume-training, or give "
                "another --checkpoint-dir"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress.about = {**about, "run_id": self.run_id, "threads": self._threads}

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        old, new = ({**about, **about.get("parameters", {})} for about in (before, now))
        differ = [
            f"{name}: {shown(repr(old.get(name)))} then, {shown(repr(new[name]))} now"
            for name in (*FIXED, "device", "precision", "dataset_digest")
            if old.get(name) != new[name]
        ]
        if differ:
            raise ParameterError(
                "a training can only go on as it began; start another one, or give the same "
                f"again:{listed(differ)}"
            )

    def _open_run(self) -> None:
        from heimdall_onnx.services.registry import initialize_mlflow

        assert self.settings is not None
        self.tracker = initialize_mlflow(self.settings)
        if self.run_id:
            self.tracker.check_run(self.run_id)
            self._opened = True
            logged = self.tracker.get_run_info(self.run_id)["metrics"]
            self._poured = int(logged.get("epoch", -1))
        else:
            prefix = self.parameters.run_name_prefix
            self.run_id = self.tracker.create_run(f"{prefix} {self.folder.name}")
            self._opened = True
            about = self.progress.about
            fixed = {n: v for n, v in about["parameters"].items() if n != "model_kwargs"}
            fixed |= {f"model.{n}": v for n, v in self.parameters.model_kwargs.items()}
            fixed |= {n: about[n] for n in ("dataset_digest", "device", "precision")}
            self.tracker.log_params(fixed, run_id=self.run_id)
        # What can be another in the next sitting; a run's parameters can't change.
        others = self.parameters.model_dump(mode="json", exclude=set(FIXED))
        tags = {name: None if value == "" else value for name, value in others.items()}
        self.tracker.set_tags(tags, run_id=self.run_id)

    def _pour(self, history: list[dict[str, float]]) -> None:
        """Log epochs that the run does not have yet."""
        for entry in history:
            epoch = int(entry["epoch"])
            if self.tracker is not None and epoch > self._poured:
                try:
                    self.tracker.log_metrics(entry, epoch, run_id=self.run_id)
                except HeimdallError as error:
                    # The training is worth more than a point of its curve, which is made up later.
                    log.warning("epoch_not_logged", epoch=epoch, reason=str(error))
                    return
                self._poured = epoch

    def _train(self, dataset: Dataset, split: Split) -> TrainingResult:
        if dataset.positions is None:
            raise DataError(f"dataset {dataset.path} has no positions to train on")
        if len(split.train) < 2:
            raise DataError(f"dataset {dataset.path}: {len(split.train)} rows are left to train on")
        if not self._is_over():
            self._fit(dataset, dataset.positions, split)
        done = read_training(self.folder / LAST)
        best = _best_of(done)
        if self.report is not None:
            self.report(1.0, "evaluating")
        best = self._calibrated(dataset, dataset.positions, split, best)
        result = self._evaluate(dataset, split, done, best)
        content = result.to_dict()
        _write_json(self.folder / TRAINING_RECORD, content)
        if self.tracker is not None:
            self._log_result(result, done["history"])
        return result

    def _is_over(self) -> bool:
        limit = self.parameters.max_time
        if self.progress.history and not math.isfinite(self.progress.history[-1]["val_loss"]):
            return True
        if self.progress.stopped == "time":
            return limit is not None and self.progress.seconds >= 0.95 * limit
        return (
            self.progress.stopped is not None
            or len(self.progress.history) >= self.parameters.epochs
        )

    def _fit(self, dataset: Dataset, positions: npt.NDArray[np.float64], split: Split) -> None:
        chosen = self.parameters
        model, kwargs = self._model(positions[split.train])
        signature = signature_of(model)
        objective = Objective(model, signature, chosen.beta)
        names = [spec.name for spec in signature.inputs]
        signature.check_inputs(dataset.rows(split.train[:2]), str(dataset.path))
        module = TrainingModule(
            model, objective, chosen, kwargs, self.progress, positions, self._began
        )
        row_bytes = sum(dataset.arrays[f"inputs/{name}"].row_bytes for name in names)
        cache = row_bytes * (dataset.count - len(split.test)) <= CACHE_BYTES
        parts = [
            TrainingRows(dataset, rows, objective.targets(positions[rows]), names, cache=cache)
            for rows in (split.train, split.validation)
        ]
        loaders = [
            make_loader(
                rows,
                module,
                workers=0 if cache else min(chosen.num_workers, usable_processors()),
                shuffled=shuffled,
            )
            for rows, shuffled in zip(parts, (True, False), strict=True)
        ]
        precision = precision_of(chosen.accelerator)
        if precision == "32-true" and chosen.accelerator in ("auto", "cpu"):
            # Another number of threads adds up in another order: who goes on takes the same.
            threads = chosen.threads or self.progress.about.get("threads")
            threads = threads or min(torch.get_num_threads(), usable_processors())
            self.progress.about["threads"] = threads
            torch.set_num_threads(threads)
        fit(
            module,
            *loaders,
            folder=self.folder,
            precision=precision,
            resume=self.resume,
            report=self.report,
            sink=self._pour if self.tracker is not None and chosen.devices == 1 else None,
        )

    def _model(self, positions: npt.NDArray[np.float64]) -> tuple[nn.Module, dict[str, Any]]:
        """The model to train, and the arguments that build it again."""
        spec, given = self.parameters.model, dict(self.parameters.model_kwargs)
        start = self.resume or (self.parameters.checkpoint and Path(self.parameters.checkpoint))
        if start:
            # Its own centroid and scale, which the weights belong to.
            loaded = load_checkpoint(start, model=spec, model_kwargs=given)
            return loaded.model.train(), loaded.model_kwargs
        model_class = import_model(spec)
        known = inspect.signature(model_class).parameters
        if {"centroid", "scale_m"} <= known.keys() and not {"centroid", "scale_m"} & given.keys():
            centroid, scale_m = placement_of(positions)
            given |= {"centroid": list(centroid), "scale_m": scale_m}
        try:
            return model_class(**given).train(), given
        except HeimdallError:
            raise
        except Exception as error:  # whatever the model's constructor raises
            raise ParameterError(
                f"{spec} can't be built with {shown(repr(given))}: {type(error).__name__}: "
                f"{shown(str(error), 1000)}"
            ) from error

    def _calibrated(
        self, dataset: Dataset, positions: npt.NDArray[np.float64], split: Split, best: Path
    ) -> Path:
        """The best checkpoint with deviations as large as its errors on the validation part."""
        given = self.parameters.model_kwargs
        model = load_checkpoint(best, model=self.parameters.model, model_kwargs=given).model
        objective = Objective(model, signature_of(model), self.parameters.beta)
        if objective.frame is None:
            return best
        rows, names = split.validation, [spec.name for spec in signature_of(model).inputs]
        part = TrainingRows(dataset, rows, objective.targets(positions[rows]), names, cache=False)
        places = [range(at, min(at + 64, len(rows))) for at in range(0, len(rows), 64)]
        residuals, deviations = [], []
        with torch.inference_mode():
            for some in places:
                inputs, targets, _ = part.__getitems__(some)
                answers, spread = objective.answers(inputs)
                residuals.append(answers - targets)
                deviations.append(spread)
        scale = calibration_of(torch.cat(residuals).numpy(), torch.cat(deviations).numpy())
        log.info("calibrated", deviation_scale=[round(float(s), 3) for s in scale])
        content = torch.load(best, map_location="cpu", weights_only=True)
        content["state_dict"]["model.frame.deviation_scale"] = torch.tensor(scale).float()
        path = self.folder / BEST
        with replace_file(path) as file:
            torch.save(content, file)
        return path

    def _evaluate(
        self, dataset: Dataset, split: Split, done: Mapping[str, Any], best: Path
    ) -> TrainingResult:
        """The best checkpoint on the events that training has not seen."""
        assert dataset.positions is not None
        centre = middle_of(dataset.positions[split.train], {})
        assert centre is not None
        path = self.folder / EVAL_DATA
        dataset.write_evaluation_data(path, split.test, centre=list(centre), part="test")
        loaded = load_checkpoint(
            best, model=self.parameters.model, model_kwargs=self.parameters.model_kwargs
        )
        data = load_evaluation_data(path, loaded.signature)
        found = assess_model("PyTorch", loaded.model, data, loaded.signature)
        truth = dataset.positions[split.test]
        baseline = np.median(distance_m(np.broadcast_to(centre, truth.shape), truth))
        history = done["history"]
        finite = [entry for entry in history if math.isfinite(entry["val_loss"])]
        files = [best, self.folder / LAST, path, *sorted(self.folder.glob("epoch-*.ckpt"))]
        calibration = found.calibration
        return TrainingResult(
            folder=self.folder,
            best=best,
            last=self.folder / LAST,
            eval_data=path,
            history=tuple(history),
            best_epoch=int(min(finite, key=lambda entry: entry["val_loss"])["epoch"]),
            stopped=done["stopped"] if math.isfinite(history[-1]["val_loss"]) else DIVERGED,
            seconds=done["seconds"],
            samples={
                "train": len(split.train),
                "validation": len(split.validation),
                "test": len(split.test),
            },
            median_error_m=found.median_m,
            p95_error_m=found.p95_m,
            baseline_median_error_m=float(baseline),
            coverage={}
            if calibration is None
            else {f"{c.nominal:g}": c.observed for c in calibration.coverage},
            nll=None if calibration is None else calibration.nll,
            dataset_digest=dataset.digest,
            sha256={file.name: hash_file(file) for file in files},
            run_id=self.run_id,
        )

    def _log_result(self, result: TrainingResult, history: list[dict[str, float]]) -> None:
        assert self.tracker is not None
        self._pour(history)
        before = self.tracker.get_run_info(self.run_id)["tags"]
        tags: dict[str, Any] = {name: None for name in before if name.startswith("sha256.")}
        tags |= {f"sha256.{name}": value for name, value in result.sha256.items()}
        tags |= {"best": result.best.name, "stopped": result.stopped}
        self.tracker.set_tags(tags, run_id=self.run_id)
        values = {
            "test_median_error_m": result.median_error_m,
            "test_p95_error_m": result.p95_error_m,
            "test_baseline_median_error_m": result.baseline_median_error_m,
            **{f"test_coverage_{name}": value for name, value in result.coverage.items()},
        }
        if result.nll is not None:
            values["test_nll"] = result.nll
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self.tracker.log_metrics(finite, len(history), run_id=self.run_id)
        environment = self.folder / "environment.json"
        _write_json(environment, asdict(capture_environment()))
        for name in (*result.sha256, TRAINING_RECORD, environment.name):
            kind = "checkpoints" if name.endswith(".ckpt") else "training"
            self.tracker.log_artifact(self.folder / name, kind, run_id=self.run_id)


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Seed PyTorch, and give the caller its generator and threads back in the end."""
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _device_of(accelerator: str) -> str:
    """The kind of device that is meant here."""
    if accelerator not in ("auto", "gpu"):
        return accelerator
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _best_of(done: Mapping[str, Any]) -> Path:
    """The best checkpoint, of an epoch with a finite validation loss."""
    losses = [entry["val_loss"] for entry in done["history"]]
    if not any(map(math.isfinite, losses)) or -math.inf in losses:
        raise EvidenceError(
            "the training diverged: its validation loss is not finite; lower the learning rate"
        )
    best: Path | None = done["best"]
    if best is None or not best.is_file():
        raise CheckpointError(
            f"{best or 'the best checkpoint'} is missing, which the training has left; put it "
            "back, or start another training in another folder"
        )
    return best


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with replace_file(path) as file:
        file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
