"""The three sentences at the head of a report say no more than what was measured."""

from typing import Any

import pytest
import records

from heimdall_onnx.archive.record import Record
from heimdall_onnx.report.summary import release_facts, three_sentences

OUTPUTS = [
    records.output("y", maximum=0.5, excess=0.9),
    records.output("z", unit="m", maximum=100.0, excess=0.3),
]
GATES = [{**records.GATE, "name": name} for name in ("opset", "elements")]


def record(**changes: Any) -> Record:
    cell = {"kind": "evaluation data", "batch_size": 8, "samples": 8, "outputs": OUTPUTS}
    given = {
        "gates": GATES,
        "parity": {"samples": 8, "cells": [cell]},
        "checkpoint": {"file": "net.pt", "sha256": "ab" * 32},
        "environment": {"git_dirty": True},
    }
    return records.record(**{**given, **changes})


def test_faithful_model_is_told_by_the_output_nearest_to_its_limit():
    said = three_sentences(record(), "staging")[0]
    assert said.startswith("The ONNX model answers as the PyTorch model does: all 2 gates hold;")
    assert (
        "the values of y differ by 0.5 at most, and nowhere by more than 0.9 of what is allowed"
        in said
    )


def test_failed_gate_is_named_and_no_faithfulness_is_claimed():
    gates = [{**records.GATE, "name": "exclusive cores", "passed": False}, records.GATE]
    said = three_sentences(record(gates=gates), None)[0]
    assert said.startswith("1 of 2 gates fail: exclusive cores;")
    assert "answers as" not in said


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.9, 2.1, "It is 2.00 times as fast as PyTorch (1.90 to 2.10 with 95% confidence"),
        (0.4, 0.6, "It is slower than PyTorch, 0.50 times as fast"),
        (0.9, 1.2, "Neither model is known to be faster: the ratio is 1.05"),
    ],
)
def test_speed_is_claimed_only_where_the_whole_interval_says_so(low, high, words):
    speedup = records.speedup((low + high) / 2, low, high)
    said = three_sentences(record(latency={"speedup": speedup}), "staging")[1]
    assert said.startswith(words)


def test_latency_that_was_not_measured_is_said_with_its_reason():
    given = record(latency=None, latency_not_measured="it was left out")
    assert three_sentences(given, "staging")[1] == (
        "How fast it is was not measured: it was left out."
    )


def test_origin_names_checkpoint_commit_and_who_offered_it():
    offered, failed = (three_sentences(record(), alias)[2] for alias in ("staging", None))
    assert "net.pt (SHA-256 abababababab…)" in offered
    assert "commit cccccccccccc with uncommitted changes" in offered
    assert "its gates, and no person, have offered it as staging" in offered
    assert failed.endswith("it is offered to nobody.")


def test_run_that_recorded_nothing_has_no_sentences_but_its_parameters():
    from heimdall_onnx.common.parameters import ReleaseParameters

    assert three_sentences(None, None) == ()
    facts = release_facts(None, ReleaseParameters(checkpoint="a.pt", profile="smoke"), None, None)
    assert facts["checkpoint"] == "a.pt"
    assert facts["profile"] == "smoke (a test run, not evidence)"
