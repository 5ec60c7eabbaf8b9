"""What releases are made of, kept once under its hash, so that they can be made again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from heimdall_onnx.errors import StoreError
from heimdall_onnx.logs import get_logger
from heimdall_onnx.manifest import Content, Role, content_key
from heimdall_onnx.store import (
    download_file,
    exists,
    format_uri,
    hash_object,
    touch_object,
    upload_file,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = get_logger(__name__)


def keep_content(
    client: S3Client,
    bucket: str,
    path: Path,
    sha256: str,
    role: Role,
) -> Content:
    """Keep a file under its hash, unless it is there already.

    Args:
        client: Client of the store.
        bucket: Bucket of the release.
        path: The file.
        sha256: Its SHA-256, as it was found when it was read.
        role: What it is to the release.

    Raises:
        DataError: If the file has changed since it was read.
        StoreError: If the store fails, or returns something else than was sent.
    """
    key = content_key(sha256)
    size = path.stat().st_size
    if exists(client, bucket, key):
        # Read again: what another release has left there is not taken on trust.
        if hash_object(client, bucket, key) == (sha256, size):
            # Dated anew: until the manifest names it, its age is all that protects it.
            touch_object(client, bucket, key)
            log.info("content there already", uri=format_uri(bucket, key))
            return Content(key=key, size=size, sha256=sha256, role=role, name=path.name)
        log.warning("damaged content is replaced", uri=format_uri(bucket, key))
    # Other releases may need it: a damaged answer is no reason to delete what is stored.
    stored = upload_file(client, path, bucket, key, sha256=sha256, delete_damaged=False)
    return Content(key=key, size=stored.size_bytes, sha256=sha256, role=role, name=path.name)


def fetch_content(client: S3Client, bucket: str, content: Content, folder: Path) -> Path:
    """Bring content back as a file in ``folder``, checked.

    Returns:
        The file; it has the name it had, as far as that is the name of a file.

    Raises:
        StoreError: If the store fails, or the content is not what its hash says.
    """
    suffix = Path(content.name).suffix
    # The name comes from a manifest; only its end matters to whoever reads the file.
    path = folder / f"{content.role}{suffix if suffix.isascii() else ''}"
    if not exists(client, bucket, content.key):
        raise StoreError(
            f"{format_uri(bucket, content.key)} is gone: the {content.role.replace('_', ' ')} of "
            "the release can't be fetched"
        )
    download_file(client, bucket, content.key, path, sha256=content.sha256)
    return path
