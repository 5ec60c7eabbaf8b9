"""The command line passes values through and turns results into exit codes."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from keys import make_key
from scipy.io import wavfile

from heimdall_onnx.cli.main import main
from heimdall_onnx.cli.release import summary
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.services.settings import Settings

pytestmark = pytest.mark.services


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def run(*arguments: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "heimdall_onnx", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


@pytest.fixture(scope="module")
def home(demo_home: Path, empty_database: Path, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("cli-home")
    shutil.copytree(demo_home / "demo", home / "demo")
    shutil.copyfile(empty_database, home / "mlflow.db")
    return home


@pytest.fixture(scope="module")
def released(embedded_settings: Settings, home: Path) -> Result:
    """The demo, released into the default bucket."""
    embedded_settings.model_copy(update={"home": home}).apply()
    return call("demo", "--profile", "smoke", "-p", "opset", "14", "--json")


@pytest.fixture
def configured(embedded_settings: Settings, home: Path) -> None:
    """The environment as a user of these services would set it."""
    embedded_settings.model_copy(update={"home": home}).apply()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home / 'mlflow.db'}"


def test_help_names_every_command():
    text = call("--help").output
    for command in (
        *(
            "release",
            "train",
            "data",
            "features",
            "demo",
            "services",
            "list",
            "show",
            "verify",
            "promote",
        ),
        *("rollback", "history", "reproduce", "doctor", "link", "policy"),
    ):
        assert command in text


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import heimdall_onnx.cli.main; "
        "print([m for m in ('torch', 'mlflow', 'onnxruntime', 'boto3', 'matplotlib', 'scipy') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_option_is_bad_usage():
    assert call("release", "x.ckpt", "--nonsense").exit_code == 2


def test_unknown_parameter_suggests_the_nearest(configured):
    done = run("release", "x.ckpt", "-p", "tolerence", "1", "--json")
    assert done.returncode == 2
    assert "did you mean tolerance" in done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["success"] is False


def test_mistyped_parameter_is_bad_input(configured):
    result = call("release", "x.ckpt", "-p", "batch_size", "many")
    assert result.exit_code == 2
    assert "batch_size" in result.output


def test_missing_checkpoint_is_bad_input_and_named(configured):
    done = call("release", "missing.ckpt", "--json")
    assert done.exit_code == 2
    assert "missing.ckpt" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["success"] is False


def test_demo_prints_its_result_as_json(released):
    assert released.exit_code == 0, released.stderr
    result = json.loads(released.stdout.splitlines()[-1])
    assert set(result) >= {
        *("success", "verdict", "version", "s3_uri", "report_uri", "report_html_uri"),
        *("manifest_uri", "model_name", "model_version", "run_id", "speedup", "gates"),
    }
    assert result["s3_uri"].endswith("/model.onnx")


def test_nothing_printed_holds_a_credential(released, embedded_settings):
    for secret in embedded_settings.credentials[:2]:
        assert secret.get_secret_value() not in released.stdout + released.stderr


def test_summary_names_addresses_and_what_to_do_next(released):
    text = summary(ReleaseResult(**json.loads(released.stdout.splitlines()[-1])))
    for words in (
        "pass (smoke)",
        "alias staging",
        "speedup",
        "s3://",
        "file://",
        "load_model",
        "verify",
        " s, most of it ",
    ):
        assert words in text


def test_decisions_on_a_release_and_their_history(released, configured):
    result = json.loads(released.stdout)
    decide = ("--reviewer", "reviewer", "--note", "looks right")
    refused = call("promote", result["version"], *decide)
    assert refused.exit_code == 3
    assert "it is a test run (profile smoke)" in refused.stderr
    promoted = call("promote", result["version"], "--allow-smoke", "--json", *decide)
    assert promoted.exit_code == 0, promoted.stderr
    review = json.loads(promoted.stdout.splitlines()[-1])
    assert (review["alias"], review["version"]) == ("production", result["model_version"])
    name = result["model_name"]
    history = call("history", name).stdout
    assert f"{name}@production: version {result['model_version']}" in history
    assert "promote  version 1  by reviewer: looks right" in history
    assert call("rollback", name, "--to-previous", *decide).exit_code == 3
    assert call("rollback", name, *decide).exit_code == 2
    assert call("promote", result["version"], "--to", "latest", *decide).exit_code == 2


def test_signature_that_is_asked_for_and_missing_is_a_finding(released, configured, tmp_path):
    version = json.loads(released.stdout)["version"]
    verified = call("verify", version, "--json", "--public-key", make_key(tmp_path).public)
    assert verified.exit_code == 3
    found = json.loads(verified.stdout.splitlines()[-1])
    assert not found["holds"]
    (wrong,) = [finding for finding in found["findings"] if not finding["holds"]]
    assert wrong["found"] == "none: the release is unsigned"


def test_doctor_shows_what_it_would_do_before_it_does_it(released, configured, s3):
    key = "models/localization/v20200101_000000/metadata.json"
    s3.put_object(Bucket="heimdall-models", Key=key, Body=b"{}")
    assert call("doctor").exit_code == 0  # too young
    time.sleep(1.1)  # the store tells the time in whole seconds
    shown = call("doctor", "--older-than", "0")
    assert shown.exit_code == 3
    assert "unfinished folder: s3://heimdall-models/models/localization/v2020" in shown.stdout
    assert s3.head_object(Bucket="heimdall-models", Key=key)
    mended = call("doctor", "--older-than", "0", "--fix")
    assert mended.exit_code == 0, mended.stderr
    assert call("doctor", "--older-than", "0").exit_code == 0
    assert call("verify", json.loads(released.stdout)["version"]).exit_code == 0


def test_links_open_the_report_and_policies_are_printed(released, configured):
    links = call("link", json.loads(released.stdout)["version"], "--hours", "0.1").stdout
    address = next(line.split()[1] for line in links.splitlines() if line.startswith("report.html"))
    with urllib.request.urlopen(address) as response:
        assert b"PASS" in response.read()
    policy = json.loads(call("policy", "consumer", "--bucket", "models").stdout)
    assert all("arn:aws:s3:::models" in str(s["Resource"]) for s in policy["Statement"])
    assert call("policy", "consumer", "--bucket", "*").exit_code == 2


def test_reproducing_what_is_no_release_says_so(configured, bucket):
    missing = call("reproduce", "v20200101_000000", "--bucket", bucket.name)
    assert missing.exit_code == 2
    assert "there is no release at" in missing.stderr


def test_release_is_listed_shown_verified_and_noticed_when_changed(released, configured, s3):
    version = json.loads(released.stdout.splitlines()[-1])["version"]
    assert f"{version}  pass (smoke)" in call("list").output
    shown = call("show", version)
    assert json.loads(shown.stdout)["version"] == version
    assert call("verify", version).exit_code == 0

    folder = f"models/localization/{version}"
    s3.put_object(Bucket="heimdall-models", Key=f"{folder}/metadata.json", Body=b"{}")
    changed = call("verify", version)
    assert changed.exit_code == 3
    assert "metadata.json" in changed.output


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"objects": ["x"], "mlflow": {}, "verdict": null}', b'{"mlflow": null}']
)
def test_manifest_that_cannot_be_read_does_not_hide_the_others(released, configured, s3, body):
    version = json.loads(released.stdout.splitlines()[-1])["version"]
    key = "models/localization/v20000101_000000/manifest.json"
    s3.put_object(Bucket="heimdall-models", Key=key, Body=body)
    listed = call("list", "--prefix", "models/localization/")
    s3.delete_object(Bucket="heimdall-models", Key=key)
    assert listed.exit_code == 3
    assert "v20000101_000000" in listed.stderr
    assert f"{version}  pass (smoke)" in listed.stdout


def test_nothing_is_called_a_verdict_before_it_was_judged():
    text = summary(ReleaseResult(False, 2, "fail", error="no such file"))
    assert text == ""
    assert "verdict    fail" in summary(ReleaseResult(False, 3, "fail", error="a gate"))


def test_list_before_the_first_release_is_empty(configured):
    listed = call("list", "--bucket", "not-there-yet")
    assert listed.exit_code == 0
    assert listed.stdout == ""
    assert "no bucket not-there-yet yet" in listed.stderr


def test_bad_parameter_of_the_demo_is_answered_before_it_is_trained(tmp_path):
    os.environ["HEIMDALL_HOME"] = str(tmp_path)
    result = call("demo", "--profile", "quik", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["exit_code"] == 2
    assert not (tmp_path / "demo").exists()


def test_show_of_no_release_says_so(configured, bucket):
    result = call("show", "v20000101_000000", "--bucket", bucket.name)
    assert result.exit_code == 2
    assert "there is no release at" in result.output


def test_store_out_of_reach_is_a_service_failure(configured):
    done = run("list", env={**os.environ, "MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:9"})
    assert done.returncode == 4
    assert "Traceback" not in done.stderr


def test_features_of_plain_recordings(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for name in "abc":
        samples = (rng.standard_normal((24000, 2)) * 1000).astype(np.int16)
        paths.append(tmp_path / f"{name}.wav")
        wavfile.write(paths[-1], 12000, samples)
    output = tmp_path / "out.npz"
    result = call("features", *paths, "-o", output, "--position", 50.0, 9.0)
    assert result.exit_code == 0, result.output
    with np.load(output) as made:
        assert made["mel_spectrogram"].shape[1:] == (3, 128, 32)
        assert (made["positions"] == (50.0, 9.0)).all()


def test_features_of_a_broken_recording_are_bad_input(tmp_path):
    (tmp_path / "x.wav").write_bytes(b"RIFF")
    result = call("features", tmp_path / "x.wav", "-o", tmp_path / "o.npz", "--channels", "iqm")
    assert result.exit_code == 2
    assert "x.wav" in result.output
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.thorough
def test_services_go_up_and_down(tmp_path):
    os.environ["HEIMDALL_HOME"] = str(tmp_path / "home")
    try:
        up = call("services", "up")
        assert up.exit_code == 0, up.output
        assert up.output.count("running") == 2
        assert "http://127.0.0.1:" in up.output
    finally:
        down = call("services", "down")
    assert down.stdout.count("stopped  ") == 2
    assert call("services", "status").stdout.count("stopped  ") == 2
