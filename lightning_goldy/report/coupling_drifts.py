"""What the figures and the table of a finetune's knowledge drift show, taken from rows and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.couplings import CONTRASTS, STATISTICS
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.formatting import format_number, format_percent, printable, texts_html
from lightning_goldy.report.registry import ReportError, Row
from lightning_goldy.report.ripples import Scatter

CLASSES = ("edited", "rehearsed", "untouched")
"""The order of the classes in legends."""
_LACKS = "a row of coupling_drift lacks what its figure needs"
_HEADINGS = ("fact", "question", "answer", "log p before", "log p now", "predicted", "rank before", "rank now")
# Below this the colours would show rounding.
_LEAST_LIMIT = 0.01


@dataclass(frozen=True)
class DriftLines:
    """Lines over the run; None where a value does not exist.

    Args:
        steps: Optimizer steps.
        difference: Mean absolute difference of the cosines.
        correlation: Of the cosines with those of the base.
        measured: Mean change of log p by class, nats.
        predicted: The same, predicted.
    """

    steps: tuple[int, ...]
    difference: tuple[float | None, ...]
    correlation: tuple[float | None, ...]
    measured: Mapping[str, tuple[float | None, ...]]
    predicted: Mapping[str, tuple[float | None, ...]]


@dataclass(frozen=True)
class DriftMap:
    """Differences of the cosines of the pieces that drifted most.

    Args:
        names: Ids, with a mark on edited pieces.
        cells: Present minus base, ``[n, n]``; 0 on the diagonal.
        limit: The difference at which colours end, either way.
    """

    names: tuple[str, ...]
    cells: NDArray[np.float64]
    limit: float


def drift_scatters(row: Row) -> tuple[Scatter, ...]:
    """Predicted and measured changes by class, edited ones first.

    Raises:
        ReportError: The row lacks them.

    Example:
        >>> points = {"predicted": [0.5], "measured": [0.25], "class": ["untouched"]}
        >>> agreement = [{"group": "untouched", "n": 1, "pearson": None, "spearman": None}]
        >>> drift_scatters({"result": {"points": points, "agreement": agreement}})[0].label
        'untouched (n = 1)'
    """
    try:
        points, agreement = row["result"]["points"], row["result"]["agreement"]
        columns = list(zip(points["predicted"], points["measured"], points["class"], strict=True))
        groups = {each["group"]: each for each in agreement if each["group"] != "all"}
        found = []
        for name in sorted(groups, key=_place):
            mine = [(x, y) for x, y, group in columns if group == name and x is not None and y is not None]
            label = f"{name} ({_numbers(groups[name])}n = {format_number(groups[name]['n'])})"
            found.append(Scatter(name, label, tuple(x for x, _ in mine), tuple(y for _, y in mine)))
        return tuple(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{_LACKS}: {error}") from error


def drift_lines(row: Row) -> DriftLines:
    """The lines of a row, classes in their order.

    Raises:
        ReportError: The row lacks them.

    Example:
        >>> lines = {"steps": [4], "mean_absolute_difference": [0.1], "correlation": [None]}
        >>> change = {"untouched": [0.2], "edited": [1.5]}
        >>> found = drift_lines({"result": {"trajectory": {**lines, "change": change, "predicted_change": change}}})
        >>> list(found.measured), found.correlation
        (['edited', 'untouched'], (None,))
    """
    try:
        lines = row["result"]["trajectory"]
        change, predicted = (
            {name: tuple(lines[key][name]) for name in sorted(lines[key], key=_place)}
            for key in ("change", "predicted_change")
        )
        difference, correlation = tuple(lines["mean_absolute_difference"]), tuple(lines["correlation"])
        return DriftLines(tuple(lines["steps"]), difference, correlation, change, predicted)
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{_LACKS}: {error}") from error


def drift_map(row: Row) -> DriftMap:
    """The heat map of a row.

    Raises:
        ReportError: The row lacks it.

    Example:
        >>> drifted = {"ids": ["a", "b"], "classes": ["edited", "untouched"], "difference": [[0, 0.5], [0.5, 0]]}
        >>> found = drift_map({"result": {"drifted": drifted}})
        >>> found.names, found.limit
        (('a *', 'b'), 0.5)
    """
    try:
        given = row["result"]["drifted"]
        names = tuple(
            f"{name} *" if kind == "edited" else name for name, kind in zip(given["ids"], given["classes"], strict=True)
        )
        cells = np.array(given["difference"], dtype=np.float64).reshape(len(names), len(names))
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{_LACKS}: {error}") from error
    return DriftMap(names, cells, max(_LEAST_LIMIT, float(np.abs(cells).max(initial=0.0))))


def prediction_caption(row: Row) -> str:
    """How well the first order predicted, over all pieces.

    Example:
        >>> agreement = [{"group": "all", "n": 9, "pearson": 0.5, "spearman": 0.25, "slope": 2.0}]
        >>> row = {"metrics": {"sign_agreement": 0.75}, "result": {"agreement": agreement}}
        >>> prediction_caption(row).partition(". Points")[0]
        '9 pieces: r = 0.50, Spearman 0.25; same sign 75 %; slope 2'
    """
    try:
        every = next(each for each in row["result"]["agreement"] if each["group"] == "all")
        signs = format_percent(row.get("metrics", {}).get("sign_agreement"))
        told = _numbers(every).removesuffix(", ") or "no correlation defined"
        size = format_number(every["slope"])
        return (
            f"{format_number(every['n'])} pieces: {told}; same sign {signs}; slope {size}. Points on the "
            "line are predicted exactly by the gradient at the base; off it, the finetune was no small step."
        )
    except (KeyError, TypeError, StopIteration) as error:
        raise ReportError(f"{_LACKS}: {error!r}") from error


def lines_caption(row: Row) -> str:
    """What changed until now.

    Example:
        >>> metrics = {"mean_absolute_difference": 0.125, "correlation": 0.5}
        >>> lines_caption({"metrics": metrics, "result": {"n_pairs": 3}})
        'cosines of 3 pairs: mean absolute difference from the base 0.125, correlation with it 0.5; dashed: predicted'
    """
    metrics = row.get("metrics", {})
    drift, correlation = (format_number(metrics.get(name)) for name in ("mean_absolute_difference", "correlation"))
    pairs = format_number(row.get("result", {}).get("n_pairs"))
    return (
        f"cosines of {pairs} pairs: mean absolute difference from the base {drift}, correlation with it {correlation}; "
        "dashed: predicted"
    )


def map_caption(row: Row) -> str:
    """Which pieces are shown.

    Example:
        >>> drifted = {"ids": ["a"], "classes": ["edited"], "difference": [[0]]}
        >>> map_caption({"result": {"drifted": drifted, "n_pieces": 9}})
        'cosine now minus cosine at the base; the 1 of 9 pieces that drifted most, alike ones together; * edited'
    """
    count, pieces = len(drift_map(row).names), format_number(row["result"].get("n_pieces"))
    which = "all pieces" if format_number(count) == pieces else f"the {count} of {pieces} pieces that drifted most"
    return f"cosine now minus cosine at the base; {which}, alike ones together; * edited"


def moved_text(moved: Sequence[Mapping[str, Any]]) -> str:
    """The untouched facts that moved most as lines of plain text, in Markdown's code block.

    Args:
        moved: The entries of a row's ``moved``.

    Example:
        >>> numbers = {"before": -1.0, "after": -2.5, "predicted": -1.25, "rank_before": 1, "rank_after": 7}
        >>> told = moved_text([{"id": "a", "question": "`Q?", "answer": "yes", **numbers}])
        >>> told.splitlines()[-1].split()
        ['a', "'Q?", 'yes', '-1', '-2.5', '-1.25', '1', '7']
    """
    # Text of the data cannot end a block that is made of indented lines.
    lines = [_HEADINGS, *(tuple(cell.replace("`", "'") for cell in _cells(each)) for each in moved)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    told = ["    " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(["Untouched facts that moved most, log p in nats\n", *(line.rstrip() for line in told)])


def moved_html(row: Row) -> str:
    """A part of the page; nothing when the row names no fact.

    Args:
        row: Its result may hold ``moved``.

    Raises:
        ReportError: An entry lacks something.

    Example:
        >>> numbers = {"before": -1.0, "after": -2.5, "predicted": -1.25, "rank_before": 1, "rank_after": 7}
        >>> page = moved_html({"result": {"moved": [{"id": "a", "question": "<b>", "answer": "yes", **numbers}]}})
        >>> "&lt;b&gt;" in page, moved_html({"result": {}})
        (True, '')
    """
    moved = row["result"].get("moved")
    if not moved:
        return ""
    table = texts_html(_HEADINGS, map(_cells, moved), numbers_from=3)
    return f"<h3>Untouched facts that moved most</h3>{table}"


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        texts = [printable(entry[name]) for name in ("id", "question", "answer")]
        names = ("before", "after", "predicted", "rank_before", "rank_after")
        return (*texts, *(format_number(entry[name]) for name in names))
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"a fact that moved lacks or spoils {error}") from error


def _numbers(each: Mapping[str, Any]) -> str:
    return "" if each["pearson"] is None else f"r = {each['pearson']:.2f}, Spearman {each['spearman']:.2f}, "


def _place(name: str) -> tuple[int, str]:
    return (CLASSES.index(name) if name in CLASSES else len(CLASSES)), name


describe(
    "coupling_drift",
    Description(
        title="Knowledge coupling during the finetune",
        measures=(
            "What the finetune does to facts, taught or not: the change of every answer's log-probability since the "
            "base beside what the gradients at the base predict of it, and how far the coupling of the facts, the "
            "cosines between those gradients, has moved."
        ),
        reading=(
            "Where predicted and measured changes agree, coupling at the base tells what the finetune touches. They "
            "part when the finetune is no small step: look at the sign and the ranks before the size. A low "
            "correlation of the cosines with those of the base says that a coupling measured before the finetune no "
            "longer holds."
        ),
        metrics={
            "mean_absolute_difference": "mean distance of the cosines from those of the base; by the pair's classes",
            "mean_difference": "mean of the cosines minus that of the base",
            "correlation": "of the cosines with those of the base, over pairs",
            "delta_norm": "||Delta||",
            "pearson": "linear correlation of predicted and measured changes; by class",
            "spearman": "the same of their ranks",
            "sign_agreement": "share of the pieces where both have the same sign",
            "slope": "of measured on predicted changes; 1 = the prediction has the right size",
            "measured_change": "mean measured change of log p, nats; by class",
            "predicted_change": "mean predicted change of log p, nats; by class",
            "exact": "share of the answers whose every token is the most probable one; by class",
            "exact_before": "the same at the base",
            **STATISTICS,
            **CONTRASTS,
            "n_failed": "pieces that failed; such as those without a gradient left",
        },
    ),
)
