"""The figures of a repetition beside the recorded ones, each with a judgement.

Quantiles over more values than the sketch behind them keeps are estimates that differ from run to
run (see `evidence.parity.statistics`), so those are held against each other within `ESTIMATE`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from heimdall_onnx.common.environment import NUMERICAL
from heimdall_onnx.evidence.latency.timed import EXCLUSIVE_CORES

if TYPE_CHECKING:
    from heimdall_onnx.archive.record import Record
    from heimdall_onnx.evidence.latency.statistics import Speedup
    from heimdall_onnx.evidence.parity.report import ParityFigures
    from heimdall_onnx.evidence.parity.statistics import ErrorStatistics
    from heimdall_onnx.evidence.parity.tolerance import Limit

# Fewer values are kept as they are.
SKETCHED = 384
# Of the value; three standard errors of a sketch's rank are a tenth of this for a smooth quantity.
ESTIMATE = 0.05
_QUANTILES = ("p50", "p99", "p999", "ulp_p50", "ulp_p999")
_NO_FIGURES = {"output", "unit", "worst", "left_open", "atol", "rtol", "shares"}
# One degree of a meridian at the poles, where it is longest (WGS84).
METRES_PER_DEGREE = 111_700.0

Figure = float | int | str | bool | None
Agreement = Literal["identical", "within", "differs", "flagged", "not judged"]


@dataclass(frozen=True)
class Difference:
    """Something in which two environments differ.

    Attributes:
        what: What it is, e.g. ``"package torch"``.
        recorded: In the release; None where it was not there.
        found: In the other; None where it is not there.
        numerical: Whether figures may differ because of it.
    """

    what: str
    recorded: Figure
    found: Figure
    numerical: bool


@dataclass(frozen=True)
class Comparison:
    """A recorded figure and the one that was found again.

    Attributes:
        what: Which figure.
        recorded: As the release has it; NaN and Inf as text.
        found: As the repetition has it; None where it has none.
        judgement: ``identical``; ``within`` what the rule allows; ``differs``, which is a failure;
            ``flagged``, which is none; or ``not judged``.
        rule: What was allowed, in words.
        recorded_interval: Confidence interval of the recorded figure, where it has one.
        found_interval: That of the other.
    """

    what: str
    recorded: Figure
    found: Figure
    judgement: Agreement
    rule: str
    recorded_interval: tuple[float, float] | None = None
    found_interval: tuple[float, float] | None = None


def environment_differences(recorded: Record, found: Record) -> tuple[Difference, ...]:
    """In what the environments of two records differ."""
    was, has = recorded.distributions, found.distributions
    compared = (
        *(
            (what, *map(attrgetter(name), (recorded, found)), numerical)
            for what, name, numerical in (
                ("Python", "environment.python", True),
                ("processor", "environment.cpu", True),
                ("processors in use", "environment.processors", True),
                ("threads", "threads", True),
                ("system", "environment.system", False),
                ("git commit", "environment.git_commit", False),
                ("uncommitted changes", "environment.git_dirty", False),
                ("evaluated by", "parity.evaluated_by", True),
            )
        ),
        *(
            (f"package {name}", was.get(name), has.get(name), name in NUMERICAL)
            for name in sorted(was.keys() | has.keys())
        ),
    )
    return tuple(Difference(*each) for each in compared if each[1] != each[2])


@dataclass(frozen=True)
class _Rule:
    """What a figure may differ by.

    Attributes:
        limit: In its unit, in another environment; None where it is not judged there.
        source: Which tolerance that is.
        estimated: Whether it is an estimate.
        binding: Whether an estimate outside the rule is a failure.
    """

    limit: float | None = 0.0
    source: str = ""
    estimated: bool = False
    binding: bool = False


_SAME, _SHOWN = _Rule(), _Rule(None)
# Never judged, not even here: what is tuned owes something to chance.
_OPTIONS = _Rule(None)
_ELEMENTS = "the tolerance of the elements"
_UNITS = _Rule(1.0, f"{_ELEMENTS}, which is its unit")
# Each figure of one record: what it is, its value, and what another one may differ by.
_Figures = Iterator[tuple[str, Figure, _Rule]]
_Interval = tuple[float, float, float]


def compare_accuracy(recorded: Record, found: Record, *, exact: bool) -> tuple[Comparison, ...]:
    """Hold parity, localization errors and gates of a repetition against the recorded ones.

    Args:
        recorded: Of the release.
        found: Of the repetition.
        exact: Whether the figures must be the same, as in the same environment. Elsewhere they may
            differ by the tolerances of the gates: errors by that of the mean absolute error (ten
            times that on adversarial inputs), outputs by that of the elements, errors against
            float64 by the noise floor, metres by what the elements' tolerance is on the ground.
    """

    def figures(record: Record) -> _Figures:
        yield from _gates(record, exact)
        yield "evaluation samples", record.parity.samples, _SAME
        yield from _cells(record.parity)
        yield from _noise_floor(record.parity)
        yield from _independence(record.parity)
        yield from _quality(record.parity)
        yield from _ground(record)
        yield from _uncertainty(record.parity)

    return tuple(_held(figures(recorded), figures(found), exact=exact))


def compare_latency(recorded: Record, found: Record) -> tuple[Comparison, ...]:
    """Hold latency and speedup of a repetition against the recorded ones, with their intervals.

    Empty where the release has not measured latency; then its repetition does not either.
    """
    again = dict(_intervals(found))
    return tuple(_interval(what, ends, again.get(what)) for what, ends in _intervals(recorded))


def _intervals(record: Record) -> Iterator[tuple[str, _Interval]]:
    if record.latency is None:
        return
    yield "speedup", _ends(record.latency.speedup)
    for one in record.latency.contenders:
        for p in one.percentiles:
            yield f"{one.name}, p{p.percentile:g} (ms)", (p.value_ms, p.low_ms, p.high_ms)


def compare_recorded_variants(
    recorded: Record, found: Record, *, exact: bool
) -> tuple[Comparison, ...]:
    """Hold the variants of a repetition against the recorded ones.

    They must be calibrated on the same inputs. What each is and how good its answers are must be
    the same in the same environment. In another one quantizers and kernels are others, so that
    files and figures are shown only, and a variant that does not pass there or can't be run is
    flagged. So is anywhere that another one is recommended, since latency decides on that.

    Args:
        recorded: Of the release.
        found: Of the repetition.
        exact: Whether the environment is the same.
    """
    old, new = recorded.variants, found.variants
    if old is None:
        return ()
    again = {one.name: one for one in new.judged} if new else {}
    compared = [_flag("recommended variant", old.recommended, new.recommended if new else None)]
    for one in old.judged:
        what, other = f"variant {one.name}", again.get(one.name)
        status = f"{what}, status", one.status, other.status if other else None
        compared.append(_hold(*status, _SAME, exact) if exact else _flag(*status))
        if one.latency is not None:
            timed = _ends(other.latency.speedup) if other and other.latency else None
            compared.append(_interval(f"{what}, speedup", _ends(one.latency.speedup), timed))
    return (*compared, *_held(_variants(recorded), _variants(found), exact=exact))


def _variants(record: Record) -> _Figures:
    if (variants := record.variants) is None:
        return
    yield "calibration inputs, SHA-256", variants.calibration.sha256, _SAME
    for one in variants.judged:
        what = f"variant {one.name}"
        for output in one.accuracy.outputs if one.accuracy else ():
            estimated = output.count >= SKETCHED
            for name, value in _figures_of(output):
                rule = _Rule(None, estimated=estimated and name in _QUANTILES)
                yield f"{what}, {output.output}, {name}", value, rule
        yield f"{what}, sha256", one.sha256, _SHOWN
        yield f"{what}, modules kept in float", ", ".join(one.kept_in_float), _SHOWN
        accuracy = asdict(replace(one.accuracy, outputs=())) if one.accuracy else {}
        for name, value in _flattened(accuracy):
            yield f"{what}, {name}", value, _SHOWN
        sessions = {purpose: settings.to_dict() for purpose, settings in one.sessions.items()}
        yield f"{what}, session options", json.dumps(sessions, sort_keys=True), _OPTIONS


def _figures_of(output: ErrorStatistics) -> Iterator[tuple[str, Figure]]:
    return ((name, value) for name, value in vars(output).items() if name not in _NO_FIGURES)


def _flag(what: str, old: Figure, new: Figure) -> Comparison:
    """A figure that may differ, and is pointed out where it does."""
    if old == new:
        return Comparison(what, old, new, "identical", "as recorded")
    return Comparison(what, old, new, "flagged", "should be as recorded")


def _flattened(value: Any, name: str = "") -> Iterator[tuple[str, Figure]]:
    """Every single value in a nested one, called after where it is."""
    if isinstance(value, Mapping | tuple):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in entries:
            yield from _flattened(inner, f"{name} {key}".strip())
    else:
        yield name, value


def _held(recorded: _Figures, found: _Figures, *, exact: bool) -> Iterator[Comparison]:
    again = {what: value for what, value, _ in found}
    for what, value, rule in recorded:
        yield _hold(what, value, again.get(what), rule, exact)


def _hold(what: str, before: Figure, after: Figure, rule: _Rule, exact: bool) -> Comparison:
    old, new = _written(before), _written(after)
    if old == new:
        return Comparison(what, old, new, "identical", "as recorded")
    if rule.limit is None and (rule is _OPTIONS or not exact):
        return Comparison(what, old, new, "not judged", "shown only")
    limit = 0.0 if exact or rule.limit is None else rule.limit
    words = [f"{limit:.3g}, {rule.source}"] if limit else []
    if rule.estimated:
        limit += ESTIMATE * abs(_number(old))
        words.append(f"{ESTIMATE:.0%}, since it is an estimate")
    allowed = f"may differ by {' and '.join(words)}" if words else "must be as recorded"
    if abs(_number(new) - _number(old)) <= limit:
        return Comparison(what, old, new, "within", allowed)
    flagged = rule.estimated and not rule.binding
    return Comparison(what, old, new, "flagged" if flagged else "differs", allowed)


def _written(value: Figure) -> Figure:
    """NaN and Inf as text: so they can be written, and each is what it is."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Figure) -> float:
    """Of text and of what is missing NaN, which is within nothing."""
    return float(value) if isinstance(value, int | float) else math.nan


def _gates(record: Record, exact: bool) -> _Figures:
    for gate in record.gates:
        if gate.name == EXCLUSIVE_CORES:
            continue  # it says nothing of the model, and a repetition does not demand it
        yield f"gate {gate.name}, passed", gate.passed, _SAME
        if exact:
            # Elsewhere its figure stands below, with a tolerance.
            yield f"gate {gate.name}, measured", gate.measured, _SAME


def _cells(parity: ParityFigures) -> _Figures:
    for index, cell in enumerate(parity.cells):
        # The first is the whole evaluation data, the others of that kind some samples of it.
        where = f"{cell.kind if index else f'all {cell.kind}'}, batch {cell.batch_size}"
        for output in cell.outputs:
            rules = _rules_of(output, parity.limit(output.output).times(cell.factor))
            for name, value in _figures_of(output):
                # Others are counts: of elements, of those beyond tolerance, of NaN or Inf.
                yield f"{output.output}, {name} ({where})", value, rules.get(name, _SAME)


def _rules_of(output: ErrorStatistics, limit: Limit) -> dict[str, _Rule]:
    atol, rtol = limit.atol, limit.rtol
    estimated = output.count >= SKETCHED
    return {
        "mean": _Rule(atol, "the tolerance of the mean absolute error"),
        "maximum": _Rule(atol, _ELEMENTS),
        "excess": _UNITS,
        "cosine": _Rule(rtol, f"the relative part of {_ELEMENTS}"),
        **{p: _Rule(atol, _ELEMENTS, estimated=estimated) for p in _QUANTILES[:3]},
        **{p: _Rule(None, estimated=estimated) for p in _QUANTILES[3:]},
        "lowest": _Rule(atol + rtol * abs(output.lowest), _ELEMENTS),
        "highest": _Rule(atol + rtol * abs(output.highest), _ELEMENTS),
    }


def _noise_floor(parity: ParityFigures) -> _Figures:
    for floor in parity.noise_floor:
        rule = _Rule(floor.limit, "the limit of the noise floor")
        for who, value in (("ONNX", floor.onnx_error), ("PyTorch", floor.pytorch_error)):
            yield f"{floor.output}, mean error of {who} against float64", value, rule


def _independence(parity: ParityFigures) -> _Figures:
    what, found = "batch independence", parity.independence
    changed = _Rule(parity.tolerance, _ELEMENTS)
    yield f"{what}, largest change of a row's answer", found.largest_error, changed
    yield f"{what}, in units of the tolerance", found.excess, _UNITS
    yield f"{what}, comparisons", found.comparisons, _SAME


def _uncertainty(parity: ParityFigures) -> _Figures:
    for report in parity.uncertainty:
        who, found = report.who, report.calibration
        if found is None:
            continue
        # Rounding can move a position over the edge of an ellipse, a few of them at most.
        rule = _Rule(3 / max(report.samples, 1), "three samples")
        for c in found.coverage:
            yield f"coverage of the {c.nominal:.0%} ellipse, {who}", c.observed, rule
        yield f"negative log-likelihood, {who}", found.nll, _SHOWN
        yield f"calibration error, {who}", found.calibration_error, _SHOWN


def _quality(parity: ParityFigures) -> _Figures:
    for judged in parity.quality:
        # What may be lost to another model may not be lost to a repetition.
        most = _Rule(abs(judged.high - judged.low) / 2, "half of the interval of the loss")
        yield f"{judged.metric} of PyTorch", judged.reference, _SHOWN
        yield f"{judged.metric} of ONNX", judged.value, _SHOWN
        yield f"loss of {judged.metric}", judged.loss, most


def _ground(record: Record) -> _Figures:
    if (ground := record.parity.ground) is None:
        return
    metres, source = _metres(record), f"{_ELEMENTS} on the ground"
    estimated = record.parity.samples >= SKETCHED
    quantile = _Rule(metres, source, estimated=estimated)
    yield "median displacement (m)", ground.displacement_p50_m, quantile
    yield "p99 displacement (m)", ground.displacement_p99_m, quantile
    yield "largest displacement (m)", ground.displacement_max_m, _Rule(metres, source)
    rule = replace(quantile, binding=True)
    for task in ground.task:
        yield f"localization error of {task.who}, median (m)", task.median_m, rule
        yield f"localization error of {task.who}, p95 (m)", task.p95_m, rule


def _metres(record: Record) -> float:
    """The elements' tolerance at the largest recorded coordinate, in metres."""
    parity, position = record.parity, record.model.signature.position_output
    largest = max(
        abs(end)
        for output in parity.evaluation
        if position is not None and output.output == position.name
        for end in (output.lowest, output.highest)
    )
    return METRES_PER_DEGREE * (parity.tolerance + parity.rtol * largest)


def _ends(found: Speedup) -> _Interval:
    return found.ratio, found.low, found.high


def _interval(what: str, old: _Interval | None, new: _Interval | None) -> Comparison:
    assert old is not None
    rule = "should lie in the recorded interval, or the intervals overlap"
    if new is None:
        return Comparison(what, old[0], None, "flagged", rule, old[1:])
    if old[0] == new[0]:
        judgement: Agreement = "identical"
    elif old[1] <= new[0] <= old[2] or (new[1] <= old[2] and old[1] <= new[2]):
        judgement = "within"
    else:
        judgement = "flagged"
    return Comparison(what, old[0], new[0], judgement, rule, old[1:], new[1:])
