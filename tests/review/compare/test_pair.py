"""Two releases are found by any of their addresses, and none is run that does not verify."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import records
from keys import make_key
from quick_release import SIGNATURE, Factory

from heimdall_onnx.archive.content import keep_dataset
from heimdall_onnx.common.errors import (
    DataError,
    InvalidModelError,
    ParameterError,
    RegistryError,
    VerificationError,
)
from heimdall_onnx.common.verdict import NotMeasured
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.review.compare.pair import (
    ComparisonParameters,
    compare_pair,
    conclude,
    find_pair,
    newer_of,
    open_pair,
    prepare,
    time_pair,
)
from heimdall_onnx.review.compare.tables import (
    changes_table,
    conclusion,
    environment_table,
    gates_table,
    parameters_table,
    releases_table,
)
from heimdall_onnx.review.reproduce.figures import Difference
from heimdall_onnx.services.connection import connect, open_for_reading
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services

BUCKET = "test-compared"
OUTPUT = records.output(unit="dB", mean=1e-7, p50=0.0, p99=1e-6, p999=2e-6, maximum="inf")
CELL = {"kind": "evaluation data", "batch_size": 8, "samples": 64, "outputs": [OUTPUT]}
RECORDED = {"parity": {"cells": [CELL]}}
GATES = [
    {"name": "opset", "limit": "= 14", "measured": 14, "passed": True, "detail": ""},
    {"name": "<b>order</b>", "limit": "≤ 1", "measured": "nan", "passed": True, "detail": ""},
]
PARAMETERS = {"opset": 14, "run_id": "1", "output_dir": "/one", "name": "net"}


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("compared")


@pytest.fixture
def factory(settings, tmp_path, reset_mlflow):
    return Factory(connect(settings), BUCKET, tmp_path)


@pytest.fixture(scope="module")
def releases(settings, tmp_path_factory):
    """A release, and one with another model, gates, parameters and environment."""
    factory = Factory(connect(settings), BUCKET, tmp_path_factory.mktemp("compared"))
    described = {"gates": GATES, "parameters": PARAMETERS, "created": "2026-11-20T14:30:00"}
    old = factory(error_degrees=0.01, described=described, recorded=RECORDED, alias="production")
    changed = {**GATES[1], "passed": False, "limit": "≤ 2"}
    described = {
        "gates": [GATES[0], changed],
        "parameters": {**PARAMETERS, "opset": 20, "run_id": "2", "output_dir": "/two"},
    }
    recorded = {**RECORDED, "distributions": {"torch": "2.14.0", "numpy": "2.4.6"}}
    return old, factory(error_degrees=0.02, described=described, recorded=recorded)


@pytest.fixture
def opened(settings, tmp_path, reset_mlflow):
    def run(a, b, **given):
        parameters = ComparisonParameters(
            a=getattr(a, "uri", a),
            b=getattr(b, "uri", b),
            bucket=BUCKET,
            output_dir=str(tmp_path),
            **given,
        )
        return open_pair(parameters, settings)

    return run


def test_every_form_of_an_address_finds_the_same_two(settings, opened, releases):
    old, new = releases
    for a, b in (
        (old.version, new.version),
        (f"{old.uri}/model.onnx", f"{new.uri}/"),
        ("models:/net@production", "models:/net@staging"),
        ("net@production", "net@staging"),
        ("net/1", "models:/net/2"),
    ):
        parameters = ComparisonParameters(a=a, b=b, bucket=BUCKET)
        found = find_pair(open_for_reading(settings), parameters)
        assert [one.uri for one in found] == [old.uri, new.uri]
    pair = opened(old, new)
    assert newer_of(pair.a, pair.b) is pair.b
    assert newer_of(*opened(new, old).sides).manifest.uri == new.uri


def test_what_is_compared_is_what_the_releases_say(opened, releases):
    pair = opened(*releases)
    data = pair.load_data()
    answers = compare_pair(pair, data)
    found = conclude(pair, answers, time_pair(pair, data, ComparisonParameters(calls=12)))
    left_out = time_pair(pair, data, ComparisonParameters(measure_latency=False))
    assert isinstance(left_out, NotMeasured)
    (judged,) = found.answers.quality
    assert judged.loss == pytest.approx(1, rel=1e-3)
    assert found.latency.first.samples_ms.size >= 12
    assert [gate.change for gate in found.gates] == ["", "fails now"]
    assert any("order" in reason and "fails now" in reason for reason in found.worse)
    # What differs from run to run is left out.
    assert [(d.what, d.recorded, d.found) for d in found.parameters] == [("opset", 14, 20)]
    assert [(d.what, d.recorded, d.found) for d in found.environment] == [
        ("package torch", "2.13.0", "2.14.0")
    ]


def test_tables_show_only_what_differs_and_nothing_as_markup(opened, releases):
    pair = opened(*releases)
    answers = compare_pair(pair, pair.load_data())
    found = conclude(pair, answers, NotMeasured("not asked for"))
    gates = gates_table(found).data
    assert "<b>" not in gates
    assert "| **fails now** | nan, pass | nan, FAIL | A: ≤ 1; B: ≤ 2 |" in gates
    assert parameters_table(found).data.count("\n") == 2
    assert "2.14.0" in environment_table(found).data
    told = replace(found, environment=(Difference("uncommitted changes", False, True, True),))
    assert "| uncommitted changes | no | yes |" in environment_table(told).data
    assert "python" not in environment_table(found).data.lower().replace("package", "")
    assert "| p99 | 0.01" in changes_table(answers).data
    assert releases_table(pair).data.splitlines()[0] == "| release | A | B, the newer |"
    assert "fails now" in conclusion(found).data


def test_release_that_does_not_verify_is_named_and_not_opened(opened, factory, releases, s3):
    damaged = factory()
    s3.put_object(Bucket=BUCKET, Key=f"{damaged.folder}/report.html", Body=b"changed")
    with pytest.raises(VerificationError) as raised:
        opened(releases[0], damaged)
    assert f"B, {damaged.uri}, does not verify" in str(raised.value)
    assert "report.html: expected" in str(raised.value)
    with pytest.raises(VerificationError, match="A, s3://"):
        opened(damaged, releases[0])


def test_changed_model_is_found_though_its_like_is_here_already(opened, factory, releases, s3):
    opened(*releases)
    damaged = factory(error_degrees=0.01)
    assert damaged.model.sha256 == releases[0].model.sha256
    s3.put_object(Bucket=BUCKET, Key=damaged.model.key, Body=b"another")
    with pytest.raises(VerificationError, match=r"model\.onnx: expected"):
        opened(releases[0], damaged)


def test_signature_is_asked_for_where_a_key_is_trusted(settings, releases, tmp_path, reset_mlflow):
    trusting = settings.model_copy(update={"public_key": make_key(tmp_path).public})
    given = ComparisonParameters(a=releases[0].uri, b=releases[1].uri, output_dir=str(tmp_path))
    with pytest.raises(VerificationError, match=r"model\.sig: expected a signature"):
        open_pair(given, trusting)


@pytest.mark.parametrize(
    ("a", "b", "error", "words"),
    [
        ("net@production", "net/1", ParameterError, "are one release"),
        ("", "net/1", ParameterError, "expected a release"),
        ("v20200101_000000", "net/1", ParameterError, "there is no release at"),
        ("net@nobody", "net/1", RegistryError, "nobody"),
        ("models:/net", "net/1", ParameterError, "no address of a model"),
    ],
)
def test_what_is_no_release_is_refused(opened, releases, a, b, error, words):
    with pytest.raises(error, match=words):
        opened(a, b)


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        ({"parity": {"cells": 1}}, r"no record of a release: parity\.cells"),
        ({"distributions": {"torch": [1]}}, r"no record of a release: distributions\.torch"),
        ({"schema_version": 3}, r"made by heimdall-onnx 0\.1: reproduce it with"),
    ],
)
def test_what_can_not_be_read_is_named(opened, factory, releases, recorded, words):
    with pytest.raises(VerificationError, match=rf"B, .* does not verify.*\n.*{words}"):
        opened(releases[0], factory(recorded=recorded))


def test_long_parameters_that_differ_at_their_end_differ(opened, factory):
    lists = [[*range(500), last] for last in (1, 2)]
    pair = opened(
        *(factory(described={"parameters": {"sizes": one, "same": [[1, {}]]}}) for one in lists)
    )
    found = conclude(pair, compare_pair(pair, pair.load_data()), NotMeasured("not asked for"))
    (difference,) = found.parameters
    assert [json.loads(v) for v in (difference.recorded, difference.found)] == lists
    row = parameters_table(found).data.splitlines()[-1]
    assert row.count("498, 499, ") == 2
    assert "499, 1" in row
    assert "499, 2" in row


def test_other_signatures_end_with_every_difference(opened, factory, releases):
    other = Signature((TensorSpec("signal", "float32", ("batch", 7)),), SIGNATURE.outputs)
    words = r"input of A: .*\(batch, 2\); of B: .*\(batch, 7\)"
    with pytest.raises(InvalidModelError, match=words):
        opened(releases[0], factory(signature=other))


def test_other_evaluation_data_take_the_place_of_the_newer_ones(opened, releases, tmp_path):
    signal = np.linspace(45, 50, 14).reshape(7, 2).astype(np.float32)
    np.savez(tmp_path / "other.npz", signal=signal)
    pair = opened(*releases, eval_data=str(tmp_path / "other.npz"))
    data = pair.load_data()
    assert (data.source, data.count, data.positions) == ("other.npz", 7, None)
    with pytest.raises(ParameterError, match="found no such file"):
        opened(*releases, eval_data=str(tmp_path / "missing.npz"))
    np.savez(tmp_path / "wrong.npz", other=signal)
    with pytest.raises(DataError, match="can't be used"):
        opened(*releases, eval_data=str(tmp_path / "wrong.npz")).load_data()


def test_kept_or_given_dataset_is_read_row_by_row(opened, factory, releases, tmp_path, s3):
    signal = np.random.default_rng(0).uniform(45, 50, (40, 2)).astype(np.float32)
    rows = ({"signal": signal}, signal.astype(np.float64), [f"event {n}" for n in range(40)])
    dataset = datasets.write(tmp_path / "set.zarr", rows, receivers={})
    kept = keep_dataset(Bucket(s3, BUCKET), dataset).model_dump()
    newer = factory(error_degrees=0.04, described={"content": [], "datasets": [kept]})
    pairs = (
        opened(releases[0], newer),
        opened(*releases, eval_data=str(tmp_path / "set.zarr")),
    )
    for pair, ratio in zip(pairs, (4, 2), strict=True):
        data = pair.load_data()
        assert (data.count, data.sha256) == (40, dataset.digest)
        (judged,) = compare_pair(pair, data).quality
        assert judged.loss == pytest.approx(ratio - 1, rel=1e-3)


def test_contract_is_that_of_b_unless_another_one_is_given(opened, factory, releases):
    judged = dict.fromkeys(("reference", "value", "loss", "low", "high"), 0.0)
    judged |= {"metric": "localization", "max_loss": 2.0, "confidence": 0.9, "outcome": "shown"}
    judged |= {"relative": True, "samples": 9, "groups": 9, "needed": 9, "method": "none"}
    lenient = factory(error_degrees=0.02, recorded={"parity": {"quality": [judged]}})
    pair = opened(releases[0], lenient)
    found = conclude(pair, compare_pair(pair, pair.load_data()), NotMeasured("not asked for"))
    (one,) = found.answers.quality
    assert (one.outcome, one.max_loss, one.confidence) == ("shown", 2.0, 0.9)
    assert (found.worse, found.not_shown) == ((), ())
    # A's own contract counts for nothing.
    (one,) = compare_pair(other := opened(lenient, releases[1]), other.load_data()).quality
    assert (one.max_loss, one.confidence) == (0.01, 0.95)
    pair = opened(releases[0], lenient, max_loss=0.5, confidence=0.99)
    (one,) = compare_pair(pair, pair.load_data()).quality
    assert (one.outcome, one.max_loss, one.confidence) == ("worse", 0.5, 0.99)


def test_release_on_synthetic_inputs_is_compared_on_such(opened, factory, releases):
    synthetic = factory(error_degrees=0.03, described={"content": []})
    pair = opened(releases[0], synthetic)
    data = pair.load_data()
    assert data.synthetic
    assert compare_pair(pair, data).quality == ()
    # The newer release's data count, on whichever side it is.
    assert newer_of(pair.b, pair.a) is pair.b


def test_releases_must_be_named(settings):
    with pytest.raises(ParameterError, match="Set a and b"):
        prepare(ComparisonParameters(), settings)
