"""What a run itself costs: wall-clock time and memory, step by step.

In a notebook every cell belongs to the step whose function it calls, so that the steps add up to
the whole run and the cells stay free of measuring.
"""

from __future__ import annotations

import ast
import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from heimdall_onnx.common.machine import peak_memory_bytes, reset_peak_memory

# Which step a function is the work of; a cell is taken by the first of these that it calls.
STEPS = {
    "load_checkpoint": "checkpoint",
    "load_evaluation_data": "evaluation data",
    "export_model": "export",
    "validate_model": "validation",
    "compare_outputs": "parity",
    "compare_levels": "parity",
    "locate_departure": "departure",
    "trace_depth": "departure",
    "benchmark_model": "latency",
    "compare_member": "members",
    "assess_members": "members",
    "compare_variants": "variants",
    "measure_roofline": "roofline",
    "profile_variants": "operator times",
    "upload_release": "upload",
    "register_release": "registration",
    "plot": "figures",
    "explore_parity": "figures",
}
IMPORTS, OTHER = "imports", "other cells"


@dataclass(frozen=True)
class StepCost:
    """What one step took.

    Attributes:
        step: Its name, e.g. ``"export"``.
        seconds: Wall-clock time.
        peak_memory_bytes: Largest resident size of the process meanwhile; None where it was not
            measured. Processes that the step started are not in it.
    """

    step: str
    seconds: float
    peak_memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy."""
        return {**asdict(self), "seconds": round(self.seconds, 3)}


class CostWatch:
    """Sums up time and memory by step."""

    def __init__(self) -> None:
        self._found: dict[str, StepCost] = {}

    def add(self, step: str, seconds: float, peak_memory_bytes: int | None = None) -> None:
        """Add to a step: its times are summed, of its peaks the largest is kept."""
        known = self._found.get(step, StepCost(step, 0.0))
        peaks = [p for p in (known.peak_memory_bytes, peak_memory_bytes) if p is not None]
        self._found[step] = StepCost(step, known.seconds + seconds, max(peaks, default=None))

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the block as part of a step."""
        reset_peak_memory()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started, _peak_if_known())

    def costs(self) -> tuple[StepCost, ...]:
        """Every step so far, in the order in which they began."""
        return tuple(self._found.values())


def watch_cells() -> CostWatch:
    """Measure every cell of the running notebook from here on, the current one included."""
    from IPython.core.getipython import get_ipython

    watch = CostWatch()
    shell = get_ipython()
    if shell is None:  # a plain script has no cells
        return watch
    started = time.perf_counter()

    def begin(_: Any) -> None:
        nonlocal started
        reset_peak_memory()
        started = time.perf_counter()

    def end(result: Any) -> None:
        step = step_of(result.info.raw_cell)
        watch.add(step, time.perf_counter() - started, _peak_if_known())

    shell.events.register("pre_run_cell", begin)
    shell.events.register("post_run_cell", end)
    return watch


def step_of(source: str) -> str:
    """The step that a cell belongs to, from the functions that it calls."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic, for example
        return OTHER
    if any(isinstance(statement, ast.ImportFrom) for statement in statements):
        return IMPORTS
    called = (
        node.func.value if isinstance(node.func, ast.Attribute) else node.func
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    )
    names = (node.id for node in called if isinstance(node, ast.Name))
    return next((STEPS[name] for name in names if name in STEPS), OTHER)


def _peak_if_known() -> int | None:
    try:
        return peak_memory_bytes()
    except OSError:  # what a run costs must not be what it fails on
        return None
