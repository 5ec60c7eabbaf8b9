"""How often a contract on quality is passed by what truly loses as much as is allowed.

Answers are simulated with a known loss, judged as a release judges its own, and counted: at the
limit at most one in twenty may pass; at half of it the share that passes is told beside that of the
most powerful exact test of paired proportions, which knows the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context

import numpy as np
from scipy import stats

from heimdall_onnx.common.parameters import Quality
from heimdall_onnx.evidence.quality.contract import Scores, judge_quality
from heimdall_onnx.evidence.quality.metric import metrics_for
from heimdall_onnx.model.signature import Signature, TensorSpec

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 1)),), (TensorSpec("y", "float32", ("batch", 2)),)
)
LIMIT = {"top1": 0.02, "rmse": 0.02, "auroc": 0.01}


@dataclass(frozen=True)
class Case:
    """What is drawn: a metric, so many samples, in groups of so many that are alike."""

    metric: str
    samples: int
    group: int = 1

    def __str__(self) -> str:
        grouped = f" in groups of {self.group}" if self.group > 1 else ""
        return f"{self.metric}, {self.samples:,} samples{grouped}"


CASES = tuple(
    Case(metric, samples, group)
    for metric in LIMIT
    for samples in (100, 1_000, 10_000)
    for group in (1, 10)
)


def alike(rng: np.random.Generator, case: Case, share: float = 0.5) -> np.ndarray:
    """Standard normal numbers, of whose variance groups have a share in common."""
    groups = case.samples // case.group
    if case.group == 1:
        return rng.normal(size=case.samples)
    common = np.repeat(rng.normal(size=groups), case.group)
    return np.sqrt(share) * common + np.sqrt(1 - share) * rng.normal(size=case.samples)


def top1(rng: np.random.Generator, case: Case, loss: float) -> tuple[np.ndarray, ...]:
    """Decisions of which 1 % are gained and 1 % and ``loss`` are lost."""
    place = stats.norm.cdf(alike(rng, case))
    lost, gained = place < 0.01 + loss, place > 0.99
    rows = rng.random(case.samples) < 0.2
    rows = (rows & ~lost) | gained
    found = (rows & ~gained) | lost
    return rows[:, None].astype(float), found[:, None].astype(float), rows


def rmse(rng: np.random.Generator, case: Case, loss: float) -> tuple[np.ndarray, ...]:
    """Errors to which independent noise adds ``loss`` of their root mean square."""
    errors = alike(rng, case)
    added = np.sqrt((1 + loss) ** 2 - 1) * alike(rng, case)
    return errors[:, None] ** 2, (errors + added)[:, None] ** 2, errors


def auroc(rng: np.random.Generator, case: Case, loss: float) -> tuple[np.ndarray, ...]:
    """Scores of two classes, of an area of 0.9, from which noise takes ``loss``."""
    labels = np.arange(case.samples) // case.group % 2
    apart = np.sqrt(2) * stats.norm.ppf(0.9)
    noise = np.sqrt(0.5 * (apart / stats.norm.ppf(0.9 - loss)) ** 2 - 1)
    scores = alike(rng, case) + apart * labels
    both = (scores, scores + noise * alike(rng, case))
    reference, found = (np.stack([-side, side], axis=1).astype(np.float32) for side in both)
    return reference, found, labels


DRAW: dict[str, Callable[..., tuple[np.ndarray, ...]]] = {
    "top1": top1,
    "rmse": rmse,
    "auroc": auroc,
}


def passing(case: Case, share: float, draws: int, seed: int) -> tuple[float, float]:
    """Of releases that truly lose a share of the limit, those that pass and those that fail."""
    limit = LIMIT[case.metric]
    (metric,) = metrics_for(case.metric, SIGNATURE, {"labels": np.zeros(1, np.int64)})
    rng = np.random.default_rng(seed)
    outcomes = []
    for _ in range(draws):
        reference, found, labels = DRAW[case.metric](rng, case, share * limit)
        groups = np.arange(case.samples) // case.group if case.group > 1 else None
        scores = Scores(reference, found, labels, groups=groups)
        outcomes.append(judge_quality(metric, scores, Quality(max_loss=limit)).outcome)
    return outcomes.count("shown") / draws, outcomes.count("worse") / draws


def best(case: Case, draws: int = 20_000) -> float:
    """Of the same releases those that a test passes that knows both rates.

    By Neyman and Pearson's lemma no test of the two counts has more power against them.
    """
    if case.metric != "top1" or case.group > 1:
        return float("nan")
    rng, limit = np.random.default_rng(0), LIMIT["top1"]
    rates = [np.array([0.01 + limit * share, 0.01, 0.98 - limit * share]) for share in (1, 0.5)]
    drawn = [rng.multinomial(case.samples, rate, size=draws) for rate in rates]
    ratios = [one @ (np.log(rates[1]) - np.log(rates[0])) for one in drawn]
    return float((ratios[1] > np.quantile(ratios[0], 0.95)).mean())


def measured(case: Case, draws: int, seed: int = 0) -> tuple[float, float, float, float]:
    """Per cent that pass at the limit and at half of it, at best, and that fail without a loss."""
    at_limit, half, none = (passing(case, share, draws, seed) for share in (1.0, 0.5, 0.0))
    return 100 * at_limit[0], 100 * half[0], 100 * best(case), 100 * none[1]


def rows(share: float) -> Iterator[tuple[str, float | None, str, tuple[float, ...], str]]:
    """Name, target, unit, values and method of each row."""
    draws = max(20, round(1000 * share))
    # One in twenty, and what chance adds to that in one of a hundred benchmarks.
    most = 100 * float(stats.binom.ppf(0.99, draws, 0.05)) / draws
    method = f"{draws} simulated releases, lost as much as is allowed"
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as processes:
        for case, found in zip(CASES, processes.map(measured, CASES, repeat(draws)), strict=True):
            limit, half, known, failed = found
            yield f"pass at the limit: {case}", most, "%", (limit,), method
            beside = "" if np.isnan(known) else f"; a test that knows both rates {known:.1f}%"
            yield f"pass at half of it: {case}", None, "%", (half,), f"the same{beside}"
            yield f"fail without a loss: {case}", 0.0, "%", (failed,), "the same"
