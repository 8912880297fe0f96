"""Through which parts: frozen attention, linear MLPs, and what of the change survives with them."""

from lightning_goldy.analysis.linearized.base_relative import TangentModel
from lightning_goldy.analysis.linearized.explain import (
    ExplainedChange,
    SurvivingChange,
    Variant,
    build_variant,
    explain_change,
)
from lightning_goldy.analysis.linearized.frozen_attention import FrozenAttention
from lightning_goldy.analysis.linearized.linear_mlp import LinearizedMLP

__all__ = [
    "ExplainedChange",
    "FrozenAttention",
    "LinearizedMLP",
    "SurvivingChange",
    "TangentModel",
    "Variant",
    "build_variant",
    "explain_change",
]
