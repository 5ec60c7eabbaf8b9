"""Signatures of releases, in the bundle format of OpenSSF model signing.

The signature covers every object of a release and its manifest; the ``model_signing`` command line
verifies a downloaded folder against it too. Digests that are known already are signed, so that
nothing is read a second time.

Source: OpenSSF Model Signing 1.0, https://github.com/sigstore/model-transparency (an in-toto
statement in a DSSE envelope in a Sigstore bundle).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from heimdall_onnx.archive.manifest import REVIEWS, SIGNATURE
from heimdall_onnx.common.errors import SettingsError, VerificationError
from heimdall_onnx.services.settings import Settings

# Written when the release is complete, or after it.
_BESIDE = (SIGNATURE, REVIEWS)
# A signature of a release takes some kilobytes.
MAX_SIGNATURE_BYTES = 1 << 20


@dataclass(frozen=True)
class Signer:
    """A private key that signs releases.

    Attributes:
        sha256: SHA-256 of its public key (DER, SubjectPublicKeyInfo).
    """

    sha256: str
    _config: Any = field(repr=False)

    def sign(self, name: str, digests: Mapping[str, str]) -> bytes:
        """Sign the files of a folder by their digests.

        Args:
            name: Name of the folder; it only informs.
            digests: SHA-256 in hexadecimal by file name within the folder.

        Returns:
            The signature, to be kept as ``model.sig`` in that folder.
        """
        with tempfile.TemporaryDirectory(prefix="heimdall-signing-") as scratch:
            path = Path(scratch) / SIGNATURE
            self._config.set_hashing_config(_known(name, digests)).sign(scratch, path)
            return path.read_bytes()


@dataclass(frozen=True)
class Trust:
    """Whose signatures count; without either none can be checked.

    Attributes:
        public_key: The signer's public key (PEM, elliptic curve P-256, P-384 or P-521).
        certificates: Root certificates (PEM), for signatures with a certificate.
    """

    public_key: Path | None = None
    certificates: Path | None = None

    def __bool__(self) -> bool:
        return self.public_key is not None or self.certificates is not None


def open_signer(settings: Settings) -> Signer | None:
    """The signer that the settings name; None if they name none.

    Raises:
        SettingsError: If key or certificate can't be read, don't belong together, or the password
            is wrong.
    """
    key, certificate = settings.signing_key, settings.signing_certificate
    if key is None:
        if certificate is not None:
            raise SettingsError("HEIMDALL_SIGNING_CERTIFICATE needs HEIMDALL_SIGNING_KEY beside it")
        return None
    from cryptography.hazmat.primitives import serialization
    from model_signing import signing

    secret = settings.signing_key_password
    password = secret.get_secret_value().encode() if secret else None
    with _readable("HEIMDALL_SIGNING_KEY", key, "a private key (PEM, elliptic curve)"):
        private = serialization.load_pem_private_key(key.read_bytes(), password)
        if certificate is None:
            config = signing.Config().use_elliptic_key_signer(
                private_key=key,
                password=password,
            )
    if certificate is not None:
        if password is not None:
            raise SettingsError(
                "HEIMDALL_SIGNING_KEY_PASSWORD can't be used with HEIMDALL_SIGNING_CERTIFICATE, "
                "since model signing reads only keys without a password there"
            )
        # Without intermediates the certificate itself: the library refuses an empty chain.
        chain = settings.signing_certificate_chain or certificate
        with _readable("HEIMDALL_SIGNING_CERTIFICATE", certificate, "the key's certificate (PEM)"):
            config = signing.Config().use_certificate_signer(
                private_key=key,
                signing_certificate=certificate,
                certificate_chain=[chain],
            )
    public = private.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return Signer(hashlib.sha256(public).hexdigest(), config)


def check_signature(trust: Trust, name: str, digests: Mapping[str, str], signature: bytes) -> None:
    """Hold a signature against the digests that were found.

    Args:
        trust: Whose signature it must be.
        name: Name of the folder; it only informs.
        digests: SHA-256 in hexadecimal by file name within the folder, as found.
        signature: Content of ``model.sig``.

    Raises:
        SettingsError: If the public key or the certificates can't be read.
        VerificationError: If the signature is somebody else's, or of other files.
    """
    from model_signing import verifying

    config = verifying.Config()
    if trust.public_key is not None:
        with _readable("the public key", trust.public_key, "a public key (PEM, elliptic curve)"):
            config.use_elliptic_key_verifier(public_key=trust.public_key)
    else:
        assert trust.certificates is not None
        with _readable("the trusted certificates", trust.certificates, "certificates (PEM)"):
            config.use_certificate_verifier(certificate_chain=[trust.certificates])
    with tempfile.TemporaryDirectory(prefix="heimdall-signing-") as scratch:
        path = Path(scratch) / SIGNATURE
        path.write_bytes(signature)
        try:
            # It warns of old formats on standard output, which is the command line's own.
            with contextlib.redirect_stdout(io.StringIO()):
                config.set_hashing_config(_known(name, digests)).verify(Path(scratch), path)
        except Exception as error:
            # The bundle is anybody's, and the library lets through whatever its parsers raise.
            raise VerificationError(_reason(error)) from error


def _known(name: str, digests: Mapping[str, str]) -> Any:
    """What model signing would find by hashing the folder, of digests that are known."""
    from model_signing import hashing, manifest

    # The library has no public name for it, and its manifests are made of it.
    from model_signing._hashing.hashing import Digest

    class Known(hashing.Config):  # type: ignore[misc]  # its package is untyped to mypy here
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            return manifest.Manifest(
                name,
                [
                    manifest.FileManifestItem(
                        path=PurePosixPath(path), digest=Digest("sha256", bytes.fromhex(digest))
                    )
                    for path, digest in digests.items()
                ],
                manifest.SerializationType.from_args(
                    {
                        "method": "files",
                        "hash_type": "sha256",
                        "allow_symlinks": False,
                        "ignore_paths": list(_BESIDE),
                    }
                ),
            )

    return Known()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text or {"InvalidSignature": "it was not made with this key"}.get(
        type(error).__name__, type(error).__name__
    )


@contextlib.contextmanager
def _readable(what: str, path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SettingsError(f"{what}: {path} can't be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError) as error:
        # No cause: nothing of the key or its password is to be shown.
        raise SettingsError(
            f"{what}: expected {expected} in {path}, found something else, or its password is "
            f"missing or wrong ({type(error).__name__})"
        ) from None
