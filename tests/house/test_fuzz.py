"""Mutated files end in success or a clean refusal; the long run is ``python tests/soak fuzz``."""

import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.model.checkpoint import load_checkpoint

SOAK = Path(__file__).parents[1] / "soak"
INPUTS = 100
FAULTY = """
import ctypes, os, time
import reader

def die(path): ctypes.string_at(0)
def hang(path): time.sleep(60)
def take_memory(path): return bytearray(2 * reader.MEMORY_BYTES)
def run_payload(path): os.mkdir(reader.PROOF)
def say_nothing(path): raise ValueError("no")
def say_much(path): raise ValueError(path.name + "x" * 200_000)
def say_hidden(path): raise ValueError(path.name + chr(27) + "[2J")
def hide_memory(path):
    try: take_memory(path)
    except MemoryError as error: raise ValueError(path.name) from error
def read(path):
    if b"K" in path.read_bytes(): raise KeyError(path.name)

reader.serve({n: reader.Reader(f, (ValueError,)) for n, f in globals().items() if callable(f)})
"""


@pytest.fixture(scope="module")
def soak():
    """The soak's modules by name; they are a script's, not a package's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SOAK))
        yield importlib.import_module
        for name in ("fuzz", "mutations", "seeds"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def process(soak, tmp_path_factory):
    with soak("fuzz").ReaderProcess(tmp_path_factory.mktemp("reader")) as process:
        yield process


@pytest.mark.parametrize(
    "name",
    ["checkpoint", "onnx", "session", "evaluation", "recording", "parameters", "manifest"],
)
def test_every_input_ends_in_success_or_a_clean_refusal(soak, process, tmp_path, name, capsys):
    violations = soak("fuzz").try_target(
        name, INPUTS, seed=0, reader=process, folder=tmp_path, kept=tmp_path
    )
    assert violations == []
    assert f"{name}: {INPUTS} tried: " in capsys.readouterr().out


def test_every_reader_is_tried(soak):
    parametrized = test_every_input_ends_in_success_or_a_clean_refusal.pytestmark[0].args[1]
    assert parametrized == list(soak("fuzz").TARGETS)


@pytest.fixture
def faulty(soak, tmp_path):
    """A process with readers that do what none may."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    with soak("fuzz").ReaderProcess(tmp_path, tmp_path / "faulty.py") as process:
        yield process


def test_what_must_not_happen_is_noticed(soak, faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(soak("fuzz"), "DEADLINE_S", 2)
    found = {
        name: faulty.ask(name, tmp_path / "file").get("violation")
        for name in (
            *("say_nothing", "say_much", "say_hidden", "take_memory", "hide_memory"),
            *("run_payload", "die", "hang", "say_nothing"),
        )
    }
    assert found == {
        "say_nothing": "the message does not name the file",
        "say_much": "the message is too long to be read",
        "say_hidden": "the message holds control characters",
        "take_memory": "MemoryError from reader",
        "hide_memory": "out of memory",
        "run_payload": "the payload ran",
        "die": "the process ended with -11",
        "hang": "no end after 2 s",
    }


def test_violation_is_shrunk_and_kept(soak, faulty, tmp_path, monkeypatch, capsys):
    fuzz = soak("fuzz")
    target = fuzz.Target(".bin", lambda: [b""], lambda _: st.binary())
    monkeypatch.setitem(fuzz.TARGETS, "read", target)
    (line,) = fuzz.try_target("read", 2000, 0, faulty, tmp_path, tmp_path)
    kept = tmp_path / "read-KeyError-from-reader.bin"
    assert line == f"read: KeyError from reader; seed 0, see {kept}"
    assert line in capsys.readouterr().out
    assert kept.read_bytes() == b"K"
    assert "KeyError: 'read.bin'" in kept.with_suffix(".txt").read_text()


PAYLOADS = ["zip.pt", "zip-compressed.ckpt", "legacy.pt", "bare.ckpt", "bare-protocol-0.ckpt"]
PAYLOADS += ["bare-protocol-5.ckpt", "tar.pt", "pickle.safetensors", "zip.safetensors"]
PAYLOADS += ["tail.safetensors"]


@pytest.mark.parametrize("name", PAYLOADS)
def test_payload_does_not_run_in_any_format_of_a_checkpoint(soak, tmp_path, monkeypatch, name):
    mutations = soak("mutations")
    monkeypatch.chdir(tmp_path)
    files = mutations.payload_files()
    assert set(files) == set(PAYLOADS)
    path = tmp_path / name
    path.write_bytes(files[name])
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, model="models:SmallNet")
    assert str(path) in str(caught.value).split("\n")[0]
    assert not Path(mutations.PROOF).exists()


def test_payloads_run_where_nothing_keeps_them_from_it(soak, tmp_path, monkeypatch):
    mutations = soak("mutations")
    monkeypatch.chdir(tmp_path)
    for name in ("zip.pt", "legacy.pt", "bare.ckpt"):
        (tmp_path / name).write_bytes(mutations.payload_files()[name])
        if name == "bare.ckpt":
            pickle.loads((tmp_path / name).read_bytes())
        else:
            torch.load(tmp_path / name, weights_only=False)
        Path(mutations.PROOF).rmdir()
