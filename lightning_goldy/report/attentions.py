"""What the figures of attention show, computed from rows: heads by statistic, patterns of prompts, singular values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.registry import ReportError, Row

SHARES = ("normalised_entropy", "first_token", "diagonal", "previous_token", "induction", "duplicate_token")
"""Statistics between 0 and 1, which share a colour scale."""

TITLES = {
    "entropy": "entropy, nats",
    "normalised_entropy": "entropy / log visible",
    "distance": "distance, tokens",
    "first_token": "first token",
    "diagonal": "own token",
    "previous_token": "previous token",
    "induction": "induction",
    "duplicate_token": "duplicate token",
    "drift": "drift from the base, nats",
}

# More panels than these cannot be read.
_MOST_PATTERNS = 16


@dataclass(frozen=True)
class Pattern:
    """What one head attends to on one prompt.

    Args:
        prompt: Its name.
        tokens: Names of its tokens.
        layer: From 0.
        head: From 0.
        weights: Rows are queries, ``[T, T]``.
        change: Weights minus the base's, likewise; None without a base.
    """

    prompt: str
    tokens: tuple[str, ...]
    layer: int
    head: int
    weights: NDArray[np.float64]
    change: NDArray[np.float64] | None


@dataclass(frozen=True)
class Spectrum:
    """Singular values over the run.

    Args:
        prompt: Its name.
        steps: Optimizer steps.
        values: Mean over heads of each singular value, ``[steps, top]``; NaN where there is none.
    """

    prompt: str
    steps: tuple[int, ...]
    values: NDArray[np.float64]


def heads_by_statistic(row: Row) -> dict[str, NDArray[np.float64]]:
    """Each statistic of every head, ``[layers, heads]``, in a fixed order.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> heads_by_statistic({"result": {"statistics": {"entropy": [[0.5, None]]}}})["entropy"]
        array([[0.5, nan]])
    """
    found = _result(row).get("statistics")
    if not isinstance(found, Mapping) or not found:
        raise ReportError(f"'result.statistics' must be an object with at least one statistic, got {found!r:.60}")
    grids = {name: _matrix(values, f"result.statistics.{name}") for name, values in found.items()}
    if len({grid.shape for grid in grids.values()}) != 1:
        raise ReportError("the tables of 'result.statistics' differ in shape")
    return {name: grids[name] for name in (*TITLES, *(each for each in grids if each not in TITLES)) if name in grids}


def patterns(row: Row) -> list[Pattern]:
    """The patterns that a row keeps, at most as many as a figure can hold.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": [[0.75]]}
        >>> prompt = {"name": "probe", "tokens": ["a"], "maps": [found]}
        >>> patterns({"result": {"prompts": [prompt]}})[0].change
        array([[0.25]])
    """
    shown = []
    for index, prompt in enumerate(_objects(row, "prompts")):
        where = f"result.prompts[{index}]"
        tokens, maps = prompt.get("tokens"), prompt.get("maps")
        if not isinstance(tokens, list) or not isinstance(maps, list):
            raise ReportError(f"'{where}' must hold the lists 'tokens' and 'maps'")
        for number, each in enumerate(maps):
            place = f"{where}.maps[{number}]"
            if not isinstance(each, Mapping) or not all(isinstance(each.get(key), int) for key in ("layer", "head")):
                raise ReportError(f"'{place}' must be an object with 'layer' and 'head', got {each!r:.60}")
            weights = _matrix(each.get("weights"), f"{place}.weights")
            base = None if each.get("base") is None else _matrix(each["base"], f"{place}.base")
            for found in (weights, base):
                if found is not None and found.shape != (len(tokens), len(tokens)):
                    raise ReportError(f"'{place}' has weights of shape {found.shape} for {len(tokens)} tokens")
            change = None if base is None else weights - base
            name = str(prompt.get("name"))
            shown.append(Pattern(name, tuple(map(str, tokens)), each["layer"], each["head"], weights, change))
    return shown[:_MOST_PATTERNS]


def spectra(row: Row) -> list[Spectrum]:
    """The singular values up to this row, one group per prompt.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> line = {"prompt": "probe", "steps": [0, 5], "values": [[2.0, 1.0], [2.5, None]]}
        >>> spectra({"result": {"spectra": [line]}})[0].values
        array([[2. , 1. ],
               [2.5, nan]])
    """
    lines = []
    for index, line in enumerate(_objects(row, "spectra")):
        where = f"result.spectra[{index}]"
        values, steps = _matrix(line.get("values"), f"{where}.values"), line.get("steps")
        if not isinstance(steps, list) or len(steps) != len(values):
            raise ReportError(f"'{where}' must have as many steps as values")
        lines.append(Spectrum(str(line.get("prompt")), tuple(map(int, steps)), values))
    return lines


def heads_caption(row: Row) -> str:
    """What the numbers are means over, and how to read them.

    Example:
        >>> heads_caption({"result": {"n_samples": 16, "queries": {"entropy": 200, "induction": 7}}})[:53]
        'Means over 200 queries of 16 samples, padding left ou'
    """
    result = _result(row)
    found = result.get("queries")
    counts = found if isinstance(found, Mapping) else {}
    total, induced, repeated = (format_number(counts.get(name)) for name in ("entropy", "induction", "duplicate_token"))
    return (
        f"Means over {total} queries of {format_number(result.get('n_samples'))} samples, padding left out; induction "
        f"over the {induced} and duplicate token over the {repeated} whose token occurred before. Rows are layers, "
        "columns heads."
    )


def drift_caption(row: Row) -> str:
    """Where the patterns moved most.

    Example:
        >>> drift_caption({"result": {"statistics": {"drift": [[0.0, 0.25]]}}})[:62]
        'Mean Jensen-Shannon divergence between the present and the bas'
    """
    grid = heads_by_statistic(row).get("drift")
    text = (
        "Mean Jensen-Shannon divergence between the present and the base's attention rows, at most log 2 = 0.693 nats."
    )
    if grid is None or not np.isfinite(grid).any():
        return text
    layer, head = np.unravel_index(int(np.nanargmax(grid)), grid.shape)
    return f"{text} It is largest in layer {layer}, head {head}: {format_number(float(grid[layer, head]))} nats."


def patterns_caption(row: Row) -> str:
    """How to read a pattern.

    Example:
        >>> patterns_caption({"result": {"prompts": []}})[:44]
        'Each row is a query, each column a key that '
    """
    total = sum(len(each.get("maps", ())) for each in _result(row).get("prompts", ()) if isinstance(each, Mapping))
    more = f" The first {_MOST_PATTERNS} of {total} patterns." if total > _MOST_PATTERNS else ""
    return f"Each row is a query, each column a key that it looks at; a row sums to 1.{more}"


def spectra_caption(row: Row) -> str:
    """What the singular values tell.

    Example:
        >>> spectra_caption({})[:40]
        'Largest singular values of the attention'
    """
    return (
        "Largest singular values of the attention patterns, means over all heads. A first value that grows while the "
        "others fall means that queries look more and more at the same places; values near 1 mean that each looks at "
        "a place of its own."
    )


def _result(row: Row) -> Mapping[str, Any]:
    result = row.get("result")
    if not isinstance(result, Mapping):
        raise ReportError(f"'result' must be an object, got {result!r:.60}")
    return result


def _objects(row: Row, name: str) -> list[Mapping[str, Any]]:
    found = _result(row).get(name)
    if not isinstance(found, list) or not found or not all(isinstance(each, Mapping) for each in found):
        raise ReportError(f"'result.{name}' must be a list of at least one object, got {found!r:.60}")
    return found


def _matrix(values: Any, where: str) -> NDArray[np.float64]:
    """A table of numbers; null is NaN."""
    if not isinstance(values, list) or not values or not all(isinstance(line, list) for line in values):
        raise ReportError(f"'{where}' must be a table of numbers, got {values!r:.60}")
    if len({len(line) for line in values}) != 1:
        raise ReportError(f"the rows of '{where}' differ in length")
    for line in values:
        for value in line:
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                raise ReportError(f"'{where}' must hold numbers or null, got {value!r:.60}")
    return np.array([[math.nan if value is None else float(value) for value in line] for line in values])
