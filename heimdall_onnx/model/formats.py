"""What a checkpoint's file or folder is, told by its content without importing PyTorch."""

from __future__ import annotations

import difflib
import json
import os
import re
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.common.text import shown

Kind = Literal["pytorch", "safetensors", "distributed"]

_ORIGIN = "give the PyTorch weights that it was made of"
_KERAS = "only PyTorch's weights are read"
_PROGRAM = "it is a program with its weights; give the state dict of the module it was made of"
_DATA = "evaluation data are given as --eval-data"
_UNPACK = "unpack it and give the checkpoint in it"
# By the bytes at a place, what a file is.
_SIGNS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch its file with `git lfs pull`"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes it", _KERAS),
    (0, b"GGUF", "a GGUF file", _ORIGIN),
    (4, b"TFL3", "a TensorFlow Lite model", _ORIGIN),
    (0, b"\x93NUMPY", "a NumPy array", _DATA),
    (257, b"ustar", "a tar archive", _UNPACK),
    (0, b"\x1f\x8b", "a gzip archive", _UNPACK),
    (0, b"BZh", "a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard archive", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
)
# By the end of a member's name, what a ZIP archive is; the first that fits counts.
_ARCHIVES = (
    ("/constants.pkl", "a TorchScript archive", _PROGRAM),
    ("/archive_format", "a .pt2 archive of torch.export", _PROGRAM),
    ("serialized_exported_program.json", "a .pt2 archive of torch.export", _PROGRAM),
    ("MAR-INF/MANIFEST.json", "an archive of TorchServe", _UNPACK),
    (".weights.h5", "a Keras model", _KERAS),
    (".npy", "a NumPy archive (.npz)", _DATA),
)
# What stands for averages of weights, but not those of gradients that an optimizer keeps.
AVERAGED = re.compile(
    r"(^|[^a-z])(ema|swa|shadow|averag)|(?-i:[a-z](EMA|Ema|SWA|Averag))"
    r"|(?<!exp_)(?<!grad_)(?<!square_)(?<![a-z])avg(?![a-z])",
    re.IGNORECASE,
)
_SHARD = re.compile(r"-\d{3,}-of-(\d{3,})\.")
# By its name, what is only a part of a checkpoint.
_PARTS = (
    (r"\.distcp$", "one part of a distributed checkpoint", "give its folder"),
    (r"_optim_states", "DeepSpeed's state of an optimizer", "give the model_states beside it"),
    (r"-\d{3,}-of-(?!0*1\.)\d{3,}\.", "one of several shards", "give their folder or .index.json"),
)
_WHOLE = [
    f"{name}.{end}"
    for name in ("model", "pytorch_model", "diffusion_pytorch_model")
    for end in ("safetensors", "bin")
]
# A training of several networks numbers the files from the second one on.
_SECOND = re.compile(r"(pytorch_)?model_\d+\.(bin|safetensors)")
_ENDINGS = {".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors"}


@dataclass(frozen=True)
class Located:
    """A checkpoint that can be read.

    Attributes:
        path: What was given, ``~`` expanded.
        kind: How its files are read.
        files: They; several where it is in shards.
        beside: Others in the folder that were given with it, which hold the same if all is well.
    """

    path: Path
    kind: Kind
    files: tuple[Path, ...]
    beside: tuple[Path, ...] = ()


def locate(given: Path | str) -> Located:
    """Find a checkpoint's files and say how they are read.

    Raises:
        CheckpointError: If there is none, or it is something else, which is named with what to do.
    """
    path = Path(os.path.expanduser(given))  # noqa: PTH111 - it leaves users that there are not
    try:
        if not str(given) or not path.exists():
            raise _missing(str(given), path)
        if path.is_dir():
            return _folder(path)
        for pattern, what, advice in _PARTS:
            if re.search(pattern, path.name):
                raise _other(path, what, advice)
        return _file(path)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error


def _other(where: Path | str, what: str, advice: str = "") -> CheckpointError:
    text = f"expected a checkpoint at {where}, found {what}"
    return CheckpointError(text + (advice and f": {advice}"))


def _missing(given: str, path: Path) -> CheckpointError:
    what, advice, folder = "no such file", "", path.parent.is_dir()
    names = [file.name for file in path.parent.iterdir()] if folder else []
    if re.match(r"[a-z0-9+.-]+:/", given, re.IGNORECASE):
        # A path is absolute by the time that some callers have it, and has lost a slash.
        what, advice = "an address", "download it and give the file's path"
    elif path.is_symlink():
        what = f"a link to {path.readlink()}, where there is nothing"
    elif re.search(r"[*?\[]", given):
        what, advice = "a pattern that no file matches", "give a path; patterns are for a fleet"
    elif near := difflib.get_close_matches(path.name, names):
        advice = f"did you mean {' or '.join(near)}?"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not folder:
        advice = f"if it is on the Hugging Face hub, give what `hf download {given}` fetches"
    elif not folder:
        advice = f"there is no folder {path.parent} either"
    return _other(f"{given} ({path})" if given.startswith("~") else given or "a path", what, advice)


def _file(path: Path) -> Located:
    """A file as its first bytes have it, whatever its name."""
    if not path.is_file():
        raise _other(path, "neither a file nor a folder", "give one of them")
    with path.open("rb") as file:
        head = file.read(512)
    # A header's length (8 bytes, little-endian), which may look like anything; then JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return Located(path, "safetensors", (path,))
    for at, sign, what, advice in _SIGNS:
        if head[at:].startswith(sign):
            raise _other(path, what, advice)
    start = head.lstrip().lower()
    if not head:
        raise _other(path, "an empty file (0 bytes)", "copy or download it again")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise _other(path, "a web page", "the download has failed; open it to see why")
    if start.startswith(b"{"):
        return _index(path)
    if head.startswith(b"PK\x03\x04"):
        _require_pytorch(path)
    elif head[0] == 8 and head[2:3] in (b"\x12", b"\x1a", b"\x22", b"\x3a", b"\x42"):
        raise _other(path, "an ONNX model", _ORIGIN)
    return Located(path, "pytorch", (path,))


def _require_pytorch(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is truncated or damaged ({error}): copy or download it again"
        ) from error
    for ending, what, advice in _ARCHIVES:
        if any(f"/{name}".endswith(ending) for name in names):
            raise _other(path, what, advice)
    if not any(name.endswith("/data.pkl") for name in names):
        inside = ", ".join(names[:3]) or "nothing"
        raise _other(path, f"a ZIP archive with {shown(inside)}", _UNPACK)


def _index(path: Path) -> Located:
    """The shards that an index names, which all lie beside it."""
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        files = [path.parent / Path(name).name for name in names if name != path.name]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        files = []
    if not files:
        raise _other(path, "JSON text", "give the weights, not what describes them")
    return _shards(path, files)


def _shards(path: Path, files: list[Path]) -> Located:
    if missing := [file.name for file in files if not file.is_file()]:
        raise _other(path, f"shards, but not all of them: {shown(', '.join(missing))} is missing")
    kind, *_ = (_file(file).kind for file in files)
    return Located(path, kind, tuple(files))


def _folder(path: Path) -> Located:
    names = sorted(file.name for file in path.iterdir())
    if ".metadata" in names and (parts := [path / n for n in names if n.endswith(".distcp")]):
        return Located(path, "distributed", (path / ".metadata", *parts))
    if "latest" in names:  # of DeepSpeed
        step = Path((path / "latest").read_text(errors="replace").strip()).name
        names += [f"{step}/{file.name}" for file in (path / step).glob("*")]
    states = [name for name in names if name.endswith("model_states.pt")]
    if [Path(name).name for name in states] not in ([], ["mp_rank_00_model_states.pt"]):
        what = f"DeepSpeed's checkpoint in {len(states)} parts"
        raise _other(path, what, "give the file that `python zero_to_fp32.py` makes of them")
    whole = [n for n in (*(f"{name}.index.json" for name in _WHOLE), *_WHOLE) if n in names]
    averages = [n for n in names if AVERAGED.search(n) and Path(n).suffix in _ENDINGS]
    if whole and averages:
        what = f"a folder with {whole[0]} and {shown(', '.join(averages))}"
        raise _other(path, what, "give the file that is meant")
    for name, *others in filter(None, (whole, states)):
        if not any(map(_SECOND.fullmatch, names)):
            beside = tuple(path / other for other in others)
            return replace(_file(path / name), path=path, beside=beside)
    shards = [path / name for name in names if _SHARD.search(name)]
    if shards and len(shards) == int(_SHARD.search(shards[0].name)[1]):  # type: ignore[index]
        return _shards(path, shards)
    inside = [name for name in names if Path(name).suffix in _ENDINGS]
    inside = inside or [f"{name}/" for name in names if (path / name).is_dir()]
    what = f"a folder with {shown(', '.join(inside[:9])) or 'no checkpoint in it'}"
    raise _other(path, what, "give a file, or a folder as Hugging Face or DeepSpeed leaves it")
