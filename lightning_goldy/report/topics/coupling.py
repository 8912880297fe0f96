"""Knowledge coupling: which pieces are coupled, how much, and what that can be trusted for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_goldy.report.builders import (
    HeatMap,
    Histogram,
    arrange,
    columns_of,
    heat_map,
    histogram,
    plain_spec,
    tips,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, ReportError, Row, register_figure, register_table, require
from lightning_goldy.report.formatting import console_table, format_number, format_percent, printable, texts_html
from lightning_goldy.report.reading import naming

# Told apart with every kind of colour vision (Okabe and Ito), then shades of grey.
_COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000", "#9a6324", "#999999",
)  # fmt: skip
# Side of the heat map of all pieces, and of its cells at least and at most.
_SIDE, _CELL = 600, (3, 36)


@register_figure("knowledge_coupling", "heat_map", heading="Which pieces are coupled")
def chart_coupling_map(row: Row) -> Figure:
    """Heat map of the cosines in the order of the clusters, with a strip of categories.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> drawn = {"cells": [[1, 0.5], [0.5, 1]], "sizes": [1, 1], "categories": ["b", None], "n_pieces": 2}
        >>> figure = chart_coupling_map({"result": {"heat_map": drawn}})
        >>> figure.ranges, figure.data["strip_0"]["category"]
        ({'colour': (-0.5, 0.5)}, ['b', None])
    """
    drawn = coupling_map(row)
    size = min(_CELL[1], max(_CELL[0], _SIDE // len(drawn.cells)))
    style = HeatMap(
        quantity(row), rows="piece", columns="piece", colours="diverging", numbers=False, cell=(size, size), axes=True
    )
    cells = heat_map(drawn.cells, drawn.labels, drawn.labels, style, extent=(-drawn.limit, drawn.limit))
    places = range(len(drawn.cells))
    blocks = columns_of(("place", "piece", "category"), zip(places, drawn.labels, drawn.categories, strict=True))
    strips = [Figure(_strip_chart(size), {"strip": blocks})] if any(drawn.categories) else []
    caption = coupling_map_caption(row)
    return replace(arrange([*strips, cells], columns=2, caption=caption), title=titled("Knowledge coupling", row))


@register_figure("knowledge_coupling", "distribution", heading="How much is coupled")
def chart_coupling_distribution(row: Row) -> Figure | str:
    """Histogram of the cosines of all pairs, with the thresholds.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Returns:
        The figure, or that there is no pair.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> drawn = {"edges": [-1, 0, 0.5, 1], "counts": [0, 4, 0]}
        >>> result = {"distribution": drawn, "thresholds": {"high": 0.4, "moderate": 0.1}}
        >>> chart_coupling_distribution({"result": result}).data["thresholds"]["cosine"]
        [0.0, 0.1, 0.4]
    """
    edges, counts, thresholds = coupling_histogram(row)
    if not counts.any():
        return "There is no pair of two pieces."
    bars = histogram(edges, counts, Histogram(quantity(row), "pairs"))
    names = ["", *(f"{name}\nfrom {cosine:g}" for name, cosine in thresholds.items())]
    marks: dict[str, list[Any]] = {"cosine": [0.0, *thresholds.values()], "label": names}
    low, high = bars.ranges["bins"]
    return Figure(
        _threshold_chart(quantity(row)),
        {**bars.data, "thresholds": marks},
        distribution_caption(row),
        titled("Distribution of the coupling", row),
        {**bars.ranges, "bins": (min(low, *marks["cosine"]), max(high, *marks["cosine"]))},
    )


@functools.lru_cache(maxsize=64)
def _strip_chart(size: float) -> dict[str, Any]:
    alt = require("altair")
    base = alt.Chart(alt.NamedData("strip")).encode(
        y=alt.Y("place:O", axis=None, scale=alt.Scale(padding=0)),
        tooltip=tips(("piece:N", "piece"), ("category:N", "category")),
    )
    legend = alt.Legend(title=None, orient="left")
    known = base.transform_filter("isValid(datum.category)").encode(
        color=alt.Color("category:N", scale=alt.Scale(range=list(_COLOURS)), legend=legend)
    )
    # Blocks without a category have a place too.
    return plain_spec(alt.layer(base.mark_rect(opacity=0), known.mark_rect()), width=14, height=alt.Step(size))


@functools.lru_cache(maxsize=8)
def _threshold_chart(unit: str) -> dict[str, Any]:
    """Bars as of a histogram, and rules with their names above them."""
    bars = dict(histogram([0, 1], [1], Histogram(unit, "pairs")).bare())
    place = {"field": "cosine", "type": "quantitative"}
    rules = {"mark": {"type": "rule", "strokeDash": [5, 4]}, "encoding": {"x": place}}
    names = {
        "mark": {"type": "text", "align": "left", "baseline": "top", "dx": 4, "fontSize": 11, "lineBreak": "\n"},
        "encoding": {"x": place, "text": {"field": "label"}, "y": {"value": 0}},
    }
    height = bars.pop("height")
    return {"layer": [bars, *({"data": {"name": "thresholds"}, **layer} for layer in (rules, names))], "height": height}


# Below this the colours would show rounding.
_LEAST_LIMIT = 0.05
_LACKS = "a row of knowledge_coupling lacks what its figure needs:"


@dataclass(frozen=True, eq=False)
class CouplingMap:
    """The heat map.

    Args:
        cells: Mean cosines, ``[B, B]``.
        labels: The numbers of the first and the last piece of each block, counted from 0.
        categories: Of each block; None for none.
        limit: The cosine at which colours end, either way.
        n_pieces: Pieces in all.
    """

    cells: NDArray[np.float64]
    labels: tuple[str, ...]
    categories: tuple[str | None, ...]
    limit: float
    n_pieces: int


def coupling_map(row: Row) -> CouplingMap:
    """The heat map of a row.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks it.

    Example:
        >>> drawn = {"cells": [[1, 0.5], [0.5, 1]], "sizes": [1, 1], "categories": ["b", None], "n_pieces": 2}
        >>> found = coupling_map({"result": {"heat_map": drawn}})
        >>> found.limit, found.labels, found.categories
        (0.5, ('0', '1'), ('b', None))
    """
    with naming(_LACKS):
        given = row["result"]["heat_map"]
        cells = np.array(given["cells"], dtype=np.float64)
        sizes, categories, n_pieces = given["sizes"], given["categories"], int(given["n_pieces"])
    if not len(cells) or cells.shape != (len(sizes), len(sizes)) or len(categories) != len(sizes):
        raise ReportError(f"{_LACKS} {cells.shape} cells for {len(sizes)} sizes and {len(categories)} categories")
    ends = np.cumsum(sizes)
    labels = tuple(
        str(last) if size == 1 else f"{last - size + 1} to {last}"
        for size, last in zip(sizes, (ends - 1).tolist(), strict=True)
    )
    # A piece has 1 with itself, which would leave the other cells pale.
    apart = np.abs(cells[~np.eye(len(cells), dtype=bool)])
    limit = float(max(_LEAST_LIMIT, np.nanquantile(apart, 0.99))) if apart.size else 1.0
    return CouplingMap(cells, labels, tuple(categories), limit, n_pieces)


def coupling_histogram(row: Row) -> tuple[NDArray[np.float64], NDArray[np.int64], dict[str, float]]:
    """The distribution of a row: the bins from the first to the last that is not empty.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Returns:
        Edges, ``[bins + 1]``; pairs in each bin; the cosines from which pairs are ``moderate`` and ``high``.

    Raises:
        ReportError: The row lacks it.

    Example:
        >>> drawn = {"edges": [-1, 0, 0.5, 1], "counts": [0, 4, 0]}
        >>> result = {"distribution": drawn, "thresholds": {"high": 0.4, "moderate": 0.1}}
        >>> coupling_histogram({"result": result})[0].tolist()
        [0.0, 0.5]
    """
    with naming(_LACKS):
        given, thresholds = row["result"]["distribution"], row["result"]["thresholds"]
        edges = np.array(given["edges"], dtype=np.float64)
        counts = np.array(given["counts"], dtype=np.int64)
        known = {name: float(thresholds[name]) for name in ("moderate", "high")}
    if edges.shape != (len(counts) + 1,):
        raise ReportError(f"{_LACKS} {len(edges)} edges for {len(counts)} counts; one more is needed")
    full = np.flatnonzero(counts)
    if len(full):
        edges, counts = edges[full[0] : full[-1] + 2], counts[full[0] : full[-1] + 1]
    return edges, counts, known


def coupling_map_caption(row: Row) -> str:
    """How the pieces are ordered, and what a cell is.

    Example:
        >>> drawn = {"cells": [[1.0]], "sizes": [2], "categories": [None], "n_pieces": 2}
        >>> coupling_map_caption({"result": {"heat_map": drawn, "n_clusters": 1}}).split(". ")[1]
        'Each cell is a mean over blocks of up to 2 pieces, without pairs of a piece with itself'
    """
    drawn = coupling_map(row)
    result = row["result"]
    clusters = result.get("n_clusters")
    told = f", {format_number(clusters)} cluster{'' if clusters == 1 else 's'}" if clusters is not None else ""
    cell = "Each cell is one pair"
    if drawn.n_pieces > len(drawn.cells):
        largest = max(result["heat_map"]["sizes"])
        cell = f"Each cell is a mean over blocks of up to {largest} pieces, without pairs of a piece with itself"
    return (
        f"{drawn.n_pieces:,} pieces in the order of average linkage{told}. {cell}. "
        f"Colours end at {drawn.limit:.2g}, the 99th percentile of the cells beside the diagonal"
    )


def distribution_caption(row: Row) -> str:
    """Mean, spread and the shares beyond the thresholds.

    Example:
        >>> metrics = {"mean": 0.1, "std": 0.2, "high_share": 0.05, "moderate_share": 0.25, "negative_share": 0.5}
        >>> distribution_caption({"metrics": metrics, "result": {"n_pairs": 10}})
        '10 pairs: mean 0.1, standard deviation 0.2; 5 % high, 25 % moderate, 50 % below 0'
    """
    metrics, result = row.get("metrics", {}), row.get("result", {})
    shares = [
        f"{format_percent(metrics.get(f'{name}_share'))} {label}"
        for name, label in (("high", "high"), ("moderate", "moderate"), ("negative", "below 0"))
    ]
    mean, std = (format_number(metrics.get(name)) for name in ("mean", "std"))
    return f"{format_number(result.get('n_pairs'))} pairs: mean {mean}, standard deviation {std}; {', '.join(shares)}"


def quantity(row: Row) -> str:
    """What the cosine is of.

    Example:
        >>> quantity({"result": {"measure": "activation"}})
        'cosine of activations'
    """
    measure: Any = row.get("result", {}).get("measure", "gradient")
    return "cosine of activations" if measure == "activation" else "cosine of gradients"


def titled(title: str, row: Row) -> str:
    """A title with the step, where there was a training.

    Example:
        >>> titled("Coupling", {"step": 1200}), titled("Coupling", {"step": 0})
        ('Coupling, step 1,200', 'Coupling')
    """
    return f"{title}, step {row['step']:,}" if row.get("step") else title


_CHECKS = ("check", "value", "asked for", "", "what it means")
_PAIRS = ("cosine", "question", "answer", "question", "answer", "same")
_STATUS_STYLES = {"pass": "green", "warn": "yellow", "fail": "red", "not measured": "dim"}


def readiness_table(checks: Sequence[Mapping[str, Any]]) -> Table:
    """The checks for the console.

    Args:
        checks: Each ``check``, ``value``, ``threshold``, ``rule``, ``status``, ``meaning``.

    Raises:
        ReportError: A check lacks something.

    Example:
        >>> check = {"check": "pieces", "value": 9, "threshold": 50, "rule": "at least", "status": "warn"}
        >>> readiness_table([{**check, "meaning": "few", "next_step": "take more"}]).row_count
        1
    """
    lines: list[tuple[str | Text, ...]] = [
        (*cells, Text(status, style=_STATUS_STYLES.get(status, ""))) for *cells, status, _ in map(_check_cells, checks)
    ]
    return console_table("Can this be trusted?", _CHECKS[:-1], lines, box=SIMPLE_HEAD)


def readiness_lines(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the checks that did not pass mean, and what to do.

    Args:
        checks: As for ``readiness_table``.

    Example:
        >>> check = {"check": "pieces", "value": 9, "threshold": 50, "rule": "at least", "status": "warn"}
        >>> readiness_lines([{**check, "meaning": "Few.", "next_step": "Take more."}])
        ['pieces: Few. Next: Take more.']
    """
    return [f"{check['check']}: {_check_cells(check)[-1]}" for check in checks if check["status"] in ("warn", "fail")]


@register_table
def coupling_tables_html(row: Row) -> str:
    """Readiness and strongest pairs as parts of the page; nothing when the row has neither.

    Args:
        row: Its result may hold ``readiness`` (``verdict``, ``checks``) and ``top`` (pairs with their texts).

    Raises:
        ReportError: A check or a pair lacks something.

    Example:
        >>> pair = {"cosine": 0.5, "first": {"id": "1", "question": "<b>", "answer": "A"}, "same": ["answer"]}
        >>> page = coupling_tables_html({"result": {"top": [{**pair, "second": pair["first"]}]}})
        >>> "&lt;b&gt;" in page, coupling_tables_html({"result": {}})
        (True, '')
    """
    result, parts = row["result"], []
    readiness = result.get("readiness")
    if isinstance(readiness, Mapping) and readiness.get("checks"):
        heading = f"<h3>Can this be trusted? {escape(str(readiness.get('verdict', '')))}</h3>"
        parts.append(heading + texts_html(_CHECKS, map(_check_cells, readiness["checks"]), wrap="normal"))
    pairs = result.get("top")
    if isinstance(pairs, Sequence) and not isinstance(pairs, str) and pairs and "first" in pairs[0]:
        parts.append("<h3>Strongest pairs</h3>" + texts_html(_PAIRS, map(_pair_cells, pairs)))
    return "".join(parts)


def _check_cells(check: Mapping[str, Any]) -> tuple[str, ...]:
    with naming("a check of the coupling's readiness lacks or spoils"):
        meaning = check["meaning"]
        if check["status"] in ("warn", "fail") and check["next_step"]:
            meaning = f"{meaning} Next: {check['next_step']}"
        asked = f"{check['rule']} {format_number(check['threshold'])}"
        return check["check"], format_number(check["value"]), asked, check["status"], meaning


def _pair_cells(pair: Mapping[str, Any]) -> tuple[str, ...]:
    with naming("a pair of the coupling lacks or spoils"):
        texts = []
        for side in (pair["first"], pair["second"]):
            # Batches have no texts.
            asked = side["question"] if side["question"] is not None else side["id"]
            texts += [printable(asked), printable(side["answer"] or "")]
        return format_number(pair["cosine"]), *texts, ", ".join(pair["same"])


STATISTICS = {
    "mean": "mean cosine over pairs of two different pieces",
    "std": "standard deviation of the cosines",
    "maximum": "largest cosine",
    "high_share": "share of the pairs from the upper threshold on",
    "moderate_share": "share of the pairs between the thresholds",
    "negative_share": "share of the pairs below 0",
    "effective_rank": "exponential of the entropy of the normalised spectrum; the directions that gradients point in",
    "participation_ratio": "(sum of eigenvalues)^2 / sum of their squares",
    "n_clusters": "clusters of average linkage at the upper threshold",
    "n_failed": "pieces that failed",
}
"""What the statistics of a matrix of cosines mean, by the name of their metric."""

_MEANS = "mean cosine of pairs with the same {0}, of other pairs, and their difference"
CONTRASTS = {"answer": _MEANS.format("answer"), "category": _MEANS.format("category")}
CONTRASTS["group"] = _MEANS.format("group (question)")
"""Likewise of what pairs have in common."""

_KNOWLEDGE_COUPLING = Description(
    title="Knowledge coupling",
    measures=(
        "Which answers learn together: the cosine between the gradients of two answers' log-probabilities. A small "
        "step that makes one answer likelier moves the other in proportion to it."
    ),
    reading=(
        "A positive cosine says that learning one answer raises the other, a negative one that it lowers it, for a "
        "small step along the gradient. Look first at how much comes from equal answers: pairs that share their "
        "answer's tokens are coupled whatever they are about. The cosine does not say that a fact is safe where it "
        "is small, nor what a large edit does."
    ),
    metrics={**STATISTICS, **CONTRASTS},
    method=(
        "Coupling of two pieces of knowledge is the cosine of the gradients of their answers' log probabilities "
        "(compare Qin et al. 2024, arXiv 2407.12828)."
    ),
)
describe("knowledge_coupling", _KNOWLEDGE_COUPLING)
