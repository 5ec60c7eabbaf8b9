"""Whole releases as a pipeline runs them: started, watched, killed."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from invariants import Place
from releases import PREFIX, Inputs

from heimdall_onnx.archive.aliases import AliasLog
from heimdall_onnx.release.publish import Journal
from heimdall_onnx.services.connection import open_for_reading
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import MANIFEST, Bucket

_MARK = "HEIMDALL_TEST_RUN"
# What a release reaches, one after the other.
STEPS = (
    "start",
    "services",
    "notebook",
    "claim",
    "model",
    "registered",
    "report",
    "tagged",
    "manifest",
    "logged",
    "offered",
    "end",
)


@dataclass
class RunningRelease:
    """A release in processes of its own.

    Attributes:
        process: The runner.
        settings: Store and registry as it sees them.
        mark: What its processes carry in their environment.
        before: Run folders that were there already.
    """

    process: subprocess.Popen
    settings: Settings
    mark: str
    before: frozenset[Path] = field(default_factory=frozenset)

    def alive(self) -> list[psutil.Process]:
        """Its living processes, whoever is their parent by now."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                marked = process.environ().get(_MARK) == self.mark
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kernel(self) -> psutil.Process | None:
        """The notebook's kernel, while there is one."""
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                with suppress(psutil.Error):
                    if "ipykernel_launcher" in child.cmdline():
                        return child
        return None

    def kill(self, *victims: str) -> None:
        """SIGKILL to ``"runner"``, ``"kernel"`` or both; the runner where there is no kernel."""
        kernel = self.kernel() if "kernel" in victims else None
        if "runner" in victims or kernel is None:
            self.process.kill()
        if kernel is not None:
            with suppress(psutil.NoSuchProcess):
                kernel.kill()

    def end(self, timeout_s: float) -> dict[str, Any]:
        """Wait for its end; the result that it printed, empty where it was killed.

        Raises:
            subprocess.TimeoutExpired: If it does not end; it is killed then.
        """
        try:
            output, errors = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill("runner", "kernel")
            self.process.communicate()
            raise
        lines = output.splitlines()
        result = json.loads(lines[-1]) if lines else {}
        return {**result, "stderr": errors, "returncode": self.process.returncode}

    def left_over(self, seconds: float) -> list[psutil.Process]:
        """Its processes that are still there after ``seconds`` at most."""
        deadline = time.monotonic() + seconds
        while (alive := self.alive()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return alive

    def folder(self) -> Path | None:
        """Its run folder, once there is one."""
        return next(iter(_run_folders(self.settings) - self.before), None)

    def reached(self, place: Place) -> str:
        """The last of `STEPS` that it has reached, as read from what it has left."""
        return list(self._reached(place))[-1]

    def _reached(self, place: Place) -> Iterator[str]:
        yield "start"
        if self.process.poll() == 0:
            yield "end"
            return
        if (folder := self.folder()) is None:
            return
        yield "services"
        if not (folder / "report.ipynb").exists():
            return
        yield "notebook"
        client = open_for_reading(place.settings).client
        version = Journal(folder).read().get("version")
        if version is None or not Bucket(client, place.bucket).is_there():
            return
        prefix = f"{PREFIX}/{version}"
        keys = {
            k.removeprefix(f"{prefix}/") for k in Bucket(client, place.bucket).list_keys(prefix)
        }
        source = f"s3://{place.bucket}/{prefix}"
        own = [v for v in place.versions() if v.source == source]
        last = AliasLog(Bucket(client, place.bucket), place.name, place.alias).last
        offered = place.aliases().get(place.alias)
        for step, there in (
            ("claim", "metadata.json" in keys),
            ("model", "model.onnx" in keys),
            ("registered", bool(own)),
            ("report", "report.html" in keys),
            ("tagged", any("sha256" in v.tags for v in own)),
            ("manifest", MANIFEST in keys),
            ("logged", last is not None and last.release == source),
            ("offered", any(str(v.version) == offered for v in own)),
        ):
            if there:
                yield step


def _run_folders(settings: Settings) -> frozenset[Path]:
    return frozenset((settings.home / "runs").glob("*"))


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment with the settings in it."""
    credentials = settings.credentials
    assert credentials is not None
    return {
        **os.environ,
        "MLFLOW_TRACKING_URI": settings.tracking_uri.get_secret_value(),
        "MLFLOW_S3_ENDPOINT_URL": str(settings.s3_endpoint_url),
        "MLFLOW_S3_ACCESS_KEY_ID": credentials.access_key_id.get_secret_value(),
        "MLFLOW_S3_SECRET_ACCESS_KEY": credentials.secret_access_key.get_secret_value(),
        "MLFLOW_EXPERIMENT_NAME": settings.experiment_name,
        "HEIMDALL_HOME": str(settings.home),
    }


def start_release(
    settings: Settings,
    inputs: Inputs,
    bucket: str,
    *options: object,
    name: str = "test-model",
    within: tuple[str, ...] = (),
    **variables: str,
) -> RunningRelease:
    """Start the command that releases.

    Args:
        settings: Where the services are.
        inputs: What is released.
        bucket: Where to.
        options: Further options of the command.
        name: Registered model.
        within: A command that runs the one that follows it.
        variables: Of its environment.
    """
    mark = secrets.token_hex(8)
    before = _run_folders(settings)
    process = subprocess.Popen(
        [
            *within,
            *(sys.executable, "-m", "heimdall_onnx", "release", str(inputs.checkpoint)),
            *("--eval-data", str(inputs.eval_data), "--bucket", bucket, "--name", name),
            *("--prefix", PREFIX),
            *("--model", inputs.model, "--json", *map(str, options)),
        ],
        env={**environment(settings), **variables, _MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return RunningRelease(process, settings, mark, before)


def short(notebook: Path) -> tuple[object, ...]:
    """Options of the shortest complete release."""
    return ("--profile", "smoke", "--notebook", notebook, "-p", "opset", "14")
