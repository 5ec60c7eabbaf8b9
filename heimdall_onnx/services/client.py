"""A client of the S3 store, and its errors in plain words."""

from __future__ import annotations

import contextlib
import functools
import html
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from boto3.exceptions import Boto3Error
from botocore import exceptions as aws
from botocore.config import Config
from botocore.configprovider import ConstantProvider
from botocore.loaders import create_loader
from botocore.session import Session

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
from heimdall_onnx.services.settings import AWS_KEYS, clean_environment, is_loopback, known_secrets

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from pydantic import SecretStr

    from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

_KINDS = {
    **dict.fromkeys(("PreconditionFailed", "412", "ConditionalRequestConflict"), ObjectExistsError),
    **dict.fromkeys(("404", "NoSuchKey", "NoSuchBucket"), MissingObjectError),
}
_CREDENTIALS = "check MLFLOW_S3_ACCESS_KEY_ID and MLFLOW_S3_SECRET_ACCESS_KEY"
_MOVED = (301, 302, 303, 307, 308)
# The numbers are from HEAD requests, or of something in front of a store, which knows no codes.
_REASONS = {
    "InvalidAccessKeyId": f"the store does not know the access key; {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"the secret key is wrong; {_CREDENTIALS}",
    **dict.fromkeys(
        ("AccessDenied", "403"),
        f"access is forbidden: the key may be wrong or not allowed this; {_CREDENTIALS}",
    ),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"),
        "the session token has expired; set new AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
        "AWS_SESSION_TOKEN",
    ),
    **dict.fromkeys(
        ("200", *map(str, _MOVED)),
        "what answers is no store, but a login page or the like; check MLFLOW_S3_ENDPOINT_URL",
    ),
    "NoSuchBucket": "there is no such bucket; check its name or create it",
    "NoSuchKey": "there is no such object",
    "NotImplemented": "the store can't do that; use another, or another version of it",
    "400": "the store can't read this; check AWS_DEFAULT_REGION and AWS_SESSION_TOKEN",
    "404": "there is no such object or bucket",
    **dict.fromkeys(("PreconditionFailed", "412"), "there is already an object of that name"),
    "ConditionalRequestConflict": "somebody else is writing an object of that name",
    "BadDigest": "the data was damaged on its way; try again",
    "XAmzContentChecksumMismatch": "the data was damaged on its way; try again",
    "XAmzContentSHA256Mismatch": "the data was damaged on its way; try again",
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
# What settings answer that no code tells of: found in a refusal's code and text.
_REMEDIES = {
    "kms|encrypt": "uploads are encrypted as MLFLOW_S3_UPLOAD_EXTRA_ARGS says, e.g. "
    '{"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "…"}',
    "virtual.?host|path.?style|SecondLevelDomainForbidden": "the store wants the bucket's name in "
    "the host; set MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE=virtual",
    "Redirect|AuthorizationHeaderMalformed|LocationConstraint|InvalidRegion": "it is in another "
    "region; set AWS_DEFAULT_REGION",
}
_AWS_FILES = "~/.aws/config and ~/.aws/credentials, or what AWS_PROFILE and AWS_CONFIG_FILE name"
_CREDENTIAL_MODULES = ("botocore.credentials", "botocore.tokens")
# Where a request's secrets stand in it, for what repeats them.
_SHOWN = re.compile(
    r"((?:password|signature|credential|security-token)[=:]\s*|(?-i:Basic|Bearer) )[^&,\s'\"]+",
    re.I,
)
_PAGE = re.compile("<!doctype html|<html", re.I)
_UNREACHABLE = (aws.ConnectionError, aws.HTTPClientError)
# What else botocore raises that is no fault of the settings.
_DAMAGED = (aws.FlexibleChecksumError, aws.ChecksumError, aws.IncompleteReadError)
_RAISED = (aws.BotoCoreError, aws.ClientError, Boto3Error)
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
    with _aws_settings():
        core = _open_session(alone=settings.is_embedded)
        session = boto3.session.Session(botocore_session=core)
        # boto3 has added its own folder, as it does for each session.
        paths = aws_descriptions().search_paths
        paths[:] = dict.fromkeys(paths)
        bundle = core.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        if bundle and endpoint.startswith("https:"):
            Path(bundle).read_bytes()  # a request would only say that there is no such file
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
    log_store_calls(client.meta.events)
    client.meta.events.register_first("needs-retry.s3", _see_page)
    for operation in ("PutObject", "CreateMultipartUpload", "CopyObject"):
        client.meta.events.register(
            f"provide-client-params.s3.{operation}",
            functools.partial(_add, settings.upload_extra_args),
        )
    return client


def _add(extra: Mapping[str, SecretStr], *, params: dict[str, Any], **_: Any) -> None:
    params.update({name: value.get_secret_value() for name, value in extra.items()} | params)


def set_default_session() -> None:
    """Give MLflow's own S3 client, which takes boto3's default session, the same limits.

    Raises:
        SettingsError: If botocore can't use AWS's own settings.
    """
    with _aws_settings():
        session = _open_session(alone=False)
        session.set_default_client_config(
            Config(connect_timeout=CONNECT_TIMEOUT_S, read_timeout=READ_TIMEOUT_S)
        )
        log_store_calls(session.get_component("event_emitter"))
        session.get_component("event_emitter").register("needs-retry.s3", _see_page)
        boto3.setup_default_session(botocore_session=session)
        boto3.client("s3")  # what this is refused for, MLflow's would be in the midst of a run


def _open_session(*, alone: bool) -> Session:
    """A session of botocore that looks at the caller's AWS settings, or one that is ``alone``."""
    clean_environment()
    session = Session()
    session.register_component("data_loader", aws_descriptions())
    if alone:
        known = session.get_component("config_store")
        files = dict.fromkeys(("config_file", "credentials_file"), os.devnull)
        for name, (_, _, default, _) in Session.SESSION_VARIABLES.items():
            known.set_config_provider(name, ConstantProvider(files.get(name, default)))
        known.set_config_provider("s3", ConstantProvider(None))
    return session


@contextlib.contextmanager
def _aws_settings() -> Iterator[None]:
    try:
        yield
    except (aws.BotoCoreError, ValueError, OSError) as error:
        raise SettingsError(_explain_settings(error)) from None


def _see_page(*, response: tuple[Any, Any] | None, operation: Any, **event: Any) -> None:
    """Refuse what answers as no store does: botocore follows it without end, or hides its text."""
    if response is None:
        # Nor does it know a header that can't be sent from a failure worth another attempt.
        cause = getattr(event["caught_exception"], "kwargs", {}).get("error")
        if type(cause) in (ValueError, UnicodeEncodeError):
            raise SettingsError(f"each credential must be one line; check {_AWS_FILES}")
        return
    answer, parsed = response
    # botocore makes a failure of a success that it can't read, and tries again.
    status = answer.raw.status
    if status < 300 and operation.has_streaming_output:
        return
    moved = status in _MOVED and "x-amz-bucket-region" not in answer.headers
    if _PAGE.search(answer.text) or (moved and "<Error>" not in answer.text):
        told = shorten(answer.text) or answer.headers.get("location", "")
        parsed["Error"] = {"Code": str(status), "Message": told}
        if status < 400:
            raise aws.ClientError(parsed, operation.name)


@functools.cache
def aws_descriptions() -> Any:
    """What botocore knows of AWS, megabytes of it, which each session would read anew."""
    return create_loader()


@contextlib.contextmanager
def store_errors(client: S3Client, doing: str) -> Iterator[None]:
    """Turn what botocore raises into an error of ours: what failed, where, why, what to do.

    That is a `StoreError`, or a `SettingsError` where AWS's own settings are the reason.

    Args:
        client: The client in use; its address appears in the message.
        doing: What was tried, e.g. ``"upload s3://bucket/key"``.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _RAISED) and not is_of_settings(error):
            raise
        where = redact_url(client.meta.endpoint_url)
        refused = _KINDS.get(error_code(_root(error)), StoreError)
        kind = SettingsError if is_of_settings(error) else refused
        message = f"could not {doing} at {where}: {explain_store_error(error)}"
        # A traceback would show the original's text, and of a request its headers.
        raise kind(message) from None


def is_of_settings(error: Exception) -> bool:
    """Whether AWS's own settings are why a call failed: nothing was asked of the store itself."""
    error = _root(error)
    # Credentials may be from a file, a process or another service, which fail in any way.
    frames = (frame.f_globals for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(names.get("__name__") in _CREDENTIAL_MODULES for names in frames):
        return True
    return isinstance(error, aws.BotoCoreError) and not isinstance(error, _UNREACHABLE + _DAMAGED)


def shorten(text: str) -> str:
    """What a service says, on one line and without passwords; of a web page the title."""
    if page := _PAGE.search(text):
        title = re.search(r"<title[^>]*>(.*?)</title", text[page.start() :], re.I | re.S)
        text = f"a web page, {html.unescape(title[1]).strip()!r}" if title else "a web page"
    return redact_url(" ".join(text.split()))[:300]


def redact_url(text: str, address: str = "") -> str:
    """The text with secrets in use, such as the password in ``address``, replaced by ``***``."""
    for secret in filter(None, known_secrets(address)):
        text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", "***", text)
    # Greedy up to the last @: a password may hold any character but white space and quotes.
    text = re.sub(r"(?<=://)[^\s'\"]*@", "***@", text)
    return _SHOWN.sub(r"\1***", text)


def explain_store_error(error: Exception) -> str:
    """Why a call to a store failed and what to do, in plain words without credentials."""
    error = _root(error)
    if is_of_settings(error):
        return _explain_settings(error)
    if isinstance(error, aws.ClientError):
        return _explain_refusal(error)
    if isinstance(error, aws.SSLError):
        return "its certificate was not accepted; check MLFLOW_S3_ENDPOINT_URL and AWS_CA_BUNDLE"
    if isinstance(error, aws.FlexibleChecksumError):
        return "what came back is not what was stored: it was damaged there or on its way"
    if isinstance(error, aws.ProxyConnectionError):
        return f"{shorten(str(error))}; check HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
    if isinstance(error, _UNREACHABLE):
        return (
            f"the store can't be reached ({type(error).__name__}); check that it runs and that "
            "MLFLOW_S3_ENDPOINT_URL is its address"
        )
    return shorten(str(error))


def _explain_settings(error: Exception) -> str:
    """What botocore can't use, and which variables or files it is from."""
    if isinstance(error, aws.NoCredentialsError | aws.PartialCredentialsError):
        return f"there are no credentials; {_CREDENTIALS}"
    if str(error).startswith("Invalid endpoint: "):
        return "MLFLOW_S3_ENDPOINT_URL is not an address; expected e.g. http://127.0.0.1:9000"
    text = shorten(str(error))
    # botocore repeats the value, and seldom says whose it is.
    named = [
        name
        for name, value in sorted(os.environ.items())
        if name.startswith(("AWS_", "REQUESTS_CA_"))
        and name not in AWS_KEYS
        and re.search(rf"(?<!\w){re.escape(value)}(?!\.?\w)", text, re.I)
    ]
    return f"AWS's own settings can't be used: {text}; check {' and '.join(named) or _AWS_FILES}"


def _explain_refusal(error: aws.ClientError) -> str:
    if wrong_by := _clock_difference(error):
        return (
            f"this machine's clock and the store's differ by {wrong_by}, which it takes for a "
            "forged request; set the clock"
        )
    code, details = error_code(error), error.response.get("Error", {})
    told = shorten(f"{code}: {details.get('Message') or 'no reason given'}")
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or details.get("Region")
    remedies = (remedy for told_by, remedy in _REMEDIES.items() if re.search(told_by, told, re.I))
    reason = next(remedies, None) or _REASONS.get(code, "the store refuses")
    if region and (code.isdigit() or reason.endswith("_REGION")) and code not in ("403", "404"):
        reason = f"it is in another region; set AWS_DEFAULT_REGION={region}"
    return f"{reason} ({told})"


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
