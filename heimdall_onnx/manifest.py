"""The manifest of a release: what it says, read as untrusted bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from heimdall_onnx.errors import VerificationError
from heimdall_onnx.store import MANIFEST, exists, head, parse_uri, read_bytes
from heimdall_onnx.untrusted import shown

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SCHEMA_VERSION = 2
MODEL, REPORT, REPORT_HTML = "model.onnx", "report.ipynb", "report.html"
BOM, SIGNATURE, REVIEWS = "bom.cdx.json", "model.sig", "reviews"
CONTENT = "objects/sha256"

# Some hundred times what a release needs; a larger object is no manifest.
_MAX_BYTES = 16 << 20
# Each object costs time, above all where it is wrong.
_Few = (FailFast(), Field(max_length=1000))
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Entry(_Strict):
    """An object of a release.

    Attributes:
        key: Its key in the bucket.
        size: Its length in bytes.
        sha256: SHA-256 of its content.
    """

    key: str
    size: Annotated[int, Field(ge=0)]
    sha256: _Sha256


class Content(Entry):
    """What a release was made of, kept under its hash and shared between releases.

    Attributes:
        role: What it was to the release.
        name: Its file's name.
    """

    role: Literal["checkpoint", "evaluation_data"]
    name: str


class SignatureEntry(_Strict):
    """Where the signature is.

    Attributes:
        key: Its key in the bucket.
        signer_sha256: SHA-256 of the signer's public key (DER, SubjectPublicKeyInfo). It tells
            which key to ask for, and proves nothing.
    """

    key: str
    signer_sha256: _Sha256


class _Registered(_Strict):
    model_name: str
    model_version: Annotated[str, Field(pattern="^[0-9]+$")]


class _Known(_Strict):
    """What is relied on in a manifest; the rest is for its readers."""

    verdict: str
    objects: Annotated[list[Entry], *_Few]
    mlflow: _Registered
    content: Annotated[list[Content], *_Few] = Field(default_factory=list)
    signature: SignatureEntry | None = None


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read; that its form is right says nothing of its truth.

    Attributes:
        bucket: Bucket of the release.
        folder: Its folder in the bucket, without a slash at its end.
        text: The manifest's bytes.
        data: All of it.
    """

    bucket: str
    folder: str
    text: bytes = field(repr=False)
    data: dict[str, Any] = field(repr=False)
    _known: _Known = field(repr=False)

    @property
    def version(self) -> str:
        """Release version, ``vYYYYMMDD_HHMMSS``."""
        return self.folder.rpartition("/")[2]

    @property
    def uri(self) -> str:
        """The release's folder."""
        return f"s3://{self.bucket}/{self.folder}"

    @property
    def key(self) -> str:
        """The manifest's own key."""
        return f"{self.folder}/{MANIFEST}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest itself."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def verdict(self) -> str:
        """What was judged."""
        return self._known.verdict

    @property
    def objects(self) -> dict[str, Entry]:
        """The release's objects by their name within its folder."""
        return {entry.key.removeprefix(f"{self.folder}/"): entry for entry in self._known.objects}

    @property
    def model(self) -> Entry:
        """The model."""
        return self.objects[MODEL]

    @property
    def model_files(self) -> dict[str, Entry]:
        """The model and its external data by name; none of them is in a folder of its own."""
        return {
            name: entry
            for name, entry in self.objects.items()
            if name == MODEL or (name.startswith(f"{MODEL}.") and "/" not in name)
        }

    @property
    def content(self) -> tuple[Content, ...]:
        """Checkpoint and evaluation data, as far as they were files."""
        return tuple(self._known.content)

    @property
    def signature(self) -> SignatureEntry | None:
        """Where the signature is; None for an unsigned release."""
        return self._known.signature

    @property
    def model_name(self) -> str:
        """The registered model."""
        return self._known.mlflow.model_name

    @property
    def model_version(self) -> str:
        """Its version in the registry."""
        return self._known.mlflow.model_version

    def content_of(self, role: str) -> Content | None:
        """The content of a role, or None."""
        return next((entry for entry in self.content if entry.role == role), None)


def content_key(sha256: str) -> str:
    """Where content of this hash is kept in a bucket."""
    return f"{CONTENT}/{sha256}"


def read_manifest(client: S3Client, folder_uri: str) -> Manifest:
    """The manifest of a release.

    Raises:
        VerificationError: If there is none, or it is not one of a release with a model.
        StoreError: If the store can't be reached or refuses.
    """
    bucket, folder = parse_uri(folder_uri)
    key = f"{folder.rstrip('/')}/{MANIFEST}"
    if not exists(client, bucket, key):
        raise VerificationError(
            f"{folder_uri} has no {MANIFEST}, so it is not a release; `heimdall-onnx list` "
            "shows those that are"
        )
    if (size := head(client, bucket, key).size_bytes) > _MAX_BYTES:
        raise VerificationError(
            f"{folder_uri}/{MANIFEST} is no manifest of a release: expected at most {_MAX_BYTES} "
            f"bytes, found {size}"
        )
    return parse_manifest(read_bytes(client, bucket, key, limit=_MAX_BYTES), folder_uri)


def parse_manifest(text: bytes, folder_uri: str) -> Manifest:
    """Read a manifest's bytes as the manifest of a folder.

    Args:
        text: The bytes; nothing about them is taken for granted.
        folder_uri: The folder they were found in, ``s3://bucket/prefix/version``.

    Raises:
        VerificationError: If they are no manifest of a release in that folder.
    """
    bucket, folder = parse_uri(folder_uri)
    folder = folder.rstrip("/")
    try:
        known = _Known.model_validate_json(text)
        data = json.loads(text)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors()
        )
        raise VerificationError(
            f"{folder_uri}/{MANIFEST} is no manifest of a release: {problems}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise VerificationError(
            f"{folder_uri}/{MANIFEST} is no manifest of a release: {shown(str(error))}"
        ) from error
    if problems := "; ".join(_misplaced(known, folder)[:100]):
        raise VerificationError(f"{folder_uri}/{MANIFEST} is no manifest of a release: {problems}")
    manifest = Manifest(bucket, folder, text, data, known)
    if MODEL not in manifest.objects:
        raise VerificationError(f"{folder_uri}/{MANIFEST} names no {folder}/{MODEL}")
    return manifest


def _misplaced(known: _Known, folder: str) -> list[str]:
    """Keys that point anywhere but where a release keeps its objects."""
    keys = [entry.key for entry in known.objects]
    signature = [known.signature.key] if known.signature else []
    own = {MANIFEST, SIGNATURE}
    return [
        *(
            f"expected keys of objects in {folder}/, found {shown(repr(key))}"
            for key in keys
            if not key.startswith(f"{folder}/")
            or not _NAME.fullmatch(key.removeprefix(f"{folder}/"))
            or key.removeprefix(f"{folder}/") in own
        ),
        *(f"{shown(repr(key))} is named twice" for key, n in Counter(keys).items() if n > 1),
        *(
            f"expected the signature at {folder}/{SIGNATURE}, found {shown(repr(key))}"
            for key in signature
            if key != f"{folder}/{SIGNATURE}"
        ),
        *(
            f"expected content at {content_key(entry.sha256)}, found {shown(repr(entry.key))}"
            for entry in known.content
            if entry.key != content_key(entry.sha256)
        ),
    ]
