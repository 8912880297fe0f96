from __future__ import annotations

from typing import Any

import pytest

from lightning_goldy.report import ReportError, draw_figures
from lightning_goldy.report.topics.taylor import chart_taylor_prediction, chart_taylor_shares, prediction

Row = dict[str, Any]


def row_of(step: int, **metrics: float | None) -> Row:
    known = {"base_loss": 2.0, "change": -0.5, "loss/order1": 1.6, "loss/order2": 1.4, "nonlinearity": 0.2}
    result = {"thresholds": {"lazy": 0.1, "nonlinear": 0.5}, "regime": "weakly nonlinear"}
    result |= {"loss_shares": {"h.0": -0.5, "h.1": 0.25}, "function_shares": {"h.0": 0.75, "h.1": 0.25}}
    return {"analysis": "taylor_diff", "step": step, "metrics": {**known, **metrics}, "result": result}


def test_lines_are_those_of_the_rows_and_gaps_stay() -> None:
    first = row_of(4, nonlinearity=None)
    del first["metrics"]["loss/order2"]
    figure = draw_figures(row_of(8, change=None), [first])["prediction"]
    upper, lower = figure.data["points_0"], figure.data["points_1"]
    assert upper["line"] == ["actual"] * 2 + ["order 1"] * 2 + ["order 2"] * 2
    assert upper["x"] == [4, 8] * 3
    assert upper["y"] == [-0.5, None, *[pytest.approx(-0.4)] * 2, None, pytest.approx(-0.6)]
    assert lower["y"] == [None, 0.2]
    assert figure.title == "Actual and predicted change, step 8"
    assert figure.caption.startswith("The step is weakly nonlinear (nonlinearity 0.2). Where the first order follows")


def test_regimes_are_bands_that_reach_above_every_point() -> None:
    for nonlinearity, top in ((0.2, 0.6), (2.0, 2.2)):
        figure = chart_taylor_prediction([row_of(1, nonlinearity=nonlinearity)])
        assert figure.data["bands_1"]["regime"] == ["lazy", "weakly nonlinear", "nonlinear"]
        assert figure.data["bands_1"]["low"] == (0.0, 0.1, 0.5)
        assert figure.data["bands_1"]["high"] == pytest.approx((0.1, 0.5, top))


def test_one_checkpoint_shows_points_at_one_tick() -> None:
    figure = chart_taylor_prediction([row_of(200)])
    upper, lower = figure.bare()["concat"]
    marks = [layer["mark"]["type"] for layer in upper["layer"]]
    assert marks.count("point") == 1
    assert all(layer["encoding"]["x"]["axis"]["tickMinStep"] == 1 for layer in (*upper["layer"], *lower["layer"][2:]))
    assert figure.data["points_0"]["x"] == [200] * 3
    assert figure.png().startswith(b"\x89PNG")


def test_shares_are_two_columns_and_only_those_that_there_are() -> None:
    row = row_of(8)
    figure = draw_figures(row)["shares"]
    assert figure.data["bars_0"] == {"label": ["h.0", "h.1"], "value": [-0.5, 0.25]}
    assert figure.data["bars_1"] == {"label": ["h.0", "h.1"], "value": [0.75, 0.25]}
    assert figure.caption.startswith("To first order h.0 changes the loss most, by -0.5 nats. Parts may have opposite")
    row["result"]["function_shares"] = {}
    assert list(draw_figures(row)["shares"].data) == ["bars_0"]
    row["result"]["loss_shares"] = {}
    assert "shares" not in draw_figures(row)
    assert chart_taylor_shares(row) == "No shares were asked for (by=None)."


def test_what_a_row_lacks_is_named() -> None:
    for place, name in (("metrics", "change"), ("metrics", "nonlinearity"), ("result", "thresholds")):
        row = row_of(8)
        del row[place][name]
        with pytest.raises(ReportError, match=f"a row of taylor_diff lacks what its figure needs: '{name}'"):
            prediction([row])
    with pytest.raises(ReportError, match="a row of taylor_diff lacks what its figure needs: 'loss_shares'"):
        chart_taylor_shares({"result": {}})


@pytest.mark.parametrize("name", ["plot_taylor_prediction", "plot_taylor_shares", "plot_variant_losses"])
def test_former_names_lead_to_the_one_figure(name: str) -> None:
    from lightning_goldy import report

    with pytest.warns(DeprecationWarning, match=f"{name} has become {name.replace('plot', 'chart')}"):
        former = getattr(report, name)
    assert former is getattr(report, name.replace("plot", "chart"))
