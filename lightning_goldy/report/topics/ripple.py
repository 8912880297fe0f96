"""Ripple effects: predicted against measured changes of every answer by edits of others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_goldy.report.builders import Points, Scatter, arrange, scatter
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, ReportError, Row, naming, register_figure
from lightning_goldy.report.formatting import format_number

PREDICTORS = {"first_order": "first order: g . delta", "coupling": "coupling: cos |g| |delta|"}
_LACKS = "a row of ripple_effects lacks what its figure needs:"


@register_figure("ripple_effects", "prediction", heading="Predicted and measured change")
def chart_ripple_effects(row: Row) -> Figure:
    """Predicted against measured change of each piece by each edit, coloured by distance class.

    Args:
        row: Of the analysis ``ripple_effects``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> points = {"first_order": [0.5], "coupling": [0.4], "measured": [0.25], "class": ["near"]}
        >>> numbers = {"n": 1, "pearson": None, "spearman": None}
        >>> agreement = [{"predictor": p, "group": g, **numbers} for p in list(points)[:2] for g in ("all", "near")]
        >>> chart_ripple_effects({"result": {"points": points, "agreement": agreement}}).data["points_0"]["group"]
        ['near (n = 1)']
    """
    panels = []
    for predictor, title in PREDICTORS.items():
        axes = "predicted change of log p, nats", "measured change of log p, nats"
        style = Scatter(*axes, "piece", diagonal=True, size=(480, 320), title=title)
        panels.append(scatter(scatters(row, predictor), style))
    overall = "; ".join(f"{overall_agreement(row, predictor)} by the {predictor}" for predictor in PREDICTORS)
    caption = f"{ripple_caption(row)} Over all classes {overall.replace('_', ' ')}."
    warning = row["result"].get("warning")
    return arrange(panels, columns=2, caption=f"{caption} {_sentence(warning)}" if warning else caption)


def scatters(row: Row, predictor: str) -> dict[str, Points]:
    """The points of each distance class, labelled with its correlation, in the order of the row's agreement.

    Pairs that are not finite are left to the caption.

    Args:
        row: Of the analysis ``ripple_effects``.
        predictor: ``first_order`` or ``coupling``.

    Raises:
        ReportError: The row lacks them.

    Example:
        >>> entry = {"predictor": "coupling", "group": "near", "n": 1, "pearson": None}
        >>> points = {"coupling": [0.5], "measured": [0.25], "class": ["near"], "piece": ["a"]}
        >>> scatters({"result": {"points": points, "agreement": [entry]}}, "coupling")
        {'near (n = 1)': Points(x=(0.5,), y=(0.25,), names=('a',))}
    """
    with naming(_LACKS):
        points, agreement = row["result"]["points"], row["result"]["agreement"]
        names = points.get("piece", [""] * len(points["measured"]))
        columns = list(zip(points[predictor], points["measured"], names, points["class"], strict=True))
        groups = {}
        for entry in agreement:
            if entry["predictor"] == predictor and entry["group"] != "all":
                drawn = [
                    (x, y, name) for x, y, name, group in columns if group == entry["group"] and None not in (x, y)
                ]
                groups[_label(entry)] = Points(*(tuple(point[at] for point in drawn) for at in range(3)))
        return groups


def overall_agreement(row: Row, predictor: str) -> str:
    """Correlations of a prediction over all classes.

    Raises:
        ReportError: The row lacks them.

    Example:
        >>> entry = {"predictor": "coupling", "group": "all", "pearson": 0.5, "spearman": None}
        >>> overall_agreement({"result": {"agreement": [entry]}}, "coupling")
        'r = 0.50, Spearman undefined'
    """
    with naming(_LACKS):
        for entry in row["result"]["agreement"]:
            if (entry["predictor"], entry["group"]) == (predictor, "all"):
                return f"r = {_short(entry['pearson'])}, Spearman {_short(entry['spearman'])}"
    raise ReportError(f"a row of ripple_effects lacks the agreement of {predictor!r}")


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
        "Points on the line are predicted exactly; off it, the edit did what the first order does not know. "
        f"{slopes_told(row)}"
    ).strip()


def slopes_told(row: Row) -> str:
    """Learning rates and slopes of the edits, with the range in which an edit is a small step; empty without them.

    Example:
        >>> result = {"slopes": [0.9, 1.1], "learning_rates": [0.01, 0.005], "linear_range": [0.8, 1.25]}
        >>> slopes_told({"result": {**result, "scaled": True}})
        'Learning rate 0.005 to 0.01, halved until linear; slopes 0.9 to 1.1 (a small step: 0.8 to 1.25).'
    """
    result = row.get("result", {})
    slopes, rates = _ends(result.get("slopes", ())), _ends(result.get("learning_rates", ()))
    if not slopes:
        return ""
    halved = ", halved until linear" if result.get("scaled") else ""
    low, high = result["linear_range"]
    steps = f"Learning rate {rates}{halved}; slopes" if rates else "Slopes"
    return f"{steps} {slopes} (a small step: {low} to {high})."


def _ends(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    ends = dict.fromkeys(f"{end:.3g}" for end in (min(known), max(known))) if known else ()
    return " to ".join(ends)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _counted(count: int | None, name: str) -> str:
    return f"{format_number(count)} {name}{'' if count == 1 else 's'}"


def _label(entry: Mapping[str, Any]) -> str:
    shown = "" if entry["pearson"] is None else f"r = {_short(entry['pearson'])}, "
    return f"{entry['group']} ({shown}n = {format_number(entry['n'])})"


def _short(value: float | None) -> str:
    return "undefined" if value is None or not math.isfinite(value) else f"{value:.2f}"


_MEANINGS = {
    "pearson": "linear correlation of predicted and measured changes of log p; by distance class",
    "spearman": "the same of their ranks: whether the order of the pieces is right",
    "sign_agreement": "share of the pairs where both have the same sign",
    "slope": "of measured on predicted changes; 1 = the prediction has the right size",
}

_RIPPLE_EFFECTS = Description(
    title="Ripple effects",
    measures=(
        "What an edit of one piece of knowledge does to the others: the change of each answer's log-probability, "
        "predicted from gradients and measured after the edit was made; the edit is then undone."
    ),
    reading=(
        "Look at Pearson and Spearman together: a few pieces with large changes make a high Pearson even where the "
        "order of the others is not predicted. A slope outside 0.8 to 1.25 means that the edit is no small step."
    ),
    metrics={
        **{f"first_order_{name}": f"g . delta: {meaning}" for name, meaning in _MEANINGS.items()},
        **{f"coupling_{name}": f"cosine x norms: {meaning}" for name, meaning in _MEANINGS.items()},
        "measured_change": "mean measured change of log p, nats; by distance class",
        "smallest_slope": "of measured on predicted changes, the least of the edits'; small steps: 0.8 to 1.25",
        "largest_slope": "the same of the edit where it is largest",
        "new_answers_exact": "share of the edits after which the new answer is the most probable one",
        "new_answer_change": "mean change of the new answers' log p, nats",
    },
    method=(
        "The effect of an edit on other pieces was predicted to first order by gradients and measured by making the "
        "edit and undoing it (queries after Cohen et al. 2023, arXiv 2307.12976)."
    ),
)
describe("ripple_effects", _RIPPLE_EFFECTS)
