"""What volumes are measured of, and how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_goldy.analysis.divergence import Cache, check_cache
from lightning_goldy.analysis.volume import check_volume_arguments
from lightning_goldy.analysis.volume_result import Measure
from lightning_goldy.core.space import ParameterSpace

PreconditionerName = Literal["none", "adam", "best"]


@dataclass(frozen=True)
class Selection:
    """Which parameters move.

    Args:
        include: Glob patterns of parameter names.
        exclude: Glob patterns taken out again.
        last_layers: Only the last blocks: a fraction, or their number.

    Example:
        >>> Selection(exclude=["bias"]).space(nn.Linear(2, 1)).names
        ('weight',)
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    last_layers: float | int | None = None

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected part of a model.

        Raises:
            SpaceError: It is empty, or a pattern matches nothing.
        """
        return ParameterSpace.of(model, self.include, self.exclude, self.last_layers)


@dataclass(frozen=True)
class Estimator:
    """How a volume is estimated; the same for all that are to compare.

    Args:
        measure: ``gaussian`` for the probability under N(0, sigma^2 I), ``uniform`` for the volume itself, ``sphere``
            for the probability on the sphere through the weights.
        seed: Decides the directions; every analysis walks along the same ones.
        rtol: Relative tolerance of the evaluated divergence; a tenth of it is left.
        max_evaluations: Evaluations per direction before an error.
        max_seq_len: Use only the first so many tokens of each sample.
        cache: Where the anchor's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Estimator(rtol=2.0)
        Traceback (most recent call last):
        ValueError: rtol must lie in (0, 1); got 2.0
    """

    measure: Measure = "gaussian"
    seed: int = 0
    rtol: float = 1e-2
    max_evaluations: int = 40
    max_seq_len: int | None = None
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        check_volume_arguments(1, 1.0, None, self.measure, self.rtol, self.max_evaluations)
        check_cache(self.cache, None)
