"""PyTorch to ONNX: one file, the opset that was asked for, a batch axis that is really dynamic.

Up to opset 17 the TorchScript exporter is used, from 18 on the one based on ``torch.export``,
which would silently give opset 18 for any smaller number.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import re
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from heimdall_onnx.common.errors import ExportError, HeimdallError, ParameterError
from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.model.branches import find_branch, is_own, own_line
from heimdall_onnx.model.copies import copy_model
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import InputOrder, input_order, named_outputs, plain_attention
from heimdall_onnx.model.onnx.checks import (
    check_file,
    export_lengths,
    first_line,
    innermost,
    named_axes,
    prove_axes,
    short_reason,
)
from heimdall_onnx.model.onnx.file import write_model
from heimdall_onnx.model.repetition import Answer, depends_on_batch, repeatable_answer, restore
from heimdall_onnx.model.signature import Signature, signature_of

if TYPE_CHECKING:
    import onnx_ir as ir

log = get_logger(__name__)

OPSETS = range(9, 24)
_FIRST_TORCH_EXPORT_OPSET = 18
ONE_FILE_LIMIT = 2**31 - 1  # protobuf's largest message
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_WITH_TENSORS = "Compute with tensors only: both ways, chosen with torch.where."
# What torch.export says of an axis that two inputs share, as the signature says they do.
_ALIKE = re.compile(r"axis name: (.+) will not be used, .* with another axis: \1\.")


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
            Example inputs are made from it, or by the model itself, see `model.examples`.
        opset: From 9 to 23.
        do_constant_folding: Compute constant subexpressions now. With opset 18 and up this turns
            the exporter's graph optimization on or off as a whole.

    Raises:
        ParameterError: If the opset is not supported.
        DataError: If the signature contradicts itself, or the model's own examples do not fit it.
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
    if signature is None:
        signature = signature_of(model)
    else:
        signature.require_consistent(f"the signature given for {type(model).__name__}")
    examples = Examples(signature, model)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:
            made = Path(folder) / target.name
            with eval_mode(model):
                _export(model, made, examples, opset, do_constant_folding)
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


def _export(model: nn.Module, path: Path, examples: Examples, opset: int, fold: bool) -> None:
    """Write the file and prove it; where that fails, say whether the other exporter can."""
    signature = examples.signature
    order = input_order(model, signature.input_names)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    lengths, count = export_lengths(signature), signature.fixed_batch or 2
    example, other = (
        {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        for arrays in (examples.valid(count, seed, lengths) for seed in (0, 1))
    )

    def call(tensors: Mapping[str, torch.Tensor], model: nn.Module = model) -> Any:
        return order.call(model, {name: tensor.clone() for name, tensor in tensors.items()})

    try:
        with _quiet_exporter(), torch.no_grad():
            named = partial(named_outputs, model, signature=signature)
            answer = repeatable_answer(model, call, (example, other), named)
    except HeimdallError as error:
        raise ExportError(str(error)) from error
    except Exception as error:  # the model's own code
        raise _failed(model, opset, error) from error
    write = partial(_write_proven, model, signature, example, order, answer, fold)
    try:
        write(path, opset)
    except ExportError as error:
        mixed = {name: torch.cat([t[:1], other[name][1:]]) for name, t in example.items()}
        with _quiet_exporter(), torch.no_grad():
            name = depends_on_batch(named(answer.result), named(call(mixed)))
        said = str(error).rstrip(".")
        if name:
            raise ExportError(
                f"{said}. PyTorch's {name} of a sample hangs on the other samples of its batch, in "
                "eval mode too: batch statistics, or a mean over the batch."
            ) from error
        further = 20 if opset < _FIRST_TORCH_EXPORT_OPSET else 17
        try:
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder) / path.name, further)
        except (HeimdallError, OSError):
            raise error from error.__cause__
        raise ExportError(
            f"{said}. Opset {further} does better: choose it. There the export agrees with "
            "PyTorch as far as was tried."
        ) from error


def _write_proven(
    model: nn.Module,
    signature: Signature,
    tensors: Mapping[str, torch.Tensor],
    order: InputOrder,
    answer: Answer,
    fold: bool,
    path: Path,
    opset: int,
) -> None:
    traced = opset < _FIRST_TORCH_EXPORT_OPSET
    with _quiet_exporter(), torch.no_grad():
        call = partial(order.call, copy_model(model)) if traced else None
        branch = find_branch(call, tensors) if call else ""
    if branch:
        raise ExportError(
            f"{type(model).__name__} {branch}. Up to opset {_FIRST_TORCH_EXPORT_OPSET - 1} a "
            f"graph has only what the example took. {_WITH_TENSORS}"
        )
    try:
        with (
            _quiet_exporter() as caught,
            torch.no_grad(),
            _plain_forward(model, order, answer.result, signature) as (taken, given),
        ):
            export = partial(
                torch.onnx.export,
                model,
                tuple(tensors[name] for name in order.names),
                opset_version=opset,
                input_names=taken,
                output_names=given,
            )
            if traced:
                _torchscript(export, path, signature, fold)
            else:
                shapes = _dynamic_shapes(model, signature, taken)
                _torch_export(export, path, signature, fold, shapes)
        unseen = next(filter(None, map(_converted, caught)), "") if branch is None else ""
        if unseen:
            raise ExportError(
                f"{type(model).__name__} does not run while it is watched, and it may branch on "
                f"the values of its inputs, as the tracer says: {unseen}. {_WITH_TENSORS}"
            )
        check_file(path, signature, opset, answer.changed)
        prove_axes(model, path, signature, _suspicions(caught))
    except (OSError, HeimdallError):
        raise
    except Exception as error:  # exporters raise whatever the model's code makes them raise
        raise _failed(model, opset, error, _frozen_axis(error, model, order, signature)) from error
    finally:
        restore(model, answer.state)


def _failed(model: nn.Module, opset: int, error: Exception, axis: str = "") -> ExportError:
    inner = innermost(error)
    reason, where = short_reason(inner), own_line([*traceback.walk_tb(inner.__traceback__)][::-1])
    if "data-dependent" in reason or type(inner).__name__ == "DataDependentOutputException":
        reason = (
            "its code asks for values that only a call knows, by a branch or loop on them or by "
            f"`.item()`: {where}. {_WITH_TENSORS} (data-dependent, {reason})"
        )
    else:
        reason = axis + reason + (where and f" ({where})")
    return ExportError(f"{type(model).__name__} can't be exported to opset {opset}: {reason}")


@contextlib.contextmanager
def _plain_forward(
    model: nn.Module, order: InputOrder, result: Any, signature: Signature
) -> Iterator[tuple[list[str], list[str]]]:
    """Have ``model`` take its inputs by position and return plain tensors; the names of both.

    Nothing is done to a model that does so already. Where inputs go by name or outputs lie in one
    another, each exporter orders them in a way of its own, and none can be told their names.
    """
    outputs = named_outputs(model, result, signature)
    if not order.keywords and _is_plain(result, len(outputs)):
        yield list(order.positional), list(outputs)
        return
    forward, own = model.forward, vars(model).get("forward")
    count, names = len(order.positional), [spec.name for spec in signature.outputs]

    def plain(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
        keywords = dict(zip(order.keywords, arguments[count:], strict=True))
        found = named_outputs(model, forward(*arguments[:count], **keywords), signature)
        return tuple(found[name] for name in names)

    model.forward = plain
    try:
        yield list(order.names), names
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _is_plain(result: Any, count: int) -> bool:
    if isinstance(result, Mapping):
        return len(result) == count and all(isinstance(v, torch.Tensor) for v in result.values())
    if isinstance(result, list | tuple) and not hasattr(result, "_fields"):
        return all(isinstance(value, torch.Tensor) for value in result)
    return isinstance(result, torch.Tensor)


_STATIC = re.compile(
    r"static shape of (\d+) for dimension inputs\['?(\w+)'?\](?:\[(\d+)\])?\.shape\[(\d+)\]"
)


def _frozen_axis(
    error: BaseException, model: nn.Module, order: InputOrder, signature: Signature
) -> str:
    """Which axis torch.export found frozen, by the signature's names; empty if it was not that."""
    found = _STATIC.search(str(innermost(error)))
    if found is None:
        return ""
    length, argument, item, axis = found.groups()
    parameters = list(inspect.signature(model.forward).parameters)
    index = parameters.index(argument) if argument in parameters else 0
    name = order.names[min(index + int(item or 0), len(order.names) - 1)]
    shape = next(spec.shape for spec in signature.inputs if spec.name == name)
    return (
        f"axis {axis} ({shape[int(axis)]}) of {name} is frozen at {length}: the model's code "
        "depends on that length (a fixed shape, a loop over it, or a branch on it). "
    )


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the exporter's warnings and keep its graphs and advice off the terminal.

    On failure it prints source lines with paths; the reason comes with the error, and whatever
    it does silently wrong is checked in the file.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    printed = io.StringIO()
    # On failure it writes the graph past Python's streams, and its own switch is always on.
    torch_c: Any = torch._C  # noqa: SLF001
    log_graph = getattr(torch_c, "_jit_onnx_log", None)
    try:
        torch_c._jit_onnx_log = lambda *_: None  # noqa: SLF001
        logger.setLevel(logging.CRITICAL)
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            yield caught
    finally:
        torch_c._jit_onnx_log = log_graph  # noqa: SLF001
        logger.setLevel(level)


def _torchscript(
    export: Callable[..., object], path: Path, signature: Signature, fold: bool
) -> None:
    import onnx_ir as ir

    axes = {spec.name: named_axes(spec) for spec in (*signature.inputs, *signature.outputs)}
    with plain_attention():
        export(f=str(path), dynamo=False, do_constant_folding=fold, dynamic_axes=axes)
    scattered = [p for p in path.parent.iterdir() if p != path]
    exported = ir.load(path)
    # Where this exporter can't tell a fixed length it makes up a name.
    _name_axes(exported, signature)
    # Mapped until then: what is unlinked stays readable.
    write_model(exported, path, ONE_FILE_LIMIT)
    for file in scattered:
        file.unlink()


def _torch_export(
    export: Callable[..., Any],
    path: Path,
    signature: Signature,
    fold: bool,
    shapes: tuple[Any, ...],
) -> None:
    from onnx_ir.passes.common import NameFixPass

    with plain_attention():
        exported = export(dynamo=True, optimize=fold, verbose=False, dynamic_shapes=shapes).model
    # The exporter gives inputs and outputs the names it was told last, whoever else has them.
    NameFixPass()(exported)
    _strip_machine(exported)
    _name_axes(exported, signature)
    write_model(exported, path, ONE_FILE_LIMIT)


def _dynamic_shapes(model: nn.Module, signature: Signature, names: list[str]) -> tuple[Any, ...]:
    """The dynamic axes in the structure of ``forward``'s arguments, ``*args`` as one of them."""
    specs = {spec.name: spec for spec in signature.inputs}
    axes = [named_axes(specs[name]) for name in names]
    for index, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL:
            return (*axes[:index], tuple(axes[index:]))
    return tuple(axes)


def _strip_machine(model: ir.Model) -> None:
    """Keep the module scopes; drop stack traces, source lines and the exporter's notes."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            scopes = node.metadata_props.get(_NAME_SCOPES)
            node.metadata_props.clear()
            if scopes is not None:
                node.metadata_props[_NAME_SCOPES] = scopes
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()


def _name_axes(model: ir.Model, signature: Signature) -> None:
    """Give the outputs' symbolic axes the signature's names and lengths, not a formula's."""
    import onnx_ir as ir

    shapes = {spec.name: spec.shape for spec in signature.outputs}
    for value in model.graph.outputs:
        wanted = shapes.get(value.name or "", ())
        if value.shape is not None and len(value.shape) == len(wanted):
            pairs = zip(wanted, value.shape, strict=True)
            value.shape = ir.Shape([w if isinstance(h, ir.SymbolicDim) else h for w, h in pairs])


def _suspicions(caught: list[warnings.WarningMessage]) -> list[str]:
    """What the tracer warned of; its deprecation is known, and anything else goes to the log."""
    found = {
        first_line(str(warning.message)): warning.category
        for warning in caught
        if not issubclass(warning.category, DeprecationWarning | FutureWarning)
        and not _ALIKE.search(str(warning.message))
    }
    for text, category in found.items():
        log.warning("exporter_warning", category=category.__name__, message=text)
    tracer = torch.jit.TracerWarning  # type: ignore[attr-defined]
    warned = (text for text, category in found.items() if issubclass(category, tracer))
    return [f"The tracer had warned: {text}" for text in warned]


def _converted(caught: warnings.WarningMessage) -> str:
    """The line that makes another thing than a tensor of a value, in words; of a length, none."""
    text = linecache.getline(caught.filename, caught.lineno).strip()
    tracer = torch.jit.TracerWarning  # type: ignore[attr-defined]
    if not issubclass(caught.category, tracer) or re.search(r"\bshape\b|\bsize\(|^assert", text):
        return ""
    own = str(caught.message).startswith("Converting") and is_own(caught.filename)
    return f"line {caught.lineno}: `{text}`" if own else ""


def _publish(made: Path, target: Path, opset: int, started: float) -> ExportResult:
    sha256 = hash_file(made)
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
