"""What a worker of a fleet is given once, and how an item runs on it.

The plugin reaches workers that join later too. One that can't release, because its package is
another one or its environment lacks an address, is refused before the fleet begins; if it joins
later it takes no more items, and the one that it got is tried again elsewhere.
"""

from __future__ import annotations

from distributed import WorkerPlugin, get_worker
from distributed.utils import sync
from distributed.worker import Worker

from heimdall_onnx.common.environment import hash_of_package
from heimdall_onnx.common.errors import HeimdallError, SchedulerError
from heimdall_onnx.release.fleet.item import ItemOutcome, ItemRunner
from heimdall_onnx.release.fleet.plan import FleetItem
from heimdall_onnx.services.settings import Settings

# Names of the resources that workers declare.
RELEASE, MEMORY, CORES = "release", "memory", "cores"


def plugin_name() -> str:
    """Of the plugin that all fleets of this code share, two of them at a time as well."""
    return f"heimdall-fleet-{hash_of_package()[:12]}"


class FleetWorker(WorkerPlugin):  # type: ignore[misc]
    """Gives a worker what all its items share."""

    idempotent = True

    def __init__(self) -> None:
        self._code = hash_of_package()
        self.name = plugin_name()
        self.runner: ItemRunner | None = None
        self.problem = ""

    def setup(self, worker: Worker) -> None:
        """Called by Dask on the worker."""
        if not worker.state.total_resources.get(RELEASE):
            return
        try:
            if self._code != hash_of_package():
                raise SchedulerError(
                    "its heimdall_onnx differs from the client's, and so would its releases: "
                    "install the same version on both"
                )
            self.runner = ItemRunner(Settings.load(), worker.local_directory)
        except HeimdallError as error:
            self.problem = str(error)
            raise

    def teardown(self, worker: Worker) -> None:
        """Called by Dask on the worker."""
        if self.runner is not None:
            self.runner.__exit__(None, None, None)


def run_item(item: FleetItem, fleet: str, force: bool) -> ItemOutcome:
    """Release an item on the worker that this runs on."""
    worker = get_worker()
    plugin: FleetWorker | None = worker.plugins.get(plugin_name())
    if plugin is not None and plugin.runner is not None:
        return plugin.runner.run(item, fleet, force=force)
    # It would take every item and fail it at once, while the others are busy.
    sync(worker.loop, worker.set_resources, **{RELEASE: 0})
    reason = plugin.problem if plugin is not None else "it has not been prepared for this fleet"
    problem = f"the worker {worker.address} takes no more releases: {reason}"
    return ItemOutcome.of_failure(item, problem, SchedulerError.exit_code)
