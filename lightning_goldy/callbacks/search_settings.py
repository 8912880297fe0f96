"""How the search for reverse golden parameters goes."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_goldy.analysis.divergence import Cache, check_cache


@dataclass(frozen=True)
class Search:
    """How far and from where a search goes.

    Args:
        score: Registered score of the unmasked model to start from.
        rounds: Forward and backward passes under the masked model at most.
        chunk_size: Samples of one pass, to bound the memory; the batches' own size by default.
        max_stagnant_iterations: Iterations without an improvement at the full budget, after which the search ends.
        seed: Decides the strategies that draw numbers.
        cache: Where the unmasked model's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.

    Raises:
        ValueError: The cache is unknown.

    Example:
        >>> Search(rounds=6).rounds
        6
    """

    score: str = "fisher"
    rounds: int = 11
    chunk_size: int | None = None
    max_stagnant_iterations: int = 5
    seed: int = 0
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        check_cache(self.cache, None)
