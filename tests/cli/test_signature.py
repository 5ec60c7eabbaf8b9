"""What a model takes and gives is written beside its checkpoint, where a release looks for it."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from heimdall_onnx.cli.main import main
from heimdall_onnx.model.checkpoint import load_checkpoint

NET = f"{__name__}:Net"


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(2, 4, 3), nn.ReLU())


def signature(*arguments):
    return CliRunner().invoke(main, ["signature", *map(str, arguments)])


@pytest.mark.parametrize("place", ["a.pt", "folder"])
def test_what_was_found_is_written_and_counts_from_then_on(place, tmp_path):
    path = tmp_path / place
    file = path if path.suffix else path / "pytorch_model.bin"
    file.parent.mkdir(exist_ok=True)
    torch.save(Net().state_dict(), file)
    np.savez(tmp_path / "eval.npz", sound=np.ones((5, 2, 20), np.float32))
    done = signature(path, "--model", NET, "--eval-data", tmp_path / "eval.npz")
    written = file.with_name(f"{file.stem}.signature.yaml")
    assert done.stdout.splitlines() == [
        "inputs: sound of the evaluation data",
        "length, axis 2 of sound: dynamic, the model runs at 10, 20, 21",
        f"written: {written}",
    ]
    loaded = load_checkpoint(file, model=NET)
    assert loaded.signature_source == f"the file {written.name}"
    assert loaded.signature.outputs[0].shape == ("batch", 4, "output_2")
    again = signature(path, "--model", NET)
    assert again.exit_code == 2
    assert f"{written} is there already" in again.stderr


def test_a_model_has_to_be_named(tmp_path):
    torch.save(Net().state_dict(), tmp_path / "a.pt")
    for command in ("signature", "release"):
        done = CliRunner().invoke(main, [command, str(tmp_path / "a.pt")])
        assert done.exit_code == 2
        assert "which model are these weights of? Name its class" in done.stderr
