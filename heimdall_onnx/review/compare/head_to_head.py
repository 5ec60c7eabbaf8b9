"""Two models beside each other before one takes the other's place."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heimdall_onnx.common.arrays import Arrays, Floats, whole
from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.data.dataset.dataset import Dataset
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.evidence.latency.benchmark import measure_pair
from heimdall_onnx.evidence.latency.contenders import Contestant
from heimdall_onnx.evidence.parity.ground import distance_m
from heimdall_onnx.evidence.ratios import Ratio, error_ratio
from heimdall_onnx.model.inference import open_session, run_onnx
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature

_BATCH = 64
MOST_SAMPLES = 10_000


@dataclass(frozen=True)
class Limits:
    """How much worse than the version that it replaces a model may be.

    A limit is broken when the whole confidence interval lies beyond it, so that noise refuses
    nobody.

    Attributes:
        error_growth: Share by which the median localization error may grow.
        slowdown: Share by which the latency may grow.
        calls: Counted calls of each model, at least.
        allow_smoke: Whether a release of the profile ``smoke``, which is no evidence, is taken.
    """

    error_growth: float = 0.05
    slowdown: float = 0.1
    calls: int = 200
    allow_smoke: bool = False


@dataclass(frozen=True)
class HeadToHead:
    """How a candidate compares with the version that holds the alias.

    Attributes:
        holder: That version; None if there is none.
        evaluation_data: What both were run on, in words.
        ratios: What could be compared.
        notes: What could not, and why.
    """

    holder: str | None
    evaluation_data: str
    ratios: tuple[Ratio, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return asdict(self)


def compare_models(
    candidate: Path,
    holder: Path,
    eval_data: Path | Dataset | None,
    signature: Signature,
    limits: Limits,
    *,
    version: str,
) -> HeadToHead:
    """Run both models on the same data and time them in turns.

    The error's ratio is one of medians, its interval a percentile bootstrap over samples, both
    models on the same ones (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter
    13); the latency's is as in `measure_pair`.

    Args:
        candidate: The ONNX file that would be promoted.
        holder: The ONNX file that holds the alias.
        eval_data: The candidate's evaluation data, of which 10,000 evenly spaced samples are taken
            where there are more; None for synthetic inputs. A dataset's values are not held
            against its digest.
        signature: The candidate's.
        limits: How much worse it may be.
        version: The version that holds the alias.

    Raises:
        DataError: If the evaluation data does not fit the candidate.
        EvidenceError: If the candidate can't be run on it.
        BenchmarkError: If one of the models can't be timed.
    """
    given = load_evaluation_data(eval_data, signature, verify=False)
    data = given.spread(MOST_SAMPLES)
    of = f" of {given.count}" if data.count < given.count else ""
    provenance = f"{data.count}{of} samples, {data.source}"
    # Both are run in any case: what can't be run can't be timed either.
    answers = [_answers(candidate, data, signature)]
    try:
        answers.append(_answers(holder, data, signature))
    except EvidenceError as error:
        note = f"version {version} does not take the candidate's inputs: {error}"
        return HeadToHead(version, provenance, (), (note,))
    ratios, notes = [], []
    if data.positions is None or answers[0] is None or answers[1] is None:
        notes.append("localization error: the data has no labels, or the model no positions")
    elif data.count < 2:
        notes.append("localization error: one sample gives no interval")
    else:
        truth = whole(data.positions)
        errors = [distance_m(answer, truth) for answer in answers if answer is not None]
        ratios.append(error_ratio(errors[0], errors[1], 1 + limits.error_growth))
    first, second = (
        Contestant(name, path, SessionSettings())
        for name, path in (("candidate", candidate), ("holder", holder))
    )
    speed = measure_pair(first, second, data.rows(range(1)), signature, calls=limits.calls).speedup
    ratios.append(Ratio("latency", speed.ratio, speed.low, speed.high, 1 + limits.slowdown))
    return HeadToHead(version, provenance, tuple(ratios), tuple(notes))


def verdict_reasons(verdict: str, limits: Limits) -> tuple[str, ...]:
    """Why a release of this verdict is not promoted; empty if its verdict is no reason."""
    return (
        *([] if verdict.startswith("pass") else [f"its verdict is {verdict!r}"]),
        *(
            ["it is a test run (profile smoke), which is no evidence"]
            if "smoke" in verdict and not limits.allow_smoke
            else []
        ),
    )


def run_batches(path: Path, data: EvaluationData, signature: Signature) -> Iterator[Arrays]:
    """The outputs of an ONNX file on all samples in order, batch by batch.

    Raises:
        EvidenceError: If it can't be run on them.
    """
    session = open_session(path)
    return (run_onnx(session, inputs, signature) for _, inputs in data.batches(_BATCH))


def positions_of(signature: Signature) -> str | None:
    """Name of the output that holds positions (N, 2) in degrees; None where there is none."""
    position = signature.position_output
    return position.name if position is not None and position.shape[1:] == (2,) else None


def _answers(path: Path, data: EvaluationData, signature: Signature) -> Floats | None:
    """Positions (N, 2) in degrees; None where the model has no such output."""
    name, found = positions_of(signature), [*run_batches(path, data, signature)]
    if name is None:
        return None
    return np.concatenate([outputs[name] for outputs in found]).astype(np.float64)
