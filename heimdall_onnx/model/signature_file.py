"""A model's signature in a YAML file beside its checkpoint, ``<stem>.signature.yaml``.

It declares what the class itself does not, so that a model that was written for training only can
be released unchanged, and it wins over what the class declares. Like the checkpoint it may be
anybody's file: it is read as plain data of a limited size, without aliases, which can make a small
file endless, and whatever is wrong with it is said at once with its place.

```yaml
inputs:
  - {name: receiver_features, dtype: float32, shape: [batch, receivers, 6], range: [-3, 3]}
  - {name: signal_mask, dtype: bool, shape: [batch, receivers], masks: [receiver_features]}
outputs:
  - {name: position, dtype: float32, shape: [batch, 2], unit: "degrees latitude, longitude"}
  - {name: log_variance, dtype: float32, shape: [batch, 2], log_variance_of: position}
axes:
  - {name: receivers, lengths: [1, 2, 3, 8], permutable: true}
quality: {metric: localization, max_loss: 0.02, confidence: 0.95}
```
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from heimdall_onnx.common.errors import DataError
from heimdall_onnx.common.parameters import MOST_METRICS, Quality
from heimdall_onnx.common.text import listed, meant, shown
from heimdall_onnx.common.yaml import line_of, parse, place_of
from heimdall_onnx.model.signature import DEFAULT_LENGTHS, Signature, TensorSpec

SUFFIX = ".signature.yaml"

# Some ten times what a model with a hundred inputs needs.
_MAX_BYTES = 64 << 10
_MOST = 200
# Of one sample in all tensors, at the longest lengths: a file's own numbers must not decide how
# much memory its examples take. Ten receivers heard for a minute at 12 kHz are 14 million.
_MAX_ELEMENTS = 1 << 24

_Name = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*$", max_length=100)]
_Length = Annotated[int, Field(ge=1, le=_MAX_ELEMENTS)]
_Dtype = Annotated[str, Field(pattern=r"^(float(16|32|64)|bool|u?int(8|16|32|64))$", max_length=20)]
_End = Annotated[float, Field(allow_inf_nan=False)] | Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Tensor(_Strict):
    name: _Name
    dtype: _Dtype
    shape: Annotated[list[_Name | _Length], Field(min_length=1, max_length=8)]
    unit: Annotated[str, Field(max_length=100, pattern=r"^[^\x00-\x1f\x7f]*$")] | None = None
    range: Annotated[list[_End], Field(min_length=2, max_length=2)] | None = None
    sigma_of: _Name | None = None
    log_variance_of: _Name | None = None
    masks: Annotated[list[_Name], Field(max_length=_MOST)] = Field(default_factory=list)


class _Axis(_Strict):
    name: _Name
    lengths: Annotated[list[_Length], Field(min_length=1, max_length=20)] = Field(
        default_factory=lambda: list(DEFAULT_LENGTHS)
    )
    permutable: bool = False


_Tensors = Annotated[list[_Tensor], Field(min_length=1, max_length=_MOST)]


class _Quality(_Strict):
    metric: Annotated[str, Field(max_length=MOST_METRICS)] = ""
    max_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Quality.max_loss
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = Quality.confidence


class _File(_Strict):
    inputs: _Tensors
    outputs: _Tensors
    axes: Annotated[list[_Axis], Field(max_length=_MOST)] = Field(default_factory=list)
    quality: _Quality | None = None


_KNOWN: dict[str, type[BaseModel]] = {
    "inputs": _Tensor,
    "outputs": _Tensor,
    "axes": _Axis,
    "quality": _Quality,
}


@dataclass(frozen=True)
class SignatureFile:
    """A signature that was read from a file.

    Attributes:
        path: The file.
        sha256: SHA-256 of the bytes that were read.
        signature: What it declares.
        quality: How much worse answers may be; None where it does not say.
    """

    path: Path
    sha256: str
    signature: Signature = field(repr=False)
    quality: Quality | None = None


def signature_path(checkpoint: Path | str) -> Path:
    """Where the signature of a checkpoint is: ``net.signature.yaml`` beside ``net.ckpt``."""
    path = Path(checkpoint)
    return path.with_name(path.stem.removesuffix(".pth") + SUFFIX)  # of net.pth.tar


def find_signature_file(checkpoint: Path | str) -> SignatureFile | None:
    """The signature beside a checkpoint; None where there is no such file.

    Raises:
        DataError: As `read_signature_file`.
    """
    # A link to the best of several checkpoints has the signature of what it leads to.
    paths = (signature_path(checkpoint), signature_path(Path(checkpoint).resolve()))
    found = next((path for path in paths if path.is_symlink() or path.exists()), None)
    return None if found is None else read_signature_file(found)


def read_signature_file(path: Path | str) -> SignatureFile:
    """Read a signature from a YAML file.

    Args:
        path: The file; nothing about its bytes is taken for granted.

    Raises:
        DataError: If it can't be read, is no YAML, is not of the form that is expected, or
            contradicts itself; with every problem, its line and its place.
    """
    source = Path(path)
    try:
        with source.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"can't read the signature {source}: {error.strerror or error}") from error
    if len(content) > _MAX_BYTES:
        raise DataError(
            f"{source} is no signature: expected at most {_MAX_BYTES:,} bytes of YAML, found more"
        )
    signature, quality = _parse(content, source)
    return SignatureFile(source, hashlib.sha256(content).hexdigest(), signature, quality)


def write_signature_file(signature: Signature, path: Path | str) -> Path:
    """Write a signature as a YAML file, e.g. at `signature_path` of its checkpoint.

    What has its default is left out, except the lengths of dynamic axes, which are worth a look.

    Returns:
        The file.

    Raises:
        DataError: If the signature contradicts itself, can't be written in this form, or the file
            can't be written.
    """
    target = Path(path)
    signature.require_consistent("the signature to be written")
    described = {
        "inputs": [_described(spec) for spec in signature.inputs],
        "outputs": [_described(spec) for spec in signature.outputs],
        "axes": [
            {"name": axis.name, "lengths": list(axis.lengths), "permutable": axis.permutable}
            for axis in signature.dynamic_axes
        ],
    }
    # Lists of plain values on one line.
    text = yaml.safe_dump(
        described, default_flow_style=None, sort_keys=False, allow_unicode=True, width=99
    )
    # What is written must be what is read, names that this form does not allow among it.
    _parse(text.encode(), target)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise DataError(f"can't write {target}: {error.strerror or error}") from error
    return target


def _described(spec: TensorSpec) -> dict[str, Any]:
    given = {name: value for name, value in asdict(spec).items() if value not in (None, ())}
    return {n: list(value) if isinstance(value, tuple) else value for n, value in given.items()}


def _parse(content: bytes, source: Path) -> tuple[Signature, Quality | None]:
    try:
        data, node = parse(content)
    except ValueError as error:
        raise DataError(f"{source} is no YAML of a signature: {error}") from error
    if node is None or not isinstance(data, dict):
        found = "nothing" if data is None else shown(data)
        raise DataError(
            f"{source} is no signature: expected `inputs` and `outputs`, and `axes` where any "
            f"are dynamic beside the batch; found {found}"
        )
    try:
        read = _File.model_validate(data)
    except ValidationError as error:
        # Each alternative of an entry has its own error, which reads alike here.
        said = dict.fromkeys(_explain(entry, node) for entry in error.errors(include_url=False))
        raise DataError(f"{source} is no signature:{listed(list(said))}") from None
    signature = Signature.from_dict(read.model_dump(exclude={"quality"}))
    if problems := [*signature.problems(), *_too_large(signature)]:
        raise DataError(f"the signature {source} contradicts itself:{listed(problems)}")
    if read.quality is None:
        return signature, None
    return signature, Quality(**read.quality.model_dump(), binding=True)


def _explain(entry: Any, node: yaml.Node) -> str:
    """One problem with its line and its place, e.g. ``line 7, outputs[1].sigma_off``."""
    # Behind an index pydantic names the alternative that it tried.
    path = [part for part in entry["loc"] if not _is_alternative(part)]
    return f"line {line_of(node, path)}, {place_of(path)}: {_said(entry, path)}"


def _is_alternative(part: str | int) -> bool:
    return isinstance(part, str) and ("constrained-" in part or part in {"float", "int", "str"})


def _said(entry: Any, path: Sequence[str | int]) -> str:
    kind, found = entry["type"], shown(entry["input"])
    last = str(path[-1]) if path else ""
    if kind == "extra_forbidden":
        model = _KNOWN.get(str(path[0]), _File) if len(path) > 1 else _File
        return f"is not known here; {meant(last, model.model_fields)}"
    if kind == "missing":
        return "is missing"
    names = [part for part in path if isinstance(part, str)]
    expected = _EXPECTED.get(str(path[0]) if len(path) == 1 else names[-1] if names else "")
    # Where only the number of entries is wrong, the list itself says little.
    return f"expected {expected or shown(entry['msg'])}, found {found}"


_EXPECTED = {
    "inputs": f"a list of 1 to {_MOST} inputs, each with name, dtype and shape",
    "outputs": f"a list of 1 to {_MOST} outputs, each with name, dtype and shape",
    "axes": f"a list of at most {_MOST} axes, each with a name",
    "name": "a name of letters, digits, _ and ., in quotes if YAML takes it for something else",
    "dtype": "bool, float16, float32, float64, or int or uint with 8, 16, 32 or 64",
    "shape": f"a list of 1 to 8 axes, each a length from 1 to {_MAX_ELEMENTS:,} or the name of a "
    "dynamic axis",
    "unit": "one line of text, at most 100 characters",
    "range": "two finite numbers, [low, high]",
    "sigma_of": "the name of an output",
    "log_variance_of": "the name of an output",
    "masks": "a list of names of inputs",
    "lengths": f"a list of 1 to 20 lengths, whole numbers from 1 to {_MAX_ELEMENTS:,}",
    "permutable": "true or false",
    "metric": "names of metrics with commas between them",
    "max_loss": "a number, 0 or more",
    "confidence": "a number from 0.5 to below 1",
}


def _too_large(signature: Signature) -> Iterator[str]:
    """Whether one sample would take too much memory at the longest lengths."""
    longest = {axis.name: max(axis.lengths) for axis in signature.dynamic_axes}
    elements = sum(
        math.prod(n if isinstance(n, int) else longest.get(n, 1) for n in spec.shape[1:])
        for spec in (*signature.inputs, *signature.outputs)
    )
    if elements > _MAX_ELEMENTS:
        yield (
            f"one sample has {elements:,} elements at the longest lengths: expected at most "
            f"{_MAX_ELEMENTS:,}"
        )
