"""A release by any of its names, and its files brought here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from heimdall_onnx.archive.manifest import Manifest, Variant, read_manifest
from heimdall_onnx.common.errors import ParameterError, VerificationError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.services.store import Bucket

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.services.connection import Connection
    from heimdall_onnx.services.registry import MLflowTracker, RegisteredVersion

# As people write a registered version: with or without what MLflow puts before it.
_SHORT_URI = re.compile(r"[^/@]+(@[^/]+|/\d+)")
_MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+))$")


def find_release(connection: Connection, address: str, *, bucket: str, prefix: str) -> Manifest:
    """The manifest of a release, however it is called; whether it verifies is another question.

    Args:
        connection: Store and registry.
        address: ``vYYYYMMDD_HHMMSS``, ``s3://bucket/prefix/version``, ``models:/name@alias``,
            ``models:/name/version``, or the last two without ``models:/``.
        bucket: Bucket of a bare version.
        prefix: Its folder in the bucket.

    Raises:
        ParameterError: If ``address`` is empty.
        VerificationError: If there is no such release, or its manifest can't be read.
        ServiceError: If a service can't be reached or refuses, or has no such version.
    """
    if not address.strip():
        raise ParameterError(
            "expected a release: a version as `heimdall-onnx list` shows them, NAME@ALIAS, "
            "NAME/VERSION or s3://BUCKET/PREFIX/VERSION; found nothing"
        )
    uri = f"models:/{address}" if _SHORT_URI.fullmatch(address) else address
    if not uri.startswith(("s3://", "models:/")):
        uri = f"s3://{bucket}/{prefix.strip('/')}/{address}"
    found = find_registered(lambda: connection.tracker, uri)
    return manifest_of(connection.client, found, uri)


def fetch_model(
    client: S3Client, manifest: Manifest, variant: Variant, cache: Path
) -> tuple[Path, dict[str, str]]:
    """Bring a model into ``cache``, checked against its manifest, which may itself be wrong.

    Returns:
        Its file, and the SHA-256 of each of its files by name within the release's folder.

    Raises:
        VerificationError: If a file is not what the manifest says.
        StoreError: If the store can't be reached or refuses.
    """
    # Named as in a folder of their own, where external data are looked for.
    local = {name: name.rpartition("/")[2] for name in variant.files}
    hashes = {name: entry.sha256 for name, entry in variant.files.items()}
    path = fetch_files(
        Bucket(client, manifest.bucket),
        {local[name]: entry.key for name, entry in variant.files.items()},
        {local[name]: sha256 for name, sha256 in hashes.items()},
        cache,
    )
    return path, hashes


def find_registered(
    open_tracker: Callable[[], MLflowTracker], uri: str
) -> RegisteredVersion | None:
    """The registered version that ``models:/…`` names; None if ``uri`` is no such address."""
    match = _MODEL_URI.match(uri)
    if match is None:
        return None
    tracker = open_tracker()
    if match["alias"]:
        return tracker.version_by_alias(match["name"], match["alias"])
    return tracker.get_version(match["name"], match["version"])


def manifest_of(client: S3Client, found: RegisteredVersion | None, uri: str) -> Manifest:
    """The manifest of the release that ``uri`` names."""
    if found is None:
        if not uri.startswith("s3://"):
            raise ParameterError(
                f"{uri!r} is no address of a model; expected models:/NAME@ALIAS, "
                "models:/NAME/VERSION or s3://BUCKET/…"
            )
        return read_manifest(client, uri.removesuffix(f"/{MODEL}").rstrip("/"))
    if "manifest_sha256" not in found.tags:
        raise VerificationError(
            f"the registered version with source {found.source} records no manifest_sha256, so it "
            "was not released by this program, or not completely"
        )
    manifest = read_manifest(client, found.source)
    # A folder may hold another release than the one that was asked for.
    if (manifest.model_name, manifest.model_version) != (found.name, found.version):
        raise VerificationError(
            f"{found.source} is not what was registered: expected a release of {found.name} "
            f"version {found.version}, found one of {manifest.model_name} version "
            f"{manifest.model_version}"
        )
    return manifest


def fetch_files(
    bucket: Bucket,
    keys: Mapping[str, str],
    expected: Mapping[str, str],
    cache: Path,
) -> Path:
    """Bring the files of a model into ``cache``, checked, and return the model's path."""
    digest = expected.get("model.onnx") or _recorded_sha256(bucket, keys["model.onnx"])
    # Two models may share a graph and differ in their external data.
    own = [digest, *(expected[name] for name in sorted(expected) if name != MODEL)]
    if len(own) > 1:
        own = [hashlib.sha256("".join(own).encode()).hexdigest()]
    folder = cache / own[0]
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in keys.items():
        wanted = expected.get(name, digest)
        target = folder / name
        if not (target.is_file() and hash_file(target) == wanted):
            found = bucket.download_file(key, target, sha256=None)
            if found != wanted:
                target.unlink()
                raise VerificationError(
                    f"{bucket.uri(key)} is not what was recorded: expected SHA-256 {wanted}, "
                    f"found {found}"
                )
    return folder / "model.onnx"


def _recorded_sha256(bucket: Bucket, key: str) -> str:
    digest = bucket.head(key).sha256
    if not digest:
        raise VerificationError(
            f"{bucket.uri(key)} records no SHA-256 in its metadata, so it can't be verified; "
            "open the release folder instead"
        )
    return digest
