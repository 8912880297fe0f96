"""Through which parts: frozen attention, linear MLPs, and what of the change survives with them."""

from lightning_goldy.analysis.linearized.explain import (
    ExplainedChange,
    SurvivingChange,
    explain_change,
)
from lightning_goldy.analysis.linearized.variants import (
    FrozenAttention,
    LinearizedMLP,
    TangentModel,
    Variant,
    build_variant,
)

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
