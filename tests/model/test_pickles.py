"""Whatever a pickle names, nothing is imported, called or set aside for it."""

import copy
import io
import pickle
import time
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch

from heimdall_onnx.model.pickles import (
    Placeholder,
    StoredTensor,
    name_of,
    read_pickle,
    read_torch,
)

MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, 2)


def doubled(depth):
    """A dictionary whose one key takes two to the power of ``depth`` steps to be hashed."""
    doubling = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(depth))
    return b"\x80\x02}(" + b")" + doubling + b"K\x01u."


def read(path):
    with path.open("rb") as file:
        return read_torch(file)


def unpickled(data):
    return read_pickle(io.BytesIO(data))


def zipped(path, content, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", content)
    return path


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zip_layout", [True, False])
def test_real_checkpoint_is_read_as_pytorch_reads_it(tmp_path, zip_layout, protocol):
    tensors = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.0),
        "view": torch.arange(40.0)[::2],
        "transposed": torch.arange(6, dtype=torch.int16).reshape(2, 3).t(),
        "parameter": torch.nn.Parameter(torch.ones(2, 3)),
        **{str(d): torch.ones(5).to(d) for d in (torch.bool, torch.bfloat16, torch.complex64)},
    }
    if zip_layout:
        tensors["small"] = torch.ones(3).to(torch.float8_e4m3fn)
    plain = {"seed": 2**63, "betas": (0.9, 0.999), "size": torch.Size([2**40]), "none": None}
    optimizer = torch.optim.Adam([tensors["parameter"]])
    tensors["parameter"].grad = torch.ones(2, 3)
    optimizer.step()
    content = {
        "state_dict": OrderedDict(tensors),
        "hyper_parameters": plain,
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {("a", 1): {2**40, 3}},
        "bytes": [b"ab", "\u00fc"],
    }
    path = tmp_path / "a.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zip_layout)
    found = copy.deepcopy(read(path))
    assert str(found) == str(content).replace("Parameter containing:\n", "").replace(
        ", requires_grad=True", ""
    )
    for name, value in tensors.items():
        assert found["state_dict"][name].dtype == value.dtype


def test_memory_of_tensors_is_shared_with_a_file_that_stays_as_it_is(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    tensor = read(tmp_path / "a.pt")["a"].tensor()
    assert tensor.mul_(2).tolist() == [2, 2, 2]
    assert torch.load(tmp_path / "a.pt")["a"].tolist() == [1, 1, 1]


def test_each_class_is_only_a_name(tmp_path):
    found = unpickled(pickle.dumps([Kept(1), Kept, Kept.Inner(), {Kept(2): 3}], 2))
    assert [name_of(one) for one in found[:3]] == [
        f"{__name__}.Kept{i}" for i in ("", "", ".Inner")
    ]
    assert isinstance(found[0], Placeholder)
    assert found[0].attributes == {"value": 1}


class Kept:
    class Inner:
        pass

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    "name", ["os system", "posix system", "builtins eval", "__builtin__ eval", "subprocess Popen"]
)
def test_what_is_there_to_be_run_is_refused(name):
    call = f"c{name.replace(' ', chr(10))}\n(S'echo'\ntR.".encode()
    with pytest.raises(ValueError, match=r"would run\. Nothing of it was run here"):
        unpickled(call)


@pytest.mark.parametrize(
    "change",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}N}X\x08\x00\x00\x00__code__K\x01s\x86b.",
        b"c__builtin__\nset\n}X\x03\x00\x00\x00addK\x01sb.",
        b"ccollections\nCounter\n}N}X\x06\x00\x00\x00updateK\x01s\x86b.",
        b"ca\nB\n}X\x04\x00\x00\x00nameK\x01sb.",
    ],
)
def test_nothing_that_outlives_the_reading_can_be_changed(change):
    before = [vars(kind).copy() for kind in (Placeholder, Counter)]
    found = unpickled(change)
    assert not isinstance(found, Placeholder) or found.name == "a.B"
    assert [vars(kind) for kind in (Placeholder, Counter)] == before


def test_an_object_that_is_there_a_million_times_is_restored_once():
    twice = b"\x80\x02]" + b"".join(b"q\x00]h\x00ah\x00a" for _ in range(60)) + b"."
    start = time.process_time()
    assert len(copy.deepcopy(unpickled(twice))) == 2
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "claim",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a place among the noted objects
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",  # a buffer
        b"\x80\x04\x95" + (2**40).to_bytes(8, "little") + b"}.",  # a frame
    ],
)
def test_nothing_is_set_aside_for_a_claim(claim):
    try:
        assert not unpickled(claim)
    except ValueError as error:
        assert "its pickle is broken" in str(error)  # noqa: PT017 - either will do


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare"])
def test_key_that_takes_years_to_hash_is_refused(tmp_path, layout):
    path = tmp_path / "a.pt"
    if layout == "zip":
        zipped(path, doubled(200))
    else:
        path.write_bytes((MAGIC if layout == "legacy" else b"") + doubled(200))
    start = time.process_time()
    with pytest.raises(ValueError, match="so that hashing one takes more than 100,"):
        read(path)
    assert time.process_time() - start < 5


def test_keys_that_take_long_to_hash_again_and_again_are_refused():
    depth, repeated = 15, b"h\x0eK\x01s"
    made = doubled(depth)[:-4] + b"q\x0e0}(" + repeated[:-1] + b"u"
    start = time.thread_time()
    with pytest.raises(ValueError, match="longer to read than its size explains"):
        unpickled(made + 5000 * repeated + b".")
    assert time.thread_time() - start < 3


def test_text_of_any_length_is_not_made_in_a_file(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(MAGIC + b"\x80\x04\x8e" + (2**45).to_bytes(8, "little") + b"a.")
    with pytest.raises(ValueError, match="its pickle is broken"):
        read(path)


def test_shallow_tuples_are_no_burden(tmp_path):
    read(zipped(tmp_path / "a.pt", doubled(15)))


@pytest.mark.parametrize("zip_layout", [True, False])
def test_tensor_larger_than_the_file_is_refused_once_it_is_needed(tmp_path, zip_layout):
    expanded = torch.zeros(1).expand(10**12)  # PyTorch saves four bytes
    torch.save({"a": expanded}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_layout)
    found = read(tmp_path / "a.pt")["a"]
    assert isinstance(found, StoredTensor)
    with pytest.raises(
        ValueError, match=r"it claims 1,000,000,000,000 elements, with [\d,]+ bytes"
    ):
        found.tensor()


def test_buffer_of_any_size_is_not_made():
    call = b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + (10**12).to_bytes(6, "little") + b"\x85R."
    with pytest.raises(ValueError, match="its pickle is broken"):
        unpickled(call)


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
        read(path)


def test_compressed_checkpoint_is_refused(tmp_path):
    zipped(tmp_path / "a.pt", pickle.dumps({"a": 1}, 2) + bytes(10**6), zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"its member 'archive/data\.pkl' is compressed"):
        read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "EOFError"),
        (b"\x80\x02}", "EOFError"),
        (b"\x80\x02h\x07.", "its pickle is broken"),
        (b"\x80\x02u.", "its pickle is broken"),
        (b"\x80\x02X\xff\xff\xff\xff.", "EOFError"),
    ],
)
def test_broken_pickle_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(zipped(tmp_path / "a.pt", content))
