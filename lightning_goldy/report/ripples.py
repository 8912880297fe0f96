"""What the figures of ripple effects draw, taken from rows and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.registry import ReportError, Row

PREDICTORS = {"first_order": "first order: g . delta", "coupling": "coupling: cos |g| |delta|"}


@dataclass(frozen=True)
class Scatter:
    """Points of one distance class under one prediction.

    Args:
        name: The class.
        label: The class with its correlation.
        predicted: Nats.
        measured: Nats.
    """

    name: str
    label: str
    predicted: tuple[float, ...]
    measured: tuple[float, ...]


def scatters(row: Row, predictor: str) -> tuple[Scatter, ...]:
    """The points by class, in the order of the row's agreement; pairs that are not finite are left to the caption.

    Args:
        row: Of the analysis ``ripple_effects``.
        predictor: ``first_order`` or ``coupling``.

    Raises:
        ReportError: The row lacks them.

    Example:
        >>> each = {"predictor": "coupling", "group": "near", "n": 1, "pearson": None}
        >>> points = {"coupling": [0.5], "measured": [0.25], "class": ["near"]}
        >>> scatters({"result": {"points": points, "agreement": [each]}}, "coupling")
        (Scatter(name='near', label='near (n = 1)', predicted=(0.5,), measured=(0.25,)),)
    """
    try:
        points, agreement = row["result"]["points"], row["result"]["agreement"]
        columns = list(zip(points[predictor], points["measured"], points["class"], strict=True))
        found = []
        for each in agreement:
            if each["predictor"] != predictor or each["group"] == "all":
                continue
            mine = [(x, y) for x, y, name in columns if name == each["group"] and x is not None and y is not None]
            predicted, measured = tuple(x for x, _ in mine), tuple(y for _, y in mine)
            found.append(Scatter(each["group"], _label(each), predicted, measured))
        return tuple(found)
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"a row of ripple_effects lacks what its figure needs: {error}") from error


def overall(row: Row, predictor: str) -> str:
    """Name and correlations of a prediction over all classes.

    Raises:
        ReportError: The row lacks them.
    """
    try:
        for each in row["result"]["agreement"]:
            if (each["predictor"], each["group"]) == (predictor, "all"):
                numbers = f"r = {_short(each['pearson'])}, Spearman {_short(each['spearman'])}"
                return f"{PREDICTORS[predictor]}\n{numbers}"
    except (KeyError, TypeError) as error:
        raise ReportError(f"a row of ripple_effects lacks what its figure needs: {error}") from error
    raise ReportError(f"a row of ripple_effects lacks the agreement of {predictor!r}")


def identity(groups: Sequence[Scatter]) -> tuple[float, float]:
    """Ends of the line on which predicted equals measured, over all points.

    Example:
        >>> identity([Scatter("near", "near", (0.0, 1.0), (-2.0, 0.5))])
        (-2.0, 1.0)
    """
    values = [value for group in groups for value in (*group.predicted, *group.measured)]
    return min(values, default=0.0), max(values, default=0.0)


def ripple_caption(row: Row) -> str:
    """What was edited and how to read the points.

    Example:
        >>> result = {"editor": "finetune", "n_edits": 2, "n_pieces": 5, "n_pairs": 8, "points": {"measured": [0.5]}}
        >>> ripple_caption({"result": result, "metrics": {"new_answers_exact": 0.5}}).split(". ")[0]
        '2 edits by finetune, each measured on 5 pieces; 50 % of the new answers are exact; 1 of 8 pairs drawn'
    """
    result, metrics = row.get("result", {}), row.get("metrics", {})
    edits, pieces = (_counted(result.get(f"n_{name}s"), name) for name in ("edit", "piece"))
    share = metrics.get("new_answers_exact")
    learned = "" if share is None else f"; {format_number(round(100 * share, 1))} % of the new answers are exact"
    measured = result.get("points", {}).get("measured", [])
    drawn, pairs = sum(value is not None for value in measured), result.get("n_pairs")
    part = "" if drawn == pairs else f"; {drawn} of {format_number(pairs)} pairs drawn"
    return (
        f"{edits} by {result.get('editor', '?')}, each measured on {pieces}{learned}{part}. "
        "Points on the line are predicted exactly; off it, the edit did what the first order does not know."
    )


def _counted(count: int | None, name: str) -> str:
    return f"{format_number(count)} {name}{'' if count == 1 else 's'}"


def _label(each: Any) -> str:
    shown = "" if each["pearson"] is None else f"r = {_short(each['pearson'])}, "
    return f"{each['group']} ({shown}n = {format_number(each['n'])})"


def _short(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.2f}"


_MEANINGS = {
    "pearson": "linear correlation of predicted and measured changes of log p; by distance class",
    "spearman": "the same of their ranks: whether the order of the pieces is right",
    "sign_agreement": "share of the pairs where both have the same sign",
    "slope": "of measured on predicted changes; 1 = the prediction has the right size",
}

describe(
    "ripple_effects",
    Description(
        title="Ripple effects",
        measures=(
            "What an edit of one piece of knowledge does to the others: the change of each answer's log-probability, "
            "predicted from gradients and measured after the edit was made; the edit is then undone."
        ),
        reading=(
            "Look at Pearson and Spearman together: a few pieces with large changes make a high Pearson even where the "
            "order of the others is not predicted. A slope far from 1 means that the edit is no small step."
        ),
        metrics={
            **{f"first_order_{name}": f"g . delta: {meaning}" for name, meaning in _MEANINGS.items()},
            **{f"coupling_{name}": f"cosine x norms: {meaning}" for name, meaning in _MEANINGS.items()},
            "measured_change": "mean measured change of log p, nats; by distance class",
            "new_answers_exact": "share of the edits after which the new answer is the most probable one",
            "new_answer_change": "mean change of the new answers' log p, nats",
        },
    ),
)
