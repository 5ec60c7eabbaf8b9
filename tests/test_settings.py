"""Configuration from the environment and from a ``.env`` file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from heimdall_onnx.errors import SettingsError
from heimdall_onnx.settings import Settings, with_driver

VARIABLES = {
    "MLFLOW_TRACKING_URI": "postgresql://user:tracking-secret@db/mlflow",
    "MLFLOW_S3_ENDPOINT_URL": "https://s3.example",
    "MLFLOW_S3_ACCESS_KEY_ID": "an-id",
    "MLFLOW_S3_SECRET_ACCESS_KEY": "s3-secret",
    "MLFLOW_ARTIFACT_URI": "s3://artifacts",
    "MLFLOW_EXPERIMENT_NAME": "experiment",
    "HEIMDALL_HOME": "/srv/heimdall",
    "HEIMDALL_RECORDINGS": "/srv/recordings",
}


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder to work in, and none of the variables set."""
    for name in (*VARIABLES, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(settings: Settings) -> dict[str, str]:
    values = {
        "MLFLOW_TRACKING_URI": settings.mlflow_tracking_uri,
        "MLFLOW_S3_ENDPOINT_URL": settings.s3_endpoint_url,
        "MLFLOW_S3_ACCESS_KEY_ID": settings.s3_access_key_id,
        "MLFLOW_S3_SECRET_ACCESS_KEY": settings.s3_secret_access_key,
        "MLFLOW_ARTIFACT_URI": settings.artifact_uri,
        "MLFLOW_EXPERIMENT_NAME": settings.experiment_name,
        "HEIMDALL_HOME": settings.home,
        "HEIMDALL_RECORDINGS": settings.recordings,
    }
    return {
        name: value.get_secret_value() if isinstance(value, SecretStr) else str(value)
        for name, value in values.items()
    }


def test_nothing_set_means_embedded_services_in_this_folder(empty: Path) -> None:
    settings = Settings.load()
    assert settings.s3_endpoint_url is None
    assert settings.s3_access_key_id is None
    assert settings.recordings is None
    assert settings.home == empty / ".heimdall"
    assert settings.tracking_uri.get_secret_value() == f"sqlite:///{empty}/.heimdall/mlflow.db"
    assert settings.artifact_uri == "s3://heimdall-mlflow"
    assert settings.experiment_name == "heimdall-localization"


def test_every_variable_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    assert found(Settings.load()) == VARIABLES


def test_every_variable_is_read_from_a_dotenv_file_here_or_above(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty / ".env").write_text("".join(f"{n}={v}\n" for n, v in VARIABLES.items()))
    (empty / "notebooks").mkdir()
    monkeypatch.chdir(empty / "notebooks")
    assert found(Settings.load()) == VARIABLES


def test_the_environment_wins_over_the_dotenv_file(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty / ".env").write_text("MLFLOW_EXPERIMENT_NAME=file\nUNRELATED=1\n")
    assert Settings.load().experiment_name == "file"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "environment")
    assert Settings.load().experiment_name == "environment"


def test_the_usual_aws_variables_serve_where_ours_are_not_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "aws-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws-secret")
    settings = Settings.load()
    assert settings.s3_access_key_id.get_secret_value() == "aws-id"
    assert settings.s3_secret_access_key.get_secret_value() == "aws-secret"
    monkeypatch.setenv("MLFLOW_S3_ACCESS_KEY_ID", "our-id")
    assert Settings.load().s3_access_key_id.get_secret_value() == "our-id"


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL"])
def test_an_empty_variable_is_an_unset_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    settings = Settings.load()
    assert settings.s3_endpoint_url is None
    assert settings.tracking_uri.get_secret_value().startswith("sqlite:////")


def test_the_home_does_not_depend_on_where_one_stands_later(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEIMDALL_HOME", "below/here")
    settings = Settings.load()
    monkeypatch.chdir("/")
    assert settings.home == empty / "below" / "here"
    monkeypatch.setenv("HEIMDALL_HOME", "~/heimdall")
    assert Settings.load().home == Path.home() / "heimdall"


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    for shown in (repr(settings), str(settings), settings.model_dump_json(), f"{settings!r}"):
        assert "https://s3.example" in shown
        for secret in ("tracking-secret", "s3-secret", "an-id"):
            assert secret not in shown


def test_settings_do_not_change_under_their_readers() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings.load().experiment_name = "other"


def test_what_cannot_be_used_is_named_without_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEIMDALL_HOME", "~no-such-user/hidden")
    with pytest.raises(SettingsError, match="HEIMDALL_HOME") as caught:
        Settings.load()
    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("written", "used"),
    [
        ("postgresql://u:p@h/db", "postgresql+psycopg2://u:p@h/db"),
        ("postgres://u:p@h/db", "postgresql+psycopg2://u:p@h/db"),
        ("postgresql+psycopg2://u:p@h/db", "postgresql+psycopg2://u:p@h/db"),
        ("postgresql+psycopg://u:p@h/db", "postgresql+psycopg://u:p@h/db"),
        ("sqlite:////tmp/a.db", "sqlite:////tmp/a.db"),
        ("https://mlflow.example/postgresql://", "https://mlflow.example/postgresql://"),
    ],
)
def test_the_driver_is_settled_only_where_none_is_named(written: str, used: str) -> None:
    assert with_driver(written) == used


def test_applied_settings_reach_child_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    settings = Settings.load()
    for name in VARIABLES:
        monkeypatch.delenv(name)
    settings.apply()
    assert os.environ["AWS_ACCESS_KEY_ID"] == "an-id"
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "s3-secret"
    again = found(Settings.load())
    again.pop("HEIMDALL_RECORDINGS")
    expected = {n: v for n, v in VARIABLES.items() if n != "HEIMDALL_RECORDINGS"}
    expected["MLFLOW_TRACKING_URI"] = with_driver(VARIABLES["MLFLOW_TRACKING_URI"])
    assert again == expected


def test_what_is_unset_stays_unset() -> None:
    Settings.load().apply()
    for name in ("MLFLOW_S3_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        assert name not in os.environ
