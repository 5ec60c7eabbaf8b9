"""The model that a spelling names, built with the arguments of the caller and of a checkpoint."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from heimdall_onnx.common.errors import HeimdallError, ParameterError
from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.common.text import listed, shown
from heimdall_onnx.model.pickles import StoredTensor
from heimdall_onnx.model.readings import NO_MODEL, Content

log = get_logger(__name__)

_ELSEWHERE = re.compile(r"(cuda|mps|xpu|hpu|npu|xla|tpu)(:\d+)?")


@dataclass(frozen=True)
class Construction:
    """How a model is built, as often as it is needed.

    Attributes:
        make: What makes it.
        kwargs: Its keyword arguments.
        about: Both, in words, and which arguments the checkpoint records.
        submodule: Which of its modules is the network; empty for the model itself.
        hyper_parameters: What the checkpoint records and can be loaded.
        notes: What was changed or left aside, in words.
    """

    make: Callable[..., Any]
    kwargs: dict[str, Any]
    about: str
    submodule: str
    hyper_parameters: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def reads_weights(self) -> bool:
        """Whether what makes it reads the checkpoint itself, as ``from_pretrained`` does."""
        return isinstance(self.make, partial)

    def outline(self) -> nn.Module:
        """The network with shapes in the place of weights; built in earnest if it can't be so."""
        try:
            with torch.device("meta"):
                return self.build()
        except Exception:  # whatever the model's constructor raises; built in earnest it says why
            log.debug("outline_not_built", exc_info=True)
            return self.build()

    def build(self) -> nn.Module:
        """The network as its constructor leaves it.

        Raises:
            ParameterError: If it can't be built, or has no such submodule.
        """
        try:
            made = self.make(**self.kwargs)
        except HeimdallError:
            raise
        except Exception as error:  # whatever the model's constructor raises
            reason = f"{type(error).__name__}: {shown(str(error), 1000)}"
            raise ParameterError(f"can't build {self.about}: {reason}") from error
        if not isinstance(made, nn.Module):
            what = type(made).__name__
            raise ParameterError(f"expected a torch.nn.Module, found {what}: {self.about}")
        modules: dict[str, nn.Module] = dict(made.named_modules(remove_duplicate=False))
        network = modules.get(self.submodule)
        if network is None:
            children = ", ".join(name for name, _ in made.named_children()) or "none"
            raise ParameterError(
                f"{type(made).__name__} has no submodule {self.submodule!r}; it has {children}"
            )
        if network is not made and hasattr(made, "signature") and not hasattr(network, "signature"):
            network.signature = made.signature
        return network


def plan_model(
    spec: str, content: Content, given: Mapping[str, Any], submodule: str = ""
) -> Construction:
    """Say how the model of a checkpoint is built.

    Hyper-parameters that the checkpoint records become arguments where there are parameters of
    those names, all of them where it takes any; ``given`` ones win over them, and None leaves out
    one without a parameter of its own. ``pretrained`` is always off, and devices are the CPU. What
    a class lists in ``arguments_of_caller`` is never taken from the file. A bound method
    ``from_pretrained`` gets the checkpoint's folder.

    Raises:
        ParameterError: If the model can't be imported or does not take these arguments.
    """
    make: Callable[..., Any] = import_model(spec)
    path = content.source.path
    if getattr(make, "__name__", "") == "from_pretrained":
        make = partial(make, str(path if path.is_dir() else path.parent))
    parameters = dict(inspect.signature(make).parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    names = [
        n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    hyper, unread, notes = dict[str, Any](), dict[str, str](), list[str]()
    for name, value in content.hyper_parameters.items():
        if isinstance(value, StoredTensor) and not (takes_any or name in names):
            continue  # as large as the file likes, and wanted by nobody
        try:
            hyper[name] = copy.deepcopy(value)
        except Exception as error:  # of a class that is not loaded, or broken in any way
            unread[name] = shown(str(error.args[0] if error.args else error))
            notes.append(f"not loaded: hyper-parameter {shown(name)}, {unread[name]}")
    barred = {*getattr(make, "arguments_of_caller", ()), *given}
    taken = [*names, *hyper] if takes_any else names
    recorded = {n: hyper[n] for n in taken if n in hyper and n not in barred}
    for name, value in recorded.items():
        if isinstance(value, str | torch.device) and _ELSEWHERE.fullmatch(str(value)):
            recorded[name] = type(value)("cpu")
            notes.append(f"argument {name}: cpu in the place of {value}")
    unused = [name for name in content.hyper_parameters if name not in {*taken, *unread}]
    if unused and not getattr(make, "made_of_checkpoints", False):
        notes.append(f"hyper-parameters that {spec} does not take: {shown(', '.join(unused))}")
    # What has no parameter of its own has no default to go back to: null leaves it out.
    swallowed = hyper.keys() - {*names}
    kwargs = recorded | {n: v for n, v in given.items() if v is not None or n not in swallowed}
    if kwargs.get("pretrained", "pretrained" in names and parameters["pretrained"].default):
        kwargs["pretrained"] = False
    unknown = [] if takes_any else [name for name in given if name not in names]
    problems = [f"no parameter {name!r}.{_near(name, names)}" for name in unknown]
    problems += [
        f"parameter {name!r} is required"
        + (f"; the file has a {unread[name]} there, which is not loaded" if name in unread else "")
        for name in names
        if name not in kwargs and parameters[name].default is inspect.Parameter.empty
    ]
    if problems:
        raise ParameterError(
            f"{spec} can't be built from {sorted(kwargs) or 'no arguments'}; its parameters are "
            f"{', '.join(names) or 'none'}:{listed(problems)}"
        )
    arguments = ", ".join(f"{name}={shown(value)}" for name, value in kwargs.items())
    about = f"{spec} with {arguments or 'no arguments'}"
    if from_file := sorted(recorded.keys() - {"pretrained"}):
        about += f", of which {path} records {', '.join(from_file)}"
    return Construction(make, kwargs, about, submodule, hyper, tuple(notes))


def import_model(spec: str) -> Callable[..., Any]:
    """The class, function or bound method of a class that ``"package.module:Name"`` names.

    ``"folder/file.py:Name"`` names one in a file; what lies beside it can be imported from there.
    ``load_from_checkpoint`` of a class stands for the class: it would unpickle the file.

    Raises:
        ParameterError: If there is none or it can't make a model; near names are suggested.
    """
    if not spec:
        raise ParameterError(NO_MODEL)
    module_name, colon, path = str(spec).removesuffix(".load_from_checkpoint").partition(":")
    if not (module_name and colon and path):
        raise ParameterError(f"model must look like 'package.module:Class', found {spec!r}")
    module = _import(module_name, spec)
    try:
        found: Any = reduce(getattr, path.split("."), module)
    except AttributeError:
        classes = {n for n, v in vars(module).items() if isinstance(v, type)}
        classes |= set(getattr(module, "__all__", ()))
        raise ParameterError(
            f"model {spec!r}: {module_name} has no {path!r}." + _near(path, classes)
        ) from None
    is_class = isinstance(found, type)
    if issubclass(found, nn.Module) if is_class else callable(found):
        return found  # type: ignore[no-any-return]
    raise ParameterError(
        f"model {spec!r} must be a subclass of torch.nn.Module or a function that makes one, "
        f"found {shown(found)}"
    )


def _import(name: str, spec: str) -> ModuleType:
    file = Path(name).expanduser().absolute() if name.endswith(".py") else None
    if file is not None:
        if not file.is_file():
            raise ParameterError(f"model {spec!r}: there is no such file: {file}")
        name = file.stem
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))
    try:
        module = importlib.import_module(name)
        there = getattr(module, "__file__", None) or "built in"
        if file is None or Path(there).resolve() == file.resolve():
            return module
        raise ParameterError(
            f"model {spec!r}: another module ({there}) is called {name}; rename the file"
        )
    except HeimdallError:
        raise
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        cause: Exception = error
        problem = f"{name} needs {missing}, which is not installed"
        if f"{name}.".startswith(f"{missing}."):
            parent, _, last = missing.rpartition(".")
            siblings = getattr(sys.modules.get(parent), "__path__", None) if parent else None
            names = [m.name for m in pkgutil.iter_modules(siblings)]
            problem = f"there is no module {missing!r}." + _near(last, names)
    except Exception as error:  # whatever the module's code raises
        cause, problem = error, f"{name} can't be imported: {type(error).__name__}: {error}"
    raise ParameterError(f"model {spec!r}: {problem}") from cause


def _near(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [n for n in names if not n.startswith("_")], n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
