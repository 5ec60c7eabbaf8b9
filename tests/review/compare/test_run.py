"""A comparison on the command line: judged from outside, stored beside the newer release."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import nbformat
import pytest
from browser import open_in_chromium
from click.testing import CliRunner, Result
from hostile import EVERYTHING, HOST, MARK
from quick_release import SIGNATURE, Factory

from heimdall_onnx.archive.manifest import COMPARISONS
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.cli.main import main
from heimdall_onnx.model.signature import Signature, TensorSpec
from heimdall_onnx.report.judge import Judgement
from heimdall_onnx.review.compare import run as runner
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.store import Bucket, parse_uri

pytestmark = pytest.mark.services

BUCKET = "test-comparison"
GATE = {"name": "opset", "limit": "= 14", "measured": 14, "passed": True, "detail": ""}


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("comparison")


@pytest.fixture(scope="module")
def releases(settings, tmp_path_factory):
    """A release, and one that is worse: slower, further off, and with text that would be more."""
    factory = Factory(connect(settings), BUCKET, tmp_path_factory.mktemp("releases"))
    described = {"gates": [GATE], "parameters": {"opset": 14}}
    old = factory(error_degrees=0.01, described=described)
    hostile = {**GATE, "name": EVERYTHING, "detail": EVERYTHING, "measured": EVERYTHING}
    described = {
        "gates": [GATE, hostile],
        "parameters": {"opset": EVERYTHING, EVERYTHING: 1},
    }
    return old, factory(error_degrees=0.02, products=40, described=described)


@pytest.fixture
def call(settings, releases, monkeypatch, reset_mlflow):
    settings.apply()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri.get_secret_value())

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--bucket", BUCKET])

    return run


@pytest.fixture(scope="module")
def told(settings, releases, tmp_path_factory):
    """What the command says of both, stored."""
    old, _ = releases
    with pytest.MonkeyPatch.context() as patch:
        settings.apply()
        patch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri.get_secret_value())
        folder = tmp_path_factory.mktemp("report") / "new"
        arguments = ["compare", old.version, "net@staging", "--bucket", BUCKET, "-o", str(folder)]
        done = CliRunner().invoke(main, [*arguments, "--store", "--json", "--calls", "60"])
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1
    return json.loads(done.stdout)


def test_command_tells_what_was_known_beforehand(told, releases):
    assert told["success"] is True
    assert [told[side]["uri"] for side in ("a", "b")] == [one.uri for one in releases]
    (judged,) = told["quality"]
    assert (judged["metric"], judged["outcome"], told["not_shown"]) == ("localization", "worse", [])
    assert judged["loss"] == pytest.approx(1, rel=1e-3)
    assert judged["low"] <= judged["loss"] <= judged["high"]
    assert 1111 < told["displacement_m"]["p50"] < 1113
    assert told["latency"]["ratio"]["low"] > 1
    words = told["sentence"]
    assert words.startswith("B is ")
    assert "slower" in words
    assert "B's median localization error is 100% worse" in words
    assert "positions move by 1.1 km at most" in words  # of 64 samples
    assert len(told["worse"]) == 2
    assert [gate["change"] for gate in told["gates"]] == ["", "is new"]


def test_report_was_executed_and_holds_the_figures(told):
    report = Path(told["report"])
    notebook = nbformat.read(report, 4)
    assert notebook.cells[0].source.startswith("# ✘ FAIL — B is ")
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o.output_type == "error"]
    # Positions, the loss, errors by sample and latency.
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 4
    assert sorted(path.name for path in report.parent.iterdir()) == [
        "events.jsonl",
        "report.html",
        "report.ipynb",
    ]


def test_text_of_a_release_is_inert_in_the_report(told):
    page = Path(told["report_html"])
    hosts, console, document = open_in_chromium(page.as_uri())
    assert not hosts & {HOST}
    assert not console
    assert f"<title>{MARK}" not in document
    assert "<img src=http" not in page.read_text()
    assert f'href="http://{HOST}' not in document


def test_stored_comparison_verifies_and_is_no_leftover(call, told, releases, s3):
    new = releases[1]
    for address, local in (("report_uri", "report"), ("report_html_uri", "report_html")):
        bucket, key = parse_uri(told[address])
        assert key.startswith(f"{new.folder}/{COMPARISONS}/{releases[0].version}-")
        assert Bucket(s3, bucket).read_bytes(key) == Path(told[local]).read_bytes()
    verified = call("verify", new.version, "--json")
    findings = {f["what"]: f for f in json.loads(verified.stdout)["findings"]}
    assert verified.exit_code == 0, verified.output
    # Known to the registry, so nothing is said of it beside its name.
    assert all(findings[parse_uri(told[a])[1]]["holds"] for a in ("report_uri", "report_html_uri"))
    doctor = call("doctor", "--older-than", "0", "--json")
    assert (doctor.exit_code, json.loads(doctor.stdout)) == (0, [])


def test_another_comparison_takes_no_place_of_the_first(call, told, releases):
    old, new = (one.version for one in releases)
    again = call("compare", new, old, "--store", "--json", "--no-latency")
    assert again.exit_code == 0, again.output
    other = json.loads(again.stdout)
    assert other["latency"] is None
    # Beside the newer one still, though that is A now.
    assert other["report_uri"].startswith(f"{releases[1].uri}/{COMPARISONS}/{old}-")
    assert other["report_uri"] != told["report_uri"]
    better = "Latency was not compared, B's median localization error is 50% better"
    assert other["sentence"].startswith(better)
    assert nbformat.read(other["report"], 4).cells[0].source.startswith("# ✔ PASS")
    assert call("verify", new).exit_code == 0


@pytest.mark.parametrize("change", ["changed", "taken away", "added"])
def test_changed_missing_or_added_byte_of_a_comparison_is_named(
    settings, told, releases, s3, change, reset_mlflow
):
    connection = connect(settings)
    bucket, key = parse_uri(told["report_html_uri"])
    before, other = Bucket(s3, bucket).read_bytes(key), key.replace("report-", "report")
    try:
        if change == "taken away":
            s3.delete_object(Bucket=bucket, Key=key)
        else:
            s3.put_object(Bucket=bucket, Key=key if change == "changed" else other, Body=b"x")
        wrong, unread = (
            [
                f
                for f in verify_release(Release.at(connection, releases[1].uri), content=read)
                if not f.holds
            ]
            for read in (True, False)
        )
    finally:
        s3.put_object(Bucket=bucket, Key=key, Body=before)
        s3.delete_object(Bucket=bucket, Key=other)
    digest = key.rpartition("-")[2].removesuffix(".html")
    expected = {"changed": {key, digest}, "taken away": {digest}, "added": {other}}[change]
    assert {word for word in expected if any(word in f.what for f in wrong)} == expected
    assert all(COMPARISONS in finding.what for finding in wrong)
    # Who only opens the model does not read them, and counts them all the same.
    assert bool(unread) == (change != "changed")


def test_report_that_is_there_is_not_overwritten(call, told, releases):
    folder = Path(told["report"]).parent
    before = Path(told["report"]).read_bytes()
    refused = call("compare", releases[0].version, releases[1].version, "-o", str(folder))
    assert refused.exit_code == 2
    assert "holds a report already (report.ipynb, report.html)" in refused.stderr
    assert Path(told["report"]).read_bytes() == before


def test_release_that_does_not_verify_ends_with_3(call, settings, releases, tmp_path, s3):
    damaged = Factory(connect(settings), BUCKET, tmp_path)(alias=None)
    s3.put_object(Bucket=BUCKET, Key=damaged.model.key, Body=b"changed")
    refused = call("compare", releases[0].version, damaged.version, "--json")
    assert refused.exit_code == 3
    answer = json.loads(refused.stdout)
    assert answer["success"] is False
    assert f"B, {damaged.uri}, does not verify" in answer["error"]
    assert "model.onnx: expected" in answer["error"]
    assert "the notebook, as far as it came: " in refused.stderr
    assert not Bucket(s3, BUCKET).list_keys(f"{damaged.folder}/{COMPARISONS}/")


def test_other_manifest_than_the_kernel_verified_stores_nothing(
    call, told, releases, s3, monkeypatch
):
    """Whoever writes to the bucket may show the two of them different ones."""

    def executed(_, report, *__, **___):
        shutil.copy(told["report"], report)
        return Judgement("", "", "", None)

    monkeypatch.setattr(runner, "started_kernel", lambda _: nullcontext())
    monkeypatch.setattr(runner, "execute_notebook", executed)
    old, new = releases
    place = Bucket(s3, BUCKET)
    manifest, keys = place.read_bytes(new.key), place.list_keys(new.folder)
    s3.put_object(Bucket=BUCKET, Key=new.key, Body=manifest + b"\n")
    try:
        refused = call("compare", old.version, new.version, "--store", "--json")
    finally:
        s3.put_object(Bucket=BUCKET, Key=new.key, Body=manifest)
    assert refused.exit_code == 3
    assert f"{new.uri} was changed while it was compared" in json.loads(refused.stdout)["error"]
    assert place.list_keys(new.folder) == keys


def test_models_of_other_inputs_end_with_3(call, settings, releases, tmp_path):
    other = Signature((TensorSpec("sound", "float32", ("batch", 2)),), SIGNATURE.outputs)
    made = Factory(connect(settings), BUCKET, tmp_path)(alias=None, signature=other)
    refused = call("compare", releases[0].version, made.version)
    assert refused.exit_code == 3
    assert "input of A: none; of B: sound: float32 (batch, 2)" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("net@staging", "net/2"), 2, "are one release"),
        (("v20200101_000000", "net/2"), 2, "there is no release at"),
        (("net@nobody", "net/2"), 2, "nobody"),
        (("net/1", "net/2", "--calls", "1"), 2, "calls"),
        (("net/1", "net/2", "--confidence", "1"), 2, "confidence"),
        (("net/1", "net/2", "--eval-data", "missing.npz"), 2, "found no such file"),
        (("net/1", "net/2", "--prefix", "../x"), 2, "prefix"),
        (("net/1",), 2, "Missing argument 'B'"),
    ],
)
def test_bad_usage_is_answered_with_what_was_expected(call, arguments, code, words):
    refused = call("compare", *arguments)
    assert refused.exit_code == code, refused.output
    assert words in refused.stderr
