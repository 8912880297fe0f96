from __future__ import annotations

import io
import json
from typing import Any

import pytest

from lightning_goldy.analysis.linearized import ExplainedChange
from lightning_goldy.analysis.linearized.explain import LABELS
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.explain_charts import chart_explained_change
from lightning_goldy.report.explain_plots import plot_explained_change
from lightning_goldy.report.explanations import survival, survival_caption
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError


def explained(*, logits: bool = True) -> ExplainedChange:
    records = [
        {
            "variant": variant,
            "loss": 1.0 + 0.1 * index,
            "loss_share": None if index == 4 else 0.5 - 0.2 * index,
            "logit_share": 0.9 - 0.1 * index if logits else None,
            "relative_error": 0.4 if logits else None,
            "kl_divergence": 0.02 if logits else None,
            "top1_agreement": 0.75 if logits else None,
        }
        for index, variant in enumerate(LABELS)
    ]
    return ExplainedChange(2.0, 1.0, tuple(records), 0.3, 40)


@pytest.mark.parametrize("saved", [False, True], ids=["as logged", "from the file"])
def test_bars_are_the_shares(saved: bool) -> None:
    row: Any = explained().row().at(step=5).to_dict()
    row = json.loads(to_json_line(row)) if saved else row
    assert set(draw_plots(row)) == {"survival"}
    assert CHARTS.names("explain_change") == ("What survives of the change",)
    figure = plot_explained_change(row)
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([50, 30, 10, -10, 0, 90, 80, 70, 60, 50])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list(LABELS.values())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    chart = chart_explained_change(row)
    assert chart.data[0].x[:4] == pytest.approx((50, 30, 10, -10))
    assert chart.data[0].x[4] is None
    assert chart.data[1].x == pytest.approx((90, 80, 70, 60, 50))
    caption = survival_caption(row)
    assert caption.startswith("loss 2 at the base, 1 now (nats, over 40 targets)")
    assert chart.layout.meta["caption"] == caption


def test_without_logits_there_is_one_bar_each() -> None:
    row = explained(logits=False).row().to_dict()
    assert [group.name for group in survival(row)] == ["change of the loss"]
    assert len(plot_explained_change(row).axes[0].patches) == 5
    assert len(chart_explained_change(row).data) == 1


def test_every_metric_has_a_meaning() -> None:
    description = description_of("explain_change")
    for name in explained().metrics():
        assert description.meaning(name)


def test_a_row_without_variants_is_refused() -> None:
    with pytest.raises(ReportError, match=r"needs result\.variants"):
        plot_explained_change({"analysis": "explain_change", "step": 1, "result": {}})
