"""The gates of a release: on its file, its parity, its coverage and its processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from heimdall_onnx.common.verdict import Gate, Verdict
from heimdall_onnx.evidence.latency.timed import TimedSteps

if TYPE_CHECKING:
    from heimdall_onnx.common.parameters import ReleaseParameters
    from heimdall_onnx.evidence.parity.report import ParityReport
    from heimdall_onnx.evidence.parity.uncertainty import UncertaintyReport
    from heimdall_onnx.model.onnx.validate import ModelInfo


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
    opset = parameters.opset
    gates = [
        Gate("opset", f"= {opset}", info.opset_version, info.opset_version == opset),
        Gate.none_of("signature", info.signature_problems),
        *parity.gates(),
        *coverage_gates(parity.uncertainty, parameters.min_coverage),
    ]
    if parameters.exclusive_cores and parameters.measure_latency:
        # A notebook that times nothing through it has held nothing.
        gates.append((timed or TimedSteps(parameters)).gate())
    return Verdict(tuple(gates), parameters.profile)


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
