"""Configuration from the environment and, if there is one, a ``.env`` file.

Only the outermost callers (command line, runner, notebook) read settings; every step takes plain
arguments. Secrets are `SecretStr`, so that printing a `Settings` never shows them.
"""

from __future__ import annotations

import os
from pathlib import Path

from dotenv import find_dotenv
from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from heimdall_onnx.errors import SettingsError


class Settings(BaseSettings):
    """Where the services are and how to talk to them.

    Attributes:
        mlflow_tracking_uri: ``http(s)://…``, ``sqlite:///…`` or ``postgresql://…``; None means
            SQLite below ``home``.
        s3_endpoint_url: The S3 store; None means that the embedded store is started.
        s3_access_key_id: With ``s3_secret_access_key``, the store's credentials; None leaves the
            choice to boto3's usual chain.
        artifact_uri: Where MLflow keeps the artifacts of new experiments.
        experiment_name: MLflow experiment of the release runs.
        home: Folder of the embedded services and of local working files.
        recordings: Folder with real recordings, for tests and measurements.
    """

    model_config = SettingsConfigDict(extra="ignore", frozen=True)

    mlflow_tracking_uri: SecretStr | None = Field(None, validation_alias="MLFLOW_TRACKING_URI")
    s3_endpoint_url: str | None = Field(None, validation_alias="MLFLOW_S3_ENDPOINT_URL")
    s3_access_key_id: SecretStr | None = Field(
        None, validation_alias=AliasChoices("MLFLOW_S3_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID")
    )
    s3_secret_access_key: SecretStr | None = Field(
        None, validation_alias=AliasChoices("MLFLOW_S3_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY")
    )
    artifact_uri: str = Field("s3://heimdall-mlflow", validation_alias="MLFLOW_ARTIFACT_URI")
    experiment_name: str = Field("heimdall-localization", validation_alias="MLFLOW_EXPERIMENT_NAME")
    home: Path = Field(Path(".heimdall"), validation_alias="HEIMDALL_HOME")
    recordings: Path | None = Field(None, validation_alias="HEIMDALL_RECORDINGS")

    @field_validator("mlflow_tracking_uri", "s3_endpoint_url", "recordings", mode="before")
    @classmethod
    def _empty_means_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        # The notebook's kernel may run in another folder than the command that started it.
        try:
            return value.expanduser().absolute()
        except RuntimeError as error:
            raise ValueError("names the home folder of a user that does not exist") from error

    @property
    def tracking_uri(self) -> SecretStr:
        """The tracking address as SQLAlchemy and MLflow need it; it may hold a password."""
        if self.mlflow_tracking_uri is None:
            return SecretStr(f"sqlite:///{self.home / 'mlflow.db'}")
        return SecretStr(with_driver(self.mlflow_tracking_uri.get_secret_value()))

    @classmethod
    def load(cls) -> Settings:
        """Read the environment and the nearest ``.env`` file, here or in a folder above.

        Raises:
            SettingsError: With every variable that can't be used; values are not repeated, since
                they may be secrets.
        """
        try:
            return cls(_env_file=find_dotenv(usecwd=True) or None)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, e['loc']))}: {e['msg']}"
                for e in error.errors(include_input=False)
            )
            raise SettingsError(
                f"the environment can't be used as configuration: {problems}"
            ) from None

    def apply(self) -> None:
        """Put every setting into the environment.

        Child processes inherit it from there, and MLflow's own S3 client finds the store's
        address and credentials.
        """
        for name, value in (
            ("MLFLOW_TRACKING_URI", self.tracking_uri),
            ("MLFLOW_S3_ENDPOINT_URL", self.s3_endpoint_url),
            ("AWS_ACCESS_KEY_ID", self.s3_access_key_id),
            ("AWS_SECRET_ACCESS_KEY", self.s3_secret_access_key),
            ("MLFLOW_ARTIFACT_URI", self.artifact_uri),
            ("MLFLOW_EXPERIMENT_NAME", self.experiment_name),
            ("HEIMDALL_HOME", str(self.home)),
        ):
            if value is not None:
                os.environ[name] = (
                    value.get_secret_value() if isinstance(value, SecretStr) else value
                )


def with_driver(uri: str) -> str:
    """Name the PostgreSQL driver in a tracking address.

    SQLAlchemy 2.1 reads a bare ``postgresql://`` as psycopg 3; MLflow's servers ship psycopg2.
    """
    for scheme in ("postgresql://", "postgres://"):
        if uri.startswith(scheme):
            return "postgresql+psycopg2://" + uri.removeprefix(scheme)
    return uri
