"""What the search for variants finds, and what it costs, out of the record of a release."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from processes import PSS_EVERY_S, Run

from heimdall_onnx.archive.record import require_record
from heimdall_onnx.evidence.variants.figures import VariantFigures
from heimdall_onnx.evidence.variants.roofline import Machine

# Least speedup over PyTorch eager, largest file in MB; of the recommended variant.
TARGETS = {"tiny": (5.5, None), "large": (8.0, 230.0)}
MEMORY_GB = 4.5

Found = tuple[str, float | None, bool, str, tuple[float, ...], str]


def rows_of(size: str, done: Run) -> Iterator[Found]:
    """Name, target, whether that is the least, unit, values and method of each row.

    Args:
        size: Of the reference model.
        done: A release with variants that has ended, with ``--json``.
    """
    result = json.loads(done.output.splitlines()[-1])
    report = Path(result["local_report"]).with_suffix(".ipynb")
    record = require_record(report.read_bytes(), report.name)
    assert record.variants is not None
    assert record.roofline is not None
    variants, shown = record.variants, size.capitalize()
    judged = {variant.name: variant for variant in variants.judged}
    best = judged[variants.recommended]
    least, largest = TARGETS[size]
    speedup = variants.against_pytorch.speedup
    yield (
        f"{shown}: {best.name} (recommended) / PyTorch eager, batch 1",
        least,
        True,
        "×",
        (speedup.ratio,),
        f"95% {speedup.low:.2f} to {speedup.high:.2f}, {speedup.pairs} pairs of blocks, "
        f"processes of their own in turns; {', '.join(record.environment.instruction_sets)}; "
        f"{_said(judged)}",
    )
    yield (
        f"{shown}: size of the recommended variant",
        largest,
        False,
        "MB",
        (best.size_bytes / 1e6,),
        f"fp32: {judged['fp32'].size_bytes / 1e6:.1f}",
    )
    for row in record.roofline.rows:
        if row.name in {"fp32", best.name} and row.floor is not None:
            yield (
                f"{shown}: {row.name} / its floor, batch {row.batch_size}",
                None,
                False,
                "×",
                (row.measured_ms / row.floor.ms,),
                f"{row.measured_ms:.1f} ms of {row.floor.ms:.1f}; peaks as measured in this run: "
                f"{_peaks(record.roofline.machine)}",
            )
    seconds = sum(c["seconds"] for c in result["costs"] if c["step"] == "variants")
    yield (
        f"{shown}: the search",
        None,
        False,
        "s",
        (seconds,),
        f"{len(judged)} variants, profile quick: made, judged, timed, tuned; the whole release "
        f"{done.seconds:.0f} s",
    )
    yield (
        f"{shown}: peak memory of a release with all variants",
        MEMORY_GB,
        False,
        "GB",
        (done.peak_bytes / 1e9,),
        f"proportional set sizes of all its processes, read every {PSS_EVERY_S} s at most",
    )
    for name, times in record.operator_times.items():
        longest = times.operators[:4]
        yield (
            f"{shown}: a call of {name} under ONNX Runtime's profiler",
            None,
            False,
            "ms",
            (times.total_ms,),
            ", ".join(f"{o.name} {o.ms:.2f} ({o.share:.0%})" for o in longest),
        )


def _said(judged: dict[str, VariantFigures]) -> str:
    """Ratios with fp32 of what passed, and what did not."""
    ratios = [
        f"{name} {variant.latency.speedup.ratio:.2f}"
        for name, variant in judged.items()
        if variant.passed and variant.latency is not None and name != "fp32"
    ]
    others = [f"{name} {v.status}" for name, v in judged.items() if not v.passed]
    return f"× fp32: {', '.join(ratios) or 'none'}; {', '.join(others)}"


def _peaks(machine: Machine) -> str:
    rates = (f"{precision} {rate:.0f}·10⁹/s" for precision, rate in machine.peaks.items())
    return f"{machine.bandwidth_gb_s:.1f} GB/s, {', '.join(rates)}"
