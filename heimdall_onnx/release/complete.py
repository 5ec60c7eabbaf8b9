"""From an uploaded and registered release to one that is complete, and offered under its alias.

The order is what keeps a release invisible or complete at every instant: signature, the registry's
tags, the manifest, the alias. Each names what came before it, and nothing counts before the
manifest is there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from heimdall_onnx.archive.manifest import (
    BOM,
    RECOMMENDED,
    REPORT,
    SCHEMA_VERSION,
    SIGNATURE,
    Manifest,
    parse_manifest,
)
from heimdall_onnx.archive.mlflow_page import describe_version
from heimdall_onnx.common.errors import StoreError
from heimdall_onnx.services.connection import Connection
from heimdall_onnx.services.retention import Protection, retain
from heimdall_onnx.services.store import MANIFEST, parse_uri, to_json

if TYPE_CHECKING:
    from heimdall_onnx.archive.record import Record
    from heimdall_onnx.archive.signing import Signer
    from heimdall_onnx.common.parameters import ReleaseParameters
    from heimdall_onnx.services.store import StoredObject


def describe_manifest(
    record: Record,
    parameters: ReleaseParameters,
    reports: Iterable[StoredObject],
    *,
    verdict: str,
    costs: list[dict[str, Any]],
    signer: Signer | None,
    protection: Protection,
) -> dict[str, Any]:
    """What the manifest of a release says.

    Args:
        record: What the notebook has recorded, its upload and registration among it.
        parameters: Of the release.
        reports: What was uploaded since.
        verdict: As it was judged from outside.
        costs: Seconds and memory by step.
        signer: Who signs the release, if anybody.
        protection: How the store keeps it.
    """
    uploaded, registered = record.uploaded, record.registered
    assert uploaded is not None
    assert registered is not None
    recorded, signature = record.to_json(), None
    if signer is not None:
        folder = f"{parameters.prefix}/{uploaded.version}"
        signature = {"key": f"{folder}/{SIGNATURE}", "signer_sha256": signer.sha256}
    return {
        "schema_version": SCHEMA_VERSION,
        "version": uploaded.version,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": verdict,
        "gates": recorded["gates"],
        "objects": [
            {"key": o.key, "size": o.size_bytes, "sha256": o.sha256}
            for o in sorted((*uploaded.objects, *reports), key=lambda o: o.key)
        ],
        "content": [entry.model_dump() for entry in uploaded.content],
        "datasets": [dataset.model_dump() for dataset in uploaded.datasets],
        "signature": signature,
        "protection": asdict(protection),
        "parameters": parameters.model_dump(mode="json"),
        **{what: recorded[what] for what in ("model", "variants", "checkpoint")},
        "evaluation_data": recorded["evaluation_data"],
        "git": {
            "commit": record.environment.git_commit,
            "dirty": record.environment.git_dirty,
        },
        "environment": recorded["environment"],
        "threads": record.threads,
        "costs": costs,
        "mlflow": {
            "run_id": parameters.run_id,
            "model_name": registered.model_name,
            "model_version": registered.model_version,
        },
    }


def add_bom(
    connection: Connection,
    folder_uri: str,
    described: Mapping[str, Any],
    record: Record,
) -> dict[str, Any]:
    """Upload the bill of materials, and name it in what the manifest says.

    Raises:
        ServiceError: If the store can't be reached or refuses.
    """
    from heimdall_onnx.release.bom import describe_release

    bucket, folder = connection.locate(folder_uri)
    content = describe_release(parse_manifest(to_json(described), folder_uri), record)
    stored = bucket.upload_bytes(content, f"{folder}/{BOM}")
    entry = {"key": stored.key, "size": stored.size_bytes, "sha256": stored.sha256}
    objects = sorted([*described["objects"], entry], key=lambda o: str(o["key"]))
    return {**described, "objects": objects}


def complete_release(
    connection: Connection, folder_uri: str, described: Mapping[str, Any], signer: Signer | None
) -> Manifest:
    """Signature, tags, and the manifest last: from then on it is a release.

    Args:
        connection: Store and registry.
        folder_uri: The release's folder.
        described: As `describe_manifest` gives it.
        signer: Who signs.

    Raises:
        ServiceError: If a service can't be reached or refuses.
    """
    manifest = parse_manifest(to_json(described), folder_uri)
    bucket = connection.bucket(manifest.bucket)
    tags = {
        "manifest_uri": f"{manifest.uri}/{MANIFEST}",
        "manifest_sha256": manifest.sha256,
        "report_uri": f"{manifest.uri}/{REPORT}",
        "verdict": manifest.said.verdict,
    }
    if manifest.said.variants is not None:
        tags[RECOMMENDED] = manifest.recommended
    if signer is not None:
        digests = {name: entry.sha256 for name, entry in manifest.objects.items()}
        signed = signer.sign(manifest.version, {**digests, MANIFEST: manifest.sha256})
        signature = bucket.upload_bytes(signed, f"{manifest.folder}/{SIGNATURE}")
        tags["signature_sha256"] = signature.sha256
    # The model's hash last: a version that has it, and names no manifest, is opened without one.
    tags["sha256"] = manifest.model.sha256
    connection.tracker.set_version_tags(manifest.model_name, manifest.model_version, tags)
    protection = Protection(**described["protection"])
    kept = [entry.key for entry in (*manifest.objects.values(), *manifest.said.content)]
    if manifest.said.signature is not None:
        kept.append(manifest.said.signature.key)
    if (dataset := manifest.dataset) is not None:
        from heimdall_onnx.archive.content import open_kept

        files = open_kept(connection.client, dataset).file_names()
        name, folder = parse_uri(dataset.address)
        # One in another bucket belongs to whoever keeps that.
        kept += [f"{folder}/{file}" for file in files if name == manifest.bucket]
    retain(bucket, kept, protection)
    for entry in manifest.said.content:
        if not bucket.exists(entry.key):
            raise StoreError(
                f"{bucket.uri(entry.key)} has vanished since it was uploaded; run again"
            )
    bucket.upload_bytes(
        manifest.text,
        manifest.key,
        if_absent=True,
        lock_until=protection.until,
    )
    return manifest


def present_release(connection: Connection, manifest: Manifest, record: Record) -> None:
    """Say on the version's page in MLflow what a complete release is.

    Args:
        connection: Store and registry.
        manifest: Of the release.
        record: What the notebook has recorded.

    Raises:
        RegistryError: If MLflow can't be reached or refuses.
    """
    tracker, name, version = connection.tracker, manifest.model_name, manifest.model_version
    text = describe_version(record, manifest, tracker.get_run_info(manifest.said.mlflow.run_id))
    tracker.describe_version(name, version, text)
