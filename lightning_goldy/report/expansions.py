"""What the figures of a Taylor comparison draw, taken from rows and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.registry import ReportError, Row


@dataclass(frozen=True)
class Prediction:
    """Lines over the run.

    Args:
        steps: Optimizer steps.
        actual: Change of the loss since the base, nats; None where there is none.
        orders: The predicted change by order, nats.
        nonlinearity: Relative error of the first order.
        lazy: Below this nonlinearity the step is lazy.
        nonlinear: From this on it is nonlinear.
    """

    steps: Sequence[int]
    actual: Sequence[float | None]
    orders: dict[int, Sequence[float | None]]
    nonlinearity: Sequence[float | None]
    lazy: float
    nonlinear: float


def prediction(row: Row) -> Prediction:
    """The lines of a row.

    Raises:
        ReportError: The row lacks them.
    """
    try:
        lines, thresholds = row["result"]["trajectory"], row["result"]["thresholds"]
        orders = {int(name.removeprefix("order")): line for name, line in lines.items() if name.startswith("order")}
        return Prediction(
            lines["steps"],
            lines["change"],
            orders,
            lines["nonlinearity"],
            float(thresholds["lazy"]),
            float(thresholds["nonlinear"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"a row of taylor_diff lacks what its figure needs: {error}") from error


def prediction_caption(row: Row) -> str:
    """What a reader should see."""
    metrics, regime = row.get("metrics", {}), row["result"].get("regime", "?")
    value = metrics.get("nonlinearity")
    shown = "" if value is None else f" (nonlinearity {format_number(value)})"
    return (
        f"The step is {regime}{shown}. Where the first order follows the actual change the finetune is still a small "
        "step from its base; in the upper band its linear picture no longer holds."
    )


def shares(row: Row) -> list[tuple[str, float | None, float | None]]:
    """Group, part of g . Delta (nats) and part of J Delta (a fraction), in the model's order.

    Raises:
        ReportError: The row lacks them.
    """
    try:
        result: dict[str, Any] = row["result"]
        loss, function = result["loss_shares"], result["function_shares"]
        return [(name, loss.get(name), function.get(name)) for name in dict.fromkeys([*loss, *function])]
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"a row of taylor_diff lacks what its figure needs: {error}") from error


def shares_caption(row: Row) -> str:
    """What a reader should see."""
    found = [(name, value) for name, value, _ in shares(row) if value is not None]
    if not found:
        return "No shares were asked for (by=None)."
    name, value = max(found, key=lambda pair: abs(pair[1]))
    return (
        f"To first order {name} changes the loss most, by {format_number(value)} nats. Parts may have opposite signs: "
        "they add up to the whole first-order change."
    )
