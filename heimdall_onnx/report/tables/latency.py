"""Tables of latency: percentiles, throughput, the machine and its processors."""

from __future__ import annotations

from collections.abc import Iterator

from IPython.display import Markdown

from heimdall_onnx.common.text import number
from heimdall_onnx.common.verdict import unless_not_measured
from heimdall_onnx.evidence.latency.benchmark import LatencyReport, PairLatency
from heimdall_onnx.evidence.latency.contenders import ContenderLatency
from heimdall_onnx.evidence.latency.cores import Cores
from heimdall_onnx.evidence.latency.machine_state import MachineState
from heimdall_onnx.evidence.latency.members import MemberComparison
from heimdall_onnx.evidence.latency.statistics import (
    Speedup,
    Throughput,
    min_queries,
    offline_throughput,
)
from heimdall_onnx.report.tables.table import table

_Sides = tuple[ContenderLatency, ContenderLatency]


@unless_not_measured
def latency_table(report: LatencyReport) -> Markdown:
    """Latency of both contenders with intervals, and what stands beside it."""
    both = (report.pytorch, report.onnx)
    return table(
        (f"batch {report.batch_size}, {report.threads} threads", *(c.name for c in both)),
        [
            *_percentile_rows(both),
            ("p90 after MLPerf's single stream, 99% confidence, ms", *map(_single_stream, both)),
            *_call_rows(both),
            *(
                (
                    f"samples per second at batch {batch.batch_size}",
                    *(
                        throughput_text(offline_throughput(ms, batch.batch_size))
                        for ms in (batch.pytorch_ms, batch.onnx_ms)
                    ),
                )
                for batch in report.batches
            ),
            _memory_row(both),
            (f"speedup ({report.confidence:.0%} interval)", "1", _of_pairs(report.speedup)),
            ("stationary", *map(_steadiness, both)),
        ],
    )


@unless_not_measured
def pair_table(report: PairLatency) -> Markdown:
    """Latency of two ONNX models that took turns, the one in the ratio's denominator first."""
    both = (report.second, report.first)
    return table(
        (f"batch {report.batch_size}", *(c.name for c in both)),
        [
            *_percentile_rows(both),
            *_call_rows(both),
            _memory_row(both),
            (f"latency beside {both[0].name} (95% interval)", "1", _of_pairs(report.speedup, 3)),
            ("stationary", *map(_steadiness, both)),
        ],
    )


@unless_not_measured
def member_table(found: MemberComparison | None) -> Markdown | None:
    """What an ensemble costs beside one of its members; None for a model without members."""
    if found is None:
        return None
    latency, sides = found.latency, found.latency.contenders
    return table(
        (f"batch {latency.batch_size}", *(side.name for side in sides)),
        [
            ("networks", found.members, 1),
            ("p50, ms", *(percentile_text(side, 50.0) for side in sides)),
            ("latency beside the single member", _of_pairs(latency.speedup), "1"),
            ("loading the model, ms", *(number(side.load_ms, 3) for side in sides)),
            _memory_row(sides),
            (
                "size of the file, MB",
                *(f"{size / 1e6:,.1f}" for size in (found.size_bytes, found.member_size_bytes)),
            ),
        ],
    )


@unless_not_measured
def machine_table(report: LatencyReport | PairLatency) -> Markdown:
    """Which machine it was, and what it did while latency was measured on it."""
    cores = report.cores if isinstance(report, LatencyReport) else None
    rows = [*_core_rows(cores), *_machine_rows(report.machine)]
    return table(("machine", "while it was measured"), rows)


def _percentile_rows(sides: _Sides) -> Iterator[tuple[object, ...]]:
    for wanted in sorted({p.percentile for side in sides for p in side.percentiles}):
        yield f"p{wanted:g}, ms", *(percentile_text(side, wanted) for side in sides)


def _call_rows(sides: _Sides) -> Iterator[tuple[object, ...]]:
    yield "mean, ms", *(number(side.mean_ms, 3) for side in sides)
    yield "counted calls", *(side.samples_ms.size for side in sides)
    yield "loading the model, ms", *(number(side.load_ms, 3) for side in sides)
    yield "first call, ms", *(number(side.first_call_ms, 3) for side in sides)


def _memory_row(sides: _Sides) -> tuple[str, ...]:
    used = (f"{side.peak_memory_bytes / 1e6:,.0f}" for side in sides)
    return "peak memory of the process, MB", *used


def _of_pairs(speedup: Speedup, places: int = 2) -> str:
    return f"{ratio_text(speedup, places)}, {speedup.pairs} pairs of blocks"


def ratio_text(speedup: Speedup, places: int = 2) -> str:
    """A ratio with its interval."""
    ends = f"{speedup.low:.{places}f} to {speedup.high:.{places}f}"
    return f"{speedup.ratio:.{places}f} ({ends})"


def _core_rows(cores: Cores | None) -> Iterator[tuple[str, str]]:
    if cores is None:
        return
    yield "measured on", str(cores)
    yield (
        "exclusively ours",
        "yes, held against other measurements"
        if cores.exclusive
        else "not held: other measurements may have run there (parameter exclusive_cores)",
    )


def _machine_rows(machine: MachineState) -> Iterator[tuple[str, str]]:
    yield "watched", f"{machine.seconds:.1f} s"
    yield (
        "load average before and after",
        f"{machine.load_before:.2f} and {machine.load_after:.2f}",
    )
    frequency = machine.frequency_mhz
    yield (
        "processor frequency, MHz",
        "the machine does not tell"
        if frequency is None
        else "median {1:,.0f} ({0:,.0f} to {2:,.0f})".format(*frequency),
    )
    yield (
        "processors busy, with everything that ran",
        _share(machine.busy_share, "watched too shortly"),
    )
    yield (
        "taken by other virtual machines (steal)",
        _share(machine.steal_share, "the system does not count it"),
    )
    yield (
        "periods held back by a CPU quota",
        "the system does not count them" if machine.throttled is None else f"{machine.throttled:,}",
    )
    for gpu in machine.gpus or ():
        clocks, powers = (
            " and ".join("not told" if value is None else f"{value:,.0f}" for value in pair)
            for pair in (gpu.sm_clock_mhz, gpu.power_w)
        )
        yield f"GPU {gpu.index} before and after", f"SM clock {clocks} MHz, power {powers} W"


def _share(share: float | None, unknown: str) -> str:
    return unknown if share is None else f"{share:.1%}"


def _single_stream(contender: ContenderLatency) -> str:
    found = contender.single_stream
    if found is None:
        return f"too few calls, {min_queries()} needed"
    return f"{number(found.value_ms, 3)} ({found.discarded} slowest of {found.queries} left out)"


def _steadiness(contender: ContenderLatency) -> str:
    found = contender.stationarity
    return "too few calls" if found is None else found.sentence


def throughput_text(found: Throughput) -> str:
    """Samples per second with their interval."""
    return f"{found.samples_per_second:,.1f} ({found.low:,.1f} to {found.high:,.1f})"


def percentile_text(contender: ContenderLatency, wanted: float) -> str:
    """A percentile of the latency with its interval, or that too few calls show it."""
    found = contender.percentile(wanted)
    if found is None:
        return "too few calls"
    value, low, high = (number(ms, 3) for ms in (found.value_ms, found.low_ms, found.high_ms))
    return f"{value} ({low} to {high})"
