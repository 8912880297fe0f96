"""What of a finetune's change survives with attention frozen, with linear MLPs, and with both."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from lightning_goldy.report.builders import columns_of, plain_spec, rounded
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure, ReportError, Row, register_figure, require
from lightning_goldy.report.formatting import console_table, format_number, format_percent

_LABELS = {
    "frozen_attention": "attention frozen",
    "linear_mlp": "MLPs linear",
    "linear_mlp_current": "MLPs linear in their parameters",
    "both": "attention frozen, MLPs linear",
    "tangent": "all linear (tangent)",
}


@register_figure("explain_change", "survival", heading="What survives of the change")
def chart_explained_change(row: Row) -> Figure:
    """What survives of the change of loss and logits in each variant, in percent; the dotted rule is the whole change.

    Args:
        row: Of the analysis ``explain_change``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> row = {"result": {"variants": [{"variant": "both", "loss_share": 0.5, "logit_share": None}]}}
        >>> chart_explained_change(row).data["bars"]["percent"]
        [50.0]
    """
    groups = survival(row)
    records = [
        (label, group.name, None if value is None else rounded(value))
        for group in groups
        for label, value in zip(group.labels, group.percent, strict=True)
    ]
    bars = columns_of(("variant", "of", "percent"), records)
    return Figure(_survival_chart(len(groups)), {"bars": bars}, survival_caption(row))


@functools.lru_cache(maxsize=4)
def _survival_chart(n_groups: int) -> dict[str, Any]:
    alt = require("altair")
    axis = alt.Axis(ticks=False, domain=False, offset=4)
    base = alt.Chart(alt.NamedData("bars")).encode(
        x=alt.X("percent:Q", title="surviving, % of the change", scale=alt.Scale(padding=28)),
        y=alt.Y("variant:N", sort=None, title=None, axis=axis, scale=alt.Scale(paddingInner=0.3)),
        yOffset=alt.YOffset("of:N", sort=None),
        color=alt.Color("of:N", sort=None, legend=alt.Legend(title=None, orient="top") if n_groups > 1 else None),
        tooltip=["variant:N", "of:N", alt.Tooltip("percent:Q", title="surviving, %", format=".6~g")],
    )
    # Beyond its bar on either side, so that neither bar nor rule lies under it.
    number = (
        base.transform_filter("isValid(datum.percent)")
        .mark_text(fontSize=10)
        .encode(text=alt.Text("percent:Q", format=".3~g"), color=alt.value("#7d7f86"))
    )
    numbers = [
        number.transform_filter(test).mark_text(fontSize=10, align=align, dx=dx)
        for test, align, dx in (("datum.percent >= 0", "left", 3), ("datum.percent < 0", "right", -3))
    ]
    whole = alt.Chart(alt.InlineData([{}])).mark_rule(strokeDash=[2, 3])
    rule = whole.encode(x=alt.datum(100, type="quantitative"))
    return plain_spec(alt.layer(base.mark_bar(), rule, *numbers), height=alt.Step(22))


@dataclass(frozen=True)
class Survival:
    """Bars of one quantity.

    Args:
        name: What survives.
        labels: The variants.
        percent: What survives in each, percent of the change; None where it has no share.
    """

    name: str
    labels: tuple[str, ...]
    percent: tuple[float | None, ...]


def survival(row: Row) -> tuple[Survival, ...]:
    """What survives of the change in loss and, where they were compared, in logits.

    Raises:
        ReportError: The row has no variants.

    Example:
        >>> row = {"result": {"variants": [{"variant": "both", "loss_share": 0.5, "logit_share": None}]}}
        >>> survival(row)
        (Survival(name='change of the loss', labels=('attention frozen, MLPs linear',), percent=(50.0,)),)
    """
    variants = row.get("result", {}).get("variants")
    if not variants:
        raise ReportError("a row of explain_change needs result.variants")
    labels = tuple(_LABELS.get(each["variant"], each["variant"]) for each in variants)
    groups = [Survival("change of the loss", labels, tuple(_percent(each.get("loss_share")) for each in variants))]
    logits = tuple(_percent(each.get("logit_share")) for each in variants)
    if any(value is not None for value in logits):
        groups.append(Survival("change of the logits", labels, logits))
    return tuple(groups)


def survival_caption(row: Row) -> str:
    """The losses that the shares belong to.

    Example:
        >>> survival_caption({"result": {"base_loss": 2.0, "loss": 1.5, "n_targets": 40, "step_norm": 0.25}})
        'loss 2 at the base, 1.5 now (nats, over 40 targets); ||Delta|| = 0.25; 100 % is the whole change'
    """
    result = row.get("result", {})
    numbers = {key: format_number(result.get(key)) for key in ("base_loss", "loss", "n_targets", "step_norm")}
    return (
        f"loss {numbers['base_loss']} at the base, {numbers['loss']} now (nats, over {numbers['n_targets']} targets); "
        f"||Delta|| = {numbers['step_norm']}; 100 % is the whole change"
    )


def _percent(share: Any) -> float | None:
    return None if share is None else 100.0 * float(share)


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
    headings, lines = ("variant", "loss, nats", "of loss", "of logits", "error", "KL"), []
    for label, each in zip(survival(row)[0].labels, row["result"]["variants"], strict=True):
        shares = (format_percent(each[name]) for name in ("loss_share", "logit_share", "relative_error"))
        lines.append((label, format_number(each["loss"]), *shares, format_number(each["kl_divergence"])))
    return console_table("What survives of the change", headings, lines, numbers=5, box=SIMPLE_HEAD)


_EXPLAIN_CHANGE = Description(
    title="What the change needed",
    measures=(
        "How much of the finetune's change in loss and logits survives when the heads look where the base's look, "
        "when MLPs are replaced by their first-order expansion around the base, and with both."
    ),
    reading=(
        "A share near 100 % means that the change did not need what was taken away; near 0 that it was made of it. "
        "Shares of different variants do not add up, and may lie outside of 0 to 100 %."
    ),
    metrics={
        "base_loss": "loss at the base, nats",
        "loss": "mean loss of the model as it is, nats; by variant, that of the variant",
        "change": "loss now minus loss at the base, nats",
        "loss_share": "part of the change of the loss that survives, a fraction",
        "logit_share": "part of the change of the logits along itself that survives, a fraction",
        "relative_error": "distance of the logits from what stands for them over how far they moved; the variant's",
        "kl_divergence": "mean KL(model || what stands in for it), nats per target; the variant",
        "top1_agreement": "share of the positions where both prefer the same token",
    },
    method=(
        "The finetuned model was run with the base's attention patterns and with MLPs linearised around the base, to "
        "see how much of the change survives."
    ),
)
describe("explain_change", _EXPLAIN_CHANGE)
