"""Arrays in files of other tools: ``.npz``, ``.npy``, safetensors, tensors of PyTorch, Zarr."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heimdall_onnx.common.arrays import Arrays, parts
from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.text import shown
from heimdall_onnx.data.npz import read_npz, require_plausible
from heimdall_onnx.model.pickles import StoredTensor
from heimdall_onnx.model.readings import read_content

_Array = npt.NDArray[Any]

_TENSORS = (".pt", ".pth", ".safetensors")
_BFLOAT16 = np.dtype("V2")  # as NumPy reads what ml_dtypes has written

_CONVERT = (
    "Expected an .npz of plain arrays, one per input of the model, the sample axis first: "
    '`numpy.savez("eval.npz", image=images)`; an .npy of the only input, tensors by name in '
    "safetensors or of `torch.save`, or a folder of Zarr 3"
)


def read_arrays(path: Path) -> tuple[Arrays, str]:
    """Every array of a file or a Zarr 3 group by name, and the SHA-256 of what was read.

    The one array of an ``.npy`` or a single tensor is called ``""``; bfloat16 becomes float32.

    Raises:
        DataError: If it can't be read as data; what is expected is said.
    """
    try:
        if path.is_dir():
            return _read_group(path)
        if path.suffix in _TENSORS:
            return _read_tensors(path), hash_file(path)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            if path.suffix == ".npy":
                return {"": np.load(file, allow_pickle=False)}, sha256
            return read_npz(file), sha256
    except Exception as error:  # zipfile, zlib, NumPy and Zarr share no narrower base
        reason = shown(str(error) or type(error).__name__, 400)
        raise DataError(f"evaluation data {path} can't be read: {reason}. {_CONVERT}") from error


def _read_tensors(path: Path) -> Arrays:
    tree = read_content(path).tree
    found = tree if isinstance(tree, dict) else {"": tree}
    arrays = {}
    for name, value in found.items():
        if isinstance(value, StoredTensor):
            tensor = value.tensor()
            is_bfloat16 = str(tensor.dtype) == "torch.bfloat16"
            arrays[str(name)] = (tensor.float() if is_bfloat16 else tensor).numpy()
        elif isinstance(value, str | int | float):
            arrays[str(name)] = np.asarray(value)
        else:
            kind = type(value).__name__
            raise ValueError(f"{name!r} in it is no tensor but of type {kind}")
    return arrays


def _read_group(path: Path) -> tuple[Arrays, str]:
    import zarr

    group = zarr.open_group(str(path), mode="r", zarr_format=3)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    require_plausible(
        sum(f.stat().st_size for f in files), sum(a.nbytes for _, a in group.arrays())
    )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path).as_posix()} {hash_file(file)}\n".encode())
    return {name: np.asarray(array[:]) for name, array in group.arrays()}, digest.hexdigest()


def type_of(array: _Array) -> str:
    """The name of an array's type."""
    return "bfloat16" if array.dtype == _BFLOAT16 else str(array.dtype)


def converted(array: _Array, dtype: str) -> _Array:
    """An array in the type of a model's input, where that loses no more than float precision.

    Floats become floats; integers and booleans one another if every value stays what it is. All
    else, as 8-bit pixels for floats, whose scale nobody has said, is given back as it is.
    """
    want, have = np.dtype(dtype), array.dtype
    if want == have:
        return array
    given = array
    if have == _BFLOAT16 and want.kind == "f":
        import ml_dtypes

        given = array.view(ml_dtypes.bfloat16)
    elif have.kind + want.kind != "ff" and not {have.kind, want.kind} <= set("iub"):
        return array
    with np.errstate(over="ignore"):  # becomes infinite, which is refused with its sample
        became: _Array = given.astype(want)
    if want.kind != "f" and any(
        (became[start : start + len(part)] != part).any() for start, part in parts(array)
    ):
        return array
    return became
