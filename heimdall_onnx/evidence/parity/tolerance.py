"""How far the outputs of both models may lie apart."""

from __future__ import annotations

EVALUATION = "evaluation data"
RTOL = 1.3e-6  # torch.testing's default for float32

ADVERSARIAL_FACTOR = 10.0
NOISE_FLOOR_FACTOR = 2.0


def tolerance_factor(kind: str, valid: bool) -> float:
    """What the tolerance of the elements is multiplied by on a kind of input."""
    return 1.0 if valid or kind == EVALUATION else ADVERSARIAL_FACTOR
