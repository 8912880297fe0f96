"""Every analysis on every family of models does what the documentation's table says."""

from __future__ import annotations

import pytest

from tests.references.model_zoo import ZOO
from tests.references.models_table import ANALYSES, PATH, render, run_cell
from tests.references.noted_table import read


def test_the_table_is_whole_and_reads_as_it_was_written() -> None:
    page = PATH.read_text()
    cells = read(page)
    assert set(cells) == {(family, analysis) for family in ZOO for analysis in ANALYSES}
    assert len(ZOO) >= 30
    assert render(cells) == page
    manners = {cell.partition(":")[0] for cell in cells.values()}
    assert manners <= {"exact", "falls back", "refused", "fails"}


@pytest.mark.slow
@pytest.mark.parametrize("analysis", ANALYSES)
@pytest.mark.parametrize("family", ZOO)
def test_a_cell_is_what_the_table_says(family: str, analysis: str) -> None:
    assert run_cell(family, analysis) == read(PATH.read_text())[family, analysis]
