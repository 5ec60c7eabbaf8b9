"""What is no checkpoint is named for what it is, by its file alone."""

import gzip
import json
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.model.formats import locate
from heimdall_onnx.model.readings import read_content, read_weights


def scripted(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("net/data.pkl", "net/code/__torch__.py", "net/constants.pkl"):
            archive.writestr(name, b"")


def exported(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/archive_format", b"pt2")


def zipped(path):
    torch.save({"a": torch.ones(1)}, path.with_name("inner.pt"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_name("inner.pt"), "inner.pt")


def in_tar(path):
    zipped(path)
    with tarfile.open(path.with_name("a.tar"), "w") as archive:
        archive.add(path, "inner.pt")
    path.with_name("a.tar").replace(path)


def truncated(path):
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def truncated_safetensors(path):
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])


def arrays(path):
    with path.open("wb") as file:
        np.savez(file, a=np.ones(1))


class Held:
    """Of a trainer that keeps its network."""

    def __init__(self):
        self.net = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "found no such file"),
        (lambda path: path.mkdir(), "a folder with no checkpoint in it"),
        (lambda path: path.touch(), "an empty file"),
        (lambda path: path.symlink_to("nowhere.pt"), r"a link to nowhere\.pt, where there is"),
        (lambda path: path.write_text("hello"), "truncated or not a checkpoint"),
        (lambda path: path.write_text("<!DOCTYPE html><title>Login</title>"), "a web page"),
        (lambda path: path.write_text('{"a": 1}'), "JSON text"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
            "git lfs pull",
        ),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file, as Keras"),
        (lambda path: path.write_bytes(b"\x08\x0a\x12\x07pytorch"), "an ONNX model"),
        (lambda path: path.write_bytes(gzip.compress(b"a")), "a gzip archive"),
        (in_tar, "a tar archive"),
        (zipped, r"a ZIP archive with inner\.pt"),
        (arrays, r"a NumPy archive \(\.npz\)"),
        (scripted, "a TorchScript archive"),
        (exported, r"a \.pt2 archive"),
        (truncated, "truncated or damaged"),
        (truncated_safetensors, "broken safetensors file"),
        (lambda path: torch.save([1], path), "found list"),
        (lambda path: torch.save({}, path), "found an empty dictionary"),
        (lambda path: torch.save({1: torch.ones(1)}, path), "holds no weights.*found 1$"),
        (lambda path: torch.save({"epoch": 1}, path), "found epoch$"),
        (
            lambda path: torch.save(nn.Linear(1, 1), path),
            r"(?s)pickled torch\.nn\.modules.*\.state_dict\(\)",
        ),
        (lambda path: torch.save({"a": np.ones(1)}, path), r"(?s)holds numpy.*torch\.as_tensor"),
        (lambda path: torch.save(Held(), path), r"(?s)test_formats\.Held.*its module>\.state_dict"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, make, message):
    path = tmp_path / "a.ckpt"
    make(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("https://example.org/net.pt", "an address: download it"),
        ("s3://bucket/net.pt", "an address: download it"),
        ("org/net", "give what `hf download org/net` fetches"),
        ("runs/*.ckpt", "a pattern that no file matches"),
        ("~/no such net.pt", r"~/no such net\.pt \(/.*/no such net\.pt\), found no such file"),
        ("", "at a path, found no such file"),
    ],
)
def test_what_is_no_path_is_named(given, message):
    with pytest.raises(CheckpointError, match=message):
        locate(given)


def test_a_near_name_is_suggested(tmp_path):
    (tmp_path / "detector.pt").touch()
    with pytest.raises(CheckpointError, match=r"did you mean detector\.pt\?"):
        locate(tmp_path / "detecter.pt")


def test_one_part_of_several_leads_to_the_whole(tmp_path):
    shards = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, shard in enumerate(shards):
        save_file({f"a{i}": torch.ones(1)}, shard)
    with pytest.raises(CheckpointError, match="found one of several shards: give their folder"):
        locate(shards[0])
    assert locate(tmp_path).files == tuple(shards)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a0": shards[0].name, "a1": shards[1].name}}))
    assert locate(index).files == locate(tmp_path).files == tuple(shards)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=r"not all of them: model-00002-of-.* is missing"):
        locate(index)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "latest", "mp_rank_00_model_states.pt"])
def test_a_folder_leads_to_its_file(tmp_path, name):
    file = tmp_path / name
    if name == "latest":
        file.write_text("global_step3\n")
        file = tmp_path / "global_step3" / "mp_rank_00_model_states.pt"
        file.parent.mkdir()
    torch.save({"module": {"a": torch.ones(1)}}, file)
    assert locate(tmp_path).files == (file,)


def test_parts_of_deepspeed_are_put_together_elsewhere(tmp_path):
    for rank in "01":
        torch.save({}, tmp_path / f"mp_rank_0{rank}_model_states.pt")
    with pytest.raises(CheckpointError, match=r"python zero_to_fp32\.py"):
        locate(tmp_path)


def test_safetensors_are_never_taken_for_what_their_length_looks_like(tmp_path):
    path = tmp_path / "a.safetensors"
    tensor = torch.arange(4.0)
    for length in range(1, 9):  # header lengths with all kinds of first bytes
        save_file({"n" * 12 * length: tensor}, path)
        assert locate(path).kind == "safetensors"
        (found,) = read_content(path).readings[0].tensors.values()
        assert torch.equal(found.tensor(), tensor)


def test_refusals_do_without_pytorch():
    code = "import sys, heimdall_onnx.model.readings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
