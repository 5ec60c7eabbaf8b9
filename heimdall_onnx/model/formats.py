"""What a checkpoint's file or folder is, told by its content without importing PyTorch."""

from __future__ import annotations

import difflib
import json
import re
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heimdall_onnx.common.errors import CheckpointError
from heimdall_onnx.common.text import shown

Kind = Literal["pytorch", "safetensors", "distributed"]

_ORIGIN = "give the PyTorch weights that it was made of"
_KERAS = "only PyTorch's weights are read"
_PROGRAM = "it is a program with its weights; give the state dict of the module it was made of"
_UNPACK = "unpack it and give the checkpoint in it"
# By the bytes at a place, what a file is.
_SIGNS = (
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch its file with `git lfs pull`"),
    (0, b"\x89HDF", "an HDF5 file, as Keras writes it", _KERAS),
    (0, b"GGUF", "a GGUF file", _ORIGIN),
    (4, b"TFL3", "a TensorFlow Lite model", _ORIGIN),
    (0, b"\x93NUMPY", "a NumPy array", "evaluation data are given as --eval-data"),
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
    (".npy", "a NumPy archive (.npz)", "evaluation data are given as --eval-data"),
)
_SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})\.")
_WHOLE = ("model", "pytorch_model", "diffusion_pytorch_model")
_INDEXES = [f"{name}.{end}.index.json" for name in _WHOLE for end in ("safetensors", "bin")]
_SINGLE = [f"{name}.{end}" for name in _WHOLE for end in ("safetensors", "bin")]
_DEEPSPEED = "mp_rank_00_model_states.pt"
_ENDINGS = {".pt", ".pth", ".ckpt", ".tar", ".bin", ".safetensors"}


@dataclass(frozen=True)
class Located:
    """A checkpoint that can be read.

    Attributes:
        path: What was given, ``~`` expanded.
        kind: How its files are read.
        files: They; several where it is in shards.
    """

    path: Path
    kind: Kind
    files: tuple[Path, ...]


def locate(given: Path | str) -> Located:
    """Find a checkpoint's files and say how they are read.

    Raises:
        CheckpointError: If there is none, or it is something else, which is named with what to do.
    """
    path = Path(str(given))
    try:
        path = _existing(str(given))
        if path.is_dir():
            return _folder(path)
        if not path.is_file():
            raise _other(path, "neither a file nor a folder", "give one of them")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    if path.suffix == ".distcp":
        raise _other(path, "one part of a distributed checkpoint", f"give its folder {path.parent}")
    if (shard := _SHARD.search(path.name)) and int(shard[2]) > 1:
        what = f"shard {int(shard[1])} of {int(shard[2])}"
        raise _other(path, what, f"give the folder {path.parent} or the .index.json in it")
    if "_optim_states" in path.name:
        raise _other(path, "DeepSpeed's state of an optimizer", f"give {_DEEPSPEED} beside it")
    return _file(path, head)


def _other(path: Path, what: str, advice: str) -> CheckpointError:
    return CheckpointError(f"expected a checkpoint at {path}, found {what}: {advice}")


def _existing(text: str) -> Path:
    path = Path(text)
    with suppress(RuntimeError):  # of a user that there is not
        path = path.expanduser()
    if path.exists() and text:
        return path
    problem, advice = "no such file", ""
    near = difflib.get_close_matches(path.name, _names(path.parent), n=3)
    if re.match(r"[a-z0-9+.-]+:/", text, re.IGNORECASE):
        # A path is absolute by the time that some callers have it, and has lost a slash.
        problem, advice = "an address", "download it and give the file's path"
    elif path.is_symlink():
        problem = f"a link to {path.readlink()}, where there is nothing"
    elif re.search(r"[*?\[]", text):
        problem, advice = "a pattern that no file matches", "give a path; patterns are for a fleet"
    elif near:
        advice = f"did you mean {' or '.join(near)}?"
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not path.parent.exists():
        advice = f"if it is on the Hugging Face hub, give what `hf download {text}` fetches"
    elif not path.parent.exists():
        advice = f"there is no folder {path.parent} either"
    if text.startswith("~"):
        text += f" ({path})"
    raise CheckpointError(
        f"expected a checkpoint at {text or 'a path'}, found {problem}" + (advice and f": {advice}")
    )


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except OSError:
        return []


def _file(path: Path, head: bytes) -> Located:
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
    if head.startswith(b"PK\x03\x04"):
        _require_pytorch(path)
    elif start.startswith(b"{"):
        return _index(path)
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
        files = tuple(path.parent / Path(name).name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _other(path, "JSON text", "give the weights, not what describes them") from None
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(
            f"{path} names {len(files)} shards, of which {shown(', '.join(missing))} are missing"
        )
    return Located(path, _kind(files[0]), files)


def _kind(shard: Path) -> Kind:
    return "safetensors" if shard.suffix == ".safetensors" else "pytorch"


def _folder(path: Path) -> Located:
    names = sorted(_names(path))
    if ".metadata" in names and (parts := [path / n for n in names if n.endswith(".distcp")]):
        return Located(path, "distributed", (path / ".metadata", *parts))
    if latest := "latest" in names and (path / "latest").read_text(errors="replace"):
        step = Path(latest.strip()).name
        names += [f"{step}/{name}" for name in _names(path / step)]
    for name in _INDEXES + _SINGLE:
        if name in names:
            found = locate(path / name)
            return Located(path, found.kind, found.files)
    if states := [name for name in names if name.endswith("model_states.pt")]:
        if len(states) == 1 and Path(states[0]).name == _DEEPSPEED:
            return Located(path, "pytorch", (path / states[0],))
        what = f"DeepSpeed's checkpoint in {len(states)} parts"
        raise _other(path, what, "give the file that `python zero_to_fp32.py` makes of them")
    shards = [path / name for name in names if _SHARD.search(name)]
    if shards and len(shards) == int(_SHARD.search(shards[0].name)[2]):  # type: ignore[index]
        return Located(path, _kind(shards[0]), tuple(shards))
    inside = [name for name in names if Path(name).suffix in _ENDINGS]
    raise _other(
        path,
        f"a folder with {shown(', '.join(inside[:5])) or 'no checkpoint in it'}",
        "give a file, or a folder as Hugging Face, DeepSpeed or a distributed training leaves it",
    )
