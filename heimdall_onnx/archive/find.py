"""A release by any of its names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.errors import ParameterError, VerificationError
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.services.store import MANIFEST

if TYPE_CHECKING:
    from heimdall_onnx.services.connection import Connection
    from heimdall_onnx.services.registry import RegisteredVersion

# As people write a registered version: with or without what MLflow puts before it.
_SHORT_URI = re.compile(r"[^/@]+(@[^/]+|/\d+)")
_MODEL_URI = re.compile(r"^models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/]+)|/(?P<version>\d+))$")


def find_release(connection: Connection, address: str, *, bucket: str, prefix: str) -> Release:
    """A release, however it is called; the registry is asked only for what it alone knows.

    Args:
        connection: Store and registry.
        address: ``vYYYYMMDD_HHMMSS``, ``s3://bucket/prefix/version``, ``models:/name@alias``,
            ``models:/name/version``, or the last two without ``models:/``.
        bucket: Bucket of a bare version.
        prefix: Its folder in the bucket.

    Raises:
        ParameterError: If ``address`` is empty, or nothing is there.
        VerificationError: If a registered version is of no release, or of another one.
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
    return release_of(connection, find_registered(connection, uri), uri)


def find_registered(connection: Connection, uri: str) -> RegisteredVersion | None:
    """The registered version that ``models:/…`` names; None if ``uri`` is no such address."""
    match = _MODEL_URI.match(uri)
    if match is None:
        return None
    if match["alias"]:
        return connection.tracker.version_by_alias(match["name"], match["alias"])
    return connection.tracker.get_version(match["name"], match["version"])


def release_of(connection: Connection, found: RegisteredVersion | None, uri: str) -> Release:
    """The release that ``uri`` names, which is the one of the registered version if there is one.

    Raises:
        ParameterError: If ``uri`` is no address of a release, or nothing is there.
        VerificationError: If the registered version is of no release, or of another one.
        ServiceError: If the store can't be reached or refuses.
    """
    if found is None:
        if not uri.startswith("s3://"):
            raise ParameterError(
                f"{uri!r} is no address of a model; expected models:/NAME@ALIAS, "
                "models:/NAME/VERSION or s3://BUCKET/…"
            )
        release = Release.at(connection, uri.removesuffix(f"/{MODEL}"))
        place, folder = release.bucket, f"{release.folder}/"
        # One that has lost its manifest is broken, and its name is not wrong.
        if place.exists(folder + MANIFEST) or (place.is_there() and place.list_keys(folder)):
            return release
        raise ParameterError(
            f"there is no release at {release.uri}; `heimdall-onnx list` shows those there are"
        )
    if "manifest_sha256" not in found.tags:
        raise VerificationError(
            f"the registered version with source {found.source} records no manifest_sha256, so it "
            "was not released by this program, or not completely"
        )
    release = Release.at(connection, found.source)
    manifest = release.manifest
    # A folder may hold another release than the one that was asked for.
    if (manifest.model_name, manifest.model_version) != (found.name, found.version):
        raise VerificationError(
            f"{found.source} is not what was registered: expected a release of {found.name} "
            f"version {found.version}, found one of {manifest.model_name} version "
            f"{manifest.model_version}"
        )
    return release
