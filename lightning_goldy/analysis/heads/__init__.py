"""Which heads the model needs: importance, pruning, regrowing, compaction."""

from lightning_goldy.analysis.heads.compaction import Compaction, compact, compaction_of, register_compaction
from lightning_goldy.analysis.heads.freeze import HeadFreeze
from lightning_goldy.analysis.heads.importance import HeadScores, head_importance, heads_to_regrow, register_head_score
from lightning_goldy.analysis.heads.surgery import prune_heads, regrow_heads

__all__ = [
    "Compaction",
    "HeadFreeze",
    "HeadScores",
    "compact",
    "compaction_of",
    "head_importance",
    "heads_to_regrow",
    "prune_heads",
    "register_compaction",
    "register_head_score",
    "regrow_heads",
]
