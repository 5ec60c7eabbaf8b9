"""What a run has found, for who reads no further: three sentences, and the facts behind them.

From the record that the notebook keeps; a run that failed may have kept none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from heimdall_onnx.common.text import after, count_of, distance, number

if TYPE_CHECKING:
    from heimdall_onnx.archive.record import Record
    from heimdall_onnx.archive.signing import Signer
    from heimdall_onnx.common.parameters import ReleaseParameters


def three_sentences(record: Record | None, alias: str | None) -> tuple[str, ...]:
    """Is it faithful, is it faster, what is it made of; none where nothing was recorded.

    Args:
        record: What `record_results` kept.
        alias: The alias that the release is offered under; None for one that is offered to nobody.
    """
    if record is None:
        return ()
    return (_fidelity(record), _speed(record), _origin(record, alias))


def _fidelity(record: Record) -> str:
    parity, gates, failed = record.parity, record.gates, record.verdict.failed_gates
    worst = max(parity.evaluation, key=lambda output: output.excess)
    answer = (
        f"The ONNX model answers as the PyTorch model does: all {len(gates)} gates hold"
        if not failed
        else f"{len(failed)} of {count_of(len(gates), 'gate')} fail: "
        f"{', '.join(gate.name for gate in failed)}"
    )
    told = [
        f"on {count_of(parity.samples, 'sample')} of {record.evaluation_data.source}, "
        f"the values of {worst.output} differ by {number(worst.maximum)}{after(worst.unit)} at "
        f"most, and nowhere by more than {number(worst.excess)} of what is allowed"
    ]
    told += [judged.headline for judged in parity.quality]
    if parity.ground is not None:
        moved = distance(parity.ground.displacement_p99_m)
        told.append(f"99% of the positions move by at most {moved}")
    return f"{answer}; {'; '.join(told)}."


def _speed(record: Record) -> str:
    latency = record.latency
    if latency is None:
        return f"How fast it is was not measured: {record.latency_not_measured}."
    ratio, (pytorch, onnx) = latency.speedup, latency.contenders
    sure = (
        f"{ratio.low:.2f} to {ratio.high:.2f} with {latency.confidence:.0%} confidence, from "
        f"{ratio.pairs} pairs of blocks"
    )
    if ratio.low > 1:
        answer = f"It is {ratio.ratio:.2f} times as fast as PyTorch ({sure})"
    elif ratio.high < 1:
        answer = f"It is slower than PyTorch, {ratio.ratio:.2f} times as fast ({sure})"
    else:
        answer = f"Neither model is known to be faster: the ratio is {ratio.ratio:.2f} ({sure})"
    return (
        f"{answer}: a call at batch {latency.batch_size} on "
        f"{count_of(latency.threads, 'thread')} takes {number(onnx.median_ms, 3)} ms, "
        f"PyTorch's {number(pytorch.median_ms, 3)} ms (medians)"
        + (f"; {moved}." if (moved := latency.unsteady) else ".")
    )


def _origin(record: Record, alias: str | None) -> str:
    checkpoint = record.checkpoint
    made = f"It is made of {checkpoint.file} (SHA-256 {checkpoint.sha256[:12]}…) by {record.code}"
    if alias is None:
        return f"{made}; it is offered to nobody."
    return (
        f"{made}; its gates, and no person, have offered it as {alias}; who approves it later is "
        "written in reviews/ of the release."
    )


def release_facts(
    record: Record | None,
    parameters: ReleaseParameters,
    alias: str | None,
    signer: Signer | None,
) -> dict[str, str]:
    """Label and value of what a reviewer may look for.

    Args:
        record: What `record_results` kept; None if the notebook never got that far.
        parameters: Of the run.
        alias: The alias that the release is offered under; None for one that is offered to nobody.
        signer: Who signs it.
    """
    smoke = " (a test run, not evidence)" if parameters.profile == "smoke" else ""
    facts = {"model": parameters.name, "profile": parameters.profile + smoke}
    if record is None:
        return facts | {
            "checkpoint": parameters.checkpoint,
            "evaluation data": parameters.eval_data or "synthetic inputs",
            "MLflow run": parameters.run_id,
        }
    checkpoint, data = record.checkpoint, record.evaluation_data
    facts |= {
        "checkpoint": f"{checkpoint.file}, SHA-256 {checkpoint.sha256}",
        "evaluation data": f"{data.source}, {count_of(data.samples, 'sample')}: "
        f"{data.provenance}; SHA-256 {data.sha256 or 'none, seeded random numbers'}",
        "code": f"{record.code}; model class {record.model.spec}",
        "speedup": record.speedup_text,
        **_recommendation(record),
        "measured on": f"{record.environment.cpu}, {record.environment.system}",
        "MLflow run": parameters.run_id,
    }
    uploaded, registered = record.uploaded, record.registered
    if alias is None or uploaded is None or registered is None:
        return facts | {"first departing module": record.departure or "not determined"}
    return facts | {
        "address": uploaded.s3_uri,
        "SHA-256 of the model": uploaded.sha256,
        "registered as version": registered.model_version,
        "signed": f"by the key with SHA-256 {signer.sha256}" if signer else "no",
        "approved when released": f"by nobody; its gates alone decide on {alias}",
    }


def _recommendation(record: Record) -> dict[str, str]:
    """The recommended variant; nothing where none were asked for."""
    variants = record.variants
    if variants is None:
        return {}
    against = variants.against_pytorch.speedup
    passed = sum(variant.passed for variant in variants.judged)
    return {
        "recommended variant": f"{variants.recommended}, {against.ratio:.2f}× PyTorch "
        f"({against.low:.2f} to {against.high:.2f}); {passed} of {len(variants.judged)} "
        "variants passed"
    }
