"""Is it still a small step: the Taylor expansion of the change."""

import warnings
from typing import Any

from lightning_goldy.analysis.taylor.approximation import TaylorApproximation, check_orders, require_differences
from lightning_goldy.analysis.taylor.result import By, OrderFit, TaylorDiffResult
from lightning_goldy.analysis.taylor.taylor import expansion_route, require_logits, taylor_diff

__all__ = [
    "By",
    "OrderFit",
    "TaylorApproximation",
    "TaylorDiffResult",
    "check_orders",
    "expansion_route",
    "require_differences",
    "require_logits",
    "taylor_diff",
]


def __getattr__(name: str) -> Any:
    if name != "TaylorDiff":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("lightning_goldy.analysis.TaylorDiff has become TaylorDiffResult", DeprecationWarning, stacklevel=2)
    return TaylorDiffResult
