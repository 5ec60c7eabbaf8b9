"""Links open what they name, for as long as they say, and nothing else."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
import records
from proxy import wait_for

from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.errors import ParameterError, SettingsError, VerificationError
from heimdall_onnx.common.logs import configure_logs, get_logger
from heimdall_onnx.review.links import LONGEST_S, Link, share_release
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.connection import Connection
from heimdall_onnx.services.settings import Settings

FOLDER = "models/localization/v20261120_143000"
PAGE = b"<!doctype html><title>report</title>"


@pytest.fixture
def folder_uri(s3, bucket) -> str:
    """What a release looks like to whoever shares it."""
    bodies = {"model.onnx": b"model", "report.html": PAGE, "report.ipynb": b"{}"}
    for name, body in bodies.items():
        # As somebody with write access might have stored it.
        s3.put_object(
            Bucket=bucket.name, Key=f"{FOLDER}/{name}", Body=body, ContentType="text/html"
        )
    objects = [
        {"key": f"{FOLDER}/{name}", "size": len(b), "sha256": hashlib.sha256(b).hexdigest()}
        for name, b in bodies.items()
    ]
    manifest = json.dumps(records.manifest_json(objects=objects)).encode()
    s3.put_object(Bucket=bucket.name, Key=f"{FOLDER}/manifest.json", Body=manifest)
    return f"{bucket.uri()}{FOLDER}"


def share(client, folder_uri: str, *, expires_s: int) -> tuple[Link, ...]:
    connection = Connection(Settings(_env_file=None), client, lambda: None)
    return share_release(Release.at(connection, folder_uri), expires_s=expires_s)


def ask(url: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, method=method, data=b"x" if method == "PUT" else None)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


@pytest.mark.services
def test_links_open_the_report_as_a_page_and_the_rest_as_files(s3, folder_uri):
    links = {link.name: link for link in share(s3, folder_uri, expires_s=60)}
    assert links.keys() == {"report.html", "report.ipynb", "manifest.json"}
    for name, link in links.items():
        status, headers, body = ask(link.url.get_secret_value())
        assert status == 200
        kind, shown = headers["Content-Type"], headers["Content-Disposition"]
        assert kind.startswith("text/html; charset=utf-8") == (name == "report.html")
        assert shown.startswith("inline" if name == "report.html" else "attachment")
        assert headers["Cache-Control"] == "private, no-store"
        assert (body == PAGE) == (name == "report.html")


@pytest.mark.services
def test_a_link_stops_working(s3, folder_uri):
    link = share(s3, folder_uri, expires_s=1)[0]
    url = link.url.get_secret_value()
    assert wait_for(lambda: ask(url)[0] == 403, 60)
    assert PAGE not in ask(url)[2]


@pytest.mark.services
@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("/report.html?", "/model.onnx?"),
        lambda url: url.replace("/report.html?", "/report.ipynb?"),
        lambda url: url.replace("X-Amz-Expires=60", "X-Amz-Expires=600000"),
        lambda url: url.replace("inline", "attachment"),
        lambda url: url.replace("text%2Fhtml", "text%2Fplain"),
        lambda url: url.partition("?")[0],
    ],
    ids=["model", "other object", "longer", "other way", "other type", "unsigned"],
)
def test_a_changed_link_is_refused(s3, folder_uri, change):
    url = share(s3, folder_uri, expires_s=60)[0].url.get_secret_value()
    assert change(url) != url
    status, _, body = ask(change(url))
    assert status == 403
    assert b"model" not in body.replace(b"models/", b"").replace(b"model.onnx", b"")


@pytest.mark.services
@pytest.mark.parametrize("method", ["PUT", "DELETE", "POST", "HEAD"])
def test_a_link_is_for_reading_only(s3, bucket, folder_uri, method):
    url = share(s3, folder_uri, expires_s=60)[0].url.get_secret_value()
    assert ask(url, method)[0] in {403, 405}
    key = urlsplit(url).path.removeprefix(f"/{bucket.name}/")
    assert s3.get_object(Bucket=bucket.name, Key=key)["Body"].read() == PAGE


@pytest.mark.services
def test_a_link_is_shown_by_nothing_that_shows_it(s3, folder_uri, caplog):
    log = io.StringIO()
    configure_logs(stream=log)
    with caplog.at_level(logging.INFO):
        links = share(s3, folder_uri, expires_s=60)
        get_logger("test").info("shared", link=links[0], links=links, url=links[0].url)
    signature = links[0].url.get_secret_value().partition("X-Amz-Signature=")[2]
    assert len(signature) == 64
    for text in (repr(links), str(links[0].url), log.getvalue(), caplog.text):
        assert signature not in text
        assert "X-Amz" not in text


@pytest.mark.services
def test_only_a_release_can_be_shared(s3, bucket, folder_uri):
    with pytest.raises(VerificationError, match="is not a release"):
        share(s3, f"{bucket.uri()}models/localization/v1", expires_s=60)
    s3.delete_object(Bucket=bucket.name, Key=f"{FOLDER}/manifest.json")
    with pytest.raises(VerificationError, match="is not a release"):
        share(s3, folder_uri, expires_s=60)


@pytest.mark.services
def test_a_link_needs_credentials(embedded_settings, folder_uri, monkeypatch, tmp_path):
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    nobody = {"s3_access_key_id": None, "s3_secret_access_key": None}
    client = make_client(embedded_settings.model_copy(update=nobody))
    with pytest.raises(SettingsError, match="there are no credentials"):
        share(client, folder_uri, expires_s=60)


@pytest.mark.parametrize("expires_s", [0, -1, LONGEST_S + 1, True])
def test_the_time_is_limited(expires_s):
    with pytest.raises(ParameterError, match=r"1 to 604800 seconds \(7 days\)"):
        share(None, "s3://b/v1", expires_s=expires_s)
