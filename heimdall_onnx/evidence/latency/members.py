"""What an ensemble costs beside a single one of its members: time, memory and size."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from torch import nn

from heimdall_onnx.common.logs import get_logger
from heimdall_onnx.data.evaluation import EvaluationData
from heimdall_onnx.evidence.latency.benchmark import measure_pair
from heimdall_onnx.evidence.latency.contenders import Contestant, default_threads
from heimdall_onnx.evidence.latency.figures import MemberFigures
from heimdall_onnx.model.ensemble import Ensemble
from heimdall_onnx.model.onnx.export import export_model
from heimdall_onnx.model.runtimes import SessionSettings
from heimdall_onnx.model.signature import Signature, signature_of

log = get_logger(__name__)

ENSEMBLE, MEMBER = "Ensemble", "Single member"


def compare_member(
    model: nn.Module,
    onnx_path: Path,
    data: EvaluationData,
    signature: Signature,
    *,
    opset: int,
    calls: int,
    threads: int | None = None,
    seed: int = 0,
    batch_size: int = 1,
    do_constant_folding: bool = True,
) -> MemberFigures | None:
    """Measure an exported ensemble against the first of its members, exported in the same way.

    Args:
        model: The ensemble; anything else has no members to compare.
        onnx_path: Its ONNX file.
        data: Where the inputs of a call come from.
        signature: The ensemble's.
        opset: Of both files.
        calls: Counted calls of each, at least.
        threads: Intra-op threads of each; see `default_threads` for None.
        seed: Of the order in which they take turns.
        batch_size: Samples in a call.
        do_constant_folding: As the ensemble was exported.

    Returns:
        None for a model that is no `Ensemble`.

    Raises:
        ExportError: If the member can't be exported.
        BenchmarkError: If a worker process dies, fails or does not answer in time.
    """
    if not isinstance(model, Ensemble):
        return None
    member = model.members[0]
    # Both are asked for what both have; each computes all that it has.
    names = {spec.name for spec in signature_of(member).outputs}
    common = replace(signature, outputs=tuple(o for o in signature.outputs if o.name in names))
    settings = SessionSettings(threads=threads or default_threads())
    with tempfile.TemporaryDirectory(prefix="heimdall-member-") as folder:
        exported = export_model(
            member,
            Path(folder) / "member.onnx",
            opset=opset,
            do_constant_folding=do_constant_folding,
        )
        latency = measure_pair(
            Contestant(ENSEMBLE, onnx_path, settings),
            Contestant(MEMBER, exported.path, settings),
            data.rows(range(batch_size)),
            common,
            calls=calls,
            seed=seed,
        )
    # External data lies beside the file, under its name and more.
    beside = (p for p in onnx_path.parent.iterdir() if p.name.startswith(f"{onnx_path.name}."))
    size = sum(path.stat().st_size for path in (onnx_path, *beside))
    log.info("compared with a member", ratio=round(latency.speedup.ratio, 3))
    return MemberFigures(
        members=len(model.members),
        latency=latency,
        size_bytes=size,
        member_size_bytes=exported.size_bytes,
    )
