"""A client of the S3 store, and its errors in plain words."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import Boto3Error
from botocore import exceptions as aws
from botocore.config import Config
from botocore.session import get_session

from heimdall_onnx.common.errors import (
    MissingObjectError,
    ObjectExistsError,
    SettingsError,
    StoreError,
)
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.services.retries import (
    ATTEMPTS,
    CONNECT_TIMEOUT_S,
    READ_TIMEOUT_S,
    log_store_calls,
)
from heimdall_onnx.services.settings import is_loopback

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

_KINDS = {
    **dict.fromkeys(("PreconditionFailed", "412", "ConditionalRequestConflict"), ObjectExistsError),
    **dict.fromkeys(("404", "NoSuchKey", "NoSuchBucket"), MissingObjectError),
}
_CREDENTIALS = "check MLFLOW_S3_ACCESS_KEY_ID and MLFLOW_S3_SECRET_ACCESS_KEY"
# The numbers are from HEAD requests, or of something in front of a store, which knows no codes.
_REASONS = {
    "InvalidAccessKeyId": f"the store does not know the access key; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is wrong; {_CREDENTIALS}",
    **dict.fromkeys(
        ("AccessDenied", "403"),
        f"access is forbidden: the key may be wrong or not allowed this; {_CREDENTIALS}",
    ),
    "NoSuchBucket": "there is no such bucket; check its name or create it",
    "NoSuchKey": "there is no such object",
    "NotImplemented": "the store can't do that; use another, or another version of it",
    "404": "there is no such object or bucket",
    **dict.fromkeys(("PreconditionFailed", "412"), "there is already an object of that name"),
    "ConditionalRequestConflict": "somebody else is writing an object of that name",
    "BadDigest": "the data was damaged on its way; try again",
    "XAmzContentChecksumMismatch": "the data was damaged on its way; try again",
    "RequestTimeTooSkewed": "this machine's clock and the store's differ too much; set the clock",
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "502", "503", "504"),
        "the store is overloaded, or not there behind its address; try again later",
    ),
    **dict.fromkeys(
        ("InternalError", "500"),
        "the store has failed at it; look into its log, or try again later",
    ),
}
_UNREACHABLE = (aws.ConnectionError, aws.HTTPClientError, aws.EndpointConnectionError)
# Stores refuse what was signed more than a quarter of an hour ago, or will be.
_SKEW = timedelta(minutes=14)
_SKEW_CODES = {"403", "AccessDenied", "RequestTimeTooSkewed", "SignatureDoesNotMatch"}


def make_client(
    settings: Settings, *, read_timeout_s: float = READ_TIMEOUT_S, attempts: int = ATTEMPTS
) -> S3Client:
    """A client of the configured store that repeats what fails on its way, and gives up in time.

    An address where nothing listens is given up after seconds, one that accepts and never answers
    after ``attempts`` times ``read_timeout_s``. Each failed attempt is logged. Without credentials
    in the settings boto3's usual chain is asked (environment, profile, role).

    Args:
        settings: With the store's address.
        read_timeout_s: How long an answer may take to begin.
        attempts: How often a call that failed on its way is made, the first time included.

    Raises:
        SettingsError: If there is no usable address, or half a pair of credentials;
            `ensure_store` provides the embedded store's.
    """
    endpoint = settings.s3_endpoint_url
    if endpoint is None:
        raise SettingsError(
            "MLFLOW_S3_ENDPOINT_URL is not set and these settings name no embedded store; "
            "ensure_store(settings) starts it and returns settings that do"
        )
    key_id, secret, token = settings.credentials or (None, None, None)
    core, descriptions = get_session(), aws_descriptions()
    core.register_component("data_loader", descriptions)
    session = boto3.session.Session(botocore_session=core)
    # boto3 has added its own folder, as it does for each session.
    descriptions.search_paths[:] = dict.fromkeys(descriptions.search_paths)
    try:
        client = session.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=key_id.get_secret_value() if key_id else None,
            aws_secret_access_key=secret.get_secret_value() if secret else None,
            aws_session_token=token.get_secret_value() if token else None,
            region_name=session.region_name or "us-east-1",
            config=Config(
                signature_version="s3v4",
                # The signature holds the content's SHA-256 over TLS too. botocore's own checksum
                # would follow the content there, which Ceph refuses.
                s3={
                    "addressing_style": settings.addressing_style,
                    "payload_signing_enabled": True,
                },
                request_checksum_calculation="when_required",
                max_pool_connections=16,
                connect_timeout=CONNECT_TIMEOUT_S,
                read_timeout=read_timeout_s,
                retries={"mode": "standard", "total_max_attempts": attempts},
                # botocore would send loopback traffic through a proxy of the environment.
                proxies={} if is_loopback(endpoint) else None,
            ),
        )
    except ValueError as error:
        raise SettingsError(
            "MLFLOW_S3_ENDPOINT_URL is not an address; expected e.g. http://127.0.0.1:9000"
        ) from error
    log_store_calls(client.meta.events)
    for operation in ("PutObject", "CreateMultipartUpload", "CopyObject"):
        client.meta.events.register(
            f"provide-client-params.s3.{operation}",
            functools.partial(_add, settings.upload_extra_args),
        )
    return client


def _add(extra: Mapping[str, str], *, params: dict[str, Any], **_: Any) -> None:
    params.update({**extra, **params})


@functools.cache
def aws_descriptions() -> Any:
    """What botocore knows of AWS, megabytes of it, which each session would read anew."""
    return get_session().get_component("data_loader")


@contextlib.contextmanager
def store_errors(client: S3Client, doing: str) -> Iterator[None]:
    """Turn what botocore raises into a `StoreError`: what failed, where, why, what to do.

    Args:
        client: The client in use; its address appears in the message.
        doing: What was tried, e.g. ``"upload s3://bucket/key"``.
    """
    try:
        yield
    except (aws.BotoCoreError, aws.ClientError, Boto3Error) as error:
        where = redact_url(client.meta.endpoint_url)
        kind = _KINDS.get(error_code(_root(error)), StoreError)
        # A traceback would show the original's text.
        leaks = redact_url(str(error)) != str(error)
        message = f"could not {doing} at {where}: {explain_store_error(error)}"
        raise kind(message) from (None if leaks else error)


def redact_url(text: str) -> str:
    """The text with user names and passwords of addresses in it replaced by ``***``."""
    # Greedy up to the last @: a password may hold any character but white space and quotes.
    text = re.sub(r"(?<=://)[^\s'\"]*@", "***@", text)
    return re.sub(r"(?<=password=)[^&\s'\"]+", "***", text)


def explain_store_error(error: Exception) -> str:
    """Why a call to a store failed and what to do, in plain words without credentials."""
    error = _root(error)
    if isinstance(error, aws.ClientError):
        if wrong_by := _clock_difference(error):
            return (
                f"this machine's clock and the store's differ by {wrong_by}, which it takes for a "
                "forged request; set the clock"
            )
        message = error.response.get("Error", {}).get("Message", "no reason given")
        return _REASONS.get(error_code(error), f"the store answered {error_code(error)}: {message}")
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return f"there are no credentials; {_CREDENTIALS}"
    if isinstance(error, aws.SSLError):
        return "its certificate was not accepted; check MLFLOW_S3_ENDPOINT_URL and AWS_CA_BUNDLE"
    if isinstance(error, aws.FlexibleChecksumError):
        return "what came back is not what was stored: it was damaged there or on its way"
    if isinstance(error, _UNREACHABLE):
        return (
            f"the store can't be reached ({type(error).__name__}); check that it runs and that "
            "MLFLOW_S3_ENDPOINT_URL is its address"
        )
    return redact_url(str(error))


def _clock_difference(error: aws.ClientError) -> timedelta | None:
    """How far the clocks are apart, if that is why a request was refused."""
    # The answer to a HEAD request says nothing but 403.
    answer = error.response.get("ResponseMetadata", {})
    if error_code(error) not in _SKEW_CODES or "date" not in answer.get("HTTPHeaders", {}):
        return None
    try:
        theirs = parsedate_to_datetime(answer["HTTPHeaders"]["date"])
    except ValueError:
        return None
    difference = abs(datetime.now(UTC) - theirs.astimezone(UTC))
    # An answer's date has whole seconds, and an answer takes time.
    minutes = timedelta(minutes=round(difference / timedelta(minutes=1)))
    return minutes if difference > _SKEW else None


def error_code(error: Exception) -> str:
    """The S3 error code of a refusal, or nothing where the store did not answer."""
    if not isinstance(error, aws.ClientError):
        return ""
    return str(error.response.get("Error", {}).get("Code", ""))


def _root(error: Exception) -> Exception:
    # boto3's transfer errors wrap the one that tells the reason.
    inner = error.__context__ if isinstance(error, Boto3Error) else None
    return inner if isinstance(inner, Exception) else error
