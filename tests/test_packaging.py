"""The three lists of packages say the same, and the environment is the one they describe."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(r) for r in [*project["dependencies"], *(r for e in extras for r in e)]]


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
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(e for e in conda() if isinstance(e, str) and e.startswith("python="))
    allowed = Requirement(f"python{project['requires-python']}").specifier
    assert allowed.contains(python.removeprefix("python="))


def test_installed_versions_are_the_pinned_ones():
    # torch's CPU build carries a local suffix that the pin leaves open.
    installed = {name: Version(metadata.version(name)).public for name in constraints()}
    assert installed == {name: Version(pin).public for name, pin in constraints().items()}


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
    assert seen - for_gpus - {"setuptools"} <= set(pins)


def test_every_import_of_the_package_is_a_declared_requirement():
    declared = {canonicalize_name(r.name) for r in requirements()}
    homes = metadata.packages_distributions()
    for path in (ROOT / "heimdall_onnx").rglob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE):
            if module in homes:
                owners = {canonicalize_name(d) for d in homes[module]}
                assert owners & (declared | {"heimdall-onnx"}), f"{path.name}: {module} of {owners}"
