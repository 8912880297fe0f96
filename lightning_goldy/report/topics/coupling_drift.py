"""The drift of a finetune's knowledge coupling, and what its gradients predicted of every piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.builders import (
    HeatMap,
    Line,
    Lines,
    Points,
    Scatter,
    arrange,
    heat_map,
    layered,
    lines,
    scatter,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, ReportError, Row, register_figure, register_table, register_text
from lightning_goldy.report.formatting import format_number, format_percent, printable, texts_html
from lightning_goldy.report.reading import naming
from lightning_goldy.report.topics.coupling import (
    CONTRASTS,
    STATISTICS,
    chart_coupling_distribution,
    chart_coupling_map,
)

CLASSES = ("edited", "rehearsed", "untouched")
"""The order of the classes of pieces."""
_LACKS = "a row of coupling_drift lacks what its figure needs:"
# Below this the colours would show rounding.
_LEAST_LIMIT = 0.01
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
    limit = max(_LEAST_LIMIT, float(np.abs(cells).max(initial=0.0)))
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
    with naming(_LACKS):
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
    with naming(_LACKS):
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
    with naming(_LACKS):
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
        raise ReportError(f"{_LACKS} {error!r}") from error


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
    headline=("pearson", "measured_change/untouched", "exact/edited", "exact/untouched"),
    method=(
        "Coupling of two pieces of knowledge is the cosine of the gradients of their answers' log probabilities "
        "(compare Qin et al. 2024, arXiv 2407.12828); it was compared with the base's, and the first order with the "
        "measured change."
    ),
)
describe("coupling_drift", _COUPLING_DRIFT)
