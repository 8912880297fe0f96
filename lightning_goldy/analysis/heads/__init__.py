"""Which heads the model needs: importance, pruning, regrowing, compaction, and whole runs of them."""

from lightning_goldy.analysis.heads.compaction import (
    Compaction,
    compact,
    compaction_of,
    gated_state,
    gates_card,
    register_compaction,
)
from lightning_goldy.analysis.heads.importance import (
    HEAD_SCORES,
    HeadScores,
    head_importance,
    heads_to_regrow,
    register_head_score,
)
from lightning_goldy.analysis.heads.optimizer import HeadFreeze
from lightning_goldy.analysis.heads.plasticity import (
    PlasticityResult,
    PlasticityRun,
    PlasticitySubject,
    first_samples,
    load_gates,
)
from lightning_goldy.analysis.heads.schedule import (
    PlasticityPlan,
    PlasticitySettings,
    PruningSchedule,
    Recovery,
    Regrowth,
    Scoring,
)
from lightning_goldy.analysis.heads.surgery import prune_heads, regrow_heads

__all__ = [
    "HEAD_SCORES",
    "Compaction",
    "HeadFreeze",
    "HeadScores",
    "PlasticityPlan",
    "PlasticityResult",
    "PlasticityRun",
    "PlasticitySettings",
    "PlasticitySubject",
    "PruningSchedule",
    "Recovery",
    "Regrowth",
    "Scoring",
    "compact",
    "compaction_of",
    "first_samples",
    "gated_state",
    "gates_card",
    "head_importance",
    "heads_to_regrow",
    "load_gates",
    "prune_heads",
    "register_compaction",
    "register_head_score",
    "regrow_heads",
]
