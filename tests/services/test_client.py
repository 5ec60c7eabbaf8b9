"""What a call does that fails on its way, and what is said of it."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import structlog
from botocore.exceptions import ClientError
from proxy import Fault, proxied, wait_for

from heimdall_onnx.common.errors import StoreError
from heimdall_onnx.services.client import aws_descriptions, explain_store_error, make_client
from heimdall_onnx.services.store import Bucket

pytestmark = pytest.mark.services


@pytest.fixture
def proxy(embedded_settings):
    with proxied(embedded_settings.s3_endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy, embedded_settings):
    return make_client(embedded_settings.model_copy(update={"s3_endpoint_url": proxy.address}))


def test_passing_fault_is_survived_and_each_attempt_is_logged(client, proxy, bucket):
    fault = Fault("status", "HEAD", times=2, status=503)
    with proxy.fault(fault), structlog.testing.capture_logs() as events:
        assert Bucket(client, bucket.name).is_there()
    assert [e["attempt"] for e in events] == [1, 2]
    assert {(e["event"], e["operation"], e["of"], e["reason"]) for e in events} == {
        ("store call failed", "HeadBucket", 5, "503")
    }


def test_clients_made_one_after_another_look_in_no_more_places(embedded_settings):
    make_client(embedded_settings)
    before = list(aws_descriptions().search_paths)
    for _ in range(3):
        make_client(embedded_settings)
    assert aws_descriptions().search_paths == before
    assert len(set(before)) == len(before)


def test_lasting_fault_is_given_up_after_so_many_attempts(proxy, embedded_settings, bucket):
    through = embedded_settings.model_copy(update={"s3_endpoint_url": proxy.address})
    client = make_client(through, attempts=2, read_timeout_s=0.2)
    with (
        proxy.fault(Fault("hang", times=None)) as fault,
        pytest.raises(StoreError, match="reach"),
    ):
        Bucket(client, bucket.name).is_there()
    assert wait_for(lambda: fault.hits == 2, 60)


def test_refusal_is_no_fault_and_is_neither_repeated_nor_logged(client, proxy):
    with structlog.testing.capture_logs() as events:
        assert not Bucket(client, "no-such-bucket").is_there()
    assert proxy.requests == ["HEAD /no-such-bucket"]
    assert events == []


def test_answer_that_breaks_off_is_read_again(client, proxy, bucket):
    Bucket(client, bucket.name).upload_bytes(b"content", "key")
    with (
        proxy.fault(Fault("corrupt response", "GET")) as fault,
        structlog.testing.capture_logs() as events,
    ):
        assert Bucket(client, bucket.name).read_bytes("key") == b"content"
    assert fault.hits == 1
    assert [(e["event"], e["attempt"], e["of"]) for e in events] == [("answer broke off", 1, 3)]


@pytest.mark.parametrize(
    ("hours", "code", "words"),
    [
        (24, "403", "differ by 1 day, 0:00:00"),
        (-1, "AccessDenied", "differ by 1:00:00"),
        (0.1, "403", "access is forbidden"),
        (24, "NoSuchBucket", "no such bucket"),
    ],
)
def test_wrong_clock_is_told_from_a_wrong_key(hours, code, words):
    theirs = format_datetime(datetime.now(UTC) + timedelta(hours=hours), usegmt=True)
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPHeaders": {"date": theirs}}}
    assert words in explain_store_error(ClientError(answer, "HeadBucket"))
