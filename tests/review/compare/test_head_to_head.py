"""A candidate beside the version that holds the alias."""

from dataclasses import replace

import onnx
import pytest
from models import SmallNet

from heimdall_onnx.common.errors import EvidenceError
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.review.compare.gates import Limits
from heimdall_onnx.review.compare.head_to_head import compare_models


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return export_model(SmallNet(), tmp_path_factory.mktemp("whole") / "model.onnx", opset=14).path


@pytest.fixture(scope="module")
def frozen(whole, tmp_path_factory):
    """The same with an axis that fits none of the inputs."""
    model = onnx.load(whole)
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 5
    onnx.save(model, path := tmp_path_factory.mktemp("frozen") / "model.onnx")
    return path


def compare(candidate, holder, takes=SmallNet.signature):
    signature, limits = SmallNet.signature, Limits()
    return compare_models(candidate, holder, None, signature, limits, version="7", takes=takes)


@pytest.mark.parametrize(("axis", "length"), [(0, 1), (2, 5)])
def test_holder_of_other_inputs_is_noted_and_holds_nobody_back(whole, frozen, axis, length):
    (spec,) = SmallNet.signature.inputs
    shape = (*spec.shape[:axis], length, *spec.shape[axis + 1 :])
    takes = replace(SmallNet.signature, inputs=(replace(spec, shape=shape),))
    found = compare(whole, frozen, takes)
    assert (found.ratios, found.worse) == ((), ())
    assert found.notes[0].startswith("version 7 does not take the candidate's inputs: ")


def test_model_that_can_t_be_run_is_an_error(whole, frozen, tmp_path):
    with pytest.raises(EvidenceError):
        compare(frozen, whole)
    # Nor does a holder make room by not being what its signature says, or not to be opened.
    with pytest.raises(EvidenceError):
        compare(whole, frozen)
    (broken := tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(EvidenceError, match="can't load"):
        compare(whole, broken)
