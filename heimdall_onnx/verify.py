"""Believing a release: check it again, and open only what was checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heimdall_onnx.errors import NotRegisteredError, ParameterError, VerificationError
from heimdall_onnx.inference import open_session
from heimdall_onnx.services import ensure_store
from heimdall_onnx.settings import Settings
from heimdall_onnx.store import (
    MANIFEST,
    download_file,
    exists,
    hash_object,
    head,
    list_keys,
    make_client,
    parse_uri,
    read_bytes,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from onnxruntime import InferenceSession

    from heimdall_onnx.publish import Connection
    from heimdall_onnx.registry import RegisteredVersion

_MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+))$")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked.

    Attributes:
        what: What it is, e.g. an object's address.
        holds: Whether it is as recorded.
        expected: What was recorded.
        found: What is there.
    """

    what: str
    holds: bool
    expected: str
    found: str


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Entry(_Strict):
    key: str
    size: int
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Registered(_Strict):
    model_name: str
    model_version: Annotated[str, Field(pattern="^[0-9]+$")]


class _Manifest(_Strict):
    """What is relied on in a manifest; the rest is for its readers."""

    verdict: str
    objects: list[_Entry]
    mlflow: _Registered


def open_for_reading(settings: Settings) -> Connection:
    """Reach store and registry without making anything in them.

    Raises:
        ServiceError: If one of them can't be reached or refuses.
    """
    from heimdall_onnx.publish import Connection
    from heimdall_onnx.registry import open_registry

    settings = ensure_store(settings)
    client, tracker = make_client(settings), open_registry(settings)
    return Connection(settings, client, lambda: tracker)


def verify_release(connection: Connection, folder_uri: str) -> tuple[Finding, ...]:
    """Download a release again and hold every object and the registry against its manifest.

    Args:
        connection: Store and registry.
        folder_uri: ``s3://bucket/prefix/version``.

    Raises:
        VerificationError: If there is no manifest, so that it is no release.
        ServiceError: If a service can't be reached or refuses.
    """
    bucket, folder = parse_uri(folder_uri)
    folder = folder.rstrip("/")
    manifest = read_manifest(connection.client, folder_uri)
    return (
        *_check_objects(connection.client, bucket, folder, manifest),
        *_check_registry(connection, bucket, folder, manifest),
    )


def read_manifest(client: S3Client, folder_uri: str) -> dict[str, Any]:
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
    try:
        content = read_bytes(client, bucket, key)
        known = _Manifest.model_validate_json(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc'])) or 'content'}: {e['msg']}" for e in error.errors()
        )
        raise VerificationError(
            f"{folder_uri}/{MANIFEST} is no manifest of a release: {problems}"
        ) from error
    model_key = f"{folder.rstrip('/')}/model.onnx"
    if model_key not in {entry.key for entry in known.objects}:
        raise VerificationError(f"{folder_uri}/{MANIFEST} names no {model_key}")
    manifest: dict[str, Any] = json.loads(content)
    return manifest


def _check_objects(
    client: S3Client, bucket: str, folder: str, manifest: Mapping[str, Any]
) -> Iterator[Finding]:
    recorded = {entry["key"]: entry for entry in manifest["objects"]}
    there = set(list_keys(client, bucket, folder + "/")) - {f"{folder}/{MANIFEST}"}
    for key in sorted(recorded.keys() | there):
        if key not in there:
            yield Finding(key, False, "an object", "nothing")
        elif key not in recorded:
            yield Finding(key, False, "nothing", "an object the manifest does not name")
        else:
            digest, size = hash_object(client, bucket, key)
            expected = f"{recorded[key]['sha256']}, {recorded[key]['size']} bytes"
            found = f"{digest}, {size} bytes"
            yield Finding(key, expected == found, expected, found)


def _check_registry(
    connection: Connection, bucket: str, folder: str, manifest: Mapping[str, Any]
) -> Iterator[Finding]:
    name, version = manifest["mlflow"]["model_name"], manifest["mlflow"]["model_version"]
    try:
        registered = connection.tracker.get_version(name, version)
    except NotRegisteredError:
        yield Finding(f"{name} version {version}", False, "a registered version", "none")
        return
    content = read_bytes(connection.client, bucket, f"{folder}/{MANIFEST}")
    model = next(e for e in manifest["objects"] if e["key"] == f"{folder}/model.onnx")
    for what, expected, found in (
        ("source", f"s3://{bucket}/{folder}", registered.source),
        (
            "tag manifest_sha256",
            hashlib.sha256(content).hexdigest(),
            registered.tags.get("manifest_sha256", "none"),
        ),
        ("tag sha256", model["sha256"], registered.tags.get("sha256", "none")),
    ):
        yield Finding(f"{name} version {version}, {what}", expected == found, expected, found)


def load_model(
    uri: str, *, settings: Settings | None = None, threads: int | None = None
) -> InferenceSession:
    """Open a released model, ready to run, after checking its SHA-256.

    The file is kept below the settings' home under its hash, and hashed again on every call.

    Args:
        uri: ``models:/name@alias``, ``models:/name/version``, ``s3://…/vX``,
            ``s3://…/vX/model.onnx``, or a bare ``s3://….onnx`` object whose metadata holds its
            SHA-256.
        settings: Where the services are; from the environment by default.
        threads: Intra-op threads; ONNX Runtime's choice by default.

    Raises:
        ParameterError: If ``uri`` is none of these.
        VerificationError: If what is there is not what was recorded.
        ServiceError: If a service can't be reached or refuses.

    Example:
        >>> session = load_model("models:/heimdall-localization-onnx@staging")  # doctest: +SKIP
    """
    settings = ensure_store(settings or Settings.load())
    client, cache = make_client(settings), settings.home / "models"
    found = _registered(settings, uri)
    bare = _bare_model(found, uri)
    if bare is not None:
        bucket, key, expected = bare
        path = _fetch(client, bucket, {"model.onnx": key}, expected, cache)
        return open_session(path, threads=threads)
    folder_uri = _folder_of(client, found, uri)
    bucket, _ = parse_uri(folder_uri)
    manifest = read_manifest(client, folder_uri)
    files = {
        Path(e["key"]).name: e
        for e in manifest["objects"]
        if Path(e["key"]).name.startswith("model.onnx")
    }
    path = _fetch(
        client,
        bucket,
        {name: entry["key"] for name, entry in files.items()},
        {name: entry["sha256"] for name, entry in files.items()},
        cache,
    )
    return open_session(path, threads=threads)


def _registered(settings: Settings, uri: str) -> RegisteredVersion | None:
    """The registered version that ``uri`` names; None if it is no address of the registry."""
    match = _MODEL_URI.match(uri)
    if match is None:
        return None
    from heimdall_onnx.registry import open_registry

    tracker = open_registry(settings)
    if match["alias"]:
        return tracker.version_by_alias(match["name"], match["alias"])
    return tracker.get_version(match["name"], match["version"])


def _bare_model(
    found: RegisteredVersion | None, uri: str
) -> tuple[str, str, dict[str, str]] | None:
    """Bucket, key and recorded hash of a model without a manifest; None for a release."""
    if found is not None:
        if "manifest_sha256" in found.tags or "sha256" not in found.tags:
            return None
        # Registered step by step, without a release around it.
        bucket, folder = parse_uri(found.source)
        return bucket, f"{folder.rstrip('/')}/model.onnx", {"model.onnx": found.tags["sha256"]}
    if uri.startswith("s3://") and uri.endswith(".onnx") and not uri.endswith("/model.onnx"):
        bucket, key = parse_uri(uri)
        return bucket, key, {}
    return None


def _folder_of(client: S3Client, found: RegisteredVersion | None, uri: str) -> str:
    """The release folder that ``uri`` names."""
    if found is not None:
        _check_manifest_tag(client, found.source, found.tags)
        return found.source.rstrip("/")
    if not uri.startswith("s3://"):
        raise ParameterError(
            f"{uri!r} is no address of a model; expected models:/NAME@ALIAS, models:/NAME/VERSION "
            "or s3://BUCKET/…"
        )
    return uri.removesuffix("/model.onnx").rstrip("/")


def _check_manifest_tag(client: S3Client, source: str, tags: Mapping[str, str]) -> None:
    expected = tags.get("manifest_sha256")
    if expected is None:
        raise VerificationError(
            f"the registered version with source {source} records no manifest_sha256, so it was "
            "not released by this program, or not completely"
        )
    bucket, folder = parse_uri(source)
    content = read_bytes(client, bucket, f"{folder.rstrip('/')}/{MANIFEST}")
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise VerificationError(
            f"the manifest of {source} is not the one that was registered: expected SHA-256 "
            f"{expected}, found {found}"
        )


def _fetch(
    client: S3Client,
    bucket: str,
    keys: Mapping[str, str],
    expected: Mapping[str, str],
    cache: Path,
) -> Path:
    """Bring the files of a model into ``cache``, checked, and return the model's path."""
    digest = expected.get("model.onnx") or _recorded_sha256(client, bucket, keys["model.onnx"])
    folder = cache / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name, key in keys.items():
        wanted = expected.get(name, digest)
        target = folder / name
        if not (target.is_file() and _sha256(target) == wanted):
            found = download_file(client, bucket, key, target, sha256=None)
            if found != wanted:
                target.unlink()
                raise VerificationError(
                    f"s3://{bucket}/{key} is not what was recorded: expected SHA-256 {wanted}, "
                    f"found {found}"
                )
    return folder / "model.onnx"


def _recorded_sha256(client: S3Client, bucket: str, key: str) -> str:
    digest = head(client, bucket, key).sha256
    if not digest:
        raise VerificationError(
            f"s3://{bucket}/{key} records no SHA-256 in its metadata, so it can't be verified; "
            "open the release folder instead"
        )
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
