"""Every table of a release's report, each made from the dataclass of its step."""

from heimdall_onnx.report.tables.inputs import (
    checkpoint_table,
    evaluation_table,
    export_table,
    parameters_table,
    validation_table,
)
from heimdall_onnx.report.tables.latency import (
    latency_table,
    machine_table,
    member_table,
    pair_table,
)
from heimdall_onnx.report.tables.parity import (
    departure_table,
    parity_table,
    resolution_table,
    uncertainty_table,
    worst_table,
)
from heimdall_onnx.report.tables.publication import environment_table, registry_table, upload_table
from heimdall_onnx.report.tables.table import table
from heimdall_onnx.report.tables.variants import (
    calibration_table,
    roofline_table,
    tuning_table,
    variant_parity_table,
    variants_table,
)

__all__ = [
    "calibration_table",
    "checkpoint_table",
    "departure_table",
    "environment_table",
    "evaluation_table",
    "export_table",
    "latency_table",
    "machine_table",
    "member_table",
    "pair_table",
    "parameters_table",
    "parity_table",
    "registry_table",
    "resolution_table",
    "roofline_table",
    "table",
    "tuning_table",
    "uncertainty_table",
    "upload_table",
    "validation_table",
    "variant_parity_table",
    "variants_table",
    "worst_table",
]
