import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import onnx
import pytest
import records
from models import BlockNet

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.parameters import AccuracyLimits, ReleaseParameters
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.latency.benchmark import PairLatency
from heimdall_onnx.evidence.latency.statistics import Speedup
from heimdall_onnx.evidence.variants import search as module
from heimdall_onnx.evidence.variants.search import compare_variants
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import open_runner

SIGNATURE = BlockNet.signature
SAMPLES = 120


@pytest.fixture(scope="module")
def model():
    return BlockNet().eval()


@pytest.fixture(scope="module")
def eval_data(model, tmp_path_factory):
    """Labelled samples about which the model is as uncertain as it says."""
    inputs = generic_inputs(SIGNATURE, SAMPLES, seed=7)
    answers = run_pytorch(model, inputs, SIGNATURE)
    noise = np.random.default_rng(0).standard_normal((SAMPLES, 2))
    labels = np.clip(answers["positions"] + answers["spread"] * noise, -80, 80)
    path = tmp_path_factory.mktemp("data") / "eval.npz"
    np.savez(path, **inputs, positions=labels)
    return path


@pytest.fixture(scope="module")
def bad_calibration(eval_data, tmp_path_factory):
    """Inputs a hundred times as quiet as those that the model is used on."""
    path = tmp_path_factory.mktemp("data") / "quiet.npz"
    np.savez(path, signal=np.load(eval_data)["signal"] * np.float32(0.01))
    return path


def untuned(contestant, inputs, signature, *, batch_size, calls, seed):
    """As `tune_session` where nothing helps; what it does find has tests of its own."""
    assert (len(inputs["signal"]), calls, seed) == (1, 6, 0)
    return contestant.settings, ()


@pytest.fixture
def here(monkeypatch, report):
    """Judge in this process, and time nothing: each call of it is answered with ``speedups``."""
    calls, speedups = [], {}

    def apart(function, *arguments):
        calls.append((function.__name__, arguments))
        return function(*arguments)

    def measure_pair(first, second, *_, **options):
        waiting = speedups.get(second.name, [])
        speedup = waiting.pop(0) if waiting else Speedup(0.5, 0.4, 0.6, 6)
        sides = tuple(
            replace(side, name=asked.name)
            for side, asked in zip(report.against_pytorch.contenders, (first, second), strict=True)
        )
        return replace(report.against_pytorch, contenders=sides, speedup=speedup)

    monkeypatch.setattr(module, "WorkerProcess", lambda: nullcontext(apart))
    monkeypatch.setattr(module, "measure_pair", measure_pair)
    monkeypatch.setattr(module, "tune_session", untuned)
    return calls, speedups


@pytest.fixture
def search(model, eval_data, tmp_path):
    def run(variants, **changes):
        path = tmp_path / "model.onnx"
        export_model(model, path, signature=SIGNATURE, opset=14)
        data = load_evaluation_data(eval_data, SIGNATURE)
        parameters = ReleaseParameters(
            variants=variants, profile="smoke", threads=1, batch_size=4, **changes
        )
        return compare_variants(model, path, data, SIGNATURE, parameters)

    return run


def test_nothing_is_done_unless_asked_for(search):
    assert search("none") is None


@pytest.fixture(scope="module")
def report(model, eval_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    export_model(model, folder / "model.onnx", signature=SIGNATURE, opset=14)
    data = load_evaluation_data(eval_data, SIGNATURE)
    parameters = ReleaseParameters(
        variants="fp32-openvino,int8-minmax,fp16-cuda",
        profile="smoke",
        threads=1,
        batch_size=4,
        # So small a net feels 8 bits everywhere, and one block of it far more than that.
        max_loss=0.1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tune_session", untuned)
        return compare_variants(model, folder / "model.onnx", data, SIGNATURE, parameters)


def test_every_variant_that_was_asked_for_is_judged(report):
    assert [v.name for v in report.judged] == [
        "fp32",
        "fp32-openvino",
        "int8-minmax",
        "fp16-cuda",
    ]
    assert report.variant("fp32").passed
    assert report.variant("fp32-openvino").passed
    unavailable = report.variant("fp16-cuda")
    assert unavailable.status == "unavailable"
    assert "onnxruntime-gpu" in unavailable.reason
    assert unavailable.path is None


def test_what_rounding_harms_is_kept_in_float_until_the_gates_hold(report):
    found = report.variant("int8-minmax")
    assert found.passed, found.reason
    assert found.kept_in_float[0] == f"blocks.{BlockNet.hard}"
    assert all(gate.passed for gate in found.gates)
    graph = onnx.load(found.path).graph
    assert any(node.op_type == "QuantizeLinear" for node in graph.node)


def test_what_passed_is_as_accurate_as_it_must_be(report):
    for variant in report.judged:
        if variant.passed and variant.accuracy is not None:
            assert [judged.metric for judged in variant.accuracy.quality] == ["localization", "nll"]
            assert all(judged.outcome != "worse" for judged in variant.accuracy.quality)
            assert variant.accuracy.samples == report.calibration.evaluation.count


def test_those_that_judge_have_no_part_in_what_is_kept_in_float(report):
    seen = {row.tobytes() for row in report.calibration.inputs["signal"]}
    judged = {row.tobytes() for row in report.calibration.evaluation.inputs["signal"]}
    assert not seen & judged
    noise = report.variant("int8-minmax").noise
    assert noise.samples == min(8, report.calibration.samples)


def test_each_is_timed_with_what_it_really_ran_on(report):
    for variant in report.judged:
        if variant.status == "unavailable":
            assert variant.latency is None
            continue
        assert variant.latency.second.ran_on == variant.settings.provider
        opponent = "PyTorch" if variant.name == "fp32" else "fp32"
        assert variant.latency.first.name == opponent
        assert variant.latency.second.name == variant.name
        assert [found.batch_size for found in variant.latency.throughput] == [4, 4]


def test_the_fastest_that_passed_is_recommended_and_tuned(report):
    best = report.best
    assert best.passed
    faster = [
        v for v in report.judged if v.passed and v.name != "fp32" and v.latency.speedup.low > 1
    ]
    ratios = {v.name: v.latency.speedup.ratio for v in faster}
    assert best.name == (max(ratios, key=ratios.get) if ratios else "fp32")
    assert best.tuning == {"latency": (), "throughput": ()}
    assert isinstance(report.against_pytorch, PairLatency)
    assert report.against_pytorch.first.name == "PyTorch"
    assert report.against_pytorch.second.name == best.name


def test_the_files_are_what_was_judged(report):
    inputs = report.calibration.evaluation.rows(range(8))
    for variant in report.judged:
        if not variant.passed or variant.name == "fp32":
            continue
        assert variant.size_bytes == variant.path.stat().st_size
        runner = open_runner(variant.path, SIGNATURE, variant.settings)
        error = np.abs(
            runner.run(inputs)["positions"]
            - run_pytorch(BlockNet(), inputs, SIGNATURE)["positions"]
        )
        assert error.max() <= variant.accuracy.outputs[0].maximum + 1e-4


def test_the_report_is_json(report):
    record = records.record().model_copy(update={"variants": report})
    found = json.loads(json.dumps(record.to_json(), allow_nan=False))
    found = {entry["name"]: entry for entry in found["variants"]["judged"]}
    assert found["int8-minmax"]["file"] == "variants/int8-minmax/model.onnx"
    assert found["fp32-openvino"]["file"] == "model.onnx"
    assert found["fp32-openvino"]["sha256"] == found["fp32"]["sha256"]
    assert set(found["fp32"]["sessions"]) == {"latency", "throughput"}


def test_bad_calibration_is_refused_by_the_gates(search, bad_calibration, here):
    report = search("int8-minmax", calibration_data=str(bad_calibration))
    # What is hard to round is looked for on what calibrates, never on what judges.
    (asked,) = (arguments for name, arguments in here[0] if name == "noise_profile")
    np.testing.assert_array_equal(asked[-1]["signal"], report.calibration.inputs["signal"][:8])
    refused = report.variant("int8-minmax")
    assert refused.status == "failed"
    assert "loss of nll" in refused.reason
    assert report.recommended == "fp32"
    # The same with good inputs passes, see above: it is they that make the difference.
    assert report.calibration.source == "quiet.npz"


def test_what_is_not_proven_faster_or_not_again_is_not_recommended(search, here):
    _, speedups = here
    speedups["fp32-openvino"] = [Speedup(1.5, 0.9, 2.0, 6)] * 2
    speedups["fp32-optimized"] = [Speedup(1.2, 1.1, 1.3, 6), Speedup(1.1, 0.9, 1.3, 6)]
    assert search("fp32-optimized,fp32-openvino").recommended == "fp32"
    assert speedups["fp32-optimized"] == []
    speedups["fp32-optimized"] = [Speedup(1.2, 1.1, 1.3, 6), Speedup(1.3, 1.2, 1.4, 6)]
    found = search("fp32-optimized")
    assert found.recommended == "fp32-optimized"
    # The second look counts: it has chosen nothing.
    assert found.best.latency.speedup.ratio == 1.3


def test_options_that_were_found_fast_are_judged_too(search, here, monkeypatch):
    def tune(contestant, *arguments, batch_size, **options):
        settings, trials = untuned(contestant, *arguments, batch_size=batch_size, **options)
        # Latency is tuned for one sample a call.
        level = "basic" if batch_size == 1 else "extended"
        return settings.model_copy(update={"level": level}), trials

    def gates(accuracy, limits):
        settings = here[0][-1][1][2]
        return (Gate.none_of("accuracy", ["much is lost"] if settings.level == "basic" else []),)

    monkeypatch.setattr(module, "tune_session", tune)
    monkeypatch.setattr(module, "accuracy_gates", gates)
    best = search("fp32").best
    assert {purpose: s.level for purpose, s in best.sessions.items()} == {
        "latency": "all",
        "throughput": "extended",
    }
    assert best.tuning.keys() == {"throughput"}


def test_limits_come_from_the_parameters():
    parameters = ReleaseParameters(max_displacement_sigma=0.4, max_output_noise=0.05)
    assert parameters.accuracy_limits == AccuracyLimits(0.4, 0.05)


@pytest.mark.thorough
def test_without_labels_the_displacement_decides(model, eval_data, tmp_path):
    path = tmp_path / "model.onnx"
    export_model(model, path, signature=SIGNATURE, opset=14)
    data = replace(load_evaluation_data(eval_data, SIGNATURE), positions=None)
    parameters = ReleaseParameters(variants="int8-dynamic", profile="smoke", threads=1)
    report = compare_variants(model, path, data, SIGNATURE, parameters)
    (*_, gate) = report.variant("int8-dynamic").gates
    assert "displacement" in gate.name


def test_one_sample_can_not_both_calibrate_and_judge(model, eval_data, tmp_path):
    path = tmp_path / "model.onnx"
    export_model(model, path, signature=SIGNATURE, opset=14)
    data = load_evaluation_data(eval_data, SIGNATURE).head(1)
    parameters = ReleaseParameters(variants="int8-minmax", profile="smoke")
    with pytest.raises(DataError, match="expected at least two"):
        compare_variants(model, path, data, SIGNATURE, parameters)


def test_random_inputs_judge_nothing_that_rounds(model, tmp_path, here):
    path = tmp_path / "model.onnx"
    export_model(model, path, signature=SIGNATURE, opset=14)
    parameters = ReleaseParameters(
        variants="fp32-optimized,int8-dynamic", profile="smoke", threads=1
    )
    data = load_evaluation_data(None, SIGNATURE)
    report = compare_variants(model, path, data, SIGNATURE, parameters)
    assert report.variant("fp32-optimized").passed
    refused = report.variant("int8-dynamic")
    assert refused.status == "failed"
    assert "random numbers" in refused.reason
