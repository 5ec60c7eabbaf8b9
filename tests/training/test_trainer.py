"""The loop: each step counts, going on is exact, and what a checkpoint records is not trusted."""

import sys
import time

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from heimdall_onnx import Signature, TensorSpec
from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.common.text import DEGREES
from heimdall_onnx.localization.frame import LocalFrame
from heimdall_onnx.training.module import Objective, TrainingModule, TrainingProgress
from heimdall_onnx.training.parameters import TrainingParameters
from heimdall_onnx.training.trainer import PlainCheckpoints, fit, read_training

COUNT = 16


class Framed(nn.Module):
    signature = Signature(
        inputs=(TensorSpec("x", "float32", ("batch", 2)),),
        outputs=(
            TensorSpec("positions", "float32", ("batch", 2), unit=DEGREES),
            TensorSpec("sigma", "float32", ("batch", 2), unit=DEGREES, sigma_of="positions"),
        ),
    )

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)
        self.frame = LocalFrame((50.0, 9.0), 1e5)

    def local(self, x):
        answers = self.net(x)
        return answers[:, :2], nn.functional.softplus(answers[:, 2:]) + 1e-3

    def forward(self, x):
        return self.frame(*self.local(x))


def fitted(
    folder, *, epochs, resume=None, scale=1.0, batch=COUNT, devices=1, report=lambda *_: None
):
    """Train a little on a few rows; the module."""
    torch.manual_seed(0)
    model = Framed()
    model.frame.deviation_scale.fill_(scale)
    progress = TrainingProgress(
        about={"parameters": {}, "dataset_digest": "", "run_id": "", "threads": 1}
    )
    if resume is not None:
        progress.history = read_training(resume)["history"]
    x = torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(1))
    objective = Objective(model, model.signature, 0.5)
    positions = np.tile((50.0, 9.0), (COUNT, 1)) + x.double().numpy()
    targets = torch.from_numpy(objective.targets(positions))
    batches = [
        ({"x": x[i : i + batch]}, targets[i : i + batch], torch.arange(COUNT)[i : i + batch])
        for i in range(0, COUNT, batch)
    ]
    chosen = TrainingParameters(
        learning_rate=0.1, epochs=epochs, patience=100, accelerator="cpu", devices=devices
    )
    module = TrainingModule(model, objective, chosen, {}, progress, positions, time.monotonic())
    fit(
        module,
        *(DataLoader(batches, batch_size=None) for _ in range(2)),
        folder=folder,
        precision="32-true",
        resume=resume,
        report=report,
        sink=None,
    )
    return module


@pytest.fixture(scope="module")
def last(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    fitted(folder, epochs=3, scale=3.0)
    return folder / "last.ckpt"


def changed(last, path, change):
    """A copy of a checkpoint that ``change`` has been at."""
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_a_single_step_learns(tmp_path):
    torch.manual_seed(0)
    before = Framed().net.weight.detach()
    module = fitted(tmp_path, epochs=1)
    assert (module.model.net.weight - before).abs().max() > 0.01


def test_no_step_is_lost_at_either_end(tmp_path):
    module = fitted(tmp_path, epochs=2, batch=4)
    rates = module.lr_schedulers().lr_lambdas[0]
    factors = [rates(step) for step in range(8)]
    assert min(factors) > 0.005
    assert factors == sorted(factors, reverse=True)
    assert module.share(8) == 1


def test_going_on_is_exact(tmp_path, last):
    whole = fitted(tmp_path / "whole", epochs=4, batch=4)
    steps = []

    def interrupt(share, what):
        steps.append(share)
        if len(steps) == 11:  # in the third epoch
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingModule, "on_train_batch_end", lambda *_: interrupt(0, ""))
        with pytest.raises(KeyboardInterrupt):
            fitted(tmp_path / "cut", epochs=4, batch=4)
    resumed = fitted(tmp_path / "cut", epochs=4, batch=4, resume=tmp_path / "cut" / "last.ckpt")
    names = ("epoch", "train_loss", "val_loss", "val_median_error_m", "learning_rate")
    histories = [
        [[entry[name] for name in names] for entry in module.progress.history]
        for module in (whole, resumed)
    ]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 4
    assert torch.equal(whole.model.net.weight, resumed.model.net.weight)


def test_the_bar_has_the_losses_and_leaves_standard_output_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    module = fitted(tmp_path, epochs=2, report=None)
    out, err = capsys.readouterr()
    assert out == ""
    for name in ("train_loss", "val_loss"):
        assert f"{name}={module.progress.history[0][name]:.3g}" in err
    assert "km=" in err


def test_how_tensors_are_shared_is_as_it_was_afterwards(tmp_path, monkeypatch):
    before, during = torch.multiprocessing.get_sharing_strategy(), []

    def fail(*_, **__):
        during.append(torch.multiprocessing.get_sharing_strategy())
        raise RuntimeError("no such device")

    monkeypatch.setattr(Trainer, "fit", fail)
    with pytest.raises(RuntimeError, match="no such device"):
        fitted(tmp_path, epochs=1, devices=2)
    assert during == ["file_system"]
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_an_old_calibration_is_in_no_checkpoint_of_a_new_training(last):
    for path in last.parent.glob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert state["model.frame.deviation_scale"].tolist() == [1.0, 1.0]


def test_who_goes_on_finds_the_frame_as_it_was(last, tmp_path):
    def scaled(content):
        content["state_dict"]["model.frame.deviation_scale"].fill_(2.0)

    start = changed(last, tmp_path / "last.ckpt", scaled)
    module = fitted(tmp_path, epochs=4, resume=start)
    assert module.model.frame.deviation_scale.tolist() == [2.0, 2.0]


def test_what_is_recorded_is_read(last):
    found = read_training(last)
    assert found["about"] == {"parameters": {}, "dataset_digest": "", "run_id": "", "threads": 1}
    assert [entry["epoch"] for entry in found["history"]] == [0, 1, 2]
    assert found["best"].is_file()
    assert found["stopped"] is None
    assert not found["weights_only"]


def test_losses_that_are_no_numbers_are_read(last, tmp_path):
    def diverged(content):
        content["training"]["history"][-1]["val_loss"] = float("nan")

    found = read_training(changed(last, tmp_path / "last.ckpt", diverged))
    assert np.isnan(found["history"][-1]["val_loss"])


def test_a_value_without_end_takes_no_time(last, tmp_path):
    def endless(content):
        value = 0
        for _ in range(60):
            value = [value, value]
        content["training"]["about"] |= {"parameters": {"seed": value}, "device": "cpu"}

    found = read_training(changed(last, tmp_path / "last.ckpt", endless))
    assert found["about"]["device"] == "cpu"


def put(*keys, value):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (put("training", value=[]), "training:"),
        (put("training", "about", value=None), "training.about"),
        (put("training", "about", "threads", value="x"), "training.about.threads"),
        (put("training", "about", "threads", value=-1), "training.about.threads"),
        (put("training", "about", "run_id", value=7), "training.about.run_id"),
        (put("training", "history", value=[1]), "training.history.0"),
        (put("training", "history", 1, "epoch", value=float("nan")), "training.history.1.epoch"),
        (put("training", "history", 0, "val_loss", value="low"), "training.history.0.val_loss"),
        (put("training", "seconds", value=float("inf")), "training.seconds"),
        (put("training", "stopped", value="whim"), "training.stopped"),
        (put("callbacks", value=[]), "callbacks:"),
        (put("callbacks", "EarlyStopping", value=3), "callbacks.EarlyStopping"),
        (put("callbacks", "_Best", value={"best_model_path": 3}), "callbacks._Best"),
        (put("callbacks", "_Best", value={"best_k_models": [3]}), "callbacks._Best"),
    ],
)
def test_what_was_not_written_by_a_training_is_refused(last, tmp_path, change, word):
    path = changed(last, tmp_path / "last.ckpt", change)
    with pytest.raises(CheckpointError) as error:
        read_training(path)
    assert f"\n  - {word}" in str(error.value)
    assert "without --resume-training" in str(error.value)


def test_all_that_is_wrong_is_named_at_once(last, tmp_path):
    def change(content):
        content["callbacks"] = []
        content["training"] |= {"history": [1], "seconds": "long"}
        content["training"]["about"]["threads"] = "x"

    with pytest.raises(CheckpointError) as error:
        read_training(changed(last, tmp_path / "last.ckpt", change))
    for word in ("callbacks:", "history.0:", "seconds:", "about.threads:", "found x"):
        assert word in str(error.value)


@pytest.mark.parametrize("old", [False, True])
def test_weights_alone_are_no_training(tmp_path, old):
    path = tmp_path / "last.ckpt"
    torch.save(Framed().state_dict(), path, _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match="does not record the training"):
        read_training(path)


def test_neither_are_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "last.safetensors"
    save_file(Framed().state_dict(), path)
    with pytest.raises(CheckpointError, match="does not record the training"):
        read_training(path)


def test_a_loader_of_checkpoints_trusts_no_callback(last, tmp_path):
    path = changed(last, tmp_path / "last.ckpt", put("callbacks", value=[]))
    with pytest.raises(CheckpointError, match="callbacks"):
        PlainCheckpoints().load_checkpoint(path)


def test_a_loader_of_checkpoints_reads_what_spawned_processes_hand_back(tmp_path):
    path = tmp_path / ".temp.ckpt"
    PlainCheckpoints().save_checkpoint(Framed().state_dict(), path)
    found = PlainCheckpoints().load_checkpoint(path)
    assert found.keys() == Framed().state_dict().keys()


@pytest.mark.parametrize(
    "change",
    [
        put("optimizer_states", value=3),
        put("loops", value=[]),
        put("lr_schedulers", value=[{"last_epoch": 1}, 2]),
    ],
)
def test_what_can_t_be_restored_is_said_to_be_the_checkpoints_fault(last, tmp_path, change):
    path = changed(last, tmp_path / "last.ckpt", change)
    with pytest.raises(CheckpointError, match="can't be gone on from"):
        fitted(tmp_path, epochs=5, resume=path)
