"""Figures of knowledge coupling: what they draw is in the matrix, at any size."""

from __future__ import annotations

import io
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch

from lightning_goldy.analysis.coupling import CouplingResult, coupling_statistics
from lightning_goldy.analysis.coupling.drift import OTHERS, coupling_picture
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.coupling_charts import chart_coupling_distribution, chart_coupling_map
from lightning_goldy.report.coupling_plots import plot_coupling_distribution, plot_coupling_map
from lightning_goldy.report.coupling_tables import coupling_tables_html, readiness_table
from lightning_goldy.report.couplings import coupling_histogram, coupling_map, histogram_caption, map_caption, titled
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError


def coupled(count: int, *, categories: int = 3, failed: int = 0) -> CouplingResult:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    vectors /= vectors.norm(dim=1, keepdim=True)
    matrix = vectors @ vectors.T
    matrix.diagonal().fill_(1)
    norms = torch.ones(count, dtype=torch.float64)
    matrix[:failed], matrix[:, :failed], norms[:failed] = torch.nan, torch.nan, torch.nan
    pieces = tuple(
        {
            "id": str(place),
            "question": f"question {place}",
            "answer": f"answer {place % 4}",
            "category": f"kind {place % categories}" if categories and place % 6 else None,
            "group": None,
            "hop": None,
        }
        for place in range(count)
    )
    return CouplingResult(
        matrix=matrix.float(),
        norms=norms,
        log_probs=torch.zeros(count, dtype=torch.float64),
        pieces=pieces,
        failed=(),
        parameters=("h.0.w",),
        measure="gradient",
        normalize=True,
        center=False,
        projection=None,
        projection_error=None,
        seconds=0.0,
    )


def row_of(result: CouplingResult, most: int = 200) -> dict[str, Any]:
    statistics = coupling_statistics(result)
    return {
        "analysis": "knowledge_coupling",
        "step": 5,
        "metrics": statistics.scalars(),
        "result": {
            "n_pairs": statistics.n_pairs,
            "n_clusters": statistics.n_clusters,
            "thresholds": {"high": 0.4, "moderate": 0.1},
            **coupling_picture(result, statistics, most=most).details(),
        },
    }


@pytest.mark.parametrize(("count", "most", "failed"), [(12, 200, 0), (23, 5, 2), (23, 23, 2), (7, 1, 0), (1, 4, 0)])
def test_cells_are_means_over_blocks_of_pairs(count: int, most: int, failed: int) -> None:
    result = coupled(count, failed=failed)
    statistics = coupling_statistics(result)
    picture = coupling_picture(result, statistics, most=most)
    assert sum(picture.sizes) == count - failed == picture.n_pieces
    assert max(picture.sizes) - min(picture.sizes) <= 1
    bounds = np.cumsum([0, *picture.sizes])
    blocks = [statistics.order[start:stop] for start, stop in itertools.pairwise(bounds)]
    for row, first in enumerate(blocks):
        for column, second in enumerate(blocks):
            pairs = [float(result.matrix[i, j]) for i in first for j in second if i != j]
            expected = sum(pairs) / len(pairs) if pairs else 1.0
            assert picture.cells[row][column] == pytest.approx(expected, abs=1e-4)
    assert sum(picture.counts) == statistics.n_pairs


def test_the_histogram_counts_every_pair_once() -> None:
    result = coupled(40, failed=1)
    picture = coupling_picture(result, coupling_statistics(result), most=3)
    kept = result.matrix[1:, 1:].numpy().astype(np.float64)
    pairs = kept[np.triu_indices(39, 1)]
    assert list(picture.counts) == np.histogram(pairs, bins=200, range=(-1, 1))[0].tolist()


def test_rare_categories_share_a_colour() -> None:
    result = coupled(120, categories=20)
    picture = coupling_picture(result, coupling_statistics(result))
    names = set(picture.categories)
    assert None in names
    assert OTHERS in names
    assert len(names) == 11
    # A block of several shows what most of it is.
    assert len(coupling_picture(result, coupling_statistics(result), most=2).categories) == 2


@pytest.mark.parametrize("saved", [False, True], ids=["as logged", "from the file"])
@pytest.mark.parametrize("categories", [3, 0])
def test_figures_draw_the_cells_and_the_counts(saved: bool, categories: int) -> None:
    row: Any = row_of(coupled(30, categories=categories))
    row = json.loads(to_json_line(row)) if saved else row
    assert set(draw_plots(row)) == {"heat_map", "distribution"}
    assert CHARTS.names("knowledge_coupling") == ("Which pieces are coupled", "How much is coupled")
    cells = np.array(row["result"]["heat_map"]["cells"])
    figure, chart = plot_coupling_map(row), chart_coupling_map(row)
    image = next(axes.images[0] for axes in figure.axes if axes.images and axes.get_xlabel())
    assert np.array(image.get_array()) == pytest.approx(cells)
    assert np.array(chart.data[0].z) == pytest.approx(cells)
    limit = coupling_map(row).limit
    assert image.get_clim() == (-limit, limit)
    assert (chart.layout.coloraxis.cmin, chart.layout.coloraxis.cmax) == (-limit, limit)
    assert len(figure.legends) == (1 if categories else 0)
    assert len(chart.data) == (2 if categories else 1)
    assert chart.layout.meta["caption"] == map_caption(row)
    spread, bars = plot_coupling_distribution(row), chart_coupling_distribution(row)
    found = coupling_histogram(row)
    assert found.counts.sum() == 30 * 29 // 2
    assert list(bars.data[0].y) == found.counts.tolist()
    assert [line.get_xdata()[0] for line in spread.axes[0].lines] == [0.0, 0.1, 0.4]
    assert bars.layout.meta["caption"] == histogram_caption(row)
    for each in (figure, spread):
        buffer = io.BytesIO()
        each.savefig(buffer, format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")


def test_many_pieces_are_averaged_and_the_caption_says_so() -> None:
    row = row_of(coupled(45), most=10)
    assert "Each cell is a mean over blocks of up to 5 pieces" in map_caption(row)
    image = plot_coupling_map(row).axes[1].images[0]
    assert image.get_array().shape == (10, 10)
    # The axis counts pieces, not blocks.
    assert image.get_extent() == [-0.5, 44.5, 44.5, -0.5]
    assert "Each cell is one pair" in map_caption(row_of(coupled(10)))


def test_one_piece_has_no_pair() -> None:
    row = row_of(coupled(1))
    assert plot_coupling_distribution(row).axes[0].texts[0].get_text() == "no pair"
    assert plot_coupling_map(row).axes[0].images[0].get_array().tolist() == [[1.0]]
    assert chart_coupling_distribution(row).data[0].y is not None


def test_every_metric_has_a_meaning() -> None:
    description = description_of("knowledge_coupling")
    for name in row_of(coupled(12))["metrics"]:
        assert description.meaning(name), name


def test_a_title_has_a_step_where_there_was_a_training() -> None:
    row = row_of(coupled(5))
    assert "step 5" in plot_coupling_map(row).get_suptitle()
    assert titled("Coupling", {"step": 0}) == "Coupling"


@pytest.mark.parametrize(
    "result",
    [
        {},
        {"heat_map": {"cells": [[1.0]], "sizes": [1, 1], "categories": [None], "n_pieces": 2}, "thresholds": {}},
        {"distribution": {"edges": [0], "counts": [1]}, "thresholds": {"high": 1, "moderate": 0}},
    ],
    ids=range(3),
)
def test_a_row_that_lacks_something_is_refused(result: dict[str, Any]) -> None:
    row = {"analysis": "knowledge_coupling", "step": 1, "result": result}
    for draw in (plot_coupling_map, chart_coupling_map, plot_coupling_distribution, chart_coupling_distribution):
        with pytest.raises(ReportError, match="a row of knowledge_coupling lacks"):
            draw(row)


def test_tables_escape_what_pieces_and_checks_say() -> None:
    side = {"id": "1", "question": "<script>x</script>", "answer": None}
    check = {
        "check": "<i>", "value": None, "rule": "at least", "threshold": 50, "status": "warn", "meaning": "few",
        "next_step": "take more",
    }  # fmt: skip
    row = {"result": {"top": [{"cosine": 0.5, "first": side, "second": {**side, "question": None}, "same": []}],
                      "readiness": {"verdict": "not ready", "checks": [check]}}}  # fmt: skip
    page = coupling_tables_html(row)
    assert "<script>" not in page
    assert "<i>" not in page
    assert "few Next: take more" in page
    assert readiness_table([check]).row_count == 1
    with pytest.raises(ReportError, match="lacks or spoils 'value'"):
        readiness_table([{"check": "a", "meaning": "", "status": "pass", "rule": "", "threshold": 1}])
