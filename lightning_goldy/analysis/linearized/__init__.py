"""Through which parts: frozen attention, linear MLPs, and what of the change survives with them."""

from lightning_goldy.analysis.linearized.explain import ExplainedChange, SurvivingChange, explain_change
from lightning_goldy.analysis.linearized.frozen_attention import FrozenAttention
from lightning_goldy.analysis.linearized.linear_mlp import LinearizedMLP
from lightning_goldy.analysis.linearized.linearize import TangentModel, build_variant

__all__ = [
    "ExplainedChange",
    "FrozenAttention",
    "LinearizedMLP",
    "SurvivingChange",
    "TangentModel",
    "build_variant",
    "explain_change",
]
