"""Tables of what was published: objects, registered version, environment."""

from __future__ import annotations

from IPython.display import Markdown

from heimdall_onnx.archive.record import RegisteredRelease, Skipped, UploadedRelease
from heimdall_onnx.common.environment import Environment
from heimdall_onnx.report.tables.table import table


def upload_table(uploaded: UploadedRelease | Skipped) -> Markdown | Skipped:
    """What lies in the release folder."""
    if isinstance(uploaded, Skipped):
        return uploaded
    return table(
        ("object", "bytes", "SHA-256, read back"),
        [(o.uri, f"{o.size_bytes:,}", o.sha256) for o in uploaded.objects],
    )


def registry_table(registered: RegisteredRelease | Skipped) -> Markdown | Skipped:
    """The version in the registry."""
    if isinstance(registered, Skipped):
        return registered
    return table(
        ("registered model", registered.model_name),
        [("version", registered.model_version), ("source", registered.source)],
    )


def environment_table(environment: Environment) -> Markdown:
    """Versions, processor and code of this run."""
    return table(
        ("environment", "value"),
        [
            ("Python", environment.python),
            ("system", environment.system),
            ("processor", f"{environment.cpu}, {environment.processors} in use"),
            ("instruction sets", ", ".join(environment.instruction_sets) or "unknown"),
            ("commit", environment.git_commit or "not a git checkout"),
            (
                "uncommitted changes",
                {True: "yes", False: "no", None: "unknown"}[environment.git_dirty],
            ),
            *environment.packages.items(),
        ],
    )
