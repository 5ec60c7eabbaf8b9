"""What a call does that fails on its way, and what is said of it."""

import os
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
import structlog
from answers import HEADERS, LOGIN_PAGE, answering, refusal
from botocore.exceptions import ClientError
from proxy import Fault, proxied, wait_for

from heimdall_onnx.common.errors import HeimdallError, MissingObjectError, SettingsError, StoreError
from heimdall_onnx.services.client import (
    aws_descriptions,
    explain_store_error,
    make_client,
    set_default_session,
)
from heimdall_onnx.services.settings import Settings
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


# --- AWS's own settings

KEYS = {"AWS_ACCESS_KEY_ID": "an-id", "AWS_SECRET_ACCESS_KEY": "a-secret"}
ROLE = "arn:aws:iam::123456789012:role/ci"
PROFILES = {
    "failing": "credential_process = sh -c 'echo the vault is sealed >&2; exit 3'",
    "missing": "credential_process = no-such-program",
    "nonsense": "credential_process = echo no JSON",
    "apart": f"role_arn = {ROLE}\nsource_profile = nowhere",
    "expired": "sso_session = work\nsso_account_id = 1\nsso_role_name = r\n"
    "[sso-session work]\nsso_start_url = https://sso.example\nsso_region = eu-west-1",
}
BLANK = (
    *("AWS_PROFILE", "AWS_DEFAULT_PROFILE", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE"),
    *("AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "AWS_RETRY_MODE"),
    *("AWS_MAX_ATTEMPTS", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE"),
    *("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_ROLE_ARN", "AWS_METADATA_SERVICE_TIMEOUT"),
)


@pytest.fixture
def aws_files(tmp_path, monkeypatch):
    """Of AWS's files none but these is looked at, nor a machine's own credentials."""
    (tmp_path / "broken").write_text("[profile ci\nregion")
    (tmp_path / "config").write_text("\n".join(f"[profile {n}]\n{t}" for n, t in PROFILES.items()))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return tmp_path


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"AWS_PROFILE": "nobody", **KEYS}, r"profile \(nobody\) could not .* check AWS_PROFILE$"),
        ({"AWS_CONFIG_FILE": "{}/broken", **KEYS}, "parse config file: .*broken; check AWS_CONFIG"),
        ({"AWS_SHARED_CREDENTIALS_FILE": "{}/broken"}, "check AWS_SHARED_CREDENTIALS_FILE$"),
        (
            {"AWS_DEFAULT_REGION": "us east", **KEYS},
            "'us east' doesn't .* check AWS_DEFAULT_REGION",
        ),
        ({"AWS_RESPONSE_CHECKSUM_VALIDATION": "never", **KEYS}, "check AWS_RESPONSE_CHECKSUM_"),
        ({"AWS_DEFAULTS_MODE": "odd", **KEYS}, "check AWS_DEFAULTS_MODE$"),
        ({"AWS_S3_US_EAST_1_REGIONAL_ENDPOINT": "odd", **KEYS}, "check AWS_S3_US_EAST_1_REGIONAL"),
        ({"AWS_CA_BUNDLE": "{}/none.pem", **KEYS}, "No such file.*none.pem'; check AWS_CA_BUNDLE$"),
        ({"REQUESTS_CA_BUNDLE": "{}/none.pem", **KEYS}, "check REQUESTS_CA_BUNDLE$"),
        (
            {"AWS_WEB_IDENTITY_TOKEN_FILE": "{}/token", "AWS_ROLE_ARN": ROLE},
            "look for bucket b .*No such file.*/token'; check AWS_WEB_IDENTITY_TOKEN_FILE$",
        ),
        ({"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://evil.example/"}, "host 'evil.example'"),
        ({"AWS_METADATA_SERVICE_TIMEOUT": "long"}, "'long'; check AWS_METADATA_SERVICE_TIMEOUT$"),
        ({"AWS_PROFILE": "failing"}, "the vault is sealed; check ~/.aws/config and"),
        ({"AWS_PROFILE": "missing"}, "No such file.*'no-such-program'; check ~/.aws/config"),
        ({"AWS_PROFILE": "nonsense"}, "can't be used: Expecting value.*AWS_PROFILE"),
        ({"AWS_PROFILE": "apart"}, 'source_profile "nowhere"'),
        ({"AWS_PROFILE": "expired"}, "look for bucket b .*SSO Token.*AWS_PROFILE"),
        ({}, "look for bucket b .*no credentials; check MLFLOW_S3_ACCESS_KEY_ID"),
    ],
)
def test_unusable_settings_of_aws_are_named(variables, words, aws_files, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(aws_files))
    settings = Settings(_env_file=None, MLFLOW_S3_ENDPOINT_URL="https://127.0.0.1:1")
    with pytest.raises(SettingsError, match=words) as caught:
        Bucket(make_client(settings), "b").is_there()
    assert "a-secret" not in str(caught.value)
    assert "MLFLOW_S3_ENDPOINT_URL" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_PROFILE", "nobody"),
        ("AWS_REQUEST_CHECKSUM_CALCULATION", "never"),
        ("AWS_RETRY_MODE", "odd"),
        ("AWS_MAX_ATTEMPTS", "many"),
    ],
)
def test_what_mlflows_own_client_could_not_use_is_named_before(name, value, aws_files, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{value}.* check {name}$"):
        set_default_session()


@pytest.mark.parametrize("value", ["", " "])
def test_settings_of_aws_that_are_blank_are_not_set(value, embedded_settings, monkeypatch):
    for name in BLANK:
        monkeypatch.setenv(name, value)
    set_default_session()
    make_client(embedded_settings.model_copy(update={"is_embedded": False})).list_buckets()
    assert not os.environ.keys() & set(BLANK)


# --- refusals

OURS = {"MLFLOW_S3_ACCESS_KEY_ID": "an-id", "MLFLOW_S3_SECRET_ACCESS_KEY": "a-secret"}


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, refusal("AccessDenied", "Not for you")), "forbidden: .*AccessDenied: Not for you"),
        (
            (403, refusal("AccessDenied", "explicit deny: aws:kms is demanded")),
            "as MLFLOW_S3_UPLOAD_EXTRA_ARGS says.*explicit deny: aws:kms",
        ),
        ((400, refusal("ExpiredToken", "It expired.")), "expired; set new AWS_ACC.*It expired"),
        ((400, refusal("TokenRefreshRequired", "Old.")), "the session token has expired"),
        (
            (301, refusal("PermanentRedirect", "Use it."), {"x-amz-bucket-region": "eu-west-1"}),
            "another region; set AWS_DEFAULT_REGION=eu-west-1 .*Use it",
        ),
        (
            (400, refusal("AuthorizationHeaderMalformed", "is wrong", Region="eu-central-1")),
            "set AWS_DEFAULT_REGION=eu-central-1 .*is wrong",
        ),
        (
            (400, refusal("IllegalLocationConstraintException", "incompatible")),
            r"set AWS_DEFAULT_REGION \(Illegal.*incompatible",
        ),
        (
            (403, refusal("SecondLevelDomainForbidden", "Use virtual hosted style.")),
            "MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE=virtual .*Use virtual hosted",
        ),
        ((403, refusal("QuotaExceeded", "Full")), r"refuses \(QuotaExceeded: Full\)"),
        ((405, refusal("ReadOnly", "For\n reading")), r"refuses \(ReadOnly: For reading\)"),
        ((403, refusal("Odd", "at http://me:hidden@h")), r"at http://\*\*\*@h"),
        (
            (200, LOGIN_PAGE),
            r"login page .*MLFLOW_S3_ENDPOINT_URL \(200: a web .*'Sign in & go on'",
        ),
        ((403, LOGIN_PAGE), r"403: a web page, 'Sign in & go on'"),
        ((302, LOGIN_PAGE, {"Location": "/login"}), "login page .*302: a web page, 'Sign in & go"),
        ((301, "", {"Location": "https://sso.example/"}), "login page .*301: https://sso.example/"),
    ],
)
def test_a_refusal_says_what_the_store_said(answer, words):
    with answering(*answer) as address:
        settings = Settings(_env_file=None, MLFLOW_S3_ENDPOINT_URL=address, **OURS)
        with pytest.raises(StoreError, match=words) as caught:
            Bucket(make_client(settings, attempts=1), "b").upload_bytes(b"x", "key")
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("status", "headers", "kind", "words"),
    [
        (302, {"Location": "/login"}, StoreError, "login page .*302: /login"),
        (301, {"x-amz-bucket-region": "eu-west-1"}, StoreError, "AWS_DEFAULT_REGION=eu-west-1"),
        (400, {}, StoreError, "check AWS_DEFAULT_REGION and AWS_SESSION_TOKEN"),
        (403, {"x-amz-bucket-region": "us-east-1"}, StoreError, "access is forbidden"),
        (404, {"x-amz-bucket-region": "us-east-1"}, MissingObjectError, "no such object"),
    ],
)
def test_a_refusal_without_words_is_told_by_its_head(status, headers, kind, words):
    with answering(status, headers=headers) as address:
        settings = Settings(_env_file=None, MLFLOW_S3_ENDPOINT_URL=address, **OURS)
        bucket = Bucket(make_client(settings), "b")
        with pytest.raises(kind, match=words), bucket.errors("look"):
            bucket.client.head_bucket(Bucket="b")


@pytest.mark.parametrize("end", ["\n  hidden", "\u2019\N{EURO SIGN}"])
def test_a_file_s_credential_that_is_no_header_is_refused_at_once_and_not_shown(
    end, tmp_path, monkeypatch
):
    file = tmp_path / "credentials"
    keys = "[default]\naws_access_key_id = an-id\naws_secret_access_key = a-secret\n"
    file.write_text(f"{keys}aws_session_token = hidden{end}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    with answering(403) as address:
        bucket = Bucket(make_client(Settings(_env_file=None, MLFLOW_S3_ENDPOINT_URL=address)), "b")
        with structlog.testing.capture_logs() as events, pytest.raises(HeimdallError) as caught:
            bucket.list_keys("")
    if "\n" in end:
        assert caught.type is SettingsError
        assert "must be one line; check ~/.aws" in str(caught.value)
    assert len(events) <= 1
    assert "hidden" not in told_by(caught.value)


@pytest.mark.parametrize("status", [400, 401, 403, 500])
def test_a_store_that_repeats_a_request_shows_no_secret(status, monkeypatch):
    ours = {"AWS_ACCESS_KEY_ID": "hidden-id", "AWS_SECRET_ACCESS_KEY": "hidden-key"}
    for name, value in {**ours, "AWS_SESSION_TOKEN": "hidden-token"}.items():
        monkeypatch.setenv(name, value)
    with answering(status, refusal("Odd", f"hidden-token: {HEADERS}")) as address:
        settings = Settings(_env_file=None, MLFLOW_S3_ENDPOINT_URL=address)
        with pytest.raises(StoreError, match="Odd") as caught:
            Bucket(make_client(settings, attempts=1), "b").upload_bytes(b"x", "key")
    assert "hidden" not in told_by(caught.value)


def told_by(error):
    """All that a traceback shows, but for source lines."""
    lines = traceback.format_exception(error)
    return "".join(line for line in lines if not line.startswith("  File "))


def test_a_page_of_something_in_front_that_fails_for_a_moment_is_asked_again():
    with answering(503, LOGIN_PAGE) as address:
        settings = Settings(_env_file=None, MLFLOW_S3_ENDPOINT_URL=address, **OURS)
        with (
            structlog.testing.capture_logs() as events,
            pytest.raises(StoreError, match=r"overloaded, or not there .*a web page"),
        ):
            Bucket(make_client(settings, attempts=2), "b").list_keys("")
    assert len(events) == 2
