"""Results and their rows: what is written is what is read back, and every one says what was found."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest

from lightning_goldy.analysis.result import AnalysisResult, Row
from lightning_goldy.callbacks.finetune_comparison import Finetune, FinetuneComparisonResult
from lightning_goldy.core.files import to_json_line


@dataclass(frozen=True)
class TinyResult(AnalysisResult):
    loss: float

    def metrics(self) -> dict[str, float | None]:
        return {"loss": self.loss}

    def details(self) -> dict[str, Any]:
        return {"places": ((1, math.inf), (2, self.loss))}


def test_a_row_is_as_it_is_read_back() -> None:
    row = TinyResult(math.nan).row().at(step=3).to_dict()
    assert row["result"] == {"places": [[1, None], [2, None]]}
    assert json.loads(json.dumps(row, allow_nan=False)) == row == json.loads(to_json_line(row))


def test_a_result_without_a_name_is_told_by_its_class() -> None:
    assert TinyResult(2.5).headline() == "tiny: loss 2.5"
    assert AnalysisResult().headline() == "analysis"


@pytest.mark.parametrize(("metrics", "told"), [({"loss": 2.5}, "found: loss 2.5"), ({}, "found")])
def test_a_row_that_takes_its_name_later_is_called_so(metrics: dict[str, float | None], told: str) -> None:
    assert Row("", metrics).at(analysis="found").headline == told
    assert Row("", metrics).noted("of half").at(analysis="found").headline == f"{told}; of half"
    assert Row("", metrics, headline="It is so.").at(analysis="found").headline == "It is so."
    assert Row("own", metrics).at(analysis="found").headline == Row("own", metrics).headline


def test_a_comparison_of_finetunes_comes_back() -> None:
    result = FinetuneComparisonResult((Finetune("start", 4, 0.0, {"val/loss": 1.5}),), 4)
    again = FinetuneComparisonResult.from_json(result.to_json())
    assert again == result
    assert again.row() == result.row()
