from __future__ import annotations

import io
import math
from typing import Any

import pytest
from lightning_goldy.report.reverse_golden_history import search_caption, search_history

from lightning_goldy.report import chart_search_history, draw_plots, plot_search_history
from lightning_goldy.report.registry import ReportError


def entry(iteration: int, greedy: float, pool: float | None, accepted: bool) -> dict[str, Any]:
    kept = pool if accepted else greedy
    sizes = {"size": 4 * iteration + 4, "pool": 5 * iteration + 5}
    return {
        "iteration": iteration,
        **sizes,
        "greedy_kl": greedy,
        "pool_kl": pool,
        "kl": kept,
        "accepted": accepted,
    }


@pytest.fixture
def row() -> dict[str, Any]:
    result = {
        "top_k_percent": 1.0,
        "scope": "global",
        "strategy": "chaos_driven",
        "passes": 4,
        "kl_divergence": 3.5,
        "single_shots": {"gradient": 0.5, "$x<b>": 0.25},
        "history": [entry(0, 1.0, 2.0, True), entry(1, 2.5, None, False), entry(2, 4.0, 3.0, False)],
    }
    return {"analysis": "reverse_golden_parameters", "step": 7, "result": result}


def test_the_figure_draws_what_was_tried_and_kept(row):
    figure = plot_search_history(row)
    upper, lower = figure.axes
    lines = {line.get_label(): line for line in upper.get_lines()}
    assert list(lines["kept"].get_ydata()) == [2.0, 2.5, 4.0]
    assert list(lines["greedy"].get_ydata()) == [1.0, 2.5, 4.0]
    assert list(lines["pool, accepted"].get_xdata()) == [0]
    assert list(lines["single shot by gradient"].get_ydata()) == [0.5, 0.5]
    assert list(lower.get_lines()[0].get_ydata()) == [5, 10, 15]
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    assert list(draw_plots(row)) == ["history"]


def test_the_chart_draws_the_same_and_escapes_names(row):
    chart = chart_search_history(row)
    traces = {trace.name: trace for trace in chart.data}
    assert traces["kept"].y == (2.0, 2.5, 4.0)
    assert traces["pool"].y == (2.0, None, 3.0)
    assert traces["pool"].text[0] == "pool of 5 for 4, accepted"
    assert "single shot by &#36;x&lt;b&gt;" in traces
    assert chart.layout.meta["caption"] == search_caption(row)
    assert "1 % of all elements, strategy chaos_driven, 4 passes: 3.5 nats" in search_caption(row)
    assert search_caption(row).endswith("pools accepted: 1 of 3")


def test_a_missing_pool_is_a_gap_and_a_spoiled_row_an_error(row):
    assert math.isnan(search_history(row).pool[1])
    del row["result"]["history"][1]["kl"]
    with pytest.raises(ReportError, match="'kl'"):
        search_history(row)
    row["result"]["history"] = None
    with pytest.raises(ReportError):
        plot_search_history(row)
