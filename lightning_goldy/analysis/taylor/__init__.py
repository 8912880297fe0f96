"""Is it still a small step: the Taylor expansion of the change."""

from lightning_goldy.analysis.taylor.approximation import TaylorApproximation
from lightning_goldy.analysis.taylor.taylor import OrderFit, TaylorDiff, taylor_diff

__all__ = ["OrderFit", "TaylorApproximation", "TaylorDiff", "taylor_diff"]
