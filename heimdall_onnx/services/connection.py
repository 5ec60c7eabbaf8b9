"""The store and the registry of one configuration, opened together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from heimdall_onnx.common.processes import without_garbage_collection
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.embedded import ensure_store
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket, locate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from heimdall_onnx.services.registry import MLflowTracker


@dataclass(frozen=True)
class Connection:
    """The services of a run.

    Attributes:
        settings: With the address and credentials that are really in use.
        client: S3 client.
        open_tracker: Gives MLflow; waits for it, if it is being reached, and raises what that
            raised.
    """

    settings: Settings
    client: S3Client = field(repr=False)
    open_tracker: Callable[[], MLflowTracker] = field(repr=False)

    @property
    def tracker(self) -> MLflowTracker:
        """MLflow.

        Raises:
            RegistryError: If it can't be reached or refuses.
        """
        return self.open_tracker()

    def bucket(self, name: str) -> Bucket:
        """A bucket of the store."""
        return Bucket(self.client, name)

    def locate(self, uri: str) -> tuple[Bucket, str]:
        """The bucket and the key of an address ``s3://bucket/key``."""
        return locate(self.client, uri)


def connect(settings: Settings, beside: ThreadPoolExecutor | None = None) -> Connection:
    """Start the embedded store if it is the one in use, and reach store and MLflow.

    Args:
        settings: Where they are.
        beside: Reaches MLflow while the caller goes on: its import takes seconds.

    Raises:
        ServiceError: If one of them can't be reached or refuses.
    """

    def open_tracker() -> MLflowTracker:
        from heimdall_onnx.services.registry import initialize_mlflow

        return initialize_mlflow(settings)

    settings = ensure_store(settings)
    client = make_client(settings)
    if beside is not None:
        return Connection(settings, client, beside.submit(copy_context().run, open_tracker).result)
    tracker = open_tracker()
    return Connection(settings, client, lambda: tracker)


def open_for_reading(settings: Settings | None = None) -> Connection:
    """Reach the store, and the registry once it is asked for, without making anything in them.

    Args:
        settings: Where they are; from the environment by default.

    Raises:
        ServiceError: If the store can't be started.
    """

    @cache
    def open_tracker() -> MLflowTracker:
        # To import MLflow, and to open it, is nearly all of a command's time.
        with without_garbage_collection():
            from heimdall_onnx.services.registry import open_registry

            return open_registry(there)

    there = ensure_store(settings or Settings.load())
    return Connection(there, make_client(there), open_tracker)
