"""The manifest of a release: what it says, read as untrusted bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from heimdall_onnx.common.environment import DISTRIBUTION, Environment
from heimdall_onnx.common.errors import MissingObjectError, ParameterError, VerificationError
from heimdall_onnx.common.parameters import FP32, MODEL, VARIANTS_FOLDER
from heimdall_onnx.common.text import names_in, shown
from heimdall_onnx.common.verdict import Gate
from heimdall_onnx.evidence.costs import StepCost
from heimdall_onnx.model.runtimes import CPU, CUDA, TENSORRT, SessionSettings
from heimdall_onnx.model.signature import Signature
from heimdall_onnx.services.store import MANIFEST, Bucket, parse_uri

# Of manifests and of the record in a notebook: what 0.1 wrote has less, or none.
SCHEMA_VERSION: Literal[4] = 4
REPORT, REPORT_HTML = "report.ipynb", "report.html"
BOM, SIGNATURE, REVIEWS = "bom.cdx.json", "model.sig", "reviews"
# Below the reviews, which come after the signature too: who may review a release may add to them.
COMPARISONS = f"{REVIEWS}/comparisons"
CONTENT = "objects/sha256"
DATASETS = "objects/datasets"
RECOMMENDED = "recommended"

# Some hundred times what a release needs; a larger object is no manifest.
MAX_MANIFEST_BYTES = 16 << 20
# Each object costs time, above all where it is wrong.
_Few = (FailFast(), Field(max_length=1000))
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")

# What a released model may be opened with. PyTorch's own format is none of it, since reading that
# runs what is in it; of a provider's options only these, since others are names of files to write
# or load, or addresses of functions to call.
_PROVIDERS = {
    "onnxruntime": {
        CPU,
        TENSORRT,
        CUDA,
        "OpenVINOExecutionProvider",
    },
    "openvino": {CPU, "CPU", "GPU", "NPU"},
}
_OPTIONS = {
    *("device_id", "device_type", "precision", "num_streams", "enable_cuda_graph", "use_tf32"),
    *("cudnn_conv_algo_search", "cudnn_conv_use_max_workspace", "prefer_nhwc"),
    *("arena_extend_strategy", "do_copy_in_default_stream"),
    *("trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable", "trt_cuda_graph_enable"),
    *("trt_engine_cache_enable", "trt_timing_cache_enable", "trt_max_workspace_size"),
    *("trt_builder_optimization_level", "trt_layer_norm_fp32_fallback"),
    *("trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes"),
}
_MAX_OPTIONS = 50
_OPTION_VALUE = re.compile(r"[A-Za-z0-9_.:,-]{0,200}")

ContentRole = Literal["checkpoint", "evaluation_data", "calibration_data", "signature"]

_Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_VariantName = Annotated[str, Field(pattern="^[a-z0-9-]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class Entry(_Strict):
    """An object of a release.

    Attributes:
        key: Its key in the bucket.
        size: Its length in bytes.
        sha256: SHA-256 of its content.
    """

    key: str
    size: Annotated[int, Field(ge=0)]
    sha256: _Sha256


class Content(Entry):
    """What a release was made of, kept under its hash and shared between releases.

    Attributes:
        role: What it was to the release.
        name: Its file's name.
    """

    role: ContentRole
    name: str


class KeptDataset(_Strict):
    """A dataset that a release was made of, which stays where it is.

    Attributes:
        role: What it was to the release.
        name: Its name.
        address: Where it is, ``s3://bucket/folder``.
        digest: Its digest, which its header and all its values are held against.
    """

    role: Literal["evaluation_data"]
    name: str
    address: Annotated[str, Field(pattern="^s3://[^/]+/.+")]
    digest: _Sha256


class SignatureEntry(_Strict):
    """Where the signature is.

    Attributes:
        key: Its key in the bucket.
        signer_sha256: SHA-256 of the signer's public key (DER, SubjectPublicKeyInfo). It tells
            which key to ask for, and proves nothing.
    """

    key: str
    signer_sha256: _Sha256


class CheckpointFile(_Strict):
    """A checkpoint's file.

    Attributes:
        file: Its name.
        sha256: SHA-256 of its content.
    """

    file: str
    sha256: _Sha256


class Checkpoint(CheckpointFile):
    """What was exported.

    Attributes:
        members: The checkpoints that an ensemble's was made of, as it records them.
        weights: Which of the weights in it were taken: keys and prefix, with dots between them.
        notes: What was migrated, converted, skipped or left aside when it was loaded.
    """

    members: tuple[CheckpointFile, ...] = ()
    weights: str = ""
    notes: tuple[str, ...] = ()


class ReleasedModel(_Strict):
    """What was made of the checkpoint.

    Attributes:
        spec: Import string of the model's class.
        signature: What it takes and gives.
        signature_source: Where that comes from, in words.
    """

    spec: str
    signature: Signature
    signature_source: str


class InputArray(_Strict):
    """The evaluation data of one input.

    Attributes:
        dtype: NumPy's name of the element type.
        shape: Of one sample.
    """

    dtype: str
    shape: tuple[int, ...]


class EvaluationInputs(_Strict):
    """What both models were compared on.

    Attributes:
        source: Its name.
        provenance: Where it comes from, in words.
        sha256: SHA-256 of the file, or the digest of the dataset; None for synthetic inputs.
        samples: How many there are.
        labelled: Whether labels or true positions are known.
        inputs: Of each input.
    """

    source: str
    provenance: str
    sha256: _Sha256 | None
    samples: int
    labelled: bool
    inputs: Annotated[dict[str, InputArray], Field(max_length=1000)]


class _Registered(_Strict):
    run_id: str
    model_name: str
    model_version: Annotated[str, Field(pattern="^[0-9]+$")]


def _few_options(value: object) -> object:
    """Refuse a crowd at once: every single one that is wrong would take time and memory."""
    options = value.get("provider_options") if isinstance(value, dict) else None
    for given in (value, options):
        if isinstance(given, dict) and len(given) > _MAX_OPTIONS:
            raise ValueError(f"expected at most {_MAX_OPTIONS} options, found {len(given)}")
    return value


_Settings = Annotated[SessionSettings, BeforeValidator(_few_options)]


class Sessions(_Strict):
    """With what a variant was measured, and is opened.

    Attributes:
        latency: For one caller at a time.
        throughput: For as many answers as the machine gives.
    """

    latency: _Settings
    throughput: _Settings


class PassedVariant(_Strict):
    """A form of the model that has passed every gate of its own, and is published.

    Attributes:
        name: Its name, e.g. ``"int8-minmax"``.
        status: That it passed.
        file: Its file within the release's folder: the model itself, which some variants run in
            another way, or one of its own.
        sha256: SHA-256 of that file.
        size_bytes: Its length in bytes.
        sessions: With what it was measured.
    """

    name: _VariantName
    status: Literal["passed"]
    file: Annotated[str, Field(max_length=200)]
    sha256: _Sha256
    size_bytes: Annotated[int, Field(ge=0)]
    sessions: Sessions


class OtherVariant(_Strict):
    """A form of the model that was asked for, and is not published.

    Attributes:
        name: Its name.
        status: Whether a gate failed, or this machine could not run it.
        reason: Why, in words.
    """

    name: _VariantName
    status: Literal["failed", "unavailable"]
    reason: str = ""


class Variants(_Strict):
    """The variants of a release.

    Attributes:
        recommended: Name of the fastest one that passed.
        judged: Everything that was asked for.
    """

    recommended: _VariantName
    judged: Annotated[
        list[Annotated[PassedVariant | OtherVariant, Field(discriminator="status")]],
        FailFast(),
        Field(max_length=100),
    ]

    @property
    def passed(self) -> dict[str, PassedVariant]:
        """Those that are published, by name."""
        return {one.name: one for one in self.judged if isinstance(one, PassedVariant)}


@dataclass(frozen=True)
class Variant:
    """A variant of a release that can be opened.

    Attributes:
        name: Its name; ``"fp32"`` is the model itself.
        files: Its file, and its external data if it has any, by their names within the release's
            folder; the file that is opened comes first.
        sessions: With what it was measured; None in a release without variants.
    """

    name: str
    files: dict[str, Entry]
    sessions: Sessions | None = None


class Said(_Strict):
    """What is relied on in a manifest; `Record` says of the parts that it holds what they are.

    Attributes:
        schema_version: Of records and manifests.
        created: When it was released.
        verdict: As it was judged from outside the notebook.
        gates: Every gate, evaluated.
        objects: Everything in the release's folder.
        content: What it was made of, kept under its hash.
        datasets: Of what it was made of, what is a dataset.
        signature: Where the signature is; None for an unsigned release.
        parameters: Of the release.
        model: What was made of the checkpoint.
        variants: What became of each variant; None where none were asked for.
        checkpoint: What was exported.
        evaluation_data: What both models were compared on.
        environment: Where it was made.
        costs: What each step took.
        mlflow: Its run and its version in the registry.
    """

    schema_version: Literal[4]
    created: datetime
    verdict: str
    gates: Annotated[tuple[Gate, ...], *_Few]
    objects: Annotated[list[Entry], *_Few]
    content: Annotated[list[Content], *_Few]
    datasets: Annotated[list[KeptDataset], *_Few]
    signature: SignatureEntry | None
    parameters: Annotated[dict[str, Any], Field(max_length=1000)]
    model: ReleasedModel
    variants: Variants | None
    checkpoint: Checkpoint
    evaluation_data: EvaluationInputs
    environment: Environment
    costs: Annotated[tuple[StepCost, ...], *_Few]
    mlflow: _Registered


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read; that its form is right says nothing of its truth.

    Attributes:
        bucket: Bucket of the release.
        folder: Its folder in the bucket, without a slash at its end.
        text: The manifest's bytes.
        said: What it says.
    """

    bucket: str
    folder: str
    text: bytes = field(repr=False)
    said: Said = field(repr=False)

    @property
    def version(self) -> str:
        """Release version, ``vYYYYMMDD_HHMMSS``."""
        return self.folder.rpartition("/")[2]

    @property
    def uri(self) -> str:
        """The release's folder."""
        return f"s3://{self.bucket}/{self.folder}"

    @property
    def key(self) -> str:
        """The manifest's own key."""
        return f"{self.folder}/{MANIFEST}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest itself."""
        return hashlib.sha256(self.text).hexdigest()

    @property
    def ignored(self) -> tuple[str, ...]:
        """Arrays of its evaluation data that nothing is to use."""
        return names_in(str(self.said.parameters.get("ignore", "")))

    @property
    def data(self) -> dict[str, Any]:
        """All of it, what nothing relies on included."""
        data: dict[str, Any] = json.loads(self.text)
        return data

    @property
    def objects(self) -> dict[str, Entry]:
        """The release's objects by their name within its folder."""
        return {entry.key.removeprefix(f"{self.folder}/"): entry for entry in self.said.objects}

    @property
    def model(self) -> Entry:
        """The model."""
        return self.objects[MODEL]

    @property
    def model_files(self) -> dict[str, Entry]:
        """The model and its external data by name; none of them is in a folder of its own."""
        return self._files(MODEL)

    @property
    def files_of_variants(self) -> set[str]:
        """Names of everything that some variant is opened from, the model itself among it."""
        passed = self.said.variants.passed if self.said.variants else ()
        return {name for one in (FP32, *passed) for name in self.variant(one).files}

    @property
    def recommended(self) -> str:
        """Name of the variant to be used where nothing speaks against it."""
        return self.said.variants.recommended if self.said.variants else FP32

    def variant(self, name: str) -> Variant:
        """A variant that can be opened.

        Args:
            name: Its name. ``"fp32"`` is there always, and ``"recommended"`` is the name of
                another one.

        Raises:
            ParameterError: If the release has no such variant, or it did not pass.
        """
        passed = self.said.variants.passed if self.said.variants else {}
        wanted = self.recommended if name == RECOMMENDED else name
        found = passed.get(wanted)
        if found is None and wanted != FP32:
            there = ", ".join(sorted({FP32, RECOMMENDED, *passed}))
            raise ParameterError(
                f"{self.uri} has no variant {shown(repr(name))} that can be opened"
                f"{self._why_not(wanted)}; it has {there}"
            )
        file = found.file if found else MODEL
        return Variant(wanted, self._files(file), found.sessions if found else None)

    def _why_not(self, name: str) -> str:
        judged = self.said.variants.judged if self.said.variants else ()
        for one in judged:
            if one.name == name and isinstance(one, OtherVariant):
                why = f", {shown(one.reason)}" if one.reason else ""
                return f" ({one.status}{why})"
        return ""

    def _files(self, file: str) -> dict[str, Entry]:
        """A model's file, which comes first, and its external data beside it."""
        objects = self.objects
        beside = {
            name: entry
            for name, entry in objects.items()
            if name.startswith(f"{file}.") and "/" not in name.removeprefix(file)
        }
        return {file: objects[file], **beside}

    @property
    def model_name(self) -> str:
        """The registered model."""
        return self.said.mlflow.model_name

    @property
    def model_version(self) -> str:
        """Its version in the registry."""
        return self.said.mlflow.model_version

    @property
    def dataset(self) -> KeptDataset | None:
        """The dataset that both models were compared on; None for a file or synthetic inputs."""
        return next(iter(self.said.datasets), None)

    def content_of(self, role: str) -> Content | None:
        """The content of a role, or None."""
        return next((entry for entry in self.said.content if entry.role == role), None)


def dataset_folder(digest: str) -> str:
    """Where a dataset of this digest is kept in a bucket, if it came from a folder."""
    return f"{DATASETS}/{digest}"


def content_key(sha256: str) -> str:
    """Where content of this hash is kept in a bucket."""
    return f"{CONTENT}/{sha256}"


def read_manifest(bucket: Bucket, folder: str) -> Manifest:
    """The manifest of a release.

    Raises:
        VerificationError: If there is none, or it is not one of a release with a model.
        StoreError: If the store can't be reached or refuses.
    """
    uri = bucket.uri(folder.rstrip("/"))
    try:
        # One byte more tells one that is too large.
        text = bucket.read_start(f"{folder.rstrip('/')}/{MANIFEST}", MAX_MANIFEST_BYTES + 1)
    except MissingObjectError as error:
        raise VerificationError(
            f"{uri} has no {MANIFEST}, so it is not a release; `heimdall-onnx list` shows those "
            "that are"
        ) from error
    if len(text) > MAX_MANIFEST_BYTES:
        raise VerificationError(
            f"{uri}/{MANIFEST} is no manifest of a release: expected at most "
            f"{MAX_MANIFEST_BYTES} bytes, found more"
        )
    return parse_manifest(text, uri)


def parse_manifest(text: bytes, folder_uri: str) -> Manifest:
    """Read a manifest's bytes as the manifest of a folder.

    Args:
        text: The bytes; nothing about them is taken for granted.
        folder_uri: The folder they were found in, ``s3://bucket/prefix/version``.

    Raises:
        VerificationError: If they are no manifest of a release in that folder.
    """
    bucket, folder = parse_uri(folder_uri)
    folder = folder.rstrip("/")
    where = f"{folder_uri}/{MANIFEST}"
    try:
        require_schema(_Version.model_validate_json(text).schema_version, where)
        known = Said.model_validate_json(text)
    except ValidationError as error:
        raise VerificationError(
            f"{where} is no manifest of a release: {describe_problems(error)}"
        ) from error
    manifest = Manifest(bucket, folder, text, known)
    problems_found = [*_misplaced(known, folder), *_wrong_variants(manifest)]
    if problems := "; ".join(problems_found[:100]):
        raise VerificationError(f"{where} is no manifest of a release: {problems}")
    if MODEL not in manifest.objects:
        raise VerificationError(f"{where} names no {folder}/{MODEL}")
    return manifest


class _Version(_Strict):
    schema_version: int


def require_schema(found: object, where: str) -> None:
    """Return if a manifest or a record is of this version.

    Args:
        found: Its schema version.
        where: Where it was found, for the message.

    Raises:
        VerificationError: If another version of this program made it.
    """
    if isinstance(found, int) and found < SCHEMA_VERSION:
        raise VerificationError(
            f"{where} was made by {DISTRIBUTION} 0.1: reproduce it with that version"
        )
    if isinstance(found, int) and found > SCHEMA_VERSION:
        raise VerificationError(
            f"{where} was made by a later {DISTRIBUTION}: expected schema version "
            f"{SCHEMA_VERSION}, found {found}; read it with that version"
        )


def describe_problems(error: ValidationError) -> str:
    """What pydantic found wrong with what anybody may have written, the first of it."""
    # Names and values that should not be there are quoted in both.
    return "; ".join(
        f"{shown('.'.join(map(str, e['loc']))) or 'content'}: {shown(e['msg'])}"
        for e in error.errors(include_url=False, include_input=False)[:20]
    )


def _misplaced(known: Said, folder: str) -> list[str]:
    """Keys that point anywhere but where a release keeps its objects."""
    keys = [entry.key for entry in known.objects]
    signature = [known.signature.key] if known.signature else []
    own = {MANIFEST, SIGNATURE}
    return [
        *(
            f"expected keys of objects in {folder}/, found {shown(repr(key))}"
            for key in keys
            if not key.startswith(f"{folder}/")
            or not _NAME.fullmatch(key.removeprefix(f"{folder}/"))
            or key.removeprefix(f"{folder}/") in own
        ),
        *(f"{shown(repr(key))} is named twice" for key, n in Counter(keys).items() if n > 1),
        *(
            f"expected the signature at {folder}/{SIGNATURE}, found {shown(repr(key))}"
            for key in signature
            if key != f"{folder}/{SIGNATURE}"
        ),
        *(
            f"expected content at {content_key(entry.sha256)}, found {shown(repr(entry.key))}"
            for entry in known.content
            if entry.key != content_key(entry.sha256)
        ),
    ]


def _wrong_variants(manifest: Manifest) -> Iterator[str]:
    """Variants that contradict the rest of the manifest, or that nothing may be opened with."""
    variants, objects = manifest.said.variants, manifest.objects
    if variants is None:
        return
    names = Counter(one.name for one in variants.judged)
    yield from (f"variant {name} is named twice" for name, n in names.items() if n > 1)
    if RECOMMENDED in names:
        yield f"{RECOMMENDED} is no name of a variant, since it stands for one"
    if variants.recommended not in {FP32, *variants.passed}:
        yield f"expected one of those that passed to be recommended, found {variants.recommended}"
    for name, one in variants.passed.items():
        own = f"{VARIANTS_FOLDER}/{name}/{MODEL}"
        expected = [MODEL] if name == FP32 else [MODEL, own]
        if one.file not in expected:
            yield f"expected variant {name} in {' or '.join(expected)}, found {shown(one.file)}"
        elif one.file not in objects:
            yield f"{one.file} of variant {name} is not among the objects"
        elif one.sha256 != objects[one.file].sha256:
            yield (
                f"expected variant {name} to have the SHA-256 of {one.file}, "
                f"{objects[one.file].sha256}, found {one.sha256}"
            )
        for settings in (one.sessions.latency, one.sessions.throughput):
            yield from (f"variant {name}: {problem}" for problem in _wrong_settings(settings))


def _wrong_settings(settings: SessionSettings) -> Iterator[str]:
    providers = _PROVIDERS.get(settings.runtime)
    if providers is None:
        yield f"a released model is not run with {settings.runtime}"
    elif settings.provider not in providers:
        yield f"expected {settings.runtime} on {', '.join(sorted(providers))}, found another"
    for option, value in settings.provider_options.items():
        if option not in _OPTIONS or not _OPTION_VALUE.fullmatch(value):
            yield (
                f"its provider is not given the option {shown(repr(option))} = {shown(repr(value))}"
            )
