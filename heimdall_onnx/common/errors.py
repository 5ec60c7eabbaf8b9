"""Every error this package raises on purpose, and the exit code each one means.

```
HeimdallError                      exit 1
├── InputError (ValueError)        exit 2: bad usage or bad input
│   ├── ParameterError             a parameter is unknown, mistyped or out of range
│   ├── SettingsError              the configuration does not hold together
│   ├── CheckpointError            the checkpoint can't be read or doesn't fit the model
│   ├── DataError                  a recording or the evaluation data can't be used
│   ├── UnavailableError           a runtime or precision is not installed or not in the hardware
│   └── NotRegisteredError (RegistryError) the model registry has no such model, version or run
├── EvidenceError                  exit 3: the release is not justified
│   ├── ExportError (RuntimeError)         the model can't be exported faithfully
│   ├── InvalidModelError (ValueError)     the ONNX file is not what it should be
│   ├── ParityError (AssertionError)       the outputs differ from PyTorch's
│   ├── BenchmarkError (RuntimeError)      a contender could not be measured
│   ├── GateError                          at least one gate failed
│   ├── NotebookError                      the notebook did not run to its end
│   ├── VerificationError                  a release does not match its manifest
│   └── PromotionError                     an alias must not be moved
└── ServiceError (RuntimeError)    exit 4: a service could not be reached or refused
    ├── StoreError                 the object store
    │   ├── ObjectExistsError      an object that must not be overwritten is already there
    │   └── MissingObjectError     there is no such object, or no such bucket
    ├── RegistryError              the model registry
    └── SchedulerError             the scheduler of a fleet's workers
```
"""

from __future__ import annotations


class HeimdallError(Exception):
    """Base of every error raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(HeimdallError, ValueError):
    """What the caller gave can't be used."""

    exit_code = 2


class ParameterError(InputError):
    """A parameter is unknown, has the wrong type or is out of range."""


class SettingsError(InputError):
    """The configuration from the environment does not hold together."""


class CheckpointError(InputError):
    """The checkpoint can't be read safely or doesn't fit the model."""


class DataError(InputError):
    """A recording or the evaluation data can't be used."""


class UnavailableError(InputError):
    """A runtime, execution provider or precision is not installed, or not in the hardware."""


class EvidenceError(HeimdallError):
    """The evidence does not justify a release."""

    exit_code = 3


class ExportError(EvidenceError, RuntimeError):
    """The model can't be exported to the ONNX file that was asked for."""


class InvalidModelError(EvidenceError, ValueError):
    """The ONNX file is broken or does not match the signature."""


class ParityError(EvidenceError, AssertionError):
    """The ONNX model's outputs differ from the PyTorch model's."""


class BenchmarkError(EvidenceError, RuntimeError):
    """A contender could not be measured."""


class GateError(EvidenceError):
    """At least one gate failed; the message lists every one that did."""


class NotebookError(EvidenceError):
    """The notebook did not run to its end."""


class VerificationError(EvidenceError):
    """A release, or an object of it, does not match what was recorded."""


class PromotionError(EvidenceError):
    """An alias must not be moved; the message lists every reason."""


class ServiceError(HeimdallError, RuntimeError):
    """A service could not be reached, or refused."""

    exit_code = 4


class StoreError(ServiceError):
    """The object store could not be reached, refused, or returned something else."""


class ObjectExistsError(StoreError):
    """A conditional write found an object of that name already there."""


class MissingObjectError(StoreError):
    """The object store has no such object, or no such bucket."""


class RegistryError(ServiceError):
    """The model registry could not be reached, or refused."""


class NotRegisteredError(InputError, RegistryError):
    """The model registry has no model, version or run of that name."""


class SchedulerError(ServiceError):
    """The scheduler of a fleet's workers can't be reached, or has no workers that fit."""


def error_class(name: str) -> type[HeimdallError] | None:
    """The class of this tree called ``name``, or None; reads an error name out of a notebook."""
    candidate = globals().get(name)
    if isinstance(candidate, type) and issubclass(candidate, HeimdallError):
        return candidate
    return None
