"""What a run has found, for who reads no further: three sentences, and the facts behind them.

From the record that the notebook keeps, of which a run that failed may have kept nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from heimdall_onnx.common.environment import DISTRIBUTION
from heimdall_onnx.common.text import after, count_of, distance, number
from heimdall_onnx.evidence.latency.statistics import unsteady

if TYPE_CHECKING:
    from heimdall_onnx.archive.signing import Signer
    from heimdall_onnx.common.parameters import ReleaseParameters


def three_sentences(record: Mapping[str, Any], alias: str | None) -> tuple[str, ...]:
    """Is it faithful, is it faster, what is it made of; none where the record says nothing.

    Args:
        record: What `record_results` kept.
        alias: The alias that the release is offered under; None for one that is offered to nobody.
    """
    if not record:
        return ()
    return (_fidelity(record), _speed(record), _origin(record, alias))


def _fidelity(record: Mapping[str, Any]) -> str:
    parity, gates = record["parity"], record["gates"]
    failed = [gate["name"] for gate in gates if not gate["passed"]]
    outputs = parity["cells"][0]["outputs"]
    worst = max(outputs, key=lambda output: _finite(output["excess"]))
    answer = (
        f"The ONNX model answers as the PyTorch model does: all {len(gates)} gates hold"
        if not failed
        else f"{len(failed)} of {count_of(len(gates), 'gate')} fail: {', '.join(failed)}"
    )
    told = [
        f"on {count_of(parity['samples'], 'sample')} of {record['evaluation_data']['source']}, "
        f"{worst['output']} differ by {number(_finite(worst['maximum']))}{after(worst['unit'])} at "
        f"most, and nowhere by more than {number(_finite(worst['excess']))} of what is allowed"
    ]
    if parity["ground"] is not None:
        moved = _finite(parity["ground"]["displacement_p99_m"])
        told.append(f"99% of the positions move by at most {distance(moved)}")
    return f"{answer}; {'; '.join(told)}."


def _speed(record: Mapping[str, Any]) -> str:
    latency = record["latency"]
    if latency is None:
        return f"How fast it is was not measured: {record['latency_not_measured']}."
    ratio, (pytorch, onnx) = latency["speedup"], latency["contenders"]
    low, high = ratio["low"], ratio["high"]
    sure = (
        f"{low:.2f} to {high:.2f} with {latency['confidence']:.0%} confidence, from "
        f"{ratio['pairs']} pairs of blocks"
    )
    if low > 1:
        answer = f"It is {ratio['ratio']:.2f} times as fast as PyTorch ({sure})"
    elif high < 1:
        answer = f"It is slower than PyTorch, {ratio['ratio']:.2f} times as fast ({sure})"
    else:
        answer = f"Neither model is known to be faster: the ratio is {ratio['ratio']:.2f} ({sure})"
    moved = unsteady(latency["contenders"])
    return (
        f"{answer}: a call at batch {latency['batch_size']} on "
        f"{count_of(latency['threads'], 'thread')} takes {number(onnx['median_ms'], 3)} ms, "
        f"PyTorch's {number(pytorch['median_ms'], 3)} ms (medians)"
        + (f"; {moved}." if moved else ".")
    )


def _origin(record: Mapping[str, Any], alias: str | None) -> str:
    checkpoint = record["checkpoint"]
    made = (
        f"It is made of {checkpoint['file']} (SHA-256 {checkpoint['sha256'][:12]}…) by "
        f"{_code_of(record)}"
    )
    return f"{made}; {'; '.join(_decision(alias))}."


def release_facts(
    record: Mapping[str, Any],
    parameters: ReleaseParameters,
    alias: str | None,
    signer: Signer | None,
) -> dict[str, str]:
    """Label and value of what a reviewer may look for.

    Args:
        record: What `record_results` kept; empty if the notebook never got that far.
        parameters: Of the run.
        alias: The alias that the release is offered under; None for one that is offered to nobody.
        signer: Who signs it.
    """
    smoke = " (a test run, not evidence)" if parameters.profile == "smoke" else ""
    facts = {"model": parameters.name, "profile": parameters.profile + smoke}
    if not record:
        return facts | {
            "checkpoint": parameters.checkpoint,
            "evaluation data": parameters.eval_data or "synthetic inputs",
            "MLflow run": parameters.run_id,
        }
    checkpoint, data = record["checkpoint"], record["evaluation_data"]
    facts |= {
        "checkpoint": f"{checkpoint['file']}, SHA-256 {checkpoint['sha256']}",
        "evaluation data": f"{data['source']}, {count_of(data['samples'], 'sample')}: "
        f"{data['provenance']}; SHA-256 {data['sha256'] or 'none, seeded random numbers'}",
        "code": f"{_code_of(record)}; model class {record['model']['class']}",
        "speedup": record["speedup_text"],
        **_recommendation(record.get("variants")),
        "measured on": f"{record['environment']['cpu']}, {record['environment']['system']}",
        "MLflow run": parameters.run_id,
    }
    if alias is None:
        return facts | {"first departing module": record["departure"] or "not determined"}
    return facts | {
        "address": record["uploaded"]["s3_uri"],
        "SHA-256 of the model": record["uploaded"]["sha256"],
        "registered as version": record["registered"]["model_version"],
        "signed": f"by the key with SHA-256 {signer.sha256}" if signer else "no",
        "approved when released": f"by nobody; its gates alone decide on {alias}",
    }


def _recommendation(variants: Mapping[str, Any] | None) -> dict[str, str]:
    """The recommended variant; nothing where none were asked for."""
    if variants is None:
        return {}
    against = variants["against_pytorch"]["speedup"]
    passed = sum(variant["status"] == "passed" for variant in variants["judged"])
    return {
        "recommended variant": f"{variants['recommended']}, {against['ratio']:.2f}× PyTorch "
        f"({against['low']:.2f} to {against['high']:.2f}); {passed} of {len(variants['judged'])} "
        "variants passed"
    }


def _code_of(record: Mapping[str, Any]) -> str:
    """Version and commit of the code that ran, and whether that was all of it."""
    environment = record["environment"]
    found = f"{DISTRIBUTION} {environment['packages'][DISTRIBUTION]}"
    if environment["git_commit"] is not None:
        found += f", commit {environment['git_commit'][:12]}"
    return found + (" with uncommitted changes" if environment["git_dirty"] else "")


def _decision(alias: str | None) -> Iterator[str]:
    if alias is None:
        yield "it is offered to nobody"
        return
    yield f"its gates, and no person, have offered it as {alias}"
    yield "who approves it later is written in reviews/ of the release"


def _finite(value: float | str) -> float:
    """A recorded number; those that JSON has no form for are text there."""
    return float(value)
