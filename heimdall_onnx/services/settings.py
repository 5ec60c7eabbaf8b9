"""Configuration from the environment and, if there is one, a ``.env`` file.

Only the outermost callers (command line, runner, notebook) read settings; every step takes plain
arguments. Secrets are `SecretStr`, so that printing a `Settings` never shows them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from dotenv import dotenv_values, find_dotenv
from pydantic import Field, Json, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from heimdall_onnx.common.errors import SettingsError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.surroundings import told

log = get_logger(__name__)

AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
# What libraries read, and of it what unlocks something or may be an address with a password.
_READ = re.compile("AWS_|MLFLOW_|HEIMDALL_|REQUESTS_CA_|PGPASSWORD$")
_CREDENTIAL = re.compile(r"\w*(KEY_ID|ACCESS_KEY|TOKEN|USERNAME|PASSWORD)")
_ADDRESS = re.compile(r"(AWS|MLFLOW)_\w+_UR[IL]|\w+_PROXY", re.I)
_BREAKS = "\r\n\ufeff\u200b"


class Credentials(NamedTuple):
    """What signs a request to the store."""

    access_key_id: SecretStr
    secret_access_key: SecretStr
    session_token: SecretStr | None = None


class Settings(BaseSettings):
    """Where the services are and how to talk to them.

    Attributes:
        mlflow_tracking_uri: ``http(s)://…``, ``sqlite:///…`` or ``postgresql://…``; None means
            SQLite below ``home``.
        mlflow_registry_uri: The same of the models' versions and aliases; None means that they
            are where the runs are.
        s3_endpoint_url: The S3 store; None means that the embedded store is started.
        is_embedded: Whether that is the embedded store, which AWS's own settings are not for.
        s3_access_key_id: With ``s3_secret_access_key``, the store's credentials; see
            `credentials` for what takes their place.
        s3_secret_access_key: Its other half.
        aws_access_key_id: With the next two, the usual AWS variables.
        aws_secret_access_key: Its other half.
        aws_session_token: Of temporary credentials.
        addressing_style: Whether a bucket's name is in the path of its addresses or in their host.
        upload_extra_args: What every upload says besides, as boto3 names it, e.g.
            ``{"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "…"}``.
        artifact_uri: Where MLflow keeps the artifacts of new experiments.
        experiment_name: MLflow experiment of the release runs.
        home: Folder of the embedded services and of local working files.
        signing_key: Private key (PEM) that signs releases; None leaves them unsigned.
        signing_key_password: Its password, if it has one.
        signing_certificate: The key's certificate (PEM), to sign with a certificate.
        signing_certificate_chain: The certificates (PEM) between that one and its root.
        public_key: The signer's public key (PEM), which releases are checked against.
        trusted_certificates: Root certificates (PEM), the same for signatures with a certificate.
        versioning: Make buckets of releases with versioning and Object Lock.
        retention_days: Days for which the store keeps a release's objects from being deleted.
    """

    # Compose files and CI systems pass what is not set as an empty string.
    model_config = SettingsConfigDict(
        extra="ignore", frozen=True, env_ignore_empty=True, hide_input_in_errors=True
    )

    mlflow_tracking_uri: SecretStr | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")
    mlflow_registry_uri: SecretStr | None = Field(None, validation_alias="MLFLOW_REGISTRY_URI")
    s3_endpoint_url: str | None = Field(None, validation_alias="MLFLOW_S3_ENDPOINT_URL")
    is_embedded: bool = Field(False, validation_alias="HEIMDALL_EMBEDDED_STORE")
    s3_access_key_id: SecretStr | None = Field(None, validation_alias="MLFLOW_S3_ACCESS_KEY_ID")
    s3_secret_access_key: SecretStr | None = Field(
        None, validation_alias="MLFLOW_S3_SECRET_ACCESS_KEY"
    )
    aws_access_key_id: SecretStr | None = Field(None, validation_alias="AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = Field(None, validation_alias="AWS_SECRET_ACCESS_KEY")
    aws_session_token: SecretStr | None = Field(None, validation_alias="AWS_SESSION_TOKEN")
    # MLflow's own names, which its S3 client obeys too.
    addressing_style: Literal["path", "virtual", "auto"] = Field(
        "path", validation_alias="MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"
    )
    upload_extra_args: Json[dict[str, SecretStr]] = Field(
        {}, validation_alias="MLFLOW_S3_UPLOAD_EXTRA_ARGS", validate_default=False
    )
    artifact_uri: str = Field("s3://heimdall-mlflow", validation_alias="MLFLOW_ARTIFACT_URI")
    experiment_name: str = Field("heimdall-localization", validation_alias="MLFLOW_EXPERIMENT_NAME")
    home: Path = Field(Path(".heimdall"), validation_alias="HEIMDALL_HOME")
    signing_key: Path | None = Field(None, validation_alias="HEIMDALL_SIGNING_KEY")
    signing_key_password: SecretStr | None = Field(
        None, validation_alias="HEIMDALL_SIGNING_KEY_PASSWORD"
    )
    signing_certificate: Path | None = Field(None, validation_alias="HEIMDALL_SIGNING_CERTIFICATE")
    signing_certificate_chain: Path | None = Field(
        None, validation_alias="HEIMDALL_SIGNING_CERTIFICATE_CHAIN"
    )
    public_key: Path | None = Field(None, validation_alias="HEIMDALL_PUBLIC_KEY")
    trusted_certificates: Path | None = Field(
        None, validation_alias="HEIMDALL_TRUSTED_CERTIFICATES"
    )
    versioning: bool = Field(False, validation_alias="HEIMDALL_VERSIONING")
    retention_days: int = Field(0, ge=0, le=36500, validation_alias="HEIMDALL_RETENTION_DAYS")

    @field_validator("*", mode="before")
    @classmethod
    def _clean(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(cls.model_fields[str(info.field_name)].validation_alias)
        return cleaned(name, value) if isinstance(value, str) else value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # The notebook's kernel may run in another folder than the command that started it.
        try:
            return value.expanduser().absolute()
        except RuntimeError as error:
            raise ValueError("names the home folder of a user that does not exist") from error

    @field_validator("s3_endpoint_url")
    @classmethod
    def _without_password(cls, value: str | None) -> str | None:
        # Libraries repeat the address in their errors, and S3 signs with keys, never with these.
        if "@" in (value or ""):
            raise ValueError(
                "must not hold a user name or a password; set MLFLOW_S3_ACCESS_KEY_ID and "
                "MLFLOW_S3_SECRET_ACCESS_KEY"
            )
        return value

    @property
    def tracking_uri(self) -> SecretStr:
        """The tracking address as SQLAlchemy and MLflow need it; it may hold a password."""
        if self.mlflow_tracking_uri is None:
            return SecretStr(f"sqlite:///{self.home / 'mlflow.db'}")
        return SecretStr(with_driver(self.mlflow_tracking_uri.get_secret_value()))

    @property
    def registry_uri(self) -> SecretStr:
        """The address of the registered models, likewise."""
        if self.mlflow_registry_uri is None:
            return self.tracking_uri
        return SecretStr(with_driver(self.mlflow_registry_uri.get_secret_value()))

    @property
    def credentials(self) -> Credentials | None:
        """The store's credentials; None leaves the choice to boto3's chain (profile, role).

        That is the pair that begins with ``MLFLOW_S3_``, else the one that begins with ``AWS_``
        and its token; halves of two pairs are never put together.

        Raises:
            SettingsError: If only one half of a pair is set.
        """
        for prefix, key_id, secret, token in (
            ("MLFLOW_S3", self.s3_access_key_id, self.s3_secret_access_key, None),
            ("AWS", self.aws_access_key_id, self.aws_secret_access_key, self.aws_session_token),
        ):
            if key_id and secret:
                return Credentials(key_id, secret, token)
            if key_id or secret:
                raise SettingsError(
                    f"{prefix}_ACCESS_KEY_ID and {prefix}_SECRET_ACCESS_KEY must be set together; "
                    "only one of them is"
                )
        return None

    @classmethod
    def load(cls) -> Settings:
        """Read the environment and the nearest ``.env`` file, here or in a folder above.

        Raises:
            SettingsError: With every variable that can't be used; values are not repeated, since
                they may be secrets.
        """
        clean_environment()
        own = {str(field.validation_alias) for field in cls.model_fields.values()}
        try:
            file = find_dotenv(usecwd=True) or os.devnull
            # The rest is for libraries, which look for it in the environment alone.
            for name, value in dotenv_values(file).items():
                if name not in own and _READ.match(name) and (used := cleaned(name, value or "")):
                    os.environ.setdefault(name, used)
            return cls(_env_file=file)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}"
                for e in error.errors(include_input=False)
            )
            raise SettingsError(
                f"the environment can't be used as configuration: {problems}"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            gone = told(error) if isinstance(error, FileNotFoundError) else None
            raise gone or SettingsError(
                f"the file `.env`, here or in a folder above, can't be read: {error}; expected "
                "NAME=value on each line, in UTF-8"
            ) from None

    def apply(self, environment: MutableMapping[str, str] = os.environ) -> None:
        """Put every setting into the environment, or into the one of a process to be started.

        Child processes inherit it from there, and MLflow's own S3 client finds the store's
        address and credentials, and no proxy in front of a store on this machine; with the
        embedded store none of AWS's own settings stays.

        Raises:
            SettingsError: If only one half of a pair of credentials is set.
        """
        credentials = self.credentials
        clean_environment(environment)
        if self.is_embedded:
            files = dict.fromkeys(("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"), os.devnull)
            for name in {n for n in environment if n.startswith("AWS_")} - {*files, *AWS_KEYS}:
                environment.pop(name, None)
            environment.update(files)
        environment["MLFLOW_TRACKING_URI"] = self.tracking_uri.get_secret_value()
        if self.mlflow_registry_uri is not None:
            environment["MLFLOW_REGISTRY_URI"] = self.registry_uri.get_secret_value()
        environment["MLFLOW_ARTIFACT_URI"] = self.artifact_uri
        environment["MLFLOW_EXPERIMENT_NAME"] = self.experiment_name
        environment["HEIMDALL_HOME"] = str(self.home)
        if self.s3_endpoint_url is not None:
            environment["MLFLOW_S3_ENDPOINT_URL"] = self.s3_endpoint_url
        bypass_proxy(self.s3_endpoint_url or "", environment)
        if credentials is not None:
            # Nothing stays of another pair, nor a token of other credentials.
            ours = self.s3_access_key_id is not None
            for name, value in (
                ("MLFLOW_S3_ACCESS_KEY_ID", credentials.access_key_id if ours else None),
                ("MLFLOW_S3_SECRET_ACCESS_KEY", credentials.secret_access_key if ours else None),
                ("AWS_ACCESS_KEY_ID", credentials.access_key_id),
                ("AWS_SECRET_ACCESS_KEY", credentials.secret_access_key),
                ("AWS_SESSION_TOKEN", credentials.session_token),
            ):
                if value is None:
                    environment.pop(name, None)
                else:
                    environment[name] = value.get_secret_value()


def is_loopback(address: str) -> bool:
    """Whether an address is one of this machine; one that can't be read is not."""
    try:
        return urlsplit(address).hostname in LOOPBACK_HOSTS
    except ValueError:
        return False


def bypass_proxy(address: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Let no proxy of the environment stand before an address of this machine."""
    if is_loopback(address):
        beside = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
        hosts = (*filter(None, map(str.strip, beside.split(","))), *LOOPBACK_HOSTS)
        # All hosts, which it means only where it stands alone.
        environment["no_proxy"] = "*" if "*" in hosts else ",".join(dict.fromkeys(hosts))


def clean_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Take away blank variables, and what `cleaned` leaves out of others.

    CI systems pass empty what is not set, which AWS's and MLflow's libraries take for values: a
    profile without a name, or a bundle of no certificates.

    Raises:
        SettingsError: If a variable holds what no credential or address can.
    """
    for name, value in list(environment.items()):
        if _READ.match(name) or _ADDRESS.fullmatch(name):
            used = cleaned(name, value)
            if not used.strip():
                environment.pop(name, None)
            elif used != value:
                environment[name] = used


def cleaned(name: str, value: str) -> str:
    """A variable's value without what only a mistake can have put around it; that is logged.

    A secret that ``echo`` wrote ends with a line break, and errors show the header it breaks.

    Raises:
        SettingsError: If it holds what no credential or address can; it is named, and not shown.
    """
    # A password may begin or end with a blank or a quote.
    exact = name.endswith("PASSWORD")
    used = value.strip(_BREAKS if exact else _BREAKS + " \t")
    if not exact and (quoted := re.fullmatch(r"([\"'])(.*)\1", used)):
        used = quoted[2]
    if used and used != value:
        log.warning("left out line breaks, blanks or quotes around a value", variable=name)
    fits = used.isprintable() and (used.isascii() or not name.endswith(("KEY_ID", "TOKEN")))
    if not fits and (_CREDENTIAL.fullmatch(name) or _ADDRESS.fullmatch(name)):
        raise SettingsError(
            f"{name} must be one line of characters that can be sent, and holds others, such as a "
            "line break or a typographic quote; set it without"
        )
    return used


def known_secrets(address: str = "") -> Iterator[str]:
    """The secrets in the environment and in ``address``, as they are and unquoted."""
    for name, value in [*os.environ.items(), ("MLFLOW_TRACKING_URI", address)]:
        if _ADDRESS.fullmatch(name) and (user := re.match(r"[\w+.-]+://(.*)@", value)):
            # A user without a password may be a token.
            secret = user[1].partition(":")[2] or user[1]
            yield from (secret, unquote(secret))
        elif _READ.match(name) and _CREDENTIAL.fullmatch(name) and "USERNAME" not in name:
            yield value


def with_driver(uri: str) -> str:
    """Name the PostgreSQL driver in a tracking address, which is `cleaned`.

    SQLAlchemy 2.1 reads a bare ``postgresql://`` as psycopg 3; MLflow's servers ship psycopg2.
    """
    uri = cleaned("MLFLOW_TRACKING_URI", uri)
    for scheme in ("postgresql://", "postgres://"):
        if uri.startswith(scheme):
            return "postgresql+psycopg2://" + uri.removeprefix(scheme)
    return uri
