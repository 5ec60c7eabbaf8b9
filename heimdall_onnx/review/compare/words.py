"""What a comparison found, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from heimdall_onnx.common.text import after, count_of, distance, name, number
from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.review.compare.answers import Answers, LocalizationErrors
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


def error_words(errors: LocalizationErrors | None) -> Iterator[str]:
    """How the two compare in localization error, in words."""
    if errors is None:
        yield "localization error was not compared"
        return
    ratio = errors.ratio
    a, b = errors.medians_m
    if ratio is None:
        yield f"median localization error {distance(a)} (A) and {distance(b)} (B), not compared"
    elif not _clear(ratio):
        yield f"no clear difference in localization error (median {distance(b)})"
    elif ratio.ratio >= 2:
        yield f"B's median error is {ratio_words(ratio)} that of A"
    elif ratio.ratio > 1:
        yield f"B's median error is {_growth(ratio.ratio, ratio.low, ratio.high, 'larger')}"
    else:
        less, least, most = (
            number(100 * (1 - end)) for end in (ratio.ratio, ratio.high, ratio.low)
        )
        yield f"B's median error is {less}% smaller ({least} to {most})"
    if ratio is not None and errors.left_out:
        yield f"{count_of(errors.left_out, 'sample')} left out of that (NaN or Inf in one or both)"


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
