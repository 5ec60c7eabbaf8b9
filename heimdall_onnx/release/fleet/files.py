"""The files and objects that the entries of a fleet's plan stand for.

Checkpoints and data are named by paths, or by addresses of objects in the bucket; what patterns
mean, `release.fleet.plan` says.
"""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.text import shown
from heimdall_onnx.services.store import format_uri, parse_uri

_WILDCARD = re.compile(r"[*?[]")
_S3 = "s3://"


def list_stored(bucket: str, prefix: str) -> list[str]:
    """The objects in a bucket of the configured store, which is opened only where it is needed."""
    from heimdall_onnx.services.connection import open_for_reading

    # What ends in a slash is how some programs mark a folder.
    keys = open_for_reading().bucket(bucket).list_keys(prefix)
    return [key for key in keys if not key.endswith("/")]


def absolute(folder: Path, text: str) -> str:
    """An absolute path for one that is relative to ``folder``; an address stays as it is."""
    if text.startswith(_S3):
        return text
    path = text if text.startswith("/") else f"{folder}/{text}"
    before, up, rest = f"{path}/".rpartition("/../")
    if up and "\0" not in path:
        # Behind a link, `..` is not the folder before.
        path = f"{os.path.realpath(before + up)}/{rest}"
    return os.path.normpath(path)


def kind_of(path: Path | str) -> str:
    """What is at a path, in words, e.g. ``"a file"`` or ``"none"``."""
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "none"
    except OSError as error:
        return f"none that can be looked at ({error.strerror})"
    return "a file" if stat.S_ISREG(mode) else "a folder" if stat.S_ISDIR(mode) else "a device"


class Glob:
    """A pattern of paths or addresses.

    Attributes:
        root: What stands before the first name with a wildcard, or before the last name; taken
            literally.
        start: How the first name with a wildcard begins.

    Raises:
        ParameterError: If it can't be one.
    """

    def __init__(self, text: str, folder: Path) -> None:
        stored = text.startswith(_S3)
        names = text.removeprefix(_S3).split("/") if stored else PurePosixPath(text).parts
        at = 0
        # A folder that is there is not read as a pattern.
        while at < len(names) - 1 and (
            not _is_pattern(names[at])
            or (not stored and kind_of(folder / "/".join(names[: at + 1])) == "a folder")
        ):
            at += 1
        before = "/".join(names[:at]) if stored else str(PurePosixPath(*names[:at]))
        self._names = list(names[at:])
        if stored and not before:
            raise ParameterError(f"the bucket of {shown(repr(text))} must be named")
        if any("**" in name and name != "**" for name in self._names) or ".." in self._names:
            raise ParameterError(
                f"{shown(repr(text))} can't be a pattern: expected ** as a whole name, and no .. "
                "behind a wildcard"
            )
        if self._names[-1:] == ["**"]:
            self._names.append("*")
        self.root = absolute(folder, _S3 + before if stored else before)
        self.start = _WILDCARD.split(self._names[0])[0] if self._names else ""

    def fits(self, path: str) -> bool:
        """Whether an absolute path or an address is one of its."""
        root = self.root.rstrip("/") + "/"
        return path.startswith(root) and _fit(self._names, path.removeprefix(root).split("/"))

    def files(self) -> list[str]:
        """The files on disk that are its, sorted; as in a shell, what can't be read has none."""
        found = Path(self.root).glob("/".join(self._names))
        return sorted(str(path) for path in found if path.is_file())


def _fit(names: Sequence[str], parts: Sequence[str]) -> bool:
    """Whether the names of a pattern fit those of a path, of which ``**`` takes any number."""
    if not names or not parts:
        return not names and not parts
    name, *left = names
    if name == "**":
        return _fit(left, parts) or _fit(names, parts[1:])
    return (name == parts[0] or fnmatch.fnmatchcase(parts[0], name)) and _fit(left, parts[1:])


def find_checkpoints(folder: Path, text: str) -> list[str]:
    """The checkpoints that a path, a pattern or an address in a plan stands for.

    Raises:
        ParameterError: If that is nothing, or it can't be one; whether there is an object at an
            address, `missing_objects` says.
    """
    # A file that is there is not read as a pattern.
    if not _is_pattern(text) or kind_of(folder / text) == "a file":
        return [single_checkpoint(folder, text)]
    glob = Glob(text, folder)
    if text.startswith(_S3):
        bucket, within = parse_uri(glob.root)
        keys = list_stored(bucket, f"{within}/{glob.start}" if within else glob.start)
        found = [uri for uri in (format_uri(bucket, key) for key in keys) if glob.fits(uri)]
    else:
        found = glob.files()
    if not found:
        raise ParameterError(f"no file matches {shown(repr(text))} (from {shown(glob.root)})")
    for checkpoint in found:
        _require_text(checkpoint)
    return found


def single_checkpoint(folder: Path, text: str) -> str:
    """One checkpoint by its path, as an absolute one, or by its address.

    Raises:
        ParameterError: As `find_checkpoints`.
    """
    if text.startswith(_S3) and not _is_object(text):
        raise ParameterError(
            f"expected s3://bucket/key, found {shown(repr(text))}; "
            "what is in a folder is s3://bucket/folder/*"
        )
    path = require_data(folder, text)
    _require_text(path)
    return path


def missing_objects(checkpoints: Iterable[str]) -> set[str]:
    """Those of ``checkpoints`` that are addresses at which there is no object."""
    folders: dict[tuple[str, str], list[str]] = {}
    for address in (text for text in checkpoints if text.startswith(_S3)):
        bucket, key = parse_uri(address)
        folders.setdefault((bucket, key.rpartition("/")[0]), []).append(key)
    missing: set[str] = set()
    for (bucket, _), keys in folders.items():
        # One listing for the thousands that a folder may have; a prefix may end in a name.
        there = set(list_stored(bucket, os.path.commonprefix(keys)))  # noqa: RUF071
        missing |= {format_uri(bucket, key) for key in keys if key not in there}
    return missing


def require_data(folder: Path, text: str, kinds: Sequence[str] = ("a file",)) -> str:
    """The absolute path of a file that is there, or the address of an object as it is.

    Args:
        folder: What a path is relative to.
        text: Path or address.
        kinds: What may be at a path, as `kind_of` says it.

    Raises:
        ParameterError: If it is none of them, or no address of an object.
    """
    if text.startswith(_S3):
        if not _is_object(text):
            raise ParameterError(f"expected s3://bucket/key, found {shown(repr(text))}")
        return text
    path = absolute(folder, text)
    if (found := kind_of(path)) not in kinds:
        raise ParameterError(f"expected a file, found {found} at {shown(path)}")
    return path


def _is_pattern(text: str) -> bool:
    return _WILDCARD.search(text) is not None


def _is_object(address: str) -> bool:
    return re.fullmatch(r"s3://[^/*?[\]]+/(.*[^/])", address, re.DOTALL) is not None


def _require_text(path: str) -> None:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(f"the name of {shown(path)} is no UTF-8; give it another") from error
