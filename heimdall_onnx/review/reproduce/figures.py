"""The figures of a repetition beside the recorded ones, each with a judgement.

Quantiles over more values than the sketch behind them keeps are estimates that differ from run to
run (see `evidence.parity.statistics`), so those are held against each other within `ESTIMATE`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heimdall_onnx.common.environment import NUMERICAL
from heimdall_onnx.evidence.latency.timed import EXCLUSIVE_CORES
from heimdall_onnx.evidence.parity.report import NOISE_FLOOR_FACTOR, THIS_PROCESS, tolerance_factor
from heimdall_onnx.model.signature import Signature

# Fewer values are kept as they are.
SKETCHED = 384
# Of the value; three standard errors of a sketch's rank are a tenth of this for a smooth quantity.
ESTIMATE = 0.05
_QUANTILES = ("p50", "p99", "p999", "ulp_p50", "ulp_p999")
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


def environment_differences(
    recorded: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[Difference, ...]:
    """In what the environments of two records differ.

    Args:
        recorded: What `archive.record.record_results` kept of a release.
        found: What it kept of another run.
    """
    old, new = ({**r["environment"], "threads": r["threads"]} for r in (recorded, found))
    by = [(r["parity"] or {}).get("evaluated_by", THIS_PROCESS) for r in (recorded, found)]
    was, has = recorded["distributions"], found["distributions"]
    compared = (
        *(
            (what, old.get(name), new.get(name), numerical)
            for what, name, numerical in (
                ("Python", "python", True),
                ("processor", "cpu", True),
                ("processors in use", "processors", True),
                ("threads", "threads", True),
                ("system", "system", False),
                ("git commit", "git_commit", False),
                ("uncommitted changes", "git_dirty", False),
            )
        ),
        ("evaluated by", *by, True),
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


def compare_accuracy(
    recorded: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool
) -> tuple[Comparison, ...]:
    """Hold parity, localization errors and gates of a repetition against the recorded ones.

    Args:
        recorded: What `archive.record.record_results` kept of the release.
        found: What it kept of the repetition.
        exact: Whether the figures must be the same, as in the same environment. Elsewhere they may
            differ by the tolerances of the gates: errors by that of the mean absolute error (ten
            times that on adversarial inputs), outputs by that of the elements, errors against
            float64 by the noise floor, metres by what the elements' tolerance is on the ground.
    """
    old, new = recorded["parity"], found["parity"]
    return tuple(
        _hold(what, before, after, rule, exact)
        for what, before, after, rule in (
            *_gates(recorded["gates"], found["gates"], exact),
            ("evaluation samples", old["samples"], new["samples"], _Rule()),
            *_cells(old, new),
            *_noise_floor(old["noise_floor"], new["noise_floor"]),
            *_independence(old, new["independence"]),
            *_ground(recorded, new["ground"] or {}),
            *_uncertainty(old, new),
        )
    )


def compare_latency(
    recorded: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[Comparison, ...]:
    """Hold latency and speedup of a repetition against the recorded ones, with their intervals.

    Empty where the release has not measured latency; then its repetition does not either.
    """
    old, new = recorded["latency"], found["latency"]
    if old is None:
        return ()
    figures = [_interval("speedup", _ends(old["speedup"], "ratio"), _ends(new["speedup"], "ratio"))]
    others = {contender["name"]: contender for contender in new["contenders"]}
    for before in old["contenders"]:
        name, after = before["name"], others.get(before["name"], {})
        again = {p["percentile"]: p for p in after.get("percentiles", [])}
        figures += [
            _interval(
                f"{name}, p{p['percentile']:g} (ms)",
                _ends(p, "value_ms"),
                _ends(again.get(p["percentile"], {}), "value_ms"),
            )
            for p in before["percentiles"]
        ]
        figures += [
            _hold(f"{name}, {what}", before[key], after.get(key), _Rule(None), exact=False)
            for what, key in (
                ("counted calls", "calls"),
                ("mean (ms)", "mean_ms"),
                ("loading the model (ms)", "load_ms"),
                ("first call (ms)", "first_call_ms"),
                ("peak memory of the process (bytes)", "peak_memory_bytes"),
            )
        ]
    return tuple(figures)


def compare_recorded_variants(
    recorded: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool
) -> tuple[Comparison, ...]:
    """Hold the variants of a repetition against the recorded ones.

    They must be calibrated on the same inputs. What each is and how good its answers are must be
    the same in the same environment. In another one quantizers and kernels are others, so that
    files and figures are shown only, and a variant that does not pass there or can't be run is
    flagged. So is anywhere that another one is recommended, since latency decides on that.

    Args:
        recorded: What `archive.record.record_results` kept of the release.
        found: What it kept of the repetition.
        exact: Whether the environment is the same.
    """
    old, new = recorded.get("variants"), found.get("variants") or {}
    if not old:
        return ()
    was, has = (side.get("calibration", {}).get("sha256") for side in (old, new))
    compared = [
        _flag("recommended variant", old["recommended"], new.get("recommended")),
        _hold("calibration inputs, SHA-256", was, has, _Rule(), exact),
    ]
    again = {one["name"]: one for one in new.get("judged", [])}
    for one in old["judged"]:
        name, other = one["name"], again.get(one["name"], {})
        status = f"variant {name}, status"
        now = other.get("status")
        compared.append(
            _hold(status, one["status"], now, _Rule(), exact)
            if exact
            else _flag(status, one["status"], now)
        )
        figures = {what: value for what, value, _ in _figures_of_variant(other)}
        compared += [
            _hold(f"variant {name}, {what}", value, figures.get(what), rule, exact)
            for what, value, rule in _figures_of_variant(one)
        ]
        if one.get("latency"):
            timed, timed_again = one["latency"], other.get("latency") or {}
            ends = _ends(timed["speedup"], "ratio"), _ends(timed_again.get("speedup", {}), "ratio")
            compared.append(_interval(f"variant {name}, speedup", *ends))
        before, after = (json.dumps(side.get("sessions"), sort_keys=True) for side in (one, other))
        options = f"variant {name}, session options"
        compared.append(_hold(options, before, after, _Rule(None), exact=False))
    return tuple(compared)


def _figures_of_variant(
    variant: Mapping[str, Any],
) -> Iterator[tuple[str, Figure, _Rule]]:
    """What a variant is and how good its answers are, figure by figure."""
    accuracy = dict(variant.get("accuracy") or {})
    for output in accuracy.pop("outputs", ()):
        estimated = output["count"] >= SKETCHED
        for name, value in output.items():
            if name not in ("output", "unit"):
                rule = _Rule(None, estimated=estimated and name in _QUANTILES)
                yield f"{output['output']}, {name}", value, rule
    kept = ", ".join(variant.get("kept_in_float", ()))
    made = {"sha256": variant.get("sha256"), "modules kept in float": kept}
    for name, value in _flattened({**made, **accuracy}):
        yield name, value, _Rule(None)


def _flag(what: str, old: Figure, new: Figure) -> Comparison:
    """A figure that may differ, and is pointed out where it does."""
    if old == new:
        return Comparison(what, old, new, "identical", "as recorded")
    return Comparison(what, old, new, "flagged", "should be as recorded")


def _flattened(value: Any, name: str = "") -> Iterator[tuple[str, Figure]]:
    """Every single value in a nested one, called after where it is."""
    if isinstance(value, Mapping | list):
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in entries:
            yield from _flattened(inner, f"{name} {key}".strip())
    else:
        yield name, value


_Ruled = tuple[str, Figure, Figure, _Rule]


def _hold(what: str, old: Figure, new: Figure, rule: _Rule, exact: bool) -> Comparison:
    if old == new:
        return Comparison(what, old, new, "identical", "as recorded")
    if rule.limit is None and not exact:
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


def _number(value: Figure) -> float:
    """Of text and of what is missing NaN, which is within nothing."""
    return float(value) if isinstance(value, int | float) else math.nan


def _gates(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]], exact: bool
) -> Iterator[_Ruled]:
    again = {gate["name"]: gate for gate in new}
    for gate in old:
        if gate["name"] == EXCLUSIVE_CORES:
            continue  # it says nothing of the model, and a repetition does not demand it
        other = again.get(gate["name"], {"passed": None, "measured": None})
        yield f"gate {gate['name']}, passed", gate["passed"], other["passed"], _Rule()
        if exact:
            # Elsewhere its figure stands below, with a tolerance.
            yield f"gate {gate['name']}, measured", gate["measured"], other["measured"], _Rule()


def _cells(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[_Ruled]:
    again = {
        (cell["kind"], cell["batch_size"], output["output"]): output
        for cell in new["cells"]
        for output in cell["outputs"]
    }
    for index, cell in enumerate(old["cells"]):
        kind, size = cell["kind"], cell["batch_size"]
        # The first is the whole evaluation data, the others of that kind some samples of it.
        where = f"{kind if index else f'all {kind}'}, batch {size}"
        # What older versions did not write was judged as adversarial.
        factor = tolerance_factor(kind, cell.get("valid", False))
        for output in cell["outputs"]:
            other = again.get((kind, size, output["output"]), {})
            for name, value in output.items():
                if name not in ("output", "unit"):
                    rule = _cell_rule(name, output, factor * old["tolerance"], factor * old["rtol"])
                    what = f"{output['output']}, {name} ({where})"
                    yield what, value, other.get(name), rule


def _cell_rule(name: str, output: Mapping[str, Any], atol: float, rtol: float) -> _Rule:
    estimated = output["count"] >= SKETCHED
    elements = "the tolerance of the elements"
    rules = {
        "mean": _Rule(atol, "the tolerance of the mean absolute error"),
        "maximum": _Rule(atol, elements),
        "excess": _Rule(1.0, f"{elements}, which is its unit"),
        "cosine": _Rule(rtol, f"the relative part of {elements}"),
        **{p: _Rule(atol, elements, estimated=estimated) for p in _QUANTILES[:3]},
        **{p: _Rule(None, estimated=estimated) for p in _QUANTILES[3:]},
        **{
            end: _Rule(atol + rtol * abs(_number(output[end])), elements)
            for end in ("lowest", "highest")
        },
    }
    # Counts: of elements, of those beyond tolerance, of those that are NaN or Inf.
    return rules.get(name, _Rule())


def _noise_floor(
    old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> Iterator[_Ruled]:
    again = {floor["output"]: floor for floor in new}
    for floor in old:
        other = again.get(floor["output"], {})
        limit = NOISE_FLOOR_FACTOR * _number(floor["pytorch_error"]) + _number(floor["ulp"])
        rule = _Rule(limit, "the limit of the noise floor")
        for what, key in (("ONNX", "onnx_error"), ("PyTorch", "pytorch_error")):
            named = f"{floor['output']}, mean error of {what} against float64"
            yield named, floor[key], other.get(key), rule


def _independence(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[_Ruled]:
    recorded, elements = old["independence"], "the tolerance of the elements"
    for what, key, rule in (
        ("largest change of a row's answer", "largest_error", _Rule(old["tolerance"], elements)),
        ("in units of the tolerance", "excess", _Rule(1.0, f"{elements}, which is its unit")),
        ("comparisons", "comparisons", _Rule()),
    ):
        yield f"batch independence, {what}", recorded[key], new.get(key), rule


def _uncertainty(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[_Ruled]:
    again = {report["who"]: report["calibration"] or {} for report in new.get("uncertainty", ())}
    for report in old.get("uncertainty", ()):
        who, before = report["who"], report["calibration"] or {}
        after = again.get(who, {})
        shares = {c["nominal"]: c["observed"] for c in after.get("coverage", ())}
        # Rounding can move a position over the edge of an ellipse, a few of them at most.
        rule = _Rule(3 / max(report["samples"], 1), "three samples")
        for c in before.get("coverage", ()):
            what = f"coverage of the {c['nominal']:.0%} ellipse, {who}"
            yield what, c["observed"], shares.get(c["nominal"]), rule
        for what, key in (
            ("negative log-likelihood", "nll"),
            ("calibration error", "calibration_error"),
        ):
            if key in before:
                yield f"{what}, {who}", before[key], after.get(key), _Rule(None)


def _ground(recorded: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[_Ruled]:
    parity = recorded["parity"]
    if parity["ground"] is None:
        return
    metres = _metres(recorded)
    source = "the tolerance of the elements on the ground"
    estimated = parity["samples"] >= SKETCHED
    for what, key, quantile in (
        ("median displacement (m)", "displacement_p50_m", True),
        ("p99 displacement (m)", "displacement_p99_m", True),
        ("largest displacement (m)", "displacement_max_m", False),
    ):
        rule = _Rule(metres, source, estimated=estimated and quantile)
        yield what, parity["ground"][key], new.get(key), rule
    again = {task["who"]: task for task in new.get("task", [])}
    rule = _Rule(metres, source, estimated=estimated, binding=True)
    for task in parity["ground"]["task"]:
        other = again.get(task["who"], {})
        for what, key in (("median", "median_m"), ("p95", "p95_m")):
            name = f"localization error of {task['who']}, {what} (m)"
            yield name, task[key], other.get(key), rule


def _metres(recorded: Mapping[str, Any]) -> float:
    """The elements' tolerance at the largest recorded coordinate, in metres."""
    parity = recorded["parity"]
    position = Signature.from_dict(recorded["model"]["signature"]).position_output
    largest = max(
        abs(_number(output[end]))
        for output in parity["cells"][0]["outputs"]
        if position is not None and output["output"] == position.name
        for end in ("lowest", "highest")
    )
    return float(METRES_PER_DEGREE * (parity["tolerance"] + parity["rtol"] * largest))


_Interval = tuple[float, float, float]


def _ends(figure: Mapping[str, Any], value: str) -> _Interval | None:
    """Value, lower and upper end; None where there is no such figure."""
    unit = value.removeprefix("value").removeprefix("ratio")
    return (figure[value], figure[f"low{unit}"], figure[f"high{unit}"]) if figure else None


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
