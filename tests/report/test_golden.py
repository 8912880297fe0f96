from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_goldy.report.figures import ReportError, draw_figures
from lightning_goldy.report.topics.golden import (
    chart_change_histogram,
    chart_golden_parameters,
    chart_parameter_distribution,
    chart_search_history,
    chart_weight_changes,
    golden_density,
    relative_change,
    search_caption,
)

Build = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n\x1a\n"


def cells_of(figure: Any) -> dict[tuple[str, str], float | None]:
    """Numbers of a heat map by the labels that a reader sees."""
    table = figure.data["cells"]
    rows, columns = ([label.partition("|")[2] for label in table[axis]] for axis in "yx")
    return dict(zip(zip(rows, columns, strict=True), table["value"], strict=True))


def test_golden_heat_map_has_a_cell_for_every_block_and_kind(golden_row: Build) -> None:
    figure = draw_figures(golden_row())["density"]
    blocks = ("embeddings", "transformer.h.0", "transformer.h.1")
    kinds = ("embedding", "attention", "mlp", "norm")
    cells = cells_of(figure)
    assert list(cells) == [(block, kind) for block in blocks for kind in kinds]
    assert list(cells.values()) == [1, None, None, None, None, 4, 0, 100, None, 4, 0, None]
    assert figure.ranges == {"colour": (0.0, 100.0)}
    assert "by chance 0.25 %" in figure.caption
    assert figure.title == "Where the golden parameters are, step 10"
    assert figure.png().startswith(PNG)


def test_text_on_dark_cells_is_light_and_on_bright_cells_dark(golden_row: Build) -> None:
    figure = chart_golden_parameters(golden_row())
    pixels = np.asarray(Image.open(io.BytesIO(figure.png(2.0))).convert("RGB")).astype(int)

    def surroundings(colour: tuple[int, int, int]) -> Any:
        # A cell of that colour, with the letters in it.
        same = np.abs(pixels - colour).sum(-1) < 12
        lines, columns = np.nonzero(same)
        return pixels[lines.min() : lines.max(), columns.min() : columns.max()].reshape(-1, 3)

    # The darkest and the brightest colour of cividis, of the cells with 0 and with 100 %.
    assert surroundings((0, 32, 81)).max() > 240
    assert surroundings((252, 230, 71)).sum(-1).min() < 60


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
    caption = chart_weight_changes(snapshot_row()).caption
    assert caption == "the whole model moved by 8 % of its base norm (||Delta|| = 0.5)"


@pytest.mark.parametrize("count", [1, 48, 200])
def test_heat_map_survives_any_number_of_blocks_and_long_names(golden_row: Build, count: int) -> None:
    row = golden_row(blocks=[f"base_model.model.transformer.some_long_name.h.{index}" for index in range(count)])
    figure = chart_golden_parameters(row)
    values = list(cells_of(figure).values())
    assert len(values) == 4 * (count + 1)
    assert values.count(None) == 3 + count + count // 2
    png = figure.png()
    assert png.startswith(PNG)
    # As tall as its rows need.
    assert struct.unpack(">II", png[16:24])[1] > 1.5 * 18 * (count + 1)


def test_names_are_shown_as_they_are(golden_row: Build) -> None:
    name = "<script>$\\frac{$_a^|b.c[0]"
    figure = chart_golden_parameters(golden_row(blocks=[name]))
    assert (name, "mlp") in cells_of(figure)
    assert figure.png().startswith(PNG)


def test_unknown_kinds_come_last(golden_row: Build) -> None:
    row = golden_row(blocks=["h.0"])
    row["result"]["tensors"].insert(0, {"name": "b", "block": "h.0", "kind": "router", "numel": 4, "golden": 1})
    assert golden_density(row).kinds == ("embedding", "attention", "mlp", "norm", "router")


def test_a_model_that_did_not_move_can_be_drawn(snapshot_row: Build) -> None:
    row = snapshot_row()
    for tensor in row["result"]["tensors"]:
        tensor["delta_norm"] = 0.0
    row["result"]["histogram"] |= {"counts": [0, 0, 0], "zero": 400}
    assert chart_weight_changes(row).png().startswith(PNG)
    assert chart_change_histogram(row) == "No element has changed."
    assert list(draw_figures(row)) == ["relative_change"]


def test_norms_that_were_not_finite_are_empty_cells(snapshot_row: Build) -> None:
    row = snapshot_row()
    row["result"]["tensors"][1]["delta_norm"] = None
    grid = relative_change(row)
    assert np.isnan(grid.values[1, grid.kinds.index("mlp")])
    assert chart_weight_changes(row).png().startswith(PNG)


def test_histogram_has_the_bins_of_the_row(snapshot_row: Build) -> None:
    figure = draw_figures(snapshot_row())["change_histogram"]
    assert figure.data["bins"] == {"low": [-4, -3, -2], "high": [-3, -2, -1], "count": [1, 20, 300]}
    encoding = figure.bare()["encoding"]
    assert encoding["y"]["scale"]["type"] == "log"
    assert (encoding["x"]["title"], encoding["y"]["title"]) == ("log10 |Delta|", "elements")
    assert figure.caption == "321 elements changed, 79 did not at all (19.8 %)"
    assert figure.png().startswith(PNG)


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
        chart_change_histogram(row)


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
        chart_golden_parameters(row)


def test_every_registered_figure_of_a_row_is_drawn(golden_row: Build, snapshot_row: Build) -> None:
    assert list(draw_figures(golden_row())) == ["density"]
    assert list(draw_figures(snapshot_row())) == ["relative_change", "change_histogram"]


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
    figure = chart_search_history(row)
    points, sizes = figure.data["points_0"], figure.data["points_1"]

    def of(line, table, axis="y"):
        return [value for name, value in zip(table["line"], table[axis], strict=True) if name == line]

    assert of("kept", points) == [2.0, 2.5, 4.0]
    assert of("greedy", points) == [1.0, 2.5, 4.0]
    assert of("pool", points) == [2.0, None, 3.0]
    assert of("pool", points, "note")[0] == "pool of 5 for 4"
    assert of("pool, accepted", points) == [2.0, None, None]
    assert of("single shot by gradient", points) == [0.5, 0.5]
    assert of("single shot by $x<b>", points) == [0.25, 0.25]
    assert of("elements of the pool", sizes) == [5, 10, 15]
    assert figure.caption == search_caption(row)
    assert "1 % of all elements, strategy chaos_driven, 4 passes: 3.5 nats" in search_caption(row)
    assert search_caption(row).endswith("pools accepted: 1 of 3")
    assert list(draw_figures(row)) == ["history"]
    assert figure.png().startswith(PNG)


def test_a_missing_pool_is_a_gap_and_a_spoiled_row_an_error(row):
    points = chart_search_history(row).data["points_0"]
    assert [value for name, value in zip(points["line"], points["y"], strict=True) if name == "pool"][1] is None
    del row["result"]["history"][1]["kl"]
    with pytest.raises(ReportError, match="'kl'"):
        chart_search_history(row)
    row["result"]["history"] = None
    with pytest.raises(ReportError):
        chart_search_history(row)


def test_the_shape_of_the_change_has_a_panel_for_each_column():
    tensor = {"block": "h.0", "numel": 4, "stable_rank": 2.0, "alignment_over_chance": 3.0}
    row = {"result": {"tensors": [tensor, tensor | {"numel": 12, "stable_rank": 4.0}, tensor | {"block": "h.1"}]}}
    figure = chart_parameter_distribution(row)
    assert [figure.data[f"bars_{place}"]["value"] for place in range(3)] == [[3.5, 2.0], [3.0, 3.0], [0.0, 0.0]]
    titles = [panel["layer"][0]["encoding"]["x"]["title"] for panel in figure.bare()["concat"]]
    assert titles == ["stable rank", "alignment over chance", "histogram drift, nats", "intruders, share"]
    row["result"]["tensors"].append(tensor | {"block": "wte", "alignment_over_chance": 12000.0})
    (axis,) = (
        panel["layer"][0]["encoding"]["x"]["scale"] for panel in chart_parameter_distribution(row).bare()["concat"][1:2]
    )
    assert axis["type"] == "log"
    assert figure.png().startswith(PNG)
    with pytest.raises(ReportError, match="'numel'"):
        chart_parameter_distribution({"result": {"tensors": [{"block": "h.0", "stable_rank": 1.0}]}})


def test_the_caption_says_what_rows_and_columns_explain_and_what_random_tokens_give(golden_row: Build) -> None:
    row = golden_row()
    row["metrics"] = {"count": 9, "density": 0.02, "over_null": 0.5, "over_null_low": 0.4, "over_null_high": 0.625}
    row["metrics"]["control_count"] = 12
    assert chart_golden_parameters(row).caption.endswith(
        "density 2 %, in matrices 0.5 times what shared rows and columns explain (95 % over samples: 0.4 to 0.625); "
        "golden with random tokens 12, with these samples 9"
    )
