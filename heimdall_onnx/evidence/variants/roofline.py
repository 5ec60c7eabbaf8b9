"""How near each run comes to what its machine allows: the roofline model.

A call can't be faster than its arithmetic at the processor's peak, nor than its traffic at the
memory's bandwidth (Williams, Waterman, Patterson: Roofline: An Insightful Visual Performance Model
for Multicore Architectures, Communications of the ACM 52(4), 2009). Both are measured here, with
the libraries that run the model, not read from a data sheet; so the distance between a run and its
floor is what a better program could still gain, and the floor is what only another precision,
another model or another machine can lower.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.machine import instruction_sets, last_level_cache_bytes, usable_processors
from heimdall_onnx.common.parameters import FP32
from heimdall_onnx.evidence.latency.contenders import Worker
from heimdall_onnx.model.inference import open_session, run_pytorch

if TYPE_CHECKING:
    import torch
    from torch import nn

    from heimdall_onnx.common.arrays import Arrays
    from heimdall_onnx.evidence.variants.search import VariantsReport
    from heimdall_onnx.model.signature import Signature

log = get_logger(__name__)

# Any of them: before these, bfloat16 is computed in float32, with conversions around it.
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}

# STREAM asks for arrays of at least four times the sum of all last-level caches
# (McCalpin, www.cs.virginia.edu/stream/ref.html).
_BEYOND_CACHE = 4
_LEAST_ARRAY = 256 << 20
_MOST_ARRAY = 1 << 30

_SIDE = 1024  # of the weights, which then stay in cache
_ROWS, _MOST_ROWS = 128, 8192
# Shorter products measure how threads are woken; longer ones are likelier to be interrupted.
_LONG_ENOUGH_S = 1e-3
_LEAST_CALLS = 3
_TURN_S = 0.02
_RISE, _LONGEST = 1.02, 4
_BANDWIDTH = "bandwidth"


@dataclass(frozen=True)
class Machine:
    """What a machine was measured to reach.

    Attributes:
        threads: Threads of every measurement.
        bandwidth_gb_s: Reading from memory, 10⁹ bytes a second.
        peaks: 10⁹ operations a second of a matrix product by precision, ``"f32"``, ``"int8"``,
            and ``"bf16"`` where the processor has it; a multiplication and an addition count as
            two.
        cache_bytes: All last-level caches that the processors reach together; 0 if unknown.
        instruction_sets: Of the processor, those that matter for inference.
    """

    threads: int
    bandwidth_gb_s: float
    peaks: dict[str, float]
    cache_bytes: int
    instruction_sets: tuple[str, ...]


@dataclass(frozen=True)
class Work:
    """What a model has to do, whatever runs it.

    Attributes:
        flops: Floating-point operations for one sample, in matrix products, convolutions and
            attention; a multiplication and an addition count as two.
        parameters: Number of weights.
    """

    flops: float
    parameters: int


@dataclass(frozen=True)
class Floor:
    """The least time that a call can take.

    Attributes:
        compute_ms: Its arithmetic at the machine's peak, milliseconds.
        memory_ms: Its weights at the memory's bandwidth, milliseconds.
    """

    compute_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The longer of the two, milliseconds: they may overlap completely, but no more."""
        return max(self.compute_ms, self.memory_ms)

    @property
    def bound(self) -> Literal["compute", "memory"]:
        """Which of the two it is."""
        return "compute" if self.compute_ms >= self.memory_ms else "memory"


@dataclass(frozen=True)
class RooflineRow:
    """A measured run beside its floor.

    Attributes:
        name: Of the variant.
        precision: In which it computes, as in `Machine.peaks`.
        size_bytes: Size of its file, which is taken for that of its weights.
        batch_size: Samples in a call.
        measured_ms: Latency of a call, milliseconds.
        floor: None where no peak was measured for its precision.
    """

    name: str
    precision: str
    size_bytes: int
    batch_size: int
    measured_ms: float
    floor: Floor | None

    @property
    def ratio(self) -> float | None:
        """Latency over its floor; None without a floor."""
        return self.measured_ms / self.floor.ms if self.floor and self.floor.ms > 0 else None


@dataclass(frozen=True)
class Roofline:
    """Runs of one model on one machine.

    Attributes:
        machine: What it reaches.
        work: What the model has to do.
        rows: A run each, in the order given.
    """

    machine: Machine
    work: Work
    rows: tuple[RooflineRow, ...]


def work_of(model: nn.Module, inputs: Arrays, signature: Signature) -> Work:
    """Count what ``model`` does for one sample.

    It is run once, and PyTorch counts the operators that pass its dispatcher; element-wise
    operators, normalizations, reductions and recurrent layers are not among those that it counts,
    so that a floor may be lower than it must be, never higher.

    Args:
        model: In eval mode.
        inputs: One call's inputs, of any batch size.
        signature: Names and order of inputs and outputs.

    Raises:
        EvidenceError: If the model fails on them.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from heimdall_onnx.model.inference import plain_attention

    # The fused layer of transformers is no operator that is counted; its parts are.
    with plain_attention(), FlopCounterMode(display=False) as counter:
        run_pytorch(model, inputs, signature)
    samples = len(inputs[signature.inputs[0].name])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Work(counter.get_total_flops() / samples, parameters)


def floor_of(
    work: Work, weight_bytes: int, precision: str, machine: Machine, batch_size: int
) -> Floor | None:
    """The least time that a call can take on ``machine``, whatever program runs it.

    It is a bound, not an estimate. All arithmetic is counted at the peak of ``precision``, also
    what a quantized model computes in float. Of the traffic only the weights are counted, once a
    call, and of them only what the last-level cache can't keep from one call to the next: weights
    that fit into it cost nothing. A program can be below it only by doing less than ``work`` says,
    with Winograd's convolutions for example.

    Args:
        work: What the model has to do for a sample.
        weight_bytes: Size of the weights as the run holds them.
        precision: In which it computes.
        machine: Measured with the run's number of threads.
        batch_size: Samples in a call.

    Returns:
        None where no peak was measured for ``precision``.
    """
    peak = machine.peaks.get(precision)
    if peak is None:
        return None
    read = max(0, weight_bytes - machine.cache_bytes)
    return Floor(
        compute_ms=work.flops * batch_size / peak / 1e6,
        memory_ms=read / machine.bandwidth_gb_s / 1e6,
    )


def measure_roofline(
    model: nn.Module, signature: Signature, report: VariantsReport | None
) -> Roofline | None:
    """Measure this machine, and put every variant that was timed beside its floor.

    Args:
        model: The PyTorch model, in eval mode, which says how much there is to do.
        signature: Names and order of inputs and outputs.
        report: The variants; their number of threads is the machine's here.

    Returns:
        None if no variants were asked for.

    Raises:
        BenchmarkError: If the machine can't be measured.
    """
    if report is None:
        return None
    machine = measure_machine(report.variant(FP32).settings.thread_count)
    # Inputs as they were measured: how much there is to do depends on their lengths.
    work = work_of(model, report.calibration.evaluation.rows([0]), signature)
    rows = []
    for variant in report.judged:
        if variant.latency is None:
            continue
        sizes = {variant.latency.batch_size: variant.latency.second.median_ms}
        for rate in variant.latency.throughput[1:]:
            sizes[rate.batch_size] = 1000 * rate.batch_size / rate.samples_per_second
        name, precision, size = variant.name, variant.multiplies_in, variant.weight_bytes
        for batch, ms in sizes.items():
            floor = floor_of(work, size, precision, machine, batch)
            rows.append(RooflineRow(name, precision, size, batch, ms, floor))
    log.info("roofline", ratios={f"{row.name}, batch {row.batch_size}": row.ratio for row in rows})
    return Roofline(machine, work, tuple(rows))


def measure_machine(threads: int | None = None, *, seconds: float = 1.0) -> Machine:
    """Measure what this machine reaches, in a process of its own.

    Of every measurement the fastest repetition counts, as in STREAM: a peak is what nothing else
    on the machine took away. The measurements take turns, so that a moment in which the machine is
    busy spoils none of them. Bandwidth is the faster of a sum and a scalar product over an array
    of at least four times the last-level caches (less on a machine with little memory). The peaks
    are of matrix products by 1,024 × 1,024 weights: float32 on PyTorch or on ONNX Runtime,
    whichever is faster, 8-bit integers on ONNX Runtime (unsigned activations, signed weights of
    seven bits, as ``MatMulInteger`` runs in quantized models), bfloat16 on PyTorch.

    Args:
        threads: Threads of every measurement; None takes all processors this process may use.
        seconds: Measure until nothing has become faster for so long, by more than 2%, at most four
            times that; starting the process comes on top.

    Raises:
        BenchmarkError: If the process dies, fails or does not answer in time.
    """
    threads = threads or usable_processors()
    with tempfile.TemporaryDirectory(prefix="heimdall-roofline-") as folder:
        found = Path(folder) / "rates.json"
        job = partial(measure_rates, found, threads, seconds)
        with Worker("the measurement of the machine", job, Path(folder), threads) as worker:
            worker.start()
        rates: dict[str, float] = json.loads(found.read_text(encoding="utf-8"))
    machine = Machine(
        threads=threads,
        bandwidth_gb_s=rates.pop(_BANDWIDTH),
        peaks=rates,
        cache_bytes=last_level_cache_bytes(),
        instruction_sets=instruction_sets(),
    )
    log.info(
        "measured_machine",
        threads=threads,
        bandwidth_gb_s=round(machine.bandwidth_gb_s, 1),
        peaks={precision: round(peak, 1) for precision, peak in machine.peaks.items()},
    )
    return machine


@dataclass(frozen=True)
class _Measurement:
    """A call to repeat, and what one repetition counts for: bytes or operations."""

    of: str
    amount: float
    call: Callable[[], object]

    def rate(self, seconds: float) -> float:
        """10⁹ bytes or operations a second in the fastest repetition, after one uncounted."""
        self.call()
        fastest, calls, start = float("inf"), 0, time.perf_counter()
        end = start + seconds
        while calls < _LEAST_CALLS or start < end:
            self.call()
            now = time.perf_counter()
            fastest, calls, start = min(fastest, now - start), calls + 1, now
        return self.amount / fastest / 1e9


def measure_rates(found: Path, threads: int, seconds: float) -> Callable[[], None]:
    """What the worker process does; its answers hold only times, so the rates go to a file."""
    import torch

    torch.set_num_threads(threads)
    makers: list[Callable[[int], _Measurement]] = [
        partial(_torch_product, "f32", torch.float32),
        _onnx_product("f32", "MatMul", threads),
        _onnx_product("int8", "MatMulInteger", threads),
    ]
    if not _NATIVE_BF16.isdisjoint(instruction_sets()):
        makers.append(partial(_torch_product, "bf16", torch.bfloat16))
    measurements = [*_passes(), *map(_long_enough, makers)]
    rates = {measurement.of: 0.0 for measurement in measurements}
    start = risen = time.perf_counter()
    for measurement in cycle(measurements):
        rate = measurement.rate(_TURN_S)
        now = time.perf_counter()
        if rate > _RISE * rates[measurement.of]:
            risen = now
        rates[measurement.of] = max(rates[measurement.of], rate)
        if all(rates.values()) and (now - risen > seconds or now - start > _LONGEST * seconds):
            break
    found.write_text(json.dumps(rates), encoding="utf-8")
    return lambda: None


def _passes() -> Iterator[_Measurement]:
    import psutil
    import torch

    wanted = max(_LEAST_ARRAY, _BEYOND_CACHE * last_level_cache_bytes())
    size = min(wanted, _MOST_ARRAY, psutil.virtual_memory().available // 4)
    array = torch.ones(size // 8 * 2, dtype=torch.float32)
    for call in (array.sum, partial(torch.dot, *array.chunk(2))):
        yield _Measurement(_BANDWIDTH, array.nbytes, call)


def _long_enough(make: Callable[[int], _Measurement]) -> _Measurement:
    """The product by so many rows that a call is not too short to be measured."""
    rows = _ROWS
    while (made := make(rows)).amount / made.rate(0) / 1e9 < _LONG_ENOUGH_S and rows < _MOST_ROWS:
        rows *= 2
    return made


def _torch_product(precision: str, dtype: torch.dtype, rows: int) -> _Measurement:
    import torch

    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(n, _SIDE, generator=generator, dtype=torch.float32).to(dtype)
        for n in (rows, _SIDE)
    )
    call = partial(torch.mm, left, right, out=torch.empty(rows, _SIDE, dtype=dtype))
    return _Measurement(precision, 2 * rows * _SIDE**2, call)


def _onnx_product(precision: str, operator: str, threads: int) -> Callable[[int], _Measurement]:
    import onnx
    import onnxruntime as ort

    rng = np.random.default_rng(0)

    def values(rows: int) -> npt.NDArray[Any]:
        if precision == "f32":
            return rng.standard_normal((rows, _SIDE), np.float32)
        return rng.integers(0, 128, (rows, _SIDE), np.uint8)

    # Weights that are part of the file are packed once, when the session is made.
    weights = values(_SIDE)
    result = np.float32 if precision == "f32" else np.int32
    taken, given = "float", "float"
    if precision != "f32":
        weights = (weights.astype(np.int16) - 64).astype(np.int8)
        taken, given = "uint8", "int32"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 14]> product ({taken}[rows, {_SIDE}] x)'
        f" => ({given}[rows, {_SIDE}] y) {{ y = {operator}(x, w) }}"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "w"))
    with tempfile.TemporaryDirectory(prefix="heimdall-roofline-") as folder:
        path = Path(folder) / "product.onnx"
        onnx.save(model, path)
        session = open_session(path, threads=threads)

    def make(rows: int) -> _Measurement:
        # Bound once: the product must not wait for fresh memory.
        bound = session.io_binding()
        bound.bind_cpu_input("x", values(rows))
        held = ort.OrtValue.ortvalue_from_shape_and_type((rows, _SIDE), result)
        bound.bind_ortvalue_output("y", held)
        call = partial(session.run_with_iobinding, bound)
        return _Measurement(precision, 2 * rows * _SIDE**2, call)

    return make
