"""Looking for credentials in everything that was stored, on servers and in files."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote

import pytest

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

# What the session's services ask for, by what it is.
IN_USE: dict[str, str] = {}
# These hold them on purpose, readable by their owner alone; `data` is what the store itself writes.
SPARED = {"service.json", "s3.json"}
CHUNK = 8 << 20
_LARGE = 64 << 20


def forms(secret: str) -> set[bytes]:
    """A secret as it is, quoted for an address or for JSON, in hexadecimal, and within Base64."""
    plain = secret.encode()
    found = {plain, quote(secret, safe="").encode(), json.dumps(secret)[1:-1].encode()}
    found.add(plain.hex().encode())
    for offset in range(3):
        # Only the characters that depend on nothing but the secret.
        first, last = -(-8 * offset // 6), 8 * (offset + len(plain)) // 6
        inner = base64.b64encode(bytes(offset) + plain)[first:last]
        found |= {inner, inner.translate(bytes.maketrans(b"+/", b"-_"))}
    return found


def search(file: BinaryIO, needles: Mapping[str, Iterable[bytes]]) -> set[str]:
    """Which secrets are in a stream."""
    longest = max((len(n) for forms in needles.values() for n in forms), default=0)
    found, tail = set[str](), b""
    while chunk := file.read(CHUNK):
        text = tail + chunk
        found |= {what for what, forms in needles.items() if any(n in text for n in forms)}
        tail = text[-longest:]
    return found


def search_store(
    client: S3Client, secrets: Mapping[str, str], buckets: Iterable[str] | None = None
) -> list[str]:
    """Every object that holds one of ``secrets``, in its content or around it.

    Of objects of one name and one content, which releases of one model share, the content is read
    once; what is around it is looked at for each.
    """
    needles = {what: forms(secret) for what, secret in secrets.items()}
    if buckets is None:
        buckets = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]

    def look(place: tuple[str, str, bool]) -> list[str]:
        bucket, key, again = place
        stored = (client.head_object if again else client.get_object)(Bucket=bucket, Key=key)
        around = repr((key, stored["Metadata"], stored.get("ContentType"))).encode()
        found = set() if again else search(stored["Body"], needles)
        found |= {what for what, forms in needles.items() if any(n in around for n in forms)}
        return [f"{what} in s3://{bucket}/{key}" for what in sorted(found)]

    with ThreadPoolExecutor(4) as pool:
        return list(chain.from_iterable(pool.map(look, _objects(client, buckets))))


def _objects(client: S3Client, buckets: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """Bucket and key of each object, and whether its content was there before."""
    seen = set()
    for bucket in buckets:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                alike = (entry["Key"].rpartition("/")[2], entry["ETag"], entry["Size"])
                yield bucket, entry["Key"], alike in seen
                seen.add(alike)


def search_files(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """Every file below ``folder`` that holds one of ``secrets``: databases, notebooks, logs.

    Of the largest, which are weights, only the two ends are read, where a format has its texts.
    """
    needles = {what: forms(secret) for what, secret in secrets.items()}
    found = []
    for parent, folders, names in os.walk(folder):
        if "s3.json" in names:
            folders[:] = [name for name in folders if name != "data"]
        for name in set(names) - SPARED:
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    there = search(_ends(file), needles)
                found += [f"{what} in {path}" for what in sorted(there)]
    return found


def _ends(file: BinaryIO) -> BinaryIO:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size <= _LARGE:
        return file
    first = file.read(CHUNK)
    file.seek(-CHUNK, os.SEEK_END)
    return io.BytesIO(first + file.read())


def search_postgres(uri: str, secrets: Mapping[str, str]) -> list[str]:
    """Every table of a PostgreSQL database that holds one of ``secrets``."""
    import psycopg2

    needles = {what: forms(secret) for what, secret in secrets.items()}
    found = []
    connection = psycopg2.connect(uri)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            for (table,) in cursor.fetchall():
                cursor.execute(f'SELECT t::text FROM "{table}" AS t')
                text = "\n".join(row for (row,) in cursor).encode()
                found += [
                    f"{what} in table {table}"
                    for what, forms in needles.items()
                    if any(n in text for n in forms)
                ]
    finally:
        connection.close()
    return found


def require_none(found: Iterable[str]) -> None:
    """Fail with every place where a credential was found."""
    if places := sorted(found):
        pytest.fail("credentials were stored:\n  " + "\n  ".join(places), pytrace=False)
