"""What the store and the registry at hand can do, tried on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from heimdall_onnx.common.errors import NotRegisteredError, ServiceError, SettingsError, StoreError
from heimdall_onnx.services.client import redact_url
from heimdall_onnx.services.retention import is_locked, is_versioned
from heimdall_onnx.services.store import Bucket

if TYPE_CHECKING:
    from heimdall_onnx.services.connection import Connection
    from heimdall_onnx.services.registry import MLflowTracker


class Ability(NamedTuple):
    """Something that a release asks of a service.

    Attributes:
        name: What.
        needed: Whether there is no release without it.
        holds: Whether the service can.
        found: What it answered.
    """

    name: str
    needed: bool
    holds: bool
    found: str


def abilities(connection: Connection, bucket: Bucket) -> Iterator[Ability]:
    """Try what releases ask of the services, one after the other, with a few small requests each.

    In the bucket nothing is written but proofs, beside the logs of aliases; a bucket or an
    experiment that is not there is not made.
    """
    yield (store := _tried("store", True, lambda: _reach(bucket)))
    if store.holds and bucket.is_there():
        yield _tried("one of many writers of a name", True, lambda: _prove(bucket))
        yield _tried("versioning", False, lambda: _asked(is_versioned(bucket)))
        yield _tried("Object Lock", False, lambda: _asked(is_locked(bucket)))
    try:
        tracker = connection.tracker
    except (NotRegisteredError, ServiceError) as error:
        # A database that is not there yet is made by a release.
        yield Ability("registry", True, isinstance(error, NotRegisteredError), str(error))
        return
    addresses = dict.fromkeys((tracker.uri, tracker.registry_uri))
    found = " and, for models, ".join(redact_url(one, one) for one in addresses)
    yield Ability("registry", True, True, found)
    yield _tried("aliases", True, lambda: _known(tracker))
    yield _tried("artifacts", True, lambda: _reach_artifacts(connection, tracker))


def _tried(name: str, needed: bool, ask: Callable[[], str]) -> Ability:
    try:
        return Ability(name, needed, True, ask())
    except (ServiceError, SettingsError) as error:
        return Ability(name, needed, False, str(error))


def _reach(bucket: Bucket) -> str:
    there = "" if bucket.is_there() else " is not there yet: a release makes it"
    return f"{redact_url(bucket.client.meta.endpoint_url)}, bucket {bucket.name}{there}"


def _prove(bucket: Bucket) -> str:
    bucket.prove_conditional_writes()
    return "If-None-Match is honoured, by writers at once too"


def _asked(on: bool) -> str:
    if on:
        return "on"
    raise StoreError("off, or the store has none")


def _known(tracker: MLflowTracker) -> str:
    with contextlib.suppress(NotRegisteredError):
        tracker.version_by_alias("heimdall-onnx-check", "staging")
    return "are known"


def _reach_artifacts(connection: Connection, tracker: MLflowTracker) -> str:
    where = tracker.artifact_location()
    if not where.startswith("s3://"):
        from heimdall_onnx.services.artifacts import check_artifacts

        check_artifacts(where, tracker.uri, write=False)
    elif not (bucket := connection.locate(where)[0]).is_there():
        if not connection.settings.artifact_uri.startswith(bucket.uri().rstrip("/")):
            raise StoreError(f"{where}, the experiment's, whose bucket is not there: make it")
        return f"{where}, whose bucket is not there yet: a release makes it"
    return where
