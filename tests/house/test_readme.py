"""Every code block of the READMEs and every example of the command line, as a reader types it.

What takes minutes or what is not there is made small by the substitutions below and by nothing
else.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import pytest
from captures import simulate_events, write_positions, write_recordings
from click.testing import CliRunner
from documents import READMES, ROOT, blocks
from dotenv import dotenv_values

from heimdall_onnx.cli.help import Command
from heimdall_onnx.cli.main import main
from heimdall_onnx.model.signature_file import read_signature_file
from heimdall_onnx.release.fleet.plan import read_plan
from heimdall_onnx.services.client import make_client
from heimdall_onnx.services.embedded import ensure_store
from heimdall_onnx.services.settings import Settings
from heimdall_onnx.services.store import Bucket

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = [pytest.mark.services, pytest.mark.slow]

BUCKET = "heimdall-models"
# Those for continuous integration are run by `test_recipes.py`.
BLOCKS = [one for one in blocks() if one.heading != "In continuous integration"]


def block(heading: str, start: str) -> str:
    """The block below that heading that begins so."""
    (found,) = [b.text for b in BLOCKS if b.heading == heading and b.text.startswith(start)]
    return found


def test_every_block_is_run_by_a_test():
    calls = (n for n in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(n, ast.Call))
    run = [
        tuple(ast.literal_eval(a) for a in call.args)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "block"
    ]
    for one in BLOCKS:
        takers = [r for r in run if one.heading == r[0] and one.text.startswith(r[1])]
        assert len(takers) == 1, f"{one.file}, {one.heading}: {one.text.splitlines()[0]}"
    assert len(run) == len(BLOCKS)


@dataclass
class Workshop:
    """A folder of somebody who follows the README, with services of its own."""

    folder: Path
    environment: dict[str, str]

    def shell(self, script: str) -> str:
        """Run a block as it stands, in bash, to the first line that fails; what it prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr[-4000:]}"
        return done.stdout

    def python(self, source: str, before: str = "") -> str:
        """Run a block as a script in that folder."""
        (self.folder / "script.py").write_text(f"{before}\n{source}")
        return self.shell("python script.py")

    @property
    def client(self) -> S3Client:
        return make_client(ensure_store(Settings(_env_file=None, HEIMDALL_HOME=self.home)))

    @property
    def home(self) -> Path:
        return self.folder / ".heimdall"

    @functools.cached_property
    def manifest(self) -> dict[str, Any]:
        """That of the first release."""
        bucket = Bucket(self.client, BUCKET)
        first = min(key for key in bucket.list_keys("") if key.endswith("/manifest.json"))
        return bucket.read_json(first)


def own_release() -> str:
    return block("Your own model", "heimdall-onnx release")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Iterator[Workshop]:
    """The README up to the first release of the reader's own model."""
    folder = tmp_path_factory.mktemp("workshop")
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    (folder / ".env").touch()  # one in a folder above is not theirs
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_"))}
    environment = inherited | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": "",
    }
    made = Workshop(folder, environment)
    model = block("Your own model", "# detector.py")
    (folder / model.splitlines()[0].removeprefix("# ")).write_text(model)
    made.python(block("Your own model", "import numpy"))
    try:
        made.shell(own_release())
        yield made
    finally:
        made.shell("heimdall-onnx services down")


@pytest.fixture(scope="module")
def reviewed(workshop) -> Workshop:
    """The same after a review."""
    printed = workshop.shell(block("Promoting", "heimdall-onnx verify"))
    assert "parity looked at" in printed
    return workshop


def test_the_two_commands_are_targets_of_make():
    for line in block("Two commands", "make release").splitlines():
        program, *targets = line.partition("#")[0].split()
        assert program == "make"
        subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, check=True, capture_output=True)


def test_release_is_what_the_readme_draws(reviewed):
    tree = block("What did just happen?", "s3://")
    folder = reviewed.manifest["objects"][0]["key"]
    folder = folder[: folder.index("/v") + 17]
    there = {
        key.removeprefix(f"{folder}/") for key in Bucket(reviewed.client, BUCKET).list_keys(folder)
    }
    lines = [line for line in tree.splitlines() if line.startswith("  ")]
    drawn = {word for line in lines for word in line[:34].split()} - {"…", "MLmodel"}
    only_if_asked = {"variants/NAME/model.onnx", "model.sig"}
    assert only_if_asked < drawn
    for name in drawn - only_if_asked:
        assert any(key.startswith(name.rstrip("…")) for key in there), name
    for top in ("objects/", "aliases/"):
        assert top in tree
        assert Bucket(reviewed.client, BUCKET).list_keys(top)


@pytest.mark.thorough
def test_environment_of_make_lists_the_releases_and_serves_mlflow(workshop):
    # The demo is released by `make release` alone; here it is a model of one's own.
    script = block("What did just happen?", ". .venv").replace(
        "onnx list", "onnx list --name detector"
    )
    printed = workshop.shell(script)
    assert re.search(r"^v\d{8}_\d{6}  pass", printed, re.M)
    assert re.search(r"^mlflow +running +http://127\.0\.0\.1", printed, re.M)


def test_addresses_of_services_are_read_from_the_file(tmp_path):
    file = tmp_path / ".env"
    file.write_text(block("Your own services", "MLFLOW"))
    settings = Settings(_env_file=file)
    assert settings.mlflow_tracking_uri.get_secret_value() == "https://mlflow.example.org"
    assert settings.s3_endpoint_url == "https://s3.example.org"
    assert [part.get_secret_value() for part in settings.credentials[:2]] == [
        "your-key-id",
        "your-secret-key",
    ]
    assert {*dotenv_values(file)} < {
        str(f.validation_alias) for f in Settings.model_fields.values()
    }


@pytest.mark.thorough
def test_two_releases_are_compared(reviewed):
    reviewed.shell(own_release().replace("--profile quick", "--profile smoke -p opset 14"))
    script = block("Comparing", "heimdall-onnx compare").rstrip()
    printed = reviewed.shell(f"{script} --calls 60")
    assert re.search(r"^.* no gate changes", printed)
    assert "stored" in printed


def test_gallery_is_served(reviewed):
    script = block("The gallery", "heimdall-onnx gallery")
    with subprocess.Popen(
        ["bash", "-c", f"exec {script}"],
        cwd=reviewed.folder,
        env=reviewed.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as served:
        try:
            address = next(line for line in served.stdout if "http://127.0.0.1" in line)
            with urllib.request.urlopen(re.search(r"http://\S+", address)[0]) as page:
                assert b"detector" in page.read()
        finally:
            served.terminate()
            served.communicate(timeout=30)
    assert served.returncode == 0


def test_every_line_of_the_overview_is_a_command_with_its_options():
    for line in block("The command line", "heimdall-onnx").splitlines():
        words = line.partition("  #")[0].split()
        assert words.pop(0) == "heimdall-onnx"
        for group in _alternatives(words):
            command: click.Command = main
            rest = list(group)
            while isinstance(command, click.Group):
                command = command.commands[rest.pop(0)]
            known = {o for p in command.params for o in [*p.opts, *p.secondary_opts]}
            options = {word.strip("[]") for word in rest if word.strip("[").startswith("-")}
            assert options <= known, line


def _alternatives(words: list[str]) -> list[list[str]]:
    """``services up|down`` is two commands."""
    for place, word in enumerate(words):
        if "|" in word:
            return [[*words[:place], one, *words[place + 1 :]] for one in word.split("|")]
    return [words]


def test_signature_file_is_read(tmp_path):
    (tmp_path / "net.signature.yaml").write_text(block("Signatures", "inputs:"))
    signature = read_signature_file(tmp_path / "net.signature.yaml").signature
    assert [spec.name for spec in signature.inputs] == ["receiver_features", "signal_mask"]


@pytest.mark.thorough
def test_dataset_is_made_trained_on_uploaded_and_evaluated(workshop):
    quick = " --profile smoke -p opset 14"
    events = simulate_events(2, windows=1, seed=0)
    recordings = write_recordings(events, workshop.folder)
    write_positions(workshop.folder / "positions.csv", events, recordings)
    script = block("Datasets", "heimdall-onnx data simulate")
    assert "--events 2000" in script
    workshop.shell(script.replace("2000", "24"))
    script = block("Training", "heimdall-onnx train").rstrip()
    workshop.shell(f"{script} --epochs 1 --alias trained{quick}")
    (best,) = workshop.home.glob("training/*/best*.ckpt")
    shutil.copy(best, workshop.folder / "best.ckpt")
    script = block("Evaluation data", "heimdall-onnx data upload").rstrip()
    workshop.shell(f"{script.replace('eval_workers 4', 'eval_workers 2')} --alias trained{quick}")


@pytest.mark.thorough
def test_model_is_served_by_mlflow(reviewed):
    script = block("Serving a release", ". .venv")
    settings = ensure_store(Settings(_env_file=None, HEIMDALL_HOME=reviewed.home))
    registry = f"sqlite:///{reviewed.home / 'mlflow.db'}"
    credentials = [part.get_secret_value() for part in settings.credentials[:2]]
    for value in (registry, settings.s3_endpoint_url, *credentials):
        script = script.replace("=…", f"={value}", 1)
    wait = "until curl -s localhost:5001/ping; do kill -0 $server; sleep 1; done"
    script = script.replace("--port 5001", f"--port 5001 &\nserver=$!\n{wait}", 1)
    image = np.load(reviewed.folder / "eval.npz")["image"][:1]
    script = script.replace("[[[[…]]]]", json.dumps(image.tolist()))
    # The server is a child of the command.
    printed = reviewed.shell(f"trap 'pkill -P $server; kill $server' EXIT\n{script}")
    assert list(json.loads(printed.splitlines()[-1])["predictions"]) == ["output"]


def test_plan_of_a_fleet_is_read(workshop, tmp_path):
    for name in ("runs/a/best.ckpt", "runs/old/best.ckpt", "large.ckpt", "eval.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(workshop.folder / "detector.pt", tmp_path / name)
    text = block("Fleets", "parameters:")
    # Nobody has stored checkpoints there.
    text = text.replace(', "s3://checkpoints/2026-07/*.ckpt"', "")
    (tmp_path / "plan.yml").write_text(text)
    plan = read_plan(tmp_path / "plan.yml")
    assert len(plan.items) == 4


def test_recipe_for_slurm_is_python():
    # Its cluster is not there; the text says that it is a recipe.
    ast.parse(block("Fleets", "from dask_jobqueue"))


# The examples of the command line


def commands(group: click.Group = main, name: str = "heimdall-onnx") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, f"{name} {word}")
        else:
            found[f"{name} {word}"] = command
    return found


@pytest.mark.parametrize("name", sorted(commands()))
def test_help_ends_with_an_example_of_that_command(name):
    command = commands()[name]
    assert isinstance(command, Command)
    assert command.example.startswith(f"{name} ") or command.example == name
    shown = CliRunner().invoke(main, [*name.split()[1:], "--help"]).stdout
    assert shown.rstrip().endswith(command.example.splitlines()[-1].strip())


# Of what the others do something like it is run above, or by the tests of that command.
AS_IT_STANDS = ("doctor", "history", "link", "list", "policy", "services status", "show", "verify")


def test_release_is_opened_served_and_looked_at(reviewed):
    # In one process, which starts as slowly as each of them would.
    said = "print([i.name for i in session.get_inputs()])"
    variant, model = block("Variants", "import"), block("Opening", "import")
    images = 'import numpy as np\nimages = np.load("eval.npz")["image"][:3]'
    served = block("Serving a release", "from")
    examples = [commands()[f"heimdall-onnx {name}"].example for name in AS_IT_STANDS]
    assert not [example for example in examples if re.search(r"[\n$|*~]", example)]
    examples_are_run = (
        "import shlex\nfrom heimdall_onnx.cli.main import main\n"
        f"for example in {examples}:\n"
        "    assert not main(shlex.split(example)[1:], standalone_mode=False), example\n"
    )
    parts = (variant, said, model, said, images, served, examples_are_run)
    assert reviewed.python("\n".join(parts)).startswith("['image']\n['image']\n1 [[")


def test_gates_of_a_release_are_all_explained(reviewed):
    gates = reviewed.manifest["gates"]
    (text,) = [page for f in READMES if "| gate | holds when" in (page := f.read_text())]
    explained = re.findall(r"^\| ([^|]+?) \|", text[text.index("| gate | holds when") :], re.M)
    for gate in gates:
        assert any(gate["name"].startswith(name) for name in explained), gate["name"]


@pytest.mark.thorough
def test_training_script_exports_and_registers(workshop):
    # The last one: `doctor` reports what has no manifest.
    before = """
import heimdall_onnx, torch
from heimdall_onnx import Settings, ensure_store, initialize_mlflow
from detector import Detector
model = Detector()
run_id = initialize_mlflow(Settings.load()).start_run()
"""
    printed = workshop.python(
        block("From a script", "from heimdall_onnx import") + "\nprint(result)", before
    )
    assert "'success': True" in printed
