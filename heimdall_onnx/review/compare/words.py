"""What a comparison found, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from heimdall_onnx.common.text import after, count_of, distance, name, number
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.evidence.quality.contract import Judged
from heimdall_onnx.evidence.quality.metric import LOCALIZATION
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.review.compare.answers import Answers
from heimdall_onnx.review.compare.gates import GatePair

# With fewer samples the 99th percentile is the largest by another name.
_SAMPLES_FOR_P99 = 100


def sentence_of(parts: Iterable[str]) -> str:
    """These parts as one sentence, without a full stop."""
    text = ", ".join(filter(None, parts))
    return text[0].upper() + text[1:]


def ratio_words(ratio: Ratio) -> str:
    """A ratio with its interval: ``0.880× (0.860 to 0.902)``."""
    value, low, high = (_near_one(end, 3) for end in (ratio.ratio, ratio.low, ratio.high))
    return f"{value}× ({low} to {high})"


def _near_one(value: float, places: int) -> str:
    # Beside 1 these places tell a difference from none.
    return f"{value:.{places}f}" if 0.01 < value < 10 else number(value, 3)


def _clear(ratio: Ratio) -> bool:
    return not ratio.low <= 1 <= ratio.high


def speed_words(ratio: Ratio | None) -> str:
    """How the two compare in latency, in words."""
    if ratio is None:
        return "latency was not compared"
    if not _clear(ratio):
        return (
            "no clear difference in speed (B takes "
            f"{_near_one(ratio.low, 2)} to {_near_one(ratio.high, 2)} times as long)"
        )
    if ratio.ratio > 1:
        return f"B is {_growth(ratio.ratio, ratio.low, ratio.high, 'slower')}"
    # Twice as fast is 100% faster, as twice as slow is 100% slower.
    return f"B is {_growth(1 / ratio.ratio, 1 / ratio.high, 1 / ratio.low, 'faster')}"


def _growth(ratio: float, low: float, high: float, word: str) -> str:
    """``12% slower (10 to 14)``, or ``3.1× slower (3 to 3.2)`` from twice on."""
    if ratio >= 2:
        return f"{number(ratio)}× {word} ({number(low)} to {number(high)})"
    growth, least, most = (number(100 * (value - 1)) for value in (ratio, low, high))
    return f"{growth}% {word} ({least} to {most})"


def value_text(metric: str, value: float) -> str:
    """A value of a metric in its unit."""
    return distance(value) if metric == LOCALIZATION else number(value, 4)


def _called(judged: Judged) -> str:
    return "median localization error" if judged.metric == LOCALIZATION else judged.metric


def losses_of(quality: Iterable[Judged], outcome: str) -> tuple[str, ...]:
    """What is lost by the metrics of which that came out, with its limit, in words."""
    return tuple(loss_words(judged) for judged in quality if judged.outcome == outcome)


def loss_words(judged: Judged) -> str:
    """What is lost by a metric with its interval, its limit, and what would show it."""
    if math.isinf(judged.loss):
        return f"{_called(judged)}: {judged.method}"
    before, now = (value_text(judged.metric, v) for v in (judged.reference, judged.value))
    values = judged.loss, judged.low, judged.high, judged.max_loss
    loss, low, high, limit = map(judged.said, values)
    told = f"{_called(judged)} {before} to {now}, a loss of {loss} ({low} to {high}), limit {limit}"
    return "; ".join(filter(None, (told, judged.missing)))


def quality_words(answers: Answers) -> Iterator[str]:
    """How the two compare in their task, in words."""
    if not answers.quality:
        yield "quality was not compared"
    for judged in answers.quality:
        yield ", ".join(filter(None, (_difference(judged), judged.missing)))
    least = min((judged.samples for judged in answers.quality), default=answers.samples)
    if left_out := answers.samples - least:
        yield f"{count_of(left_out, 'sample')} left out of that (NaN or Inf in one or both)"


def _difference(judged: Judged) -> str:
    if math.isinf(judged.loss):
        return f"{judged.method} in B by the {_called(judged)}"
    before, now = (value_text(judged.metric, v) for v in (judged.reference, judged.value))
    if judged.low <= 0 <= judged.high:
        return f"no clear difference in {_called(judged)} ({now})"
    ends = sorted(map(abs, (judged.low, judged.high)))
    loss, low, high = map(judged.said, (abs(judged.loss), *ends))
    word = "worse" if judged.loss > 0 else "better"
    return f"B's {_called(judged)} is {loss} {word} ({low} to {high}), {now} after {before}"


def moved_words(answers: Answers) -> str:
    """How far the answers lie apart, in words."""
    moved = answers.displacement
    if moved is None:
        return output_words(answers)
    if moved.lost:
        return f"{moved.lost:,} of {answers.samples:,} positions are NaN or Inf in one of them"
    if math.isnan(moved.max_m):
        return "no position is finite in both"
    if moved.max_m == 0:
        return "no position moves"
    if moved.metres.size < _SAMPLES_FOR_P99:
        return f"positions move by {distance(moved.max_m)} at most"
    return f"positions move by {distance(moved.p99_m)} at p99"


def _change(output: ErrorStatistics) -> float:
    """How much it changes relative to how far its values lie apart."""
    if output.nonfinite_mismatches:
        return math.inf
    span = output.highest - output.lowest
    return output.p99 / (span or math.ulp(0.0)) if output.p99 > 0 else 0.0


def output_words(answers: Answers) -> str:
    """How much the output changes that changes most, in words."""
    most = max(answers.outputs, key=_change)
    called, unit = f"the output {name(most.output)}", after(most.unit)
    if most.nonfinite_mismatches:
        return (
            f"{most.nonfinite_mismatches:,} of {most.count:,} values of {called} are NaN or Inf in "
            "one of them"
        )
    if math.isnan(most.maximum):
        return f"no value of {called} is finite in both"
    if not any(output.maximum for output in answers.outputs):
        return "no output changes"
    several = " most relative to their span," if len(answers.outputs) > 1 else ""
    change = f"the values of {name(most.output)} change{several} by"
    if most.count < _SAMPLES_FOR_P99:
        return f"{change} {number(most.maximum)}{unit} at most"
    return f"{change} {number(most.p99)}{unit} at p99"


def gate_words(changed: Sequence[GatePair]) -> str:
    """How many gates change, and which."""
    if not changed:
        return "no gate changes"
    told = "; ".join(f"{name(gate.name, 40)} {gate.change}" for gate in changed[:3])
    more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
    verb = "changes" if len(changed) == 1 else "change"
    return f"{count_of(len(changed), 'gate')} {verb} ({told}{more})"
