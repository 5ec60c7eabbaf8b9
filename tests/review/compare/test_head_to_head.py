"""A candidate beside the version that holds the alias."""

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


def test_holder_that_can_t_be_run_is_noted_and_holds_nobody_back(whole, frozen):
    found = compare_models(whole, frozen, None, SmallNet.signature, Limits(), version="7")
    assert (found.ratios, found.worse) == ((), ())
    assert found.notes[0].startswith("version 7 does not take the candidate's inputs: ")


def test_candidate_that_can_t_be_run_is_an_error(whole, frozen):
    with pytest.raises(EvidenceError):
        compare_models(frozen, whole, None, SmallNet.signature, Limits(), version="7")
