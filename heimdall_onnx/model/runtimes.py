"""What runs a model: PyTorch, ONNX Runtime with its execution providers, or OpenVINO.

All have one face, `Runner`. What was asked for is what runs, or there is an `UnavailableError`
that names what is missing: where a runtime would fall back to another provider or precision by
itself, the one that it really took is read back and compared. Each is imported where it is used.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from heimdall_onnx.common.errors import EvidenceError, InvalidModelError, UnavailableError
from heimdall_onnx.common.machine import usable_processors
from heimdall_onnx.common.text import shown
from heimdall_onnx.model.examples import Examples
from heimdall_onnx.model.inference import open_session, run_onnx, run_pytorch

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

    from heimdall_onnx.common.arrays import Arrays
    from heimdall_onnx.model.signature import Signature

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
# What brings what; a name that is not here comes with the package itself.
EXTRAS = {
    "openvino": "heimdall-onnx[openvino]",
    "nncf": "heimdall-onnx[openvino]",
    "OpenVINOExecutionProvider": "the package onnxruntime-openvino in place of onnxruntime",
    CUDA: "the package onnxruntime-gpu in place of onnxruntime",
    TENSORRT: "the packages onnxruntime-gpu (not onnxruntime) and tensorrt",
}
_Text = Annotated[str, Field(max_length=1000)]


class SessionSettings(BaseModel):
    """How a model is opened; what was measured is what a consumer gets.

    Attributes:
        runtime: What runs it.
        provider: ONNX Runtime's execution provider, or OpenVINO's device.
        precision: OpenVINO's inference precision; others run what the file says.
        threads: Intra-op threads; 0 takes every processor that the process may use.
        level: How far ONNX Runtime rewrites the graph; ``"all"`` includes layouts that suit the
            processor.
        spinning: Whether idle threads wait actively.
        arena: Whether memory is kept for the next call.
        prepacking: Whether weights are copied into the layout of the kernels at the start.
        provider_options: Options of the execution provider.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    runtime: Literal["pytorch", "torch.compile", "onnxruntime", "openvino"] = "onnxruntime"
    provider: Annotated[str, Field(pattern="^[A-Za-z0-9]{1,64}$")] = CPU
    precision: Literal["f32", "bf16", "f16"] = "f32"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    level: Literal["none", "basic", "extended", "all"] = "all"
    spinning: bool = True
    arena: bool = True
    prepacking: bool = True
    provider_options: Annotated[dict[_Text, _Text], Field(max_length=50)] = Field(
        default_factory=dict
    )

    @property
    def thread_count(self) -> int:
        """Threads that it takes on this machine."""
        return self.threads or usable_processors()

    @property
    def on_gpu(self) -> bool:
        """Whether inputs and outputs travel to a GPU and back."""
        return self.provider in {CUDA, TENSORRT}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; ``model_validate`` reads it back."""
        return self.model_dump(mode="json")


@dataclass(frozen=True)
class Runner:
    """A model that is open.

    Attributes:
        ran_on: Execution provider or device, read back from what was opened.
        run: Takes named arrays and returns the signature's outputs by name; on a GPU that includes
            the way there and back.
        session: What a consumer calls with ``run(output_names, feed)``; None for PyTorch.
    """

    ran_on: str
    run: Callable[[Arrays], Arrays] = field(repr=False)
    session: InferenceSession | OpenVINOSession | None = field(default=None, repr=False)


def open_runner(path: Path, signature: Signature, settings: SessionSettings) -> Runner:
    """Open a model.

    Args:
        path: The ONNX file; for PyTorch a model that this program pickled itself.
        signature: Names and order of inputs and outputs.
        settings: With what.

    Raises:
        UnavailableError: If the runtime, its provider or the precision is not to be had here.
        InvalidModelError: If the file can't be loaded.
    """
    if settings.runtime in {"pytorch", "torch.compile"}:
        return _open_pytorch(path, signature, settings)
    openvino = settings.runtime == "openvino"
    session: Any = (OpenVINOSession if openvino else open_onnxruntime)(path, settings)
    ran_on = session.device if openvino else session.get_providers()[0]
    return Runner(ran_on, partial(run_onnx, session, signature=signature), session)


class Contender:
    """A model that is open and called on the same inputs again and again, in a worker for example.

    Args:
        path: The model, see `open_runner`.
        inputs: One call's inputs.
        signature: Names and order of inputs and outputs.
        settings: With what it runs.

    Attributes:
        ran_on: See `Runner`.
        run: See `Runner`.
        on_device: Calls the model on the same inputs, which lie on its device already, and leaves
            the outputs there; None where the device is the processor.
    """

    def __init__(
        self, path: Path, inputs: Arrays, signature: Signature, settings: SessionSettings
    ) -> None:
        runner = open_runner(path, signature, settings)
        self.ran_on, self.run = runner.ran_on, runner.run
        self.on_device: Callable[[], None] | None = None
        if settings.on_gpu:
            self.on_device = bound_call(runner.session, inputs, signature, "cuda")
        self._inputs: dict[int | None, Arrays] = {None: inputs}

    def __call__(self, batch_size: int | None = None) -> Arrays:
        """Call the model on the inputs, or on their rows repeated to a batch of another size."""
        # Kept, so that only the first call of a size pays for it.
        if batch_size is not None and batch_size not in self._inputs:
            self._inputs[batch_size] = {
                name: array[np.arange(batch_size) % len(array)]
                for name, array in self._inputs[None].items()
            }
        return self.run(self._inputs[batch_size])


def bound_call(
    session: Any, inputs: Arrays, signature: Signature, device: str
) -> Callable[[], None]:
    """A call whose inputs and outputs stay on the device, without the way there and back.

    It returns when the outputs are there: what was only begun would take no time.

    Args:
        session: Of ONNX Runtime.
        inputs: One call's inputs, copied to the device now.
        signature: Names of inputs and outputs.
        device: ONNX Runtime's name for it, ``"cuda"`` or ``"cpu"``.
    """
    import onnxruntime as ort

    binding = session.io_binding()
    for spec in signature.inputs:
        value = ort.OrtValue.ortvalue_from_numpy(inputs[spec.name], device, 0)
        binding.bind_ortvalue_input(spec.name, value)
    for spec in signature.outputs:
        binding.bind_output(spec.name, device)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def open_onnxruntime(path: Path | str, settings: SessionSettings) -> InferenceSession:
    """Open an ONNX file with ONNX Runtime, on the provider that was asked for and no other.

    Raises:
        UnavailableError: If ONNX Runtime has no such provider, or could not start it.
        InvalidModelError: If it can't load the file.
    """
    import onnxruntime as ort

    require_provider(settings.provider)
    if settings.on_gpu:
        # Finds the libraries that PyTorch or NVIDIA's packages bring.
        ort.preload_dlls()
    options = dict(settings.provider_options)
    if options.get("trt_engine_cache_enable") == "1":
        # An engine takes minutes to build and fits one device: it stays beside the file here.
        folder = str(Path(path).absolute().parent / "engines")
        options |= {"trt_engine_cache_path": folder, "trt_timing_cache_path": folder}
    # What TensorRT leaves out belongs on the GPU, too.
    behind = (CUDA,) if settings.provider == TENSORRT else ()
    as_said = settings.model_dump(include={"level", "spinning", "arena", "prepacking", "provider"})
    session = open_session(
        path, threads=settings.thread_count, provider_options=options, behind=behind, **as_said
    )
    # Where a provider can't start, ONNX Runtime takes the processor without an error.
    taken = session.get_providers()[0]
    if taken != settings.provider:
        raise UnavailableError(
            f"asked ONNX Runtime for {settings.provider}, and it took {taken}: the provider is "
            "installed and could not start; its libraries or its device are missing"
        )
    return session


def require_runtime(settings: SessionSettings) -> None:
    """Return if the runtime, and its provider, are installed.

    Raises:
        UnavailableError: If they are not; it names what brings them.
    """
    if settings.runtime == "openvino":
        import_openvino()
    elif settings.runtime == "onnxruntime":
        require_provider(settings.provider)


def require_provider(provider: str) -> None:
    """Return if this ONNX Runtime has the execution provider.

    Raises:
        UnavailableError: If it has not; it names what brings it.
    """
    import onnxruntime as ort

    installed = ort.get_available_providers()
    if provider not in installed:
        needed = EXTRAS.get(provider, "another build of onnxruntime")
        raise UnavailableError(
            f"this ONNX Runtime has no {shown(provider)} (it has {', '.join(installed)}); it takes "
            f"{needed}"
        )


def _open_pytorch(path: Path, signature: Signature, settings: SessionSettings) -> Runner:
    import torch

    torch.set_num_threads(settings.thread_count)
    device = "cuda" if settings.on_gpu else "cpu"
    # Written a moment ago by the parent process: not an untrusted checkpoint.
    model: torch.nn.Module = torch.load(path, map_location=device, weights_only=False)
    if settings.runtime == "torch.compile":
        from torch._inductor import exc

        try:
            model.compile()
            run_pytorch(model, Examples(signature, model).valid(1), signature)
        except exc.InvalidCxxCompiler as error:
            raise UnavailableError(f"torch.compile needs a C++ compiler: {error}") from error
        except EvidenceError as error:
            raise UnavailableError(f"torch.compile can't compile the model: {error}") from error
    return Runner(device, partial(run_pytorch, model, signature=signature, copied=False))


@dataclass(frozen=True)
class Port:
    """An input or output, as far as consumers of a session ask for it.

    Attributes:
        name: Its name.
        shape: One entry per axis; None for a dynamic one.
        type: OpenVINO's name of the element type.
    """

    name: str
    shape: tuple[int | None, ...]
    type: str


_CORE_LOCK = threading.Lock()


class OpenVINOSession:
    """An ONNX file on OpenVINO, called like an ONNX Runtime session.

    Args:
        path: The ONNX file.
        settings: Its ``provider`` is the device; ONNX Runtime's name for the processor counts as
            ``"CPU"``.

    Raises:
        UnavailableError: If OpenVINO is not installed, or runs another precision here.
        InvalidModelError: If it can't load the file.
    """

    def __init__(self, path: Path | str, settings: SessionSettings) -> None:
        self.device = "CPU" if settings.provider == CPU else settings.provider
        options = {
            "INFERENCE_NUM_THREADS": settings.thread_count,
            "INFERENCE_PRECISION_HINT": settings.precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        with _CORE_LOCK:
            core = _only_core(import_openvino())
        try:
            self._model = core.compile_model(str(path), self.device, options)
        except Exception as error:  # OpenVINO's errors share no narrower base
            raise InvalidModelError(
                f"OpenVINO can't load {path}: {shown(str(error), 1000)}"
            ) from error
        self.precision = str(self._model.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        if self.precision != settings.precision:
            raise UnavailableError(
                f"asked OpenVINO for {settings.precision}, and it runs {self.precision}: this "
                f"{self.device} has no instructions for {settings.precision}"
            )
        # A request is one caller's: another thread would write into its outputs.
        self._requests = threading.local()

    def get_inputs(self) -> list[Port]:
        """The model's inputs."""
        return [_port(port) for port in self._model.inputs]

    def get_outputs(self) -> list[Port]:
        """The model's outputs."""
        return [_port(port) for port in self._model.outputs]

    def run(self, names: list[str] | None, feed: Mapping[str, Any]) -> list[Any]:
        """The named outputs, or all of them, for named arrays.

        Raises:
            EvidenceError: If OpenVINO can't run the model on them.
        """
        request = getattr(self._requests, "own", None)
        if request is None:
            request = self._requests.own = self._model.create_infer_request()
        wanted = names if names is not None else [port.name for port in self.get_outputs()]
        try:
            request.infer(dict(feed), share_inputs=True)
        except Exception as error:  # OpenVINO's errors share no narrower base
            shapes = {name: np.shape(array) for name, array in feed.items()}
            raise EvidenceError(f"OpenVINO can't run the model on {shapes}: {error}") from error
        # Copied: the next call writes into the same memory.
        return [request.get_tensor(name).data.copy() for name in wanted]


def _port(port: Any) -> Port:
    shape = tuple(None if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
    return Port(port.get_any_name(), shape, port.get_element_type().get_type_name())


@functools.cache
def _only_core(openvino: Any) -> Any:
    """The core of this process, which is never let go.

    Its plugin gives the thread that it is loaded in a stack for signals, and unmaps that when it is
    unloaded. Were that done by another thread, which drops the last model, the first would keep
    the address, and the next signal would end the process.
    """
    return openvino.Core()


def import_openvino() -> Any:
    """The package ``openvino``.

    Raises:
        UnavailableError: If it is not installed.
    """
    try:
        import openvino
    except ImportError as error:
        raise UnavailableError(
            f"OpenVINO is not installed; it comes with {EXTRAS['openvino']}"
        ) from error
    return openvino
