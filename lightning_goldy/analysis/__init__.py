"""Pure functions: (model, batches, objective, ...) to frozen results; no Trainer, no logger."""

from lightning_goldy.analysis.activation_similarity import activation_similarity
from lightning_goldy.analysis.agreement import Agreement
from lightning_goldy.analysis.attention import AttentionMaps, AttentionStatistics, attention_maps, attention_statistics
from lightning_goldy.analysis.basin import basin_volume
from lightning_goldy.analysis.compact import compact, compaction_of, register_compaction
from lightning_goldy.analysis.compact_files import Compaction
from lightning_goldy.analysis.continuations import Continuations, continue_prompts
from lightning_goldy.analysis.coupling import CouplingResult, knowledge_coupling
from lightning_goldy.analysis.coupling_capture import CouplingError
from lightning_goldy.analysis.coupling_drift import CouplingDrift, coupling_drift
from lightning_goldy.analysis.coupling_statistics import CouplingStatistics, coupling_statistics
from lightning_goldy.analysis.distribution import ParameterDistributionResult, parameter_distribution
from lightning_goldy.analysis.editors import (
    Editor,
    EditRequest,
    FinetuneEditor,
    GradientStepEditor,
    register_editor,
)
from lightning_goldy.analysis.explain import ExplainedChange, SurvivingChange, explain_change
from lightning_goldy.analysis.finetune_ripple import FinetuneRipple, finetune_ripple
from lightning_goldy.analysis.fisher import KroneckerFisher, kronecker_fisher
from lightning_goldy.analysis.fluctuation import Fluctuation, register_strategy
from lightning_goldy.analysis.generations import GenerationComparison, compare_generations
from lightning_goldy.analysis.golden import GoldenResult, golden_parameters, jaccard
from lightning_goldy.analysis.head_freeze import HeadFreeze
from lightning_goldy.analysis.head_scores import register_head_score
from lightning_goldy.analysis.head_surgery import prune_heads, regrow_heads
from lightning_goldy.analysis.heads import HeadScores, head_importance, heads_to_regrow
from lightning_goldy.analysis.kronecker import KroneckerPreconditioner, kronecker_preconditioner
from lightning_goldy.analysis.linearize import FrozenAttention, LinearizedMLP, TangentModel, build_variant
from lightning_goldy.analysis.moments import adam_curvature, adam_curvature_from_state
from lightning_goldy.analysis.preconditioner import (
    DiagonalPreconditioner,
    TunedPreconditioner,
    adam_preconditioner,
    diagonal_preconditioner,
    tuned_preconditioner,
)
from lightning_goldy.analysis.rank_one import RankOneEditor, rank_one_update
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.analysis.reverse_golden import ReverseGoldenResult, reverse_golden_parameters
from lightning_goldy.analysis.ripple import ripple_effects
from lightning_goldy.analysis.ripple_edits import KnowledgeEdit, distance_class
from lightning_goldy.analysis.ripple_result import RippleResult
from lightning_goldy.analysis.scores import register_score
from lightning_goldy.analysis.taylor import OrderFit, TaylorDiff, taylor_diff
from lightning_goldy.analysis.taylor_approximation import TaylorApproximation
from lightning_goldy.analysis.volume import local_volume
from lightning_goldy.analysis.volume_result import VolumeResult, aggregate, best_of
from lightning_goldy.core.gates import HeadGates

__all__ = [
    "Agreement",
    "AnalysisResult",
    "AttentionMaps",
    "AttentionStatistics",
    "Compaction",
    "Continuations",
    "Cost",
    "CouplingDrift",
    "CouplingError",
    "CouplingResult",
    "CouplingStatistics",
    "DiagonalPreconditioner",
    "EditRequest",
    "Editor",
    "ExplainedChange",
    "FinetuneEditor",
    "FinetuneRipple",
    "Fluctuation",
    "FrozenAttention",
    "GenerationComparison",
    "GoldenResult",
    "GradientStepEditor",
    "HeadFreeze",
    "HeadGates",
    "HeadScores",
    "KnowledgeEdit",
    "KroneckerFisher",
    "KroneckerPreconditioner",
    "LinearizedMLP",
    "OrderFit",
    "ParameterDistributionResult",
    "RankOneEditor",
    "ReverseGoldenResult",
    "RippleResult",
    "Row",
    "SurvivingChange",
    "TangentModel",
    "TaylorApproximation",
    "TaylorDiff",
    "TunedPreconditioner",
    "VolumeResult",
    "activation_similarity",
    "adam_curvature",
    "adam_curvature_from_state",
    "adam_preconditioner",
    "aggregate",
    "attention_maps",
    "attention_statistics",
    "basin_volume",
    "best_of",
    "build_variant",
    "compact",
    "compaction_of",
    "compare_generations",
    "continue_prompts",
    "coupling_drift",
    "coupling_statistics",
    "diagonal_preconditioner",
    "distance_class",
    "explain_change",
    "finetune_ripple",
    "golden_parameters",
    "head_importance",
    "heads_to_regrow",
    "jaccard",
    "knowledge_coupling",
    "kronecker_fisher",
    "kronecker_preconditioner",
    "local_volume",
    "parameter_distribution",
    "prune_heads",
    "rank_one_update",
    "register_compaction",
    "register_editor",
    "register_head_score",
    "register_score",
    "register_strategy",
    "regrow_heads",
    "reverse_golden_parameters",
    "ripple_effects",
    "taylor_diff",
    "tuned_preconditioner",
]
