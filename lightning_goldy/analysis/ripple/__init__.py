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
from lightning_goldy.analysis.ripple.finetune import FinetuneRipple, finetune_ripple
from lightning_goldy.analysis.ripple.result import KnowledgeEdit, RippleResult, distance_class
from lightning_goldy.analysis.ripple.ripple import ripple_effects

__all__ = [
    "EditRequest",
    "Editor",
    "FinetuneEditor",
    "FinetuneRipple",
    "GradientStepEditor",
    "KnowledgeEdit",
    "RankOneEditor",
    "RippleResult",
    "distance_class",
    "finetune_ripple",
    "rank_one_update",
    "register_editor",
    "ripple_effects",
]
