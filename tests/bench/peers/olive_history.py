"""What Olive records of a search, in words."""

from __future__ import annotations

from typing import Any


def history(footprint: dict[str, Any]) -> list[str]:
    """A line for each candidate: what it is, and what Olive measured."""
    lines = []
    for node in footprint.values():
        parent = footprint.get(node["parent_model_id"])
        if parent is None or node["from_pass"] != "ortsessionparamstuning":
            continue
        what = described({"type": parent["from_pass"], **(parent["pass_run_config"] or {})})
        value = node["metrics"] and node["metrics"]["value"]
        lines.append(
            f"{what}: {value['latency-p50']['value']:.1f} ms, growth "
            f"{value['growth-accuracy_score']['value']:.4f}"
            if value
            else f"{what}: failed"
        )
    return lines


def described(config: dict[str, Any]) -> str:
    """A form in a few words, from the configuration that Olive records of it."""
    mode = config.get("quant_mode")
    if mode == "static":
        return f"static int8, {config['calibrate_method']}"
    if mode == "dynamic":
        return "dynamic int8"
    if "bits" in config:
        return f"weights in {config['bits']} bits"
    return "fp32, OnnxPeepholeOptimizer"
