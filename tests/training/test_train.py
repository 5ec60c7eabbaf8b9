"""Training: that it learns, can be killed at any moment, and leaves what a release takes."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from trained import (
    HERE,
    MIDDLE,
    MOMENTS,
    Framed,
    Plain,
    be_killed,
    options,
    write_data,
)

from heimdall_onnx.common.errors import CheckpointError, DataError, EvidenceError, ParameterError
from heimdall_onnx.data.dataset.dataset import open_dataset
from heimdall_onnx.data.evaluation import load_evaluation_data
from heimdall_onnx.evidence.geodesy import distance_m
from heimdall_onnx.evidence.parity.compare import compare_outputs
from heimdall_onnx.localization.network import LocalizationNet
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.training import run as training_run
from heimdall_onnx.training import train as training
from heimdall_onnx.training.module import (
    EpochOrder,
    Objective,
    parameter_groups,
    rate_factor,
    seed_of,
)
from heimdall_onnx.training.result import read_result
from heimdall_onnx.training.train import train

SAME = ("epoch", "train_loss", "val_loss", "val_median_error_m", "learning_rate")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def result(data, tmp_path_factory):
    return train(options(data, tmp_path_factory.mktemp("whole")))


def same(history):
    return [{name: entry[name] for name in SAME} for entry in history]


@pytest.fixture(scope="module")
def killed(data, tmp_path_factory):
    base = tmp_path_factory.mktemp("killed")
    be_killed(data, base)
    return base


@pytest.mark.parametrize("moment", [m.__name__ for m in MOMENTS])
def test_a_killed_training_resumes_to_the_same_losses(data, killed, result, moment):
    folder = killed / moment
    left = torch.load(folder / "last.ckpt", weights_only=True)
    assert len(left["training"]["history"]) == 3  # of the last whole epoch
    resumed = train(options(data, folder, resume_training=True))
    assert same(resumed.history) == same(result.history)
    names = {path.name for path in folder.glob("epoch-*.ckpt")}
    assert names == {path.name for path in result.folder.glob("epoch-*.ckpt")}
    weights, expected = (
        load_checkpoint(r.best, model=f"{HERE}:Framed").model.state_dict()
        for r in (resumed, result)
    )
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert (resumed.median_error_m, resumed.stopped) == (result.median_error_m, result.stopped)


def test_early_stopping_goes_on_counting(data, tmp_path):
    # With this rate the loss soon stops falling.
    changes = {"learning_rate": 0.3, "epochs": 30, "patience": 3, "warmup": 0.0}
    whole = train(options(data, tmp_path / "whole", **changes))
    assert whole.stopped == "early stopping"
    seen = []

    def interrupt(share, what):
        if what == f"training, epoch {len(whole.history) - 1}" and not seen:
            seen.append(what)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(options(data, tmp_path / "cut", **changes), report=interrupt)
    resumed = train(options(data, tmp_path / "cut", resume_training=True, **changes))
    assert same(resumed.history) == same(whole.history)
    assert resumed.stopped == "early stopping"
    # What is over stays so: only the evaluation is made again.
    again = train(options(data, tmp_path / "cut", resume_training=True, **changes))
    assert again.history == resumed.history


def test_the_best_is_one_of_the_three_with_calibrated_deviations(result):
    losses = [entry["val_loss"] for entry in result.history]
    (raw,) = result.folder.glob(f"epoch-{losses.index(min(losses)):04d}-*.ckpt")
    before, after = (torch.load(p, weights_only=True)["state_dict"] for p in (raw, result.best))
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"model.frame.deviation_scale"}
    assert result.best.name == "best.ckpt"


def test_interrupted_while_a_checkpoint_is_written_it_is_an_interruption(
    data, tmp_path, monkeypatch
):
    save = torch.save

    def interrupted(content, file):
        if len(content["training"]["history"]) < 3:
            return save(content, file)
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(options(data, tmp_path))
    assert "--resume-training" in caught.value.__notes__[0]
    assert {path.suffix for path in tmp_path.iterdir()} == {".ckpt"}  # nothing half-written


def test_it_learns_positions_and_honest_deviations(result):
    assert result.median_error_m < 0.3 * result.baseline_median_error_m
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"] - 0.5
    assert 0.75 < result.coverage["0.9"] < 1
    assert 0.3 < result.coverage["0.5"] < 0.85
    best = min(result.history, key=lambda entry: entry["val_loss"])
    assert result.best_epoch == best["epoch"]


def test_the_best_three_and_the_last_are_kept(result):
    losses = sorted((e["val_loss"], int(e["epoch"])) for e in result.history)[:3]
    names = {f"epoch-{epoch:04d}-loss-{loss:.4f}.ckpt" for loss, epoch in losses}
    assert {p.name for p in result.folder.glob("epoch-*.ckpt")} == names
    assert {p.name for p in result.folder.iterdir()} - names == {
        *("best.ckpt", "last.ckpt", "eval.npz", "training.json")
    }
    assert not Path("lightning_logs").exists()


def test_the_checkpoint_is_plain_and_builds_its_model(result, data):
    content = torch.load(result.best, weights_only=True)
    assert set(content["hyper_parameters"]) == {"centroid", "scale_m"}
    assert "optimizer_states" not in content
    assert str(result.folder).encode() not in result.best.read_bytes()  # no path of this machine
    loaded = load_checkpoint(result.best, model=f"{HERE}:Framed")
    assert loaded.weights == "state_dict.model"
    dataset = open_dataset(data)
    rows = dataset.split(validation=0.2).train
    np.testing.assert_allclose(
        loaded.model.frame.centroid.numpy(), dataset.positions[rows].mean(0), atol=0.01
    )


def test_the_evaluation_data_are_the_events_it_has_not_seen(result, data):
    dataset = open_dataset(data)
    split = dataset.split(validation=0.2)
    held_out = load_evaluation_data(result.eval_data, Framed(centroid=MIDDLE, scale_m=1).signature)
    np.testing.assert_array_equal(held_out.positions, dataset.positions[split.test])
    assert not set(dataset.event[split.test]) & set(dataset.event[split.train])
    mean = dataset.positions[split.train].mean(0)
    np.testing.assert_allclose(held_out.meta["centre"], mean, atol=1e-3)
    middle = np.broadcast_to(held_out.meta["centre"], held_out.positions.shape)
    expected = np.median(distance_m(middle, held_out.positions))
    assert result.baseline_median_error_m == pytest.approx(expected)


def test_a_trained_frame_is_exported_with_the_model(result, tmp_path):
    loaded = load_checkpoint(result.best, model=f"{HERE}:Framed")
    path = tmp_path / "model.onnx"
    export_model(loaded.model, path)
    held_out = load_evaluation_data(result.eval_data, loaded.signature)
    report = compare_outputs(loaded.model, path, held_out, loaded.signature)
    assert not [gate for gate in report.gates() if not gate.passed]
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    positions, sigma = session.run(None, {"x": held_out.inputs["x"][:]})
    errors = distance_m(positions, held_out.positions)  # degrees, as they come
    median = np.quantile(errors, 0.5, method="higher")  # as the report's sketch takes it
    assert median == pytest.approx(result.median_error_m, rel=1e-3)
    residual = np.abs(positions - held_out.positions)
    assert 0.3 < np.mean(residual < sigma) < 0.95


def test_a_model_without_a_frame_is_trained_in_degrees(data, tmp_path):
    found = train(options(data, tmp_path, model=f"{HERE}:Plain", epochs=20, learning_rate=0.05))
    assert found.median_error_m < 0.5 * found.baseline_median_error_m
    assert torch.load(found.best, weights_only=True)["hyper_parameters"] == {}


def test_out_of_time_the_learning_rate_has_come_down(data, tmp_path):
    start = time.monotonic()
    found = train(options(data, tmp_path, epochs=100_000, patience=100_000, max_time=2.0))
    assert found.stopped == "time"
    assert found.seconds < 10
    assert time.monotonic() - start < 60
    assert found.history[-1]["learning_rate"] < 0.05 * 0.02
    rates = [entry["learning_rate"] for entry in found.history]
    assert max(rates) > 0.5 * 0.02
    more = options(
        data, tmp_path, epochs=100_000, patience=100_000, max_time=3.0, resume_training=True
    )
    longer = train(more)
    assert len(longer.history) > len(found.history)
    assert longer.history[: len(found.history)] == found.history


def test_weights_to_start_from_keep_their_frame(result, data, tmp_path):
    found = train(
        options(data, tmp_path, epochs=1, checkpoint=str(result.best), learning_rate=1e-6)
    )
    assert found.history[0]["val_loss"] == pytest.approx(
        result.history[result.best_epoch]["val_loss"], abs=0.05
    )
    hyper = torch.load(found.best, weights_only=True)["hyper_parameters"]
    assert hyper == torch.load(result.best, weights_only=True)["hyper_parameters"]


def test_the_callers_generator_threads_and_signals_are_as_before(data, tmp_path):
    before = torch.get_rng_state(), torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    train(options(data, tmp_path, epochs=1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.get_num_threads(), signal.getsignal(signal.SIGINT)) == before[1:]


def held_out(result):
    signature = Framed(centroid=MIDDLE, scale_m=1).signature
    return load_evaluation_data(result.eval_data, signature).positions[:]


def test_another_seed_is_another_training_judged_on_the_same_events(result, data, tmp_path):
    other = train(options(data, tmp_path / "seed", epochs=1, seed=1))
    assert other.history[0]["train_loss"] != result.history[0]["train_loss"]
    np.testing.assert_array_equal(held_out(other), held_out(result))
    divided = train(options(data, tmp_path / "split", epochs=1, split_seed=1))
    assert {tuple(p) for p in held_out(divided)} != {tuple(p) for p in held_out(result)}


def test_a_part_without_events_names_the_option_to_change(tmp_path):
    data = write_data(tmp_path / "set", 6)
    with pytest.raises(DataError, match="no event falls into") as caught:
        train(options(data, tmp_path / "out", test_split=0.01))
    assert "--split-seed" in caught.value.__notes__[0]


def test_a_diverged_training_says_so_and_keeps_its_best(data, tmp_path):
    changes = {"model": f"{HERE}:Fragile"}
    found = train(options(data, tmp_path, **changes))
    assert found.stopped == "diverged"
    assert len(found.history) == 4
    assert math.isnan(found.history[-1]["val_loss"])
    assert found.best_epoch < 3
    assert math.isfinite(found.median_error_m)

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "training.json").read_text()
    assert json.loads(text, parse_constant=refuse)["history"][-1]["val_loss"] is None
    again = read_result(tmp_path)
    assert math.isnan(again.history[-1]["val_loss"])
    assert again.history[:3] == found.history[:3]
    # Going on would start from what has diverged.
    more = train(options(data, tmp_path, resume_training=True, epochs=20, **changes))
    assert (more.stopped, len(more.history)) == ("diverged", 4)


def test_a_dataset_that_is_not_what_it_says_is_not_trained_on(data, tmp_path):
    damaged = tmp_path / "set"
    shutil.copytree(data, damaged)
    other = write_data(tmp_path / "other", seed=1)
    shutil.rmtree(damaged / "inputs")
    shutil.copytree(other / "inputs", damaged / "inputs")
    with pytest.raises(DataError, match="inputs/x: expected SHA-256"):
        train(options(damaged, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*"))


def copied(result, folder):
    shutil.copytree(result.folder, folder)
    return folder


def test_a_best_that_was_deleted_is_no_divergence(result, data, tmp_path):
    folder = copied(result, tmp_path / "out")
    (best,) = folder.glob(f"epoch-{result.best_epoch:04d}-*")
    best.unlink()
    with pytest.raises(CheckpointError, match=f"{best.name} is missing"):
        train(options(data, folder, resume_training=True))


def test_nothing_reaches_standard_output(data, tmp_path, capfd):
    train(options(data, tmp_path, epochs=1))
    out, err = capfd.readouterr()
    assert not out
    assert "Tip" not in err
    assert "GPU available" not in err


@pytest.mark.slow
@pytest.mark.thorough
def test_streamed_by_workers_it_is_the_same_training(result, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training_run, "CACHE_BYTES", 0)
    streamed = train(options(data, tmp_path / "here", num_workers=0, epochs=8))
    assert same(streamed.history) == same(result.history)
    seen = []

    def interrupt(share, what):
        if what == "training, epoch 3" and not seen:
            seen.append(what)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(options(data, tmp_path / "there", num_workers=1), report=interrupt)
    resumed = train(options(data, tmp_path / "there", num_workers=1, resume_training=True))
    assert same(resumed.history) == same(result.history)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0, "batch_size": "many", "lr": 1}, ["epochs", "batch_size", "lr"]),
        ({"validation_split": 0.6, "test_split": 0.5}, ["nothing to train on"]),
        ({"resume_training": True, "export_only": True}, ["exclude each other"]),
        ({"data_dir": "", "checkpoint": "nowhere.ckpt"}, ["data_dir is missing", "nowhere.ckpt"]),
        ({"model_kwargs": "{"}, ["not JSON"]),
        ({"accelerator": "abacus"}, ["accelerator"]),
        ({"max_time": -1}, ["max_time"]),
        ({"resume_training": True, "checkpoint_dir": ""}, ["which training"]),
        ({"resume_training": True, "checkpoint": __file__}, ["in its own folder", __file__]),
        ({"model_kwargs": '{"a b$": 1}'}, ["model_kwargs", "a b$"]),
    ],
)
def test_what_can_t_be_used_is_named_all_at_once(data, tmp_path, changes, words):
    with pytest.raises(ParameterError) as error:
        options(data, tmp_path, **changes)
    for word in words:
        assert word in str(error.value)


def test_parameters_are_frozen(data, tmp_path):
    with pytest.raises(ValidationError):
        options(data, tmp_path).epochs = 3


def test_a_folder_with_a_training_is_not_overwritten(result, data):
    with pytest.raises(ParameterError, match="--resume-training"):
        train(options(data, result.folder))


def test_a_training_goes_on_only_as_it_began(result, data, tmp_path, monkeypatch):
    other = write_data(tmp_path / "other", 300)
    monkeypatch.setattr(training_run, "precision_of", lambda accelerator: "bf16-mixed")
    changes = {"batch_size": 16, "seed": 3, "patience": 2, "devices": 2, "split_seed": 7}
    changed = options(other, result.folder, resume_training=True, **changes)
    with pytest.raises(ParameterError) as error:
        train(changed)
    for word in (
        *("batch_size: 32 then, 16 now", "seed: 0 then, 3 now", "dataset_digest: '"),
        *("patience: 10 then, 2 now", "devices: 1 then, 2 now", "split_seed: 0 then, 7 now"),
        "precision: '32-true' then, 'bf16-mixed' now",
    ):
        assert word in str(error.value)


def test_only_what_this_entry_has_left_can_be_gone_on_from(result, data, tmp_path):
    model = load_checkpoint(result.best, model=f"{HERE}:Framed").model
    torch.save({"state_dict": model.state_dict()}, tmp_path / "foreign.ckpt")
    with pytest.raises(CheckpointError, match="does not record the training"):
        train(
            options(data, tmp_path, checkpoint=str(tmp_path / "foreign.ckpt"), resume_training=True)
        )
    with pytest.raises(CheckpointError, match="weights only"):
        train(options(data, "", checkpoint=str(result.best), resume_training=True))


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_that_holds_code_is_not_gone_on_from(result, data, tmp_path):
    content = torch.load(result.last, weights_only=True)
    content["callbacks"]["trap"] = Trap(str(tmp_path / "sprung"))
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="mkdir"):
        train(options(data, tmp_path, resume_training=True))
    assert not (tmp_path / "sprung").exists()


def test_a_moved_folder_goes_on_where_it_is(result, data, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in result.folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    longer = train(options(data, moved, epochs=10, resume_training=True))
    assert len(longer.history) == 10
    assert longer.best.parent == moved
    assert len(list(moved.glob("epoch-*.ckpt"))) == 3
    assert len(list(result.folder.glob("epoch-*.ckpt"))) == 3  # the other folder is as it was


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": f"{HERE}:Unsure"}, ParameterError, "log_variance_of"),
        ({"model": f"{HERE}:Nobody"}, ParameterError, "has no 'Nobody'"),
        ({"model_kwargs": {"breadth": 3}}, ParameterError, "breadth"),
        (
            {
                "model": "heimdall_onnx:LocalizationNet",
                "model_kwargs": {"backbone_size": "atto"},
            },
            DataError,
            "mel_spectrogram",
        ),
        ({"learning_rate": 10, "warmup": 0, "beta": 0}, EvidenceError, "diverged"),
    ],
)
def test_what_can_t_be_trained_says_why(data, tmp_path, monkeypatch, changes, error, words):
    if error is EvidenceError:
        monkeypatch.setattr(Framed, "local", lambda self, x: (self.net(x)[:, :2] * math.nan,) * 2)
    with pytest.raises(error, match=words):
        train(options(data, tmp_path, epochs=2, **changes))


def test_a_dataset_without_positions_can_t_be_trained_on(tmp_path):
    data = write_data(tmp_path / "set", 100, labelled=False)
    with pytest.raises(DataError, match="no positions"):
        train(options(data, tmp_path / "out"))


def test_the_record_gives_the_result_again(result, tmp_path):
    assert read_result(result.folder) == result
    json.dumps(result.to_dict(), allow_nan=False)
    with pytest.raises(CheckpointError, match="no finished training"):
        read_result(tmp_path)


def test_a_changed_file_is_not_released(result, tmp_path):
    for path in result.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with (tmp_path / "eval.npz").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="was changed since"):
        read_result(tmp_path)


def test_a_checkpoint_of_another_training_is_not_released(result, data, tmp_path):
    folder = copied(result, tmp_path / "out")
    foreign = folder / "foreign.ckpt"
    shutil.copy(result.best, foreign)
    for path in (foreign, result.best):
        with pytest.raises(CheckpointError, match="not a file of this training"):
            read_result(folder, str(path))
    shutil.copy(result.last, folder / "best.ckpt")
    with pytest.raises(CheckpointError, match="was changed since"):
        read_result(folder, str(folder / "best.ckpt"))


def test_of_another_checkpoint_than_the_best_nothing_is_claimed(result):
    found = read_result(result.folder, str(result.last))
    assert math.isnan(found.median_error_m)
    assert (found.best, found.coverage, found.nll) == (result.last, {}, None)
    assert found.to_dict()["median_error_m"] is None
    assert read_result(result.folder, str(result.best)) == result


def test_the_loss_is_that_of_a_normal_distribution():
    objective = Objective(Plain(), Plain.signature, beta=0.5)
    torch.manual_seed(0)
    answers, targets = torch.randn(2, 50, 2, dtype=torch.float64)
    deviations = torch.rand(50, 2, dtype=torch.float64) + 0.1
    weighted, nats = objective.losses(answers, deviations, targets)
    each = -torch.distributions.Normal(answers, deviations).log_prob(targets)
    torch.testing.assert_close(nats, each.mean())
    torch.testing.assert_close(weighted, (each * deviations).mean())


def test_in_degrees_the_date_line_is_no_distance():
    objective = Objective(Plain(), Plain.signature, beta=0.0)
    ones = torch.ones(1, 2)
    near, _ = objective.losses(torch.tensor([[0.0, 181.0]]), ones, torch.tensor([[0.0, -179.5]]))
    same, _ = objective.losses(torch.tensor([[0.0, 0.5]]), ones, torch.zeros(1, 2))
    torch.testing.assert_close(near, same)


def test_norms_biases_and_scales_do_not_decay():
    model = LocalizationNet(backbone_size="atto")
    decayed, kept = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    kept_names = {names[id(p)] for p in kept["params"]}
    assert len(kept["params"]) + len(decayed["params"]) == len(names)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(n in kept_names for n in names.values() if n.endswith(("layer_scale", "bias")))


def test_a_frozen_backbone_is_not_trained():
    model = LocalizationNet(backbone_size="atto", freeze_backbone=True)
    trained = [p for group in parameter_groups(model, 0.05) for p in group["params"]]
    assert sum(p.numel() for p in trained) == model.get_params_count()["trainable"]


def test_the_learning_rate_rises_on_a_line_and_falls_on_a_cosine():
    rates = [rate_factor(share, 0.1) for share in np.linspace(0, 1, 101)]
    assert rates[5] == pytest.approx(0.5)
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_an_order_is_that_of_its_seed_and_epoch():
    class Module:
        epoch, global_rank = 3, 0

        class trainer:
            world_size = 1

    module = Module()
    order = EpochOrder(20, 7, module, shuffled=True)
    first = list(order)
    assert first == list(order)
    assert sorted(first) == list(range(20))
    module.epoch = 4
    assert list(order) != first
    module.trainer.world_size = 3
    shares = []
    for rank in range(3):
        module.global_rank = rank
        shares += list(order)
    assert len(shares) == len(set(shares)) == 18


def test_seeds_of_different_numbers_differ():
    assert len({seed_of(a, b, 0) for a in range(30) for b in range(30)}) == 900


def test_without_the_packages_it_says_what_to_install(data, tmp_path, monkeypatch):
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"heimdall-onnx\[train\]"):
        train(options(data, tmp_path))
