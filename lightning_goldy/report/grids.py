"""What the figures show, computed from rows: tables of block x tensor kind, and histograms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.registry import ReportError, Row

KINDS = ("embedding", "attention", "mlp", "norm", "head", "other")


@dataclass(frozen=True)
class BlockGrid:
    """One number for every kind of tensor in every block.

    Args:
        blocks: Row labels, in model order.
        kinds: Column labels.
        values: [blocks, kinds]; NaN where a block has no tensor of the kind or the number does not exist.
    """

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    values: NDArray[np.float64]

    @property
    def largest(self) -> float:
        """The largest finite value; 1 when there is none above zero, so that a colour scale has an extent."""
        finite = self.values[np.isfinite(self.values)]
        return float(finite.max()) if finite.size and finite.max() > 0 else 1.0


@dataclass(frozen=True)
class ChangeHistogram:
    """How large the changes of the single elements are.

    Args:
        edges: [bins + 1] of log10 |Delta|, ascending.
        counts: [bins] elements.
        zero: Elements that did not change at all; they have no logarithm.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    zero: int

    @property
    def total(self) -> int:
        """All elements."""
        return int(self.counts.sum()) + self.zero


def golden_density(row: Row) -> BlockGrid:
    """Share of the parameters that is golden, in percent.

    Args:
        row: Of the analysis ``golden_parameters``.

    Raises:
        ReportError: A tensor lacks a field.

    Example:
        >>> tensor = {"name": "h.0.w", "block": "h.0", "kind": "mlp", "numel": 8, "golden": 2}
        >>> golden_density({"result": {"tensors": [tensor]}}).values
        array([[25.]])
    """
    tensors = _tensors(row, ("golden", "numel"))
    golden, numel = _sums(tensors, "golden"), _sums(tensors, "numel")
    return _grid(tensors, {cell: 100 * count / numel[cell] for cell, count in golden.items() if numel[cell]})


def relative_change(row: Row) -> BlockGrid:
    """||Delta|| / ||theta_0|| over the tensors of a kind in a block, in percent.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: A tensor lacks a field.

    Example:
        >>> tensor = {"name": "h.0.w", "block": "h.0", "kind": "mlp", "base_norm": 5.0, "delta_norm": 1.0}
        >>> relative_change({"result": {"tensors": [tensor]}}).values
        array([[20.]])
    """
    tensors = _tensors(row, ("base_norm", "delta_norm"))
    base, delta = _sums(tensors, "base_norm", power=2), _sums(tensors, "delta_norm", power=2)
    # Where the base is zero (fresh biases, the second LoRA factor) a relative change does not exist.
    return _grid(tensors, {cell: 100 * math.sqrt(delta[cell] / base[cell]) for cell in base if base[cell] != 0})


def change_histogram(row: Row) -> ChangeHistogram:
    """The distribution of |Delta| over the elements.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The histogram is missing or its edges and counts do not belong together.

    Example:
        >>> change_histogram({"result": {"histogram": {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 5}}}).total
        10
    """
    histogram = _result(row).get("histogram")
    if not isinstance(histogram, Mapping) or not {"edges", "counts"} <= set(histogram):
        raise ReportError(f"'result.histogram' must hold 'edges' and 'counts', got {_brief(histogram)}")
    try:
        edges = np.asarray(histogram["edges"], dtype=np.float64)
        counts = np.asarray(histogram["counts"], dtype=np.int64)
        zero = int(histogram.get("zero", 0))
    except (TypeError, ValueError) as error:
        raise ReportError(f"'result.histogram' holds something that is not a number: {error}") from error
    if counts.ndim != 1 or edges.shape != (counts.size + 1,):
        if edges.size or counts.size:
            raise ReportError(f"'result.histogram' has {edges.size} edges for {counts.size} counts; one more is needed")
        edges = np.zeros(1)
    if not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ReportError("'result.histogram.edges' must be finite and ascending")
    if (counts < 0).any() or zero < 0:
        raise ReportError("'result.histogram' has a negative count")
    return ChangeHistogram(edges, counts, zero)


def _result(row: Row) -> Mapping[str, Any]:
    result = row.get("result")
    if not isinstance(result, Mapping):
        raise ReportError(f"'result' must be an object, got {_brief(result)}")
    return result


def _tensors(row: Row, numbers: tuple[str, ...]) -> list[Mapping[str, Any]]:
    tensors = _result(row).get("tensors")
    if not isinstance(tensors, list) or not tensors:
        raise ReportError(f"'result.tensors' must be a list with at least one tensor, got {_brief(tensors)}")
    for index, tensor in enumerate(tensors):
        where = f"result.tensors[{index}]"
        if not isinstance(tensor, Mapping):
            raise ReportError(f"'{where}' must be an object, got {_brief(tensor)}")
        for field in ("block", "kind"):
            if not isinstance(tensor.get(field), str):
                raise ReportError(f"'{where}.{field}' must be text, got {_brief(tensor.get(field))}")
        for field in numbers:
            value = tensor.get(field, "nothing")
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ReportError(f"'{where}.{field}' must be a number or null, got {_brief(value)}")
    return tensors


def _sums(tensors: list[Mapping[str, Any]], field: str, *, power: int = 1) -> dict[tuple[str, str], float]:
    sums: dict[tuple[str, str], float] = {}
    for tensor in tensors:
        cell = tensor["block"], tensor["kind"]
        # null is how a number that was not finite is written.
        value = math.nan if tensor[field] is None else float(tensor[field])
        sums[cell] = sums.get(cell, 0.0) + value**power
    return sums


def _grid(tensors: list[Mapping[str, Any]], cells: Mapping[tuple[str, str], float]) -> BlockGrid:
    blocks = tuple(dict.fromkeys(tensor["block"] for tensor in tensors))
    present = dict.fromkeys(tensor["kind"] for tensor in tensors)
    kinds = (*(kind for kind in KINDS if kind in present), *(kind for kind in present if kind not in KINDS))
    values = np.full((len(blocks), len(kinds)), np.nan)
    for (block, kind), value in cells.items():
        values[blocks.index(block), kinds.index(kind)] = value
    return BlockGrid(blocks, kinds, values)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
