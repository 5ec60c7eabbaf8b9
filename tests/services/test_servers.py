"""MLflow's servers as they are met in the field: releases are registered, moved and verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr
from quick_release import Factory
from servers import mlflow_server, other_mlflow

from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.services.abilities import abilities
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

pytestmark = [pytest.mark.services, pytest.mark.thorough]


@pytest.fixture(params=["as it is", "prefix", "proxied", "2", "2, proxied"])
def connection(
    request: pytest.FixtureRequest,
    embedded_settings: Settings,
    tmp_path: Path,
    reset_mlflow: None,
) -> Iterator[Connection]:
    """Services with such a server, which passes artifacts on into a folder where it is proxied."""
    kind = request.param
    options = ["--serve-artifacts", "--artifacts-destination", str(tmp_path / "artifacts")]
    if not kind.endswith("proxied"):
        options = ["--no-serve-artifacts"]
    prefix = "/ml/flow" if kind == "prefix" else ""
    database = f"sqlite:///{tmp_path / 'server.db'}"
    program = other_mlflow() if kind.startswith("2") else None
    with mlflow_server(database, tmp_path, options, program, prefix) as address:
        changed = {
            "mlflow_tracking_uri": SecretStr(address),
            "home": tmp_path / "home",
        }
        if kind.endswith("proxied"):
            changed["artifact_uri"] = "mlflow-artifacts:/"
        yield connect(embedded_settings.model_copy(update=changed))


def test_a_server_registers_moves_aliases_keeps_artifacts_and_verifies(
    connection: Connection, bucket: Bucket, tmp_path: Path
) -> None:
    tracker = connection.tracker
    release = Factory(connection, bucket.name, tmp_path)
    first, second = release(), release(alias=None)
    assert tracker.version_by_alias("net", "staging").source == first.uri
    tracker.set_alias("net", second.model_version, "staging")
    assert tracker.alias_target("net", "staging") == second.model_version
    tracker.delete_alias("net", "staging")
    assert tracker.alias_target("net", "staging") is None
    for made in (first, second):
        findings = verify_release(Release.at(connection, made.uri))
        assert [finding for finding in findings if not finding.holds] == []

    run_id = tracker.create_run("a run")
    (tmp_path / "kept.txt").write_text("kept")
    tracker.log_artifact(tmp_path / "kept.txt", "below", run_id=run_id)
    tracker.check_run(run_id)
    tracker.log_metrics({"error": 1.0}, run_id=run_id)
    tracker.close_run(run_id, "FINISHED")
    assert tracker.get_run_info(run_id)["metrics"] == {"error": 1.0}
    assert tracker.transition_model_stage("net", first.model_version, "Staging") in (True, False)
    lacking = [one for one in abilities(connection, bucket) if one.needed and not one.holds]
    assert lacking == []
    if tracker.artifact_location().startswith("mlflow-artifacts:"):
        assert (tmp_path / "artifacts" / run_id / "artifacts/below/kept.txt").read_text() == "kept"
        assert not list((tmp_path / "artifacts").rglob("check.txt"))
