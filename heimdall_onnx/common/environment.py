"""Where a release was made: code and its hashes, packages, processor."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from heimdall_onnx.common.files import hash_file
from heimdall_onnx.common.machine import instruction_sets, usable_processors

# A checkout on a dead network disk never answers.
GIT_TIMEOUT_S = 60
DISTRIBUTION = "heimdall-onnx"
PACKAGES = (
    DISTRIBUTION,
    "torch",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "numpy",
    "scipy",
    "mlflow",
    "boto3",
    "papermill",
    "scrapbook",
    "nbconvert",
    "matplotlib",
    "pyproj",
    "datasketches",
)


# What the numbers come from: other versions of these may round differently.
NUMERICAL = (
    "datasketches",
    "nncf",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "pyproj",
    "torch",
)


@dataclass(frozen=True)
class Environment:
    """What a result may depend on beside its inputs.

    Attributes:
        python: Version of Python.
        packages: Version of each package that matters.
        system: Operating system and architecture.
        cpu: Model name of the processor.
        processors: Processors this process may use, by affinity and quota.
        instruction_sets: Of these that matter to inference, see `instruction_sets`.
        git_commit: Commit of the code that ran; None outside a git checkout.
        git_dirty: Whether that checkout had uncommitted changes.
    """

    python: str
    packages: dict[str, str]
    system: str
    cpu: str
    processors: int
    instruction_sets: tuple[str, ...]
    git_commit: str | None
    git_dirty: bool | None


def capture_environment() -> Environment:
    """Describe this process and the checkout its code comes from."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain") if commit else None
    return Environment(
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in PACKAGES},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_model(),
        processors=usable_processors(),
        instruction_sets=instruction_sets(),
        git_commit=commit,
        git_dirty=None if changes is None else bool(changes),
    )


def installed_distributions() -> dict[str, str]:
    """Version of every distribution that this process can import, sorted by normalized name.

    Names are normalized as package indexes do it (PEP 503). Of a name that is there twice, the
    one found first counts, as it does for imports.
    """
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        described = distribution.metadata
        # What is left of a broken uninstallation has neither.
        if "Name" in described and "Version" in described:
            name = re.sub(r"[-_.]+", "-", described["Name"]).lower()
            found.setdefault(name, described["Version"])
    return dict(sorted(found.items()))


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """What git answers about the checkout of this code; None where it gives no answer."""
    folder = Path(__file__).parent
    # Reading must not lock the checkout against whoever works in it.
    git = ("git", "--no-optional-locks")
    try:
        # A package installed into somebody's own checkout is not code of that checkout.
        for asked in (("ls-files", "--error-unmatch", __file__), arguments):
            done = subprocess.run(
                [*git, *asked],
                cwd=folder,
                capture_output=True,
                text=True,
                check=True,
                timeout=GIT_TIMEOUT_S,
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@cache
def hash_of_package() -> str:
    """SHA-256 of this package's code and notebooks."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    # Installed they are in the package, in a checkout beside it.
    notebooks = (*package.glob("notebooks/*.ipynb"), *package.parent.glob("notebooks/*.ipynb"))
    for path in (*sorted(package.rglob("*.py")), *sorted(notebooks)):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def hash_of_module(name: str) -> str:
    """SHA-256 of a module's file; empty where it has none or there is no such module."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        spec = None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return ""
    return hash_file(Path(spec.origin))
