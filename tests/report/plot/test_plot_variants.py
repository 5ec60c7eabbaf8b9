from dataclasses import replace

import numpy as np
import pytest
from models import BlockNet

from heimdall_onnx.common.parameters import AccuracyLimits, Quality
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.latency.benchmark import PairLatency
from heimdall_onnx.evidence.latency.contenders import ContenderLatency
from heimdall_onnx.evidence.latency.machine_state import MachineWatch
from heimdall_onnx.evidence.latency.statistics import Speedup, offline_throughput
from heimdall_onnx.evidence.variants.accuracy import accuracy_gates, judge_accuracy
from heimdall_onnx.evidence.variants.calibration import split_calibration
from heimdall_onnx.evidence.variants.search import JudgedVariant, VariantsReport
from heimdall_onnx.evidence.variants.sensitivity import GroupNoise, NoiseProfile
from heimdall_onnx.evidence.variants.tuning import Trial
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.report import plot, tables

SIGNATURE = BlockNet.signature


def latency(name, ms):
    rng = np.random.default_rng(0)
    samples = ms * rng.uniform(0.95, 1.05, 60)
    return ContenderLatency.of_calls(
        name,
        samples,
        np.repeat(np.arange(6), 10),
        load_ms=100.0,
        first_call_ms=2 * ms,
        peak_memory_bytes=10**8,
        ran_on="CPU",
    )


def pair(first, ms_first, second, ms):
    with MachineWatch() as watch:
        pass
    ratio = ms_first / ms
    return PairLatency(
        contenders=(latency(first, ms_first), latency(second, ms)),
        speedup=Speedup(ratio, 0.9 * ratio, 1.1 * ratio, 12),
        batch_size=1,
        machine=watch.state,
        throughput=tuple(offline_throughput(np.full(3, 8 * m), 8) for m in (ms_first, ms)),
    )


def profile(name, level):
    groups = ("stem", "blocks.0", "blocks.1", "head")
    noises = level * np.array([1.0, 1.2, 9.0, 9.5])
    entering = [0.0, *noises[:-1]]
    return NoiseProfile(
        name,
        tuple(
            GroupNoise(scope, (scope,), float(noise), float(before))
            for scope, noise, before in zip(groups, noises, entering, strict=True)
        ),
        8,
    )


@pytest.fixture(scope="module")
def report():
    inputs = generic_inputs(SIGNATURE, 60)
    answers = run_pytorch(BlockNet().eval(), inputs, SIGNATURE)
    data = EvaluationData(inputs, answers["positions"] + 0.3, {}, "eval.npz", "0" * 64, {})
    split = split_calibration(data, samples=20, judged=40)
    reference = run_pytorch(BlockNet().eval(), dict(split.evaluation.inputs), SIGNATURE)

    def judged(name, ms, degrees, **values):
        found = reference | {"positions": reference["positions"] + np.float32(degrees)}
        accuracy = judge_accuracy(
            reference, found, split.evaluation, SIGNATURE, Quality(max_loss=0.1)
        )
        gates = accuracy_gates(accuracy, AccuracyLimits())
        passed = all(gate.passed for gate in gates)
        reason = "; ".join(gate.summary() for gate in gates if not gate.passed)
        return JudgedVariant(
            name,
            "a form",
            "int8",
            "passed" if passed else "failed",
            reason,
            size_bytes=10**7,
            gates=gates,
            accuracy=accuracy,
            noise=profile(name, abs(degrees)),
            latency=pair("fp32", 10.0, name, ms),
            **values,
        )

    trial = Trial("threads = 1", Speedup(1.2, 1.1, 1.3, 6), True)
    best = replace(
        judged("int8-minmax", 4.0, 0.0005, kept_in_float=("blocks.1",)),
        tuning={"latency": (trial,)},
    )
    return VariantsReport(
        judged=(
            JudgedVariant(
                "fp32",
                "as exported",
                "fp32",
                "passed",
                size_bytes=4 * 10**7,
                latency=pair("PyTorch", 30.0, "fp32", 10.0),
            ),
            best,
            judged("int4-weights", 3.0, -0.2),
            JudgedVariant("fp16-cuda", "on CUDA", "fp16", "unavailable", "no CUDA | here"),
        ),
        recommended="int8-minmax",
        calibration=split,
        limits=AccuracyLimits(),
        against_pytorch=pair("PyTorch", 30.0, "int8-minmax", 4.0),
        batch_size=8,
    )


def test_the_title_names_the_recommended_variant_and_its_gain(report):
    chart = plot.variants(report)
    assert chart.title == "int8-minmax is recommended: 7.5× PyTorch (6.75 to 8.25)"
    for name in ("fp32 passed", "int8-minmax passed", "int4-weights failed"):
        assert name in chart.alt
    assert "fp16-cuda" not in chart.alt  # nothing of it was measured


def test_points_stand_at_the_latency_that_the_ratio_gives(report):
    axes = plot.variants(report).figure.axes[0]
    points = {line.get_gid(): line for line in axes.lines if line.get_gid()}
    fp32_ms = report.variant("fp32").latency.second.median_ms
    best = points["variant int8-minmax"]
    assert best.get_xdata()[0] == pytest.approx(fp32_ms * 4 / 10)
    accuracy = report.best.accuracy
    assert best.get_ydata()[0] == pytest.approx(accuracy.displacement_p99_m)
    # Hollow means that a gate failed.
    assert points["variant int4-weights"].get_markerfacecolor() == "white"
    assert best.get_markerfacecolor() != "white"


def test_the_front_holds_only_what_passed_and_is_not_beaten(report):
    axes = plot.variants(report).figure.axes[0]
    (front,) = (line for line in axes.lines if line.get_linestyle() == ":")
    assert len(front.get_xdata()) == 2


def test_noise_is_drawn_by_module_and_what_was_kept_is_marked(report):
    chart = plot.noise_along_depth(report)
    assert chart.title.startswith("int4-weights loses most in blocks.1: relative error 0.24 before")
    axes = chart.figure.axes[0]
    lines = {line.get_gid(): line for line in axes.lines if line.get_gid()}
    assert set(lines) == {"noise int8-minmax", "noise int4-weights"}
    assert list(lines["noise int8-minmax"].get_ydata()) == pytest.approx(
        [0.0005, 0.0006, 0.0045, 0.00475]
    )
    (kept,) = (line for line in axes.lines if not line.get_gid())
    assert list(kept.get_xdata()) == [2]
    assert "int8-minmax: most in blocks.1" in chart.alt


def test_without_variants_there_is_nothing_to_draw():
    assert plot.variants(None) is None
    assert plot.noise_along_depth(None) is None
    assert plot.operator_times(()) is None


def test_infinite_noise_does_not_break_the_picture(report):
    broken = replace(
        report.variant("int4-weights"),
        noise=NoiseProfile("int4-weights", (GroupNoise("stem", ("a",), np.inf, 0.0),), 8),
    )
    only = replace(report, judged=(report.judged[0], broken), recommended="fp32")
    assert plot.noise_along_depth(only).to_png()


def test_the_table_leads_with_the_recommended_and_says_why_others_are_out(report):
    text = tables.variants_table(report).data
    assert text.startswith("**int8-minmax** is recommended: 7.50× PyTorch (6.75 to 8.25)")
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert rows[0].startswith("| int8-minmax, recommended | passed | 10.0 |")
    assert "2.50 (2.25 to 2.75)" in rows[0]
    assert "- int4-weights, failed: loss of localization" in text
    assert "- int8-minmax keeps in float: blocks" in text
    assert "no CUDA &#124; here" in text
    assert "No variants were asked for" in tables.variants_table(None).data


def test_tables_tell_what_judged_and_what_was_tuned(report):
    judged = tables.calibration_table(report).data
    assert report.calibration.sha256 in judged
    assert "40 other samples of eval.npz" in judged
    assert (
        "threads = 1 | latency, batch 1 | 1.20 (1.10 to 1.30) | yes"
        in tables.tuning_table(report).data
    )
    for table in (tables.calibration_table, tables.tuning_table):
        assert table(None) is None


def test_pictures_are_drawn(report, tmp_path):
    for chart in (plot.variants(report), plot.noise_along_depth(report)):
        assert chart.save(tmp_path / "a.png").stat().st_size > 10_000
