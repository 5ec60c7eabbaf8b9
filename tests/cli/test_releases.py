"""A release's variants on the command line: listed, shown, verified."""

import json

import pytest
from click.testing import CliRunner, Result
from quick_release import Factory

from heimdall_onnx.cli.main import main
from heimdall_onnx.services.connection import connect

pytestmark = pytest.mark.services

BUCKET = "test-cli-releases"


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("cli-releases")


@pytest.fixture(scope="module")
def releases(settings, tmp_path_factory):
    """One release with variants, and one without."""
    factory = Factory(connect(settings), BUCKET, tmp_path_factory.mktemp("releases"))
    return factory(recommended="int8-minmax"), factory()


@pytest.fixture
def call(settings, releases, monkeypatch, reset_mlflow):
    settings.apply()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri.get_secret_value())

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, [*arguments, "--bucket", BUCKET])

    return run


def test_list_names_the_recommended_variant(call, releases):
    varied, plain = call("list").stdout.splitlines()
    assert varied.startswith(f"{releases[0].version}  pass")
    assert varied.endswith("  recommended int8-minmax")
    assert plain.startswith(f"{releases[1].version}  pass")
    assert "recommended" not in plain


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ((), "models/localization"),
        (("--name", "heimdall-localization-onnx"), "models/localization"),
        (("--name", "mine"), "models/mine"),
        (("--name", "mine", "--prefix", "models/ours"), "models/ours"),
    ],
)
def test_a_version_is_looked_for_in_the_folder_of_its_model(call, options, folder):
    for command in ("show", "verify", "link", "reproduce"):
        result = call(command, "v20200101_000000", *options)
        assert result.exit_code == 2, command
        missing = f"there is no release at s3://{BUCKET}/{folder}/v20200101_000000;"
        assert missing in result.stderr, command


def test_a_release_without_its_manifest_is_broken_and_no_wrong_name(call, settings):
    folder = "models/localization/v20200101_000001"
    bucket = connect(settings).bucket(BUCKET)
    bucket.upload_bytes(b"{}", f"{folder}/metadata.json")
    for command in ("show", "verify"):
        result = call(command, "v20200101_000001")
        assert result.exit_code == 3, command
        assert f"s3://{BUCKET}/{folder} has no manifest" in result.stderr, command
    bucket.delete([f"{folder}/metadata.json"])
    assert call("show", f"s3://no-such-bucket/{folder}").exit_code == 2


def test_list_of_a_folder_without_releases_says_which_that_is(call):
    result = call("list", "--name", "mine")
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"there is no release in s3://{BUCKET}/models/mine" in result.stderr
    assert "--prefix" in result.stderr


def test_list_shows_a_page_and_says_where_the_next_one_begins(call, releases):
    first, second = releases
    page = call("list", "--limit", "1")
    assert [line.split()[0] for line in page.stdout.splitlines()] == [first.version]
    assert page.stderr.splitlines()[-1] == f"there are more: --after {first.version}"
    rest = call("list", "--limit", "1", "--after", first.version)
    assert [line.split()[0] for line in rest.stdout.splitlines()] == [second.version]
    assert "there are more" not in rest.stderr
    since = call("list", "--after", first.version[:9])
    assert len(since.stdout.splitlines()) == 2


@pytest.mark.parametrize("address", ["net@staging", "net/2", "models:/net@staging"])
def test_release_is_found_by_its_registered_version(call, releases, address):
    for command in ("show", "verify", "link"):
        result = call(command, address)
        assert result.exit_code == 0, result.stderr
        assert releases[1].version in result.stdout, command


@pytest.mark.parametrize("address", ["net@nowhere", "net/99", "nobody@staging"])
def test_what_is_not_registered_is_bad_input(call, releases, address):
    for command in ("show", "verify", "promote"):
        more = ("--reviewer", "R", "--note", "N") if command == "promote" else ()
        result = call(command, address, *more)
        assert result.exit_code == 2, command
        assert address.split("@")[-1].split("/")[-1] in result.stderr, command


def test_show_says_what_became_of_each_variant(call, releases):
    varied = releases[0]
    shown = call("show", varied.version)
    assert json.loads(shown.stdout) == varied.data
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in shown.stderr.splitlines()}
    size = varied.objects["variants/int8-minmax/model.onnx"].size
    assert set(rows) == {one.name for one in varied.said.variants.judged}
    assert rows["int8-minmax"].split() == [
        "passed",
        f"{size / 1e6:.2f}",
        "MB",
        "variants/int8-minmax/model.onnx",
        "recommended",
    ]
    assert rows["fp32-openvino"].split()[-1] == "model.onnx"
    assert rows["int4-weights"].split(maxsplit=1) == ["failed", "a reason for int4-weights"]
    assert rows["fp16-cuda"].startswith("unavailable")


def test_show_as_json_is_one_line_and_nothing_else(call, releases):
    shown = call("show", releases[0].version, "--json")
    assert json.loads(shown.stdout) == releases[0].data
    assert len(shown.stdout.splitlines()) == 1
    assert shown.stderr == ""


def test_show_of_a_release_without_variants_is_its_manifest(call, releases):
    shown = call("show", releases[1].version)
    assert json.loads(shown.stdout) == releases[1].data
    assert shown.stderr == ""


def test_text_of_a_manifest_does_not_steer_the_terminal(call, releases, s3):
    varied = releases[0]
    forged = varied.text.replace(b"a reason for fp16-cuda", rb"\u001b[2J\nfp32  passed")
    s3.put_object(Bucket=BUCKET, Key=varied.key, Body=forged)
    try:
        shown = call("show", varied.version)
    finally:
        s3.put_object(Bucket=BUCKET, Key=varied.key, Body=varied.text)
    assert "\x1b" not in shown.output
    assert r"\x1b[2J\nfp32  passed" in shown.stderr


def test_verify_checks_every_variant_and_names_the_one_that_was_changed(call, releases, s3):
    varied, name = releases[0], "variants/int8-nncf/model.onnx"
    held = call("verify", varied.version)
    assert held.exit_code == 0, held.output
    assert f"holds    {varied.folder}/report.ipynb, its record of variant int8-nncf" in held.stdout
    key = varied.objects[name].key
    before = s3.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    s3.put_object(Bucket=BUCKET, Key=key, Body=before[:-1] + bytes([before[-1] ^ 1]))
    try:
        changed = call("verify", varied.version, "--json")
    finally:
        s3.put_object(Bucket=BUCKET, Key=key, Body=before)
    assert changed.exit_code == 3
    found = json.loads(changed.stdout.splitlines()[-1])
    assert [f["what"] for f in found["findings"] if not f["holds"]] == [key]


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "net/1", "net/2"),
        ("verify", "net/1"),
        ("reproduce", "net/1"),
        ("promote", "net/1", "--reviewer", "a person", "--note", "looked at"),
        ("rollback", "net", "--to-previous", "--reviewer", "a person", "--note", "looked at"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_unusable_settings_are_told_as_json_too(arguments, monkeypatch):
    monkeypatch.setenv("HEIMDALL_RETENTION_DAYS", "many")
    refused = CliRunner().invoke(main, [*arguments, "--json"])
    assert refused.exit_code == 2
    answer = json.loads(refused.stdout.splitlines()[-1])
    assert answer["success"] is False
    assert "HEIMDALL_RETENTION_DAYS" in answer["error"]
    assert CliRunner().invoke(main, arguments).stdout == ""
