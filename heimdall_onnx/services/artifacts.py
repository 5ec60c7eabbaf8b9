"""What MLflow needs on this machine: a place for artifacts that can be used, and its plugins."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from mlflow.store.artifact.artifact_repository_registry import (
    get_artifact_repository,
    get_registered_artifact_repositories,
)
from mlflow.tracking.request_auth.registry import _request_auth_provider_registry, fetch_auth
from mlflow.utils.file_utils import local_file_uri_to_path

from heimdall_onnx.common.errors import HeimdallError, RegistryError, SettingsError
from heimdall_onnx.services.client import redact_url, shorten
from heimdall_onnx.services.registry_errors import registry_errors
from heimdall_onnx.services.settings import is_loopback

_PACKAGES = {
    "gs": "google-cloud-storage",
    "wasbs": "azure-storage-blob azure-identity",
    "abfss": "azure-storage-file-datalake azure-identity",
    "sftp": "pysftp",
}
_HINT = (
    "An experiment keeps its location: set MLFLOW_EXPERIMENT_NAME to the name of a new one, and "
    "MLFLOW_ARTIFACT_URI to where that is to keep them, e.g. s3://bucket"
)
# MLflow's names for parts of runs, of models and of Databricks.
_NO_PLACES = {"runs", "models", "dbfs"}


def check_artifacts(location: str, uri: str, *, write: bool = True) -> None:
    """Refuse a location of artifacts, an experiment's or a run's, that can't be used from here.

    Args:
        location: What MLflow says of it, e.g. ``s3://bucket/folder``.
        uri: The tracking address that it belongs to.
        write: Also keep a small file there, and delete it where that can be done.

    Raises:
        SettingsError: If a package is missing, or MLflow knows no such location, or it is a folder
            of another machine.
        RegistryError: If it can't be reached or refuses.
    """
    scheme = location.partition(":")[0].lower() if ":" in location else ""
    place = f"{redact_url(location)}, where the experiment keeps its artifacts"
    why = ""
    if scheme not in get_registered_artifact_repositories().keys() - _NO_PLACES:
        why = f"no installed plugin of MLflow knows {scheme}://; install the one that does"
    elif scheme in ("", "file"):
        why = _why_no_folder(Path(local_file_uri_to_path(location)), uri)
    if why:
        raise SettingsError(f"can't use {place}: {why}. {_HINT}")
    with _failing(SettingsError, f"can't use {place}", _HINT, _PACKAGES.get(scheme)):
        # A folder of its own, since of mlflow-artifacts:/ itself MLflow forgets a server's prefix.
        repository = get_artifact_repository(
            f"{location.rstrip('/')}/heimdall-onnx-check", tracking_uri=uri
        )
    if write:
        doing = f"write into {place},"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "check.txt")
            path.write_text("It can be written here.\n")
            failing = _failing(RegistryError, f"could not {doing}", _HINT)
            with failing, registry_errors(uri, doing):
                repository.log_artifact(str(path))
        # Not every place can delete, nor has to.
        with contextlib.suppress(Exception):
            repository.delete_artifacts()


def _why_no_folder(path: Path, uri: str) -> str:
    there = [path, *path.parents]
    if uri.startswith("http"):
        # A server makes the experiment's folder with the first artifact. Of another machine's
        # folders those that are here can only be shared ones.
        there = there[: 2 if is_loopback(uri) and len(there) > 2 else 1]
    found = next(filter(Path.is_dir, there), None)
    if not path.is_absolute() or found is None:
        return (
            "it is a folder of the server's machine and not here; let the server pass artifacts "
            "on (--serve-artifacts, --artifacts-destination), or make it if both machines share it"
        )
    writable = os.access(found, os.W_OK | os.X_OK)
    return "" if writable else f"this user may not write into {found}"


def check_plugins() -> None:
    """Refuse plugins of requests which MLflow, after a warning, would do without.

    Raises:
        SettingsError: If MLFLOW_TRACKING_AUTH names one that is not installed, or one fails.
    """
    for entry in entry_points(group="mlflow.request_header_provider"):
        with _failing(SettingsError, f"MLflow's plugin {entry.name} ({entry.value}) fails"):
            provider = entry.load()()
            if provider.in_context():
                provider.request_headers()
    if name := os.environ.get("MLFLOW_TRACKING_AUTH"):
        if name not in {one.get_name() for one in _request_auth_provider_registry}:
            raise SettingsError(
                f"MLFLOW_TRACKING_AUTH names {name!r}, and no installed plugin of MLflow has this "
                "name; install the one that does, or unset it"
            )
        with _failing(SettingsError, f"MLflow's plugin {name} of MLFLOW_TRACKING_AUTH fails"):
            fetch_auth(name)


@contextlib.contextmanager
def _failing(
    kind: type[HeimdallError], what: str, hint: str = "", package: str | None = None
) -> Iterator[None]:
    """Whatever MLflow, its plugins and the clients below them raise, as ``kind``."""
    try:
        yield
    except HeimdallError:
        raise
    except ImportError as error:
        install = f"run pip install {package}" if package else "install what it needs"
        raise SettingsError(f"{what}: {error}; {install}. {hint}".strip()) from None
    except Exception as error:
        said = shorten(str(error)) if hint else type(error).__name__  # that of a login may tell it
        raise kind(f"{what}: {said}. {hint}".strip()) from None
