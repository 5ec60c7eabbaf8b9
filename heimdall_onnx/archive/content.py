"""What releases are made of, kept once under its hash, so that they can be made again."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from heimdall_onnx.archive.manifest import (
    Content,
    ContentRole,
    KeptDataset,
    content_key,
    dataset_folder,
)
from heimdall_onnx.common.errors import DataError, MissingObjectError, StoreError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed
from heimdall_onnx.data.dataset.dataset import Dataset, open_dataset
from heimdall_onnx.data.dataset.schema import HEADER
from heimdall_onnx.services.store import Bucket, Listed, locate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.archive.release import Release

log = get_logger(__name__)


def keep_content(
    bucket: Bucket,
    path: Path,
    sha256: str,
    role: ContentRole,
) -> Content:
    """Keep a file under its hash, unless it is there already.

    Args:
        bucket: Bucket of the release.
        path: The file.
        sha256: Its SHA-256, as it was found when it was read.
        role: What it is to the release.

    Raises:
        DataError: If the file has changed since it was read.
        StoreError: If the store fails, or returns something else than was sent.
    """
    key = content_key(sha256)
    content = Content(key=key, size=path.stat().st_size, sha256=sha256, role=role, name=path.name)
    with suppress(MissingObjectError):
        # Read again: what another release has left there is not taken on trust.
        if bucket.hash_object(key) == (sha256, content.size):
            # Dated anew: until the manifest names it, its age is all that protects it.
            bucket.touch(key)
            log.info("content there already", uri=bucket.uri(key))
            return content
        log.warning("damaged content is replaced", uri=bucket.uri(key))
    # Other releases may need it: a damaged answer is no reason to delete what is stored.
    bucket.upload_file(path, key, sha256=sha256, delete_damaged=False)
    return content


def upload_dataset(bucket: Bucket, dataset: Dataset, folder: str, *, replace: bool = False) -> str:
    """Upload a dataset from its folder; its header comes last, so that it is complete or absent.

    What is there already, by its recorded hash, is not sent again unless it turns out to be
    damaged: in the end all values are read back from the store and held against the digest.

    Args:
        dataset: The dataset.
        bucket: Bucket, which must exist.
        folder: Where to, without a slash at its end.
        replace: Take the place of another dataset that is there.

    Returns:
        Its address, ``s3://bucket/folder``.

    Raises:
        DataError: If the dataset is in a bucket already, can't be read or has changed since it was
            opened, or another one is there.
        StoreError: If the store fails, or returns something else than was sent.
    """
    there = bucket.list_objects(f"{folder}/")
    uri = bucket.uri(folder)
    if f"{folder}/{HEADER}" in there and not replace:
        _require_same(uri, open_dataset(uri, labels=False, client=bucket.client), dataset.digest)
    for name in dataset.file_names():
        # The header is dated anew: until a manifest names it, its age is all that protects it.
        known = there.get(f"{folder}/{name}") if name != HEADER else None
        _send(bucket, dataset.path / name, f"{folder}/{name}", known)
    problems = _problems(bucket.client, uri, dataset)
    for array in problems:
        log.warning("damaged array of a dataset is replaced", uri=uri, array=array)
        for name in dataset.file_names():
            if name.startswith(f"{array}/"):
                _send(bucket, dataset.path / name, f"{folder}/{name}", None)
    if problems and (left := _problems(bucket.client, uri, dataset)):
        raise DataError(
            f"dataset {dataset.address} has changed since it was opened:" + listed([*left.values()])
        )
    log.info("dataset stored", uri=uri, digest=dataset.digest)
    return uri


def _send(bucket: Bucket, path: Path, key: str, known: Listed | None) -> None:
    """Upload a file, unless one of that length and recorded hash is there."""
    sha256 = hash_file(path)
    same = known is not None and known.size == path.stat().st_size
    if not (same and bucket.head(key).sha256 == sha256):
        bucket.upload_file(path, key, sha256=sha256, delete_damaged=False)


def _problems(client: S3Client, uri: str, dataset: Dataset) -> dict[str, str]:
    """What is wrong with each array of a stored dataset, in words; read back whole."""
    stored = open_dataset(uri, labels=False, client=client)
    _require_same(uri, stored, dataset.digest)
    found = ((name, stored.problem_of(name)) for name in stored.arrays)
    return {name: problem for name, problem in found if problem}


def _require_same(uri: str, found: Dataset, digest: str) -> None:
    if found.digest != digest:
        raise DataError(f"{uri} is another dataset: expected digest {digest}, found {found.digest}")


def keep_dataset(bucket: Bucket, dataset: Dataset) -> KeptDataset:
    """Keep a dataset from a folder under its digest; one in a bucket stays where it is.

    Args:
        bucket: Bucket of the release.
        dataset: The dataset.

    Raises:
        DataError: If it can't be read.
        StoreError: If the store fails, or returns something else than was sent.
    """
    address = dataset.address
    if not address.startswith("s3://"):
        folder = dataset_folder(dataset.digest)
        address = upload_dataset(bucket, dataset, folder, replace=True)
    name = PurePosixPath(dataset.address).name
    return KeptDataset(role="evaluation_data", name=name, address=address, digest=dataset.digest)


def open_kept(client: S3Client, kept: KeptDataset) -> Dataset:
    """The dataset that a release was made of; its values are not looked at.

    Raises:
        DataError: If there is none, or it is another one.
        StoreError: If the store fails.
    """
    dataset = open_dataset(kept.address, labels=False, client=client)
    _require_same(kept.address, dataset, kept.digest)
    return dataset


def fetch_dataset(client: S3Client, kept: KeptDataset, folder: Path) -> Path:
    """Bring a dataset back as a folder in ``folder``, which needs room for all of it.

    Its values are not looked at: who opens it as evaluation data holds them against its digest.

    Raises:
        DataError: If there is none, or it is another one.
        StoreError: If the store fails.
    """
    dataset = open_kept(client, kept)
    bucket, prefix = locate(client, kept.address)
    path = folder / f"{kept.role}.zarr"
    for name in dataset.file_names():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        bucket.download_file(f"{prefix}/{name}", path / name)
    return path


def fetch_content(bucket: Bucket, content: Content, folder: Path) -> Path:
    """Bring content back as a file in ``folder``, checked.

    Returns:
        The file; it has the name it had, as far as that is the name of a file.

    Raises:
        StoreError: If the store fails, or the content is not what its hash says.
    """
    suffix = Path(content.name).suffix
    # The name comes from a manifest; only its end matters to whoever reads the file.
    path = folder / f"{content.role}{suffix if suffix.isascii() else ''}"
    try:
        bucket.download_file(content.key, path, sha256=content.sha256)
    except MissingObjectError as error:
        raise StoreError(
            f"{bucket.uri(content.key)} is gone: the {content.role.replace('_', ' ')} of "
            "the release can't be fetched"
        ) from error
    return path


def fetch_evaluation_data(release: Release, folder: Path) -> Path | Dataset | None:
    """The evaluation data of a release, a file brought into ``folder``; None for synthetic ones.

    Raises:
        DataError: If the dataset is gone, or another one.
        StoreError: If the store fails, or the content is not what its hash says.
    """
    if release.manifest.dataset is not None:
        return open_kept(release.bucket.client, release.manifest.dataset)
    content = release.manifest.content_of("evaluation_data")
    return None if content is None else fetch_content(release.bucket, content, folder)
