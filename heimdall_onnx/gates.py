"""Gates and the verdict: every gate is evaluated, then the run fails once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heimdall_onnx.errors import GateError

if TYPE_CHECKING:
    from heimdall_onnx.compare import ParityReport
    from heimdall_onnx.cores import TimedSteps
    from heimdall_onnx.parameters import ReleaseParameters
    from heimdall_onnx.uncertainty import UncertaintyReport
    from heimdall_onnx.validate import ModelInfo


@dataclass(frozen=True)
class Gate:
    """A named condition with its limit and the value that was measured.

    Attributes:
        name: What is gated, e.g. ``"mean absolute error"``.
        limit: The condition in words, e.g. ``"≤ 1e-05"``.
        measured: The measured value.
        passed: Whether the condition holds.
        detail: Where the measured value was found, or what is wrong.
    """

    name: str
    limit: str
    measured: float | int | str
    passed: bool
    detail: str = ""

    @classmethod
    def at_most(cls, name: str, limit: float, measured: float, detail: str = "") -> Gate:
        """A gate that holds for ``measured <= limit``; NaN never passes."""
        return cls(name, f"≤ {limit:g}", measured, bool(measured <= limit), detail)

    @classmethod
    def none_of(cls, name: str, problems: Iterable[str]) -> Gate:
        """A gate that holds when there are no ``problems``, which become its detail."""
        found = tuple(problems)
        return cls(name, "0 problems", len(found), not found, "; ".join(found))

    def summary(self) -> str:
        """The gate on one line, with its limit and measured value."""
        found = f"{self.name}: expected {self.limit}, measured {_number(self.measured)}"
        return found + (f" ({self.detail})" if self.detail else "")

    def as_shown(self) -> dict[str, Any]:
        """The gate as a reader sees it: its measured value as text."""
        return {**self.to_dict(), "measured": _number(self.measured)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; a measured NaN or Inf becomes text, as JSON has neither."""
        measured = self.measured
        if isinstance(measured, float) and not math.isfinite(measured):
            measured = str(measured)
        return {
            "name": self.name,
            "limit": self.limit,
            "measured": measured,
            "passed": self.passed,
            "detail": self.detail,
        }


@dataclass(frozen=True)
class AccuracyLimits:
    """How much a variant may lose.

    Attributes:
        error_growth: Share by which the median and the 95th percentile of the localization error
            may grow.
        nll_growth: Share by which the negative log-likelihood may grow; of one nat where it is
            smaller than that.
        displacement_sigma: Without labels: largest 99th percentile of the displacement, in units of
            the predicted standard deviation.
        output_noise: For a model without positions and their deviation: largest relative error
            of an output, its RMS over the RMS of the reference about its mean.
    """

    error_growth: float = 0.01
    nll_growth: float = 0.01
    displacement_sigma: float = 0.25
    output_noise: float = 0.01


@dataclass(frozen=True)
class Verdict:
    """All gates of a run together.

    Attributes:
        gates: Every gate, evaluated.
        profile: How much was measured (``smoke``, ``quick`` or ``audit``).
    """

    gates: tuple[Gate, ...]
    profile: str

    @property
    def passed(self) -> bool:
        """Whether there are gates and every one holds."""
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    @property
    def failed_gates(self) -> tuple[Gate, ...]:
        """The gates that do not hold."""
        return tuple(gate for gate in self.gates if not gate.passed)

    def summary(self) -> str:
        """How many gates do not hold, and which."""
        names = ", ".join(gate.name for gate in self.failed_gates)
        return f"{len(self.failed_gates)} of {len(self.gates)} gates failed: {names}"

    def reasons(self) -> str:
        """Every gate that does not hold, with its limit and measured value, one a line."""
        lines = [gate.summary() for gate in self.failed_gates]
        return f"{len(lines)} of {len(self.gates)} gates failed:\n  - " + "\n  - ".join(lines)

    def require(self) -> None:
        """Return if every gate holds.

        Raises:
            GateError: With the `reasons`.
        """
        if not self.passed:
            raise GateError(self.reasons())

    def failed_first(self) -> tuple[Gate, ...]:
        """The gates, those that do not hold before the others."""
        return tuple(sorted(self.gates, key=lambda gate: gate.passed))

    def to_markdown(self) -> str:
        """The gates as a Markdown table, failed ones first."""
        return "\n".join(
            ["| gate | result | limit | measured | where |", "|---|---|---|---|---|"]
            + [
                f"| {escape_markdown(g.name)} | {'pass' if g.passed else '**FAIL**'} "
                f"| {escape_markdown(g.limit)} | {escape_markdown(_number(g.measured))} "
                f"| {escape_markdown(g.detail)} |"
                for g in self.failed_first()
            ]
        )

    def _repr_markdown_(self) -> str:
        return self.to_markdown()


def file_gates(info: ModelInfo, opset: int) -> tuple[Gate, ...]:
    """The gates on the file itself: the opset that was asked for, and the signature."""
    return (
        Gate("opset", f"= {opset}", info.opset_version, info.opset_version == opset),
        Gate.none_of("signature", info.signature_problems),
    )


def decide(
    parameters: ReleaseParameters,
    info: ModelInfo,
    parity: ParityReport,
    timed: TimedSteps | None = None,
) -> Verdict:
    """Evaluate every gate of a release.

    Args:
        parameters: Of the release.
        info: What the file says of itself.
        parity: What the comparison found.
        timed: What has run the steps that are timed, which knows whether the processors were
            exclusively this process's.
    """
    gates = (
        *file_gates(info, parameters.opset),
        *parity.gates(),
        *coverage_gates(parity.uncertainty, parameters.min_coverage),
        *_core_gates(parameters, timed),
    )
    return Verdict(gates, parameters.profile)


def _core_gates(parameters: ReleaseParameters, timed: TimedSteps | None) -> tuple[Gate, ...]:
    """The gate on exclusive processors; none where they are not asked for, or nothing is timed."""
    from heimdall_onnx.cores import TimedSteps

    if not (parameters.exclusive_cores and parameters.measure_latency):
        return ()
    # A notebook that times nothing through it has held nothing.
    return ((timed or TimedSteps(parameters)).gate(),)


def coverage_gates(
    uncertainty: Sequence[UncertaintyReport], min_coverage: float
) -> tuple[Gate, ...]:
    """The gate that demands coverage of the ONNX model's 90 % ellipse; none where 0 is demanded.

    What is demanded must be shown: the lower end of the confidence interval has to reach it, so
    that a few samples that happen to be covered prove nothing. A model whose ellipse holds 90 % of
    them shows 0.8 with about seventy samples, 0.85 with some two hundred, and 0.9 itself never.

    Args:
        uncertainty: What the comparison found, for both models; empty without labels.
        min_coverage: What is demanded, below 1.
    """
    if min_coverage == 0:
        return ()
    name = "coverage of the 90% ellipse"
    limit = f"≥ {min_coverage:g} at the lower end of its 95% interval"
    found = next((report for report in uncertainty if report.who == "ONNX"), None)
    if found is None or found.calibration is None:
        missing = (
            "the evaluation data has no true positions (array `positions`), or the model none"
            if found is None
            else "the model predicts no deviations: its signature names no output as `sigma_of` or "
            "`log_variance_of` the positions"
        )
        return (Gate(name, limit, "unknown", False, missing),)
    coverage = found.calibration.coverage_of(0.9)
    detail = (
        f"ONNX, {coverage.low:.3g} to {coverage.high:.3g} over {found.samples} labelled samples"
    )
    if unusable := found.calibration.nonfinite:
        detail += f", {unusable} of them without usable position or deviations"
    if coverage.low < min_coverage <= coverage.observed:
        detail += ": too few to show what is demanded"
    return (Gate(name, limit, coverage.observed, coverage.low >= min_coverage, detail),)


_MARKDOWN = str.maketrans({c: f"&#{ord(c)};" for c in "&\\`*{}[]<>|#~$@"})
# Within a word an underscore is only that.
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ADDRESS = re.compile(r":(?=//)|(?<=www)\.", re.IGNORECASE)


def escape_markdown(text: str) -> str:
    """``text`` as one line of inert Markdown: no table breaks, no HTML, no links, no formulas.

    Renderers make links of bare addresses too, so these lose their colon. What can't be seen, or
    turns the direction of what follows, is shown as its code.
    """
    line = " ".join(text.split()).translate(_MARKDOWN)
    line = "".join(c if c.isprintable() else f"&#92;u{ord(c):04x}" for c in line)
    for pattern in (_EMPHASIS, _ADDRESS):
        line = pattern.sub(lambda found: f"&#{ord(found[0])};", line)
    return line


def _number(value: float | int | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
