"""What the analyses of one checkpoint found, as tables for the console."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_goldy.report.figures import Row
from lightning_goldy.report.formatting import format_number, format_percent
from lightning_goldy.report.topics.linearized import survival

Lines = Iterator[tuple[str, str]]


def summary_table(rows: Sequence[Row]) -> Table:
    """The numbers to look at first, one line each.

    Args:
        rows: Of ``taylor_diff``, ``parameter_distribution`` and ``attention_tracker``; others have no line here.

    Example:
        >>> row = {"name": "attention_tracker", "metrics": {"entropy": 1.5, "drift": None}, "result": {}}
        >>> summary_table([row]).row_count
        1
    """
    table = Table(title="What the checkpoint changed", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("analysis", no_wrap=True)
    table.add_column("quantity")
    table.add_column("value", justify="right", no_wrap=True)
    for row in rows:
        lines = _LINES.get(row["name"])
        for number, (quantity, value) in enumerate([] if lines is None else lines(row)):
            # As Text, because brackets in a plain string would be read as markup.
            table.add_row(row["name"] if number == 0 else "", Text(quantity), Text(value))
    return table


def explanation_table(row: Row) -> Table:
    """What survives of the change in each variant of the model, one line each.

    Args:
        row: Of ``explain_change``.

    Raises:
        ReportError: The row has no variants.

    Example:
        >>> each = {"variant": "both", "loss": 1.5, "loss_share": 0.5, "logit_share": None, "relative_error": None}
        >>> explanation_table({"result": {"variants": [{**each, "kl_divergence": None}]}}).row_count
        1
    """
    table = Table(title="What survives of the change", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("variant")
    for heading in ("loss, nats", "of loss", "of logits", "error", "KL"):
        table.add_column(heading, justify="right", no_wrap=True)
    labels = survival(row)[0].labels
    for label, each in zip(labels, row["result"]["variants"], strict=True):
        shares = (format_percent(each[name]) for name in ("loss_share", "logit_share", "relative_error"))
        # As Text, because brackets in a plain string would be read as markup.
        cells = (label, format_number(each["loss"]), *shares, format_number(each["kl_divergence"]))
        table.add_row(*map(Text, cells))
    return table


def _of_the_expansion(row: Row) -> Lines:
    metrics = row["metrics"]
    yield "loss at the base, nats", format_number(metrics["base_loss"])
    yield "loss now, nats", format_number(metrics["loss"])
    yield "change of the loss, nats", format_number(metrics["change"])
    for fit in row["result"]["fits"]:
        order = fit["order"]
        yield f"order {order}: predicted change, nats", format_number(fit["loss"] - metrics["base_loss"])
        if fit["relative_error"] is not None:
            yield f"order {order}: error / change of the logits", format_number(fit["relative_error"])
    yield "the step is", row["result"]["regime"]


def _of_the_distribution(row: Row) -> Lines:
    yield from _named(
        row["metrics"],
        {
            "relative_change": "||Delta|| / ||base||",
            "stable_rank": "stable rank of the change",
            "alignment_over_chance": "alignment with the base, over chance",
            "histogram_drift": "drift of the histograms, nats",
        },
    )


def _of_the_attention(row: Row) -> Lines:
    yield from _named(
        row["metrics"],
        {
            "entropy": "entropy, nats, mean",
            "drift": "drift of the patterns, nats, mean",
            "drift_max": "drift of the patterns, nats, largest",
            "previous_token_max": "previous token, strongest head",
            "induction_max": "induction, strongest head",
        },
    )


def _named(metrics: Mapping[str, Any], names: Mapping[str, str]) -> Lines:
    for name, quantity in names.items():
        if metrics.get(name) is not None:
            yield quantity, format_number(metrics[name])


_LINES = {
    "taylor_diff": _of_the_expansion,
    "parameter_distribution": _of_the_distribution,
    "attention_tracker": _of_the_attention,
}
