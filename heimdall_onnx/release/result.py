"""What a release came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from heimdall_onnx.common.parameters import MODEL

if TYPE_CHECKING:
    from heimdall_onnx.archive.manifest import Manifest


@dataclass(frozen=True)
class ReleaseResult:
    """How a release ended; everything JSON-serialisable.

    Attributes:
        success: Whether the release is complete and offered under its alias.
        exit_code: 0 released, 2 bad input, 3 a gate or the notebook failed, 4 a service failed.
        verdict: ``pass`` or ``fail``; a smoke profile is named in it.
        version: Release version, ``vYYYYMMDD_HHMMSS``; of the failed report if it failed.
        s3_uri: The model.
        report_uri: The executed notebook.
        report_html_uri: Its rendering.
        manifest_uri: The manifest.
        model_name: Registered model.
        model_version: Its version in the registry.
        alias: The alias that points at it now.
        signer_sha256: SHA-256 of the signer's public key; None for an unsigned release.
        retained_until: Until when the store keeps it from being deleted; None if it does not.
        run_id: MLflow run.
        speedup: PyTorch's latency over ONNX Runtime's; None if it was not measured.
        recommended: The variant to use; None where none were asked for.
        gates: Every gate that was evaluated.
        costs: Seconds and largest memory by step, see `StepCost`.
        local_report: The report on this machine: rendered, or the notebook as far as it came.
        error: What went wrong; None on success.
    """

    success: bool
    exit_code: int
    verdict: str
    version: str | None = None
    s3_uri: str | None = None
    report_uri: str | None = None
    report_html_uri: str | None = None
    manifest_uri: str | None = None
    model_name: str | None = None
    model_version: str | None = None
    alias: str | None = None
    signer_sha256: str | None = None
    retained_until: str | None = None
    run_id: str | None = None
    speedup: float | None = None
    recommended: str | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    costs: list[dict[str, Any]] = field(default_factory=list)
    local_report: str | None = None
    error: str | None = None

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> ReleaseResult:
        """What a release that is there came to, as far as its manifest says."""
        from heimdall_onnx.archive.manifest import REPORT, REPORT_HTML
        from heimdall_onnx.services.store import MANIFEST

        signature, variants = manifest.said.signature, manifest.said.variants
        return cls(
            success=True,
            exit_code=0,
            verdict=manifest.said.verdict,
            version=manifest.version,
            s3_uri=f"{manifest.uri}/{MODEL}",
            report_uri=f"{manifest.uri}/{REPORT}",
            report_html_uri=f"{manifest.uri}/{REPORT_HTML}",
            manifest_uri=f"{manifest.uri}/{MANIFEST}",
            model_name=manifest.model_name,
            model_version=manifest.model_version,
            signer_sha256=signature.signer_sha256 if signature else None,
            run_id=manifest.said.mlflow.run_id,
            recommended=variants.recommended if variants else None,
            gates=[gate.to_dict() for gate in manifest.said.gates],
            costs=[cost.to_dict() for cost in manifest.said.costs],
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable copy; without ``error`` on success."""
        result = asdict(self)
        if self.error is None:
            del result["error"]
        return result
