"""The Taylor expansion of the change, and the losses of variants that are trained side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_goldy.report.builders import Bars, Line, Lines, arrange, bars, layered, lines
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, ReportError, Row, naming, register_figure
from lightning_goldy.report.formatting import format_number

_LACKS = "a row of taylor_diff lacks what its figure needs:"


@register_figure("taylor_diff", "prediction", heading="Actual and predicted change", over="run")
def chart_taylor_prediction(rows: Sequence[Row]) -> Figure:
    """Actual and predicted change of the loss over the run, and the nonlinearity with the bands of the regimes.

    Args:
        rows: Of the analysis ``taylor_diff``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> metrics = {"base_loss": 2.0, "change": -0.5, "loss/order1": 1.6, "nonlinearity": 0.2}
        >>> result = {"thresholds": {"lazy": 0.1, "nonlinear": 0.5}, "regime": "weakly nonlinear"}
        >>> figure = chart_taylor_prediction([{"step": 1, "metrics": metrics, "result": result}])
        >>> figure.data["points_0"]["line"], figure.data["bands_1"]["regime"]
        (['actual', 'order 1'], ['lazy', 'weakly nonlinear', 'nonlinear'])
    """
    found, thresholds = prediction(rows)
    steps, actual, nonlinearity = (found.pop(name) for name in ("steps", "change", "nonlinearity"))
    orders = {name.replace("order", "order "): Line(steps, line, shape="dashed") for name, line in found.items()}
    upper = lines({"actual": Line(steps, actual), **orders}, Lines(x="", y="change of the loss, nats", height=240))
    style = Lines(y="nonlinearity", scale="linear", zero=True, height=160)
    lower = _with_regimes(lines({"nonlinearity": Line(steps, nonlinearity)}, style), thresholds)
    return arrange([_with_points(upper), lower], caption=prediction_caption(rows[-1]))


@register_figure("taylor_diff", "shares", heading="Who carries the step")
def chart_taylor_shares(row: Row) -> Figure | str:
    """What each part of the model contributes to the first-order change of the loss and of the logits.

    Args:
        row: Of the analysis ``taylor_diff``.

    Returns:
        The figure, or that no shares were asked for.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> result = {"loss_shares": {"h.0": -0.5}, "function_shares": {"h.0": 1.0}}
        >>> chart_taylor_shares({"result": result}).data["bars_0"]["value"]
        [-0.5]
    """
    found = shares(row)
    if not found:
        return shares_caption(row)
    loss, function = ({name: pair[place] for name, pair in found.items()} for place in (0, 1))
    panels = [bars(loss, Bars("g . Delta, nats"))]
    if any(value is not None for value in function.values()):
        panels.append(bars(function, Bars("part of J Delta", colour=1, labels=False)))
    return arrange(panels, columns=len(panels), caption=shares_caption(row))


@register_figure("variant_losses", "losses", heading="The losses over the run", over="run")
def chart_variant_losses(rows: Sequence[Row]) -> Figure:
    """The loss of every variant over the run.

    Args:
        rows: Of the analysis ``variant_losses``, ascending.

    Raises:
        ReportError: The last row has no losses.
        ImportError: altair is not installed.

    Example:
        >>> rows = [{"step": step, "metrics": {"loss/tangent": 2.0 - step}, "result": {}} for step in (0, 1)]
        >>> chart_variant_losses(rows).data["points"]["y"]
        [2.0, 1.0]
    """
    return lines(variant_lines(rows), Lines(y="loss, nats", height=280), caption=variant_caption(rows))


def prediction(rows: Sequence[Row]) -> tuple[dict[str, list[Any]], tuple[float, float]]:
    """The lines over some rows, and the thresholds of the last: lazy below the first, nonlinear from the second on.

    Returns:
        ``steps``, ``change`` since the base, the one predicted by ``order1`` and so on (nats), ``nonlinearity``.

    Raises:
        ReportError: A row lacks something.
    """
    with naming(_LACKS):
        thresholds, metrics = rows[-1]["result"]["thresholds"], [row["metrics"] for row in rows]
        found = {"steps": [row["step"] for row in rows]}
        found |= {name: [each[name] for each in metrics] for name in ("change", "nonlinearity")}
        for name in sorted({name for each in metrics for name in each if name.startswith("loss/order")}):
            pairs = [(each.get(name), each["base_loss"]) for each in metrics]
            changes = [None if None in pair else pair[0] - pair[1] for pair in pairs]
            found[name.removeprefix("loss/")] = changes
        return found, (float(thresholds["lazy"]), float(thresholds["nonlinear"]))


def prediction_caption(row: Row) -> str:
    """What a reader should see."""
    metrics, regime = row.get("metrics", {}), row["result"].get("regime", "?")
    value = metrics.get("nonlinearity")
    shown = "" if value is None else f" (nonlinearity {format_number(value)})"
    return (
        f"The step is {regime}{shown}. Where the first order follows the actual change the finetune is still a small "
        "step from its base; in the upper band its linear picture no longer holds."
    )


def shares(row: Row) -> dict[str, tuple[float | None, float | None]]:
    """By group the part of g . Delta (nats) and of J Delta (a fraction), in the model's order.

    Raises:
        ReportError: The row lacks them.
    """
    with naming(_LACKS):
        loss, function = row["result"]["loss_shares"], row["result"]["function_shares"]
        return {name: (loss.get(name), function.get(name)) for name in dict.fromkeys([*loss, *function])}


def shares_caption(row: Row) -> str:
    """What a reader should see."""
    found = {name: value for name, (value, _) in shares(row).items() if value is not None}
    if not found:
        return "No shares were asked for (by=None)."
    name, value = max(found.items(), key=lambda pair: abs(pair[1]))
    return (
        f"To first order {name} changes the loss most, by {format_number(value)} nats. Parts may have opposite signs: "
        "they add up to the whole first-order change."
    )


_LABELS = {
    "full": "full",
    "frozen_attention": "attention frozen",
    "linear_mlp": "MLPs linear",
    "tangent": "all linear (tangent)",
}


def variant_lines(rows: Sequence[Row]) -> dict[str, Line]:
    """The loss of every variant of the last row over the run, by its label.

    Raises:
        ReportError: The row has no losses.

    Example:
        >>> variant_lines([{"step": 5, "metrics": {"loss/tangent": None}}])
        {'all linear (tangent)': Line(x=[5], y=[None], low=None, high=None, shape='line', notes=())}
    """
    names = [name for name in rows[-1].get("metrics", {}) if name.startswith("loss/")]
    if not names:
        raise ReportError("a row of variant_losses needs metrics that begin with 'loss/'")
    steps = [row["step"] for row in rows]
    labels = {name: name.removeprefix("loss/") for name in names}
    return {
        _LABELS.get(label, label): Line(steps, [row["metrics"].get(name) for row in rows])
        for name, label in labels.items()
    }


def variant_caption(rows: Sequence[Row]) -> str:
    """What the losses are means over, and the latest ones.

    Example:
        >>> variant_caption([{"step": 5, "metrics": {"loss/full": 1.5}, "result": {"n_targets": 40}}])
        'mean loss over 40 targets of the probe, nats; latest: full 1.5'
    """
    latest = [f"{label} {format_number(line.y[-1])}" for label, line in variant_lines(rows).items()]
    count = format_number(rows[-1]["result"].get("n_targets"))
    return f"mean loss over {count} targets of the probe, nats; latest: {', '.join(latest)}"


def _with_points(figure: Figure) -> Figure:
    """Every line with its points, dashed ones too: at one checkpoint there is nothing else to see."""
    layer = {name: value for name, value in figure.bare()["layer"][0].items() if name != "transform"}
    return layered(figure, [{**layer, "mark": {"type": "point", "filled": True, "size": 22, "opacity": 1}}])


def _with_regimes(figure: Figure, thresholds: tuple[float, float]) -> Figure:
    """The bands of the regimes behind the nonlinearity, with their names."""
    known = [value for value in figure.data["points"]["y"] if value is not None]
    ends = (0.0, *thresholds, max([1.2 * thresholds[1], *(1.1 * value for value in known)]))
    bands = {"low": ends[:-1], "high": ends[1:], "regime": ["lazy", "weakly nonlinear", "nonlinear"]}
    data, y = {"name": "bands"}, {"field": "low", "type": "quantitative"}
    rectangles = {
        "data": data,
        "mark": {"type": "rect", "color": "#7a6bd1", "tooltip": False},
        "encoding": {
            "y": y,
            "y2": {"field": "high"},
            "opacity": {"field": "regime", "type": "ordinal", "legend": None, "sort": None}
            | {"scale": {"range": [0.08, 0.2, 0.32]}},
        },
    }
    names = {
        "data": data,
        "transform": [{"calculate": "(datum.low + datum.high) / 2", "as": "middle"}],
        "mark": {"type": "text", "align": "left", "fontSize": 10},
        "encoding": {"x": {"value": 5}, "y": {**y, "field": "middle"}, "text": {"field": "regime"}},
    }
    banded = layered(figure, below=[rectangles, names], data={"bands": bands})
    for layer in banded.bare()["layer"][2:]:
        layer["encoding"]["y"]["axis"]["grid"] = False
    return banded


_TAYLOR_DIFF = Description(
    title="Taylor expansion around the base",
    measures=(
        "Whether the finetune is still a small step: what the derivatives at the base predict for the loss and the "
        "logits at the present weights, against what they are."
    ),
    reading=(
        "Where the first order predicts the change (a nonlinearity near 0) the finetune is lazy: gradients at the "
        "base tell all of it. Near 1 and above, the first order predicts nothing, and arguments that linearise the "
        "model around its base do not hold for this run."
    ),
    metrics={
        "base_loss": "loss at the base, nats",
        "loss": "mean loss of the model as it is, nats; by order, the one predicted",
        "change": "loss now minus loss at the base, nats",
        "residual": "actual minus predicted loss, nats",
        "relative_error": "distance of the logits from what stands for them over how far they moved; the predicted",
        "kl_divergence": "mean KL(model || what stands in for it), nats per target; the prediction",
        "top1_agreement": "share of the positions where both prefer the same token",
        "first_order": "g . Delta, nats",
        "second_order": "half the curvature along the step, nats",
        "second_to_first": "size of the second-order term over the first",
        "step_norm": "||Delta|| from the base of the expansion",
        "gradient_norm": "||g|| at the base",
        "nonlinearity": "relative error of the first order, by which the regime is told",
    },
    # Of the first order it is the nonlinearity.
    headline=("nonlinearity", "loss", "relative_error/order2", "relative_error/order3"),
    method=(
        "The loss and the logits of the finetuned model were expanded around the base in the change of the weights, "
        "by exact directional derivatives (the lazy regime: Chizat et al. 2019, arXiv 1812.07956)."
    ),
)
describe("taylor_diff", _TAYLOR_DIFF)
_VARIANT_LOSSES = Description(
    title="Variants trained side by side",
    measures=(
        "The loss of one model that is trained on the same batches in full, with the attention patterns of its "
        "start, with MLPs that are linear around their start, and linear altogether (its tangent)."
    ),
    reading=(
        "Where a line lies on the full model's, the training does not need what that variant lacks; the distance "
        "between them is what it is worth."
    ),
    metrics={"loss": "mean loss of the model as it is, nats; over the probe's targets, of each variant"},
    headline=("loss/*",),
)
describe("variant_losses", _VARIANT_LOSSES)
