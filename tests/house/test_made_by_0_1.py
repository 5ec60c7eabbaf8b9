"""What 0.1 has made is refused in one sentence, by everything that opens a release."""

import hashlib
import json

import pytest
from click.testing import CliRunner
from quick_release import PREFIX, Factory

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.errors import VerificationError
from heimdall_onnx.review.compare.pair import ComparisonParameters, find_pair
from heimdall_onnx.review.promotion import promote_release
from heimdall_onnx.review.reproduce.run import reproduce_release
from heimdall_onnx.services.connection import connect

pytestmark = pytest.mark.services

BUCKET = "test-made-by-0-1"
REVIEW = {"alias": "production", "reviewer": "reviewer", "note": "a note"}


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("made-by-0-1")


@pytest.fixture(scope="module")
def old(settings, s3, tmp_path_factory) -> Release:
    """A release whose manifest is whole, and registered, and of the schema before."""
    connection = connect(settings)
    made = Factory(connection, BUCKET, tmp_path_factory.mktemp("old"))()
    text = json.dumps({**made.data, "schema_version": 3}).encode()
    s3.put_object(Bucket=BUCKET, Key=made.key, Body=text)
    tags = {"manifest_sha256": hashlib.sha256(text).hexdigest()}
    connection.tracker.set_version_tags("net", made.model_version, tags)
    return Release.at(connection, made.uri)


def find_old(release: Release, settings) -> None:
    parameters = ComparisonParameters(a=release.uri, b="net@staging", bucket=BUCKET)
    a, _ = find_pair(release.connection, parameters)
    assert a.manifest


@pytest.mark.parametrize(
    "step",
    [
        lambda release, settings: verify_release(release),
        lambda release, settings: load_model("models:/net@staging", settings=settings),
        lambda release, settings: load_model(release.uri, settings=settings),
        lambda release, settings: promote_release(release, **REVIEW),
        lambda release, settings: reproduce_release(release),
        find_old,
    ],
    ids=["verify", "load by alias", "load by address", "promote", "reproduce", "compare"],
)
def test_release_of_0_1_is_refused_in_one_sentence(old, settings, step, reset_mlflow):
    with pytest.raises(VerificationError) as raised:
        step(old, settings)
    assert str(raised.value) == (
        f"{old.uri}/manifest.json was made by heimdall-onnx 0.1: reproduce it with that version"
    )


@pytest.mark.parametrize("command", ["show", "verify"])
def test_command_line_says_so_and_ends_with_3(old, settings, command, monkeypatch, reset_mlflow):
    settings.apply()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri.get_secret_value())
    version = old.uri.rpartition("/")[2]
    done = CliRunner().invoke(main, [command, version, "--bucket", BUCKET, "--prefix", PREFIX])
    assert done.exit_code == 3
    assert "was made by heimdall-onnx 0.1: reproduce it with that version" in done.stderr
