"""The store and the registry of one configuration, opened together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.embedded import ensure_store
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

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


def connect(settings: Settings) -> Connection:
    """Start the embedded store if it is the one in use, and reach store and MLflow.

    Raises:
        ServiceError: If one of them can't be reached or refuses.
    """
    from heimdall_onnx.services.registry import initialize_mlflow

    settings = ensure_store(settings)
    client, tracker = make_client(settings), initialize_mlflow(settings)
    return Connection(settings, client, lambda: tracker)


def connect_beside(settings: Settings, beside: ThreadPoolExecutor) -> Connection:
    """The store at once, and MLflow while the model is on its way: its import takes seconds."""

    def open_tracker() -> MLflowTracker:
        from heimdall_onnx.services.registry import initialize_mlflow

        return initialize_mlflow(settings)

    settings = ensure_store(settings)
    client = make_client(settings)
    opened = beside.submit(copy_context().run, open_tracker)
    return Connection(settings, client, opened.result)


def open_for_reading(settings: Settings) -> Connection:
    """Reach store and registry without making anything in them.

    Raises:
        ServiceError: If one of them can't be reached or refuses.
    """
    from heimdall_onnx.services.registry import open_registry

    settings = ensure_store(settings)
    client, tracker = make_client(settings), open_registry(settings)
    return Connection(settings, client, lambda: tracker)
