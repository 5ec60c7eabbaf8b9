"""Stores of other makers: Ceph does all that is asked of a store, and others are refused.

They are started where they are there; see `foreign_stores` for how they are found.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path

import foreign_stores
import pytest
from botocore.awsrequest import AWSPreparedRequest
from botocore.exceptions import ClientError
from documents import ROOT, blocks
from foreign_stores import ForeignStore
from proxy import proxied
from quick_release import PREFIX, Factory
from releases import Inputs
from servers import mlflow_server

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import (
    MissingObjectError,
    ObjectExistsError,
    PromotionError,
    StoreError,
)
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.services.abilities import abilities
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.retention import prepare_bucket, retain
from heimdall_onnx.services.store import Bucket, locate

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.thorough]

WRITERS = 16
# What a CI that knows many projects passes to each of them, empty where one has not set it.
PASSED = [
    prefix + name
    for prefix, names in {
        "AWS_": (
            "ACCESS_KEY_ID SECRET_ACCESS_KEY SESSION_TOKEN PROFILE DEFAULT_PROFILE REGION "
            "DEFAULT_REGION CA_BUNDLE CONFIG_FILE SHARED_CREDENTIALS_FILE ENDPOINT_URL "
            "ENDPOINT_URL_S3 ROLE_ARN WEB_IDENTITY_TOKEN_FILE MAX_ATTEMPTS RETRY_MODE "
            "USE_FIPS_ENDPOINT REQUEST_CHECKSUM_CALCULATION DEFAULTS_MODE "
            "RESPONSE_CHECKSUM_VALIDATION EC2_METADATA_DISABLED "
            "CONTAINER_CREDENTIALS_FULL_URI CONTAINER_CREDENTIALS_RELATIVE_URI"
        ),
        "MLFLOW_": (
            "TRACKING_AUTH TRACKING_AWS_SIGV4 TRACKING_INSECURE_TLS "
            "TRACKING_CLIENT_CERT_PATH RUN_ID EXPERIMENT_ID S3_IGNORE_TLS "
            "HTTP_REQUEST_TIMEOUT HTTP_REQUEST_MAX_RETRIES WORKSPACE"
        ),
        "": (
            "REQUESTS_CA_BUNDLE CURL_CA_BUNDLE SSL_CERT_FILE SSL_CERT_DIR HTTP_PROXY "
            "HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy "
            "PYTHONPATH PYTHONWARNINGS TMPDIR MPLBACKEND MPLCONFIGDIR XDG_CACHE_HOME "
            "XDG_CONFIG_HOME XDG_RUNTIME_DIR JUPYTER_PATH JUPYTER_CONFIG_DIR "
            "JUPYTER_RUNTIME_DIR IPYTHONDIR CUDA_VISIBLE_DEVICES NO_COLOR CI "
            "GITHUB_STEP_SUMMARY"
        ),
    }.items()
    for name in names.split()
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ForeignStore]]:
    """Ceph's gateway by ``http`` and by ``https``."""
    with foreign_stores.ceph(tmp_path_factory.mktemp("ceph")) as stores:
        yield stores


@pytest.fixture(params=["http", "https"])
def connection(
    request: pytest.FixtureRequest,
    cluster: dict[str, ForeignStore],
    empty_database: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reset_mlflow: None,
) -> Connection:
    """Ceph and a registry in SQLite."""
    return reach(cluster[request.param], empty_database, tmp_path, monkeypatch)


def reach(store: ForeignStore, database: Path, home: Path, patch: pytest.MonkeyPatch) -> Connection:
    for name, value in store.variables().items():
        patch.setenv(name, value)
    shutil.copyfile(database, home / "mlflow.db")
    return connect(store.settings(home))


@pytest.fixture
def bucket(connection: Connection) -> Bucket:
    made = connection.bucket(f"test-{secrets.token_hex(6)}")
    made.ensure()
    return made


# --- Ceph


@pytest.mark.parametrize("megabytes", [0, 1, 70])
def test_a_file_comes_back_as_it_was_with_what_is_said_of_it(
    bucket: Bucket, tmp_path: Path, megabytes: int
) -> None:
    path, back = tmp_path / "model.onnx", tmp_path / "back.onnx"
    path.write_bytes(os.urandom(megabytes << 20))
    stored = bucket.upload_file(path, "a/ü b+c.onnx", metadata={"made-by": "a test"})
    assert stored.sha256 == hash_file(path) == bucket.head(stored.key).sha256
    copied = bucket.copy(stored.key, "copy.onnx")
    bucket.touch("copy.onnx")
    assert (copied.sha256, copied.size_bytes) == (stored.sha256, stored.size_bytes)
    said = bucket.client.head_object(Bucket=bucket.name, Key="copy.onnx")["Metadata"]
    assert said["made-by"] == "a test"
    assert bucket.download_file("copy.onnx", back) == stored.sha256
    if megabytes:
        listed = bucket.list_objects("copy")["copy.onnx"]
        assert bucket.read_range("copy.onnx", 5, 9, listed.tag) == path.read_bytes()[5:14]
    bucket.delete(["a/ü b+c.onnx", "copy.onnx", "never there"])
    assert bucket.list_keys("") == ()
    with pytest.raises(MissingObjectError, match="no such object"):
        bucket.read_bytes("copy.onnx")


@pytest.mark.parametrize(("operation", "megabytes"), [("PutObject", 1), ("UploadPart", 70)])
def test_a_body_that_was_changed_on_its_way_is_refused_by_the_store(
    bucket: Bucket, tmp_path: Path, operation: str, megabytes: int
) -> None:
    def change(request: AWSPreparedRequest, **_: object) -> None:
        request.body = bytes(int(request.headers["Content-Length"]))

    path = tmp_path / "model.onnx"
    path.write_bytes(os.urandom(megabytes << 20))
    bucket.client.meta.events.register(f"before-send.s3.{operation}", change)
    with pytest.raises(StoreError, match="damaged on its way"):
        bucket.upload_file(path, "k")
    assert not bucket.exists("k")


def test_of_sixteen_writers_of_one_name_one_is_taken(bucket: Bucket) -> None:
    def write(number: int) -> bool:
        try:
            bucket.upload_bytes(b"%d" % number, "k", if_absent=True)
        except ObjectExistsError:
            return False
        return True

    with ThreadPoolExecutor(WRITERS) as pool:
        taken = list(pool.map(write, range(WRITERS)))
    assert taken.count(True) == 1
    assert bucket.read_bytes("k") == b"%d" % taken.index(True)


def test_sixteen_claims_and_sixteen_moves_at_once_are_told_apart(bucket: Bucket) -> None:
    now = datetime(2026, 11, 20, 14, 30, 0, tzinfo=UTC)

    def claim(_: int) -> str:
        return bucket.claim_version("m", name="a.json", content=str.encode, now=now)

    def move(version: str) -> None:
        AliasLog(bucket, "net", "staging").append(
            action="release",
            version=version,
            release=bucket.uri(f"m/{version}"),
            previous=None,
            by="a run",
        )

    with ThreadPoolExecutor(WRITERS) as pool:
        versions = list(pool.map(claim, range(WRITERS)))
        list(pool.map(move, versions))
    assert len(set(versions)) == WRITERS
    moves = AliasLog(bucket, "net", "staging").moves
    assert [one.number for one in moves] == list(range(1, WRITERS + 1))
    assert {one.version for one in moves} == set(versions)
    decided = {"action": "rollback", "version": versions[0], "release": bucket.uri("m")}
    with pytest.raises(PromotionError, match="was moved meanwhile"):
        AliasLog(bucket, "net", "staging").append(
            **decided, previous=None, by="R", after=WRITERS - 1
        )


def test_a_release_verifies_until_it_is_changed(
    connection: Connection, bucket: Bucket, tmp_path: Path
) -> None:
    release = Factory(connection, bucket.name, tmp_path)
    made = [release(), release()]
    assert bucket.list_versions(PREFIX) == tuple(one.version for one in made)
    assert connection.tracker.version_by_alias("net", "staging").source == made[1].uri
    for one in made:
        assert all(found.holds for found in verify_release(Release.at(connection, one.uri)))
    _, key = locate(connection.client, made[0].uri)
    connection.client.put_object(Bucket=bucket.name, Key=f"{key}/model.onnx", Body=b"another")
    wrong = [f.what for f in verify_release(Release.at(connection, made[0].uri)) if not f.holds]
    assert any("model.onnx" in what for what in wrong)
    assert all(one.holds for one in abilities(connection, bucket) if one.needed)


def test_what_is_asked_to_be_kept_is_kept_or_said_to_be_not(
    connection: Connection, bucket: Bucket
) -> None:
    asked = connection.settings.model_copy(update={"versioning": True, "retention_days": 1})
    locked = connection.bucket(f"{bucket.name}-locked")
    connection.client.create_bucket(Bucket=locked.name, ObjectLockEnabledForBucket=True)
    for one in (bucket, locked):
        protection = prepare_bucket(one, asked)
        one.upload_bytes(b"1", "k")
        retain(one, ["k"], protection)
        assert protection.versioning
        # Ceph 16 turns Object Lock on for new buckets alone.
        lacking = "could not turn on Object Lock" in protection.note
        assert bool(protection.retained_until) != lacking
    assert not lacking
    (version,) = connection.client.list_object_versions(Bucket=locked.name)["Versions"]
    with pytest.raises(ClientError, match="AccessDenied"):
        connection.client.delete_object(Bucket=locked.name, Key="k", VersionId=version["VersionId"])


# --- the newcomer


def test_a_newcomer_with_services_of_a_firm_releases_at_the_first_try(
    cluster: dict[str, ForeignStore], tmp_path: Path
) -> None:
    """Ceph with an authority of its own, MLflow behind a prefix and a login, and a CI that passes
    what is not set as an empty string; then the same from a file."""
    folder, server = tmp_path / "project", tmp_path / "server"
    folder.mkdir()
    server.mkdir()
    own = [one.text for one in blocks() if one.heading == "Your own model"]
    (folder / "detector.py").write_text(own[0])
    (folder / "make.py").write_text(own[1])
    named = re.findall(
        r"`((?:HEIMDALL|MLFLOW|AWS)_[A-Z0-9_]+)`",
        (ROOT / "heimdall_onnx/services/README.md").read_text(),
    )
    empty = {
        **dict.fromkeys([*named, *PASSED], ""),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    with (
        mlflow_server(f"sqlite:///{server / 'mlflow.db'}", server, prefix="/ml/flow") as address,
        proxied(address.removesuffix("/ml/flow"), login="ann:two words") as proxy,
    ):
        firm = {
            **cluster["https"].variables(),
            "MLFLOW_TRACKING_URI": f"{proxy.address}/ml/flow",
            "MLFLOW_TRACKING_USERNAME": "ann",
            "MLFLOW_TRACKING_PASSWORD": "two words",
        }

        def shell(script: str, environment: dict[str, str]) -> str:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr[-4000:]}"
            assert "two words" not in done.stdout + done.stderr
            return done.stdout

        ci = {**empty, **firm}
        shell("python make.py", ci)
        told = shell(own[2], ci)
        assert f"browse in MLflow:  {proxy.address}/ml/flow\n" in told
        assert "detector version 1, alias staging" in told
        # What the environment has nothing but empty strings of is read from the file.
        (folder / ".env").write_text("".join(f'{n}="{v}"\n' for n, v in firm.items()))
        checked = shell("heimdall-onnx services check", empty)
        assert not re.search(r"^\S.* NO ", checked, re.M)
        verify = "heimdall-onnx verify detector"
        (review,) = [one.text for one in blocks() if one.text.startswith(verify)]
        reviewed = shell(review, empty)
        assert "detector@production points at version 1 now" in reviewed
        assert "parity looked at" in reviewed
        assert "detector version 1" in shell("heimdall-onnx list --name detector", empty)
        # Nothing of its own was started for it.
        assert not (folder / ".heimdall/store/data").exists()


# --- stores that are refused


@pytest.mark.parametrize("start", [foreign_stores.s3rver, foreign_stores.moto])
def test_nothing_is_published_to_a_store_that_can_not_keep_writers_apart(
    start: Callable[[Path], AbstractContextManager[ForeignStore]],
    small: Inputs,
    empty_database: Path,
    tmp_path: Path,
) -> None:
    home, data = tmp_path / "home", tmp_path / "data"
    home.mkdir()
    data.mkdir()
    shutil.copyfile(empty_database, home / "mlflow.db")
    with start(data) as store:
        environment = {**os.environ, **store.variables(), "HEIMDALL_HOME": str(home)}
        arguments = [
            *("release", small.checkpoint, "--eval-data", small.eval_data, "--model", small.model),
            *("--profile", "smoke", "-p", "opset", "14", "-p", "measure_latency", "false"),
        ]
        done = subprocess.run(
            [sys.executable, "-m", "heimdall_onnx", *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 4, done.stderr[-4000:]
        assert "can't keep two releases apart" in done.stderr
        assert "Nothing was published" in done.stderr
        client = make_client(store.settings(home))
        left = Bucket(client, "heimdall-models").list_keys("")
        assert [key for key in left if not key.startswith("aliases/.store/")] == []
        client.close()
        assert "Executing" not in done.stderr
