"""Opening a released model, if its release verifies."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from heimdall_onnx.archive.find import find_registered, release_of
from heimdall_onnx.archive.manifest import RECOMMENDED, Manifest, Variant
from heimdall_onnx.archive.release import Release, fetch_files
from heimdall_onnx.archive.signing import Trust
from heimdall_onnx.archive.verify import require_verified, verify_release
from heimdall_onnx.common.errors import ParameterError, VerificationError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.machine import multiplies_in_8_bits, usable_processors
from heimdall_onnx.common.parameters import FP32, MODEL
from heimdall_onnx.model.inference import open_session
from heimdall_onnx.model.runtimes import OpenVINOSession, open_onnxruntime
from heimdall_onnx.services.connection import open_for_reading

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from heimdall_onnx.services.registry import RegisteredVersion
    from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)


def load_model(
    uri: str,
    *,
    variant: str = FP32,
    verify: bool = True,
    trust: Trust | None = None,
    settings: Settings | None = None,
    threads: int | None = None,
) -> InferenceSession | OpenVINOSession:
    """Open a released model, ready to run, if its release verifies.

    Everything that `verify_release` checks must hold, with two exceptions. Checkpoint and
    evaluation data, which nobody needs who only uses the model, are not looked at. Of variants
    other than the one that is opened the files must be there, and the registry and the signature
    must be about what the manifest says of them, but their content is neither fetched nor read;
    ``heimdall-onnx verify`` does that.

    The file is kept below the settings' home under its hash, and hashed again on every call; the
    other objects, some megabytes, are read from the store each time.

    Args:
        uri: ``models:/name@alias``, ``models:/name/version``, ``s3://…/vX``,
            ``s3://…/vX/model.onnx``, or a bare ``s3://….onnx`` object whose metadata holds its
            SHA-256. Of a bare object there is nothing but that hash to check, so that it is opened
            only where no signature is asked for.
        variant: Name of the variant: ``"fp32"``, which every release has, ``"recommended"``, or one
            that passed in this release. It is opened as it was measured for latency. Its figures
            are those of the processor that it was measured on; on another one they may differ.
        verify: False opens what does not verify too, and logs a warning that says why.
        trust: Whose signature the release must have; what the settings name by default.
        settings: Where the services are; from the environment by default.
        threads: Intra-op threads. By default those that the variant was measured with, but no more
            than this process has processors; ONNX Runtime's choice in a release without variants.

    Returns:
        A session of ONNX Runtime, or for a variant that runs on OpenVINO one that is called in the
        same way: ``run(output_names, feed)``, ``get_inputs()``, ``get_outputs()``.

    Raises:
        ParameterError: If ``uri`` is none of these, or there is no such variant, or one is asked
            for where there is no release around the model, or none that verifies.
        UnavailableError: If the variant's runtime or provider is not to be had here.
        InvalidModelError: If the file can't be loaded.
        VerificationError: If what is there is not what was recorded, or not signed as it must be.
        ServiceError: If a service can't be reached or refuses.

    Example:
        >>> session = load_model("models:/heimdall-localization-onnx@staging")  # doctest: +SKIP
    """
    connection = open_for_reading(settings)
    settings, cache = connection.settings, connection.settings.home / "models"
    found = find_registered(connection, uri)
    bare = _bare_model(found, uri)
    if trust is None:
        trust = Trust(settings.public_key, settings.trusted_certificates)
    if bare is not None and trust and verify:
        raise VerificationError(
            f"{uri} was uploaded or registered without a release around it, so it has no "
            "signature, and one is asked for; release it, or open it with verify=False"
        )
    if bare is not None:
        if variant not in {FP32, RECOMMENDED}:
            raise ParameterError(
                f"{uri} was uploaded or registered without a release around it, so it has no "
                f"variant {variant!r}; it has {FP32} alone"
            )
        address, digest = bare
        bucket, key = connection.locate(address)
        if not (digest := digest or bucket.head(key).sha256):
            raise VerificationError(
                f"{address} records no SHA-256 in its metadata, so it can't be verified; "
                "open the release folder instead"
            )
        path = fetch_files(bucket, {MODEL: (key, digest)}, cache)
        return open_session(path, threads=threads)
    try:
        release = release_of(connection, found, uri)
        chosen = release.manifest.variant(variant)
        path = _verified_model(release, chosen, cache, trust)
    except VerificationError as error:
        if verify:
            raise
        if variant != FP32:
            raise ParameterError(
                f"{uri} does not verify, and of what does not verify {FP32} alone can be opened, "
                f"not {variant!r}: {error}"
            ) from error
        log.warning("opened although it does not verify", uri=uri, reason=str(error))
        source = found.source if found else uri.removesuffix(f"/{MODEL}")
        bucket, folder = connection.locate(source.rstrip("/"))
        with tempfile.TemporaryDirectory(prefix="heimdall-unverified-") as scratch:
            for key in bucket.list_keys(f"{folder}/{MODEL}"):
                bucket.download_file(key, Path(scratch) / Path(key).name)
            return open_session(Path(scratch) / MODEL, threads=threads)
    _warn_of_processor(release.manifest, chosen, uri)
    return open_variant(path, chosen, threads)


def _warn_of_processor(manifest: Manifest, variant: Variant, uri: str) -> None:
    """8-bit weights that were made for a processor with products of them saturate on others."""
    made_on = manifest.said.environment.instruction_sets
    if (
        variant.name.startswith("int8")
        and multiplies_in_8_bits(made_on)
        and not multiplies_in_8_bits()
    ):
        log.warning(
            "this processor has no 8-bit products, for which the variant was made: its answers "
            "may be worse than those that passed the gates",
            uri=uri,
            variant=variant.name,
        )


def open_variant(
    path: Path, variant: Variant, threads: int | None
) -> InferenceSession | OpenVINOSession:
    """Open a variant as it was measured, as far as this machine has the threads for it."""
    if variant.sessions is None:
        return open_session(path, threads=threads)
    settings = variant.sessions.latency
    if threads is None:
        # More threads than processors wait for each other; 0 takes every processor.
        threads = settings.threads if settings.threads <= usable_processors() else 0
    settings = settings.model_copy(update={"threads": threads})
    if settings.runtime == "openvino":
        return OpenVINOSession(path, settings)
    return open_onnxruntime(path, settings)


def _verified_model(release: Release, variant: Variant, cache: Path, trust: Trust) -> Path:
    from heimdall_onnx.services.registry_errors import missing_database

    path, hashes = release.fetch_model(variant, cache)
    missing = missing_database(release.connection.settings.registry_uri.get_secret_value())
    if missing:
        # An address in the store is enough for who has no registry; a signature takes its place.
        log.warning("not held against a registry", uri=release.uri, missing=str(missing))
    findings = verify_release(
        release,
        trust=trust,
        hashed=hashes,
        unread=release.manifest.files_of_variants - hashes.keys(),
        registry=missing is None,
        content=False,
    )
    require_verified(findings, release.uri)
    return path


def _bare_model(found: RegisteredVersion | None, uri: str) -> tuple[str, str] | None:
    """Address and hash of a model without a manifest, as far as the registry has it."""
    if found is not None:
        if "manifest_sha256" in found.tags or "sha256" not in found.tags:
            return None
        # Registered step by step, without a release around it.
        return f"{found.source.rstrip('/')}/{MODEL}", found.tags["sha256"]
    if uri.startswith("s3://") and uri.endswith(".onnx") and not uri.endswith(f"/{MODEL}"):
        return uri, ""
    return None
