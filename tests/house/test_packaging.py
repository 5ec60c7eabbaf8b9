"""The three lists of packages say the same, and the environment is the one they describe."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from documents import READMES, ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# `make test-lowest` and `make test-newest` have environments of these names.
ENVIRONMENT = Path(sys.prefix).name
PINNED = pytest.mark.skipif(
    ENVIRONMENT in {".venv-lowest", ".venv-newest"}, reason="has other versions on purpose"
)


def requirements() -> list[Requirement]:
    extras = (r for extra in EXTRAS.values() for r in extra)
    return [Requirement(r) for r in [*PROJECT["dependencies"], *extras]]


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {
        canonicalize_name(p.name): next(iter(p.specifier)).version
        for p in pins
        if p.marker is None or p.marker.evaluate()
    }


def conda() -> list[str | dict]:
    return yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def conda_pip_lines() -> list[str]:
    return next(entry for entry in conda() if isinstance(entry, dict))["pip"]


def conda_pins() -> dict[str, str]:
    pins = [Requirement(line) for line in conda_pip_lines() if not line.startswith("-")]
    assert all([s.operator for s in pin.specifier] == ["=="] for pin in pins)
    return {canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins}


def test_every_requirement_is_pinned_within_its_range():
    pins = constraints()
    for requirement in requirements():
        pin = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(pin), f"{requirement} is pinned to {pin}"


def test_conda_users_get_exactly_the_pinned_requirements():
    pins = constraints()
    wanted = {canonicalize_name(r.name): pins[canonicalize_name(r.name)] for r in requirements()}
    assert conda_pins() == wanted


def test_conda_environment_pins_the_rest_through_the_constraints():
    lines = conda_pip_lines()
    assert "-c constraints.txt" in lines
    assert "-e ." in lines


def test_conda_python_is_one_that_the_project_allows():
    python = next(e for e in conda() if isinstance(e, str) and e.startswith("python="))
    assert python.removeprefix("python=") in pythons()


def pythons() -> list[str]:
    allowed = Requirement(f"python{PROJECT['requires-python']}").specifier
    return [f"3.{minor}" for minor in range(100) if allowed.contains(f"3.{minor}")]


def test_everyone_names_the_same_pythons():
    classified = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if ":: Python ::" in c]
    assert classified == pythons()
    makefile = (ROOT / "Makefile").read_text()
    first, last = (f"3.{n}" for n in re.findall(r"\(3, (\d+)\)", makefile))
    assert (first, last) == (pythons()[0], pythons()[-1])
    assert f"Python {', '.join(pythons()[:-1])} or {last} is needed" in makefile
    assert f"Python {first} to {last}" in (ROOT / "README.md").read_text()


def test_the_development_environment_has_every_extra():
    installed = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert installed is not None
    assert set(installed[1].split(",")) == set(EXTRAS)


def test_every_extra_that_is_named_is_there():
    files = [*READMES, *(ROOT / "heimdall_onnx").rglob("*.py")]
    named = [re.findall(r"heimdall-onnx\[(.*?)\]", path.read_text()) for path in files]
    assert {extra for names in named for n in names for extra in n.split(",")} == set(EXTRAS)


@PINNED
def test_installed_versions_are_the_pinned_ones():
    # torch's CPU build carries a local suffix that the pin leaves open.
    installed = {name: Version(metadata.version(name)).public for name in constraints()}
    assert installed == {name: Version(pin).public for name, pin in constraints().items()}


@PINNED
def test_everything_the_requirements_need_is_pinned():
    pins = constraints()
    seen: set[str] = set()
    todo = [canonicalize_name(r.name) for r in requirements()]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(need.name))
    # torch pins these itself, in its builds for GPUs only.
    for_gpus = {name for name in seen if name.startswith(("nvidia-", "cuda-")) or name == "triton"}
    # These two come with the environment itself.
    assert seen - for_gpus - {"setuptools", "pip"} <= set(pins)


def imports(node: ast.AST, *, at_once: bool = False) -> Iterator[str]:
    """The modules that really get imported: not those for the type checker only.

    At once are those that no function waits with.
    """
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield str(node.module).partition(".")[0]
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            if not (at_once and isinstance(child, ast.FunctionDef)):
                yield from imports(child, at_once=at_once)


def test_every_import_of_the_package_comes_without_an_extra():
    declared = {canonicalize_name(Requirement(r).name) for r in PROJECT["dependencies"]}
    homes = metadata.packages_distributions()
    # pydantic takes exactly one version of its core, and documents what is imported from there.
    known = {*sys.stdlib_module_names, "heimdall_onnx", "pydantic_core"}
    # Imported by what asks for them, which says what brings them: a variant, a dataset, training,
    # a fleet, an open notebook.
    asked_for = [r for extra in ("openvino", "train", "fleet", "lab") for r in EXTRAS[extra]]
    on_request = {canonicalize_name(Requirement(r).name) for r in asked_for}
    with_extra = {
        *("training/module.py", "training/trainer.py", "common/dask.py"),
        *("evidence/parity/worker.py", "evidence/parity/workers.py", "report/explore/widget.py"),
        *(f"release/fleet/{name}.py" for name in ("plots", "report", "run", "tables", "worker")),
    }
    package = ROOT / "heimdall_onnx"
    for path in package.rglob("*.py"):
        place = str(path.relative_to(package))
        tree = ast.parse(path.read_text())
        at_once = set(imports(tree, at_once=True))
        for module in set(imports(tree)) - known:
            owners = {canonicalize_name(d) for d in homes.get(module, ())}
            by_all = module in at_once and place not in with_extra
            allowed = declared if by_all else declared | on_request
            assert owners & allowed, f"{place}: {module} of {owners or 'nobody'}"


def test_every_requirement_has_a_lower_bound():
    for requirement in requirements():
        operators = {s.operator for s in requirement.specifier}
        assert ">=" in operators, f"{requirement} says nothing of the oldest version that works"


@pytest.mark.skipif(ENVIRONMENT != ".venv-lowest", reason="for `make test-lowest`")
def test_lower_bounds_are_the_versions_that_are_tested():
    higher = {}
    for requirement in requirements():
        lowest = next(s.version for s in requirement.specifier if s.operator == ">=")
        found = metadata.version(requirement.name)
        if release(found) != release(lowest):
            higher[str(requirement)] = found
    assert higher == {}


def release(version: str) -> tuple[int, int, int]:
    found = Version(version)
    return found.major, found.minor, found.micro
