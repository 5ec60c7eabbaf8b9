"""PyTorch to ONNX: one file, the opset that was asked for, a batch axis that is really dynamic.

Up to opset 17 the TorchScript exporter is used, from 18 on the one based on ``torch.export``,
which would silently give opset 18 for any smaller number.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heimdall_onnx.errors import EvidenceError, ExportError, ParameterError
from heimdall_onnx.export_checks import (
    check_file,
    example_inputs,
    first_line,
    named_axes,
    prove_axes,
    short_reason,
)
from heimdall_onnx.logs import get_logger
from heimdall_onnx.onnx_file import write_model
from heimdall_onnx.signature import Signature, signature_of

if TYPE_CHECKING:
    import onnx_ir as ir

log = get_logger(__name__)

OPSETS = range(9, 24)
_FIRST_TORCH_EXPORT_OPSET = 18
_ONE_FILE_LIMIT = 2**31 - 1  # protobuf's largest message
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"


@dataclass(frozen=True)
class ExportResult:
    """An exported model.

    Attributes:
        path: The ONNX file.
        opset: Its opset, read back from the file.
        exporter: ``"torchscript"`` or ``"torch.export"``.
        sha256: SHA-256 of the file.
        size_bytes: Size of the file, external data included.
        external_data: Files that hold the weights; empty for a model in one file.
        seconds: Wall-clock time of the export.
    """

    path: Path
    opset: int
    exporter: str
    sha256: str
    size_bytes: int
    external_data: tuple[Path, ...]
    seconds: float


def export_model(
    model: nn.Module,
    path: Path | str,
    *,
    signature: Signature | None = None,
    opset: int = 20,
    do_constant_folding: bool = True,
) -> ExportResult:
    """Export ``model`` in eval mode and check what was written.

    The file is complete or absent: it is made in a temporary folder beside ``path`` and moved
    there. The same weights give the same bytes in any folder: stack traces and other paths of
    this machine are stripped, the module scopes of the nodes are kept. A model above 2 GB has its
    weights in ``<stem>.onnx.data`` beside it.

    Args:
        model: On any device; its training modes are restored, also after an error.
        path: The file to write; its folder must exist.
        signature: Names, dtypes and axes; the model's own by default. Every named axis is dynamic.
        opset: From 9 to 23.
        do_constant_folding: Compute constant subexpressions now. With opset 18 and up this turns
            the exporter's graph optimization on or off as a whole.

    Raises:
        ParameterError: If the opset is not supported.
        ExportError: If the folder can't be written, the model can't be traced, or the file does
            not have the names, the opset or the dynamic axes that were asked for.
    """
    started = time.perf_counter()
    target = Path(path)
    if opset not in OPSETS:
        raise ParameterError(
            f"opset must be from {OPSETS[0]} to {OPSETS[-1]}, found {opset!r}: "
            f"{OPSETS[0]} to {_FIRST_TORCH_EXPORT_OPSET - 1} use the TorchScript exporter, "
            f"{_FIRST_TORCH_EXPORT_OPSET} to {OPSETS[-1]} the one based on torch.export"
        )
    if target.is_dir() or not target.parent.is_dir():
        found = "is a folder" if target.is_dir() else f"has no folder: {target.parent} is none"
        raise ExportError(f"can't export to {target}: it {found}. Give a file in a folder.")
    signature = signature or signature_of(model)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
            made = Path(folder) / target.name
            with eval_mode(model):
                suspicions = _export(model, made, signature, opset, do_constant_folding)
                check_file(made, signature, opset)
                prove_axes(model, made, signature, suspicions)
            return _publish(made, target, opset, started)
    except OSError as error:
        raise ExportError(f"can't write {target}: {error.strerror or error}") from error


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _export(
    model: nn.Module, path: Path, signature: Signature, opset: int, fold: bool
) -> list[str]:
    """Write the file and return what the tracer found suspicious."""
    inputs = example_inputs(signature, batch=2, length=8, seed=0)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = tuple(torch.from_numpy(inputs[s.name]).to(device) for s in signature.inputs)
    export = _torch_export if opset >= _FIRST_TORCH_EXPORT_OPSET else _torchscript
    try:
        with _quiet_exporter() as caught, torch.no_grad():
            names = _output_names(model(*example), signature)
            export(model, example, path, signature, names, opset, fold)
    except (OSError, EvidenceError):
        raise
    except Exception as error:  # exporters raise whatever the model's code makes them raise
        raise ExportError(
            f"{type(model).__name__} can't be exported to opset {opset}: {short_reason(error)}"
        ) from error
    return _suspicions(caught)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the exporter's warnings and keep its graphs and advice off the terminal.

    On failure it prints source lines with paths; the reason comes with the error, and whatever
    it does silently wrong is checked in the file.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    printed = io.StringIO()
    try:
        logger.setLevel(logging.CRITICAL)
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        logger.setLevel(level)


def _output_names(result: Any, signature: Signature) -> list[str]:
    """Names of the outputs in the order in which the model returns them."""
    expected = [spec.name for spec in signature.outputs]
    if isinstance(result, Mapping):
        found = [str(name) for name in result]
        if sorted(found) == sorted(expected):
            return found
        raise ExportError(f"the model returned {found}; its signature names {expected}")
    count = 1 if isinstance(result, torch.Tensor) else len(result)
    if count != len(expected):
        raise ExportError(f"the model returned {count} outputs; its signature names {expected}")
    return expected


def _torchscript(
    model: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    signature: Signature,
    output_names: list[str],
    opset: int,
    fold: bool,
) -> None:
    torch.onnx.export(
        model,
        example,
        str(path),
        dynamo=False,
        opset_version=opset,
        do_constant_folding=fold,
        input_names=[spec.name for spec in signature.inputs],
        output_names=output_names,
        dynamic_axes={s.name: named_axes(s) for s in (*signature.inputs, *signature.outputs)},
    )
    scattered = [p for p in path.parent.iterdir() if p != path]
    if scattered or path.stat().st_size > _ONE_FILE_LIMIT:
        import onnx_ir as ir

        raw = path.parent / "raw"
        raw.mkdir()
        for file in (path, *scattered):
            file.replace(raw / file.name)
        _write(ir.load(raw / path.name), path)
        for file in raw.iterdir():
            file.unlink()
        raw.rmdir()


def _torch_export(
    model: nn.Module,
    example: tuple[torch.Tensor, ...],
    path: Path,
    signature: Signature,
    output_names: list[str],
    opset: int,
    fold: bool,
) -> None:
    program = torch.onnx.export(
        model,
        example,
        dynamo=True,
        opset_version=opset,
        optimize=fold,
        verbose=False,
        input_names=[spec.name for spec in signature.inputs],
        output_names=output_names,
        dynamic_shapes=_dynamic_shapes(model, signature),
    )
    assert program is not None
    exported = program.model
    _strip_machine(exported)
    _name_axes(exported, signature)
    _write(exported, path)


def _dynamic_shapes(model: nn.Module, signature: Signature) -> tuple[Any, ...]:
    """The dynamic axes in the structure of ``forward``'s arguments, ``*args`` as one of them."""
    axes = [named_axes(spec) for spec in signature.inputs]
    for index, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return (*axes[:index], tuple(axes[index:]))
    return tuple(axes)


def _write(model: ir.Model, path: Path) -> None:
    write_model(model, path, external_data=f"{path.stem}.onnx.data", limit=_ONE_FILE_LIMIT)


def _strip_machine(model: ir.Model) -> None:
    """Keep the module scopes; drop stack traces, source lines and the exporter's notes."""
    for node in model.graph.all_nodes():
        _strip_node(node)
    for function in model.functions.values():
        function.metadata_props.clear()
        for node in function.all_nodes():
            _strip_node(node)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def _strip_node(node: ir.Node) -> None:
    scopes = node.metadata_props.get(_NAME_SCOPES)
    node.metadata_props.clear()
    if scopes is not None:
        node.metadata_props[_NAME_SCOPES] = scopes
    node.doc_string = None
    for value in node.outputs:
        value.metadata_props.clear()


def _name_axes(model: ir.Model, signature: Signature) -> None:
    """Call the outputs' symbolic axes what the signature calls them, not by their formula."""
    import onnx_ir as ir

    axes = {spec.name: named_axes(spec) for spec in signature.outputs}
    for value in model.graph.outputs:
        if value.shape is None or len(value.shape) == 0:
            continue
        for axis, name in axes.get(value.name or "", {}).items():
            if axis < len(value.shape) and isinstance(value.shape[axis], ir.SymbolicDim):
                value.shape = ir.Shape(
                    [ir.SymbolicDim(name) if a == axis else d for a, d in enumerate(value.shape)]
                )


def _suspicions(caught: list[warnings.WarningMessage]) -> list[str]:
    """What the tracer warned of; its deprecation is known, and anything else goes to the log."""
    found = {
        first_line(str(warning.message)): warning.category
        for warning in caught
        if not issubclass(warning.category, DeprecationWarning | FutureWarning)
    }
    for text, category in found.items():
        log.warning("exporter_warning", category=category.__name__, message=text)
    tracer = torch.jit.TracerWarning  # type: ignore[attr-defined]
    return [text for text, category in found.items() if issubclass(category, tracer)]


def _publish(made: Path, target: Path, opset: int, started: float) -> ExportResult:
    with made.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    # The weights first: the model file is what makes them a model.
    external = tuple(target.parent / f.name for f in made.parent.iterdir() if f != made)
    for file_path in external:
        (made.parent / file_path.name).replace(file_path)
    made.replace(target)
    result = ExportResult(
        path=target,
        opset=opset,
        exporter="torch.export" if opset >= _FIRST_TORCH_EXPORT_OPSET else "torchscript",
        sha256=sha256,
        size_bytes=sum(f.stat().st_size for f in (target, *external)),
        external_data=external,
        seconds=time.perf_counter() - started,
    )
    log.info(
        "exported",
        path=str(target),
        opset=opset,
        exporter=result.exporter,
        size_bytes=result.size_bytes,
        seconds=round(result.seconds, 3),
    )
    return result
