"""Datasets in the bucket: read by ranges, as the folder they came from; sent once."""

import pickle
import secrets
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import samples, write, write_in_small_shards

from heimdall_onnx.archive.content import fetch_dataset, keep_dataset, open_kept, upload_dataset
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.errors import DataError, StoreError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.data.dataset import files as dataset_files
from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_in_small_shards(tmp_path_factory.mktemp("dataset") / "data", samples())


@pytest.fixture
def stored(s3, bucket, dataset):
    """A copy in the bucket to damage."""
    address = upload_dataset(bucket, dataset, "sets/own")
    assert address == f"{bucket.uri()}sets/own"
    return open_dataset(address, client=s3)


@pytest.fixture(scope="module")
def left_alone(s3, dataset):
    """A copy in the bucket that nobody changes."""
    bucket = Bucket(s3, f"test-{secrets.token_hex(6)}")
    bucket.ensure()
    return open_dataset(upload_dataset(bucket, dataset, "sets/own"), client=s3)


def requests(client, call):
    """The operations that a call asks the store for."""
    seen = []
    log = lambda model, **_: seen.append(model.name)  # noqa: E731
    client.meta.events.register("before-call.s3", log)
    try:
        call()
    finally:
        client.meta.events.unregister("before-call.s3", log)
    return seen


def test_rows_are_those_of_the_folder(left_alone, dataset):
    stored = left_alone
    assert (stored.digest, stored.count) == (dataset.digest, dataset.count)
    assert stored.event_names == dataset.event_names
    np.testing.assert_array_equal(stored.positions, dataset.positions)
    for wanted in ([3], [80, 4, 4, 0], range(stored.count)):
        theirs = dataset.rows(wanted)
        for name, found in stored.rows(wanted).items():
            np.testing.assert_array_equal(found, theirs[name])
    stored.verify()
    assert stored.stored_bytes == dataset.stored_bytes
    with pytest.raises(DataError, match=r"expected a dataset on disk, found s3://"):
        _ = stored.path


def test_neighbouring_chunks_come_with_one_request(s3, bucket, tmp_path):
    own = write(tmp_path / "own", samples(3000))
    upload_dataset(bucket, own, "sets/own")
    reader = open_dataset(f"{bucket.uri()}sets/own", labels=False, client=s3).readers["inputs/iq"]
    assert len(reader.shards) == 1
    reader[:1]  # brings the shard's index
    seen = requests(s3, lambda: reader[:])
    assert seen == ["GetObject"]


def test_neighbours_are_joined_up_to_the_most_at_once(monkeypatch):
    monkeypatch.setattr(dataset_files, "GAP_BYTES", 5)
    monkeypatch.setattr(dataset_files, "MOST_RANGE_BYTES", 30)
    spans = [(40, 10), (0, 10), (15, 10), (26, 4), (31, 4)]
    assert list(dataset_files.joined_spans(spans)) == [(0, 30), (31, 19)]
    assert list(dataset_files.joined_spans([])) == []


def test_dataset_goes_to_other_processes_without_a_client(
    left_alone, embedded_settings, mlflow_environment
):
    stored, sent = left_alone, pickle.dumps(left_alone)
    secret = embedded_settings.credentials[1].get_secret_value().encode()
    assert secret not in sent
    np.testing.assert_array_equal(pickle.loads(sent).rows([5])["mask"], stored.rows([5])["mask"])


def test_object_that_is_replaced_while_it_is_read_is_refused(
    s3, bucket, stored, mlflow_environment
):
    stored.rows([0])
    elsewhere = pickle.loads(pickle.dumps(stored))
    for name in stored.readers["inputs/iq"].shards[1:3]:
        content = bucket.read_bytes(f"sets/own/{name}")
        bucket.upload_bytes(content[:-1] + b"x", f"sets/own/{name}")
        for opened in (stored, elsewhere):
            with pytest.raises(DataError, match="was replaced or deleted while"):
                opened.rows(range(opened.count))
        bucket.upload_bytes(content, f"sets/own/{name}")


def test_file_that_is_replaced_while_it_is_read_is_refused(tmp_path):
    own = write_in_small_shards(tmp_path / "own", samples())
    other = write_in_small_shards(tmp_path / "other", samples(seed=1))
    own.rows([0])
    elsewhere = pickle.loads(pickle.dumps(own))
    name = own.readers["inputs/iq"].shards[1]
    (own.path / name).write_bytes((other.path / name).read_bytes())
    for opened in (own, elsewhere):
        with pytest.raises(DataError, match=f"{name} is not the file that was there"):
            opened.rows(range(opened.count))
    with pytest.raises(DataError, match="expected SHA-256"):
        open_dataset(own.path).verify()


def test_damage_in_the_bucket_is_named(s3, bucket, stored, dataset):
    first, second = stored.readers["inputs/iq"].shards[:2]
    key = f"sets/own/{first}"
    bucket.upload_bytes(bucket.read_bytes(f"sets/own/{second}"), key)
    with pytest.raises(DataError, match="inputs/iq: expected SHA-256"):
        open_dataset(stored.address, client=s3).verify()
    # Sent again, what differs is mended, and nothing else.
    seen = requests(s3, lambda: upload_dataset(bucket, dataset, "sets/own"))
    assert seen.count("PutObject") == 2  # and the header, which is dated anew
    # What claims to be right is read all the same.
    claimed = {"sha256": hash_file(dataset.path / first)}
    size = (dataset.path / first).stat().st_size
    s3.put_object(Bucket=bucket.name, Key=key, Body=bytes(size), Metadata=claimed)
    upload_dataset(bucket, dataset, "sets/own")
    open_dataset(stored.address, client=s3).verify()
    bucket.delete([key])
    with pytest.raises(DataError, match=f"{first} is missing"):
        open_dataset(stored.address, client=s3)


def test_another_dataset_is_not_overwritten(s3, left_alone, tmp_path):
    other = write(tmp_path / "other", samples(6, seed=1))
    bucket = Bucket(s3, left_alone.address.split("/")[2])
    with pytest.raises(DataError, match="is another dataset: expected digest"):
        upload_dataset(bucket, other, "sets/own")
    open_dataset(left_alone.address, client=s3).verify()


def test_what_broke_off_is_no_dataset(s3, bucket, dataset, monkeypatch):
    names = [*dataset.file_names()]
    assert names[-1] == "zarr.json"

    def break_off():
        raise StoreError("gone")

    own = open_dataset(dataset.path)
    monkeypatch.setattr(
        own, "file_names", lambda: (break_off() if n == names[-1] else n for n in names)
    )
    with pytest.raises(StoreError, match="gone"):
        upload_dataset(bucket, own, "sets/half")
    assert len(bucket.list_keys("sets/half/")) == len(names) - 1
    with pytest.raises(DataError, match=r"zarr\.json can't be read \(there is no such object\)"):
        open_dataset(f"{bucket.uri()}sets/half", client=s3)


def test_dataset_of_a_folder_is_kept_and_comes_back(s3, bucket, dataset, tmp_path):
    kept = keep_dataset(bucket, dataset)
    assert kept.address == f"{bucket.uri()}objects/datasets/{dataset.digest}"
    assert keep_dataset(bucket, open_kept(s3, kept)) == kept.model_copy(
        update={"name": dataset.digest}
    )
    path = fetch_dataset(s3, kept, tmp_path)
    open_dataset(path).verify()
    with pytest.raises(DataError, match="is another dataset"):
        open_kept(s3, kept.model_copy(update={"digest": "0" * 64}))


def test_dataset_that_changed_since_it_was_opened_is_not_kept(s3, bucket, tmp_path):
    own = write_in_small_shards(tmp_path / "own", samples())
    other = write_in_small_shards(tmp_path / "other", samples(seed=1))
    name = own.readers["inputs/iq"].shards[1]
    right = (own.path / name).read_bytes()
    (own.path / name).write_bytes((other.path / name).read_bytes())
    with pytest.raises(DataError, match="has changed since it was opened"):
        keep_dataset(bucket, own)
    (own.path / name).write_bytes(right)
    # What was left there under its digest is in nobody's way.
    shutil.copy(other.path / "zarr.json", tmp_path / "header")
    bucket.upload_file(tmp_path / "header", f"objects/datasets/{own.digest}/zarr.json")
    kept = keep_dataset(bucket, open_dataset(own.path))
    open_kept(s3, kept).verify()


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/", "s3://bucket/a//b"])
def test_address_needs_a_folder(address):
    with pytest.raises(DataError, match="expected the address of a dataset, s3://bucket/folder"):
        open_dataset(address)


def test_command_uploads(s3, bucket, dataset, mlflow_environment):
    address = f"{bucket.uri()}sets/by-command"
    done = CliRunner().invoke(main, ["data", "upload", str(dataset.path), address])
    assert done.exit_code == 0, done.output
    assert f"{address}: 90 samples, digest {dataset.digest}" in done.output
    open_dataset(address, client=s3).verify()
    done = CliRunner().invoke(main, ["data", "upload", str(dataset.path), f"s3://{bucket.name}"])
    assert done.exit_code == 2
    assert "expected a folder of its own" in done.output
