"""Latency and accuracy of what a peer has made, in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from table import Accuracy, Ratio

from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.parameters import AccuracyLimits, Quality
from heimdall_onnx.common.processes import WorkerProcess
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.latency.benchmark import measure_pair
from heimdall_onnx.evidence.latency.contenders import Contestant
from heimdall_onnx.evidence.variants.accuracy import accuracy_gates, answers_of, judge_accuracy
from heimdall_onnx.model.runtimes import SessionSettings, open_runner
from heimdall_onnx.model.signature import Signature


@dataclass(frozen=True)
class Model:
    """A model that can be run.

    Attributes:
        name: What it is called.
        path: Its file.
        settings: With what it runs, threads included.
        environment: Variables that its process needs.
    """

    name: str
    path: Path
    settings: SessionSettings
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of its file, and of the weights that ONNX or OpenVINO keep beside it."""
        beside = self.path.parent.glob(f"{self.path.name}?*")
        files = {self.path, self.path.with_suffix(".bin"), *beside}
        return sum(file.stat().st_size for file in files if file.is_file())


@dataclass(frozen=True)
class Judge:
    """Measures models on the same rows and threads.

    Attributes:
        data: Rows that no calibration has seen.
        signature: Of the model.
        reference: Answers of the fp32 ONNX model on them.
        own: This project's model, which every other is timed in turns with.
        calls: Counted calls of each side.
    """

    data: EvaluationData
    signature: Signature
    reference: Arrays = field(repr=False)
    own: Model
    calls: int

    def accuracy(self, model: Model) -> Accuracy:
        """What a model loses, by the project's gates."""
        found = judge_accuracy(
            self.reference,
            answers_apart(model, self.data, self.signature),
            self.data,
            self.signature,
            Quality(),
        )
        gates = accuracy_gates(found, AccuracyLimits())
        lost = tuple(f"lost: {gate.summary()}" for gate in gates if not gate.passed)
        losses = {judged.metric: judged.loss for judged in found.quality}
        if "localization" not in losses:
            return Accuracy(None, None, found.displacement_sigma_p99, lost)
        median = 1 + losses["localization"]
        return Accuracy(median, losses.get("nll"), found.displacement_sigma_p99, lost)

    def latency(self, model: Model) -> tuple[float, float, Ratio]:
        """Median milliseconds of the model and of this project's, and their ratio."""
        with _variables(model.environment):
            pair = measure_pair(
                Contestant(model.name, model.path, model.settings),
                Contestant(self.own.name, self.own.path, self.own.settings),
                self.data.rows(range(1)),
                self.signature,
                calls=self.calls,
            )
        speedup = pair.speedup
        ratio = Ratio(speedup.ratio, speedup.low, speedup.high)
        return pair.first.median_ms, pair.second.median_ms, ratio


def answers_apart(model: Model, data: EvaluationData, signature: Signature) -> Arrays:
    """Outputs for every row, from a process with the model's variables."""
    with _variables(model.environment), WorkerProcess() as worker:
        return worker(_answers, model.path, signature, model.settings, data.rows(range(data.count)))


def _answers(path: Path, signature: Signature, settings: SessionSettings, inputs: Arrays) -> Arrays:
    return answers_of(open_runner(path, signature, settings).run, inputs)


@contextmanager
def _variables(environment: Mapping[str, str]) -> Iterator[None]:
    before: dict[str, Any] = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
