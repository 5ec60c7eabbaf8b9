"""The recipes for continuous integration, each taken from its README and run as it is."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from xml.etree import ElementTree

import huey
import numpy as np
import papermill
import pytest
import torch
import yaml
from click.testing import CliRunner
from jinja2 import Environment, StrictUndefined

from heimdall_onnx.archive.manifest import read_manifest
from heimdall_onnx.cli.main import main
from heimdall_onnx.common.parameters import check_parameters
from heimdall_onnx.localization.network import LocalizationNet
from heimdall_onnx.report.notebook import kernel_environment, notebook_path
from heimdall_onnx.services.store import Bucket, locate

ROOT = Path(__file__).parents[2]
COMMAND_LINE = (ROOT / "heimdall_onnx" / "cli" / "README.md").read_text()
SECTION = re.search(r"^## In continuous integration$(.*)", COMMAND_LINE, re.M | re.S)[1]
BLOCKS = dict(re.findall(r"^```([a-z]+\n(?:# \S+\n)?)(.*?)^```$", SECTION, re.M | re.S))
GITHUB = BLOCKS["yaml\n# .github/workflows/release.yml\n"]
GITLAB = BLOCKS["yaml\n# .gitlab-ci.yml\n"]
CRON, AIRFLOW = BLOCKS["crontab\n"], BLOCKS["python\n"]
# What makes a minute of each recipe's release of hours.
PROFILE, QUICK = "--profile audit", "--profile smoke -p opset 14 -p measure_latency false"
SMALL = f"{QUICK} --model models:SmallNet"
UNREACHABLE = "-p tolerance 1e-30"


@dataclass(frozen=True)
class Runner:
    """Where a recipe runs: a folder, and the services' addresses in its environment."""

    folder: Path
    environment: dict[str, str] = field(repr=False)
    bucket: str

    def __call__(self, script: str, profile: str = SMALL, shell: str = "bash -e") -> int:
        """Run a recipe's line with a shorter profile, into a bucket of its own."""
        assert script.count(PROFILE) == 1
        given = script.replace(PROFILE, f"{profile} --bucket {self.bucket}")
        file = self.folder / "script.sh"
        file.write_text(given)
        done = subprocess.run(
            [*shell.split(), str(file)],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            timeout=280,
            check=False,
        )
        return done.returncode

    def here(self, script: str, patch: pytest.MonkeyPatch) -> int:
        """Run a line that is the command alone in this process, which has imported all it needs."""
        patch.chdir(self.folder)
        for name, value in self.environment.items():
            patch.setenv(name, value)
        assert script.count(PROFILE) == 1
        given = script.replace(PROFILE, f"{SMALL} --bucket {self.bucket}")
        program, *arguments = shlex.split(os.path.expandvars(given))
        assert program == "heimdall-onnx"
        return CliRunner().invoke(main, arguments).exit_code

    def gates(self) -> ElementTree.Element:
        return ElementTree.parse(self.folder / "gates.xml").getroot()

    def summary(self) -> str:
        return (self.folder / "summary.md").read_text()


@pytest.fixture
def runner(tmp_path, make_settings, small, bucket) -> Runner:
    shutil.copy(small.checkpoint, tmp_path / "best.ckpt")
    shutil.copy(small.eval_data, tmp_path / "eval.npz")
    environment = kernel_environment(make_settings("recipe"))
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "CHECKPOINT": "best.ckpt",
        "EVAL_DATA": "eval.npz",
        "RUNNER_TEMP": str(tmp_path),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step-summary.md"),
    }
    return Runner(tmp_path, environment, bucket.name)


def fits_schema(recipe: str, schema: str, folder: Path, *options: str) -> None:
    """Hold a file against the schema that its service publishes, as check-jsonschema brings it."""
    file = folder / "recipe.yml"
    file.write_text(recipe)
    program = Path(sys.executable).parent / "check-jsonschema"
    command = [program, "--builtin-schema", f"vendor.{schema}", *options, file]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def github_steps() -> list[dict]:
    (job,) = yaml.safe_load(GITHUB)["jobs"].values()
    return job["steps"]


def gitlab_job() -> dict:
    (job,) = yaml.safe_load(GITLAB).values()
    return job


def test_the_recipes_are_short_and_all_there():
    assert len(BLOCKS) == 4
    assert all(len(recipe.splitlines()) <= 24 for recipe in BLOCKS.values())


def test_github_workflow_fits_its_schema(tmp_path):
    fits_schema(GITHUB, "github-workflows", tmp_path)
    with pytest.raises(AssertionError, match="runs-on"):
        fits_schema(GITHUB.replace("runs-on", "runs-at"), "github-workflows", tmp_path)
    # What a person types is a variable, never a part of the script.
    assert "${{" not in "".join(step.get("run", "") for step in github_steps())


def test_gitlab_job_fits_its_schema(tmp_path):
    options = ("--data-transform", "gitlab-ci")
    fits_schema(GITLAB, "gitlab-ci", tmp_path, *options)
    with pytest.raises(AssertionError, match="exit_code"):
        fits_schema(GITLAB.replace("exit_codes", "exit_code"), "gitlab-ci", tmp_path, *options)


@pytest.mark.services
@pytest.mark.slow
def test_github_shows_the_gates_of_a_release_that_failed(runner, s3, make_settings):
    release, show, keep = github_steps()
    assert runner(release["run"], f"{SMALL} {UNREACHABLE}") == 3
    assert show["if"] == keep["if"] == "always()"
    subprocess.run(["bash", "-e", "-c", show["run"]], env=runner.environment, check=True)
    shown = (runner.folder / "step-summary.md").read_text()
    assert shown == runner.summary()
    assert "FAIL (SMOKE)" in shown
    assert "| mean absolute error | **FAIL** |" in shown
    assert int(runner.gates().get("failures")) >= 1
    kept = keep["with"]["path"].replace("${{ runner.temp }}", str(runner.folder))
    assert Path(kept).samefile(runner.folder / "gates.xml")
    assert not [
        key for key in Bucket(s3, runner.bucket).list_keys("") if key.endswith("manifest.json")
    ]


@pytest.mark.services
@pytest.mark.thorough
def test_gitlab_releases_and_reports_its_gates(runner, s3, monkeypatch, reset_mlflow):
    job = gitlab_job()
    (line,) = job["script"]
    assert runner.here(line, monkeypatch) == 0
    (manifest,) = [
        k for k in Bucket(s3, runner.bucket).list_keys("") if k.endswith("manifest.json")
    ]
    folder = f"s3://{runner.bucket}/{manifest.removesuffix('/manifest.json')}"
    assert read_manifest(*locate(s3, folder)).said.verdict == "pass (smoke)"
    suite = runner.gates()
    assert (suite.get("failures"), suite.get("errors")) == ("0", "0")
    assert f"{manifest.split('/')[-2]} |" in runner.summary()
    # The exit codes that the README's table has: what is tried again, and what is only a warning.
    assert job["artifacts"]["reports"]["junit"] == "gates.xml"
    table = dict(re.findall(r"^\| (\d+) \| (.*?) \|$", (ROOT / "README.md").read_text(), re.M))
    assert "service could not be reached" in table[str(job["retry"]["exit_codes"])]
    assert table[str(job["allow_failure"]["exit_codes"])].startswith("a gate failed")


def crontab_line() -> tuple[list[str], str]:
    """When, and what, of the one line that is neither a setting nor a comment."""
    lines = [line for line in CRON.splitlines() if not re.match(r"#|\w+ *=", line)]
    (line,) = lines
    *when, command = line.split(None, 5)
    # cron makes line breaks of bare percent signs.
    assert "%" not in command
    return when, command


def test_crontab_has_a_time_that_comes():
    minute, hour, day, month, day_of_week = crontab_line()[0]
    due = huey.crontab(minute, hour, day, month, day_of_week, strict=True)
    monday = datetime(2026, 11, 30)
    times = [monday + timedelta(minutes=m) for m in range(7 * 24 * 60)]
    assert [time for time in times if due(time)] == [datetime(2026, 11, 30, 2, 30)]


def run_crontab(runner: Runner, profile: str) -> subprocess.CompletedProcess:
    """As cron does: sh, next to nothing in the environment, and a ``.env`` beside the models."""
    models = runner.folder / "models"
    (models / ".venv").mkdir(parents=True)
    (models / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    secrets = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "HEIMDALL_HOME", *secrets)
    (models / ".env").write_text("".join(f"{n}={runner.environment[n]}\n" for n in names))
    (models / ".env").chmod(stat.S_IRUSR)
    for path in (runner.folder / "best.ckpt", runner.folder / "eval.npz"):
        if path.exists():
            path.rename(models / path.name)
    command = crontab_line()[1]
    assert command.count(PROFILE) == 1
    bare = ["env", "-i", "PATH=/usr/bin:/bin", f"HOME={runner.folder}", "SHELL=/bin/sh"]
    given = command.replace(PROFILE, f"{profile} --bucket {runner.bucket}")
    try:
        return subprocess.run(
            [*bare, "/bin/sh", "-c", given],
            cwd=runner.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    finally:
        # Whatever the tests leave is searched for credentials.
        (models / ".env").unlink()


@pytest.mark.services
def test_cron_mails_the_summary_of_what_was_not_released(runner):
    (runner.folder / "best.ckpt").unlink()
    done = run_crontab(runner, QUICK)
    assert done.returncode == 2
    assert done.stdout == (runner.folder / "models" / "summary.md").read_text()
    assert "NOT JUDGED, exit code 2" in done.stdout
    assert "expected a checkpoint at" in done.stdout
    assert done.stderr == ""
    (error,) = ElementTree.parse(runner.folder / "models" / "gates.xml").findall(".//error")
    assert "expected a checkpoint at" in error.text


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize(("options", "code"), [("", 0), (UNREACHABLE, 3)])
def test_cron_releases_with_nothing_in_its_environment(runner, s3, options, code):
    save_localization_net(runner.folder)
    done = run_crontab(runner, f"{QUICK} {options}")
    assert (done.returncode, done.stderr) == (code, "")
    summary = (runner.folder / "models" / "summary.md").read_text()
    assert done.stdout == ("" if code == 0 else summary)
    manifests = [k for k in Bucket(s3, runner.bucket).list_keys("") if k.endswith("manifest.json")]
    assert len(manifests) == (code == 0)


def save_localization_net(folder: Path) -> None:
    """A model that comes with the package, which cron finds without a path of its own."""
    options = {"backbone_size": "atto"}
    weights = LocalizationNet(**options).state_dict()
    torch.save({"state_dict": weights, "hyper_parameters": options}, folder / "best.ckpt")
    rng = np.random.default_rng(0)
    spectrograms = rng.standard_normal((8, 3, 128, 32)).astype(np.float32)
    np.savez(folder / "eval.npz", mel_spectrogram=spectrograms)


def operators() -> dict[str, dict]:
    """What the DAG gives its operators; Airflow itself fills the templates in, by Jinja."""
    tree = ast.parse(AIRFLOW)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {getattr(call.func, "id", ""): call for call in calls}
    (given,) = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    scope = {"__builtins__": {}, "given": given}
    return {
        name: {
            k.arg: eval(compile(ast.Expression(k.value), "README.md", "eval"), scope)
            for k in names[name].keywords
        }
        for name in ("PapermillOperator", "BashOperator")
    }


def filled(value: object, **params: str) -> object:
    if isinstance(value, dict):
        return {name: filled(each, **params) for name, each in value.items()}
    template = Environment(undefined=StrictUndefined).from_string(str(value))
    return template.render(params=params, run_id="manual")


def test_airflow_checks_with_parameters_that_the_notebook_has():
    check = operators()["PapermillOperator"]
    parameters = check_parameters(filled(check["parameters"], checkpoint="a", eval_data="b"))
    assert (parameters.checkpoint, parameters.eval_data, parameters.publish) == ("a", "b", False)
    assert Path(check["input_nb"]).relative_to("/opt/heimdall_onnx") == notebook_path().relative_to(
        ROOT
    )
    assert filled(check["output_nb"]) == "/tmp/check-manual.ipynb"


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.thorough
def test_airflow_checks_by_papermill_and_releases_by_the_command(runner, s3, monkeypatch):
    """What both operators do, without Airflow: its one is in an environment of its own."""
    paths = {name: str(runner.folder / name) for name in ("best.ckpt", "eval.npz")}
    params = {"checkpoint": paths["best.ckpt"], "eval_data": paths["eval.npz"]}
    found = operators()
    check, release = found["PapermillOperator"], found["BashOperator"]
    assert check["kernel_name"] in SECTION.split("```python")[0]
    monkeypatch.chdir(runner.folder)
    with monkeypatch.context() as patch:
        for name, value in runner.environment.items():
            patch.setenv(name, value)
        papermill.execute_notebook(
            str(notebook_path()),
            str(runner.folder / "check.ipynb"),
            parameters={
                **filled(check["parameters"], **params),
                "model": "models:SmallNet",
                "opset": 14,
                "bucket": runner.bucket,
            },
            kernel_name="python3",
            language=check["language_name"],
            progress_bar=False,
        )
    assert Bucket(s3, runner.bucket).list_keys("") == ()
    program = "/opt/heimdall_onnx/.venv/bin/"
    runner.environment.update(filled(release["env"], **params))
    assert runner(release["bash_command"].replace(program, "")) == 0
    assert any(key.endswith("manifest.json") for key in Bucket(s3, runner.bucket).list_keys(""))
