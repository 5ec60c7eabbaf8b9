"""Microsoft Olive: its search over forms of an ONNX model, by latency and accuracy."""

from __future__ import annotations

import os

os.environ |= {"OLIVE_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}

import json
import shutil
from pathlib import Path
from typing import Any

from entry import Entry, seven_bits, unsigned_activations
from olive.workflows import run as run_workflow
from olive_history import described, history
from task import LIMIT

USER_SCRIPT = str(Path(__file__).with_name("olive_user.py"))


def forms() -> list[dict[str, Any]]:
    """What is searched: the graph optimized, and the kinds of quantization that Olive offers.

    Parameters are those that Olive's documentation leads to for the processor. Left to themselves
    its searches take twice the time of each of them (per_channel, reduce_range and preprocessing
    on and off) and leave out the pair of types that is fastest on x86, unsigned by signed.
    """
    eight_bits = {
        "precision": "int8",
        "per_channel": True,
        "reduce_range": seven_bits(),
        "quant_preprocess": True,
    }
    static = {
        **eight_bits,
        "type": "OnnxStaticQuantization",
        "data_config": "calibration",
        "quant_format": "QDQ",
        "activation_type": "uint8" if unsigned_activations() else "int8",
        "op_types_to_quantize": ["Conv", "MatMul", "Gemm"],
        # True quantizes every operator there is and forgets reduce_range.
        "prepare_qdq_config": False,
    }
    weights = {
        "type": "OnnxBlockWiseRtnQuantization",
        "block_size": 32,
        "axis": 0,
        "is_symmetric": True,
        "accuracy_level": 4,
    }
    return [
        {"type": "OnnxPeepholeOptimizer"},
        {
            **eight_bits,
            "type": "OnnxDynamicQuantization",
            "op_types_to_quantize": ["MatMul", "Gemm"],
        },
        *({**static, "calibrate_method": m} for m in ("MinMax", "Entropy", "Percentile")),
        *({**weights, "bits": bits} for bits in (8, 4)),
    ]


def workflow(entry: Entry) -> dict[str, Any]:
    """The workflow, written as Olive's documentation writes them."""
    latency = {
        "name": "latency",
        "type": "latency",
        "data_config": "calibration",
        "sub_types": [
            {"name": "p50", "priority": 1, "metric_config": {"repeat_test_num": entry.calls}}
        ],
    }
    accuracy = {
        "name": "growth",
        "type": "accuracy",
        "sub_types": [
            {
                "name": "accuracy_score",
                "priority": 2,
                "higher_is_better": False,
                # Of fp32's own 1. Olive 0.13.0 drops goals of the type "threshold" if there is no
                # other (`Engine.resolve_goals`).
                "goal": {"type": "max-degradation", "value": LIMIT - 1},
            }
        ],
    }
    return {
        "input_model": {"type": "ONNXModel", "model_path": str(entry.model)},
        "systems": {
            "here": {
                "type": "LocalSystem",
                "accelerators": [
                    {"device": "cpu", "execution_providers": ["CPUExecutionProvider"]}
                ],
            }
        },
        "data_configs": [
            {
                "name": "calibration",
                "type": "DataContainer",
                "user_script": USER_SCRIPT,
                "load_dataset_config": {"type": "captures", "path": str(entry.calibration)},
                "dataloader_config": {"batch_size": 1},
            }
        ],
        "evaluators": {
            "task": {
                "type": "localization",
                "user_script": USER_SCRIPT,
                "type_args": {
                    "evaluation": str(entry.evaluation),
                    "reference": str(entry.model),
                    "threads": entry.threads,
                },
                "metrics": [latency, accuracy],
            }
        },
        "passes": {
            "form": forms(),
            "tuning": {
                "type": "OrtSessionParamsTuning",
                "data_config": "calibration",
                "cpu_cores": entry.threads,
                "providers_list": "CPUExecutionProvider",
                "execution_mode_list": 0,
                "opt_level_list": 99,
                "intra_thread_num_list": entry.threads,
                "inter_thread_num_list": 1,
            },
        },
        "search_strategy": {"execution_order": "joint", "sampler": "sequential"},
        "evaluator": "task",
        "host": "here",
        "target": "here",
        "cache_dir": str(entry.out / "cache"),
        "output_dir": str(entry.out / "best"),
    }


def main() -> None:
    entry = Entry(__doc__)
    with entry.phase("search"):
        found = run_workflow(workflow(entry))
    for line in history(json.loads((entry.out / "best" / "footprint.json").read_text())):
        entry.note(line)
    shutil.rmtree(entry.out / "cache")
    if not found.has_output_model():
        entry.note("no candidate holds the limits")
        return
    best = found.get_best_candidate()
    for file in (entry.out / "best").glob("model.onnx*"):
        file.rename(entry.out / file.name)
    chosen = found.trace_back_run_history(best.model_id)
    what = described(next(config for config in list(chosen.values())[1:] if config))
    entry.made(
        entry.out / "model.onnx",
        f"search over {len(forms())} forms with OrtSessionParamsTuning, {entry.calls} calls each; "
        f"fastest within 1%: {what}; from the ONNX file",
    )


if __name__ == "__main__":
    main()
