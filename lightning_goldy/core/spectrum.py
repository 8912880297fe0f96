"""The singular values of a matrix and the leading directions that they belong to, exact or randomised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_goldy.core.vector import fill_direction_

_OVERSAMPLED = 8
_POWER_ITERATIONS = 4
# Operations of a product that factorising a thin matrix takes as long as, per row and squared column.
_FACTORISED = 5.0


def spectrum_of(matrix: Tensor) -> Tensor:
    """All singular values, descending, by the Gram matrix in float64: exact to 1e-8 of the largest."""
    wide = matrix.double()
    gram = wide @ wide.t() if matrix.shape[0] <= matrix.shape[1] else wide.t() @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def product_spectrum(left: Tensor, right: Tensor) -> Tensor:
    r"""Singular values of a product of low rank, descending, without the product.

    .. math:: L R^\top = Q_L (R_L R_R^\top) Q_R^\top

    Args:
        left: L, shape ``[rows, rank]``.
        right: R, shape ``[columns, rank]``.

    Returns:
        At most ``rank`` values.

    Example:
        >>> product_spectrum(torch.tensor([[2.0], [0.0]]), torch.tensor([[0.0], [3.0]])).tolist()
        [6.0]
    """
    triangles = [torch.linalg.qr(side.double(), mode="r").R for side in (left, right)]
    return torch.linalg.svdvals(triangles[0] @ triangles[1].t())


def leading_directions(
    matrix: Tensor, top: int, name: str, seed: int, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest singular values with left and right directions, and the largest relative error among them."""
    count = min(top, *matrix.shape)
    if matrix.shape[0] > matrix.shape[1]:
        values, right, left, error = leading_directions(matrix.t(), top, name, seed, exact=exact)
        return values, left, right, error
    if exact:
        return *_by_gram(matrix, count), 0.0
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # A start that is the same on every machine, and draws from no random state.
    probe = torch.empty(matrix.shape[1], min(*matrix.shape, count + _OVERSAMPLED), dtype=torch.float32)
    basis = torch.linalg.qr(wide @ fill_direction_(probe, name, seed).to(wide)).Q
    block, moved = basis, [wide.t() @ basis]
    for _ in range(min(_POWER_ITERATIONS, min(matrix.shape) // block.shape[1] - 1)):
        block = wide @ moved[-1]
        # Twice, for what is left the first time may be rounding alone.
        for _ in range(2):
            block = torch.linalg.qr(block - basis @ (basis.t() @ block)).Q
        basis = torch.cat([basis, block], dim=1)  # of every power, not of the last alone
        moved.append(wide.t() @ block)
    values, inner, right = (part.to(wide.dtype) for part in _by_gram(torch.cat(moved, dim=1).t(), count))
    left = basis @ inner
    residuals = (wide @ right - left * values).norm(dim=0) / math.sqrt(2)
    return values.double(), left, right, float((residuals / values.clamp(min=torch.finfo(wide.dtype).tiny)).max())


def _by_gram(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix of few rows in float64, with left and right directions."""
    wide = matrix.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.t())
    values, left = squares.clamp(min=0).sqrt().flip(0)[:count], vectors.flip(1)[:, :count]
    return values, left, wide.t() @ left / values.clamp(min=1e-300)


def randomised_operations(rows: int, columns: int, top: int) -> float:
    """Operations of a randomised decomposition, about; those of factorisations count as much as they take longer.

    Example:
        >>> round(randomised_operations(1024, 512, 8) / randomised_operations(512, 256, 8), 1)
        3.3
    """
    short, long = sorted((rows, columns))
    width = min(short, top + _OVERSAMPLED)
    powers = min(_POWER_ITERATIONS, short // width - 1)
    basis = width * (powers + 1)
    products = 2.0 * short * long * (2 * basis + top)
    return products + _FACTORISED * basis**2 * (short + long)


def refined_operations(rows: int, columns: int, start: int, top: int) -> float:
    """Operations of :func:`refined_directions` from so many directions, as :func:`randomised_operations` counts them.

    Example:
        >>> refined_operations(512, 1024, 24, 8) < randomised_operations(512, 1024, 8) / 2
        True
    """
    return 2.0 * rows * columns * (2 * start + top) + _FACTORISED * start**2 * (rows + columns)


def refined_directions(matrix: Tensor, start: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, float]:
    r"""As the randomised :func:`leading_directions`, from left directions that are nearly right.

    .. math:: Q = \mathrm{orth}(A^T S), \qquad A Q = U \Sigma W^T, \qquad V = Q W

    Args:
        matrix: A, shape ``[rows, columns]``.
        start: S, shape ``[rows, n]``; what is orthogonal to all of them is not found.
        top: Values and directions.

    Returns:
        The same, with the residual :math:`\|A^T u_i - \sigma_i v_i\| / \sqrt2` in the error.

    Example:
        >>> matrix, start = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3)[:, :2]
        >>> values, _, _, error = refined_directions(matrix, start, 2)
        >>> [round(value, 6) for value in values.tolist()], error < 1e-6
        ([3.0, 2.0], True)
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    basis = torch.linalg.qr(wide.t() @ start.to(wide)).Q  # [columns, n]
    moved = wide @ basis
    values, inner, left = (part.to(wide.dtype) for part in _by_gram(moved.t(), min(top, basis.shape[1])))
    right = basis @ inner
    residuals = (wide.t() @ left - right * values).norm(dim=0) / math.sqrt(2)
    return values.double(), left, right, float((residuals / values.clamp(min=torch.finfo(wide.dtype).tiny)).max())
