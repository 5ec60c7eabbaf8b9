"""Arrays of an .npz are the same whether they are read whole or mapped."""

import os
import pickle
import zipfile

import numpy as np
import pytest

from heimdall_onnx.data import npz
from heimdall_onnx.data.npz import read_npz

WRITERS = pytest.mark.parametrize("write", [np.savez, np.savez_compressed])


@pytest.fixture
def streamed(monkeypatch):
    """Every array counts as a large one."""
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 0)


def read(path):
    with path.open("rb") as file:
        return read_npz(file)


def save_members(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def arrays():
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((37, 3, 5)).astype(np.float32),
        "labels": rng.integers(0, 9, 37),
        "big_endian": rng.standard_normal((37, 2)).astype(">f8"),
        "empty_rows": np.zeros((37, 0), np.float32),
        "nothing": np.zeros((0, 4), np.float32),
    }


@WRITERS
def test_rows_read_from_the_file_are_the_arrays_own(tmp_path, streamed, write):
    write(tmp_path / "a.npz", **arrays(), columns=np.asfortranarray(arrays()["x"]))
    found = read(tmp_path / "a.npz")
    for name, expected in (arrays() | {"columns": arrays()["x"]}).items():
        array = found[name]
        assert isinstance(array, np.memmap)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(array[5:11], expected[5:11])


def test_small_arrays_are_in_memory(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    found = read(tmp_path / "a.npz")
    assert not any(isinstance(array, np.memmap) for array in found.values())
    np.testing.assert_array_equal(found["x"], arrays()["x"])


@WRITERS
def test_python_objects_are_refused(tmp_path, streamed, write):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    write(tmp_path / "a.npz", x=np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises((ValueError, pickle.UnpicklingError), match="allow_pickle=False"):
        read(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


@WRITERS
def test_damage_is_told_by_the_checksum(tmp_path, streamed, write):
    path = tmp_path / "a.npz"
    write(path, x=arrays()["x"])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(Exception, match=r"Bad CRC-32|decompressing"):
        read(path)


def test_header_that_claims_more_than_there_is_is_refused(tmp_path, streamed):
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    lie = (tmp_path / "x.npy").read_bytes().replace(b"(3, 4)", b"(9, 4)")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", lie)
    with pytest.raises(ValueError, match=r"x.npy claims the shape \(9, 4\) of float64"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", ["(2147483648,)", "(-1, 4)", "(3, 4, 0)", "()"])
def test_small_array_that_claims_another_size_is_refused_as_well(tmp_path, shape):
    np.save(tmp_path / "x.npy", np.zeros((3, 4)))
    lie = (tmp_path / "x.npy").read_bytes()
    lie = lie.replace(b"(3, 4), }" + b" " * len(shape), f"{shape}, }}".encode() + b" " * 6)
    save_members(tmp_path / "a.npz", {"x.npy": lie})
    with pytest.raises(ValueError, match=r"x.npy claims the shape"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("header", ["[" * 9000, "-" * 9000 + "1", "{'descr': '<f4'}"])
def test_header_that_is_none_is_refused(tmp_path, header):
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    save_members(tmp_path / "a.npz", {"x.npy": content})
    with pytest.raises(ValueError, match=r"[Hh]eader"):
        read(tmp_path / "a.npz")


def test_header_of_an_unknown_version_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    content = bytearray((tmp_path / "x.npy").read_bytes())
    content[6] = 3
    save_members(tmp_path / "a.npz", {"x.npy": bytes(content)})
    with pytest.raises(ValueError, match=r"x.npy has the .npy version \(3, 0\)"):
        read(tmp_path / "a.npz")


def test_array_that_is_there_twice_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    content = (tmp_path / "x.npy").read_bytes()
    save_members(tmp_path / "a.npz", {"x.npy": content, "x": content})
    with pytest.raises(ValueError, match="it holds 'x' 2 times"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["x" * 201, "\x1b[2J.npy"])
def test_name_that_is_none_is_refused(tmp_path, name):
    save_members(tmp_path / "a.npz", {name: b""})
    with pytest.raises(ValueError, match="a name that is none"):
        read(tmp_path / "a.npz")


def test_archive_that_unpacks_out_of_all_proportion_is_refused_unread(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(10**6))
    assert read(tmp_path / "a.npz")["x"].size == 10**6  # no harm in what is small
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 10**6)
    with pytest.raises(ValueError, match=r"would unpack to 8,000,128, more than 200 times as much"):
        read(tmp_path / "a.npz")


def test_small_arrays_are_in_memory_while_there_is_room_for_all(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "IN_MEMORY_BYTES", 2000)
    np.savez(tmp_path / "a.npz", **{name: np.zeros((10, 10)) for name in "abc"})
    kinds = [type(array) for array in read(tmp_path / "a.npz").values()]
    assert kinds == [np.ndarray, np.ndarray, np.memmap]


def test_file_changed_later_changes_nothing(tmp_path, streamed):
    path = tmp_path / "a.npz"
    np.savez(path, x=arrays()["x"])
    found = read(path)["x"]
    path.write_bytes(b"")
    np.testing.assert_array_equal(found, arrays()["x"])


def test_too_little_room_for_unpacking_says_where_and_how_much(tmp_path, streamed, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=arrays()["x"])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(npz.shutil, "copyfileobj", full)
    with pytest.raises(OSError, match=r"unpacking x.npy needs 2,348 bytes in .*TMPDIR"):
        read(tmp_path / "a.npz")
