"""Figures of knowledge coupling: what they draw is in the matrix, at any size."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch

from lightning_goldy.analysis.coupling import OTHERS, CouplingResult, coupling_picture, coupling_statistics
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import ReportError, draw_figures, figures_of
from lightning_goldy.report.topics.coupling import (
    chart_coupling_distribution,
    chart_coupling_map,
    coupling_histogram,
    coupling_map,
    coupling_map_caption,
    coupling_tables_html,
    distribution_caption,
    readiness_table,
    titled,
)

PNG = b"\x89PNG\r\n\x1a\n"


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
        "metrics": statistics.metrics(),
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


def cells_of(figure: Any) -> np.ndarray:
    """Numbers of the heat map as a table."""
    (table,) = (columns for name, columns in figure.data.items() if name.startswith("cells"))
    return np.array(table["value"], dtype=float).reshape(len(set(table["y"])), -1)


@pytest.mark.parametrize("saved", [False, True], ids=["as logged", "from the file"])
@pytest.mark.parametrize("categories", [3, 0])
def test_figures_draw_the_cells_and_the_counts(saved: bool, categories: int) -> None:
    row: Any = row_of(coupled(30, categories=categories))
    row = json.loads(to_json_line(row)) if saved else row
    headings = {entry.name: entry.heading for entry in figures_of("knowledge_coupling")}
    assert headings == {"heat_map": "Which pieces are coupled", "distribution": "How much is coupled"}
    figures = draw_figures(row)
    drawn, spread = figures["heat_map"], figures["distribution"]
    assert cells_of(drawn) == pytest.approx(np.array(row["result"]["heat_map"]["cells"]), abs=1e-6)
    limit = coupling_map(row).limit
    assert drawn.ranges == {"colour": (-limit, limit)}
    strip = next((columns["category"] for name, columns in drawn.data.items() if name.startswith("strip")), None)
    assert strip == (row["result"]["heat_map"]["categories"] if categories else None)
    assert drawn.caption == coupling_map_caption(row)
    edges, counts, _ = coupling_histogram(row)
    assert counts.sum() == 30 * 29 // 2
    assert spread.data["bins"]["count"] == counts.tolist()
    assert spread.data["thresholds"]["cosine"] == [0.0, 0.1, 0.4]
    assert spread.data["thresholds"]["label"][1:] == ["moderate\nfrom 0.1", "high\nfrom 0.4"]
    assert spread.ranges["bins"][0] <= edges[0] <= edges[-1] <= spread.ranges["bins"][1]
    assert spread.ranges["bins"][1] >= 0.4
    assert spread.caption == distribution_caption(row)
    for figure in figures.values():
        assert figure.png().startswith(PNG)


def test_every_category_has_its_colour_beside_its_pieces() -> None:
    row = row_of(coupled(12))
    figure = chart_coupling_map(row)
    strip = figure.data["strip_0"]
    categories = row["result"]["heat_map"]["categories"]
    assert None in categories
    assert strip["category"] == categories
    assert strip["place"] == list(range(12))
    base, known = figure.bare()["concat"][0]["layer"]
    # Blocks without a category keep their place, and have no colour.
    assert base["mark"]["opacity"] == 0
    assert known["transform"] == [{"filter": "isValid(datum.category)"}]
    assert known["encoding"]["color"]["field"] == "category"
    heights = [part["height"] for part in figure.bare()["concat"]]
    assert heights == [{"step": 36}] * 2


def test_many_pieces_are_averaged_and_the_caption_says_so() -> None:
    row = row_of(coupled(45), most=10)
    assert "Each cell is a mean over blocks of up to 5 pieces" in coupling_map_caption(row)
    figure = chart_coupling_map(row)
    assert cells_of(figure).shape == (10, 10)
    # The axes count pieces, not blocks.
    labels = [label.partition("|")[2] for label in dict.fromkeys(figure.data["cells_1"]["y"])]
    assert (labels[0], labels[-1]) == ("0 to 4", "41 to 44")
    assert "Each cell is one pair" in coupling_map_caption(row_of(coupled(10)))
    assert coupling_map(row_of(coupled(3))).labels == ("0", "1", "2")


def test_two_hundred_blocks_are_drawn() -> None:
    figure = chart_coupling_map(row_of(coupled(230)))
    assert cells_of(figure).shape == (200, 200)
    assert figure.bare()["concat"][1]["width"] == {"step": 3}
    assert figure.png(1.0).startswith(PNG)


def test_one_piece_has_no_pair() -> None:
    row = row_of(coupled(1))
    assert chart_coupling_distribution(row) == "There is no pair of two pieces."
    assert cells_of(chart_coupling_map(row)).tolist() == [[1.0]]
    assert list(draw_figures(row)) == ["heat_map"]


def test_every_metric_has_a_meaning() -> None:
    description = description_of("knowledge_coupling")
    for name in row_of(coupled(12))["metrics"]:
        assert description.meaning(name), name


def test_a_title_has_a_step_where_there_was_a_training() -> None:
    row = row_of(coupled(5))
    assert "step 5" in chart_coupling_map(row).title
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
    for draw in (chart_coupling_map, chart_coupling_distribution):
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
