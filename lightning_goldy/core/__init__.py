"""What every analysis stands on; imports torch only."""

from lightning_goldy.core.architecture import Head, HeadError, HeadGates
from lightning_goldy.core.base import BaseParameters, base_of
from lightning_goldy.core.files import StoreError
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.objective import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    MaskedLMObjective,
    Objective,
    Seq2SeqObjective,
    SpanObjective,
    TokenClassifierObjective,
    TokenObjective,
    objective_for,
)
from lightning_goldy.core.space import ParameterSpace, Selection, SpaceError
from lightning_goldy.core.store import load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector, applied, random_direction, substituted

__all__ = [
    "BaseParameters",
    "CausalLMObjective",
    "ClassifierObjective",
    "FunctionObjective",
    "Head",
    "HeadError",
    "HeadGates",
    "MaskedLMObjective",
    "Objective",
    "ParameterMask",
    "ParameterSpace",
    "ParameterVector",
    "Selection",
    "Seq2SeqObjective",
    "SpaceError",
    "SpanObjective",
    "StoreError",
    "TokenClassifierObjective",
    "TokenObjective",
    "applied",
    "base_of",
    "load_vectors",
    "objective_for",
    "random_direction",
    "save_vectors",
    "substituted",
]
