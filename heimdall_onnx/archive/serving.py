"""Serving a released model: predictions from whichever version an alias points at.

An inference service opens one `ServedModel` and asks it from as many threads as it has:

    with ServedModel("models:/heimdall-localization-onnx@production") as model:
        answer = model.predict({"mel_spectrogram": features})
        print(answer.model_version, answer.positions, answer.deviations)

Features come from recordings by the code that made them for training:

    made = write_features(["A_iq.wav", "B_iq.wav", "C_iq.wav"], "windows.npz")
    with np.load(made.path) as file:
        answer = model.predict({"mel_spectrogram": file["mel_spectrogram"]})

or, where the samples are in memory already, (receivers, samples) complex and simultaneous, from
`localization.mel.mel_windows`.

While it answers, a thread looks where the alias points. A version that is new there is fetched,
verified, opened and tried out while the old one goes on answering; then one reference changes, and
a request is answered by the version that it began with. What can't be taken is refused, with the
reason in the log and in `ServedModel.status`, and the old one stays.
"""

from __future__ import annotations

import math
import random
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from heimdall_onnx.archive.load import load_model
from heimdall_onnx.archive.manifest import RECOMMENDED, Manifest
from heimdall_onnx.archive.release import Release
from heimdall_onnx.common.arrays import Arrays
from heimdall_onnx.common.errors import (
    DataError,
    InvalidModelError,
    ServiceError,
    VerificationError,
)
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.parameters import Parameters, check_as
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.data.evaluation import unknown_ids
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.inference import run_onnx
from heimdall_onnx.model.signature import Signature, TensorSpec, differences
from heimdall_onnx.services.connection import open_for_reading

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from heimdall_onnx.archive.signing import Trust
    from heimdall_onnx.model.runtimes import OpenVINOSession
    from heimdall_onnx.services.registry import RegisteredVersion
    from heimdall_onnx.services.settings import Settings

log = get_logger(__name__)

# After a failure it is waited longer and longer, but no longer than this or `refresh_seconds`.
_BACK_OFF_S = 300.0
# A call to a service gives up within seconds, and is repeated a few times.
_CLOSE_S = 30.0


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of one batch of N samples.

    Attributes:
        outputs: Every output of the signature by name, sample axis first.
        model_version: The registered version that answered, e.g. ``"3"``.
        release_version: The release of that version, ``vYYYYMMDD_HHMMSS``.
        positions: (N, 2) degrees latitude, longitude; None for a model without positions.
        deviations: Their predicted standard deviations, (N, 2) degrees; None without either.
    """

    outputs: Arrays = field(repr=False)
    model_version: str
    release_version: str
    positions: npt.NDArray[Any] | None
    deviations: npt.NDArray[np.float64] | None


@dataclass(frozen=True)
class Refusal:
    """A version that the alias points at and that does not answer.

    Attributes:
        model_version: The version.
        reason: Why not.
        since: When it was first refused, UTC.
        tries: How often it has been tried.
    """

    model_version: str
    reason: str
    since: datetime
    tries: int


@dataclass(frozen=True)
class ServingStatus:
    """What a `ServedModel` is at.

    Attributes:
        model_version: The registered version that answers.
        release: Its release folder, ``s3://…``.
        variant: The variant of it that was opened.
        since: When it began to answer, UTC.
        looked: When the alias was last seen, UTC.
        refused: The version that the alias points at, if that one can't be taken.
        unreachable_since: Since when the alias could not be seen, UTC; None while it can.
        unreachable_reason: Why it could not; empty while it can.
    """

    model_version: str
    release: str
    variant: str
    since: datetime
    looked: datetime
    refused: Refusal | None = None
    unreachable_since: datetime | None = None
    unreachable_reason: str = ""

    @property
    def current(self) -> bool:
        """Whether, as far as is known, the version that answers is the alias's."""
        return self.refused is None and self.unreachable_since is None


class _Asked(Parameters):
    uri: str = Field(pattern="^models:/[^/@]+@[^/@]+$")
    refresh_seconds: float = Field(ge=0.1, le=86_400, strict=True)
    warm_up: list[Annotated[int, Field(ge=1, strict=True)]]


@dataclass(frozen=True, eq=False)
class _Version:
    """A version that is open. Its memory and files go when the last request on it has ended."""

    manifest: Manifest
    variant: str
    signature: Signature
    session: InferenceSession | OpenVINOSession | None  # None once it is closed
    since: datetime

    def answer(self, inputs: Arrays) -> Answer:
        assert self.session is not None
        outputs = run_onnx(self.session, inputs, self.signature)
        position = self.signature.position_output
        return Answer(
            outputs,
            self.manifest.model_version,
            self.manifest.version,
            outputs[position.name] if position else None,
            self.signature.deviations(outputs),
        )


class ServedModel:
    """The version of a released model that an alias points at, for any number of threads.

    A version is opened as `load_model` opens it: only if its release verifies, as the variant that
    was recommended, with the session options that were measured. Then it is run on valid random
    inputs, so that no request pays for the first call.

    In place of the version that answers only one is taken that the callers can go on with: it
    takes every input as the version did that this object began with, and gives every output of
    that one, in the same units. Of a version with another signature the status says what differs;
    it takes a restart. A refused version is tried again after longer and longer waits, up to five
    minutes, since what was damaged may be restored. The same goes for a registry that can't be
    reached.

    Its files are in a temporary folder of its own: those of the version that answers, those of one
    that is being opened, and those of versions whose last requests still run. A server that forks
    its workers must make it after that, in each of them. Opening a version makes many objects,
    which may set off a full garbage collection that holds up every thread; a service that can't
    spare some tenths of a second calls ``gc.freeze()`` when it has started.

    Args:
        uri: ``models:/NAME@ALIAS``.
        refresh_seconds: Time between two looks at the alias, 0.1 to 86400 s.
        variant: As for `load_model`; it must be there in every version.
        warm_up: Batch sizes of the first calls: a single sample, and what requests typically bring.
        trust: Whose signature the releases must have; what the settings name by default.
        settings: Where the services are; from the environment by default.
        threads: Intra-op threads; by default those that were measured.

    Raises:
        ParameterError: If an argument can't be used; every problem is named.
        UnavailableError: If the variant's runtime or provider is not to be had here.
        InvalidModelError: If the model can't be opened.
        VerificationError: If the release does not verify.
        ServiceError: If a service can't be reached or refuses, or there is no such alias.
    """

    def __init__(
        self,
        uri: str,
        *,
        refresh_seconds: float = 30.0,
        variant: str = RECOMMENDED,
        warm_up: Sequence[int] = (1, 8),
        trust: Trust | None = None,
        settings: Settings | None = None,
        threads: int | None = None,
    ) -> None:
        given = {"uri": uri, "refresh_seconds": refresh_seconds, "warm_up": list(warm_up)}
        check_as(_Asked, given)
        self._name, self._alias = uri.removeprefix("models:/").split("@")
        self.uri, self._refresh_s = uri, float(refresh_seconds)
        self._variant, self._warm_up = variant, tuple(warm_up)
        self._trust, self._threads = trust, threads
        self._connection = open_for_reading(settings)
        self._scratch = tempfile.TemporaryDirectory(
            prefix="heimdall-serving-", ignore_cleanup_errors=True
        )
        self._closed, self._refreshing = threading.Event(), threading.Lock()
        self._failures, self._again_at = 0, 0.0
        try:
            self._current = self._open(self._registered())
        except BaseException:
            self._clean_up()
            raise
        self._status = _status_of(self._current)
        self._first = self._current.signature
        # A daemon, so that a program that forgets to close this can end.
        self._thread = threading.Thread(target=self._watch, name=f"watch {uri}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"ServedModel({self.uri!r}, version {self._current.manifest.model_version})"

    @property
    def signature(self) -> Signature:
        """What the version that answers takes and gives."""
        return self._current.signature

    @property
    def status(self) -> ServingStatus:
        """Which version answers, since when, and what keeps the alias's own one from it."""
        return self._status

    def predict(self, inputs: Mapping[str, npt.ArrayLike]) -> Answer:
        """Answer a batch; any number of threads may ask at once.

        Args:
            inputs: One array per input of the signature, sample axis first, in the signature's
                dtypes: nothing is converted.

        Raises:
            DataError: If they don't fit the signature, with every problem at once: names, dtypes,
                shapes, no samples, NaN or Inf, ids beyond their range.
            EvidenceError: If the model can't run on them.
            ServiceError: If this model is closed.
        """
        version = self._current  # one for the whole request, whatever the alias does meanwhile
        if self._closed.is_set() or version.session is None:
            raise ServiceError(f"{self.uri} is closed here and answers no more; open it again")
        return version.answer(checked_inputs(inputs, version.signature))

    def refresh(self) -> ServingStatus:
        """Look at the alias now, and take the version that it points at if that is a new one.

        What goes wrong is in the status that it returns, and raises nothing.

        Raises:
            ServiceError: If this model is closed.
        """
        with self._refreshing:
            if self._closed.is_set():
                raise ServiceError(f"{self.uri} is closed here; open it again")
            self._look(at_once=True)
        return self._status

    def close(self) -> None:
        """Answer no further request, and end thread and files; requests that run end well.

        A thread that waits for a service ends as soon as that answers or is given up, and takes
        the files along; it is waited for half a minute.
        """
        self._closed.set()
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            log.warning("still waits for a service, and ends after that", model=self.uri)

    def _watch(self) -> None:
        try:
            while not self._closed.wait(_backed_off(self._refresh_s, self._failures)):
                with self._refreshing:
                    self._look()
        finally:
            with self._refreshing:
                # The caller's variable may live on; the model's memory must not.
                self._current = replace(self._current, session=None)
                self._clean_up()

    def _look(self, *, at_once: bool = False) -> None:
        """Compare the alias with what answers; nothing that goes wrong here may end the thread."""
        try:
            found = self._registered()
        except Exception as error:
            self._note_unreachable(error)
            return
        self._note_reachable()
        refused = self._status.refused
        if found.version == self._current.manifest.model_version:
            self._status = replace(self._status, refused=None)
            return
        again = refused is not None and refused.model_version == found.version
        if again and not at_once and time.monotonic() < self._again_at:
            return
        started = time.perf_counter()
        try:
            opened = self._open(found, self._first)
        except Exception as error:
            self._note_refused(found.version, refused if again else None, error)
            return
        if self._closed.is_set():
            return
        previous, self._current = self._current, opened
        self._status = _status_of(opened)
        log.info(
            "another version answers",
            model=self.uri,
            version=found.version,
            previous=previous.manifest.model_version,
            seconds=round(time.perf_counter() - started, 2),
        )

    def _note_unreachable(self, error: Exception) -> None:
        self._failures += 1
        since, reason = self._status.unreachable_since, _reason(error)
        if since is None:
            since = datetime.now(UTC)
            log.warning(
                "the alias can't be seen, and the old version goes on answering",
                model=self.uri,
                version=self._status.model_version,
                reason=reason,
            )
        self._status = replace(self._status, unreachable_since=since, unreachable_reason=reason)

    def _note_reachable(self) -> None:
        now, since = datetime.now(UTC), self._status.unreachable_since
        if since is not None:
            seconds = round((now - since).total_seconds(), 1)
            log.info("the alias can be seen again", model=self.uri, seconds=seconds)
        self._failures = 0
        self._status = replace(
            self._status, looked=now, unreachable_since=None, unreachable_reason=""
        )

    def _note_refused(self, version: str, before: Refusal | None, error: Exception) -> None:
        reason = _reason(error)
        since, tries = (before.since, before.tries) if before else (datetime.now(UTC), 0)
        self._again_at = time.monotonic() + _backed_off(self._refresh_s, tries + 1)
        self._status = replace(self._status, refused=Refusal(version, reason, since, tries + 1))
        if before is None:
            log.warning(
                "a new version is refused, and the old one goes on answering",
                model=self.uri,
                version=version,
                answers=self._status.model_version,
                reason=reason,
            )

    def _registered(self) -> RegisteredVersion:
        from heimdall_onnx.services.registry import open_registry

        # Opened each time: that finds out within seconds whether anything is there.
        return open_registry(self._connection.settings).version_by_alias(self._name, self._alias)

    def _open(self, found: RegisteredVersion, first: Signature | None = None) -> _Version:
        folder = Path(tempfile.mkdtemp(prefix=f"{found.version}-", dir=self._scratch.name))
        settings = self._connection.settings
        try:
            release = Release.at(self._connection, found.source)
            manifest = release.manifest
            recorded = found.tags.get("manifest_sha256", "none")
            if manifest.sha256 != recorded:
                raise VerificationError(
                    f"{manifest.uri} is not what was registered as version {found.version} of "
                    f"{found.name}: expected a manifest with SHA-256 {recorded}, found "
                    f"{manifest.sha256}"
                )
            signature = manifest.said.model.signature
            if first is not None:
                require_compatible(first, signature)  # before anything large is fetched
            session = load_model(
                # Not by the alias, which may have moved on.
                f"models:/{found.name}/{found.version}",
                variant=self._variant,
                trust=self._trust,
                settings=settings.model_copy(
                    # The registry's address may be that of a file below the real home.
                    update={"home": folder, "mlflow_tracking_uri": settings.tracking_uri}
                ),
                threads=self._threads,
            )
            for count in self._warm_up:
                run_onnx(session, generic_inputs(signature, count), signature)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        variant = manifest.variant(self._variant).name
        version = _Version(manifest, variant, signature, session, datetime.now(UTC))
        weakref.finalize(version, shutil.rmtree, folder, ignore_errors=True)
        return version

    def _clean_up(self) -> None:
        self._scratch.cleanup()
        self._connection.client.close()


def checked_inputs(inputs: Mapping[str, npt.ArrayLike], signature: Signature) -> Arrays:
    """A request as arrays; raises a `DataError` with all that does not fit the signature."""
    try:
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
    except ValueError as error:
        raise DataError(f"the request holds something else than arrays: {error}") from error
    problems = []
    try:
        signature.check_inputs(arrays, "the request")
    except DataError as error:
        problems.append(str(error))
    else:
        problems += unknown_ids(arrays, signature)
    known = {spec.name for spec in signature.inputs}
    if unknown := sorted(map(str, arrays.keys() - known)):
        expected = ", ".join(sorted(known))
        problems.append(f"the model has no inputs {unknown}; expected {expected} alone")
    if problems:
        raise DataError("\n".join(problems))
    return arrays


def _status_of(version: _Version) -> ServingStatus:
    manifest = version.manifest
    return ServingStatus(
        manifest.model_version, manifest.uri, version.variant, version.since, datetime.now(UTC)
    )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {shown(str(error), 2000)}"


def _backed_off(seconds: float, failures: int) -> float:
    """Twice as long after each failure; by chance, so that many services don't come at once."""
    if not failures:
        return seconds
    longest = max(seconds, _BACK_OFF_S)
    return random.uniform(0.5, 1.0) * min(longest, seconds * 2.0 ** min(failures, 30))


def require_compatible(old: Signature, new: Signature) -> None:
    """Raise unless callers of a model with the old signature can go on with the new one."""
    inputs, outputs = ({s.name: s for s in specs} for specs in (old.inputs, old.outputs))
    taken = (_widened(spec, inputs.get(spec.name, spec)) for spec in new.inputs)
    given = (
        replace(s, shape=_wider(outputs[s.name].shape, s.shape), range=outputs[s.name].range)
        for s in new.outputs
        if s.name in outputs
    )
    seen = Signature(tuple(taken), tuple(given), old.axes)
    if problems := [
        f"{kind} {name}: it was {was}; it is {now}"
        for kind, name, was, now in differences(old, seen)
        if name != "order"
    ]:
        raise InvalidModelError(
            "it has another signature, with which callers can't go on without a change; change "
            f"them and restart the service, or release it under another name:{listed(problems)}"
        )


def _widened(now: TensorSpec, was: TensorSpec) -> TensorSpec:
    """An input as before where it takes all that it took, and more lengths or identities."""
    low, high = now.range or (-math.inf, math.inf)
    least, most = was.range or (-math.inf, math.inf)
    # Of floating-point inputs the range is that of examples.
    floats = not np.issubdtype(np.dtype(now.dtype), np.integer)
    same = floats or (low <= least and most <= high)
    shape = was.shape if _wider(now.shape, was.shape) == now.shape else now.shape
    return replace(now, shape=shape, range=was.range if same else now.range)


def _wider(one: tuple[int | str, ...], other: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """The one shape if the other fits into it, where a named axis has any length, else that."""
    fits = len(one) == len(other) and all(
        isinstance(want, str) or want == have for want, have in zip(one, other, strict=True)
    )
    return one if fits else other
