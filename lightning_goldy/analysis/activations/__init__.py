"""Activation differences: what a finetune left in the residual stream, read as tokens, and steering by it."""

from lightning_goldy.analysis.activations.differences import (
    ActivationDifferencesResult,
    Spelled,
    activation_differences,
)
from lightning_goldy.analysis.activations.steering import SteeredTexts, steer_texts, steered

__all__ = [
    "ActivationDifferencesResult",
    "Spelled",
    "SteeredTexts",
    "activation_differences",
    "steer_texts",
    "steered",
]
