from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest
from models import SmallNet

from heimdall_onnx.evidence.latency.contenders import Contestant
from heimdall_onnx.evidence.latency.statistics import paired_speedup
from heimdall_onnx.evidence.variants import tuning
from heimdall_onnx.evidence.variants.tuning import tune_session
from heimdall_onnx.model.examples import generic_inputs
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import SessionSettings


@pytest.fixture
def contestant(tmp_path):
    path = tmp_path / "model.onnx"
    export_model(SmallNet(), path, signature=SmallNet.signature, opset=14)
    return Contestant("small", path, SessionSettings(threads=2))


def tune(contestant):
    signature = SmallNet.signature
    return tune_session(
        contestant,
        generic_inputs(signature, 1),
        signature,
        batch_size=1,
        calls=12,
        seed=0,
    )


def test_every_option_is_tried_and_only_proven_gains_stay(contestant):
    settings, trials = tune(contestant)
    assert [trial.option for trial in trials] == [
        "threads = 1",
        "spinning = False",
        "level = extended",
        "arena = False",
        "prepacking = False",
    ]
    for trial in trials:
        assert trial.kept == (trial.speedup.low > 1)
        assert trial.speedup.pairs >= 6
    kept = {trial.option for trial in trials if trial.kept}
    assert (settings.threads == 1) == ("threads = 1" in kept)
    assert settings.spinning == ("spinning = False" not in kept)


def test_changes_that_help_add_up(contestant, monkeypatch):
    # Two options help and three harm, whatever this machine thinks of them.
    helps = {1: True, 2: False, 3: True, 4: False, 5: False}
    turns = iter(helps)

    def compare(*_):
        gain = 1.5 if helps[next(turns)] else 0.7
        return paired_speedup([np.full(3, gain)] * 6, [np.ones(3)] * 6)

    monkeypatch.setattr(tuning, "paired_speedup", compare)
    monkeypatch.setattr(Contestant, "worker", lambda *_: MagicMock())  # nothing is timed
    found, trials = tune(contestant)
    assert found == SessionSettings(threads=1, level="extended")
    assert [trial.kept for trial in trials] == list(helps.values())


def test_openvino_is_tuned_by_its_threads(contestant, monkeypatch):
    no_gain = paired_speedup([np.ones(3)] * 6, [np.ones(3)] * 6)
    monkeypatch.setattr(tuning, "paired_speedup", lambda *_: no_gain)
    monkeypatch.setattr(Contestant, "worker", lambda *_: MagicMock())  # nothing is timed
    settings = SessionSettings(runtime="openvino", provider="CPU", threads=4)
    _, trials = tune(replace(contestant, settings=settings))
    assert [trial.option for trial in trials] == ["threads = 2", "threads = 1"]


@pytest.mark.thorough
def test_openvino_is_timed_with_fewer_threads(contestant):
    settings = SessionSettings(runtime="openvino", provider="CPU", threads=2)
    found, (trial,) = tune(replace(contestant, settings=settings))
    assert trial.option == "threads = 1"
    assert trial.speedup.pairs >= 6
    assert trial.kept == (trial.speedup.low > 1)
    assert found.threads == (1 if trial.kept else 2)
