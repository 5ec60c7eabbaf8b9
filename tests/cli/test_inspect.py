"""What a checkpoint holds is shown without its model, and without PyTorch."""

import argparse
import json

import torch
from click.testing import CliRunner

from heimdall_onnx.cli.main import main


def inspect(*arguments):
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_readings_what_is_skipped_and_the_command_are_shown(tmp_path):
    path = tmp_path / "a.ckpt"
    state = {"model.weight": torch.ones(2, 3), "model.count": torch.tensor(1)}
    content = {
        "state_dict": state,
        "ema": {"weight": torch.ones(2, 3)},
        "hyper_parameters": {"width": 2, "args": argparse.Namespace(a=1)},
    }
    torch.save(content, path)
    shown = inspect(path).stdout
    for line in (
        "- weights: state_dict\n  names: [model.weight, model.count]\n  tensors: 2\n",
        "  elements: 7\n  dtypes: {float32: 1, int64: 1}\n",
        "not_loaded: {hyper_parameters.args: argparse.Namespace}\n",
        "hyper_parameters: {width: '2', args: argparse.Namespace}\n",
        f"command: heimdall-onnx release {path} --model PACKAGE:CLASS --weights state_dict",
    ):
        assert line in shown
    found = json.loads(inspect(path, "--json").stdout)
    assert [one["weights"] for one in found["readings"]] == ["state_dict", "ema"]
    assert found["hyper_parameters"] == {"width": "2", "args": "argparse.Namespace"}


def test_what_is_no_checkpoint_is_bad_input(tmp_path):
    (tmp_path / "a.pt").write_text("<html></html>")
    done = inspect(tmp_path / "a.pt")
    assert done.exit_code == 2
    assert "found a web page" in done.stderr
