"""The parameters of a release: one model for the runner, the notebook and the command line."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from heimdall_onnx.common.errors import ParameterError
from heimdall_onnx.common.text import listed, meant, names_in, shown

ProfileName = Literal["smoke", "quick", "audit"]

# The documented limit of the mean absolute error.
TOLERANCE = 1e-5

# Of the names of metrics that are asked for.
MOST_METRICS = 500

_Parameters = TypeVar("_Parameters", bound=BaseModel)


@dataclass(frozen=True)
class Profile:
    """How much is measured.

    Attributes:
        calls: Counted calls of each contender, at least.
        min_seconds: Least duration of the latency measurement, seconds.
        batch_calls: Counted calls of each contender at each further batch size.
        reference_samples: Evaluation samples compared with PyTorch in float64.
        max_samples: Evaluation samples used; None takes all.
        variant_calls: Counted calls of each side when variants are timed, at least.
        tuning_calls: Counted calls of each side of a trial of a session option.
        calibration_samples: Inputs that variants are calibrated on, at most.
        judged_samples: Samples that variants are judged on, at most.
    """

    calls: int
    min_seconds: float
    batch_calls: int
    reference_samples: int
    max_samples: int | None
    variant_calls: int
    tuning_calls: int
    calibration_samples: int
    judged_samples: int


# Of each limit what smoke, quick and audit have.
_LIMITS: dict[str, tuple[Any, Any, Any]] = {
    "calls": (30, 200, 1024),
    "min_seconds": (0, 0, 60),
    "batch_calls": (2, 3, 20),
    "reference_samples": (8, 32, 256),
    "max_samples": (8, None, None),
    "variant_calls": (12, 60, 1024),
    "tuning_calls": (6, 36, 120),
    "calibration_samples": (32, 64, 256),
    "judged_samples": (64, 512, 4096),
}
PROFILES: dict[ProfileName, Profile] = {
    name: Profile(**{limit: values[place] for limit, values in _LIMITS.items()})
    for place, name in enumerate(get_args(ProfileName))
}

# What an export and the folder of its variants are called, in a run's folder as in a release.
MODEL, VARIANTS_FOLDER = "model.onnx", "variants"

# Forms of the model beside its parity-checked fp32 file, which is always one of them; how each is
# made is in `evidence.variants.recipes`.
FP32 = "fp32"
VARIANTS = (
    FP32,
    "fp32-optimized",
    "fp32-openvino",
    "bf16-openvino",
    "int8-dynamic",
    "int8-minmax",
    "int8-entropy",
    "int8-percentile",
    "int8-nncf",
    "int8-weights",
    "int4-weights",
    "fp16-cuda",
    "fp16-tensorrt",
)

# What is taken where nobody says what the model is called: the reference model's own.
REFERENCE_MODEL, REFERENCE_FOLDER = "heimdall-localization-onnx", "models/localization"

# Names that make an S3 key, an MLflow name and a line of Markdown without surprises.
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
BUCKET = r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$"
PREFIX = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$"


def folder_of(name: str) -> str:
    """The folder of a model's releases in a bucket, where none is asked for."""
    return REFERENCE_FOLDER if name in ("", REFERENCE_MODEL) else f"models/{name}"


def _json_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error


# A model's keyword arguments, as a mapping or as JSON text of one.
ModelKwargs = Annotated[dict[str, Any], BeforeValidator(_json_text)]


class Parameters(BaseModel):
    """Parameters that are given by their names: none is unknown, and each can be recorded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: object, info: ValidationInfo) -> object:
        # Pydantic would take True for 1, which as a tolerance gates nothing.
        number = cls.model_fields[str(info.field_name)].annotation in (int, float)
        if number and isinstance(value, bool):
            raise ValueError("expected a number, found a truth value")
        return value

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: object) -> object:
        # Into notebook, manifest and registry. A path that is no UTF-8 arrives with surrogates.
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"can't be written as JSON in UTF-8: {shown(str(error))}") from error
        return value


@dataclass(frozen=True)
class Quality:
    """How much worse answers may be in their task, and how surely that must be shown.

    Attributes:
        metric: Names of metrics with commas between them, all of which must hold; empty for those
            that suit the labels.
        max_loss: What may be lost: as a share of the reference's value for errors that have a unit,
            else as a difference.
        confidence: With which the upper end of the interval, which must be within it, holds.
        binding: Whether somebody asked for it, so that what is not shown does not pass.
    """

    metric: str = ""
    max_loss: float = 0.01
    confidence: float = 0.95
    binding: bool = False


class ReleaseParameters(Parameters):
    """What a release is made of; the fields are the notebook's parameters, in its order."""

    checkpoint: str = ""
    model: str = ""
    model_kwargs: ModelKwargs = Field(default_factory=dict)
    weights: str = Field("", max_length=1000)
    submodule: str = Field("", max_length=1000)
    eval_data: str = ""
    ignore: str = Field("", max_length=1000)
    name: str = Field("", pattern=rf"^$|{NAME}", max_length=200, validate_default=True)
    bucket: str = Field("heimdall-models", pattern=BUCKET)
    prefix: str = Field("", pattern=rf"^$|{PREFIX}", max_length=500, validate_default=True)
    # MLflow takes no dots in an alias.
    alias: str = Field("staging", pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=255)
    tolerance: float = Field(TOLERANCE, gt=0)
    opset: int = Field(20, ge=9, le=23)
    do_constant_folding: bool = True
    batch_size: int = Field(8, ge=1, le=4096)
    latency_batch_size: int = Field(1, ge=1, le=4096)
    threads: int = Field(0, ge=0, le=1024)
    measure_latency: bool = True
    exclusive_cores: bool = False
    eval_workers: int = Field(0, ge=0, le=1024)
    eval_scheduler: str = Field("", pattern=r"^((tcp|tls|ws|wss|ucx|inproc)://[^\s@]{1,500})?$")
    profile: ProfileName = "quick"
    variants: str = Field("none", max_length=1000)
    calibration_data: str = ""
    metric: str = Field(Quality.metric, max_length=MOST_METRICS)
    max_loss: float = Field(Quality.max_loss, ge=0)
    confidence: float = Field(Quality.confidence, ge=0.5, lt=1)
    max_displacement_sigma: float = Field(0.25, gt=0)
    max_output_noise: float = Field(0.01, gt=0)
    min_coverage: float = Field(0.0, ge=0, lt=1)
    seed: int = Field(0, ge=0)
    run_id: str = Field("", pattern=r"^([0-9a-zA-Z][0-9a-zA-Z_-]{0,255})?$")
    output_dir: str = ""
    publish: bool = False

    @field_validator("name")
    @classmethod
    def _after_its_class(cls, value: str, info: ValidationInfo) -> str:
        spec = info.data.get("model", "")
        if value or not spec or spec.startswith(("heimdall_onnx:", "heimdall_onnx.")):
            return value or REFERENCE_MODEL
        made = spec.rpartition(":")[2].split(".")[0]
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", made).lower()
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:200] or "model"

    @field_validator("prefix")
    @classmethod
    def _after_its_model(cls, value: str, info: ValidationInfo) -> str:
        return value or folder_of(info.data.get("name", ""))

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, value: str) -> str:
        if value.lower() == "latest" or (value[:1].lower() == "v" and value[1:].isdigit()):
            raise ValueError("MLflow reserves `latest` and `vN`; take another alias")
        return value

    @field_validator("variants")
    @classmethod
    def _known_variants(cls, value: str) -> str:
        if value not in {"none", "all"}:
            unknown = [name for name in value.split(",") if name.strip() not in VARIANTS]
            if unknown:
                raise ValueError(
                    f"expected none, all, or names with commas between them, of "
                    f"{', '.join(VARIANTS)}; found {shown(', '.join(unknown))}"
                )
        return value

    @field_validator("variants")
    @classmethod
    def _variants_are_timed(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("measure_latency") is False:
            raise ValueError(
                "variants are chosen by their latency, so they need measure_latency = True; found "
                "False. Take none of them, or let latency be measured"
            )
        return value

    @field_validator("eval_scheduler")
    @classmethod
    def _one_kind_of_workers(cls, value: str, info: ValidationInfo) -> str:
        if value and info.data.get("eval_workers"):
            raise ValueError(
                "eval_workers starts workers on this machine, those of eval_scheduler are there "
                "already; set one of them"
            )
        return value

    @property
    def accuracy_limits(self) -> AccuracyLimits:
        """How much a lossy variant may lose."""
        return AccuracyLimits(self.max_displacement_sigma, self.max_output_noise)

    def quality(self, declared: Quality | None = None) -> Quality:
        """The contract on quality.

        A test run binds nobody to it, since nothing can be shown with so few samples.

        Args:
            declared: That of the model's signature file, of which each part that is given here is
                replaced.
        """
        declared = declared or Quality()
        given = {n: getattr(self, n) for n in ("metric", "max_loss", "confidence")}
        own = {n: v for n, v in given.items() if v != getattr(Quality, n)}
        binding = (declared.binding or bool(own)) and self.profile != "smoke"
        return replace(declared, **own, binding=binding)

    @property
    def ignored(self) -> tuple[str, ...]:
        """Arrays of the evaluation data that nothing is to use."""
        return names_in(self.ignore)

    @property
    def limits(self) -> Profile:
        """How much the chosen profile measures."""
        return PROFILES[self.profile]

    @property
    def thread_count(self) -> int | None:
        """Threads of each contender; None for all processors this process may use."""
        return self.threads or None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Powers of two up to the largest batch size, and that."""
        powers = (2**n for n in range(self.batch_size.bit_length()))
        return tuple(sorted({*powers, self.batch_size}))

    @property
    def eval_data_path(self) -> Path | str | None:
        """The evaluation data's file, folder or address in a bucket; None for synthetic inputs."""
        if not self.eval_data or self.eval_data.startswith("s3://"):
            return self.eval_data or None
        return Path(self.eval_data)

    @property
    def evaluation_workers(self) -> EvaluationWorkers | None:
        """Who reads the evaluation data; None if the notebook's own process does."""
        # A few samples are worth no workers.
        if self.limits.max_samples or not (self.eval_workers or self.eval_scheduler):
            return None
        return EvaluationWorkers(self.eval_workers, self.eval_scheduler)

    @property
    def onnx_path(self) -> Path:
        """Where the export goes."""
        return Path(self.output_dir) / "model.onnx"


def check_parameters(values: Mapping[str, Any]) -> ReleaseParameters:
    """Make parameters of ``values``.

    Raises:
        ParameterError: Naming every unknown name with its nearest known ones, and every value
            that has the wrong type or is out of range.
    """
    return check_as(ReleaseParameters, values)


def check_as(kind: type[_Parameters], values: Mapping[str, Any]) -> _Parameters:
    """`check_parameters` for another notebook, with parameters of a ``kind`` of its own."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ParameterError(
            f"these parameters can't be used:{listed(explained(kind, error))}"
        ) from None


def parameters_of_notebook(namespace: Mapping[str, Any]) -> ReleaseParameters:
    """The parameters as they stand in a notebook's namespace, checked.

    papermill only warns about a name that the notebook does not know, and puts its cell first in a
    notebook that has lost the tag of its parameters, so what it injected is read back and checked.

    Raises:
        ParameterError: As `check_parameters`, or if another value is used than was injected.
    """
    return read_notebook_as(ReleaseParameters, namespace)


def read_notebook_as(kind: type[_Parameters], namespace: Mapping[str, Any]) -> _Parameters:
    """`parameters_of_notebook` for another notebook, with parameters of a ``kind`` of its own."""
    known = set(kind.model_fields)
    injected = injected_values(namespace.get("In", ()))
    for name, expression in injected.items():
        try:
            given = ast.literal_eval(expression)
        except ValueError:  # no literal, such as float("nan")
            continue
        if name in namespace and namespace[name] != given:
            raise ParameterError(
                f"{name} = {shown(repr(namespace[name]))} is used, but papermill was given "
                f"{shown(repr(given))}; does the notebook's cell of parameters still have its tag "
                "'parameters', and does no cell after it assign it again?"
            )
    names = known | injected.keys()
    return check_as(kind, {n: namespace[n] for n in names if n in namespace})


def injected_values(history: Sequence[str]) -> dict[str, ast.expr]:
    """What the cells of ``history`` that papermill injected assign, by name.

    Raises:
        ParameterError: If such a cell is no Python.
    """
    return {
        target.id: statement.value
        for source in history
        if source.startswith("# Parameters")
        for statement in _parsed(source)
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _parsed(source: str) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's compiler, which has read it before
            return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        # The last two are how Python's parser refuses what is nested too deeply.
        raise ParameterError(
            f"the notebook's cell of parameters can't be read: {shown(str(error))}"
        ) from error


def explained(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """What is wrong with parameters of a ``kind``, each on one line."""
    return [explain(kind, entry) for entry in error.errors(include_url=False)]


def explain(kind: type[BaseModel], entry: Any) -> str:
    """What is wrong with a parameter of a ``kind``, from pydantic's entry of it."""
    name = shown(".".join(map(str, entry["loc"])))
    if entry["type"] != "extra_forbidden":
        found = entry["input"]  # quotes are part of what was given
        found = shown(repr(found[:200]) if isinstance(found, str) else found)
        return f"{name} = {found}: {shown(entry['msg'], 300)}"
    return f"{name} is not a parameter; {meant(name, kind.model_fields)}"


@dataclass(frozen=True)
class EvaluationWorkers:
    """Who takes the models over a dataset.

    Attributes:
        count: Workers to start on this machine, each with its share of the processors.
        scheduler: Address of a Dask scheduler whose workers to take instead, e.g.
            ``tls://host:8786``; each must have one thread.
    """

    count: int = 0
    scheduler: str = ""


@dataclass(frozen=True)
class AccuracyLimits:
    """How much a variant may lose.

    Attributes:
        displacement_sigma: Without labels: largest 99th percentile of the displacement, in units of
            the predicted standard deviation.
        output_noise: For a model without positions and their deviation: largest relative error
            of an output, its RMS over the RMS of the reference about its mean.
    """

    displacement_sigma: float = 0.25
    output_noise: float = 0.01
