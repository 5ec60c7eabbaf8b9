"""Believing a release: read all of it again, and say of everything whether it is as recorded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from heimdall_onnx.archive.manifest import (
    COMPARISONS,
    RECOMMENDED,
    REPORT,
    REVIEWS,
    SIGNATURE,
    Entry,
    Manifest,
)
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.signing import MAX_SIGNATURE_BYTES, Trust, check_signature
from heimdall_onnx.common.errors import (
    DataError,
    MissingObjectError,
    NotRegisteredError,
    VerificationError,
)
from heimdall_onnx.common.parameters import MODEL
from heimdall_onnx.services.store import MANIFEST, MAX_READ_BYTES

if TYPE_CHECKING:
    from heimdall_onnx.services.registry import MLflowTracker


REVIEW_TAG, COMPARISON_TAG = "review.", "comparison."
NOT_RECORDED = "0" * 64
_SHA256 = "([0-9a-f]{64})"
_REVIEW = re.compile(rf"{REVIEWS}/[A-Za-z0-9_]+-{_SHA256}\.(json|html)")
_COMPARISON = re.compile(rf"{COMPARISONS}/[A-Za-z0-9_.-]+/report-{_SHA256}\.(html|ipynb)")


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


def verify_release(
    release: Release,
    *,
    trust: Trust | None = None,
    hashed: Mapping[str, str] | None = None,
    unread: Collection[str] = (),
    registry: bool = True,
    content: bool = True,
) -> tuple[Finding, ...]:
    """Download a release again and hold all of it against manifest, registry and signature.

    Every object is read once: those of the release, its reviews and comparisons, its signature, and
    the checkpoint and evaluation data that it was made of.

    Args:
        release: The release; what is done with it afterwards is about the same manifest.
        trust: Whose signature it must have; what the settings name by default. If they name
            nobody, a signature is only held against the hash that the registry has of it.
        hashed: SHA-256 by name of objects that have been read already.
        unread: Names of objects that are not used. They must be there, and the signature must be
            one of what the manifest says of them; their content is not looked at.
        registry: Hold it against the registry too; without it a rewritten release is found out by
            its signature alone.
        content: Read checkpoint and evaluation data too, and the pages of reviews and stored
            comparisons, of which otherwise the names count.

    Raises:
        SettingsError: If the public key or the certificates can't be read.
        VerificationError: If there is no manifest, so that it is no release.
        ServiceError: If a service can't be reached or refuses.
    """
    manifest = release.manifest
    if trust is None:
        settings = release.connection.settings
        trust = Trust(settings.public_key, settings.trusted_certificates)
    known = {name: entry.sha256 for name, entry in manifest.objects.items() if name in unread}
    found, findings = _check_objects(release, {**known, **(hashed or {})})
    tags: Mapping[str, str] | None = None
    registry_findings: list[Finding] = []
    if registry:
        tags, registry_findings = _check_registry(release.connection.tracker, manifest)
    return (
        *findings,
        *(_check_content(release) if content else ()),
        *_check_notebook(release, found),
        *registry_findings,
        *_check_reviews(release, tags, content),
        *_check_signature(release, found, tags, trust),
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
    release: Release, hashed: Mapping[str, str]
) -> tuple[dict[str, str], list[Finding]]:
    """The hashes by name that were found, and how they compare."""
    manifest, folder = release.manifest, f"{release.folder}/"
    beside = {MANIFEST} | ({SIGNATURE} if manifest.said.signature else set())
    there = {key.removeprefix(folder) for key in release.bucket.list_keys(folder)}
    there = {name for name in there if name not in beside and not name.startswith(f"{REVIEWS}/")}
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
            finding = _compare(release, entry)
            found[name] = finding.found.partition(",")[0]
            findings.append(finding)
    return found, findings


def _same(what: str, expected: str, found: str) -> Finding:
    return Finding(what, expected == found, expected, found)


def _compare(release: Release, entry: Entry) -> Finding:
    # Kept, since what it says is looked at too; not where only a part of it would be.
    kept = entry.key == f"{release.folder}/{REPORT}" and entry.size <= MAX_READ_BYTES
    if kept and len(report := release.stored_report) <= entry.size:
        digest, size = hashlib.sha256(report).hexdigest(), len(report)
    else:
        digest, size = release.bucket.hash_object(entry.key)
    return _same(entry.key, f"{entry.sha256}, {entry.size} bytes", f"{digest}, {size} bytes")


def _check_content(release: Release) -> Iterator[Finding]:
    for entry in release.manifest.said.content:
        try:
            yield _compare(release, entry)
        except MissingObjectError:
            yield Finding(entry.key, False, f"the {entry.role.replace('_', ' ')}", "nothing")
    if (kept := release.manifest.dataset) is not None:
        # Who verifies a model that was compared on a file does without what reads datasets.
        from heimdall_onnx.archive.content import open_kept

        expected = f"a dataset with digest {kept.digest}"
        try:
            open_kept(release.bucket.client, kept).verify()
        except DataError as error:
            yield Finding(kept.address, False, expected, str(error))
        else:
            yield Finding(kept.address, True, expected, expected)


def _check_notebook(release: Release, found: Mapping[str, str]) -> Iterator[Finding]:
    """What the executed notebook says of the model and the variants that it has made."""
    manifest = release.manifest
    report = manifest.objects.get(REPORT)
    # Not read a second time where it is a finding already.
    if report is None or found.get(REPORT) != report.sha256:
        return
    from heimdall_onnx.archive.record import record_in

    try:
        record, missing = record_in(release.stored_report, REPORT), "none"
    except VerificationError as error:
        record, missing = None, f"none that can be read: {error}"
    judged = record.variants.judged if record and record.variants else ()
    recorded = {one.name: one.sha256 for one in judged if one.passed}
    if record and record.uploaded:
        recorded[MODEL] = record.uploaded.sha256
    passed = manifest.said.variants.passed if manifest.said.variants else {}
    for name, what, expected in (
        (MODEL, MODEL, manifest.model.sha256),
        *((name, f"variant {name}", one.sha256) for name, one in passed.items()),
    ):
        where = f"{report.key}, its record of {what}"
        yield _same(where, expected, recorded.get(name, missing))


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
    recommended = [manifest.recommended] if manifest.said.variants else []
    compared = (
        ("source", manifest.uri, registered.source),
        ("tag manifest_sha256", manifest.sha256, tags.get("manifest_sha256", "none")),
        ("tag manifest_uri", f"{manifest.uri}/{MANIFEST}", tags.get("manifest_uri", "none")),
        ("tag report_uri", f"{manifest.uri}/{REPORT}", tags.get("report_uri", "none")),
        ("tag verdict", manifest.said.verdict, tags.get("verdict", "none")),
        *((f"tag {RECOMMENDED}", one, tags.get(RECOMMENDED, "none")) for one in recommended),
        ("tag sha256", manifest.model.sha256, tags.get("sha256", "none")),
    )
    return tags, [_same(f"{name} version {version}, {what}", *both) for what, *both in compared]


def _check_reviews(
    release: Release, tags: Mapping[str, str] | None, content: bool
) -> Iterator[Finding]:
    """Reviews and comparisons have their hash in their name, and the registry has all hashes."""
    folder = f"{release.folder}/"
    kept = {
        REVIEW_TAG: (f"{REVIEWS}/…-{{}}", "a review record or its page"),
        COMPARISON_TAG: (f"{COMPARISONS}/…-{{}}", "a stored comparison"),
    }
    expected = {v: kept[t] for k, v in (tags or {}).items() for t in kept if k.startswith(t)}
    seen = set()
    for key in release.bucket.list_keys(f"{folder}{REVIEWS}/"):
        name = key.removeprefix(folder)
        match = _REVIEW.fullmatch(name) or _COMPARISON.fullmatch(name)
        named = match[1] if match else "none"
        try:
            unread = match and match[2] != "json" and not content
            digest = named if unread else release.bucket.hash_object(key)[0]
        except MissingObjectError:
            # Who lost a race has taken it away since it was listed.
            continue
        seen.add(digest)
        # One that is being written, or never was to its end: nothing of the release is wrong.
        unknown = tags is not None and digest not in expected
        what = f"{key}{', which the registry does not know: not completed' if unknown else ''}"
        yield _same(what, named, digest)
    for digest in sorted(expected.keys() - seen):
        name, what = expected[digest]
        yield Finding(f"{folder}{name.format(digest)}", False, what, "nothing")


def _check_signature(
    release: Release,
    found: Mapping[str, str],
    tags: Mapping[str, str] | None,
    trust: Trust,
) -> Iterator[Finding]:
    key, entry = f"{release.folder}/{SIGNATURE}", release.manifest.said.signature
    if entry is None:
        if trust:
            yield Finding(key, False, "a signature", "none: the release is unsigned")
        else:
            yield _same(f"{key}: the release is unsigned", "none", "none")
        return
    try:
        signature = release.bucket.read_start(key, MAX_SIGNATURE_BYTES + 1)
    except MissingObjectError:
        yield Finding(key, False, "a signature", "nothing")
        return
    if len(signature) > MAX_SIGNATURE_BYTES:
        yield Finding(key, False, f"at most {MAX_SIGNATURE_BYTES} bytes", "more")
        return
    if tags is not None:
        digest = hashlib.sha256(signature).hexdigest()
        recorded = tags.get("signature_sha256", "none")
        yield _same(f"{key}, in the registry", recorded, digest)
    signer = f"the signature of key {entry.signer_sha256}"
    if not trust:
        yield _same(f"{key}, not checked: no public key was given", signer, signer)
        return
    try:
        check_signature(trust, release.manifest.version, found, signature)
        yield _same(key, signer, signer)
    except VerificationError as error:
        yield Finding(key, False, f"{signer} for what is here", str(error))
