"""When and where analyses run: one Lightning callback per question."""

from lightning_goldy.callbacks.activation_differences import ActivationDifferences
from lightning_goldy.callbacks.attention_tracker import AttentionTracker
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.basin_volume import BasinVolume
from lightning_goldy.callbacks.change_attribution import ChangeAttribution
from lightning_goldy.callbacks.circuit_tracker import CircuitTracker
from lightning_goldy.callbacks.engine.store import Findings
from lightning_goldy.callbacks.exact_resume import ExactResume
from lightning_goldy.callbacks.finetune_comparison import FinetuneComparison
from lightning_goldy.callbacks.golden_parameters import GoldenParameters
from lightning_goldy.callbacks.golden_snapshot import GoldenSnapshot
from lightning_goldy.callbacks.head_plasticity import HeadPlasticity
from lightning_goldy.callbacks.knowledge_coupling import KnowledgeCoupling
from lightning_goldy.callbacks.parameter_distribution import ParameterDistribution
from lightning_goldy.callbacks.reverse_golden_parameters import ReverseGoldenParameters
from lightning_goldy.callbacks.run_report import RunReport
from lightning_goldy.callbacks.taylor_diff import TaylorDiff
from lightning_goldy.callbacks.variant_losses import VariantLosses

__all__ = [
    "ActivationDifferences",
    "AnalysisCallback",
    "AnalysisContext",
    "AttentionTracker",
    "BasinVolume",
    "ChangeAttribution",
    "CircuitTracker",
    "ExactResume",
    "Findings",
    "FinetuneComparison",
    "GoldenParameters",
    "GoldenSnapshot",
    "HeadPlasticity",
    "KnowledgeCoupling",
    "ParameterDistribution",
    "ReverseGoldenParameters",
    "RunReport",
    "TaylorDiff",
    "VariantLosses",
]
