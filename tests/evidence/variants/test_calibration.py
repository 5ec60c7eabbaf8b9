import numpy as np
import pytest

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.variants.calibration import split_calibration


def data_of(rows, positions=None, source="a.npz"):
    inputs = {"signal": np.asarray(rows, np.float32)[:, None]}
    return EvaluationData(inputs, positions, {}, source, "0" * 64, {})


def values(inputs):
    return set(inputs["signal"].ravel().tolist())


def test_no_sample_is_on_both_sides():
    split = split_calibration(data_of(range(100)), samples=30, judged=1000)
    calibrated, judged = values(split.inputs), values(split.evaluation.inputs)
    assert len(calibrated) == split.samples == 30
    assert judged == set(range(100)) - calibrated
    assert split.left_out == 0


def test_a_repeated_sample_is_not_on_both_sides_either():
    split = split_calibration(data_of([n // 2 for n in range(40)]), samples=10, judged=1000)
    assert not values(split.inputs) & values(split.evaluation.inputs)
    assert split.left_out > 0
    assert split.evaluation.count + split.left_out + split.samples == 40


def test_labels_stay_with_their_samples():
    positions = np.stack([np.arange(50.0), np.arange(50.0)], axis=1)
    split = split_calibration(data_of(range(50), positions), samples=10, judged=20)
    assert split.evaluation.count == 20
    assert (split.evaluation.positions[:, 0] == split.evaluation.inputs["signal"][:, 0]).all()


def test_the_same_seed_draws_the_same_and_another_does_not():
    first, again, other = (
        split_calibration(data_of(range(100)), samples=10, judged=100, seed=seed)
        for seed in (1, 1, 2)
    )
    assert (first.rows, first.sha256) == (again.rows, again.sha256)
    assert first.rows != other.rows
    assert first.sha256 != other.sha256


def test_at_most_half_of_the_data_calibrates():
    split = split_calibration(data_of(range(9)), samples=64, judged=64)
    assert (split.samples, split.evaluation.count) == (4, 5)


def test_a_file_of_its_own_leaves_all_other_samples_to_judge():
    calibration = data_of([3, 4, 200, 201], source="b.npz")
    split = split_calibration(data_of(range(10)), samples=64, judged=64, calibration=calibration)
    assert split.source == "b.npz"
    assert values(split.inputs) == {3, 4, 200, 201}
    assert values(split.evaluation.inputs) == set(range(10)) - {3, 4}
    assert split.left_out == 2


def test_nothing_left_to_judge_with_is_an_error():
    same = data_of(range(5))
    with pytest.raises(DataError, match=r"every sample of a\.npz is among the calibration"):
        split_calibration(same, samples=64, judged=64, calibration=same)
    with pytest.raises(DataError, match="expected at least two"):
        split_calibration(data_of([1]), samples=64, judged=64)
