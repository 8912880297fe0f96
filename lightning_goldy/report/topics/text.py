"""What models write, and what a checkpoint changed, as console tables, as text for loggers and on the page.

Models write whatever they like: every text is escaped for where it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Row, naming, register_table, register_text
from lightning_goldy.report.formatting import console_table, format_number, format_percent, printable, texts_html

Entries = Sequence[Mapping[str, Any]]
"""One per prompt: ``prompt``, two texts, ``agreement`` (a fraction) and ``kl_per_token`` (nats); the texts are
``plain`` and ``masked``, or ``present`` and ``base``, where all but ``present`` may be null."""

_NUMBERS = {"agreement": "same tokens", "kl_per_token": "nats per token"}
_GENERATIONS = {"prompt": "prompt", "plain": "whole model", "masked": "masked model", **_NUMBERS}
_CONTINUATIONS = {"prompt": "prompt", "base": "base", "present": "checkpoint", **_NUMBERS}
_ALONE = {"prompt": "prompt", "present": "checkpoint"}


def generations_table(generations: Entries) -> Table:
    """A table for the console.

    Args:
        generations: One entry per prompt.

    Example:
        >>> entry = {"prompt": "2+2=", "plain": "4", "masked": "[red]5", "agreement": 0.0, "kl_per_token": 1.5}
        >>> generations_table([entry]).row_count
        1
    """
    return _table("With and without the mask", _GENERATIONS, generations)


@register_text("generations")
def generations_text(generations: Entries) -> str:
    """Markdown for loggers that take text; what the model wrote is shown, never rendered.

    Args:
        generations: One entry per prompt.

    Example:
        >>> entry = {"prompt": "a|b", "plain": "<b>", "masked": "*x*", "agreement": 0.5, "kl_per_token": 1.5}
        >>> print(generations_text([entry]).splitlines()[-1])
        | a&#124;b | &lt;b&gt; | &#42;x&#42; | 50 % | 1.5 |
    """
    lines = [f"| {' | '.join(_GENERATIONS.values())} |", f"|{' --- |' * len(_GENERATIONS)}"]
    lines += [f"| {' | '.join(map(_in_markdown, cells))} |" for cells in _cells(_GENERATIONS, generations)]
    return "\n".join(lines)


@register_table
def generations_html(row: Row) -> str:
    """A part of the page; nothing when the row compares no generations.

    Args:
        row: Its result may hold ``generations``.

    Raises:
        ReportError: An entry lacks something.

    Example:
        >>> entry = {"prompt": "2+2=", "plain": "<script>", "masked": "5", "agreement": 0.0, "kl_per_token": 1.5}
        >>> "&lt;script&gt;" in generations_html({"result": {"generations": [entry]}})
        True
        >>> generations_html({"result": {}})
        ''
    """
    found = row["result"].get("generations")
    page = found and texts_html([*_GENERATIONS.values()], _cells(_GENERATIONS, found))
    return f"<h3>With and without the mask</h3>{page}" if page else ""


def continuations_table(continuations: Entries) -> Table:
    """A table for the console.

    Args:
        continuations: One entry per prompt.

    Example:
        >>> entry = {"prompt": "2+2=", "present": "[red]5", "base": "4", "agreement": 0.0, "kl_per_token": 1.5}
        >>> continuations_table([entry]).row_count
        1
    """
    return _table("What they write", _continued(continuations), continuations)


@register_table
def continuations_html(row: Row) -> str:
    """A part of the page; nothing when the row continues no prompt.

    Args:
        row: Its result may hold ``continuations``.

    Raises:
        ReportError: An entry lacks something.

    Example:
        >>> entry = {"prompt": "2+2=", "present": "<b>", "base": None, "agreement": None, "kl_per_token": None}
        >>> page = continuations_html({"result": {"continuations": [entry]}})
        >>> "&lt;b&gt;" in page, "same tokens" in page
        (True, False)
        >>> continuations_html({"result": {}})
        ''
    """
    found = row["result"].get("continuations")
    columns = _continued(found or ())
    return texts_html([*columns.values()], _cells(columns, found)) if found else ""


def _continued(entries: Entries) -> Mapping[str, str]:
    return _CONTINUATIONS if any(entry.get("base") is not None for entry in entries) else _ALONE


def _table(title: str, columns: Mapping[str, str], entries: Entries) -> Table:
    return console_table(title, [*columns.values()], _cells(columns, entries), show_lines=True)


def _cells(columns: Mapping[str, str], entries: Entries) -> Iterable[list[str]]:
    shown = {"agreement": format_percent, "kl_per_token": format_number}
    what = "a comparison of generations" if columns is _GENERATIONS else "a continuation"
    for entry in entries:
        with naming(f"{what} lacks or spoils"):
            cells = [shown.get(name, printable)(entry[name]) for name in columns]
        yield cells


def _in_markdown(text: str) -> str:
    escaped = escape(text)
    # Entities, because a backslash before a character of Markdown is itself shown inside some of its constructs.
    for char in "|*_`[]~\\!":
        escaped = escaped.replace(char, f"&#{ord(char)};")
    return escaped


def summary_table(rows: Sequence[Row]) -> Table:
    """The numbers to look at first, one line each.

    Args:
        rows: Of the analyses of ``goldy analyze``; continuations and variants have tables of their own.

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
        for number, (quantity, value) in enumerate(_quantities(row)):
            # As Text, because brackets in a plain string would be read as markup.
            table.add_row(Text(printable(row["name"]) if number == 0 else ""), Text(quantity), Text(printable(value)))
    return table


def _quantities(row: Row) -> Iterator[tuple[str, str]]:
    metrics = row["metrics"]
    if (space := row["result"].get("space")) is not None:
        yield "adapters are looked at as", "merged weights" if space == "merged" else "adapters"
    if (precision := row["result"].get("precision")) is not None:
        yield "computed in", f"{precision['dtype']}" + ("" if precision.get("training") else f" ({precision['by']})")
        if (floor := precision.get("loss_floor")) is not None:
            yield "differences of the loss that may be rounding, nats", format_number(floor)
    if row["name"] == "taylor_diff":
        yield from _of_the_expansion(row)
    for name, quantity in _QUANTITIES.get(row["name"], {}).items():
        if metrics.get(name) is not None:
            yield quantity, format_number(metrics[name])
    curve = row["result"].get("curve") or {}
    if weak := curve.get("weak"):
        yield f"weak: {weak}", ""
    if shared := curve.get("n_shared"):
        yield f"measured on {curve['n_pairs']} prompts, {shared} of which chose the edges", ""


def _of_the_expansion(row: Row) -> Iterator[tuple[str, str]]:
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


_QUANTITIES = {
    "change_attribution": {"effect": "change of the loss, nats", "gap": "its parts miss it by, a fraction"},
    "activation_differences": {
        "stream_change": "residual stream moved by, of its norm",
        "stream_null": "another text moves it by",
        "kl_from_base": "divergence on that text, nats",
    },
    "circuit_tracker": {
        "faithfulness_1_percent": "1 % of the edges keep of the behaviour",
        "faithfulness_10_percent": "10 % of the edges keep",
        "faithfulness_low": "at least, by its 95 % interval",
        "faithfulness_high": "at most",
        "faithfulness_random": "as many random edges keep",
        "faithfulness_exchanged": "the same with heads exchanged",
        "faithfulness_shuffled": "the same with edges shuffled within layers",
        "faithfulness_other_task": "another task's circuit keeps",
        "overlap": "edges shared with the base's circuit",
        "overlap_by_chance": "by chance",
    },
    "parameter_distribution": {
        "relative_change": "||Delta|| / ||base||",
        "stable_rank": "stable rank of the change",
        "alignment_over_chance": "alignment with the base, over chance",
        "histogram_drift": "drift of the histograms, nats",
    },
    "attention_tracker": {
        "entropy": "entropy, nats, mean",
        "drift": "drift of the patterns, nats, mean",
        "drift_max": "drift of the patterns, nats, largest",
        "previous_token_max": "previous token, strongest head",
        "induction_max": "induction, strongest head",
    },
}


_DESCRIPTION = Description(
    title="What it writes",
    measures="Continuations of the prompts by the checkpoint and by its base, from the same random state.",
    reading=(
        "Continuations part for good at the first token that differs, so the share of same tokens says when rather "
        "than how much; the divergence, taken along what the checkpoint writes, says how far apart they are there."
    ),
    metrics={
        "prompts": "prompts continued",
        "agreement": "share of positions with the same token, of the longer continuation; mean over prompts",
        "kl_per_token": (
            "mean KL(model || the other) along what the model writes, nats per token; the checkpoint, the base"
        ),
    },
)
describe("continuations", _DESCRIPTION)
