"""What a release was made of is kept once, under its hash."""

import pytest
from structlog.testing import capture_logs

from heimdall_onnx.archive.content import fetch_content, keep_content
from heimdall_onnx.common.errors import DataError, StoreError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(b"weights")
    return path


def keep(s3, bucket, path):
    return keep_content(Bucket(s3, bucket), path, hash_file(path), "checkpoint")


def test_content_is_stored_once_and_comes_back(s3, bucket, checkpoint, tmp_path):
    kept = keep(s3, bucket.name, checkpoint)
    with capture_logs() as logs:
        assert keep(s3, bucket.name, checkpoint) == kept
    assert [entry["event"] for entry in logs] == ["content there already"]
    assert bucket.list_keys("") == (f"objects/sha256/{hash_file(checkpoint)}",)
    folder = tmp_path / "fetched"
    folder.mkdir()
    fetched = fetch_content(bucket, kept, folder)
    assert (fetched.name, fetched.read_bytes()) == ("checkpoint.ckpt", b"weights")


def test_damaged_content_is_replaced(s3, bucket, checkpoint):
    kept = keep(s3, bucket.name, checkpoint)
    s3.put_object(Bucket=bucket.name, Key=kept.key, Body=b"Weights")
    assert keep(s3, bucket.name, checkpoint) == kept
    assert s3.get_object(Bucket=bucket.name, Key=kept.key)["Body"].read() == b"weights"


def test_file_that_changed_since_it_was_read_is_refused(s3, bucket, checkpoint):
    read = hash_file(checkpoint)
    checkpoint.write_bytes(b"others!")
    with pytest.raises(DataError, match="has changed"):
        keep_content(bucket, checkpoint, read, "checkpoint")


def test_content_that_is_gone_or_changed_is_not_fetched(s3, bucket, checkpoint, tmp_path):
    kept = keep(s3, bucket.name, checkpoint)
    s3.put_object(Bucket=bucket.name, Key=kept.key, Body=b"Weights")
    with pytest.raises(StoreError, match="damaged"):
        fetch_content(bucket, kept, tmp_path)
    s3.delete_object(Bucket=bucket.name, Key=kept.key)
    with pytest.raises(StoreError, match="checkpoint of the release can't be fetched"):
        fetch_content(bucket, kept, tmp_path)


def test_name_from_a_manifest_can_not_leave_the_folder(s3, bucket, checkpoint, tmp_path):
    kept = keep(s3, bucket.name, checkpoint).model_copy(update={"name": "../../elsewhere.npz"})
    assert fetch_content(bucket, kept, tmp_path).parent == tmp_path
