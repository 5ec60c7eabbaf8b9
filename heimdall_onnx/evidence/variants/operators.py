"""Where the time of a call goes, operator by operator, from ONNX Runtime's own profiler.

Read it beside a latency, not instead of one: the profiler's own records lengthen a call, most where
there are many short nodes.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import FP32
from heimdall_onnx.evidence.variants.tuning import LATENCY
from heimdall_onnx.model.inference import open_session, run_onnx
from heimdall_onnx.model.runtimes import CPU, SessionSettings

if TYPE_CHECKING:
    from heimdall_onnx.common.arrays import Arrays, Floats
    from heimdall_onnx.data.evaluation import EvaluationData
    from heimdall_onnx.evidence.variants.search import VariantsReport
    from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)

_WARMUP_CALLS = 3
_SLOWEST = 10
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator together.

    Attributes:
        name: The operator's type as it ran, after ONNX Runtime's optimizations, such as
            ``"FusedConv"``.
        nodes: How many nodes of it ran in a call.
        ms: Time in them, milliseconds a call; median over the calls.
        share: That, as a share of the whole call.
    """

    name: str
    nodes: int
    ms: float
    share: float


@dataclass(frozen=True)
class NodeTime:
    """One node.

    Attributes:
        name: Of the node in the graph that ran.
        operator: Its operator's type.
        ms: Time in it, milliseconds a call; median over the calls.
    """

    name: str
    operator: str
    ms: float


@dataclass(frozen=True)
class OperatorTimes:
    """The time of a call, taken apart.

    Attributes:
        total_ms: Duration of a call as the profiler says, milliseconds; median over the calls.
        operators: By type, the longest time first.
        slowest: The nodes with the longest times, the slowest first.
        between_ms: What of a call lies outside of every node: the runtime's own, and the
            profiler's; milliseconds, median over the calls.
        calls: How many were counted.
    """

    total_ms: float
    operators: tuple[OperatorTime, ...]
    slowest: tuple[NodeTime, ...]
    between_ms: float
    calls: int


def measure_operator_times(
    path: Path,
    inputs: Arrays,
    signature: Signature,
    settings: SessionSettings,
    *,
    calls: int = 20,
) -> OperatorTimes:
    """Run the model under ONNX Runtime's profiler, and sum its record by operator and by node.

    The record's format is the trace event format, a complete event for each node and each call;
    events of the nodes of a subgraph lie within that of the node that runs it, and count there.

    Args:
        path: The ONNX file.
        inputs: One call's inputs.
        signature: Names and order of inputs and outputs.
        settings: With how many threads it runs, and how far ONNX Runtime rewrites it before.
        calls: Counted calls; a few more are made before them, to warm up.

    Raises:
        InvalidModelError: If ONNX Runtime can't load the file.
        EvidenceError: If it can't run the model on the inputs, or its record is not complete.
    """
    with tempfile.TemporaryDirectory(prefix="heimdall-profile-") as folder:
        session = open_session(
            path,
            threads=settings.thread_count,
            level=settings.level,
            profile=Path(folder) / "run",
        )
        for _ in range(_WARMUP_CALLS + calls):
            run_onnx(session, inputs, signature)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spans = ((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    runs = sorted(spans)[_WARMUP_CALLS:]
    if len(runs) != calls:
        raise EvidenceError(
            f"ONNX Runtime's profiler recorded {len(runs)} of {calls} calls of {path.name}"
        )
    found = _sum_up(runs, list(_nodes(events)))
    log.info("operator_times", model=path.name, total_ms=found.total_ms, calls=calls)
    return found


def profile_variants(
    data: EvaluationData, signature: Signature, report: VariantsReport | None, *, calls: int = 20
) -> tuple[tuple[str, OperatorTimes], ...]:
    """Operator times of fp32 and of the recommended variant, as far as ONNX Runtime runs them.

    Args:
        data: Its first samples are the inputs.
        signature: Names and order of inputs and outputs.
        report: The variants; None if none were asked for.
        calls: Counted calls of each.

    Raises:
        InvalidModelError: If ONNX Runtime can't load a file.
        EvidenceError: If it can't run a model, or its record is not complete.
    """
    if report is None:
        return ()
    inputs = data.rows(range(report.against_pytorch.batch_size))
    shown = {variant.name: variant for variant in (report.variant(FP32), report.best)}
    return tuple(
        (
            variant.name,
            measure_operator_times(
                variant.path,
                inputs,
                signature,
                variant.sessions[LATENCY],
                calls=calls,
            ),
        )
        for variant in shown.values()
        if variant.settings.provider == CPU and variant.path is not None
    )


def _nodes(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The events of the nodes in order of time, without those within another."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    end = 0
    # Of two that begin in the same microsecond, the longer one is outside.
    for event in sorted(kernels, key=lambda e: (e["ts"], -e["dur"])):
        if event["ts"] >= end:
            end = event["ts"] + event["dur"]
            yield event


def _sum_up(runs: list[tuple[int, int]], events: list[dict[str, Any]]) -> OperatorTimes:
    starts, ends = np.array(runs).T
    # Of each node, how long it took in each call.
    by_node: dict[tuple[int, str, str], Floats] = defaultdict(lambda: np.zeros(len(runs)))
    for event in events:
        call = int(np.searchsorted(starts, event["ts"], side="right")) - 1
        if call >= 0 and event["ts"] < ends[call]:
            name, asked = event["name"].removesuffix(_KERNEL), event["args"]
            by_node[asked["node_index"], name, asked["op_name"]][call] += event["dur"]
    by_operator: dict[str, list[Floats]] = defaultdict(list)
    for (_, _, operator), durations in by_node.items():
        by_operator[operator].append(durations)
    total = _median_ms(ends - starts)
    operators = [
        OperatorTime(
            operator, len(nodes), (ms := _median_ms(sum(nodes))), ms / total if total else 0.0
        )
        for operator, nodes in by_operator.items()
    ]
    nodes = [NodeTime(name, op, _median_ms(found)) for (_, name, op), found in by_node.items()]
    return OperatorTimes(
        total_ms=total,
        operators=tuple(sorted(operators, key=lambda found: -found.ms)),
        slowest=tuple(sorted(nodes, key=lambda found: -found.ms)[:_SLOWEST]),
        between_ms=_median_ms(ends - starts - sum(by_node.values())),
        calls=len(runs),
    )


def _median_ms(durations: Any) -> float:
    return float(np.median(durations)) / 1000
