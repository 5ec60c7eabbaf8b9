"""Parity at ONNX Runtime's optimization levels, and the operators that each brings.

The file is the same at each level; what differs is how far ONNX Runtime rewrites it before it
runs. An error that is there without any rewriting was exported; one that comes with a level was
made by what that level does, a fusion for example.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.evidence.parity.rounding import Rounding
from heimdall_onnx.evidence.parity.statistics import ErrorAccumulator, ErrorStatistics
from heimdall_onnx.model.inference import OptimizationLevel, open_session, run_onnx, run_pytorch

if TYPE_CHECKING:
    from onnxruntime import InferenceSession
    from torch import nn

    from heimdall_onnx.common.arrays import Arrays, Floats
    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.evidence.parity.report import ParityReport

log = get_logger(__name__)

LEVELS: tuple[OptimizationLevel, ...] = ("none", "basic", "all")


@dataclass(frozen=True)
class LevelParity:
    """What one optimization level does.

    Attributes:
        level: ``"none"``, ``"basic"`` or ``"all"``, the one that is deployed.
        outputs: Error statistics per output, in the signature's order.
        operators: Names of those that ran.
    """

    level: OptimizationLevel
    outputs: tuple[ErrorStatistics, ...]
    operators: frozenset[str]

    @property
    def excess(self) -> float:
        """The largest error in units of what is allowed."""
        return max(output.excess for output in self.outputs)

    @property
    def holds(self) -> bool:
        """Whether every element is within its tolerance."""
        return not any(o.violations or o.nonfinite_mismatches for o in self.outputs)


@dataclass(frozen=True)
class LevelReport:
    """The same parity at every optimization level.

    Attributes:
        levels: From none to all.
        source: What was compared, in words.
    """

    levels: tuple[LevelParity, ...]
    source: str


def compare_levels(
    model: nn.Module,
    onnx_path: Path,
    data: EvaluationData,
    report: ParityReport,
    *,
    samples: int = 8,
) -> LevelReport:
    """Compare both models at every optimization level, one session at a time.

    Args:
        model: The PyTorch model, in eval mode.
        onnx_path: The ONNX file.
        data: Evaluation inputs; ``samples`` of them are taken, evenly spaced.
        report: What `compare_outputs` found; the batch with its largest error is compared too.
        samples: Evaluation samples.

    Raises:
        InvalidModelError: If ONNX Runtime can't load the file.
        EvidenceError: If a model can't run on the inputs.
    """
    some, rounding = data.spread(samples), Rounding(model, report.signature)
    batches = [(1.0, batch) for _, batch, _ in some.batches(report.cells[0].batch_size)]
    cases, limits = [], {o.output: o.limit for o in report.evaluation}
    for factor, batch in (*batches, (report.worst_factor, report.worst_inputs)):
        expected = run_pytorch(model, batch, report.signature)
        spread = rounding.spread(batch, expected, limits)
        cases.append(_Case(factor, batch, expected, spread))
    levels = tuple(_at_level(level, onnx_path, cases, report) for level in LEVELS)
    source = f"{some.count} samples of {report.source}, and the worst batch: {report.worst_where}"
    log.info("compared_levels", excess={found.level: found.excess for found in levels})
    return LevelReport(levels, source)


class _Case(NamedTuple):
    """A batch, what its tolerance is multiplied by, and what PyTorch answers."""

    factor: float
    inputs: Arrays
    expected: Arrays
    spread: Callable[[], Mapping[str, Floats]]


def _at_level(
    level: OptimizationLevel, path: Path, cases: Sequence[_Case], report: ParityReport
) -> LevelParity:
    with tempfile.TemporaryDirectory(prefix="heimdall-profile-") as folder:
        session = open_session(path, level=level, spinning=False, profile=Path(folder) / "run")
        found = [run_onnx(session, cases[0].inputs, report.signature)]
        operators = _operators(session)
        found += [run_onnx(session, case.inputs, report.signature) for case in cases[1:]]
    statistics = []
    for spec in report.signature.outputs:
        parts = []
        for case, value in zip(cases, found, strict=True):
            accumulator = ErrorAccumulator(spec, report.limit(spec.name).times(case.factor))
            accumulator.update(case.expected[spec.name], value[spec.name], 0, case.spread)
            parts.append(accumulator.result())
        statistics.append(max(parts, key=lambda part: (part.violations > 0, part.excess)))
    return LevelParity(level, tuple(statistics), operators)


def _operators(session: InferenceSession) -> frozenset[str]:
    """The operators that have run so far, from ONNX Runtime's own record; it ends with this."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return frozenset(
        event["args"]["op_name"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
