"""The result of a coupling: a matrix and the pieces that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.naming import block_of, suggestion

# Rows of the matrix that are worked on at a time.
ROWS = 1024


@dataclass(frozen=True)
class CouplingResult(AnalysisResult):
    r"""How alike pieces are, pair by pair.

    Args:
        matrix: Shape ``[N, N]``, in the order of the pieces: cosines, or with ``normalize=False`` inner products;
            float32, of a float64 model float64. NaN in the rows and columns of pieces that failed.
        norms: Shape ``[N]``, float64: norms of the gradients (nats per parameter unit), centred ones with ``center``;
            of activations for ``measure="activation"``. NaN where a piece failed.
        log_probs: Shape ``[N]``, float64: mean log-probability of each answer, nats.
        pieces: Of each piece ``id``, ``question``, ``answer``, ``category``, ``group`` and ``hop``; all but the id None
            where pieces came as batches.
        failed: Of each piece that failed its ``index``, ``id`` and ``reason``.
        parameters: Canonical names of the tensors that gradients were taken with respect to.
        measure: ``gradient`` or ``activation``.
        normalize: Whether the matrix holds cosines.
        center: Whether the mean over pieces was subtracted.
        projection: Dimensions of the random projection; None where the matrix is exact.
        projection_error: Bound on the root mean square error of a cosine that the projection makes, before centring;
            None without one.
        seconds: What it took on this process.
    """

    matrix: Tensor
    norms: Tensor
    log_probs: Tensor
    pieces: tuple[dict[str, Any], ...]
    failed: tuple[dict[str, Any], ...]
    parameters: tuple[str, ...]
    measure: Literal["gradient", "activation"]
    normalize: bool
    center: bool
    projection: int | None
    projection_error: float | None
    seconds: float

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def ids(self) -> tuple[str, ...]:
        """The pieces' ids."""
        return self.column("id")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the blocks that the parameters belong to."""
        return tuple(dict.fromkeys(map(block_of, self.parameters)))

    @property
    def n_layers(self) -> int:
        """Number of those blocks."""
        return len(self.layers)

    @property
    def valid(self) -> Tensor:
        """Which pieces did not fail, shape ``[N]``, boolean."""
        return torch.isfinite(self.norms)

    @property
    def cosines(self) -> Tensor:
        """The cosines, also where the matrix holds inner products."""
        return (
            self.matrix
            if self.normalize
            else cosines_of_gram(self.matrix.to(torch.float64, copy=True), self.norms).to(self.matrix.dtype)
        )

    def column(self, name: str) -> tuple[Any, ...]:
        """One value per piece.

        Args:
            name: ``id``, ``question``, ``answer``, ``category``, ``group`` or ``hop``.

        Raises:
            ValueError: There is no such column.
        """
        valid = ("id", "question", "answer", "category", "group", "hop")
        if name not in valid:
            raise ValueError(f"unknown column {name!r}; {suggestion(name, valid)}")
        return tuple(piece[name] for piece in self.pieces)


def cosines_of_gram(gram: Tensor, norms: Tensor) -> Tensor:
    """Divides inner products by norms, in place; NaN stays where a norm is NaN.

    Args:
        gram: Shape ``[N, N]``, float64.
        norms: Shape ``[N]``, float64.

    Example:
        >>> cosines_of_gram(torch.tensor([[4.0, 3.0], [3.0, 9.0]]), torch.tensor([2.0, 3.0])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    for start in range(0, len(gram), ROWS):
        part = gram[start : start + ROWS]
        part /= norms[start : start + ROWS, None] * norms
        part.clamp_(-1, 1)  # beyond by rounding, or by the error of a projection
    good = torch.isfinite(norms)
    gram.diagonal()[good] = 1
    return gram
