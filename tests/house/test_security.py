"""Hostile text stays text, downloads stay in their folder, and certificates are checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import select
import socket
import socketserver
import ssl
import threading
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import nbformat
import pytest
from browser import open_in_chromium
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hostile import EVERYTHING, HOST, MARK, make_hostile_inputs
from keys import make_server_certificate
from models import SIGNAL
from onnx import TensorProto, helper
from releases import PREFIX, changed_notebook, keys, smoke
from structlog.testing import capture_logs

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import (
    CheckpointError,
    DataError,
    HeimdallError,
    InvalidModelError,
    ParameterError,
    RegistryError,
    StoreError,
    VerificationError,
)
from heimdall_onnx.common.parameters import check_parameters
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.onnx.validate import validate_model
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.report.notebook import notebook_path
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.connection import connect
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.services.store import Bucket, format_uri, parse_uri

FOLDER = f"{PREFIX}/v20261120_143000"
BUCKET = "test-hostile"
# What escaped text can't hold.
LIVE = re.compile(r"<(script|img)|\]\(|https?://|\bon\w+=\S*>")


# A release that says hostile things wherever a release says anything


@pytest.fixture(scope="module")
def settings(make_settings):
    return make_settings("hostile")


@pytest.fixture(scope="module")
def released(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    parameters = smoke(make_hostile_inputs(folder), BUCKET, model_kwargs={"note": EVERYTHING})
    notebook = nbformat.read(notebook_path(), 4)
    # Those that show names and units.
    drawn = {"parity-scatter", "position-map", "worst-inputs"}
    notebook.cells = [
        c for c in notebook.cells if "plot." not in c.source or c.id in drawn | {"imports"}
    ]
    nbformat.write(notebook, folder / "notebook.ipynb")
    result = release_checkpoint(parameters, settings, notebook=folder / "notebook.ipynb")
    assert result.success, result.error
    return result


@pytest.fixture(scope="module")
def failed(settings, small, tmp_path_factory):
    source = f"raise RuntimeError({EVERYTHING!r})"
    notebook = changed_notebook(
        tmp_path_factory.mktemp("failing"), after="check-parameters", source=source
    )
    result = release_checkpoint(smoke(small, BUCKET), settings, notebook=notebook)
    assert not result.success
    assert EVERYTHING.split("(")[0] in result.error
    return result


def live_attributes(document: str) -> list[str]:
    """Attributes of a page that run something or lead out of it."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            for name, value in attributes:
                leads = name in ("href", "src", "action") and not re.match("#|data:|$", value or "")
                if name.startswith("on") or leads:
                    found.append(f"<{tag} {name}={value}>")

    Reader().feed(document)
    return found


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.parametrize("which", ["released", "failed"])
def test_hostile_text_is_inert_in_the_page(which, request):
    page = Path(request.getfixturevalue(which).local_report)
    hosts, console, document = open_in_chromium(page.as_uri())
    assert "alert(1)" in document
    assert HOST not in hosts
    assert f'title="{MARK}"' not in document.partition("<body")[0]
    assert live_attributes(document) == []
    assert console == []


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.parametrize("which", ["released", "failed"])
def test_hostile_text_is_inert_in_the_notebook(which, request):
    page = Path(request.getfixturevalue(which).local_report)
    notebook = nbformat.read(page.with_suffix(".ipynb"), 4)
    shown = [c.source for c in notebook.cells if c.cell_type == "markdown"]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            shown += [output.get("data", {}).get("text/markdown", "")]
            assert not {"text/html", "application/javascript"} & output.get("data", {}).keys()
    assert sum(HOST in text for text in shown) > (4 if which == "released" else 0)
    assert [found[0] for text in shown if (found := LIVE.search(text))] == []


@pytest.mark.services
@pytest.mark.slow
def test_hostile_text_gets_into_no_key_tag_or_metric(released, failed, s3, settings, reset_mlflow):
    for key in keys(s3, BUCKET):
        assert re.fullmatch(r"[A-Za-z0-9._/-]+", key), key
        stored = s3.head_object(Bucket=BUCKET, Key=key)
        assert MARK not in str(stored["Metadata"])
    client = mlflow.MlflowClient(settings.tracking_uri.get_secret_value())
    version = client.get_model_version_by_alias("test-model", "staging")
    run = client.get_run(released.run_id)
    assert MARK not in str(version.tags) + version.source
    assert not re.search(r"<(script|img)|https?://", version.description)
    assert MARK not in str(run.data.metrics) + str(run.info.run_name)
    # As text, and whole.
    assert EVERYTHING in eval(run.data.params["release.model_kwargs"])["note"]
    manifest = Bucket(s3, BUCKET).read_json(f"{PREFIX}/{released.version}/manifest.json")
    assert manifest["parameters"]["model_kwargs"]["note"] == EVERYTHING


@pytest.mark.services
@pytest.mark.slow
def test_hostile_release_verifies_and_opens(released, settings, reset_mlflow):
    folder = released.s3_uri.removesuffix("/model.onnx")
    findings = verify_release(Release.at(connect(settings), folder))
    assert [finding for finding in findings if not finding.holds] == []
    assert load_model("models:/test-model@staging", settings=settings).get_inputs()


TRICKS = [
    *("../up", "a/../b", "a//b", "./a", "a/.", "/a", "a/", "a\\b", "%2e%2e/a", "a\0b", "a\nb"),
    *("a b", "<b>", "a?b", "a#b", "a*", "\u0430dmin", "a\u200bb", "\uff0e\uff0e/a", "a" * 600),
    *("a|b", "$(id)", "{{7*7}}", "-a", ".a"),
]


@pytest.mark.parametrize("name", ["name", "bucket", "prefix", "alias", "run_id"])
def test_names_that_are_more_than_names_are_refused(name):
    for trick in TRICKS:
        with pytest.raises(ParameterError, match=name):
            assert check_parameters({name: trick}) == trick


# What is downloaded stays where it belongs


def put_release(s3, bucket: str, model: bytes, **changes: object) -> str:
    """A release folder, unsigned and unregistered, whose manifest says what it is told to."""
    Bucket(s3, bucket).upload_bytes(model, f"{FOLDER}/model.onnx")
    entry = {
        "key": f"{FOLDER}/model.onnx",
        "size": len(model),
        "sha256": hashlib.sha256(model).hexdigest(),
    }
    other = {**entry, **changes}
    manifest = {
        "verdict": "pass",
        "objects": [entry] if other == entry else [entry, other],
        "mlflow": {"model_name": "m", "model_version": "1"},
    }
    text = json.dumps(manifest).encode()
    Bucket(s3, bucket).upload_bytes(text, f"{FOLDER}/manifest.json")
    return format_uri(bucket, FOLDER)


@pytest.fixture
def reader(embedded_settings, tmp_path):
    """Settings of somebody who has the store alone, at home in an empty folder."""
    return embedded_settings.model_copy(update={"home": tmp_path / "a" / "home"})


def below(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.services
@pytest.mark.parametrize(
    "key",
    [
        f"{FOLDER}/../../../../model.onnx.data",
        f"{FOLDER}/model.onnx.data/../../../up",
        f"{FOLDER}/./model.onnx.data",
        f"{FOLDER}//model.onnx.data",
        f"{FOLDER}/%2e%2e/model.onnx.data",
        f"{FOLDER}/model.onnx\0.data",
        f"{FOLDER}/model.onnx\\..\\..\\up",
        f"{FOLDER}/\u2024\u2024/model.onnx.data",
        f"{PREFIX}/v20261120_143001/model.onnx.data",
        "/etc/model.onnx.data",
        "model.onnx.data",
        "",
    ],
)
def test_manifest_that_leads_out_of_its_folder_is_refused(s3, bucket, reader, tmp_path, key):
    uri = put_release(s3, bucket.name, b"model", key=key)
    for verify in (True, False):
        with pytest.raises((VerificationError, InvalidModelError)):
            load_model(uri, settings=reader, verify=verify)
    assert all(path.parts[:2] == ("a", "home") for path in below(tmp_path))


def with_external_data(location: str) -> bytes:
    """A model whose weights lie at ``location``."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    graph = helper.make_graph([node], "g", tensors[:1], tensors[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return model.SerializeToString()


@pytest.fixture
def outside(tmp_path):
    """A file outside that hangs whoever reads it."""
    path = tmp_path / "secret.bin"
    os.mkfifo(path)
    return path


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["up", "absolute", "link", "folder link"])
def test_model_with_weights_outside_is_refused_before_they_are_read(tmp_path, outside, kind):
    folder = tmp_path / "model"
    folder.mkdir()
    location = {"up": "../secret.bin", "absolute": str(outside)}.get(kind, "w.bin")
    if kind == "link":
        (folder / "w.bin").symlink_to(outside)
    if kind == "folder link":
        (folder / "inner").symlink_to(tmp_path)
        location = "inner/secret.bin"
    (folder / "model.onnx").write_bytes(with_external_data(location))
    with pytest.raises(InvalidModelError):
        validate_model(folder / "model.onnx")


@pytest.mark.services
@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["up", "absolute"])
def test_downloaded_model_with_weights_outside_is_not_opened(
    s3, bucket, reader, tmp_path, outside, kind
):
    location = str(outside) if kind == "absolute" else "../../../../secret.bin"
    uri = put_release(s3, bucket.name, with_external_data(location))
    with pytest.raises(HeimdallError):
        load_model(uri, settings=reader)


def archive(path: Path, source: Path) -> Path:
    """A copy of an archive with members that lie outside of it."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        for name in ("../up.npy", "/tmp/heimdall-up.npy", "archive/../../up.pkl"):
            new.writestr(name, b"x")
    return path


def test_members_that_lead_out_of_an_archive_are_written_nowhere(small, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    data = archive(inner / "eval.npz", small.eval_data)
    checkpoint = archive(inner / "model.pt", small.checkpoint)
    before = below(tmp_path)
    signature = Signature((SIGNAL,), ())
    for error, load in (
        (DataError, lambda: load_evaluation_data(data, signature)),
        (CheckpointError, lambda: load_checkpoint(checkpoint, model=small.model)),
    ):
        # Whether it is refused is not the point here.
        with contextlib.suppress(error):
            load()
    assert below(tmp_path) == before
    assert not Path("/tmp/heimdall-up.npy").exists()


# Certificates


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[Path, Path]:
    """Those of a server that nobody vouches for."""
    return make_server_certificate(tmp_path_factory.mktemp("certificate"))


@contextlib.contextmanager
def behind_tls(address: str, certificate: tuple[Path, Path]) -> Iterator[str]:
    """The https address of a forwarder in front of a service."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    target = (urlsplit(address).hostname, urlsplit(address).port)

    class Forward(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                inside = context.wrap_socket(self.request, server_side=True)
            except OSError:
                return  # The client did not accept the certificate.
            with inside, socket.create_connection(target) as outside:
                other = {inside: outside, outside: inside}
                while True:
                    waiting = [inside] if inside.pending() else select.select(other, [], [], 20)[0]
                    for end in waiting:
                        if not (data := end.recv(1 << 16)):
                            return
                        other[end].sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Forward) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"https://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.services
def test_store_with_an_unknown_certificate_is_refused(
    embedded_settings, bucket, certificate, monkeypatch
):
    with behind_tls(embedded_settings.s3_endpoint_url, certificate) as address:
        settings = embedded_settings.model_copy(
            update={"s3_endpoint_url": address, "is_embedded": False}
        )
        with pytest.raises(StoreError, match=r"certificate was not accepted; .* AWS_CA_BUNDLE"):
            Bucket(make_client(settings), bucket.name).list_keys("")
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate[0]))
        assert Bucket(make_client(settings), bucket.name).list_keys("") == ()


@pytest.mark.services
@pytest.mark.parametrize(
    "variable",
    [
        pytest.param("REQUESTS_CA_BUNDLE", marks=pytest.mark.thorough),
        "MLFLOW_TRACKING_SERVER_CERT_PATH",
    ],
)
def test_mlflow_with_an_unknown_certificate_is_refused(
    mlflow_server, certificate, monkeypatch, reset_mlflow, variable
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with behind_tls(mlflow_server, certificate) as address:
        with pytest.raises(RegistryError, match=r"certificate was not accepted; .*_CERT_PATH"):
            assert MLflowTracker(address).experiment_id
        monkeypatch.setenv(variable, str(certificate[0]))
        assert MLflowTracker(address).experiment_id


@pytest.mark.parametrize("variable", ["MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_S3_IGNORE_TLS"])
def test_certificates_that_nobody_checks_are_said_aloud(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with capture_logs() as logs:
        MLflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}")
    said = [entry for entry in logs if entry["event"] == "certificates are not checked"]
    assert [entry["variable"] for entry in said] == [variable]


# Whose word counts


@pytest.mark.services
@pytest.mark.slow
def test_version_without_a_release_is_not_opened_where_a_signature_is_asked_for(
    released, settings, tmp_path, reset_mlflow
):
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    (tmp_path / "release-key.pub").write_bytes(pem)
    folder = released.s3_uri.removesuffix("/model.onnx")
    sha256 = next(o["sha256"] for o in _objects(settings, folder))
    version = connect(settings).tracker.register_model("bare", folder, tags={"sha256": sha256})
    asking = settings.model_copy(update={"public_key": tmp_path / "release-key.pub"})
    with pytest.raises(VerificationError):
        load_model(f"models:/bare/{version}", settings=asking)


def _objects(settings, folder: str) -> list[dict]:
    bucket, key = parse_uri(folder)
    manifest = Bucket(make_client(settings), bucket).read_json(f"{key}/manifest.json")
    return [o for o in manifest["objects"] if o["key"].endswith("/model.onnx")]


@pytest.mark.parametrize(
    "values", [{"checkpoint": "\udcff.pt"}, {"model_kwargs": '{"note": "\\ud800"}'}]
)
def test_text_that_no_file_can_hold_is_refused(values):
    with pytest.raises(ParameterError):
        check_parameters(values)
