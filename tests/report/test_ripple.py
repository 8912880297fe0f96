from __future__ import annotations

import io
import json
from typing import Any

import pytest
import torch

from lightning_goldy.analysis.ripple import RippleResult
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError
from lightning_goldy.report.ripple_charts import chart_ripple_effects
from lightning_goldy.report.ripple_plots import plot_ripple_effects
from lightning_goldy.report.ripples import identity, overall, ripple_caption, scatters

GROUPS = ("same subject", "same relation", "unrelated")


def rippled(n_pieces: int = 8, *, broken: bool = False) -> RippleResult:
    """Two edits whose first piece is edited; the prediction is half of the change."""
    generator = torch.Generator().manual_seed(1)
    change = torch.randn(2, n_pieces, generator=generator, dtype=torch.float64)
    if broken:
        change[1, 3] = torch.nan
    flags = torch.zeros(2, n_pieces, dtype=torch.bool)
    return RippleResult(
        pieces=tuple(f"piece {place}" for place in range(n_pieces)),
        edits=({"pieces": ("piece 0",), "answers": ("x",)},) * 2,
        classes=(("edited", *(GROUPS[place % 3] for place in range(1, n_pieces))),) * 2,
        predicted_first_order=change / 2,
        predicted_coupling=-change,
        cosine=change,
        before=torch.zeros(n_pieces, dtype=torch.float64),
        after=change,
        rank_before=flags[0].long(),
        rank_after=flags.long(),
        exact_before=flags[0],
        exact_after=flags,
        new_before=torch.zeros(2, dtype=torch.float64),
        new_after=torch.ones(2, dtype=torch.float64),
        new_exact=torch.tensor([True, False]),
        delta_norm=torch.ones(2, dtype=torch.float64),
        gradient_norm=torch.ones(n_pieces, dtype=torch.float64),
        settings={"editor": "finetune", "measure": "answer", "route": "forward"},
    )


@pytest.mark.parametrize("saved", [False, True], ids=["as logged", "from the file"])
def test_points_are_the_pairs_and_lie_where_they_should(saved: bool) -> None:
    found = rippled()
    row: Any = found.row().at(step=5).to_dict()
    row = json.loads(to_json_line(row)) if saved else row
    assert set(draw_plots(row)) == {"prediction"}
    assert CHARTS.names("ripple_effects") == ("Predicted and measured change",)
    figure, chart = plot_ripple_effects(row), chart_ripple_effects(row)
    for column, (predictor, sign) in enumerate((("first_order", 0.5), ("coupling", -1.0))):
        axes = figure.axes[column]
        drawn = [collection.get_offsets().tolist() for collection in axes.collections][::-1]
        for index, name in enumerate(GROUPS):
            chosen = found.pairs(name)
            measured = found.measured.numpy()[chosen].tolist()
            points = [[pytest.approx(sign * value), pytest.approx(value)] for value in measured]
            assert drawn[index] == points
            trace = chart.data[3 * column + 2 - index]
            assert [list(pair) for pair in zip(trace.x, trace.y, strict=True)] == points
            label = f"{name} (r = {'1.00' if sign > 0 else '-1.00'}, n = {len(measured)})"
            assert axes.get_legend().get_texts()[index].get_text() == trace.name == label
        ends = identity(scatters(row, predictor))
        assert axes.lines[0].get_xdata() == pytest.approx(ends)
        assert axes.lines[0].get_ydata() == pytest.approx(ends)
        assert (chart.layout.shapes[column].x0, chart.layout.shapes[column].y1) == pytest.approx(ends)
    assert overall(row, "coupling") == "coupling: cos |g| |delta|\nr = -1.00, Spearman -1.00"
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert chart.layout.meta["caption"] == ripple_caption(row)
    assert ripple_caption(row).startswith(
        "2 edits by finetune, each measured on 8 pieces; 50 % of the new answers are exact. Points on the line"
    )


def test_pairs_that_are_not_finite_are_counted_and_not_drawn() -> None:
    row = json.loads(to_json_line(rippled(broken=True).row().to_dict()))
    assert sum(len(group.measured) for group in scatters(row, "first_order")) == 13
    assert "; 13 of 14 pairs drawn." in ripple_caption(row)
    assert overall(row, "first_order").endswith("r = undefined, Spearman undefined")
    assert plot_ripple_effects(row).axes[0].get_legend().get_texts()[0].get_text() == "same subject (n = 4)"


def test_a_row_does_not_grow_without_bounds() -> None:
    row = rippled(1500).row().to_dict()
    assert row["result"]["n_pairs"] == 2998
    assert len(row["result"]["points"]["measured"]) == 2000
    assert "; 2000 of 2,998 pairs drawn." in ripple_caption(row)
    assert row["result"]["agreement"][0]["n"] == 2998


def test_every_metric_has_a_meaning() -> None:
    description = description_of("ripple_effects")
    for name in rippled().metrics():
        assert description.meaning(name), name


@pytest.mark.parametrize("result", [{}, {"points": {}, "agreement": []}, {"points": {"measured": [1.0]}}], ids=range(3))
def test_a_row_without_points_is_refused(result: dict[str, Any]) -> None:
    row = {"analysis": "ripple_effects", "step": 1, "result": result}
    for draw in (plot_ripple_effects, chart_ripple_effects):
        with pytest.raises(ReportError, match="a row of ripple_effects lacks"):
            draw(row)
