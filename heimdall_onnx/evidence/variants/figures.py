"""What a release records of its variants: what became of each, and all that was measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from heimdall_onnx.common.parameters import MODEL, AccuracyLimits
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.latency.figures import PairFigures
from heimdall_onnx.evidence.variants.accuracy import AccuracyFigures
from heimdall_onnx.evidence.variants.calibration import CalibrationFigures
from heimdall_onnx.evidence.variants.tuning import Trial
from heimdall_onnx.model.runtimes import SessionSettings


@dataclass(frozen=True)
class VariantFigures:
    """A variant with its evidence.

    Attributes:
        name: Its name.
        what: What it is, in a few words.
        precision: Of its multiplications.
        status: ``"passed"``, ``"failed"`` (a gate), ``"not shown"`` (too few samples to tell) or
            ``"unavailable"``.
        reason: Why it is not passed, in words.
        file: Its name within the release folder.
        sha256: SHA-256 of its file, that of fp32 where it has none of its own.
        size_bytes: Its length.
        ran_on: Execution provider or device, as the runtime told it; empty where it never ran.
        sessions: What it is opened with, for latency and for throughput.
        kept_in_float: Modules whose nodes are kept in float.
        gates: The gates of the task; empty for fp32, which has its own.
        latency: fp32 (first) and the variant in turns; None where it was not measured.
        accuracy: How its answers differ from those of fp32.
        tuning: Every option that was tried, for each purpose; only of the recommended one.
    """

    name: str
    what: str
    precision: str
    status: str
    reason: str = ""
    file: str = MODEL
    sha256: str = ""
    size_bytes: int = 0
    ran_on: str = ""
    sessions: dict[str, SessionSettings] = field(default_factory=dict)
    kept_in_float: tuple[str, ...] = ()
    gates: tuple[Gate, ...] = field(default=(), repr=False)
    latency: PairFigures | None = field(default=None, repr=False)
    accuracy: AccuracyFigures | None = field(default=None, repr=False)
    tuning: dict[str, tuple[Trial, ...]] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        """Whether it may be used."""
        return self.status == "passed"


@dataclass(frozen=True)
class VariantsFigures:
    """Every variant that was asked for.

    Attributes:
        recommended: Name of the fastest that passed.
        calibration: What ranges were calibrated on.
        limits: Of the gates.
        against_pytorch: PyTorch (first) and the recommended variant, tuned, in turns.
        judged: The variants, fp32 first.
    """

    recommended: str
    calibration: CalibrationFigures = field(repr=False)
    limits: AccuracyLimits
    against_pytorch: PairFigures = field(repr=False)
    judged: tuple[VariantFigures, ...]
