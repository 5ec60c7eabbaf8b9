"""The demo: its files, its record, its reuse."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from heimdall_onnx.common.errors import DataError, ParameterError
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.parity.ground import middle_of
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE
from heimdall_onnx.localization.simulate import RECEIVERS
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.training import demo as module
from heimdall_onnx.training.demo import make_demo

SECONDS = 2.0


@pytest.fixture(scope="module")
def shares():
    return []


@pytest.fixture(scope="module")
def demo(tmp_path_factory, shares):
    folder = tmp_path_factory.mktemp("demo") / "new"
    return make_demo(
        folder, seconds=SECONDS, progress=lambda share, what: shares.append((share, what))
    )


def test_the_checkpoint_is_in_lightning_s_layout_and_safe_to_read(demo):
    content = torch.load(demo.checkpoint, weights_only=True)
    assert content["hyper_parameters"].keys() == {
        *("backbone_size", "uncertainty_max", "centroid", "scale_m")
    }
    assert all(name.startswith("model.") for name in content["state_dict"])
    assert {"epoch", "pytorch-lightning_version"} <= content.keys()
    loaded = load_checkpoint(demo.checkpoint, model=demo.model)
    assert loaded.weights == "state_dict.model"
    assert b"/training" not in demo.checkpoint.read_bytes()  # nor any other path


def test_the_errors_reported_are_those_of_the_files(demo):
    data = load_evaluation_data(demo.eval_data, LOCALIZATION_SIGNATURE)
    with torch.inference_mode():
        inputs = torch.from_numpy(data.inputs["mel_spectrogram"][:])
        positions, _ = load_checkpoint(
            demo.checkpoint, model="heimdall_onnx:LocalizationNet"
        ).model(inputs)
    # Of an even number the report's sketch takes the upper of the two in the middle.
    errors = distance_m(positions.numpy(), data.positions)
    error = np.quantile(errors, 0.5, method="higher")
    assert error == pytest.approx(demo.median_error_m, rel=1e-3)
    centre = np.broadcast_to(middle_of(data.positions, data.meta), data.positions.shape)
    baseline = np.median(distance_m(centre, data.positions))
    assert baseline == pytest.approx(demo.baseline_median_error_m, rel=1e-6)


def test_the_evaluation_data_say_where_they_come_from(demo):
    data = load_evaluation_data(demo.eval_data, LOCALIZATION_SIGNATURE)
    assert 0 < data.count < 96 / 2  # of all events
    assert data.receivers == RECEIVERS
    assert data.meta["provenance"] == "simulated"
    assert data.meta["seed"] == 0
    assert data.meta["part"] == "test"
    assert data.meta["features"]["channels"] == "receivers"
    assert data.meta["centre"] != data.positions.mean(axis=0).tolist()  # the training centre


def test_progress_goes_from_0_to_1(demo, shares):
    numbers = [share for share, _ in shares]
    assert numbers[0] == 0
    assert numbers == sorted(numbers)
    assert 0.8 < numbers[-1] <= 1
    assert shares[0][1] == "simulating events"
    assert shares[-1][1] == "evaluating"


def test_an_equal_call_takes_the_demo_that_is_there_whatever_its_budget(demo):
    again = make_demo(demo.checkpoint.parent, seconds=1e6)
    assert again == replace(demo, reused=True)


def test_another_recipe_is_not_taken_for_this_one(demo):
    recipe = json.loads((demo.checkpoint.parent / "demo.json").read_bytes())["recipe"]
    assert module.existing_demo(demo.checkpoint.parent, recipe) is not None
    for change in ({"seed": 1}, {"version": 0}):
        assert module.existing_demo(demo.checkpoint.parent, recipe | change) is None


@pytest.mark.parametrize("name", ["demo.ckpt", "demo-eval.npz", "demo.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_an_incomplete_demo_is_not_reused(demo, tmp_path, name, damage):
    for path in demo.checkpoint.parent.iterdir():
        (tmp_path / path.name).hardlink_to(path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if damage == "cut off":
        (tmp_path / name).write_bytes(content[:-1])
    recipe = json.loads((demo.checkpoint.parent / "demo.json").read_bytes())["recipe"]
    assert module.existing_demo(tmp_path, recipe) is None


def test_its_folder_holds_nothing_else_and_no_service_was_needed(demo):
    names = {path.name for path in demo.checkpoint.parent.iterdir()}
    assert names == {"demo.ckpt", "demo-eval.npz", "demo.json"}
    assert not Path("lightning_logs").exists()
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.mark.parametrize("bad", [{"seconds": 0}, {"seconds": math.nan}, {"seed": -1}])
def test_parameters_out_of_range_are_refused(tmp_path, bad):
    with pytest.raises(ParameterError, match=next(iter(bad))):
        make_demo(tmp_path, **bad)


def test_a_folder_that_can_t_be_written_is_an_input_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="can't be written"):
        make_demo(tmp_path / "file" / "demo", seconds=1)
