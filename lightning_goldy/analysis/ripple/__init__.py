"""What an edit does to other facts: predicted, made, measured, undone."""

from lightning_goldy.analysis.ripple.editors import (
    Editor,
    EditRequest,
    FinetuneEditor,
    GradientStepEditor,
    RankOneEditor,
    rank_one_update,
    register_editor,
)
from lightning_goldy.analysis.ripple.measure import (
    UNTOUCHED,
    Encoding,
    FinetuneRipple,
    PieceScores,
    check_pieces,
    finetune_ripple,
    score_pieces,
)
from lightning_goldy.analysis.ripple.ripple import (
    EDITED,
    KnowledgeEdit,
    Predictor,
    RippleResult,
    distance_class,
    ripple_effects,
)

__all__ = [
    "EDITED",
    "UNTOUCHED",
    "EditRequest",
    "Editor",
    "Encoding",
    "FinetuneEditor",
    "FinetuneRipple",
    "GradientStepEditor",
    "KnowledgeEdit",
    "PieceScores",
    "Predictor",
    "RankOneEditor",
    "RippleResult",
    "check_pieces",
    "distance_class",
    "finetune_ripple",
    "rank_one_update",
    "register_editor",
    "ripple_effects",
    "score_pieces",
]
