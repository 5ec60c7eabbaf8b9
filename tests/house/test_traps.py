"""Faults of models with several inputs, masks and ids: each is caught, a faultless one passes.

What one exporter gets wrong the other may get right; both are tried where it makes a difference.
"""

import re

import numpy as np
import pytest
import torch
from faults import (
    SET,
    BakedIdNet,
    BearingNet,
    BranchNet,
    CrowdNet,
    HalfMaskedNet,
    InvertedMaskNet,
    LoopNet,
    NeighbourNet,
    PaddedMeanNet,
    SafeBearingNet,
    SetNet,
    TableNet,
    renamed,
)

from heimdall_onnx.common.errors import DataError, ExportError
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.onnx.export import export_model

THOROUGH = pytest.mark.thorough


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compared(model, folder, opset):
    """The report on a model's export, as the pipeline makes it without a file of data."""
    signature = model.signature
    path = export_model(model, folder / "model.onnx", opset=opset).path
    inputs = Examples(signature, model).valid(24)
    data = EvaluationData(inputs, None, {}, "synthetic inputs", None, {})
    return compare_outputs(model, open_session(path, threads=1, spinning=False), data, signature)


def failed(report):
    return {gate.name: gate.detail for gate in report.gates() if not gate.passed}


@pytest.mark.parametrize(
    ("model_class", "opset"),
    [
        (SetNet, 14),
        (SetNet, 20),
        (SafeBearingNet, 14),
        pytest.param(SafeBearingNet, 20, marks=THOROUGH),
    ],
)
def test_model_without_a_fault_passes_every_gate(tmp_path, model_class, opset):
    report = compared(model_class(), tmp_path, opset)
    assert failed(report) == {}
    names = [gate.name for gate in report.gates()]
    assert names[-3:] == ["finite outputs", "masked elements", "order along receivers"]
    kinds = {cell.kind for cell in report.cells}
    assert {"all masked but one", "permuted receivers", "receivers = 1"} <= kinds
    # Every mask and axis on both sides, or one of two equal faults would go unseen.
    assert [check.side for check in report.masks] == ["PyTorch", "ONNX"]
    assert [check.side for check in report.orders] == ["PyTorch", "ONNX"]
    assert all(check.samples > 8 for check in report.masks)
    # Rounding at most.
    assert all(check.padding < 0.5 for check in report.masks)


REFUSED = [
    # Ids read as a Python number: TorchScript bakes it in.
    (BakedIdNet, 14, r"reads its inputs as numbers: line \d+, in encode: .*\[0, 0\]\.item\(\)\]`"),
    # A branch on a length; torch.export takes one way and narrows the range of lengths silently.
    (BranchNet, 14, r"differs grossly.*at receivers = 1.*exported with receivers = 8.*boolean"),
    pytest.param(
        *(BranchNet, 20, r"differs grossly.*at receivers = 1.*exported with receivers = 8"),
        marks=THOROUGH,
    ),
    # An axis frozen by a loop, and by a number made of the length.
    pytest.param(
        *(LoopNet, 14, r"does not run at receivers = 1.*exported with receivers = 8"),
        marks=THOROUGH,
    ),
    (LoopNet, 20, r"axis 1 \(receivers\) of features is frozen at 8: .*a loop"),
    (TableNet, 14, r"at receivers = 1 .*exported with receivers = 8.*integer"),
    (NeighbourNet, 14, r"does not run at batch 1.*exported with batch = 2"),
]


@pytest.mark.parametrize(("model_class", "opset", "reason"), REFUSED)
def test_fault_is_found_at_the_export_and_named(tmp_path, model_class, opset, reason):
    with pytest.raises(ExportError) as caught:
        export_model(model_class(), tmp_path / "model.onnx", opset=opset)
    assert re.search(reason, str(caught.value), re.DOTALL), str(caught.value)
    assert list(tmp_path.iterdir()) == []


GATED = [
    # torch.export reads the number at run time: the first row decides for all.
    (BakedIdNet, 20, "batch independence", "beside"),
    pytest.param(NeighbourNet, 20, "batch independence", "beside", marks=THOROUGH),
    (CrowdNet, 14, "batch independence", "masked"),
    (BearingNet, 14, "NaN and Inf in the same places", "on zeros"),
    (BearingNet, 20, "elements on adversarial inputs", "on silent feature"),
    (TableNet, 20, "order along receivers", "PyTorch"),
]


@pytest.mark.parametrize(("model_class", "opset", "gate", "detail"), GATED)
def test_fault_fails_its_gate(tmp_path, model_class, opset, gate, detail):
    found = failed(compared(model_class(), tmp_path, opset))
    assert gate in found
    assert detail in found[gate]


@pytest.mark.parametrize(
    ("model_class", "words", "opset"),
    [
        (InvertedMaskNet, "its polarity is inverted", 14),
        pytest.param(InvertedMaskNet, "its polarity is inverted", 20, marks=THOROUGH),
        (HalfMaskedNet, "position moves by", 14),
        (PaddedMeanNet, "with the number of elements that mask hides: padding is counted", 14),
        pytest.param(
            PaddedMeanNet,
            "with the number of elements that mask hides: padding is counted",
            20,
            marks=THOROUGH,
        ),
    ],
)
def test_mask_that_hides_something_else_fails_for_both_models_alone(
    tmp_path, model_class, words, opset
):
    found = failed(compared(model_class(), tmp_path, opset))
    # The models agree on all else: parity by itself would have released it.
    assert set(found) == {"masked elements"}
    detail = found["masked elements"]
    assert detail.count(words) == 2
    assert "PyTorch: " in detail
    assert "ONNX: " in detail


def test_mask_that_hides_everything_fails(tmp_path):
    class Blind(SetNet):
        def pool(self, values, mask):
            return super().pool(values, torch.ones_like(mask))

    found = failed(compared(Blind(), tmp_path, 14))
    assert found["masked elements"].count("no output depends on the elements that mask does") == 2


@pytest.mark.parametrize(
    ("name", "opset"),
    [
        ("stations.weight", 14),
        ("stations.weight", 20),
        pytest.param("linear", 20, marks=THOROUGH),
    ],
)
def test_input_called_as_something_in_the_graph_keeps_its_name_and_meaning(tmp_path, name, opset):
    model = renamed({"features": name})
    path = export_model(model, tmp_path / "model.onnx", opset=opset).path
    session = open_session(path, threads=1)
    assert [i.name for i in session.get_inputs()] == [name, "stations", "mask"]
    inputs = Examples(model.signature, model).valid(5, seed=9)
    with torch.inference_mode():
        expected = model(*map(torch.from_numpy, inputs.values()))
    for value, reference in zip(session.run(None, inputs), expected, strict=True):
        np.testing.assert_allclose(value, reference, atol=1e-5)


def test_input_called_as_an_output_is_refused(tmp_path):
    # TorchScript would call it position.1 without a word.
    with pytest.raises(DataError, match="2 inputs and outputs are called 'position'"):
        export_model(renamed({"features": "position"}), tmp_path / "model.onnx")


def test_nan_in_both_models_fails_where_valid_inputs_are_declared(tmp_path):
    class Logarithm(SetNet):
        def answer(self, pooled):
            position, spread = super().answer(pooled)
            return torch.log(position), spread

    found = failed(compared(Logarithm(), tmp_path, 14))
    assert "NaN and Inf in the same places" not in found
    assert "are NaN on evaluation data" in found["finite outputs"]


def test_signature_is_the_same_for_all_but_the_renamed():
    assert all(c.signature is SET for c in (SetNet, InvertedMaskNet, BranchNet, BakedIdNet))
