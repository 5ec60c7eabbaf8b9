"""The three sentences at the head of a report say no more than what was measured."""

from typing import Any

import pytest

from heimdall_onnx.report.summary import release_facts, three_sentences

STEADY = {"name": "ONNX", "median_ms": 2.0, "stationarity": {"holds": True}}


def record(**changes: Any) -> dict[str, Any]:
    outputs = [
        {"output": "y", "unit": None, "maximum": 0.5, "excess": 0.9},
        {"output": "z", "unit": "m", "maximum": 100.0, "excess": 0.3},
    ]
    return {
        "gates": [{"name": "opset", "passed": True}, {"name": "elements", "passed": True}],
        "parity": {"samples": 8, "cells": [{"outputs": outputs}], "ground": None},
        "evaluation_data": {"source": "eval.npz"},
        "latency": latency(1.9, 2.1),
        "checkpoint": {"file": "net.pt", "sha256": "ab" * 32},
        "environment": {
            "packages": {"heimdall-onnx": "0.1.0"},
            "git_commit": "c" * 40,
            "git_dirty": True,
        },
        **changes,
    }


def latency(low: float, high: float) -> dict[str, Any]:
    return {
        "speedup": {"ratio": (low + high) / 2, "low": low, "high": high, "pairs": 12},
        "contenders": [{**STEADY, "name": "PyTorch", "median_ms": 4.0}, STEADY],
        "confidence": 0.95,
        "batch_size": 1,
        "threads": 2,
    }


def test_faithful_model_is_told_by_the_output_nearest_to_its_limit():
    said = three_sentences(record(), "staging")[0]
    assert said.startswith("The ONNX model answers as the PyTorch model does: all 2 gates hold;")
    assert "y differ by 0.5 at most, and nowhere by more than 0.9 of what is allowed" in said


def test_failed_gate_is_named_and_no_faithfulness_is_claimed():
    gates = [{"name": "exclusive cores", "passed": False}, {"name": "opset", "passed": True}]
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
    said = three_sentences(record(latency=latency(low, high)), "staging")[1]
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

    assert three_sentences({}, None) == ()
    facts = release_facts({}, ReleaseParameters(checkpoint="a.pt", profile="smoke"), None, None)
    assert facts["checkpoint"] == "a.pt"
    assert facts["profile"] == "smoke (a test run, not evidence)"
