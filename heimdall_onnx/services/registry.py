"""MLflow: runs, model versions, tags and aliases, with errors in plain words."""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from heimdall_onnx.common.errors import DataError, NotRegisteredError, ParameterError, RegistryError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.signals import interrupted_after
from heimdall_onnx.services.artifacts import check_artifacts, check_plugins
from heimdall_onnx.services.client import make_client, redact_url, set_default_session
from heimdall_onnx.services.embedded import ensure_store
from heimdall_onnx.services.registry_errors import (
    limit_waits,
    missing_database,
    probe,
    registry_errors,
)
from heimdall_onnx.services.retries import MLFLOW_DEFAULTS, log_http_requests
from heimdall_onnx.services.settings import Settings, bypass_proxy, clean_environment, with_driver
from heimdall_onnx.services.store import Bucket, parse_uri

with warnings.catch_warnings():
    # In a notebook MLflow's progress bars ask for a widget library that nothing here needs.
    warnings.filterwarnings("ignore", ".*IProgress not found")
    import mlflow
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
    from mlflow.tracking.context.registry import resolve_tags
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

log = get_logger(__name__)

STAGES = ("None", "Staging", "Production", "Archived")
_DATASET = ("name", "digest", "source_type", "source", "schema", "profile")

# MLflow looks whether an alias is there, then adds or changes it: what another writer does in
# between makes that fail, and the next look sees it.
_ALIAS_TRIES = 3

_TRACKING, _REGISTRY = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
# With these MLflow takes any certificate.
_UNCHECKED = ("MLFLOW_TRACKING_INSECURE_TLS", "MLFLOW_S3_IGNORE_TLS")


@dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Attributes:
        name: The registered model.
        version: Its version, e.g. ``"3"``.
        source: Address of the folder that MLflow loads it from.
        run_id: The run it came from, or None.
        stage: ``"None"``, ``"Staging"``, ``"Production"`` or ``"Archived"``.
        tags: Its tags.
        created_ms: When it was registered, milliseconds since 1970.
        description: What its page says, Markdown.
    """

    name: str
    version: str
    source: str
    run_id: str | None
    stage: str
    tags: Mapping[str, str]
    created_ms: int
    description: str = ""


class _Unless(contextlib.AbstractContextManager[None]):
    """Goes on where MLflow answers with a certain error, which says that there is nothing to do."""

    def __init__(self, code: str) -> None:
        self._code = code

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, MlflowException) and error.error_code == self._code


class _Client(mlflow.MlflowClient):  # type: ignore[misc]  # it is untyped
    def _raise_if_prompt(self, name: str) -> None:
        """Nothing: to see that a model is no prompt, MLflow asks for the model before each call."""


class MLflowTracker:
    """One MLflow server or database, and one experiment in it.

    The experiment is made where it is missing, as soon as it is needed. MLflow's fluent functions
    (``mlflow.log_metric`` and the like) act on the same address, and on the run that `start_run`
    starts, from that call on.

    Args:
        tracking_uri: ``http(s)://…``, ``sqlite:///…`` or ``postgresql://…`` as MLflow or a person
            would write it.
        artifact_uri: Where a new experiment keeps its artifacts; the bucket must exist when the
            first artifact is logged (`initialize_mlflow` makes it).
        experiment_name: Experiment of the runs.
        registry_uri: Where the registered models are; by default where the runs are.

    Raises:
        SettingsError: If an address is none of these, or needs a missing driver; or a plugin of
            MLflow's is missing or fails.
        RegistryError: If it can't be reached within seconds or refuses.
    """

    def __init__(
        self,
        tracking_uri: str,
        artifact_uri: str = "s3://heimdall-mlflow",
        experiment_name: str = "heimdall-localization",
        registry_uri: str | None = None,
    ) -> None:
        clean_environment()
        self.uri = limit_waits(with_driver(tracking_uri))
        self.registry_uri = limit_waits(with_driver(registry_uri or tracking_uri))
        for name, value in MLFLOW_DEFAULTS.items():
            os.environ.setdefault(name, value)
        log_http_requests()
        for name in _UNCHECKED:
            if os.environ.get(name, "").lower() in ("true", "1"):
                log.warning("certificates are not checked", variable=name)
        for address in dict.fromkeys((self.registry_uri, self.uri)):
            bypass_proxy(address)
            probe(address, _TRACKING if address == self.uri else _REGISTRY)
            if address.startswith("http"):
                check_plugins()
        with self._errors("open the registry"):
            self._client = _Client(self.uri, self.registry_uri)
        self.experiment_name = experiment_name
        self._artifact_uri = artifact_uri

    @cached_property
    def experiment_id(self) -> str:
        """The experiment's id; the experiment is made if there is none of its name.

        Raises:
            RegistryError: If it is deleted, or MLflow can't be reached or refuses.
        """
        name = self.experiment_name
        with self._errors(f"open experiment {name}"):
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                with _Unless("RESOURCE_ALREADY_EXISTS"):  # somebody else has made it since
                    return str(self._client.create_experiment(name, self._artifact_uri))
                experiment = self._client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise RegistryError(
                f"experiment {name!r} is deleted; restore it, or set MLFLOW_EXPERIMENT_NAME"
            )
        return str(experiment.experiment_id)

    def artifact_location(self) -> str:
        """Where the experiment keeps its artifacts, or will; nothing is made.

        Raises:
            RegistryError: If MLflow can't be reached or refuses.
        """
        with self._errors(f"look at experiment {self.experiment_name}"):
            experiment = self._client.get_experiment_by_name(self.experiment_name)
        return str(experiment.artifact_location if experiment else self._artifact_uri)

    def __repr__(self) -> str:
        return f"MLflowTracker({redact_url(self.uri, self.uri)!r}, {self.experiment_name!r})"

    def start_run(
        self,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> str:
        """Start a run, or go on with ``run_id``, and make it the active one.

        Going on with the run that is active already changes nothing.

        Raises:
            RegistryError: If another run is active, or there is no such run.
        """
        active = mlflow.active_run()
        if active is not None and active.info.run_id == run_id:
            return str(run_id)
        if active is not None:
            raise RegistryError(
                f"run {active.info.run_id} is active; end it before another one is started"
            )
        with self._errors(f"go on with run {run_id}" if run_id else "start a run"):
            mlflow.set_tracking_uri(self.uri)
            run = mlflow.start_run(
                run_id=run_id,
                run_name=run_name,
                experiment_id=None if run_id else self.experiment_id,
                tags=_strings(tags),
            )
        return str(run.info.run_id)

    def end_run(self, status: str = "FINISHED") -> None:
        """End the active run, if there is one, as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self._errors("end the run"):
            mlflow.end_run(status)

    def create_run(self, run_name: str) -> str:
        """A new run beside the active one, if there is one; `close_run` ends it.

        Neither the process's active run nor one that ``MLFLOW_RUN_ID`` names is touched.
        """
        experiment_id = self.experiment_id
        with self._errors("create a run"):
            run = self._client.create_run(experiment_id, run_name=run_name, tags=resolve_tags())
        return str(run.info.run_id)

    def check_run(self, run_id: str) -> None:
        """Refuse a run that can't be logged into.

        Raises:
            SettingsError: If its artifacts are where they can't be kept from here.
            RegistryError: If there is no such run, or it is deleted.
        """
        with self._errors(f"go on with run {run_id}"):
            run = self._client.get_run(run_id).info
        if run.lifecycle_stage != "active":
            raise RegistryError(
                f"run {run_id} is {run.lifecycle_stage}; restore it, or name another one"
            )
        if run.experiment_id != self.__dict__.get("experiment_id"):
            check_artifacts(run.artifact_uri, self.uri)  # those of another experiment

    def close_run(self, run_id: str, status: str) -> None:
        """End a run that `create_run` made, as ``FINISHED``, ``FAILED`` or ``KILLED``."""
        with self._errors(f"end run {run_id}"):
            self._client.set_terminated(run_id, status)

    def log_params(self, params: Mapping[str, Any], *, run_id: str | None = None) -> None:
        """Log parameters of a run, by default of the active one; MLflow refuses to change one."""
        run_id = run_id or self._active_run_id()
        logged = [Param(name, str(value)) for name, value in params.items()]
        with self._errors("log parameters"):
            self._client.log_batch(run_id, params=logged)

    def set_tags(self, tags: Mapping[str, Any], *, run_id: str) -> None:
        """Set tags of a run, which unlike its parameters can change; None takes a tag away."""
        kept = _strings({name: value for name, value in tags.items() if value is not None})
        with self._errors(f"tag run {run_id}"):
            self._client.log_batch(run_id, tags=[RunTag(*pair) for pair in kept.items()])
            there = self._client.get_run(run_id).data.tags
            for name in (tags.keys() - kept.keys()) & there.keys():
                self._client.delete_tag(run_id, name)

    def log_metrics(
        self, metrics: Mapping[str, float], step: int | None = None, *, run_id: str | None = None
    ) -> None:
        """Log metrics of a run, by default of the active one."""
        run_id, now = run_id or self._active_run_id(), int(1000 * time.time())
        logged = [Metric(name, float(value), now, step or 0) for name, value in metrics.items()]
        with self._errors("log metrics"):
            self._client.log_batch(run_id, metrics=logged)

    def log_dataset(self, data: Mapping[str, str], *, run_id: str) -> None:
        """Name the data that a run was evaluated on; naming them again changes nothing.

        Args:
            data: What MLflow says of a dataset: ``name``, ``digest``, ``source_type``, and as JSON
                ``source``, ``schema`` and ``profile``.
            run_id: The run.

        Raises:
            ParameterError: If one of these is missing, or another one is given.
        """
        if set(data) != set(_DATASET):
            raise ParameterError(f"expected {', '.join(_DATASET)}, found {', '.join(data)}")
        tag = InputTag(MLFLOW_DATASET_CONTEXT, "evaluation")
        with self._errors(f"name the evaluation data of run {run_id}"):
            self._client.log_inputs(run_id, [DatasetInput(Dataset(**data), [tag])])

    def log_artifact(
        self, path: str | Path, artifact_path: str | None = None, *, run_id: str | None = None
    ) -> None:
        """Keep a file or folder as an artifact of a run, by default of the active one.

        Args:
            path: The file or folder.
            artifact_path: Folder among the run's artifacts.
            run_id: The run.

        Raises:
            DataError: If there is no such file.
            RegistryError: If MLflow or its artifact store can't be reached or refuses.
        """
        if not Path(path).exists():
            raise DataError(f"there is no file {path} to log as an artifact")
        run_id = run_id or self._active_run_id()
        # Storing it may take long, and be interrupted.
        with registry_errors(self.uri, f"log artifact {Path(path).name}"):
            self._client.log_artifact(run_id, str(path), artifact_path)

    def register_model(
        self,
        name: str,
        source: str,
        run_id: str | None = None,
        tags: Mapping[str, Any] | None = None,
        description: str | None = None,
    ) -> str:
        """Register the folder ``source`` as a new version and return the version.

        Raises:
            RegistryError: If ``source`` holds no ``MLmodel``, so that MLflow could not load it, or
                MLflow can't be reached or refuses.
        """
        self._check_source(source)
        # Where requests are repeated, and their results can be told apart.
        own = run_id if run_id and self.registry_uri.startswith("http") else ""
        before = self.find_versions(name, source, own) if own else ()
        with self._model_errors(f"register {source} as {name}"):
            add = partial(
                self._client.create_model_version,
                name,
                source,
                run_id=run_id,
                tags=_strings(tags),
                description=description,
            )
            try:
                version = add()
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                # Only where it is missing: to say that it is there, MLflow reads all its versions.
                with _Unless("RESOURCE_ALREADY_EXISTS"):  # somebody else has made it since
                    self._client.create_registered_model(name)
                version = add()
        registered = str(version.version)
        # A request whose answer was lost is made again, and MLflow makes another version.
        found = self.find_versions(name, source, own) if own else ()
        for twin in set(found) - {registered, *before}:
            log.warning("version registered twice", name=name, kept=registered, deleted=twin)
            self.delete_version(name, twin)
        log.info("model version registered", name=name, version=registered)
        return registered

    def transition_model_stage(self, name: str, version: str, stage: str) -> bool:
        """Move a version to a stage.

        MLflow has announced the end of stages; aliases replace them.

        Returns:
            False where the server has no stages any more.

        Raises:
            ParameterError: If there is no such stage.
            RegistryError: If MLflow can't be reached or refuses.
        """
        if stage not in STAGES:
            raise ParameterError(f"there is no stage {stage!r}; expected one of {STAGES}")
        with self._model_errors(f"move version {version} of {name} to {stage}"):
            if not hasattr(self._client, "transition_model_version_stage"):
                return False
            with _Unless("ENDPOINT_NOT_FOUND"), warnings.catch_warnings():
                # The announcement itself; there is nothing the user could do about it.
                warnings.simplefilter("ignore", FutureWarning)
                self._client.transition_model_version_stage(name, version, stage)
                return True
        return False

    def get_run_info(self, run_id: str) -> dict[str, Any]:
        """What is known of a run.

        Returns:
            ``{run_id, run_name, experiment_id, status, start_time, end_time, artifact_uri, params,
            metrics, tags}``, the times in milliseconds since 1970.
        """
        with self._errors(f"read run {run_id}"):
            return _describe_run(self._client.get_run(run_id))

    def get_best_run(self, metric: str, mode: str = "min") -> dict[str, Any] | None:
        """The finished run of the experiment with the least or greatest last value of a metric.

        Args:
            metric: Name of the metric.
            mode: ``"min"`` or ``"max"``.

        Returns:
            The run as `get_run_info` describes it; None where no run has a value.
        """
        if mode not in ("min", "max"):
            raise ParameterError(f"mode must be 'min' or 'max', found {mode!r}")
        with self._errors(f"look for the best {metric}"):
            runs = self._client.search_runs(
                [self.experiment_id],
                filter_string="attributes.status = 'FINISHED'",
                order_by=[f"metrics.`{metric}` {'ASC' if mode == 'min' else 'DESC'}"],
                max_results=1,
            )
        if not runs or math.isnan(runs[0].data.metrics.get(metric, math.nan)):
            return None
        return _describe_run(runs[0])

    def set_alias(self, name: str, version: str, alias: str) -> None:
        """Point an alias at a version, and away from the one it pointed at.

        Raises:
            ParameterError: If MLflow keeps that alias for itself.
            RegistryError: If MLflow can't be reached or refuses.
        """
        if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ParameterError(
                f"MLflow keeps the aliases 'latest' and 'v1', 'v2', … for itself; found {alias!r}"
            )
        with self._model_errors(f"set alias {alias} of {name}"):
            for left in reversed(range(_ALIAS_TRIES)):
                try:
                    self._client.set_registered_model_alias(name, alias, version)
                    break
                except MlflowException as error:
                    if error.error_code != "BAD_REQUEST" or not left:
                        raise

    def delete_alias(self, name: str, alias: str) -> None:
        """Take an alias from the version that it points at."""
        with self._model_errors(f"delete alias {alias} of {name}"):
            self._client.delete_registered_model_alias(name, alias)

    def set_version_tags(self, name: str, version: str, tags: Mapping[str, Any]) -> None:
        """Add tags to a version, or change them, and read them back.

        Raises:
            RegistryError: If MLflow can't be reached, refuses, or has something else afterwards: a
                release is held against its tags.
        """
        wanted = _strings(tags)
        with self._model_errors(f"tag version {version} of {name}"):
            for key, value in wanted.items():
                try:
                    self._client.set_model_version_tag(name, version, key, value)
                except MlflowException:
                    # A call whose answer was lost is repeated, and finds the tag it has set itself.
                    if self._client.get_model_version(name, version).tags.get(key) != value:
                        raise
        there = self.get_version(name, version).tags
        wrong = [key for key, value in wanted.items() if there.get(key) != value]
        if wrong:
            raise RegistryError(
                f"the tags {', '.join(wrong)} of version {version} of {name} read back differently "
                "from what was written; they were damaged on their way or changed meanwhile"
            )

    def describe_version(self, name: str, version: str, text: str) -> None:
        """Set what a version's page says, Markdown of at most 5,000 characters."""
        with self._model_errors(f"describe version {version} of {name}"):
            self._client.update_model_version(name, version, text)

    def get_version(self, name: str, version: str) -> RegisteredVersion:
        """A version by its number."""
        with self._model_errors(f"find version {version} of {name}"):
            return _describe_version(self._client.get_model_version(name, version))

    def version_by_alias(self, name: str, alias: str) -> RegisteredVersion:
        """The version that an alias points at."""
        with self._model_errors(f"find {name}@{alias}"):
            try:
                return _describe_version(self._client.get_model_version_by_alias(name, alias))
            except MlflowException as error:
                # As it answers of a model that has no such alias.
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    raise MlflowException(str(error), RESOURCE_DOES_NOT_EXIST) from error
                raise

    def alias_target(self, name: str, alias: str) -> str | None:
        """The version that an alias points at, or None."""
        looking = self._model_errors(f"look at alias {alias} of {name}")
        # There is no such alias; of a model that is missing it says something else.
        with looking, _Unless("INVALID_PARAMETER_VALUE"):
            # Not by `aliases`, for which MLflow reads every version of the model.
            return str(self._client.get_model_version_by_alias(name, alias).version)
        return None

    def aliases(self, name: str) -> dict[str, str]:
        """The versions that a model's aliases point at."""
        with self._model_errors(f"look at the aliases of {name}"):
            found = self._client.get_registered_model(name).aliases
        return {alias: str(version) for alias, version in found.items()}

    def delete_version_tag(self, name: str, version: str, tag: str) -> None:
        """Delete a tag of a version."""
        with self._model_errors(f"delete a tag of version {version} of {name}"):
            self._client.delete_model_version_tag(name, version, tag)

    def model_names(self) -> tuple[str, ...]:
        """Every registered model."""
        with self._model_errors("list the registered models"):
            found = tuple(_pages(self._client.search_registered_models))
        return tuple(model.name for model in found)

    def versions(self, name: str) -> tuple[RegisteredVersion, ...]:
        """Every version of a registered model."""
        with self._model_errors(f"list the versions of {name}"):
            quote = '"' if "'" in name else "'"
            return self._search_versions(f"name = {quote}{name}{quote}")

    def open_runs(self, name_begins: str) -> dict[str, tuple[str, int]]:
        """Runs of the experiment that have not ended: id to name and start, ms since 1970."""
        query = f"attributes.status = 'RUNNING' AND attributes.run_name LIKE '{name_begins}%'"
        with self._errors("look for runs that have not ended"):
            experiment = self._client.get_experiment_by_name(self.experiment_name)
            places = [experiment.experiment_id] if experiment else []
            search = partial(self._client.search_runs, places, query)
            found = tuple(_pages(search)) if places else ()
        return {run.info.run_id: (run.info.run_name, run.info.start_time) for run in found}

    def find_versions(self, name: str, source: str, run_id: str) -> tuple[str, ...]:
        """The versions of a model that a run has registered from a folder."""
        found = self.versions_of_run(run_id)
        return tuple(v.version for v in found if v.name == name and v.source == source)

    def versions_of_run(self, run_id: str) -> tuple[RegisteredVersion, ...]:
        """The versions of any model that a run has registered."""
        with self._model_errors(f"look for what run {run_id} has registered"):
            return self._search_versions(f"run_id = '{run_id}'")

    def _search_versions(self, query: str) -> tuple[RegisteredVersion, ...]:
        found = _pages(self._client.search_model_versions, filter_string=query)
        return tuple(map(_describe_version, found))

    def delete_version(self, name: str, version: str) -> None:
        """Delete a version and the aliases that point at it; one that is gone is no error."""
        deleting = self._model_errors(f"delete version {version} of {name}")
        with deleting, _Unless("RESOURCE_DOES_NOT_EXIST"):
            self._client.delete_model_version(name, version)

    def _active_run_id(self) -> str:
        active = mlflow.active_run()
        if active is None:
            raise RegistryError("no run is active; call start_run first")
        return str(active.info.run_id)

    def _check_source(self, source: str) -> None:
        if not source.startswith("s3://"):
            return
        with self._errors(f"look into {source}"):
            files = mlflow.artifacts.list_artifacts(
                artifact_uri=source.rstrip("/"), tracking_uri=self.uri
            )
        if not any(Path(file.path).name == "MLmodel" for file in files):
            raise RegistryError(
                f"{source} can't be registered: it holds no MLmodel, so MLflow could not load it; "
                f"found {sorted(file.path for file in files) or 'nothing'}"
            )

    @contextlib.contextmanager
    def _errors(self, doing: str, *, models: bool = False) -> Iterator[None]:
        uri, apart = (self.registry_uri if models else self.uri), self.registry_uri != self.uri
        # A transaction that is struck locks the file until its traceback is gone.
        local = uri.startswith("sqlite")
        whole = interrupted_after() if local else contextlib.nullcontext()
        with whole, registry_errors(uri, doing, _REGISTRY if models and apart else _TRACKING):
            yield

    def _model_errors(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return self._errors(doing, models=True)


def initialize_mlflow(settings: Settings) -> MLflowTracker:
    """A tracker as the settings say, with its experiment and the bucket of its artifacts.

    MLflow's own S3 client finds the store's address and credentials in the environment afterwards.

    Raises:
        SettingsError: If an address can't be used, or the place of the experiment's artifacts.
        StoreError: If the store can't be reached or refuses.
        RegistryError: If MLflow can't be reached or refuses.
    """
    settings = ensure_store(settings)
    settings.apply()
    # MLflow uses boto3's default session, which keeps the first credentials that it found.
    set_default_session()
    if settings.artifact_uri.startswith("s3://"):
        Bucket(make_client(settings), parse_uri(settings.artifact_uri)[0]).ensure()
    tracker = _tracker(settings)
    # Before an experiment is made, whose location can't be changed.
    check_artifacts(tracker.artifact_location(), tracker.uri)
    experiment_id = tracker.experiment_id  # made here, where it is missing
    log.debug("MLflow reached", experiment_id=experiment_id)
    return tracker


def open_registry(settings: Settings) -> MLflowTracker:
    """A tracker to read with: no experiment, bucket or database is made.

    Nor do addresses and credentials get into the environment.

    Raises:
        SettingsError: If the tracking address can't be used.
        NotRegisteredError: If it is a SQLite file that is not there.
        RegistryError: If MLflow can't be reached or refuses.
    """
    models = settings.registry_uri
    if missing := missing_database(models.get_secret_value()):
        raise NotRegisteredError(
            f"there is no registry in {missing}; nothing was released into it yet, or "
            "MLFLOW_TRACKING_URI, MLFLOW_REGISTRY_URI or HEIMDALL_HOME is another one's"
        )
    if missing_database(settings.tracking_uri.get_secret_value()):
        # Who only reads models has no runs.
        settings = settings.model_copy(update={"mlflow_tracking_uri": models})
    return _tracker(settings)


def _tracker(settings: Settings) -> MLflowTracker:
    return MLflowTracker(
        settings.tracking_uri.get_secret_value(),
        settings.artifact_uri,
        settings.experiment_name,
        settings.registry_uri.get_secret_value(),
    )


def _pages(search: Callable[..., Any], **query: Any) -> Iterator[Any]:
    """Every result of one of MLflow's paged searches."""
    token = None
    while True:
        page = search(**query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _strings(tags: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (tags or {}).items()}


def _describe_run(run: Any) -> dict[str, Any]:
    info = ("run_id", "run_name", "experiment_id", "status", "start_time", "end_time")
    return {
        **{name: getattr(run.info, name) for name in (*info, "artifact_uri")},
        **{name: dict(getattr(run.data, name)) for name in ("params", "metrics", "tags")},
    }


def _describe_version(version: Any) -> RegisteredVersion:
    return RegisteredVersion(
        version.name,
        str(version.version),
        str(version.source),
        version.run_id or None,
        str(version.current_stage),
        dict(version.tags),
        int(version.creation_timestamp),
        version.description or "",
    )
