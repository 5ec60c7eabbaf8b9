"""What a pickle asks for is found out before it gets it."""

import pickle
import time
import zipfile
from collections import OrderedDict

import pytest
import torch

from heimdall_onnx.model.pickles import check_pickles

MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)


def doubled(depth):
    """A dictionary whose one key takes two to the power of ``depth`` steps to be hashed."""
    doubling = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))
    return b"\x80\x02}(" + b")" + doubling + b"K\x01u."


def zipped(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
    return path


@pytest.mark.parametrize("zip_layout", [True, False])
def test_real_checkpoint_asks_for_no_more_than_it_holds(tmp_path, zip_layout):
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "view": torch.arange(40.0)[::2],
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        "integers": torch.ones(5, dtype=torch.int64),
    }
    plain = {"seed": 2**63, "time_ns": 1_795_000_000_000_000_000, "betas": (0.9, 0.999)}
    optimizer = torch.optim.Adam([tensors["parameter"]])
    tensors["parameter"].grad = torch.ones(2, 3)
    optimizer.step()
    content = {
        "state_dict": OrderedDict(tensors),
        "hyper_parameters": plain,
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {("a", 1): {2**40, 3}},
    }
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_layout)
    check_pickles(tmp_path / "a.pt")


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_key_that_takes_years_to_hash_is_refused(tmp_path, layout):
    path = tmp_path / "a.pt"
    if layout == "zip":
        zipped(path, doubled(200))
    else:
        path.write_bytes((MAGIC if layout == "legacy" else b"") + doubled(200))
    start = time.monotonic()
    with pytest.raises(ValueError, match="so that hashing one takes more than 1,000,000 steps"):
        check_pickles(path)
    assert time.monotonic() - start < 5


def test_shallow_tuples_are_no_burden(tmp_path):
    check_pickles(zipped(tmp_path / "a.pt", doubled(15)))


@pytest.mark.parametrize("zip_layout", [True, False])
def test_tensor_larger_than_the_file_is_refused(tmp_path, zip_layout):
    expanded = torch.zeros(1).expand(10**12)  # PyTorch saves four bytes
    torch.save({"a": expanded}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_layout)
    with pytest.raises(
        ValueError, match=r"it claims 1,000,000,000,000 elements, with [\d,]+ bytes"
    ):
        check_pickles(tmp_path / "a.pt")


def test_buffer_larger_than_the_file_is_refused(tmp_path):
    call = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R."
    with pytest.raises(ValueError, match="it claims 1,000,000,000,000 elements"):
        check_pickles(zipped(tmp_path / "a.pt", call))


@pytest.mark.parametrize(
    ("signature", "offset", "value", "words"),
    [
        (b"PK\x05\x06", 0, 0, "not a zip file"),
        (b"PK\x01\x02", 42, 1, "Bad magic number"),
        (b"PK\x01\x02", 8, 1, "is encrypted"),
        (b"PK\x01\x02", 8, 32, "compressed patched data"),
    ],
    ids=["no directory", "no member", "encrypted", "of a later standard"],
)
def test_archive_that_can_not_be_opened_is_refused(tmp_path, signature, offset, value, words):
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.zeros(2)}, path)
    content = bytearray(path.read_bytes())
    # In the directory the member with the pickle comes first.
    content[content.index(signature) + offset] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        check_pickles(path)


def test_compressed_checkpoint_is_refused(tmp_path):
    zipped(tmp_path / "a.pt", pickle.dumps({"a": 1}, 2) + bytes(10**6), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"its member 'archive/data\.pkl' is compressed"):
        check_pickles(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "exhausted"),
        (b"\x80\x02}", "exhausted"),
        (b"\x80\x02h\x07.", "its pickle is broken"),
        (b"\x80\x02u.", "its pickle is broken"),
        (b"\x80\x02X\xff\xff\xff\xff.", "expected 4294967295 bytes"),
    ],
)
def test_broken_pickle_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        check_pickles(zipped(tmp_path / "a.pt", content))
