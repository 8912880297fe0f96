from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lightning_goldy.report.grids import golden_density, relative_change

from lightning_goldy.report.formatting import MISSING
from lightning_goldy.report.plots import (
    PLOTS,
    draw_plots,
    plot_change_histogram,
    plot_golden_parameters,
    plot_weight_changes,
    register_plot,
)
from lightning_goldy.report.registry import FigureRegistry, ReportError

Build = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n\x1a\n"


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def labels(ticks: Any) -> list[str]:
    return [tick.get_text() for tick in ticks]


def test_golden_heat_map_has_a_cell_for_every_block_and_kind(golden_row: Build) -> None:
    figure = plot_golden_parameters(golden_row())
    axes = figure.axes[0]
    assert labels(axes.get_yticklabels()) == ["embeddings", "transformer.h.0", "transformer.h.1"]
    assert labels(axes.get_xticklabels()) == ["embedding", "attention", "mlp", "norm"]
    cells = [text.get_text() for text in axes.texts[:12]]
    assert cells == ["1", MISSING, MISSING, MISSING, MISSING, "4", "0", "100", MISSING, "4", "0", MISSING]
    assert "by chance 0.25 %" in axes.texts[12].get_text().replace("\n", " ")
    assert len(axes.texts) == 13
    assert figure.axes[1].get_ylabel() == "golden, % of the parameters"
    assert png(figure).startswith(PNG)


def test_text_on_dark_cells_is_light_and_on_bright_cells_dark(golden_row: Build) -> None:
    colours = {text.get_text(): text.get_color() for text in plot_golden_parameters(golden_row()).axes[0].texts}
    assert colours["0"] == "white"
    assert colours["100"] == "black"


def test_density_weighs_tensors_of_a_cell_by_their_size(golden_row: Build) -> None:
    row = golden_row(blocks=["h.0"])
    row["result"]["tensors"].append({"name": "b", "block": "h.0", "kind": "mlp", "numel": 300, "golden": 300})
    grid = golden_density(row)
    assert grid.values[1, grid.kinds.index("mlp")] == pytest.approx(75.0)


def test_relative_change_is_the_ratio_of_the_norms_over_a_cell(snapshot_row: Build) -> None:
    grid = relative_change(snapshot_row())
    assert grid.values[1, grid.kinds.index("mlp")] == pytest.approx(10.0)
    assert grid.values[0, grid.kinds.index("embedding")] == 0
    # A base of zero has no relative change.
    assert np.isnan(grid.values[1, grid.kinds.index("attention")])


def test_weight_changes_states_the_whole_change(snapshot_row: Build) -> None:
    axes = plot_weight_changes(snapshot_row()).axes[0]
    assert axes.texts[-1].get_text() == "the whole model moved by 8 % of its base norm (||Delta|| = 0.5)"


@pytest.mark.parametrize("count", [1, 48, 200])
def test_heat_map_survives_any_number_of_blocks_and_long_names(golden_row: Build, count: int) -> None:
    row = golden_row(blocks=[f"base_model.model.transformer.some_long_name.h.{index}" for index in range(count)])
    figure = plot_golden_parameters(row)
    assert len(figure.axes[0].get_yticklabels()) == count + 1
    assert figure.get_size_inches()[1] <= 30
    image: Any = figure.axes[0].images[0].get_array()
    assert image.shape == (count + 1, 4)
    assert image.mask.sum() == 3 + count + count // 2
    assert png(figure).startswith(PNG)


def test_names_are_shown_as_they_are(golden_row: Build) -> None:
    name = "<script>$\\frac{$_a^"
    figure = plot_golden_parameters(golden_row(blocks=[name]))
    assert labels(figure.axes[0].get_yticklabels())[1] == name
    assert png(figure).startswith(PNG)


def test_unknown_kinds_come_last(golden_row: Build) -> None:
    row = golden_row(blocks=["h.0"])
    row["result"]["tensors"].insert(0, {"name": "b", "block": "h.0", "kind": "router", "numel": 4, "golden": 1})
    assert golden_density(row).kinds == ("embedding", "attention", "mlp", "norm", "router")


def test_a_model_that_did_not_move_can_be_drawn(snapshot_row: Build) -> None:
    row = snapshot_row()
    for tensor in row["result"]["tensors"]:
        tensor["delta_norm"] = 0.0
    row["result"]["histogram"] |= {"counts": [0, 0, 0], "zero": 400}
    assert png(plot_weight_changes(row)).startswith(PNG)
    figure = plot_change_histogram(row)
    assert "no element has changed" in [text.get_text() for text in figure.axes[0].texts]
    assert png(figure).startswith(PNG)


def test_norms_that_were_not_finite_are_empty_cells(snapshot_row: Build) -> None:
    row = snapshot_row()
    row["result"]["tensors"][1]["delta_norm"] = None
    grid = relative_change(row)
    assert np.isnan(grid.values[1, grid.kinds.index("mlp")])
    assert png(plot_weight_changes(row)).startswith(PNG)


def test_histogram_has_the_bins_of_the_row(snapshot_row: Build) -> None:
    figure = plot_change_histogram(snapshot_row())
    axes = figure.axes[0]
    patch: Any = axes.patches[0]
    stairs = patch.get_data()
    assert stairs.values.tolist() == [1, 20, 300]
    assert stairs.edges.tolist() == [-4, -3, -2, -1]
    assert axes.get_yscale() == "log"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("log10 |Delta|", "elements")
    assert axes.texts[0].get_text() == "321 elements changed, 79 did not at all (19.8 %)"
    assert png(figure).startswith(PNG)


@pytest.mark.parametrize(
    ("histogram", "message"),
    [
        (None, "'edges' and 'counts'"),
        ({"edges": [1.0, 2.0], "counts": [1, 2]}, "2 edges for 2 counts"),
        ({"edges": [2.0, 1.0], "counts": [1]}, "ascending"),
        ({"edges": [1.0, 2.0], "counts": [-1]}, "negative"),
        ({"edges": [1.0, "b"], "counts": [1]}, "not a number"),
    ],
)
def test_bad_histograms_are_named(snapshot_row: Build, histogram: Any, message: str) -> None:
    row = snapshot_row()
    row["result"]["histogram"] = histogram
    with pytest.raises(ReportError, match=message):
        plot_change_histogram(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors[1].pop("golden"), r"result\.tensors\[1\]\.golden' must be a number or null"),
        (lambda tensors: tensors[2].update(numel="many"), r"result\.tensors\[2\]\.numel'.*'many'"),
        (lambda tensors: tensors[0].update(block=3), r"result\.tensors\[0\]\.block' must be text, got 3"),
        (lambda tensors: tensors.clear(), "at least one tensor"),
    ],
)
def test_bad_tensors_are_named(golden_row: Build, change: Any, message: str) -> None:
    row = golden_row()
    change(row["result"]["tensors"])
    with pytest.raises(ReportError, match=message):
        plot_golden_parameters(row)


def test_every_registered_figure_of_a_row_is_drawn(golden_row: Build, snapshot_row: Build) -> None:
    assert list(draw_plots(golden_row())) == ["density"]
    assert list(draw_plots(snapshot_row())) == ["relative_change", "change_histogram"]


def test_a_figure_cannot_be_registered_twice() -> None:
    with pytest.raises(
        ValueError, match=r"'golden_parameters' has a matplotlib figure 'density' already: .*plot_golden"
    ):
        register_plot("golden_parameters", "density")(plot_weight_changes)
    assert PLOTS.names("golden_parameters") == ("density",)


def test_registry_keeps_the_order_and_knows_nothing_of_others() -> None:
    registry: FigureRegistry[str] = FigureRegistry("text")
    registry.register("a", "second")(lambda row: "2")
    registry.register("a", "first")(lambda row: "1")
    registry.register("b", "first")(lambda row: "3")
    assert registry.draw({"analysis": "a"}) == {"second": "2", "first": "1"}
    assert registry.draw({"analysis": "c"}) == {}


def test_figures_leave_pyplot_alone_and_work_in_threads(golden_row: Build) -> None:
    sizes = []
    row = golden_row()
    threads = [threading.Thread(target=lambda: sizes.append(len(png(plot_golden_parameters(row))))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sizes) == 2
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_missing_matplotlib_says_what_to_install(golden_row: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-goldy\[report\]"'):
        plot_golden_parameters(golden_row())


def test_the_package_loads_without_lightning_analyses_or_drawing_libraries() -> None:
    code = (
        "import sys, lightning_goldy.report\n"
        "unwanted = ('lightning', 'lightning_goldy.analysis', 'lightning_goldy.callbacks', 'matplotlib', 'plotly')\n"
        "print([name for name in unwanted if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
