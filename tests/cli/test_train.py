"""The command that trains: options, exit codes, what it says, and the release at its end."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import mlflow
import pytest
import torch
from click.testing import CliRunner
from trained import HERE, write_data

from heimdall_onnx.cli.train import summary, train
from heimdall_onnx.common.errors import EvidenceError, ParameterError, RegistryError
from heimdall_onnx.services.registry import MLflowTracker
from heimdall_onnx.training.parameters import TrainingParameters, check_training
from heimdall_onnx.training.result import read_result
from heimdall_onnx.training.train import train as run

MODEL = ("--model", f"{HERE}:Framed", "--lr", "0.02", "--accelerator", "cpu")


def call(*arguments):
    return CliRunner().invoke(train, [str(a) for a in arguments])


def start(*arguments, **options):
    """The command in a process of its own, as a pipeline runs it."""
    words = [sys.executable, "-m", "heimdall_onnx", "train", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, **pipes, **options)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "set")


def test_help_imports_nothing_heavy():
    code = (
        "import sys; import heimdall_onnx.cli.train; "
        "print([m for m in ('torch', 'mlflow', 'zarr', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_documented_option_is_there():
    text = call("--help").output
    for option in (
        *("--epochs", "--batch-size", "--learning-rate", "--lr", "--validation-split"),
        *("--data-dir", "--num-workers", "--accelerator", "--devices", "--checkpoint-dir"),
        *("--checkpoint", "--resume-training", "--export-only", "--experiment-name"),
        *("--run-name-prefix", "--model", "--model-kwargs", "--seed", "--no-release"),
        *("--max-time", "--name", "--profile", "--alias", "--bucket", "--prefix", "--variants"),
    ):
        assert option in text
    assert set(TrainingParameters.model_fields) <= {p.name for p in train.params}


def test_every_problem_is_named_at_once_and_before_anything_heavy(tmp_path):
    with start("--epochs", "0", "--devices", "-1", "--accelerator", "x", "--json") as process:
        out, _ = process.communicate(timeout=60)
    message = json.loads(out.splitlines()[-1])
    assert message["success"] is False
    assert message["exit_code"] == 2
    for word in ("epochs", "devices", "accelerator"):
        assert word in message["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-p", "checkpoint", "x"), "the training sets it"),
        (("-p", "tolerence", "1"), "tolerance"),
        (("--profile", "quik"), "profile"),
    ],
)
def test_what_the_release_can_t_use_is_refused_before_training(data, tmp_path, arguments, words):
    result = call("--data-dir", data, "--checkpoint-dir", tmp_path / "out", *MODEL, *arguments)
    assert isinstance(result.exception, ParameterError)
    assert words in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_summary_says_how_to_go_on_and_to_release(data, tmp_path):
    folder = tmp_path / "it's a folder"
    given = {
        "data_dir": str(data),
        "checkpoint_dir": str(folder),
        "model": f"{HERE}:Framed",
        "accelerator": "cpu",
        "epochs": 2,
        "release": False,
    }

    def interrupt(share, what):
        if what == "training, epoch 2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        run(check_training(given), report=interrupt)
    options = shlex.split(caught.value.__notes__[0].partition(" and ")[2])
    assert options == ["--resume-training", "--checkpoint-dir", str(folder)]
    result = run(check_training(given | {"resume_training": True}))
    printed = summary(result)
    assert "--resume-training" in printed
    assert f"--checkpoint-dir {shlex.quote(str(folder))} --export-only" in printed
    assert "held-out samples" in printed
    assert "held-out samples" not in summary(read_result(folder, str(result.last)))


@pytest.fixture
def configured(embedded_settings, empty_database, tmp_path, reset_mlflow):
    """The environment as a user of these services would set it, with a home of the test's own."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "mlflow.db").write_bytes(empty_database.read_bytes())
    embedded_settings.model_copy(update={"home": home}).apply()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{home / 'mlflow.db'}"
    return home


def client():
    return mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def history_of(run_id, name):
    points = client().get_metric_history(run_id, name)
    return {point.step: point.value for point in points}, len(points)


@pytest.mark.services
@pytest.mark.thorough
def test_a_killed_command_goes_on_in_the_same_run(configured, data, tmp_path):
    folder = tmp_path / "out"
    options = ("--data-dir", data, "--checkpoint-dir", folder, *MODEL, "--no-release")
    options += ("--epochs", "400", "--patience", "1000", "--run-name-prefix", "night")
    with start(*options) as process:
        while not (folder / "last.ckpt").exists() or epochs(folder) < 4:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.kill()
    reached = epochs(folder)
    done = call(*options, "--resume-training", "--epochs", reached + 3, "--json")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout.splitlines()[-1])
    assert content["success"]
    run = client().get_run(content["run_id"])
    assert run.info.run_name == "night out"
    assert run.info.status == "FINISHED"
    assert len(client().search_runs([run.info.experiment_id])) == 1
    losses, points = history_of(content["run_id"], "val_loss")
    assert losses == {int(e["epoch"]): e["val_loss"] for e in content["history"]}
    assert points == len(content["history"]) == reached + 3  # none twice
    assert run.data.params["dataset_digest"] == content["dataset_digest"]
    assert run.data.params["learning_rate"] == "0.02"
    assert run.data.tags["epochs"] == str(reached + 3)
    tagged = {n[7:]: v for n, v in run.data.tags.items() if n.startswith("sha256.")}
    assert tagged == content["sha256"]
    kept = {a.path for a in client().list_artifacts(run.info.run_id, "checkpoints")}
    names = {path.name for path in folder.glob("*.ckpt")}
    assert kept == {f"checkpoints/{name}" for name in names}
    assert {a.path for a in client().list_artifacts(run.info.run_id, "training")} == {
        *("training/eval.npz", "training/training.json", "training/environment.json")
    }
    # Going on once more changes what is recorded of the files.
    more = call(*options, "--resume-training", "--epochs", reached + 5, "--json")
    changed = json.loads(more.stdout.splitlines()[-1])["sha256"]
    tags = client().get_run(content["run_id"]).data.tags
    assert changed["last.ckpt"] != tagged["last.ckpt"]
    assert {n[7:]: v for n, v in tags.items() if n.startswith("sha256.")} == changed


def epochs(folder):
    return len(torch.load(folder / "last.ckpt", weights_only=True)["training"]["history"])


@pytest.mark.services
def test_an_interrupted_command_says_how_to_go_on(configured, data, tmp_path):
    folder = tmp_path / "out"
    options = ("--data-dir", data, "--checkpoint-dir", folder, *MODEL, "--no-release")
    with start(*options, "--epochs", "4000", "--patience", "4000") as process:
        while not (folder / "last.ckpt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=200)
    assert (process.returncode, out) == (130, "")
    assert "--resume-training" in err
    assert str(folder) in err
    assert "go on with" in err
    assert "Traceback" not in err, err
    assert epochs(folder) >= 1
    (run,) = client().search_runs([e.experiment_id for e in client().search_experiments()])
    assert run.info.status == "KILLED"


@pytest.mark.services
def test_a_diverged_training_is_not_released(configured, data, tmp_path):
    options = ("--data-dir", data, "--checkpoint-dir", tmp_path / "out", *MODEL)
    options += ("--model", f"{HERE}:Fragile", "--epochs", 8, "--name", "diverged", "--json")
    done = call(*options)
    assert isinstance(done.exception, EvidenceError)
    content = json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert (content["success"], content["exit_code"]) == (False, 3)
    assert (content["stopped"], content["release"]) == ("diverged", None)
    assert ", diverged; best" in done.stderr
    assert "--export-only" in done.stderr
    assert client().get_run(content["run_id"]).info.status == "FAILED"


@pytest.mark.services
def test_no_run_is_left_open_and_no_error_hidden(configured, data, tmp_path, monkeypatch):
    options = ("--data-dir", data, *MODEL, "--epochs", 1, "--no-release", "--checkpoint-dir")

    def fail(self, *_, **__):
        raise RegistryError("it is down")

    with monkeypatch.context() as patch:
        patch.setattr(MLflowTracker, "set_tags", fail)
        assert str(call(*options, tmp_path / "tags").exception) == "it is down"
    (run,) = client().search_runs([e.experiment_id for e in client().search_experiments()])
    assert run.info.status == "FAILED"
    monkeypatch.setattr(MLflowTracker, "close_run", fail)
    refused = call(*options, tmp_path / "model", "--model", f"{HERE}:Unsure")
    assert isinstance(refused.exception, ParameterError)
    assert call(*options, tmp_path / "out").exit_code == 0


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.thorough
def test_it_releases_what_it_has_trained_and_can_do_it_again(configured, data, tmp_path):
    folder = tmp_path / "out"
    options = ("--checkpoint-dir", folder, *MODEL, "--name", "trained", "--profile", "smoke")
    # A tolerance that no export meets: the release fails, the training is kept.
    failed = call(*options, "--data-dir", data, "--epochs", 6, "-p", "tolerance", "1e-30", "--json")
    assert failed.exit_code == 3, failed.output
    content = json.loads(failed.stdout.splitlines()[-1])
    assert content["release"]["verdict"].startswith("fail")
    assert "--export-only" in failed.stderr
    result = read_result(folder)
    assert result.best.is_file()
    with pytest.raises(mlflow.exceptions.MlflowException):
        client().get_registered_model("trained")
    again = call(*options, "--export-only", "--checkpoint", result.best)
    assert again.exit_code == 0, again.output
    assert "held-out samples" in again.stdout
    assert "registered" in again.stdout
    version = client().get_model_version_by_alias("trained", "staging")
    assert version.run_id == result.run_id  # the training's run is the release's
    exported = mlflow.onnx.load_model("models:/trained@staging")
    assert {o.name for o in exported.graph.output} == {"positions", "sigma"}
