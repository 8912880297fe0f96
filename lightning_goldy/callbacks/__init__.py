"""When and where analyses run: one Lightning callback per question."""

from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext, Findings
from lightning_goldy.callbacks.golden_parameters import GoldenParameters
from lightning_goldy.callbacks.golden_snapshot import GoldenSnapshot
from lightning_goldy.callbacks.run_report import RunReport

__all__ = [
    "AnalysisCallback",
    "AnalysisContext",
    "Findings",
    "GoldenParameters",
    "GoldenSnapshot",
    "RunReport",
]
