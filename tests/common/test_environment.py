"""What is recorded of the machine and the code."""

import json
import platform
from dataclasses import asdict
from importlib import metadata

from heimdall_onnx.common import environment


def test_versions_are_those_of_this_process():
    found = environment.capture_environment()
    assert found.python == platform.python_version()
    assert found.packages["torch"] == metadata.version("torch")
    assert found.processors >= 1
    assert found.cpu
    json.dumps(asdict(found))


def test_code_outside_a_checkout_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    found = environment.capture_environment()
    assert found.git_commit is None
    assert found.git_dirty is None


def test_git_that_never_answers_leaves_the_commit_unknown(monkeypatch, tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(environment, "GIT_TIMEOUT_S", 0.2)
    found = environment.capture_environment()
    assert (found.git_commit, found.git_dirty) == (None, None)


def test_every_distribution_is_named_as_an_index_names_it():
    found = environment.installed_distributions()
    assert len(found) == len({d.name for d in metadata.distributions()})
    assert found["heimdall-onnx"] == metadata.version("heimdall_onnx")
    assert found["typing-extensions"] == metadata.version("typing_extensions")
    assert list(found) == sorted(found)
