"""Two models on the same inputs: what differs is known beforehand, and said as it is."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import records
from pydantic import TypeAdapter
from quick_release import SIGNATURE, make_model

from heimdall_onnx.archive.manifest import parse_manifest
from heimdall_onnx.common.errors import EvidenceError, InvalidModelError, ParameterError
from heimdall_onnx.common.verdict import Gate, NotMeasured
from heimdall_onnx.data.evaluation import EvaluationData, load_evaluation_data
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.latency.benchmark import PairLatency
from heimdall_onnx.evidence.latency.contenders import ContenderLatency
from heimdall_onnx.evidence.latency.figures import PairFigures
from heimdall_onnx.evidence.latency.machine_state import MachineState
from heimdall_onnx.evidence.latency.statistics import Speedup
from heimdall_onnx.evidence.ratios import Ratio
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report.summary import three_sentences
from heimdall_onnx.review.compare.answers import (
    Displacement,
    compare_answers,
    measure_both,
    shared_signature,
)
from heimdall_onnx.review.compare.comparison import ReleaseComparison, VerifiedRelease
from heimdall_onnx.review.compare.gates import GatePair, Limits, pair_gates
from heimdall_onnx.review.compare.tables import changes_table, conclusion
from heimdall_onnx.review.compare.words import ratio_words
from heimdall_onnx.review.reproduce.figures import Difference

LEVEL = TensorSpec("positions", "float32", ("batch", 2), unit="dB")
SAMPLES = 200


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Models by the degrees by which they miss a latitude."""
    folder = tmp_path_factory.mktemp("models")
    offsets = {"exact": 0.0, "one": 0.01, "two": 0.02, "lost": math.nan}
    for name, offset in offsets.items():
        onnx.save(make_model(offset), folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in offsets}


@pytest.fixture(scope="module")
def data():
    signal = np.random.default_rng(0).uniform(45, 50, (SAMPLES, 2)).astype(np.float32)
    return EvaluationData({"signal": signal}, signal.astype(np.float64), {}, "eval", "ab", {})


@pytest.fixture
def compare(models, data):
    def run(a, b, signature=SIGNATURE, **changes):
        return compare_answers(models[a], models[b], replace(data, **changes), signature)

    return run


def side(who: str, verdict: str = "pass") -> VerifiedRelease:
    model = {"key": "p/v1/model.onnx", "size": 10, "sha256": "b" * 64}
    said = json.dumps(records.manifest_json(objects=[model], verdict=verdict)).encode()
    manifest = parse_manifest(said, "s3://b/p/v1")
    return VerifiedRelease(who, manifest, records.record(), Path("model.onnx"), 9)


GATE = Gate.at_most("mean absolute error", 1e-5, 1e-6)


def latency(ratio: float, low: float, high: float, calls=(2.0,) * 6) -> PairLatency:
    beside = {"load_ms": 1.0, "first_call_ms": 1.0, "peak_memory_bytes": 1}
    calls = np.repeat(calls, 10)
    side = ContenderLatency.of_calls("A", calls, np.arange(60) // 10, **beside)
    quiet = MachineState(1.0, 0.1, 0.1, None, 0.5, 0.1, 0.4, 0.0, None, 1)
    return PairLatency(
        contenders=(replace(side, name="B"), side),
        speedup=Speedup(ratio, low, high, 20),
        batch_size=1,
        machine=quiet,
    )


def comparison(answers, **changes) -> ReleaseComparison:
    given = {
        "a": side("A"),
        "b": side("B"),
        "answers": answers,
        "latency": NotMeasured("not asked for"),
        "gates": pair_gates([GATE], [GATE]),
        "parameters": (),
        "environment": (),
        "limits": Limits(),
    }
    return ReleaseComparison(**{**given, **changes})


def test_positions_move_by_what_one_model_is_off_the_other(compare):
    found = compare("one", "two")
    moved = found.displacement
    # 0.01° of latitude at 45° to 50°, on the ellipsoid.
    assert 1111 < moved.p50_m < 1112.5
    assert moved.p50_m <= moved.p99_m <= moved.max_m < 1113
    assert (moved.lost, moved.metres.size) == (0, SAMPLES)
    last = changes_table(found).data.splitlines()[-1]
    assert last == (
        "Positions move on the ground by 1.1 km (median), 1.1 km (p99) and 1.1 km (largest)."
    )
    (output,) = found.outputs
    assert output.mean == pytest.approx(0.005, rel=1e-3)  # of latitude and longitude together
    assert output.violations == SAMPLES


def test_loss_is_that_of_the_offsets_and_its_interval_holds_it(compare):
    found = compare("one", "two")
    (judged,) = found.quality
    assert judged.value / judged.reference == pytest.approx(2, rel=1e-3)
    assert judged.loss == pytest.approx(judged.value / judged.reference - 1)
    assert judged.low <= judged.loss <= judged.high
    assert judged.low > 0.9
    assert (judged.outcome, judged.binding) == ("worse", True)
    a, b = found.by_sample["localization"]
    assert (np.median(a), np.median(b)) == pytest.approx((judged.reference, judged.value), rel=1e-3)
    assert (
        "- median localization error 1.1 km to 2.2 km, a loss of 100% ("
        in changes_table(found).data
    )


def test_equal_models_differ_in_nothing(compare):
    found = comparison(compare("one", "one"))
    assert found.sentence == (
        "Latency was not compared, no clear difference in median localization error (1.1 km), no "
        "position moves, no gate changes"
    )
    assert (found.worse, found.not_shown) == ((), ())


def test_lost_positions_are_counted_and_worse(compare):
    found = comparison(compare("one", "lost"))
    assert found.answers.displacement.lost == SAMPLES
    (judged,) = found.answers.quality
    assert (judged.loss, judged.outcome) == (math.inf, "worse")
    assert "200 samples without a finite value in B" in found.sentence
    assert f"{SAMPLES} of {SAMPLES} positions are NaN or Inf in one of them" in found.sentence
    assert any("NaN or Inf" in reason for reason in found.worse)
    # JSON has neither NaN nor Inf.
    assert (
        json.loads(json.dumps(found.to_dict(), allow_nan=False))["displacement_m"]["p99"]
        == "Infinity"
    )


def test_displacement_without_a_position_in_both_is_no_displacement():
    nowhere = np.full((3, 2), np.nan)
    moved = Displacement.between(nowhere, nowhere)
    assert (moved.lost, math.isnan(moved.max_m)) == (0, True)
    here = np.array([[50.0, 8.0], [50.0, 8.0], [np.nan, 8.0]])
    there = np.array([[50.0, 8.0], [50.0, 9.0], [np.nan, 9.0]])
    moved = Displacement.between(here, there)
    assert moved.max_m == pytest.approx(distance_m(here[1:2], there[1:2])[0])
    assert moved.p50_m == 0


def test_p99_is_not_told_of_few_samples(compare, data):
    few = data.head(20)
    found = comparison(compare("one", "two", inputs=few.inputs, positions=few.positions))
    assert "positions move by 1.1 km at most" in found.sentence
    assert "positions move by 1.1 km at p99" in comparison(compare("one", "two")).sentence


def test_model_without_positions_is_compared_in_its_own_unit(compare):
    found = comparison(compare("exact", "one", Signature(SIGNATURE.inputs, (LEVEL,))))
    assert (found.answers.displacement, found.answers.quality) == (None, ())
    assert found.sentence == (
        "Latency was not compared, quality was not compared, the values of "
        "positions change by 0.01 dB at p99, no gate changes"
    )


def test_synthetic_inputs_have_no_truth(models):
    synthetic = load_evaluation_data(None, SIGNATURE)
    found = compare_answers(models["one"], models["two"], synthetic, SIGNATURE)
    assert (found.source, found.samples, found.quality) == ("synthetic inputs", 64, ())
    assert found.displacement.max_m > 1000


def test_output_of_another_shape_than_declared_is_an_error(models, data):
    broken = onnx.load(models["one"])
    broken.graph.node[-1].output[0] = "moved"
    shape = onnx.numpy_helper.from_array(np.array([-1, 1]), "shape")
    broken.graph.initializer.append(shape)
    broken.graph.node.append(onnx.helper.make_node("Reshape", ["moved", "shape"], ["positions"]))
    del broken.graph.output[0].type.tensor_type.shape.dim[:]
    path = models["one"].with_name("broken.onnx")
    onnx.save(broken, path)
    with pytest.raises(EvidenceError, match=r"B gives positions of shape \(128, 1\)"):
        compare_answers(models["one"], path, data, SIGNATURE)


def test_signatures_must_share_inputs_and_an_output():
    other = Signature((TensorSpec("signal", "float32", ("batch", 3)),), (LEVEL,))
    with pytest.raises(InvalidModelError) as raised:
        shared_signature(SIGNATURE, other)
    assert "input of A: signal: float32 (batch, 2); of B: signal: float32 (batch, 3)" in str(
        raised.value
    )
    assert "of B: positions: float32 (batch, 2) in dB" in str(raised.value)
    alone = Signature(SIGNATURE.inputs, (replace(LEVEL, name="level"),))
    with pytest.raises(InvalidModelError, match="A gives positions; B gives level"):
        shared_signature(SIGNATURE, alone)
    mask = TensorSpec("mask", "bool", ("batch", 2))
    with pytest.raises(InvalidModelError, match="input of A: none; of B: mask"):
        shared_signature(SIGNATURE, Signature((*SIGNATURE.inputs, mask), SIGNATURE.outputs))


def test_outputs_of_one_alone_are_named_and_left_out():
    spread = TensorSpec("spread", "float32", ("batch", 2))
    more = Signature(SIGNATURE.inputs, (spread, *SIGNATURE.outputs))
    assert shared_signature(SIGNATURE, more) == (
        SIGNATURE,
        ("spread is given by B alone",),
    )
    assert shared_signature(more, SIGNATURE)[1] == ("spread is given by A alone",)


@pytest.mark.parametrize(
    ("ratio", "words", "worse"),
    [
        ((0.8929, 0.88, 0.91), "B is 12% faster (9.9 to 14)", False),
        ((0.25, 0.24, 0.26), "B is 4× faster (3.8 to 4.2)", False),
        ((1.12, 1.11, 1.14), "B is 12% slower (11 to 14)", True),
        ((1.05, 1.02, 1.08), "B is 5% slower (2 to 8)", False),
        ((3.1, 3.0, 3.2), "B is 3.1× slower (3 to 3.2)", True),
        (
            (1.01, 0.97, 1.04),
            "No clear difference in speed (B takes 0.97 to 1.04 times as long)",
            False,
        ),
    ],
)
def test_speed_is_said_with_its_interval(compare, ratio, words, worse):
    found = comparison(compare("one", "one"), latency=latency(*ratio))
    assert found.sentence.startswith(f"{words}, ")
    assert any("latency" in reason for reason in found.worse) == worse


def test_error_is_said_with_its_interval(compare):
    larger = comparison(compare("one", "two"))
    told = "B's median localization error is 100% worse (100% to 100%), 2.2 km after 1.1 km"
    assert told in larger.sentence
    assert larger.worse[0].startswith(
        "median localization error 1.1 km to 2.2 km, a loss of 100% (100% to 100%), limit 1%"
    )
    smaller = comparison(compare("two", "one"))
    assert "B's median localization error is 50% better (50% to 50%)" in smaller.sentence
    assert smaller.worse == ()


def test_ratio_words_tell_small_differences():
    assert ratio_words(Ratio("latency", 1.0004, 0.9996, 1.0012, 1.1)) == "1.000× (1.000 to 1.001)"
    assert ratio_words(Ratio("latency", 1234.5, 1000, 2000, 1.1)) == "1,234× (1,000 to 2,000)"


def test_gates_are_paired_by_name_and_order():
    fails = replace(GATE, passed=False)
    other = Gate.none_of("signature", ())
    pairs = pair_gates([GATE, GATE, other], [GATE, fails, Gate.none_of("order", ["wrong"])])
    assert [(p.name, p.change, p.worse) for p in pairs] == [
        ("mean absolute error", "", False),
        ("mean absolute error", "fails now", True),
        ("signature", "is gone", False),
        ("order", "is new and fails", True),
    ]
    assert GatePair("x", fails, GATE).change == "passes now"
    few = replace(GATE, undecided=True)
    assert GatePair("x", GATE, few).change == "is not shown now"
    assert GatePair("x", few, GATE).change == "passes now"
    assert GatePair("x", None, replace(few, passed=False)).change == "is new and is not shown"


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ([GATE], "no gate changes"),
        ([replace(GATE, passed=False)], "1 gate changes (mean absolute error fails now)"),
        (
            [Gate.none_of("opset", ()), Gate.none_of("order", ["x"])],
            "3 gates change (mean absolute error is gone; opset is new; order is new and fails)",
        ),
    ],
)
def test_changed_gates_are_counted_and_named(compare, after, words):
    found = comparison(compare("one", "one"), gates=pair_gates([GATE], after))
    assert found.sentence.endswith(words)
    assert bool(found.worse) == any(not gate.passed for gate in after)


def test_everything_is_json(compare):
    found = comparison(
        compare("one", "two"),
        latency=latency(1.2, 1.1, 1.3),
        parameters=(Difference("opset", 14, 20, True),),
    )
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["latency"]["ratio"] == {
        "what": "latency",
        "ratio": 1.2,
        "low": 1.1,
        "high": 1.3,
        "limit": 1.1,
        "holds": True,
    }
    (judged,) = told["quality"]
    assert (judged["metric"], judged["outcome"]) == ("localization", "worse")
    assert judged["loss"] == pytest.approx(1, rel=1e-3)
    assert told["not_shown"] == []
    assert told["parameters"][0]["what"] == "opset"
    assert told["environment"] == []
    assert told["gates"][0]["change"] == ""


def test_latency_is_measured_in_turns(models, data):
    path = models["one"].with_name("slow.onnx")
    onnx.save(make_model(0.01, products=40), path)
    found = measure_both(models["one"], path, data, SIGNATURE, calls=60)
    assert (found.first.name, found.second.name) == ("B", "A")
    assert found.speedup.low > 1
    assert (
        "slower"
        in comparison(compare_answers(models["one"], path, data, SIGNATURE), latency=found).sentence
    )


def test_sample_that_is_lost_in_both_leaves_the_others_compared(compare, data):
    signal = data.inputs["signal"].copy()
    signal[3] = np.nan
    found = comparison(compare("one", "two", inputs={"signal": signal}))
    (judged,) = found.answers.quality
    assert judged.samples == SAMPLES - 1
    assert judged.loss == pytest.approx(1, rel=1e-3)
    assert found.worse[0].startswith("median localization error 1.1 km to 2.2 km, a loss of 100%")
    assert "1 sample left out of that" in found.sentence


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("fail", "B: its verdict is 'fail'"),
        ("pass (smoke)", "B: it is a test run (profile smoke), which is no evidence"),
    ],
)
def test_release_that_is_not_promoted_for_its_verdict_is_worse(compare, verdict, words):
    found = comparison(compare("one", "one"), b=side("B", verdict))
    assert found.worse == (words,)
    assert comparison(compare("one", "one"), a=side("A", verdict)).worse == ()


def test_what_few_samples_do_not_show_is_told_apart_from_what_is_worse(compare, data):
    few = data.head(20)
    same = comparison(compare("one", "one", inputs=few.inputs, positions=few.positions))
    (reason,) = same.not_shown
    assert reason.endswith("; not shown: about 30 samples as these would show it")
    assert same.worse == ()
    assert "not shown: about 30 samples" in same.sentence
    assert same.facts["not shown"] == reason
    assert same.to_dict()["not_shown"] == [reason]
    assert "Not shown, which a promotion refuses too:" in conclusion(same).data
    assert "not shown" not in comparison(compare("one", "one")).facts


def test_metric_that_does_not_fit_is_refused_where_it_is_asked_for(models, data):
    def run(**given):
        limits = Limits(**given)
        return compare_answers(models["one"], models["one"], data, SIGNATURE, limits=limits)

    with pytest.raises(ParameterError, match="the metric top1 needs the array `labels`"):
        run(metric="top1")
    # What a release says of itself is no order.
    found = run(released=("top1", "nll", "localization"))
    assert [judged.metric for judged in found.quality] == ["localization"]
    assert "needs the array `labels`" in found.not_judged[0]
    assert "the metric nll needs the deviations" in found.not_judged[1]


def test_what_is_not_judged_is_named(compare):
    found = comparison(compare("one", "one", positions=None))
    assert found.not_judged == (
        "latency (not asked for)",
        "quality (what is true of the samples is not known)",
    )
    assert found.worse == ()
    said = conclusion(found).data
    assert "Not judged: latency" in said
    assert "quality was not compared" in found.sentence
    facts = found.facts
    assert facts["not judged"] == "; ".join(found.not_judged)
    assert facts["B is worse in"] == "nothing that was judged"
    whole = comparison(compare("one", "one"), latency=latency(1.0, 0.9, 1.1))
    assert whole.not_judged == ()
    assert "Not judged" not in conclusion(whole).data
    assert "not judged" not in whole.facts


def test_machine_that_was_not_steady_is_said_with_the_speed(compare):
    steady = latency(0.5, 0.4, 0.6)
    drifting = latency(0.5, 0.4, 0.6, calls=np.arange(2.0, 8.0))
    for found in (steady, drifting):
        measured = comparison(compare("one", "one"), latency=found)
        told = (measured.sentence, measured.facts["latency of B over A"])
        assert [("not steady" in text) for text in told] == [found is drifting] * 2
        timed = TypeAdapter(PairFigures).dump_python(found, mode="json")
        record = records.record(latency={"contenders": timed["contenders"]})
        assert ("; the machine was not steady" in three_sentences(record, None)[1]) == (
            found is drifting
        )
