from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_goldy.analysis.linearized import ExplainedChange
from lightning_goldy.analysis.linearized.explain import LABELS
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report import ReportError, chart_explained_change, draw_figures
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import figures_of
from lightning_goldy.report.topics.linearized import survival, survival_caption


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
    assert [(entry.name, entry.heading) for entry in figures_of("explain_change")] == [
        ("survival", "What survives of the change")
    ]
    figure = chart_explained_change(row)
    bars = figure.data["bars"]
    assert bars["percent"] == [*map(pytest.approx, (50, 30, 10, -10)), None, *map(pytest.approx, (90, 80, 70, 60, 50))]
    assert bars["variant"] == 2 * list(LABELS.values())
    assert bars["of"] == 5 * ["change of the loss"] + 5 * ["change of the logits"]
    marks, rule, *numbers = figure.bare()["layer"]
    assert (marks["encoding"]["x"]["field"], marks["encoding"]["y"]["field"]) == ("percent", "variant")
    assert marks["encoding"]["yOffset"]["field"] == marks["encoding"]["color"]["field"] == "of"
    assert rule["encoding"]["x"]["datum"] == 100
    assert {number["encoding"]["text"]["field"] for number in numbers} == {"percent"}
    assert figure.caption == survival_caption(row)
    assert figure.caption.startswith("loss 2 at the base, 1 now (nats, over 40 targets)")
    assert draw_figures(row)["survival"].png().startswith(b"\x89PNG")


def test_without_logits_there_is_one_bar_each() -> None:
    row = explained(logits=False).row().to_dict()
    assert [group.name for group in survival(row)] == ["change of the loss"]
    figure = chart_explained_change(row)
    assert len(figure.data["bars"]["percent"]) == 5
    assert figure.bare()["layer"][0]["encoding"]["color"]["legend"] is None


def test_every_metric_has_a_meaning() -> None:
    description = description_of("explain_change")
    for name in explained().metrics():
        assert description.meaning(name)


def test_a_row_without_variants_is_refused() -> None:
    with pytest.raises(ReportError, match=r"needs result\.variants"):
        chart_explained_change({"analysis": "explain_change", "step": 1, "result": {}})
