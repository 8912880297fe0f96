"""What every attention head looks at, and how far that has moved."""

from lightning_goldy.analysis.attention.patterns import STATISTICS, AttentionMaps, attention_maps
from lightning_goldy.analysis.attention.statistics import (
    AttentionStatistics,
    Prompt,
    PromptAttention,
    TrackedAttention,
    attention_statistics,
    track_attention,
)

__all__ = [
    "STATISTICS",
    "AttentionMaps",
    "AttentionStatistics",
    "Prompt",
    "PromptAttention",
    "TrackedAttention",
    "attention_maps",
    "attention_statistics",
    "track_attention",
]
