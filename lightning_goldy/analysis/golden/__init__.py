"""Which parameters carry the finetune: golden and reverse golden parameters."""

from lightning_goldy.analysis.golden.golden import GoldenResult, golden_parameters, register_score
from lightning_goldy.analysis.golden.reverse import ReverseGoldenResult, reverse_golden_parameters
from lightning_goldy.analysis.golden.search import Fluctuation, Search, register_strategy
from lightning_goldy.core.mask import jaccard

__all__ = [
    "Fluctuation",
    "GoldenResult",
    "ReverseGoldenResult",
    "Search",
    "golden_parameters",
    "jaccard",
    "register_score",
    "register_strategy",
    "reverse_golden_parameters",
]
