"""Which parameters carry the finetune: golden and reverse golden parameters."""

from lightning_goldy.analysis.agreement import row_column_null
from lightning_goldy.analysis.golden.budget import Fluctuation, check_search_arguments, register_strategy
from lightning_goldy.analysis.golden.golden import (
    SINGLE_SHOTS,
    GoldenResult,
    check_golden_arguments,
    golden_parameters,
    register_score,
    watched_elements,
)
from lightning_goldy.analysis.golden.reverse import (
    ReverseGoldenResult,
    Search,
    reverse_golden_parameters,
    scoring_rounds,
)
from lightning_goldy.core.mask import jaccard
from lightning_goldy.core.pieces import random_tokens
from lightning_goldy.core.tasks import vocabulary_of

__all__ = [
    "SINGLE_SHOTS",
    "Fluctuation",
    "GoldenResult",
    "ReverseGoldenResult",
    "Search",
    "check_golden_arguments",
    "check_search_arguments",
    "golden_parameters",
    "jaccard",
    "random_tokens",
    "register_score",
    "register_strategy",
    "reverse_golden_parameters",
    "row_column_null",
    "scoring_rounds",
    "vocabulary_of",
    "watched_elements",
]
