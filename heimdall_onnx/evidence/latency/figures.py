"""What a release records of latency: every statistic, and none of the single calls."""

from __future__ import annotations

from dataclasses import dataclass

from heimdall_onnx.evidence.latency.cores import Cores
from heimdall_onnx.evidence.latency.machine_state import MachineState
from heimdall_onnx.evidence.latency.statistics import (
    Percentile,
    Speedup,
    Stationarity,
    Throughput,
)


@dataclass(frozen=True, kw_only=True)
class ContenderFigures:
    """One contender; the times are milliseconds.

    Attributes:
        name: ``"PyTorch"``, ``"ONNX Runtime"``, or that of a variant.
        calls: Counted calls.
        percentiles: Those with enough calls behind them.
        stationarity: How the latency moved meanwhile; None from too few calls.
        median_ms: Median of the counted calls.
        mean_ms: Their mean.
        load_ms: Reading the model.
        first_call_ms: The first call after that.
        peak_memory_bytes: Largest resident size of its process up to the last counted call;
            further batch sizes come after that and have no part in it.
    """

    name: str
    calls: int
    percentiles: tuple[Percentile, ...]
    stationarity: Stationarity | None
    median_ms: float
    mean_ms: float
    load_ms: float
    first_call_ms: float
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Two contenders, in turns.

    Attributes:
        speedup: The first one's latency over the second one's.
        batch_size: Samples in a call.
        contenders: Both.
        machine: What the machine did while they took turns.
    """

    speedup: Speedup
    batch_size: int
    contenders: tuple[ContenderFigures, ContenderFigures]
    machine: MachineState | None = None

    @property
    def unsteady(self) -> str:
        """What must be said beside latencies of a machine that was not steady, else empty."""
        # Blocks next to each other share what lasts, and not what comes and goes.
        if all(one.stationarity is None or one.stationarity.holds for one in self.contenders):
            return ""
        return "the machine was not steady meanwhile, so measure again before you rely on it"


@dataclass(frozen=True, kw_only=True)
class LatencyFigures(Turns):
    """The PyTorch model and the ONNX model, in turns.

    Attributes:
        threads: Intra-op threads of each.
        confidence: Of every interval.
        cores: The processors that both ran on.
    """

    threads: int
    confidence: float
    cores: Cores | None = None


@dataclass(frozen=True, kw_only=True)
class PairFigures(Turns):
    """Two models, in turns.

    Attributes:
        throughput: Of both at a larger batch size; empty if none was asked for.
        on_device_ms: Median of the second one's calls without the way to its GPU and back; None
            where it runs on the processor.
    """

    throughput: tuple[Throughput, ...] = ()
    on_device_ms: float | None = None


@dataclass(frozen=True, kw_only=True)
class MemberFigures:
    """What an ensemble costs beside a single one of its members.

    Attributes:
        members: How many there are.
        latency: The ensemble and its first member.
        size_bytes: Of the ensemble's ONNX file, external data included.
        member_size_bytes: Of the member's.
    """

    members: int
    latency: PairFigures
    size_bytes: int
    member_size_bytes: int
