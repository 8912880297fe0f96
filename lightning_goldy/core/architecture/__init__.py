"""What a transformer is made of: blocks, heads, families, and gates that close heads under any kernel."""

from lightning_goldy.core.architecture.blocks import (
    Architecture,
    Block,
    HeadProjection,
    ParameterSlice,
    UnsupportedArchitectureError,
    require_next_tokens,
)
from lightning_goldy.core.architecture.describe import describe_architecture
from lightning_goldy.core.architecture.families import (
    FamilySpec,
    FusedProjection,
    HeadCounts,
    available_architectures,
    register_architecture,
)
from lightning_goldy.core.architecture.gates import Head, HeadError, HeadGates

__all__ = [
    "Architecture",
    "Block",
    "FamilySpec",
    "FusedProjection",
    "Head",
    "HeadCounts",
    "HeadError",
    "HeadGates",
    "HeadProjection",
    "ParameterSlice",
    "UnsupportedArchitectureError",
    "available_architectures",
    "describe_architecture",
    "register_architecture",
    "require_next_tokens",
]
