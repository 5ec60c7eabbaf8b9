"""The proxy of the fault tests does each harm that it is told to, and none otherwise."""

import hashlib
import os

import pytest
from botocore.exceptions import ClientError
from proxy import Fault, proxied

from heimdall_onnx.common.errors import StoreError
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


@pytest.fixture
def proxy(embedded_settings):
    with proxied(embedded_settings.s3_endpoint_url) as proxy:
        yield proxy


def through(proxy, settings: Settings, **options):
    return make_client(settings.model_copy(update={"s3_endpoint_url": proxy.address}), **options)


def test_without_a_fault_everything_passes(proxy, embedded_settings, bucket, tmp_path):
    client, path = through(proxy, embedded_settings), tmp_path / "large"
    path.write_bytes(os.urandom(65 << 20))
    Bucket(client, bucket.name).upload_bytes(b"small", "small")
    Bucket(client, bucket.name).upload_file(path, "large")
    assert Bucket(client, bucket.name).list_keys("") == ("large", "small")
    assert (
        Bucket(client, bucket.name).hash_object("large")[0]
        == hashlib.sha256(path.read_bytes()).hexdigest()
    )
    assert any("uploadId" in request for request in proxy.requests)
    assert f"PUT /{bucket.name}/small" in proxy.requests
    assert min(sum(given) for given in zip(*proxy.sizes, strict=True)) > 65 << 20


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault("gone", "PUT", times=None), "EndpointConnectionError"),
        (Fault("hang", "PUT", times=None), "ReadTimeoutError"),
        (Fault("status", "PUT", times=None, status=503), "overloaded"),
        (Fault("reset", "PUT", times=None), "ConnectionClosedError"),
        (Fault("lose", "PUT", times=None), "ConnectionClosedError"),
        (Fault("corrupt request", "PUT"), "damaged on its way"),
        (Fault("corrupt response", "GET", times=None), "not what was stored"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_each_harm_is_what_the_client_sees(proxy, embedded_settings, bucket, fault, error):
    patience = 0.5 if fault.kind == "hang" else 60
    client = through(proxy, embedded_settings, attempts=2, read_timeout_s=patience)
    with proxy.fault(fault), pytest.raises(StoreError, match=error):
        Bucket(client, bucket.name).upload_bytes(b"content", "key")
    assert fault.hits
    Bucket(client, bucket.name).upload_bytes(b"content", "key")


def test_only_so_many_requests_of_that_kind_are_hit(proxy, embedded_settings, bucket):
    client = through(proxy, embedded_settings, attempts=1)
    with proxy.fault(Fault("status", "DELETE", times=1)) as fault:
        client.put_object(Bucket=bucket.name, Key="key", Body=b"")
        with pytest.raises(ClientError, match="503"):
            client.delete_object(Bucket=bucket.name, Key="key")
        client.delete_object(Bucket=bucket.name, Key="key")
    assert fault.hits == 1


def test_action_is_called_before_or_after_the_service_has_done_it(
    proxy, embedded_settings, s3, bucket
):
    client, seen = through(proxy, embedded_settings), []

    def look():
        seen.append(bucket.list_keys(""))

    for kind in ("before", "after"):
        with proxy.fault(Fault(kind, f"PUT /{bucket.name}/{kind}", action=look)):
            Bucket(client, bucket.name).upload_bytes(b"", kind)
    assert seen == [(), ("after", "before")]
