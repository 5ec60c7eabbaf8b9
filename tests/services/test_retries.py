"""The limits that MLflow's clients get, and what is logged of requests made again."""

import logging

import boto3
import pytest
import structlog
import urllib3
from proxy import Fault, proxied

from heimdall_onnx.services.client import set_default_session
from heimdall_onnx.services.retries import ATTEMPTS, log_http_requests

pytestmark = pytest.mark.services


@pytest.fixture
def proxy(embedded_settings):
    with proxied(embedded_settings.s3_endpoint_url) as proxy:
        yield proxy


@pytest.fixture
def levels():
    """The levels and filters of urllib3's loggers end with the test."""
    loggers = [logging.getLogger(f"urllib3.{n}") for n in ("util.retry", "connectionpool")]
    before = [(logger, logger.level, list(logger.filters)) for logger in loggers]
    yield
    for logger, level, filters in before:
        logger.setLevel(level)
        logger.filters[:] = filters


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("status", times=2, status=503), "status 503"),
        (Fault("lose", times=2), "ProtocolError"),
    ],
    ids=["refused", "answer lost"],
)
def test_request_made_again_is_one_line_without_its_query(proxy, levels, caplog, fault, reason):
    log_http_requests()
    log_http_requests()
    retry = urllib3.Retry(total=3, status_forcelist=[503], allowed_methods=None)
    with (
        proxy.fault(fault),
        structlog.testing.capture_logs() as events,
        urllib3.PoolManager(retries=retry) as pool,
    ):
        pool.request("POST", f"{proxy.address}/there?signature=secret")
    assert [(e["path"], e["reason"], e["attempts_left"]) for e in events] == [
        ("/there", reason, 3),
        ("/there", reason, 2),
    ]
    assert "secret" not in str(events)
    # urllib3's own lines of the same, and its lines for debugging, reach nobody.
    assert caplog.records == []


def test_mlflows_s3_client_gets_the_limits_and_the_log(
    proxy, mlflow_environment, bucket, monkeypatch
):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(ATTEMPTS))
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    set_default_session()
    client = boto3.client("s3", endpoint_url=proxy.address, region_name="us-east-1")
    assert (client.meta.config.connect_timeout, client.meta.config.read_timeout) == (5, 20)
    fault = Fault("status", "HEAD", times=1)
    with proxy.fault(fault), structlog.testing.capture_logs() as events:
        client.head_bucket(Bucket=bucket.name)
    ((event, attempt, of),) = [(e["event"], e["attempt"], e["of"]) for e in events]
    assert (event, attempt) == ("store call failed", 1)
    assert of in {5, None}  # an older botocore notes how often only afterwards
