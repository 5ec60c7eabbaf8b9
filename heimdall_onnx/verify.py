"""Believing a release: check it again, and open only what was checked."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from heimdall_onnx.errors import NotRegisteredError, ParameterError, VerificationError
from heimdall_onnx.inference import open_session
from heimdall_onnx.logs import get_logger
from heimdall_onnx.manifest import (
    MODEL,
    REPORT,
    REVIEWS,
    SIGNATURE,
    Entry,
    Manifest,
    read_manifest,
)
from heimdall_onnx.services import ensure_store
from heimdall_onnx.settings import Settings
from heimdall_onnx.signing import MAX_SIGNATURE_BYTES, Trust, check_signature
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
    from heimdall_onnx.registry import MLflowTracker, RegisteredVersion

log = get_logger(__name__)

REVIEW_TAG = "review."
NOT_RECORDED = "0" * 64
_REVIEW = re.compile(rf"{REVIEWS}/[A-Za-z0-9_]+-([0-9a-f]{{64}})\.json")
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


def verify_release(
    connection: Connection,
    release: str | Manifest,
    *,
    trust: Trust | None = None,
    hashed: Mapping[str, str] | None = None,
    registry: bool = True,
) -> tuple[Finding, ...]:
    """Download a release again and hold all of it against manifest, registry and signature.

    Every object is read once: those of the release, its reviews, its signature, and the checkpoint
    and evaluation data that it was made of.

    Args:
        connection: Store and registry.
        release: ``s3://bucket/prefix/version``, or a manifest that has been read, so that what is
            done with it afterwards is about the same one.
        trust: Whose signature it must have; what the settings name by default. If they name
            nobody, a signature is only held against the hash that the registry has of it.
        hashed: SHA-256 by name of objects that have been read already.
        registry: Hold it against the registry too; without it a rewritten release is found out by
            its signature alone.

    Raises:
        SettingsError: If the public key or the certificates can't be read.
        VerificationError: If there is no manifest, so that it is no release.
        ServiceError: If a service can't be reached or refuses.
    """
    client, settings = connection.client, connection.settings
    if trust is None:
        trust = Trust(settings.public_key, settings.trusted_certificates)
    manifest = release if isinstance(release, Manifest) else read_manifest(client, release)
    found, findings = _check_objects(client, manifest, hashed or {})
    tags: Mapping[str, str] | None = None
    registry_findings: list[Finding] = []
    if registry:
        tags, registry_findings = _check_registry(connection.tracker, manifest)
    return (
        *findings,
        *_check_content(client, manifest),
        *_check_notebook(client, manifest, found),
        *registry_findings,
        *_check_reviews(client, manifest, tags),
        *_check_signature(client, manifest, found, tags, trust),
    )


def differences(findings: Iterable[Finding]) -> list[str]:
    """What does not hold, in words."""
    return [f"{f.what}: expected {f.expected}, found {f.found}" for f in findings if not f.holds]


def require_verified(findings: Iterable[Finding], folder_uri: str) -> None:
    """Raise unless every finding holds.

    Raises:
        VerificationError: Naming every one that does not.
    """
    if wrong := differences(findings):
        raise VerificationError(
            f"{folder_uri} does not verify, don't use it:\n  - " + "\n  - ".join(wrong)
        )


def _check_objects(
    client: S3Client, manifest: Manifest, hashed: Mapping[str, str]
) -> tuple[dict[str, str], list[Finding]]:
    """The hashes by name that were found, and how they compare."""
    folder = f"{manifest.folder}/"
    beside = {MANIFEST} | ({SIGNATURE} if manifest.signature else set())
    there = {key.removeprefix(folder) for key in list_keys(client, manifest.bucket, folder)}
    there = {name for name in there if name not in beside and not _is_review(name)}
    found, findings = {MANIFEST: manifest.sha256}, []
    for name in sorted(manifest.objects.keys() | there):
        key, entry = folder + name, manifest.objects.get(name)
        if name not in there:
            findings.append(Finding(key, False, "an object", "nothing"))
        elif entry is None:
            found[name] = NOT_RECORDED
            findings.append(Finding(key, False, "nothing", "an object the manifest does not name"))
        elif hashed.get(name) == entry.sha256:
            found[name] = entry.sha256
        else:
            finding = _compare(client, manifest.bucket, entry)
            found[name] = finding.found.partition(",")[0]
            findings.append(finding)
    return found, findings


def _same(what: str, expected: str, found: str) -> Finding:
    return Finding(what, expected == found, expected, found)


def _compare(client: S3Client, bucket: str, entry: Entry) -> Finding:
    digest, size = hash_object(client, bucket, entry.key)
    return _same(entry.key, f"{entry.sha256}, {entry.size} bytes", f"{digest}, {size} bytes")


def _check_content(client: S3Client, manifest: Manifest) -> Iterator[Finding]:
    for entry in manifest.content:
        if exists(client, manifest.bucket, entry.key):
            yield _compare(client, manifest.bucket, entry)
        else:
            yield Finding(entry.key, False, f"the {entry.role.replace('_', ' ')}", "nothing")


def _check_notebook(
    client: S3Client, manifest: Manifest, found: Mapping[str, str]
) -> Iterator[Finding]:
    """What the executed notebook says of the model that it has made."""
    report = manifest.objects.get(REPORT)
    # Not read a second time where it is a finding already.
    if report is None or found.get(REPORT) != report.sha256:
        return
    text = read_bytes(client, manifest.bucket, report.key)
    yield _same(f"{report.key}, its record of {MODEL}", manifest.model.sha256, _recorded(text))


def _recorded(report: bytes) -> str:
    """The hash of the model that an executed notebook has recorded, or why there is none."""
    from heimdall_onnx.report import read_record

    with tempfile.NamedTemporaryFile(prefix="heimdall-report-", suffix=".ipynb") as file:
        file.write(report)
        file.flush()
        try:
            return str(read_record(Path(file.name))["uploaded"]["sha256"])
        except Exception as error:
            # Anybody may have written it, and its parsers raise whatever they meet.
            return f"none that can be read ({type(error).__name__})"


def _check_registry(
    tracker: MLflowTracker, manifest: Manifest
) -> tuple[Mapping[str, str] | None, list[Finding]]:
    """The version's tags, None if there is no such version, and how they compare."""
    name, version = manifest.model_name, manifest.model_version
    try:
        registered = tracker.get_version(name, version)
    except NotRegisteredError:
        missing = Finding(f"{name} version {version}", False, "a registered version", "none")
        return None, [missing]
    tags = registered.tags
    compared = (
        ("source", manifest.uri, registered.source),
        ("tag manifest_sha256", manifest.sha256, tags.get("manifest_sha256", "none")),
        ("tag manifest_uri", f"{manifest.uri}/{MANIFEST}", tags.get("manifest_uri", "none")),
        ("tag report_uri", f"{manifest.uri}/{REPORT}", tags.get("report_uri", "none")),
        ("tag verdict", manifest.verdict, tags.get("verdict", "none")),
        ("tag sha256", manifest.model.sha256, tags.get("sha256", "none")),
    )
    return tags, [_same(f"{name} version {version}, {what}", *both) for what, *both in compared]


def _check_reviews(
    client: S3Client, manifest: Manifest, tags: Mapping[str, str] | None
) -> Iterator[Finding]:
    """Each review has its hash in its name, and the registry has the hashes of all."""
    folder = f"{manifest.folder}/"
    expected = {v for k, v in (tags or {}).items() if k.startswith(REVIEW_TAG)}
    seen = set()
    for key in list_keys(client, manifest.bucket, f"{folder}{REVIEWS}/"):
        digest, _ = hash_object(client, manifest.bucket, key)
        named = match[1] if (match := _REVIEW.fullmatch(key.removeprefix(folder))) else "none"
        seen.add(digest)
        # One that is being written, or never was to its end: nothing of the release is wrong.
        unknown = tags is not None and digest not in expected
        what = f"{key}{', which the registry does not know: not completed' if unknown else ''}"
        yield _same(what, named, digest)
    for digest in sorted(expected - seen):
        yield Finding(f"{folder}{REVIEWS}/…-{digest}.json", False, "a review record", "nothing")


def _check_signature(
    client: S3Client,
    manifest: Manifest,
    found: Mapping[str, str],
    tags: Mapping[str, str] | None,
    trust: Trust,
) -> Iterator[Finding]:
    key, entry = f"{manifest.folder}/{SIGNATURE}", manifest.signature
    if entry is None:
        if trust:
            yield Finding(key, False, "a signature", "none: the release is unsigned")
        else:
            yield _same(f"{key}: the release is unsigned", "none", "none")
        return
    if not exists(client, manifest.bucket, key):
        yield Finding(key, False, "a signature", "nothing")
        return
    signature = read_bytes(client, manifest.bucket, key, limit=MAX_SIGNATURE_BYTES)
    if tags is not None:
        digest = hashlib.sha256(signature).hexdigest()
        recorded = tags.get("signature_sha256", "none")
        yield _same(f"{key}, in the registry", recorded, digest)
    signer = f"the signature of key {entry.signer_sha256}"
    if not trust:
        yield _same(f"{key}, not checked: no public key was given", signer, signer)
        return
    try:
        check_signature(trust, manifest.version, found, signature)
        yield _same(key, signer, signer)
    except VerificationError as error:
        yield Finding(key, False, f"{signer} for what is here", str(error))


def _is_review(name: str) -> bool:
    return name.startswith(f"{REVIEWS}/")


def load_model(
    uri: str,
    *,
    verify: bool = True,
    trust: Trust | None = None,
    settings: Settings | None = None,
    threads: int | None = None,
) -> InferenceSession:
    """Open a released model, ready to run, if its release verifies.

    Everything that `verify_release` checks must hold. The model is kept below the settings' home
    under its hash, and hashed again on every call; the other objects, some megabytes, are read
    from the store each time.

    Args:
        uri: ``models:/name@alias``, ``models:/name/version``, ``s3://…/vX``,
            ``s3://…/vX/model.onnx``, or a bare ``s3://….onnx`` object whose metadata holds its
            SHA-256. Of a bare object there is nothing but that hash to check.
        verify: False opens what does not verify too, and logs a warning that says why.
        trust: Whose signature the release must have; what the settings name by default.
        settings: Where the services are; from the environment by default.
        threads: Intra-op threads; ONNX Runtime's choice by default.

    Raises:
        ParameterError: If ``uri`` is none of these.
        VerificationError: If what is there is not what was recorded, or not signed as it must be.
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
        path = _fetch(client, bucket, {MODEL: key}, expected, cache)
        return open_session(path, threads=threads)
    try:
        manifest = _manifest_of(client, found, uri)
        path = _verified_model(client, settings, manifest, cache, trust)
    except VerificationError as error:
        if verify:
            raise
        log.warning("opened although it does not verify", uri=uri, reason=str(error))
        source = found.source if found else uri.removesuffix(f"/{MODEL}")
        return _open_unverified(client, source.rstrip("/"), threads)
    return open_session(path, threads=threads)


def _verified_model(
    client: S3Client,
    settings: Settings,
    manifest: Manifest,
    cache: Path,
    trust: Trust | None,
) -> Path:
    from heimdall_onnx.publish import Connection
    from heimdall_onnx.registry import open_registry
    from heimdall_onnx.registry_errors import missing_database

    files = {n: entry for n, entry in manifest.objects.items() if n.startswith(MODEL)}
    hashes = {name: entry.sha256 for name, entry in files.items()}
    keys = {name: entry.key for name, entry in files.items()}
    path = _fetch(client, manifest.bucket, keys, hashes, cache)
    missing = missing_database(settings.tracking_uri.get_secret_value())
    if missing:
        # An address in the store is enough for who has no registry; a signature takes its place.
        log.warning("not held against a registry", uri=manifest.uri, missing=str(missing))
    connection = Connection(settings, client, lambda: open_registry(settings))
    findings = verify_release(
        connection, manifest, trust=trust, hashed=hashes, registry=missing is None
    )
    require_verified(findings, manifest.uri)
    return path


def _open_unverified(client: S3Client, source: str, threads: int | None) -> InferenceSession:
    bucket, folder = parse_uri(source)
    with tempfile.TemporaryDirectory(prefix="heimdall-unverified-") as scratch:
        for key in list_keys(client, bucket, f"{folder}/{MODEL}"):
            download_file(client, bucket, key, Path(scratch) / Path(key).name)
        return open_session(Path(scratch) / MODEL, threads=threads)


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


def _manifest_of(client: S3Client, found: RegisteredVersion | None, uri: str) -> Manifest:
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
