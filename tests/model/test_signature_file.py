"""The YAML file beside a checkpoint: what it declares wins, and it is read as anybody's bytes."""

import hashlib
import time

import pytest
import torch
import yaml
from families import MULTI_MODAL, TRIANGULATION, Triangulator, UndeclaredMultiModalNet
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.localization.network import LOCALIZATION_SIGNATURE
from heimdall_onnx.model.checkpoint import load_checkpoint
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.signature import Axis, Signature, TensorSpec, signature_of
from heimdall_onnx.model.signature_file import (
    find_signature_file,
    read_signature_file,
    signature_path,
    write_signature_file,
)
from heimdall_onnx.report.tables import checkpoint_table

SMALL = """\
inputs:
  - {name: x, dtype: float32, shape: [batch, time], range: [-1e0, 1]}
outputs:
  - name: y
    dtype: float32
    shape: [batch, 2]
    unit: degrees latitude, longitude
"""


@pytest.fixture
def file(tmp_path):
    """Writes a file, and reads it as a signature."""

    def read(content: str | bytes):
        path = tmp_path / "net.signature.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_signature_file(path)

    return read


@pytest.mark.parametrize("signature", [LOCALIZATION_SIGNATURE, TRIANGULATION, MULTI_MODAL])
def test_what_is_written_is_read_again(signature, tmp_path):
    path = write_signature_file(signature, tmp_path / "net.signature.yaml")
    found = read_signature_file(path)
    assert found.signature == signature
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    # And what another program makes of it is plain data.
    assert yaml.safe_load(path.read_text()).keys() == {"inputs", "outputs", "axes"}


def test_the_form_by_hand(file):
    found = file(SMALL + "axes:\n  - {name: time, permutable: true}\n").signature
    assert found.inputs == (TensorSpec("x", "float32", ("batch", "time"), range=(-1.0, 1)),)
    assert found.outputs[0].unit == "degrees latitude, longitude"
    assert found.axes == (Axis("time", (1, 2, 3, 8), permutable=True),)


def test_every_problem_is_said_with_its_line_and_place(file):
    with pytest.raises(DataError) as raised:
        file(
            """\
inputs:
  - name: on
    dtypes: float32
    shape:
      - batch
      - 0
    range: [1, .inf]
  - {name: mask, dtype: object, shape: [], masks: x}
outputs:
  - {name: y, dtype: float32, shape: [batch, 2], sigma_off: z}
axis: []
"""
        )
    problems = str(raised.value).splitlines()[1:]
    assert [line.partition(": ")[0] for line in problems] == [
        "  - line 2, inputs[0].name",
        "  - line 2, inputs[0].dtype",
        "  - line 6, inputs[0].shape[1]",
        "  - line 7, inputs[0].range[1]",
        "  - line 3, inputs[0].dtypes",
        "  - line 8, inputs[1].dtype",
        "  - line 8, inputs[1].shape",
        "  - line 8, inputs[1].masks",
        "  - line 10, outputs[0].sigma_off",
        "  - line 11, axis",
    ]
    said = " ".join(problems)
    for words in (
        "in quotes if YAML takes it for something else, found True",
        "did you mean dtype?",
        "did you mean sigma_of?",
        "did you mean axes?",
        "found 0",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "found nothing"),
        ("- a", "found"),
        (b"\xff\xfe\x00", "no YAML"),
        ("a: [", "line 1, column 5"),
        ("a: &a [x]\nb: *a", "line 2, column 4: found an alias"),
        ("<<: {inputs: []}", "no YAML"),
        (SMALL + "outputs: []", "line 8, column 1: the key 'outputs' is there twice"),
        ("inputs: []\noutputs: []", "a list of 1 to 200 inputs"),
        ("9" * 60_000, "no YAML"),
        ("[" * 3_000, "nested too deeply"),
        ("x" * 70_000, "at most 65,536 bytes"),
        ("inputs: [" + "{}," * 20_000 + "]\noutputs: 3", "a list of 1 to 200 outputs"),
        (SMALL.replace("time]", "time, 99999999]"), "16,777,216"),
        (
            SMALL + f"axes: [{{name: time, lengths: [2, {1 << 24}]}}]",
            "one sample has 16,777,218 elements",
        ),
        (SMALL.replace("1]}", "1" + "0" * 400 + "]}"), "two finite numbers"),
        (SMALL + "axes: [{name: tme}]", "axis 'tme' is in no input"),
        (SMALL.replace("[-1e0, 1]", "[2, 1]"), "the low end must come first"),
        (SMALL.replace("2]", "2]\n    sigma_of: z"), "sigma_of of y is 'z'"),
    ],
    ids=lambda value: ascii(value)[:24],
)
def test_what_is_no_signature_is_refused_in_words_and_soon(content, words, file):
    started = time.perf_counter()
    with pytest.raises(DataError) as raised:
        file(content)
    assert words in str(raised.value)
    assert len(str(raised.value)) < 3000
    assert time.perf_counter() - started < 10


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_damage_brings_anything_but_a_signature_or_a_data_error(tmp_path_factory, data):
    content = bytearray(SMALL.encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path_factory.getbasetemp() / "damaged.signature.yaml"
    path.write_bytes(bytes(content))
    try:
        found = read_signature_file(path)
    except DataError:
        return
    assert found.signature.problems() == []


def test_a_folder_or_a_dangling_link_is_said_not_passed_over(tmp_path):
    checkpoint = tmp_path / "net.ckpt"
    assert find_signature_file(checkpoint) is None
    signature_path(checkpoint).symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match="No such file"):
        find_signature_file(checkpoint)
    with pytest.raises(DataError, match="directory"):
        read_signature_file(tmp_path)


def test_names_that_can_not_be_read_again_are_not_written(tmp_path):
    named = Signature(
        (TensorSpec("a b", "float32", ("batch", 2)),), (TensorSpec("y", "float32", ("batch",)),)
    )
    with pytest.raises(DataError, match=r"inputs\[0\]\.name"):
        write_signature_file(named, tmp_path / "x.signature.yaml")
    assert not list(tmp_path.iterdir())


# Beside a checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "best.epoch-3.pt"
    torch.save(UndeclaredMultiModalNet().state_dict(), path)
    return path


def test_it_declares_what_the_class_does_not(checkpoint):
    arrays = generic_inputs(MULTI_MODAL, 4, lengths={"receivers": 5})
    bare = load_checkpoint(
        checkpoint, model="families:UndeclaredMultiModalNet", arrays=lambda: arrays
    )
    assert [spec.dtype for spec in bare.signature.inputs] == [s.dtype for s in MULTI_MODAL.inputs]
    assert {spec.shape[1] for spec in bare.signature.inputs} == {"length"}
    assert bare.signature == signature_of(bare.model)
    assert "| signature | found, not declared |" in checkpoint_table(bare).data
    assert "inputs: iq, features" in checkpoint_table(bare).data
    unknown = load_checkpoint(checkpoint, model="families:UndeclaredMultiModalNet")
    with pytest.raises(DataError, match="declares no signature, and none was found") as caught:
        checkpoint_table(unknown)
    # IPython can't show an error out of a template, and a release would not say what is wrong.
    assert all(str(entry.path).endswith(".py") for entry in caught.traceback)
    path = write_signature_file(MULTI_MODAL, signature_path(checkpoint))
    assert path.name == "best.epoch-3.signature.yaml"
    loaded = load_checkpoint(checkpoint, model="families:UndeclaredMultiModalNet")
    assert loaded.signature == signature_of(loaded.model) == MULTI_MODAL
    assert loaded.signature_file.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    row = "| signature declared by | the file best.epoch\\-3.signature.yaml |"
    assert row.replace("\\", "") in checkpoint_table(loaded).data.replace("\\", "")
    # The class stays as it is.
    assert not hasattr(UndeclaredMultiModalNet, "signature")


def test_it_wins_over_what_the_class_declares(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(Triangulator().state_dict(), path)
    declared = load_checkpoint(path, model="families:Triangulator")
    assert declared.signature_source == "the model's class"
    other = Signature(TRIANGULATION.inputs, TRIANGULATION.outputs, (Axis("receivers", (3, 5)),))
    write_signature_file(other, signature_path(path))
    loaded = load_checkpoint(path, model="families:Triangulator")
    assert loaded.signature == signature_of(loaded.model) == other
    assert Triangulator.signature == TRIANGULATION


def test_a_broken_one_is_refused_before_the_checkpoint_is_read(checkpoint):
    signature_path(checkpoint).write_text("inputs: 3")
    with pytest.raises(DataError, match=r"best\.epoch-3\.signature\.yaml"):
        load_checkpoint(checkpoint, model="families:UndeclaredMultiModalNet")


class Fixed(Triangulator):
    """Its signature is computed, so that nothing can replace it."""

    signature = property(lambda self: TRIANGULATION)


def test_a_signature_that_can_not_be_replaced_is_said(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(Triangulator().state_dict(), path)
    write_signature_file(TRIANGULATION, signature_path(path))
    with pytest.raises(DataError, match="remove one of the two"):
        load_checkpoint(path, model=f"{__name__}:Fixed")
