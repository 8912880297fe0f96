"""Pure functions: (model, batches, objective, ...) to frozen results; no Trainer, no logger."""

from lightning_goldy.analysis.golden import GoldenResult, golden_parameters, jaccard
from lightning_goldy.analysis.scores import register_score

__all__ = ["GoldenResult", "golden_parameters", "jaccard", "register_score"]
