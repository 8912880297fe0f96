from __future__ import annotations

import struct
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import lightning_goldy.report as report
from lightning_goldy.report import figures
from lightning_goldy.report.builders import HeatMap, Lines, arrange, heat_map, lines
from lightning_goldy.report.figures import (
    FIGURES,
    Figure,
    ReportError,
    bounds,
    draw_figures,
    figures_of,
    reads_of,
    register_figure,
)
from lightning_goldy.report.topics.basin import chart_volume_estimates
from lightning_goldy.report.topics.golden import chart_golden_parameters, chart_weight_changes

Build = Callable[..., dict[str, Any]]
POINTS = {"data": {"name": "points"}, "mark": "point", "encoding": {"x": {"field": "x", "type": "quantitative"}}}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", {name: dict(entries) for name, entries in FIGURES.items()})


def test_a_figure_cannot_be_registered_twice() -> None:
    with pytest.raises(ValueError, match=r"'golden_parameters' has a figure 'density' already: .*chart_golden"):
        register_figure("golden_parameters", "density", heading="Again")(chart_weight_changes)
    assert [entry.function for entry in figures_of("golden_parameters")] == [chart_golden_parameters]
    over: Any = "epoch"
    with pytest.raises(ValueError, match="over 'step' or 'run', got 'epoch'"):
        register_figure("tiny", "a", heading="A", over=over)


def test_figures_keep_the_order_of_their_registration_and_unknown_analyses_have_none() -> None:
    for name in ("second", "first"):
        register_figure("tiny", name, heading=name.title())(lambda row: Figure(POINTS, {"points": {"x": [1]}}))
    assert list(draw_figures({"analysis": "tiny", "step": 3})) == ["second", "first"]
    assert draw_figures({"analysis": "of nobody", "step": 3}) == {}


def test_a_figure_over_the_run_takes_all_rows_and_says_what_it_reads() -> None:
    seen = []

    def chart(rows: Any) -> Figure:
        seen.append([row["step"] for row in rows])
        return Figure(POINTS, {"points": {"x": [row["result"]["value"] for row in rows]}})

    register_figure("tiny", "course", heading="Course", over="run", reads=("value",))(chart)
    register_figure("tiny", "now", heading="Now", reads=("everything",))(lambda row: None)
    rows = [{"analysis": "tiny", "step": step, "result": {"value": step**2}} for step in (1, 2, 3)]
    drawn = draw_figures(rows[-1], rows[:-1])
    assert seen == [[1, 2, 3]]
    assert drawn["course"].data == {"points": {"x": [1, 4, 9]}}
    assert drawn["course"].title == "Course, step 3"
    assert list(drawn) == ["course"]
    assert reads_of("tiny") == {"value"}


def test_a_row_that_cannot_be_drawn_is_a_report_error_and_another_library_is_named() -> None:
    register_figure("tiny", "a", heading="A")(lambda row: row["result"]["value"])
    with pytest.raises(ReportError, match="KeyError: 'value'"):
        draw_figures({"analysis": "tiny", "step": 1, "result": {}})
    with pytest.raises(TypeError, match=r"returned a types.SimpleNamespace; .*register_figure returns a .*Figure"):
        draw_figures({"analysis": "tiny", "step": 1, "result": {"value": SimpleNamespace()}})


def test_a_sentence_or_nothing_in_place_of_a_figure_is_not_logged() -> None:
    register_figure("tiny", "why", heading="Why")(lambda row: "No base to compare with.")
    register_figure("tiny", "none", heading="None")(lambda row: None)
    assert draw_figures({"analysis": "tiny", "step": 1}) == {}


def test_a_specification_holds_everything() -> None:
    chart = {**POINTS, "encoding": {"x": {"field": "x", "type": "quantitative", "scale": {"domain": bounds("span")}}}}
    found = Figure(chart, {"points": {"x": np.array([1.0, np.nan, 3.0])}}, "A caption.", "A title", {"span": (0, 5)})
    spec = found.spec()
    assert spec["datasets"] == {"points": [{"x": 1.0}, {"x": None}, {"x": 3.0}]}
    assert spec["params"] == [{"name": "span_low", "value": 0}, {"name": "span_high", "value": 5}]
    assert (spec["title"]["text"], spec["title"]["subtitle"]) == ("A title", ["A caption."])
    assert spec["config"]["background"] == "#ffffff"
    assert found.spec("dark")["config"]["background"] == "#1c2229"
    assert found.png().startswith(b"\x89PNG")
    assert found.bare() == chart


def test_an_altair_chart_with_its_own_data_and_configuration_is_a_figure() -> None:
    import altair as alt

    chart = alt.Chart(alt.Data(values=[{"a": 1}, {"a": 2}])).mark_point().encode(x="a:Q").configure_point(size=200)
    spec = Figure(chart).spec()
    assert spec["config"]["point"] == {"size": 200}
    assert spec["config"]["view"] == {"stroke": None}
    assert Figure(chart).png().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": {"a.b": {}}}, r"identifiers, got 'a\.b'"),
        ({"data": {"cells": {"x[0]": [1]}}}, r"identifiers, got 'x\[0\]'"),
        ({"ranges": {"a b": (0, 1)}}, "identifiers, got 'a b'"),
        ({"data": {"cells": {"x": [1], "y": [1, 2]}}}, r"'cells' differ in length: \{'x': 1, 'y': 2\}"),
    ],
)
def test_names_and_columns_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Figure(POINTS, **options)


def test_figures_work_in_threads(golden_row: Build) -> None:
    sizes = []
    row = golden_row()
    threads = [threading.Thread(target=lambda: sizes.append(len(chart_golden_parameters(row).png()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 2


def test_missing_altair_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_goldy.report.builders import Bars, bars

    monkeypatch.setitem(sys.modules, "altair", None)
    with pytest.raises(ImportError, match=r'figures need altair: pip install "lightning-goldy\[report\]"'):
        bars({"a": 1.0}, Bars("never drawn before"))


@pytest.mark.parametrize("name", sorted(report._FORMER))
def test_former_names_lead_to_their_successors_with_a_warning(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"lightning_goldy.report.{name} has become "):
        successor = getattr(report, name)
    assert callable(successor)
    assert name not in report.__all__


def test_every_public_name_is_there() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(hasattr(report, name) for name in report.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'plot_nothing'"):
        _ = report.plot_nothing


def test_what_the_former_decorator_registers_is_drawn_or_told() -> None:
    with pytest.warns(DeprecationWarning, match="register_plot has become register_figure"):
        register_plot = report.register_plot
    register_plot("tiny", "curve")(lambda row: SimpleNamespace())
    with pytest.raises(TypeError, match="register_figure"):
        draw_figures({"analysis": "tiny", "step": 1})


@pytest.mark.parametrize("columns", [1, 2])
def test_an_image_is_made_as_wide_as_its_place_where_plots_can_shrink(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setattr("lightning_goldy.report.figures._FITTED", {})
    series = {"the first of two lines": ([1, 2], [1.0, 2.0]), "the second of two lines": ([1, 2], [2.0, 1.0])}
    panels = [lines(series, Lines(y="loss, nats", scale="linear")) for _ in range(columns)]
    figure = replace(arrange(panels, columns=columns, caption="It is told here at length. " * 8), title="Loss " * 20)
    for _ in range(2):  # the second is drawn by what fitted the first
        wide, high = struct.unpack(">II", figure.within(360).png(1.0)[16:24])
        assert 280 < wide <= 360
        assert high > 220 * columns
    assert struct.unpack(">I", figure.png(1.0)[16:20])[0] > 500


def test_panels_below_each_other_shrink_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests draw the same chart with images that stand in for real ones.
    monkeypatch.setattr("lightning_goldy.report.figures._FITTED", {})
    row = {"label": "clean", "estimates": [-10.0, -12.0], "log_volume": -10.6, "effective_sample_size": 1.3}
    panels = [row, row | {"label": "memorised"}]
    none = {"estimates": [], "log_volume": None}
    chart_volume_estimates({"result": {"volumes": [row | none]}}).within(360)  # a step without numbers decides nothing
    figure = chart_volume_estimates({"result": {"volumes": panels}})
    assert struct.unpack(">I", figure.within(360).png(1.0)[16:20])[0] <= 360


def test_what_cannot_be_narrower_is_drawn_as_it_is() -> None:
    figure = heat_map(np.ones((2, 30)), range(2), range(30), HeatMap("%"))
    assert figure.within(200).png(1.0) == figure.within(200).png(1.0)
    assert struct.unpack(">I", figure.within(200).png(1.0)[16:20])[0] > 1000
