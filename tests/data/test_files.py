import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data.evaluation import first_rows, load_evaluation_data
from heimdall_onnx.model.signature import Signature, TensorSpec

X = np.linspace(-2, 2, 12, dtype=np.float32).reshape(4, 3)
IDS = np.arange(8).reshape(4, 2)


def signature(**types):
    widths = {"x": 3, "ids": 2, "keep": 2}
    specs = tuple(TensorSpec(n, t, ("batch", widths[n])) for n, t in types.items())
    return Signature(inputs=specs, outputs=(TensorSpec("y", "float32", ("batch",)),))


def saved(path, array, name="x"):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".safetensors":
        save_file({name: array}, path)
    elif path.suffix == ".pt":
        torch.save({name: torch.from_numpy(array)}, path)
    elif path.suffix == ".zarr":
        zarr = pytest.importorskip("zarr")
        group = zarr.open_group(str(path), mode="w", zarr_format=3)
        group.create_array(name, shape=array.shape, dtype=array.dtype)[:] = array
    else:
        np.savez(path, **{name: array})
    return path


@pytest.mark.parametrize("ending", ["npz", "npy", "safetensors", "pt", "zarr"])
def test_the_same_inputs_are_read_from_any_file(tmp_path, ending):
    data = load_evaluation_data(saved(tmp_path / f"eval.{ending}", X), signature(x="float32"))
    np.testing.assert_array_equal(data.inputs["x"], X, strict=True)
    assert len(data.sha256) == 64
    assert data.provenance == "not recorded"


def test_a_tensor_alone_and_an_array_without_a_name_are_the_only_input(tmp_path):
    torch.save(torch.from_numpy(X).bfloat16(), tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", X)
    for file, within in (("a.pt", 2**-7), ("b.npz", 0)):
        found = load_evaluation_data(tmp_path / file, signature(x="float32")).inputs["x"]
        np.testing.assert_allclose(found, X, rtol=within)
    with pytest.raises(DataError, match="no array 'ids'"):
        load_evaluation_data(tmp_path / "b.npz", signature(x="float32", ids="int64"))


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (X.astype("float64"), "float32"),
        (X.astype(">f4"), "float32"),
        (X.astype("float16"), "float32"),
        (X.astype(ml_dtypes.bfloat16), "float32"),
        (X, "float64"),
        (X, "float16"),
    ],
)
def test_floats_become_those_of_the_model_and_the_report_says_so(tmp_path, given, want):
    data = load_evaluation_data(saved(tmp_path / "a.npz", given), signature(x=want))
    assert data.inputs["x"].dtype == want
    np.testing.assert_allclose(data.inputs["x"], X, rtol=2**-7)
    if given.dtype.newbyteorder("=") != np.dtype(want):
        assert data.provenance.startswith("not recorded; x converted from ")
        assert data.provenance.endswith(f"to {want}")


@pytest.mark.parametrize("given", ["int32", "uint8", "uint64", ">i8"])
def test_integers_become_those_of_the_model(tmp_path, given):
    file = saved(tmp_path / "a.npz", IDS.astype(given), "ids")
    np.testing.assert_array_equal(
        load_evaluation_data(file, signature(ids="int64")).inputs["ids"], IDS, strict=True
    )


def test_a_mask_of_ones_and_zeros_is_a_mask(tmp_path):
    file = saved(tmp_path / "a.npz", IDS % 2, "keep")
    found = load_evaluation_data(file, signature(keep="bool")).inputs["keep"]
    np.testing.assert_array_equal(found, IDS % 2 == 1, strict=True)


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (X.astype("uint8"), "float32"),  # in units of 1/255, or not
        (X, "int64"),
        (X.astype("complex64"), "float32"),
        ((X * 1e10).astype("int64"), "int32"),
        (IDS.repeat(2)[:12].reshape(4, 3), "bool"),
    ],
)
def test_what_would_lose_its_meaning_is_not_converted(tmp_path, given, want):
    with pytest.raises(DataError, match=f"x has dtype {given.dtype}, expected {want}"):
        load_evaluation_data(saved(tmp_path / "a.npz", given), signature(x=want))


def test_floats_that_the_models_type_can_not_hold_are_refused(tmp_path):
    file = saved(tmp_path / "a.npz", X.astype("float64") * 1e300)
    with pytest.raises(DataError, match="x has NaN or Inf in 4 samples, first in sample 0"):
        load_evaluation_data(file, signature(x="float32"))


def test_what_nobody_uses_is_named_with_the_nearest_name_unless_it_is_meant(tmp_path):
    np.savez(tmp_path / "a.npz", x=X, position=np.zeros((4, 2)), label=np.arange(4), labels=X)
    with pytest.raises(DataError) as refused:
        load_evaluation_data(tmp_path / "a.npz", signature(x="float32"))
    assert "nothing uses label: did you mean labels?" in str(refused.value)
    assert "nothing uses position: did you mean positions?" in str(refused.value)
    meant = ("label", "labels", "position")
    found = load_evaluation_data(tmp_path / "a.npz", signature(x="float32"), ignore=meant)
    assert (found.truth, found.groups, found.weights) == ({}, None, None)
    assert [*first_rows(tmp_path / "a.npz", meant)] == ["x"]
    with pytest.raises(DataError, match="there is no array lable to be ignored"):
        load_evaluation_data(tmp_path / "a.npz", signature(x="float32"), ignore=(*meant, "lable"))


def test_labels_weights_and_groups_are_read_beside_the_inputs(tmp_path):
    beside = {
        "labels": np.arange(8).reshape(4, 2),
        "weights": [1.0, 2, 1, 1],
        "groups": list("aabb"),
    }
    np.savez(tmp_path / "a.npz", x=X, **beside)
    found = load_evaluation_data(tmp_path / "a.npz", signature(x="float32"))
    assert found.truth.keys() == {"labels"}
    last = found.taken(np.array([1, 3]))
    np.testing.assert_array_equal(last.labels, [[2, 3], [6, 7]])
    assert (list(last.weights), list(last.groups)) == ([2.0, 1.0], ["a", "b"])
    (_, _, truth), _ = found.batches(2)
    np.testing.assert_array_equal(truth["labels"], [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("labels", np.arange(3), "one entry for each of 4 samples, found the shape \\(3,\\)"),
        ("labels", np.array(list("abcd")), "`labels` must be numbers"),
        ("labels", np.array([0, 1, np.nan, 2]), "leave samples out that have no label"),
        ("weights", np.array([1.0, 0, 1, 1]), "weights must be positive"),
        ("groups", np.zeros((4, 1), int), "one entry for each of 4 samples"),
    ],
)
def test_labels_that_fit_no_sample_are_refused(tmp_path, name, array, problem):
    np.savez(tmp_path / "a.npz", **{"x": X, name: array})
    with pytest.raises(DataError, match=problem):
        load_evaluation_data(tmp_path / "a.npz", signature(x="float32"))


@pytest.mark.parametrize("kind", ["int64", ">f8", "float32"])
def test_positions_may_be_of_any_number_and_have_an_axis_of_one(tmp_path, kind):
    degrees = np.tile([50, 8], (4, 1)).astype(kind)
    for positions in (degrees, degrees[:, None]):
        np.savez(tmp_path / "a.npz", x=X, positions=positions)
        found = load_evaluation_data(tmp_path / "a.npz", signature(x="float32")).positions
        np.testing.assert_array_equal(found, np.tile([50.0, 8.0], (4, 1)), strict=True)


@pytest.mark.parametrize("ending", ["csv", "h5", "parquet", "json", "pkl", "pt", "npy"])
def test_what_is_no_such_file_is_refused_with_what_is_expected(tmp_path, ending):
    (tmp_path / f"a.{ending}").write_bytes(b"neither of these")
    with pytest.raises(DataError, match=r"can't be read: .*Expected an \.npz of plain arrays"):
        load_evaluation_data(tmp_path / f"a.{ending}", signature(x="float32"))


def test_what_is_no_tensor_in_a_file_of_tensors_is_named(tmp_path):
    for further, said in (({1: torch.zeros(4)}, "nothing uses 1"), ({"b": [1]}, "'b' .* list")):
        torch.save({"x": torch.from_numpy(X), **further}, tmp_path / "a.pt")
        with pytest.raises(DataError, match=said):
            load_evaluation_data(tmp_path / "a.pt", signature(x="float32"))


def test_zarr_that_holds_next_to_nothing_does_not_fill_the_memory(tmp_path):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=3)
    group.create_array("x", shape=(10**12, 3), chunks=(1, 3), dtype="float32")
    with pytest.raises(DataError, match=r"would unpack to 12,000,000,000,000"):
        load_evaluation_data(tmp_path / "a.zarr", signature(x="float32"))
