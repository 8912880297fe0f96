"""Knowledge coupling: which pieces are coupled, how far that drifts over a finetune, and what gradients predicted."""

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
    Line,
    Lines,
    Points,
    Scatter,
    arrange,
    columns_of,
    heat_map,
    histogram,
    layered,
    lines,
    plain_spec,
    scatter,
    tips,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import (
    Figure,
    ReportError,
    Row,
    naming,
    register_figure,
    register_table,
    register_text,
    require,
)
from lightning_goldy.report.formatting import console_table, format_number, format_percent, printable, texts_html

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


CLASSES = ("edited", "rehearsed", "untouched")
"""The order of the classes of pieces."""
_DRIFT_LACKS = "a row of coupling_drift lacks what its figure needs:"
# Below this the colours would show rounding.
_LEAST_DRIFT_LIMIT = 0.01
_MOVED = ("fact", "question", "answer", "log p before", "log p now", "predicted", "rank before", "rank now")


@register_figure("coupling_drift", "prediction", heading="Predicted and measured change")
def chart_drift_prediction(row: Row) -> Figure:
    """Predicted against measured change of each piece since the base, coloured by class.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> points = {"piece": ["a"], "predicted": [0.5], "measured": [0.25], "class": ["edited"]}
        >>> numbers = {"n": 1, "pearson": None, "spearman": None, "slope": None}
        >>> result = {"points": points, "agreement": [{"group": name, **numbers} for name in ("all", "edited")]}
        >>> chart_drift_prediction({"result": result}).data["points"]["group"]
        ['edited (n = 1)']
    """
    style = Scatter(
        "predicted change of log p, g . Delta, nats",
        "measured change of log p, nats",
        point="piece",
        diagonal=True,
        size=(520, 420),
    )
    # Untouched facts are many and would hide the edited ones, which are drawn last.
    groups = dict(reversed(drift_scatters(row).items()))
    return scatter(groups, style, caption=prediction_caption(row))


@register_figure("coupling_drift", "drift", heading="Drift over the run", over="run")
def chart_drift_lines(rows: Sequence[Row]) -> Figure:
    """Drift of the cosines over the run, and mean changes of log p by class beside what was predicted.

    Args:
        rows: Of the analysis ``coupling_drift``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> metrics = {"mean_absolute_difference": 0.1, "correlation": 0.9, "measured_change/untouched": 0.2}
        >>> row = {"step": 4, "metrics": metrics, "result": {"classes": {"untouched": 3}}}
        >>> chart_drift_lines([row]).data["points_2"]["line"]
        ['untouched', 'untouched, predicted']
    """
    found = drift_lines(rows)
    panels = [
        lines({label: (found.steps, values)}, Lines(x="", y=label, scale="linear", height=90))
        for label, values in (("mean absolute difference", found.difference), ("correlation", found.correlation))
    ]
    return arrange([*panels, _change_lines(found)], caption=lines_caption(rows[-1]))


@register_figure("coupling_drift", "difference", heading="Where the coupling moved")
def chart_drift_map(row: Row) -> Figure:
    """Heat map of the differences of the cosines from those of the base, of the pieces that drifted most.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> drifted = {"ids": ["a", "b"], "classes": ["edited", "untouched"], "difference": [[0, 0.5], [0.5, 0]]}
        >>> chart_drift_map({"result": {"drifted": drifted}}).data["cells"]["value"]
        [0.0, 0.5, 0.5, 0.0]
    """
    names, cells = drift_map(row)
    limit = max(_LEAST_DRIFT_LIMIT, float(np.abs(cells).max(initial=0.0)))
    style = HeatMap(
        "difference", rows="piece", columns="piece", colours="diverging", numbers=False, cell=(13, 13), scale="drift"
    )
    return heat_map(cells, names, names, style, extent=(-limit, limit), caption=drift_map_caption(row))


register_figure("coupling_drift", "heat_map", heading="Which pieces are coupled")(chart_coupling_map)
register_figure("coupling_drift", "distribution", heading="How much is coupled")(chart_coupling_distribution)


def _change_lines(found: DriftLines) -> Figure:
    """Measured changes, and predicted ones dashed, in one colour for each class, as among the points."""
    changes: dict[str, Line] = {}
    for name in reversed([*found.measured]):
        changes[name] = Line(found.steps, found.measured[name])
        changes[f"{name}, predicted"] = Line(found.steps, found.predicted[name], shape="dashed")
    figure = lines(changes, Lines(y="mean change of log p, nats", scale="linear", height=200))
    points = figure.data["points"]
    groups = [line.removesuffix(", predicted") for line in points["line"]]
    figure = layered(figure, data={"points": {**points, "group": groups}})
    for layer in figure.bare()["layer"]:
        layer["encoding"]["color"]["field"] = "group"
    return figure


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


def drift_scatters(row: Row) -> dict[str, Points]:
    """Predicted and measured changes by class, edited ones first, under the class's name, agreement and size.

    Raises:
        ReportError: The row lacks them.

    Example:
        >>> points = {"predicted": [0.5], "measured": [0.25], "class": ["untouched"]}
        >>> agreement = [{"group": "untouched", "n": 1, "pearson": None, "spearman": None}]
        >>> drift_scatters({"result": {"points": points, "agreement": agreement}})["untouched (n = 1)"].y
        (0.25,)
    """
    with naming(_DRIFT_LACKS):
        points, agreement = row["result"]["points"], row["result"]["agreement"]
        pieces = points.get("piece") or [""] * len(points["class"])
        columns = list(zip(points["predicted"], points["measured"], pieces, points["class"], strict=True))
        groups = {entry["group"]: entry for entry in agreement if entry["group"] != "all"}
        found = {}
        for name in sorted(groups, key=_place):
            mine = [column[:3] for column in columns if column[3] == name and None not in column[:2]]
            label = f"{name} ({_correlations(groups[name])}n = {format_number(groups[name]['n'])})"
            found[label] = Points(*(tuple(values) for values in zip(*mine, strict=True))) if mine else Points((), ())
        return found


def drift_lines(rows: Sequence[Row]) -> DriftLines:
    """The lines of a run, classes in their order.

    Args:
        rows: Of the analysis ``coupling_drift``, ascending; the last one says which classes there are.

    Raises:
        ReportError: A row lacks them.

    Example:
        >>> metrics = {"mean_absolute_difference": 0.1, "measured_change/untouched": 0.2, "measured_change/edited": 1.5}
        >>> row = {"step": 4, "metrics": metrics, "result": {"classes": {"untouched": 3, "edited": 1}}}
        >>> found = drift_lines([row])
        >>> found.measured, found.correlation
        ({'edited': (1.5,), 'untouched': (0.2,)}, (None,))
    """
    with naming(_DRIFT_LACKS):
        classes = sorted(rows[-1]["result"]["classes"], key=_place)
        steps = tuple(row["step"] for row in rows)

        def line(metric: str) -> tuple[float | None, ...]:
            return tuple(row["metrics"].get(metric) for row in rows)

        measured, predicted = (
            {name: line(f"{metric}/{name}") for name in classes} for metric in ("measured_change", "predicted_change")
        )
        return DriftLines(steps, line("mean_absolute_difference"), line("correlation"), measured, predicted)


def drift_map(row: Row) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """The pieces that drifted most, with a mark on edited ones, and the differences of their cosines, ``[n, n]``.

    Raises:
        ReportError: The row lacks it.

    Example:
        >>> drifted = {"ids": ["a", "b"], "classes": ["edited", "untouched"], "difference": [[0, 0.5], [0.5, 0]]}
        >>> drift_map({"result": {"drifted": drifted}})[0]
        ('a *', 'b')
    """
    with naming(_DRIFT_LACKS):
        given = row["result"]["drifted"]
        names = tuple(
            f"{name} *" if kind == "edited" else name for name, kind in zip(given["ids"], given["classes"], strict=True)
        )
        return names, np.array(given["difference"], dtype=np.float64).reshape(len(names), len(names))


def _correlations(agreement: Mapping[str, Any]) -> str:
    pearson, spearman = agreement["pearson"], agreement["spearman"]
    return "" if pearson is None else f"r = {pearson:.2f}, Spearman {spearman:.2f}, "


def _place(name: str) -> tuple[int, str]:
    return (CLASSES.index(name) if name in CLASSES else len(CLASSES)), name


def prediction_caption(row: Row) -> str:
    """How well the first order predicted, over all pieces.

    Example:
        >>> agreement = [{"group": "all", "n": 9, "pearson": 0.5, "spearman": 0.25, "slope": 2.0}]
        >>> row = {"metrics": {"sign_agreement": 0.75}, "result": {"agreement": agreement}}
        >>> prediction_caption(row).partition(". Points")[0]
        '9 pieces: r = 0.50, Spearman 0.25; same sign 75 %; slope 2'
    """
    try:
        every = next(entry for entry in row["result"]["agreement"] if entry["group"] == "all")
        signs = format_percent(row.get("metrics", {}).get("sign_agreement"))
        told = _correlations(every).removesuffix(", ") or "no correlation defined"
        size = format_number(every["slope"])
        return (
            f"{format_number(every['n'])} pieces: {told}; same sign {signs}; slope {size}. Points on the "
            "line are predicted exactly by the gradient at the base; off it, the finetune was no small step."
        )
    except (KeyError, TypeError, StopIteration) as error:
        raise ReportError(f"{_DRIFT_LACKS} {error!r}") from error


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


def drift_map_caption(row: Row) -> str:
    """Which pieces are shown.

    Example:
        >>> drifted = {"ids": ["a"], "classes": ["edited"], "difference": [[0]]}
        >>> drift_map_caption({"result": {"drifted": drifted, "n_pieces": 9}})
        'cosine now minus cosine at the base; the 1 of 9 pieces that drifted most, alike ones together; * edited'
    """
    count, pieces = len(drift_map(row)[0]), format_number(row["result"].get("n_pieces"))
    which = "all pieces" if format_number(count) == pieces else f"the {count} of {pieces} pieces that drifted most"
    return f"cosine now minus cosine at the base; {which}, alike ones together; * edited"


@register_text("moved")
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
    lines = [_MOVED, *(tuple(cell.replace("`", "'") for cell in _moved_cells(each)) for each in moved)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_MOVED))]
    told = ["    " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(["Untouched facts that moved most, log p in nats\n", *(line.rstrip() for line in told)])


@register_table
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
    table = texts_html(_MOVED, map(_moved_cells, moved), numbers_from=3)
    return f"<h3>Untouched facts that moved most</h3>{table}"


def _moved_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    with naming("a fact that moved lacks or spoils"):
        texts = [printable(entry[name]) for name in ("id", "question", "answer")]
        names = ("before", "after", "predicted", "rank_before", "rank_after")
        return (*texts, *(format_number(entry[name]) for name in names))


_COUPLING_DRIFT = Description(
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
    headline=("measured_change/untouched", "exact/edited", "exact/untouched", "pearson"),
    method=(
        "Coupling of two pieces of knowledge is the cosine of the gradients of their answers' log probabilities "
        "(compare Qin et al. 2024, arXiv 2407.12828); it was compared with the base's, and the first order with the "
        "measured change."
    ),
)
describe("coupling_drift", _COUPLING_DRIFT)
