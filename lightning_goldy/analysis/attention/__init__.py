"""What every attention head looks at, and how far that has moved."""

from lightning_goldy.analysis.attention.maps import AttentionMaps, attention_maps
from lightning_goldy.analysis.attention.statistics import AttentionStatistics, attention_statistics

__all__ = ["AttentionMaps", "AttentionStatistics", "attention_maps", "attention_statistics"]
