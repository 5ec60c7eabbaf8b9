"""Promotion and rollback: on evidence, in a record, with every reason against it at once."""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from bs4 import BeautifulSoup
from keys import make_key
from quick_release import SIGNATURE, Factory

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.signing import Trust
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import (
    DataError,
    EvidenceError,
    ParameterError,
    PromotionError,
    RegistryError,
    StoreError,
    VerificationError,
)
from heimdall_onnx.evidence.latency.statistics import Speedup
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.review.compare import head_to_head
from heimdall_onnx.review.compare.gates import Limits
from heimdall_onnx.review.promotion import alias_history, promote_release, roll_back
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.services.store import Bucket, locate, parse_uri

pytestmark = pytest.mark.services

QUICK = Limits(calls=60)


BUCKET = "test-promotion"


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("review")


@pytest.fixture
def connection(settings, reset_mlflow):
    return connect(settings)


@pytest.fixture
def fresh(connection, tmp_path):
    """Makes releases; what is decided here is about another alias than they are offered under."""
    return partial(Factory(connection, BUCKET, tmp_path), alias=None)


@pytest.fixture(scope="module")
def _made():
    return defaultdict(list)


@pytest.fixture
def release(fresh, _made):
    """Gives releases that all tests share, so that they may be decided on and not be changed."""
    given = Counter()

    def get(**options):
        key = repr(options)
        if given[key] == len(_made[key]):
            _made[key].append(fresh(**options))
        given[key] += 1
        return _made[key][given[key] - 1]

    return get


@pytest.fixture(autouse=True)
def _undecided(connection):
    """No test knows what another one has decided."""
    yield
    bucket, tracker = connection.bucket(BUCKET), connection.tracker
    if bucket.is_there():
        bucket.delete(bucket.list_keys("aliases/"))
    for name in tracker.model_names():
        for alias in tracker.aliases(name):
            tracker.delete_alias(name, alias)


@pytest.fixture
def equally_fast(monkeypatch):
    """How long both models take is not measured where nothing is decided by it."""
    timed = SimpleNamespace(speedup=Speedup(1.0, 0.9, 1.1, 6))
    monkeypatch.setattr(head_to_head, "measure_both", lambda *_, **__: timed)


def promote(connection, manifest, **changes):
    given = {"alias": "production", "reviewer": "reviewer", "note": "looks right", "limits": QUICK}
    return promote_release(Release.at(connection, manifest.uri), **{**given, **changes})


def go_back(connection, manifest, **changes):
    given = {"alias": "production", "reviewer": "reviewer", "note": "too slow"}
    return roll_back(connection, manifest.bucket, "net", **{**given, **changes})


def pointed_at(connection) -> str | None:
    return connection.tracker.alias_target("net", "production")


def read(connection, address) -> bytes:
    bucket, key = locate(connection.client, address)
    return bucket.read_bytes(key, limit=10**7)


def holds(connection, manifest) -> bool:
    return all(finding.holds for finding in verify_release(Release.at(connection, manifest.uri)))


def test_promotion_moves_alias_and_stage_and_leaves_a_record(connection, release):
    first, second = release(), release()
    review = promote(connection, first)
    assert (review.version, review.previous, review.comparison.notes) == (
        first.model_version,
        None,
        ("nothing holds the alias yet",),
    )
    review = promote(connection, second, note="better\nby far")
    versions = [first.model_version, second.model_version]
    assert [review.previous, pointed_at(connection)] == versions
    stages = [connection.tracker.get_version("net", v).stage for v in versions]
    assert stages == ["Archived", "Production"]
    record = json.loads(read(connection, review.record_uri))
    assert record["reviewer"] == "reviewer"
    assert record["note"] == "better\nby far"
    assert record["manifest_sha256"] == second.sha256
    (judged,), (ratio,) = (record["comparison"][what] for what in ("quality", "ratios"))
    assert (judged["metric"], judged["outcome"], ratio["what"]) == (
        "localization",
        "shown",
        "latency",
    )
    assert holds(connection, first)
    assert holds(connection, second)


def test_page_of_a_decision_says_at_its_head_who_has_decided(connection, release):
    first = release()
    promote(connection, first, compare=False, reviewer="first reviewer", note="<b>fast</b>")
    promote(connection, release(), compare=False)
    review = go_back(connection, first, reviewer="second reviewer")
    page = read(connection, review.page_uri).decode()
    decided = BeautifulSoup(page, "html.parser").find(class_="decisions").find_all("li")
    promoted, gone_back = (line.get_text() for line in decided)
    assert promoted.startswith("Promoted as production by first reviewer on ")
    assert promoted.endswith(" UTC: <b>fast</b>")
    assert gone_back.startswith("Gone back to as production by second reviewer on ")
    assert holds(connection, first)


def test_changed_page_of_a_decision_is_found_out(connection, fresh):
    first = fresh()
    review = promote(connection, first, compare=False)
    bucket, key = parse_uri(review.page_uri)
    connection.client.put_object(Bucket=bucket, Key=key, Body=b"<h1>approved</h1>")
    assert not holds(connection, first)


def test_manifest_record_and_log_are_read_once(connection, release, equally_fast):
    promote(connection, release(), compare=False)
    candidate, read = release(), Counter()
    events = connection.client.meta.events

    def count(params, **_):
        read[params["Key"].removeprefix(f"{candidate.folder}/")] += 1

    events.register("before-parameter-build.s3.GetObject", count)
    try:
        promote(connection, candidate)
    finally:
        events.unregister("before-parameter-build.s3.GetObject", count)
    entries = {key: n for key, n in read.items() if key.startswith("aliases/")}
    # Both promotions; that of its own is read back when it is written.
    assert list(entries.values()) == [1, 1]
    assert (read["manifest.json"], read["report.ipynb"]) == (1, 1)


def test_decision_stands_where_its_page_can_not_be_kept(connection, release, monkeypatch):
    first = release()
    upload = Bucket.upload_bytes

    def refused(bucket, content, key, **options):
        if key.endswith(".html"):
            raise StoreError("no room")
        return upload(bucket, content, key, **options)

    monkeypatch.setattr(Bucket, "upload_bytes", refused)
    review = promote(connection, first, compare=False)
    assert (pointed_at(connection), review.page_uri) == (first.model_version, None)
    assert holds(connection, first)


def test_page_names_no_decision_that_the_log_does_not_have(connection, release, monkeypatch):
    first = release()

    def lost(*arguments, **options):
        raise StoreError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(AliasLog, "append", lost)
        with pytest.raises(StoreError):
            promote(connection, first, compare=False, reviewer="nobody")
    review = promote(connection, first, compare=False)
    page = read(connection, review.page_uri).decode()
    assert "nobody" not in BeautifulSoup(page, "html.parser").find(class_="decisions").get_text()


def test_less_accurate_or_slower_model_is_refused_with_both_reasons(connection, release):
    held = release()
    promote(connection, held)
    worse = release(error_degrees=0.02, products=20)
    with pytest.raises(PromotionError) as raised:
        promote(connection, worse)
    error, latency = str(raised.value).splitlines()[1:]
    told = "  - median localization error 1.1 km to 2.2 km, a loss of 100% (100% to 100%), limit 1%"
    assert error == told
    assert latency.startswith("  - latency: ")
    assert pointed_at(connection) == held.model_version
    assert not connection.bucket(worse.bucket).list_keys(f"{worse.folder}/reviews/")
    loose = Limits(max_loss=2, slowdown=1e6, calls=60)
    assert promote(connection, worse, limits=loose).version == worse.model_version


def test_test_run_that_is_worse_is_refused_for_both(connection, release, equally_fast):
    promote(connection, release())
    with pytest.raises(PromotionError) as raised:
        promote(connection, release(error_degrees=0.02, verdict="pass (smoke)"))
    assert "it is a test run" in str(raised.value)
    assert "median localization error 1.1 km to 2.2 km" in str(raised.value)


def test_promotion_can_be_made_without_a_comparison(connection, release):
    promote(connection, release())
    review = promote(connection, release(error_degrees=1), compare=False)
    assert review.comparison is None


def test_data_without_labels_leaves_accuracy_to_the_reviewer(connection, release, equally_fast):
    promote(connection, release())
    review = promote(connection, release(labelled=False), limits=Limits(slowdown=1e6, calls=60))
    assert [ratio.what for ratio in review.comparison.ratios] == ["latency"]
    assert "what is true of the samples is not known" in review.comparison.notes[0]


def test_every_reason_is_given_at_once(connection, fresh, tmp_path):
    manifest = fresh(verdict="fail (smoke)")
    s3 = connection.client
    s3.put_object(Bucket=manifest.bucket, Key=f"{manifest.folder}/report.html", Body=b"changed")
    with pytest.raises(PromotionError) as raised:
        promote(connection, manifest, trust=Trust(make_key(tmp_path).public))
    for reason in ("report.html: expected", "model.sig: expected", "'fail (smoke)'", "test run"):
        assert reason in str(raised.value)
    assert pointed_at(connection) is None


def test_what_holds_the_alias_is_not_promoted_again(connection, release):
    manifest = release()
    promote(connection, manifest)
    with pytest.raises(PromotionError, match="holds the alias production already"):
        promote(connection, manifest)


def test_damaged_holder_does_not_stand_in_the_way(connection, fresh, release):
    first, second = fresh(), release()
    promote(connection, first)
    connection.client.delete_object(Bucket=first.bucket, Key=first.model.key)
    review = promote(connection, second)
    assert f"version {first.model_version} does not verify" in review.comparison.notes[0]


def test_holder_of_other_inputs_does_not_stand_in_the_way(connection, release):
    wider = Signature((replace(SIGNATURE.inputs[0], shape=("batch", 3)),), SIGNATURE.outputs)
    held = release(signature=wider)
    promote(connection, held)
    comparison = promote(connection, release()).comparison
    assert (comparison.holder, comparison.ratios) == (held.model_version, ())
    assert (
        f"version {held.model_version} does not take the candidate's inputs" in comparison.notes[0]
    )
    assert "of A: signal: float32 (batch, 3)" in comparison.notes[0]


def test_holder_that_can_t_be_run_refuses_with_every_other_reason(connection, release, monkeypatch):
    held = release()
    promote(connection, held)

    def out_of_memory(*_, **__):
        raise EvidenceError("ONNX Runtime can't run the model: no memory")

    monkeypatch.setattr(head_to_head, "compare_answers", out_of_memory)
    with pytest.raises(PromotionError) as raised:
        promote(connection, release(verdict="pass (smoke)"))
    for reason in ("test run", f"compared with version {held.model_version}: ONNX Runtime can't"):
        assert reason in str(raised.value)
    assert pointed_at(connection) == held.model_version


def test_answers_that_are_no_numbers_refuse_a_promotion(connection, release, equally_fast):
    held = release()
    promote(connection, held)
    with pytest.raises(PromotionError, match="64 values are NaN or Inf in one of them"):
        promote(connection, release(error_degrees=math.nan), limits=Limits(slowdown=9, calls=60))
    assert pointed_at(connection) == held.model_version


# The same model as a classifier: its class is which of two values is larger.
CLASSES = Signature(SIGNATURE.inputs, (TensorSpec("positions", "float32", ("batch", 2)),))


def classifier(release, count, *, shift=0.0, **more):
    """A release whose labels are told by the larger value, but for about one in ten."""
    rng = np.random.default_rng(0)
    signal = rng.standard_normal((count, 2)).astype(np.float32)
    labels = np.where(rng.uniform(size=count) < 0.1, signal.argmin(1), signal.argmax(1))
    options = {"error_degrees": shift, "signature": CLASSES, "arrays": {"signal": signal}, **more}
    options["arrays"] = {"labels": labels, **options["arrays"]}
    return release(**options)


def recorded(metric="top1", max_loss=0.01, confidence=0.95):
    """What a release was judged by, in its record."""
    contract = {"metric": metric, "max_loss": max_loss, "confidence": confidence}
    values = dict.fromkeys(("reference", "value", "loss", "low", "high"), 0.0)
    beside = {"relative": False, "samples": 9, "groups": 9, "needed": 9, "method": "none"}
    return {"parity": {"quality": [{**contract, **values, **beside, "outcome": "shown"}]}}


def test_classifier_that_is_as_good_is_promoted_as_far_as_samples_show_it(
    connection, fresh, equally_fast
):
    held = classifier(fresh, 2000)
    promote(connection, held)
    few = classifier(fresh, 30, shift=0.002)
    with pytest.raises(PromotionError) as raised:
        promote(connection, few)
    (reason,) = str(raised.value).splitlines()[1:]
    assert re.search(
        r"- top1 .* a loss of 0 \(.*\), limit 0\.01; not shown: about \d+ samples", reason
    )
    (judged,) = promote(connection, few, limits=Limits(allow_not_shown=True)).comparison.quality
    assert (judged.outcome, judged.samples, judged.binding) == ("not shown", 30, False)
    assert 100 < judged.needed < 2000
    review = promote(connection, classifier(fresh, 2000, shift=0.002))
    (judged,) = review.comparison.quality
    assert (judged.metric, judged.outcome, review.comparison.not_shown) == ("top1", "shown", ())
    # Where it is shown to be worse nothing is allowed.
    bad = classifier(fresh, 2000, shift=1.0)
    with pytest.raises(PromotionError, match=r"- top1 0\.\d+ to 0\.\d+, a loss of 0\.[12]"):
        promote(connection, bad, limits=Limits(allow_not_shown=True))
    assert pointed_at(connection) == review.version


def test_contract_is_the_candidates_unless_another_one_is_given(connection, fresh, equally_fast):
    promote(connection, classifier(fresh, 2000))
    loose = {"recorded": recorded("nll", 0.5, 0.9)}
    review = promote(connection, classifier(fresh, 200, shift=0.1, **loose))
    (judged,) = review.comparison.quality
    assert (judged.metric, judged.max_loss, judged.confidence) == ("nll", 0.5, 0.9)
    limits = json.loads(read(connection, review.record_uri))["limits"]
    assert (limits["max_loss"], limits["released"]) == (0.5, ["nll"])
    strict = Limits(metric="top1", max_loss=0.001)
    with pytest.raises(PromotionError, match=r"- top1 .*limit 0\.001; not shown") as raised:
        promote(connection, classifier(fresh, 200, shift=0.1, **loose), limits=strict)
    assert "nll" not in str(raised.value)
    with pytest.raises(VerificationError, match=r"in a contract, found 0\.1 and 2"):
        promote(connection, classifier(fresh, 200, recorded=recorded(max_loss=0.1, confidence=2.0)))


def test_code_that_a_record_names_is_run_only_for_who_names_it(
    connection, fresh, equally_fast, tmp_path, monkeypatch
):
    code = "def close(outputs, labels):\n    return labels * 0.0\nclose.higher_is_better = False\n"
    (tmp_path / "somebodys_metric.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    promote(connection, classifier(fresh, 64))
    for name in ("close", "somebodys_metric:close"):
        comparison = promote(connection, classifier(fresh, 64, recorded=recorded(name))).comparison
        assert comparison.quality == ()
        assert "is code of somebody's own, name it with --metric" in comparison.notes[0]
        assert "somebodys_metric" not in sys.modules
    named = Limits(metric="somebodys_metric:close")
    (judged,) = promote(connection, classifier(fresh, 64), limits=named).comparison.quality
    assert (judged.metric, judged.outcome) == ("close", "shown")


def test_arrays_that_a_release_ignores_are_ignored_here_too(connection, fresh, equally_fast):
    promote(connection, classifier(fresh, 2000))
    beside = {"arrays": {"signal": np.zeros((64, 2), np.float32), "noise": np.zeros(64)}}
    ignoring = {"described": {"parameters": {"ignore": "noise, labels"}}}
    with pytest.raises(DataError, match="nothing uses noise"):
        promote(connection, fresh(signature=CLASSES, **beside))
    beside["arrays"]["labels"] = np.zeros(64)
    review = promote(connection, fresh(signature=CLASSES, **beside, **ignoring))
    assert "what is true of the samples is not known" in review.comparison.notes[0]


@pytest.mark.parametrize(
    "words",
    [
        {"reviewer": ""},
        {"reviewer": "a\nb"},
        {"reviewer": "x" * 201},
        {"note": " "},
        {"note": "a\x00b"},
        {"note": "a\u202eb"},
        {"alias": "latest"},
        {"alias": "../x"},
    ],
)
def test_words_that_can_not_be_kept_are_refused(connection, release, words):
    with pytest.raises(ParameterError):
        promote(connection, release(), **words)


def test_hostile_words_stay_what_they_are(connection, release):
    note = "<script>alert(1)</script> [x](javascript:alert(1)) ../../../ %2e%2e\n| a | b |"
    review = promote(connection, release(), reviewer="<b>reviewer</b>", note=note)
    record = json.loads(read(connection, review.record_uri))
    assert (record["reviewer"], record["note"]) == ("<b>reviewer</b>", note)
    (move,) = AliasLog(connection.bucket(BUCKET), "net", "production").moves
    assert (move.by, move.note) == ("<b>reviewer</b>", note)
    said = connection.tracker.get_version("net", review.version).description
    assert "&#60;b&#62;reviewer&#60;/b&#62;: &#60;script&#62;" in said


def test_decision_stands_that_mlflow_can_not_show(connection, release, monkeypatch):
    def fail(*_):
        raise RegistryError("it is read-only")

    manifest = release()
    monkeypatch.setattr(MLflowTracker, "describe_version", fail)
    assert promote(connection, manifest).version == pointed_at(connection) == manifest.model_version
    assert holds(connection, manifest)


def test_rollback_goes_back_one_version_each_time(connection, release):
    manifests = [release() for _ in range(3)]
    one, two, _ = (manifest.model_version for manifest in manifests)
    for manifest in manifests:
        promote(connection, manifest, compare=False)
    assert go_back(connection, manifests[0]).version == two
    assert go_back(connection, manifests[0]).version == one
    with pytest.raises(PromotionError, match="no version to go back to"):
        go_back(connection, manifests[0])
    assert pointed_at(connection) == one
    said = connection.tracker.get_version("net", one).description
    assert re.findall(r"UTC, (.*) by reviewer(.*): ", said)[-2:] == [
        ("promoted to **production**", ""),
        ("**production** rolled back to it", f", from version {two}"),
    ]
    promote(connection, manifests[2], compare=False)
    assert go_back(connection, manifests[0]).version == one
    assert all(holds(connection, manifest) for manifest in manifests)


def test_rollback_to_a_chosen_version(connection, release):
    manifests = [release() for _ in range(4)]
    one, two, three, four = (manifest.model_version for manifest in manifests)
    for manifest in manifests[:3]:
        promote(connection, manifest, compare=False)
    with pytest.raises(
        PromotionError, match=f"not pointed at version {four} before; it has at {one}, {two}"
    ):
        go_back(connection, manifests[0], version=four)
    assert go_back(connection, manifests[0], version=one).previous == three
    assert go_back(connection, manifests[0], version=three).previous == one


def test_rollback_waits_for_log_and_registry_to_agree(connection, release):
    manifests = [release() for _ in range(2)]
    for manifest in manifests:
        promote(connection, manifest, compare=False)
    one, two = (manifest.model_version for manifest in manifests)
    connection.tracker.set_alias("net", one, "production")
    with pytest.raises(PromotionError, match=f"points at version {one}, its log says {two}"):
        go_back(connection, manifests[0])


def test_rollback_passes_over_versions_that_are_gone(connection, fresh, release):
    manifests = [release(), fresh(), release()]
    for manifest in manifests:
        promote(connection, manifest, compare=False)
    connection.tracker.delete_version("net", manifests[1].model_version)
    assert go_back(connection, manifests[0]).version == manifests[0].model_version


def test_damaged_release_is_not_gone_back_to(connection, fresh, release):
    first, second = fresh(), release()
    for manifest in (first, second):
        promote(connection, manifest, compare=False)
    connection.client.put_object(Bucket=first.bucket, Key=first.model.key, Body=b"x")
    with pytest.raises(PromotionError, match=r"does not verify:\n  - .*model.onnx: expected"):
        go_back(connection, first)
    connection.client.delete_object(Bucket=first.bucket, Key=first.key)
    with pytest.raises(PromotionError, match="is not a release"):
        go_back(connection, first)
    assert pointed_at(connection) == second.model_version


def test_of_two_who_decide_at_once_one_is_told(connection, fresh, release, monkeypatch):
    first, second = release(), fresh()

    def meanwhile(*arguments, **options):
        monkeypatch.undo()
        promote(connection, first, compare=False)
        return verify_release(*arguments, **options)

    monkeypatch.setattr("heimdall_onnx.review.promotion.verify_release", meanwhile)
    with pytest.raises(PromotionError, match="was moved meanwhile"):
        promote(connection, second, compare=False)
    assert pointed_at(connection) == first.model_version
    assert holds(connection, second)
    keys = connection.bucket(second.bucket).list_keys(f"{second.folder}/reviews/")
    assert keys == ()


def test_history_tells_who_moved_what_and_where_mlflow_does_not_follow(connection, fresh):
    first, second = (fresh(alias="staging") for _ in range(2))
    one, two = first.model_version, second.model_version
    promote(connection, first)
    production, staging = alias_history(connection, first.bucket, "net")
    assert (production.alias, production.points_at, production.problem) == ("production", one, "")
    assert [(m.action, m.version, m.by) for m in staging.moves] == [
        ("release", one, "a run"),
        ("release", two, "a run"),
    ]
    connection.tracker.set_alias("net", two, "production")
    connection.tracker.set_alias("net", one, "other")
    problems = {h.alias: h.problem for h in alias_history(connection, first.bucket, "net")}
    assert problems["production"] == f"its log says version {one}, MLflow {two}"
    assert "no entry of a log" in problems["other"]
    connection.client.put_object(
        Bucket=first.bucket, Key="aliases/net/staging/00000001.json", Body=json.dumps({}).encode()
    )
    problems = {h.alias: h.problem for h in alias_history(connection, first.bucket, "net")}
    assert "00000001.json" in problems["staging"]
