"""What every attention head looks at, and how far that has moved."""

from lightning_goldy.analysis.attention.patterns import AttentionMaps, attention_maps
from lightning_goldy.analysis.attention.rows import STATISTICS
from lightning_goldy.analysis.attention.statistics import AttentionStatistics, attention_statistics
from lightning_goldy.analysis.attention.tracking import Prompt, PromptAttention, TrackedAttention, track_attention

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
