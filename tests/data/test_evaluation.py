import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.data import npz
from heimdall_onnx.data.evaluation import SYNTHETIC_SAMPLES, first_rows, load_evaluation_data
from heimdall_onnx.model.signature import Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec("x", "float32", ("batch", 3)), TensorSpec("k", "int64", ("batch",))),
    outputs=(TensorSpec("y", "float32", ("batch",)),),
)
RECEIVERS = [{"name": "Alpha", "latitude": 50, "longitude": 8.5}]


def arrays(count=5, **others):
    good = {
        "x": np.arange(count * 3, dtype=np.float32).reshape(count, 3),
        "k": np.arange(count),
        "positions": np.tile([50.0, 8.0], (count, 1)),
        "meta": np.array(json.dumps({"receivers": RECEIVERS, "centre": [50, 8]})),
    }
    return {name: a for name, a in (good | others).items() if a is not None}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "eval.npz"


def load(file, **others):
    np.savez(file, **arrays(**others))
    return load_evaluation_data(file, SIGNATURE)


def refusal(file, **others):
    with pytest.raises(DataError) as caught:
        load(file, **others)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_first_rows_are_those_of_what_may_be_inputs(file):
    assert first_rows(None) is None
    np.savez(file, **arrays(big=np.ones((4, 2), ">f8"), names=np.array(["a", "b"])))
    found = first_rows(file)
    assert {name: rows.shape for name, rows in found.items()} == {
        "x": (3, 3),
        "k": (3,),
        "big": (3, 2),
    }
    assert found["big"].dtype.isnative


def test_everything_in_the_file_is_read(file):
    data = load(file)
    for name, array in data.inputs.items():
        np.testing.assert_array_equal(array, arrays()[name], strict=True)
    assert list(data.inputs) == ["x", "k"]
    np.testing.assert_array_equal(data.positions, arrays()["positions"])
    assert data.meta == {"receivers": RECEIVERS, "centre": [50, 8]}
    assert data.receivers == {"Alpha": (50.0, 8.5)}
    assert (data.count, data.source, data.synthetic) == (5, "eval.npz", False)
    assert data.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_path_may_be_text(file):
    np.savez(file, **arrays())
    assert load_evaluation_data(str(file), SIGNATURE).count == 5


def test_labels_and_meta_may_be_missing(file):
    data = load(file, positions=None, meta=None)
    assert (data.positions, data.meta, data.receivers) == (None, {}, {})


def test_compressed_file_is_read_as_well(file):
    np.savez_compressed(file, **arrays())
    assert load_evaluation_data(file, SIGNATURE).count == 5


def test_without_a_file_inputs_are_synthetic_seeded_and_called_so():
    data, again = (load_evaluation_data(None, SIGNATURE) for _ in range(2))
    assert data.synthetic
    assert (data.source, data.count) == ("synthetic inputs", SYNTHETIC_SAMPLES)
    np.testing.assert_array_equal(data.inputs["x"], again.inputs["x"])
    assert SIGNATURE.check_inputs(data.inputs, "here") == 64


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"provenance": "simulated", "receivers": RECEIVERS}, "simulated"),
        ({}, "not recorded"),
        ({"provenance": "recordings", "events": "x"}, "recordings"),
        (
            {
                "provenance": "recordings",
                "events": [
                    {"recordings": [{"start": "2020-08-13T09:00:00", "receiver": "B"}]},
                    {"recordings": [{"start": None, "receiver": "A"}]},
                ],
            },
            "2 recordings, from 2020-08-13T09:00:00, of A, B",
        ),
    ],
)
def test_provenance_is_what_the_file_says(file, meta, said):
    assert load(file, meta=np.array(json.dumps(meta))).provenance == said
    made = "seeded random numbers, integers from 0 to 1"
    assert load_evaluation_data(None, SIGNATURE).provenance == made


def test_rows_wrap_around(file):
    np.testing.assert_array_equal(load(file).rows([4, 5, 11])["k"], [4, 0, 1])


@pytest.mark.parametrize("read", [1, 8 << 20])
def test_batches_cover_every_sample_once_in_order(file, monkeypatch, read):
    monkeypatch.setattr("heimdall_onnx.data.evaluation.READ_BYTES", read)
    data = load(file)
    parts, batches, truth = zip(*data.batches(2), strict=True)
    assert [(p.start, p.stop) for p in parts] == [(0, 2), (2, 4), (4, 5)]
    np.testing.assert_array_equal(np.concatenate([b["x"] for b in batches]), data.inputs["x"])
    np.testing.assert_array_equal(
        np.concatenate([known["positions"] for known in truth]), data.positions
    )
    (only,) = data.batches(2, range(2, 4))
    assert only[0] == slice(2, 4)


def test_head_keeps_labels_and_provenance(file):
    data = load(file)
    head = data.head(2)
    assert head.count == len(head.positions) == 2
    assert (head.meta, head.sha256, head.receivers) == (data.meta, data.sha256, data.receivers)
    assert load(file, positions=None).head(2).positions is None


def test_every_problem_is_named_at_once(file):
    message = refusal(
        file,
        x=np.full((5, 3), np.nan),
        k=np.zeros((4, 2)),
        positions=np.zeros((5, 3)),
        meta=np.array("{"),
    )
    for expected in (
        "k has dtype float64, expected int64",
        "x has NaN or Inf in 5 samples, first in sample 0",
        "k has shape (4, 2), expected ('batch',)",
        "different numbers of samples: [4, 5]",
        "`positions` must be degrees",
        "`meta` is not JSON",
    ):
        assert expected in message


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ({"x": None}, r"no array 'x'; found \['k'\]"),
        ({"x": None, "k": None}, r"no array 'x'; found \['meta', 'positions'\]"),
        ({"x": np.zeros((5, 4), np.float32)}, r"x has shape \(5, 4\)"),
        ({"x": np.zeros((), np.float32)}, r"x has shape \(\)"),
        ({"x": np.zeros((0, 3), np.float32)}, "x has no samples"),
        ({"x": np.full((5, 3), np.inf, np.float32)}, "NaN or Inf"),
        ({"x": np.array([["a"] * 3] * 5)}, "x has dtype <U1"),
        ({"positions": np.zeros((4, 2))}, r"shape \(5, 2\), found float64 \(4, 2\)"),
        ({"positions": np.zeros(())}, r"shape \(5, 2\), found float64 \(\)"),
        ({"positions": np.array([["50", "8"]] * 5)}, "found <U2"),
        ({"positions": np.array([[50.0, 8]] * 4 + [[91, 0]])}, "first in sample 4"),
        ({"positions": np.array([[50.0, 8]] * 3 + [[0, 181]] * 2)}, "2 samples, first in sample 3"),
        ({"positions": np.full((5, 2), np.nan)}, "5 samples, first in sample 0"),
        ({"meta": np.array("not JSON")}, "`meta` is not JSON text"),
        ({"meta": np.array("[" * 100_000)}, "`meta` is not JSON text"),
        ({"meta": np.array([1, 2])}, "`meta` is not JSON text"),
        ({"meta": np.array("[1]")}, "must be a JSON object, found list"),
        ({"meta": np.array('{"receivers": [{"name": "A"}]}')}, "`meta.receivers` must be a list"),
        ({"meta": np.array('{"receivers": 3}')}, "`meta.receivers` must be a list"),
        ({"meta": np.array('{"receivers": null}')}, "`meta.receivers` must be a list"),
        ({"meta": np.array('{"centre": "here"}')}, "`meta.centre` must be a latitude and a"),
        ({"meta": np.array('{"centre": [1]}')}, "`meta.centre`"),
        ({"meta": np.array('{"centre": [91, 0]}')}, "`meta.centre`"),
        ({"meta": np.array('{"centre": [NaN, 0]}')}, "`meta.centre`"),
        ({"meta": np.array('{"centre": [0, 181]}')}, "`meta.centre`"),
        ({"meta": np.array('{"centre": 7}')}, "`meta.centre`"),
        ({"meta": np.array('{"centre": [1' + "0" * 400 + ", 0]}")}, "`meta.centre`"),
        ({"meta": np.array('{"a": ' + "9" * 5000 + "}")}, "`meta` is not JSON text: Exceeds"),
        (
            {"meta": np.array('{"receivers": [{"name": 1, "latitude": 1' + "0" * 400 + "}]}")},
            "`meta.receivers` must be a list",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(file, others, expected):
    np.savez(file, **arrays(**others))
    with pytest.raises(DataError, match=expected):
        load_evaluation_data(file, SIGNATURE)


@pytest.mark.parametrize("place", [[-90.0, -180.0], [90.0, 180.0]])
def test_positions_at_the_ends_of_the_earth_are_positions(file, place):
    assert load(file, positions=np.tile(place, (5, 1))).positions is not None


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["x", "meta", "other"])
def test_pickled_array_is_refused_without_running_it(file, tmp_path, name):
    trap = np.array([Trap(tmp_path / "sprung")] * 5)
    message = refusal(file, **{name: trap})
    assert "can't be read" in message
    assert not (tmp_path / "sprung").exists()
    with np.load(file, allow_pickle=True) as archive:
        assert archive[name].size == 5
    assert (tmp_path / "sprung").exists(), "the trap itself works"


def test_bare_pickle_is_refused_without_running_it(file, tmp_path):
    import pickle

    file.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match="can't be read"):
        load_evaluation_data(file, SIGNATURE)
    assert not (tmp_path / "sprung").exists()


def test_one_array_is_not_taken_for_one_of_two_inputs(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"no array 'x'; found \[''\]"):
        load_evaluation_data(tmp_path / "x.npy", SIGNATURE)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_evaluation_data(tmp_path / "none.npz", SIGNATURE)
    with pytest.raises(DataError, match=r"zarr\.json can't be read \(No such file"):
        load_evaluation_data(tmp_path, SIGNATURE)


@pytest.mark.parametrize("content", [b"", b"PK", b"text, not data", bytes(100)])
def test_other_files_are_refused(file, content):
    file.write_bytes(content)
    with pytest.raises(DataError, match="can't be read"):
        load_evaluation_data(file, SIGNATURE)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_truncated_file_is_refused(file, keep):
    np.savez(file, **arrays())
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(DataError, match="can't be read"):
        load_evaluation_data(file, SIGNATURE)


def test_encrypted_file_is_refused(file):
    np.savez(file, **arrays())
    content = bytearray(file.read_bytes())
    for marker, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.index(marker)
        content[start + offset] |= 1  # the flag of an encrypted member
    file.write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        load_evaluation_data(file, SIGNATURE)


@pytest.mark.parametrize("count", [2**38, 2**62, 2**80])
def test_header_that_claims_an_absurd_shape_is_refused_at_once(file, count):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count}, 3)}}".ljust(117) + "\n"
    lie = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(60)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x.npy", lie)
    # In a process with little memory: a promise of terabytes must not be believed.
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        "from test_evaluation import *\n"
        "try: load_evaluation_data(sys.argv[1], SIGNATURE)\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "can't be read" in done.stdout, done.stderr


def test_member_that_is_no_array_is_no_input(file):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays(x=None))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("x", "text")
        archive.writestr("readme.txt", "text")
    file.write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="no array 'x'"):
        load_evaluation_data(file, SIGNATURE)


def test_large_arrays_are_used_from_their_file(file, monkeypatch):
    expected = load(file, count=23)
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 0)
    found = load(file, count=23)
    assert isinstance(found.inputs["x"], np.memmap)
    assert (found.count, found.sha256, found.receivers) == (
        expected.count,
        expected.sha256,
        expected.receivers,
    )
    np.testing.assert_array_equal(found.positions, expected.positions)
    for rows in ([0], [22, 23, 24], range(8)):
        for name, array in expected.rows(rows).items():
            np.testing.assert_array_equal(found.rows(rows)[name], array)
    for (part, ours, _), (other, theirs, _) in zip(
        found.batches(5), expected.batches(5), strict=True
    ):
        assert part == other
        for name, array in theirs.items():
            np.testing.assert_array_equal(ours[name], array)
    assert found.head(7).count == 7
    assert found.head(99) is found


def test_values_in_a_large_array_are_checked_too(file, monkeypatch):
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("heimdall_onnx.common.arrays.PART_BYTES", 24)
    bad = np.zeros((5, 3), np.float32)
    bad[3, 1] = np.nan
    assert "NaN or Inf in 1 samples, first in sample 3" in refusal(file, x=bad)
