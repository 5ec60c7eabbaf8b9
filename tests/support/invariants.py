"""What must hold of all releases at every instant, however their runs have ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlflow
from releases import PREFIX

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.manifest import read_manifest
from heimdall_onnx.archive.release import Release
from heimdall_onnx.archive.verify import verify_release
from heimdall_onnx.common.errors import HeimdallError, NotRegisteredError, VerificationError
from heimdall_onnx.services.connection import Connection, open_for_reading
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import MANIFEST, Bucket, locate, parse_uri


@dataclass(frozen=True)
class Place:
    """Where releases of a model go.

    Attributes:
        settings: Store and registry, without anything in between that does harm.
        bucket: Their bucket.
        name: The registered model.
        alias: What they are offered under.
    """

    settings: Settings
    bucket: str
    name: str = "test-model"
    alias: str = "staging"

    def releases(self) -> list[str]:
        """Addresses of the folders that hold a manifest, oldest first."""
        client = open_for_reading(self.settings).client
        if not Bucket(client, self.bucket).is_there():
            return []
        found = Bucket(client, self.bucket).list_versions(PREFIX)
        return [f"s3://{self.bucket}/{PREFIX}/{version}" for version in found]

    def versions(self) -> list:
        """Everything that is registered, complete or not."""
        client = mlflow.MlflowClient(self.settings.tracking_uri.get_secret_value())
        return list(client.search_model_versions(f"name = '{self.name}'"))

    def aliases(self) -> dict[str, str]:
        """The version that each alias points at."""
        client = mlflow.MlflowClient(self.settings.tracking_uri.get_secret_value())
        found = client.search_registered_models(f"name = '{self.name}'")
        return {alias: str(v) for model in found for alias, v in model.aliases.items()}


def violations(place: Place, *, settled: bool = False) -> list[str]:
    """Everything that is not as it must be, in words.

    Args:
        place: Where to look.
        settled: Whether the last run has come to its end, so that the alias follows its log.
    """
    return list(_violations(place, settled))


def _violations(place: Place, settled: bool) -> Iterator[str]:
    connection = open_for_reading(place.settings)
    versions, releases = place.versions(), place.releases()
    by_number = {str(version.version): version for version in versions}
    complete = set()
    for folder in releases:
        problems = list(_problems_of_release(connection, folder, versions))
        yield from problems
        if not problems:
            complete.add(folder)
    for alias, number in place.aliases().items():
        if number not in by_number or by_number[number].source not in complete:
            yield f"alias {alias} points at version {number}, which is no complete release"
    for number, version in by_number.items():
        yield from _problems_of_loading(place, number, version.source in complete)
    yield from _problems_of_log(connection, place, settled)


def _problems_of_release(connection: Connection, folder: str, versions: list) -> Iterator[str]:
    try:
        findings = verify_release(Release.at(connection, folder))
        own = read_manifest(*locate(connection.client, folder)).model_version
    except HeimdallError as error:
        yield f"{folder} has a manifest and does not verify: {error}"
        return
    for finding in findings:
        if not finding.holds:
            yield f"{folder}, {finding.what}: {finding.expected} expected, {finding.found} found"
    registered = [str(version.version) for version in versions if version.source == folder]
    if registered != [own]:
        yield f"{folder} is version {own} by its manifest and registered as {registered}"


def _problems_of_loading(place: Place, number: str, complete: bool) -> Iterator[str]:
    try:
        load_model(f"models:/{place.name}/{number}", settings=place.settings, threads=1)
    except (VerificationError, NotRegisteredError) as error:
        if complete:
            yield f"version {number} is complete and can't be loaded: {error}"
    except HeimdallError as error:
        yield f"version {number} is refused with {type(error).__name__}: {error}"
    else:
        if not complete:
            yield f"version {number} can be loaded and is no complete release"


def _problems_of_log(connection: Connection, place: Place, settled: bool) -> Iterator[str]:
    if not connection.bucket(place.bucket).is_there():
        return
    try:
        moves = AliasLog(connection.bucket(place.bucket), place.name, place.alias).moves
    except HeimdallError as error:
        yield f"the log of alias {place.alias} can't be read: {error}"
        return
    offered = place.aliases().get(place.alias)
    said = moves[-1].version if moves else None
    if settled and offered != said:
        yield f"alias {place.alias} points at {offered}, its log says {said}"
    for move in moves[-1:]:
        if move.release is None:
            continue
        bucket, folder = parse_uri(move.release)
        if not connection.bucket(bucket).list_keys(f"{folder}/{MANIFEST}"):
            yield f"the log of alias {place.alias} ends with {move.release}, which is no release"
