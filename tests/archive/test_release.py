"""The handle of a release: what it reads it reads once, and believes no other report."""

import pytest
from quick_release import Factory

from heimdall_onnx.archive.find import find_release
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import ParameterError, StoreError, VerificationError
from heimdall_onnx.services.connection import connect

pytestmark = pytest.mark.services


@pytest.fixture
def connection(make_settings, reset_mlflow):
    return connect(make_settings("handle"))


@pytest.fixture
def manifest(connection, bucket, tmp_path):
    return Factory(connection, bucket.name, tmp_path)()


def test_release_has_one_handle_whatever_it_is_called(connection, manifest):
    place = {"bucket": manifest.bucket, "prefix": manifest.folder.rpartition("/")[0]}
    for address in (manifest.version, manifest.uri, f"{manifest.uri}/", "net@staging", "net/1"):
        found = find_release(connection, address, **place)
        assert (found.uri, found.manifest.sha256) == (manifest.uri, manifest.sha256)
    with pytest.raises(ParameterError, match="found nothing"):
        find_release(connection, " ", **place)


def test_what_was_read_is_not_read_again(connection, manifest):
    release = Release.at(connection, manifest.uri)
    report = release.report
    release.bucket.delete([manifest.key, f"{manifest.folder}/report.ipynb"])
    assert release.report is report
    assert release.manifest.sha256 == manifest.sha256
    with pytest.raises(VerificationError, match="is not a release"):
        _ = Release.at(connection, manifest.uri).manifest


def test_report_that_is_another_one_is_refused(connection, manifest):
    release = Release.at(connection, manifest.uri)
    release.bucket.upload_bytes(b"{}", f"{manifest.folder}/report.ipynb")
    with pytest.raises(VerificationError, match=r"report\.ipynb is not what was released"):
        _ = release.report


def test_report_that_is_too_large_to_be_read_is_not_called_another_one(
    connection, manifest, monkeypatch
):
    for module in ("release", "verify"):
        monkeypatch.setattr(f"heimdall_onnx.archive.{module}.MAX_READ_BYTES", 100)
    release = Release.at(connection, manifest.uri)
    held = {finding.what: finding for finding in verify_release(release)}
    key = f"{manifest.folder}/report.ipynb"
    assert held[key].holds
    assert "is larger than 100 bytes" in held[f"{key}, its record of model.onnx"].found
    with pytest.raises(VerificationError, match="is larger than 100 bytes"):
        _ = release.report


def test_object_that_is_another_one_is_not_fetched(connection, manifest, tmp_path):
    release = Release.at(connection, manifest.uri)
    entry = manifest.objects["MLmodel"]
    path = release.fetch(entry, tmp_path / "MLmodel")
    assert path.stat().st_size == entry.size
    release.bucket.upload_bytes(b"flavors: {}", entry.key)
    with pytest.raises(StoreError, match="is damaged"):
        release.fetch(entry, tmp_path / "again")
    assert not (tmp_path / "again").exists()
