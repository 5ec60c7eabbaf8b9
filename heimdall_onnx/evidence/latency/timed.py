"""The steps of a release that are timed, and the processors they hold meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from heimdall_onnx.common.errors import BenchmarkError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.verdict import Gate, NotMeasured
from heimdall_onnx.evidence.latency.cores import Cores, exclusive_cores

if TYPE_CHECKING:
    from heimdall_onnx.common.parameters import ReleaseParameters

_Found = TypeVar("_Found")

log = get_logger(__name__)

EXCLUSIVE_CORES = "exclusive cores"
_OURS = "held by this measurement alone"


class TimedSteps:
    """Runs the steps of a release that are timed, as far as its parameters let them be.

    With ``exclusive_cores`` this process holds its processors from the first step on, until `end`
    or its own end. If it can't get them, no step is run.

    Args:
        parameters: Of the release.
        folder: Where the locks are; `lock_folder` by default.
    """

    def __init__(self, parameters: ReleaseParameters, folder: Path | None = None) -> None:
        self._exclusive, self._folder = parameters.exclusive_cores, folder
        self._holding = ExitStack()
        self._cores: Cores | None = None
        self._refused: NotMeasured | None = None
        if not parameters.measure_latency:
            self._refused = NotMeasured("the parameter measure_latency is False")

    def run(
        self, step: Callable[[], _Found], *, wanted: bool = True
    ) -> _Found | NotMeasured | None:
        """Run a step.

        Args:
            step: What is timed.
            wanted: Whether the step was asked for.

        Returns:
            What it returns, or why it was not run; None if it was not asked for.

        Raises:
            HeimdallError: As the step does.
        """
        if not wanted:
            return None
        if self._exclusive and self._refused is None and self._cores is None:
            try:
                self._cores = self._holding.enter_context(exclusive_cores(self._folder))
            except BenchmarkError as error:
                self._refused = NotMeasured(str(error))
                log.warning("not measured", reason=str(error))
        return self._refused or step()

    def end(self) -> None:
        """Let the processors go."""
        self._holding.close()

    def gate(self) -> Gate:
        """The gate that demands exclusive processors."""
        if self._refused is not None:
            return Gate(EXCLUSIVE_CORES, _OURS, "taken", False, self._refused.reason)
        if self._cores is None:
            return Gate(EXCLUSIVE_CORES, _OURS, "unknown", False, "no step was timed")
        return Gate(EXCLUSIVE_CORES, _OURS, _OURS, True, str(self._cores))
