"""The files beside a model that let MLflow load it."""

from __future__ import annotations

import importlib.metadata
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx

from heimdall_onnx.model.signature import Signature, TensorSpec

with warnings.catch_warnings():
    # While pyfunc is imported, by whoever needs it first, MLflow warns of its own type hints.
    warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)
    warnings.filterwarnings("ignore", ".*IProgress not found")
    import mlflow.onnx
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema
    from mlflow.types import TensorSpec as MlflowTensorSpec
    from mlflow.utils import environment

_PACKAGES = ("mlflow", "numpy", "onnx", "onnxruntime")


def write_mlmodel_folder(
    folder: Path,
    signature: Signature,
    *,
    model_size_bytes: int,
    run_id: str | None = None,
) -> None:
    """Write what ``mlflow.onnx.save_model`` writes beside ``model.onnx``, without the model.

    These are ``MLmodel``, ``requirements.txt``, ``conda.yaml`` and ``python_env.yaml``. The model
    itself is neither read nor copied, whatever its size. The CPU is the execution provider that
    ``mlflow.pyfunc`` will use: it warns on every load where a declared provider is missing.

    Args:
        folder: Where to; made if absent.
        signature: Inputs and outputs; dynamic axes become -1.
        model_size_bytes: Size of the model.
        run_id: The run that made the model.
    """
    model = Model(
        run_id=run_id,
        signature=ModelSignature(_schema(signature.inputs), _schema(signature.outputs)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="heimdall-mlmodel-") as scratch, _installed():
        saved = Path(scratch) / "model"
        mlflow.onnx.save_model(
            onnx.ModelProto(),
            saved,
            mlflow_model=model,
            pip_requirements=[f"{p}=={importlib.metadata.version(p)}" for p in _PACKAGES],
            onnx_execution_providers=["CPUExecutionProvider"],
            save_as_external_data=False,
        )
        (saved / "model.onnx").unlink()
        model.model_size_bytes = model_size_bytes
        model.save(saved / "MLmodel")
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())


@contextmanager
def _installed() -> Iterator[None]:
    """Save requirements that are what is installed without holding them against it.

    MLflow looks through the files of all packages for that, most of a small upload's time.
    """
    name = "warn_dependency_requirement_mismatches"
    check = getattr(environment, name, None)
    setattr(environment, name, lambda _: None)
    try:
        yield
    finally:
        setattr(environment, name, check)


def _schema(specs: tuple[TensorSpec, ...]) -> Schema:
    return Schema(
        [
            MlflowTensorSpec(
                np.dtype(spec.dtype),
                tuple(axis if isinstance(axis, int) else -1 for axis in spec.shape),
                spec.name,
            )
            for spec in specs
        ]
    )
