from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lightning_goldy.analysis.ripple import RippleResult
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import ReportError, draw_figures, figures_of
from lightning_goldy.report.topics.ripple import chart_ripple_effects, overall_agreement, ripple_caption, scatters

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
    (entry,) = figures_of("ripple_effects")
    assert (entry.name, entry.heading) == ("prediction", "Predicted and measured change")
    figure = draw_figures(row)["prediction"]
    assert figure.title == "Predicted and measured change, step 5"
    for panel, (title, sign) in enumerate((("first order: g . delta", 0.5), ("coupling: cos |g| |delta|", -1.0))):
        table, ends = figure.data[f"points_{panel}"], figure.data[f"ends_{panel}"]["end"]
        labels = dict.fromkeys(table["group"])
        for name, label in zip(GROUPS, labels, strict=True):
            chosen = found.pairs(name)
            measured = found.measured.numpy()[chosen].tolist()
            drawn = [place for place, group in enumerate(table["group"]) if group == label]
            assert [table["y"][place] for place in drawn] == pytest.approx(measured, rel=1e-5)
            assert [table["x"][place] for place in drawn] == pytest.approx([sign * each for each in measured], rel=1e-5)
            assert [table["name"][place] for place in drawn] == [found.pieces[place] for place in chosen.nonzero()[1]]
            assert label == f"{name} (r = {'1.00' if sign > 0 else '-1.00'}, n = {len(measured)})"
        assert ends == [min(table["x"] + table["y"]), max(table["x"] + table["y"])]
        chart = figure.bare()["concat"][panel]
        assert chart["title"]["text"] == title
        line, points = chart["layer"]
        assert (line["encoding"]["x"]["field"], line["encoding"]["y"]["field"]) == ("end", "end")
        assert [tip["title"] for tip in points["encoding"]["tooltip"]] == [
            *("piece", "group", "predicted change of log p, nats", "measured change of log p, nats")
        ]
    assert overall_agreement(row, "coupling") == "r = -1.00, Spearman -1.00"
    assert figure.png().startswith(b"\x89PNG")
    assert ripple_caption(row).startswith(
        "2 edits by finetune, each measured on 8 pieces; 50 % of the new answers are exact. Points on the line"
    )
    assert figure.caption == (
        f"{ripple_caption(row)} Over all classes r = 1.00, Spearman 1.00 by the first order; r = -1.00, Spearman -1.00 "
        f"by the coupling. {found.warning().capitalize()}."
    )
    assert "the slope of measured on predicted changes is 2, outside [0.8, 1.25]" in found.warning()


def test_the_first_class_lies_on_top_of_the_many_points_of_the_others() -> None:
    for chart in chart_ripple_effects(rippled().row().to_dict()).bare()["concat"]:
        points = chart["layer"][1]
        assert points["transform"] == [{"window": [{"op": "row_number", "field": "", "as": "place"}]}]
        assert points["encoding"]["order"] == {"field": "place", "sort": "descending", "type": "quantitative"}


def test_pairs_that_are_not_finite_are_counted_and_not_drawn() -> None:
    row = json.loads(to_json_line(rippled(broken=True).row().to_dict()))
    assert sum(len(points.x) for points in scatters(row, "first_order").values()) == 13
    assert "; 13 of 14 pairs drawn." in ripple_caption(row)
    assert overall_agreement(row, "first_order") == "r = undefined, Spearman undefined"
    assert chart_ripple_effects(row).data["points_0"]["group"][0] == "same subject (n = 4)"


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
    with pytest.raises(ReportError, match="a row of ripple_effects lacks"):
        chart_ripple_effects(row)
