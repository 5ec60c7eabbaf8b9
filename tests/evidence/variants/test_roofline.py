"""Work is counted right, floors follow from it, and the machine's roofs are of the right size."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from models import DictNet, SmallNet
from torch import nn

from heimdall_onnx.common.errors import BenchmarkError, EvidenceError
from heimdall_onnx.common.machine import instruction_sets, last_level_cache_bytes, usable_processors
from heimdall_onnx.evidence.latency import contenders
from heimdall_onnx.evidence.variants import roofline as module
from heimdall_onnx.evidence.variants.roofline import (
    Floor,
    Machine,
    RooflineRow,
    Work,
    floor_of,
    measure_machine,
    work_of,
)
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.signature import Signature, TensorSpec

MACHINE = Machine(
    threads=2,
    bandwidth_gb_s=20.0,
    peaks={"f32": 100.0, "int8": 400.0},
    cache_bytes=32_000_000,
    instruction_sets=("avx2", "fma"),
)
WORK = Work(flops=1e9, parameters=25_000_000)


def fastest_s(call) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@pytest.fixture(scope="module")
def measured() -> Machine:
    before = torch.get_num_threads()
    machine = measure_machine(seconds=0.3)
    assert torch.get_num_threads() == before
    return machine


# --- work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SmallNet(), DictNet()])
@pytest.mark.parametrize("batch", [1, 3])
def test_operations_are_counted_for_a_sample_whatever_the_batch(model, batch) -> None:
    work = work_of(model, generic_inputs(model.signature, batch), model.signature)
    convolutions = 2 * 64 * (9 * 2 * 8 + 9 * 8 * 8)
    heads = 2 * (8 * 2 + 8 * 2)
    assert work.flops == convolutions + heads
    assert work.parameters == sum(p.numel() for p in model.parameters())


def test_grouped_convolutions_count_what_they_compute() -> None:
    spec = TensorSpec("x", "float32", ("batch", 8, 4, 4))
    signature = Signature((spec,), (TensorSpec("y", "float32", ("batch", 8, 4, 4)),))
    model = nn.Conv2d(8, 8, 3, padding=1, groups=8).eval()
    assert work_of(model, generic_inputs(signature, 2), signature).flops == 2 * 9 * 8 * 16


def test_counting_says_which_inputs_the_model_can_not_take() -> None:
    model = SmallNet()
    inputs = {"signal": np.zeros((1, 5, 8, 8), np.float32)}
    with pytest.raises(EvidenceError, match=r"SmallNet can't run on .*\(1, 5, 8, 8\)"):
        work_of(model, inputs, model.signature)


# --- floors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight_bytes", "precision", "batch", "compute_ms", "memory_ms", "bound"),
    [
        (100_000_000, "f32", 1, 10.0, 3.4, "compute"),
        (100_000_000, "f32", 8, 80.0, 3.4, "compute"),
        (100_000_000, "int8", 1, 2.5, 3.4, "memory"),
        (32_000_001, "int8", 1, 2.5, 5e-8, "compute"),
        (25_000_000, "int8", 1, 2.5, 0.0, "compute"),
    ],
)
def test_floor_is_the_longer_of_arithmetic_and_traffic(
    weight_bytes, precision, batch, compute_ms, memory_ms, bound
) -> None:
    floor = floor_of(WORK, weight_bytes, precision, MACHINE, batch)
    assert floor is not None
    assert floor.compute_ms == pytest.approx(compute_ms)
    assert floor.memory_ms == pytest.approx(memory_ms)
    assert floor.ms == max(floor.compute_ms, floor.memory_ms)
    assert floor.bound == bound


def test_cache_of_unknown_size_keeps_nothing() -> None:
    machine = replace(MACHINE, cache_bytes=0)
    floor = floor_of(WORK, 20_000_000, "f32", machine, 1)
    assert floor == Floor(compute_ms=pytest.approx(10.0), memory_ms=pytest.approx(1.0))


def test_ratio_is_the_latency_over_the_floor_of_its_precision() -> None:
    row = RooflineRow("fp32", "f32", 10**8, 1, 25.0, floor_of(WORK, 10**8, "f32", MACHINE, 1))
    assert row.ratio == pytest.approx(2.5)
    assert floor_of(WORK, 50_000_000, "f16", MACHINE, 1) is None
    assert replace(row, precision="f16", floor=None).ratio is None


def test_a_model_without_arithmetic_that_fits_into_the_cache_has_no_ratio() -> None:
    floor = floor_of(Work(0.0, 0), 1000, "f32", MACHINE, 1)
    assert RooflineRow("fp32", "f32", 1000, 1, 0.1, floor).ratio is None


# --- the machine ---------------------------------------------------------------------------------


def test_every_precision_of_this_processor_has_a_peak(measured) -> None:
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(instruction_sets())
    assert set(measured.peaks) == {"f32", "int8"} | ({"bf16"} if native else set())
    assert measured.threads == usable_processors()
    assert measured.instruction_sets == instruction_sets()
    assert measured.cache_bytes == last_level_cache_bytes()


def test_roofs_are_of_the_size_that_this_process_sees_too(measured) -> None:
    # A wrong unit is a factor of a thousand; a busy machine is one of tens. Here runs one thread.
    most = 30 * measured.threads
    left, right = torch.randn(2, 1024, 1024).unbind()
    here = 2 * 1024**3 / fastest_s(lambda: left @ right) / 1e9
    assert here / 30 < measured.peaks["f32"] < most * here
    assert measured.peaks["int8"] > here / 30
    array = torch.ones(1 << 26)
    here = array.nbytes / fastest_s(array.sum) / 1e9
    assert here / 30 < measured.bandwidth_gb_s < most * here


def test_failure_in_the_process_that_measures_is_named(monkeypatch) -> None:
    monkeypatch.setattr(module, "measure_rates", jobs.fail_to_measure)
    with pytest.raises(BenchmarkError, match=r"measurement of the machine failed .*no product"):
        measure_machine()


def test_measurement_that_hangs_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(contenders, "WORKER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(contenders, "ENDS_WITHIN_S", 0.0)
    with pytest.raises(BenchmarkError, match=r"of the machine gave no answer in 0\.2 s"):
        measure_machine()


def test_script_needs_no_main_guard_and_sees_its_own_output_only(tmp_path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import jobs\n"
        "from heimdall_onnx.evidence.variants import roofline\n"
        "roofline.measure_rates = jobs.measure_environment\n"
        "machine = roofline.measure_machine(3)\n"
        "print(machine.threads, machine.bandwidth_gb_s, machine.peaks)\n"
    )
    support = Path(jobs.__file__).parent
    done = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(support), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "noise" not in done.stdout + done.stderr
    assert "3 3 {'f32': 3}" in done.stdout, done.stderr
