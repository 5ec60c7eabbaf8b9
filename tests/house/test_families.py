"""Models of several inputs: what they promise, and whole releases of them on real services."""

import json
from dataclasses import dataclass
from pathlib import Path

import boto3
import mlflow
import nbformat
import numpy as np
import pytest
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from families import (
    MULTI_MODAL,
    TRIANGULATION,
    MultiModalNet,
    Triangulator,
    UndeclaredMultiModalNet,
    make_triangulation_data,
)
from releases import PREFIX, Inputs, changed_notebook, smoke

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.model.signature_file import (
    read_signature_file,
    signature_path,
    write_signature_file,
)
from heimdall_onnx.release.result import ReleaseResult
from heimdall_onnx.release.runner import release_checkpoint
from heimdall_onnx.review.reproduce.run import reproduce_release
from heimdall_onnx.services.connection import Connection, connect
from heimdall_onnx.services.settings import Settings

MODELS = [Triangulator, MultiModalNet]
each_model = pytest.mark.parametrize("model_class", MODELS)


# What they promise


@each_model
def test_masked_receivers_and_their_order_are_of_no_consequence(model_class):
    model = model_class()
    signature = model.signature
    inputs = Examples(signature, model).valid(4)
    mask = inputs[signature.inputs[-1].name]
    assert mask.any()
    before = run_pytorch(model, inputs, signature)
    garbled = {
        name: np.where(mask.reshape(*mask.shape, *(1,) * (array.ndim - 2)), array[::-1], array)
        for name, array in inputs.items()
        if name != signature.inputs[-1].name
    }
    after = run_pytorch(model, {**inputs, **garbled}, signature)
    order = np.random.default_rng(0).permutation(mask.shape[1])
    moved = run_pytorch(model, {n: a[:, order] for n, a in inputs.items()}, signature)
    for spec in signature.outputs:
        np.testing.assert_allclose(after[spec.name], before[spec.name], rtol=1e-6)
        expected = before[spec.name][:, order] if "receivers" in spec.shape else before[spec.name]
        np.testing.assert_allclose(moved[spec.name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model_class", "opset"),
    [
        (Triangulator, 14),
        pytest.param(Triangulator, 20, marks=pytest.mark.thorough),
        (MultiModalNet, 14),
        pytest.param(MultiModalNet, 20, marks=pytest.mark.slow),
    ],
)
def test_export_answers_every_length_and_every_kind_of_input(model_class, opset, tmp_path):
    model = model_class()
    signature, examples = model.signature, Examples(model.signature, model)
    exported = export_model(model, tmp_path / "model.onnx", signature=signature, opset=opset)
    session = open_session(exported.path)
    assert {i.name: i.type for i in session.get_inputs()} == {
        s.name: {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}[
            s.dtype
        ]
        for s in signature.inputs
    }
    base = examples.valid(3)
    for inputs in (
        base,
        *examples.adversarial(base).values(),
        *examples.at_other_lengths(2).values(),
    ):
        expected = run_pytorch(model, inputs, signature)
        found = run_onnx(session, inputs, signature)
        for name, array in expected.items():
            assert np.isfinite(array).all()
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


def test_what_the_model_makes_itself_is_what_it_is_compared_on():
    model = MultiModalNet()
    data = load_evaluation_data(None, model.signature, model)
    ids, mask = data.inputs["receiver_ids"], data.inputs["mask"]
    assert (ids.min(), ids.max()) == (0, 11)
    assert not mask.all(axis=1).any()
    # A carrier, where the signature alone would give noise.
    assert np.abs(np.linalg.norm(data.inputs["iq"], axis=3)).mean() > 0.1


def test_ids_that_the_model_does_not_know_are_refused(tmp_path):
    model = MultiModalNet()
    inputs = Examples(model.signature, model).valid(4)
    inputs["receiver_ids"][2, 1] = 12
    np.savez(tmp_path / "eval.npz", **inputs)
    with pytest.raises(DataError, match=r"`receiver_ids` must be in \[0, 11\].*first in sample 2"):
        load_evaluation_data(tmp_path / "eval.npz", model.signature)


# Whole releases


@dataclass(frozen=True)
class Released:
    result: ReleaseResult
    settings: Settings
    bucket: str

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{PREFIX}/{self.result.version}"

    @property
    def connection(self) -> Connection:
        return connect(self.settings)

    def read(self, s3, name: str) -> dict:
        key = f"{PREFIX}/{self.result.version}/{name}"
        return json.loads(s3.get_object(Bucket=self.bucket, Key=key)["Body"].read())


@pytest.fixture(scope="module")
def release(make_settings, tmp_path_factory):
    """Release a model, and take away what only this machine has."""

    def run(name: str, inputs: Inputs, notebook: Path | None = None, **changes: object) -> Released:
        settings, bucket = make_settings(name), f"test-{name}"
        parameters = smoke(inputs, bucket, **changes)
        result = release_checkpoint(parameters, settings, notebook=notebook)
        assert result.success, result.error
        for path in inputs.checkpoint.parent.iterdir():
            path.unlink()
        return Released(result, settings, bucket)

    return run


@pytest.fixture(scope="module")
def triangulator(release, tmp_path_factory) -> Released:
    """With labelled data, variants and all figures."""
    folder = tmp_path_factory.mktemp("triangulator")
    torch.save(Triangulator().state_dict(), folder / "net.pt")
    receivers = [{"name": "A", "latitude": 50.5, "longitude": 9.0}]
    meta = json.dumps({"provenance": "simulated bearings", "receivers": receivers})
    np.savez(folder / "eval.npz", meta=meta, **make_triangulation_data(24, 6))
    inputs = Inputs(folder / "net.pt", folder / "eval.npz", "families:Triangulator")
    return release("triangulator", inputs, variants="int8-dynamic,fp32-optimized")


@pytest.fixture(scope="module")
def multi_modal(release, tmp_path_factory) -> Released:
    """On inputs of the model's own making."""
    folder = tmp_path_factory.mktemp("multi-modal")
    torch.save(MultiModalNet().state_dict(), folder / "net.pt")
    inputs = Inputs(folder / "net.pt", folder, "families:MultiModalNet")
    return release("multi-modal", inputs, changed_notebook(folder), eval_data="")


@pytest.fixture(scope="module")
def undeclared(release, tmp_path_factory) -> Released:
    """The same model where only a file declares what it takes and gives."""
    folder = tmp_path_factory.mktemp("undeclared")
    torch.save(UndeclaredMultiModalNet().state_dict(), folder / "net.pt")
    write_signature_file(MULTI_MODAL, signature_path(folder / "net.pt"))
    inputs = Inputs(folder / "net.pt", folder, "families:UndeclaredMultiModalNet")
    return release("undeclared", inputs, changed_notebook(folder), eval_data="")


# One whole release is enough for each run of the tests, and each is another kind of declaration.
EACH = [
    *(pytest.param(which, marks=pytest.mark.thorough) for which in ("triangulator", "multi_modal")),
    "undeclared",
]


def opened(released: Released, variant: str = "fp32"):
    return load_model("models:/test-model@staging", variant=variant, settings=released.settings)


@pytest.mark.services
@pytest.mark.thorough
def test_triangulator_passes_and_says_what_it_takes(triangulator, s3):
    assert all(gate["passed"] for gate in triangulator.result.gates)
    manifest = triangulator.read(s3, "manifest.json")
    declared = manifest["model"]
    assert Signature.from_dict(declared["signature"]) == TRIANGULATION
    assert declared["signature_source"] == "the model's class"
    described = triangulator.read(s3, "metadata.json")
    assert described["input_shapes"] == {
        "receiver_features": ["batch", "receivers", 6],
        "signal_mask": ["batch", "receivers"],
    }
    client = mlflow.MlflowClient(triangulator.settings.tracking_uri.get_secret_value())
    tags = client.get_model_version("test-model", triangulator.result.model_version).tags
    assert tags["input_shape"] == str(described["input_shapes"])
    assert tags["output_count"] == "2"
    bom = s3.get_object(
        Bucket=triangulator.bucket, Key=f"{PREFIX}/{triangulator.result.version}/bom.cdx.json"
    )["Body"].read()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.decode()) is None
    assert {v["status"] for v in manifest["variants"]["judged"]} <= {"passed", "failed"}


@pytest.mark.services
@pytest.mark.thorough
def test_triangulator_report_draws_every_input_and_knows_the_spread(triangulator):
    report = nbformat.read(Path(triangulator.result.local_report).with_suffix(".ipynb"), 4)
    said = {
        cell.id: " ".join(str(output.get("data", {})) for output in cell.outputs)
        for cell in report.cells
        if cell.cell_type == "code"
    }
    for text in (
        "where true, receiver_features are masked",
        "logarithm of the variance of position",
        "receivers: dynamic, tried at 1, 2, 3, 8, in any order",
    ):
        assert text in said["checkpoint"]
    assert "float32 (8, 6, 6)" in said["evaluation"]
    assert "image/png" in said["worst-inputs"]
    assert "median error" in said["variants"]
    streams = [o for c in report.cells for o in c.get("outputs", []) if o.output_type == "stream"]
    assert streams == []


@pytest.mark.services
@pytest.mark.parametrize("which", EACH)
def test_released_models_answer_as_pytorch_does(which, request):
    model = Triangulator() if which == "triangulator" else MultiModalNet()
    signature = model.signature
    examples = Examples(signature, model)
    session = opened(request.getfixturevalue(which))
    for inputs in (examples.valid(3, seed=5), *examples.at_other_lengths(2).values()):
        expected = run_pytorch(model, inputs, signature)
        found = run_onnx(session, inputs, signature)
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=2e-6, atol=1e-5, err_msg=name)


@pytest.mark.services
@pytest.mark.thorough
def test_variant_of_two_inputs_is_opened_as_it_was_measured(triangulator):
    inputs = Examples(TRIANGULATION, Triangulator()).valid(3)
    expected = run_onnx(opened(triangulator), inputs, TRIANGULATION)
    found = run_onnx(opened(triangulator, "fp32-optimized"), inputs, TRIANGULATION)
    np.testing.assert_allclose(found["position"], expected["position"], rtol=1e-6)


@pytest.mark.services
@pytest.mark.thorough
def test_mlflow_takes_five_inputs_by_name(multi_modal):
    multi_modal.settings.apply()
    boto3.setup_default_session()
    mlflow.set_tracking_uri(multi_modal.settings.tracking_uri.get_secret_value())
    try:
        model = mlflow.pyfunc.load_model("models:/test-model@staging")
        inputs = Examples(MULTI_MODAL, MultiModalNet()).valid(2)
        found = model.predict(inputs)
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    expected = run_pytorch(MultiModalNet(), inputs, MULTI_MODAL)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-6, atol=1e-5)


@pytest.mark.services
@pytest.mark.parametrize("which", EACH)
def test_releases_verify(which, request):
    released = request.getfixturevalue(which)
    findings = verify_release(Release.at(released.connection, released.uri))
    assert [f for f in findings if not f.holds] == []


@pytest.mark.services
def test_signature_file_is_kept_and_named_in_everything(undeclared, s3, tmp_path):
    manifest = undeclared.read(s3, "manifest.json")
    kept = next(e for e in manifest["content"] if e["role"] == "signature")
    assert kept["name"] == "net.signature.yaml"
    path = tmp_path / "kept.signature.yaml"
    s3.download_file(undeclared.bucket, kept["key"], str(path))
    found = read_signature_file(path)
    assert (found.sha256, found.signature) == (kept["sha256"], MULTI_MODAL)
    assert manifest["model"]["signature_source"] == "the file net.signature.yaml"
    components = undeclared.read(s3, "bom.cdx.json")["components"]
    (component,) = (c for c in components if c["bom-ref"] == "signature")
    assert component["hashes"] == [{"alg": "SHA-256", "content": kept["sha256"]}]


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.parametrize("which", ["triangulator", "undeclared"])
@pytest.mark.thorough
def test_releases_reproduce_without_what_the_releasing_machine_had(which, request):
    released = request.getfixturevalue(which)
    found = reproduce_release(Release.at(released.connection, released.uri))
    assert found.failures == ()
    assert found.exact
    assert found.model.identical


@pytest.mark.services
def test_changed_signature_file_is_found(undeclared, s3):
    manifest = undeclared.read(s3, "manifest.json")
    kept = next(e for e in manifest["content"] if e["role"] == "signature")
    before = s3.get_object(Bucket=undeclared.bucket, Key=kept["key"])["Body"].read()
    try:
        s3.put_object(Bucket=undeclared.bucket, Key=kept["key"], Body=before + b"# more\n")
        findings = verify_release(Release.at(undeclared.connection, undeclared.uri))
        assert [f.what for f in findings if not f.holds] == [kept["key"]]
    finally:
        s3.put_object(Bucket=undeclared.bucket, Key=kept["key"], Body=before)
