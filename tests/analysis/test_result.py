"""Results and their rows: what is written is what is read back, and every one says what was found."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pkgutil
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lightning_goldy
from lightning_goldy.analysis.circuits import Circuit, CircuitGraph
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
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


def a_result(values: list[float], **more: Any) -> Circuit:
    """A circuit of two nodes."""
    graph = CircuitGraph(("input", "m0"), ("m0", "output"), (1, 2), ((1,), ()), (-1, 0))
    scores = torch.tensor([[values[0], 0.0], values[1:]], dtype=torch.float64)
    return Circuit(graph, scores, scores > 0, "eap", "kl", "zero", math.nan, -1.0, 1, **more)


def test_results_with_tensors_are_equal_by_value_and_have_a_hash() -> None:
    first, same, other = a_result([1.0, 2.0, 3.0]), a_result([1.0, 2.0, 3.0], cost=Cost(3)), a_result([1.0, 2.0, 4.0])
    assert first == same
    assert Circuit.from_json(first.to_json()) == first
    assert first != other
    assert first != "a circuit"
    assert first in [other, same]
    assert hash(first) == hash(same)
    assert len({first, same, other}) == 2
    assert a_result([math.nan, 2.0, 3.0]) == a_result([math.nan, 2.0, 3.0])
    assert dataclasses.replace(first, kept=first.kept & False) != first
    assert dataclasses.replace(first, scores=first.scores.float()) != first


def test_no_frozen_dataclass_asks_a_tensor_for_a_truth_value() -> None:
    """What holds tensors or arrays is a result, which compares them by element, or equal to itself alone."""
    for info in pkgutil.walk_packages(lightning_goldy.__path__, "lightning_goldy."):
        module = importlib.import_module(info.name)
        for kind in vars(module).values():
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__):
                continue
            if not kind.__dataclass_params__.frozen:
                continue
            held = [field for field in dataclasses.fields(kind) if field.compare]
            raising = [f.name for f in held if re.search(r"Tensor|NDArray|ndarray|ParameterVector|Mask", str(f.type))]
            by_value = kind.__dict__.get("__eq__") is not None
            assert not raising or issubclass(kind, AnalysisResult) or not by_value, (kind, raising)
            assert not issubclass(kind, AnalysisResult) or kind.__eq__ is AnalysisResult.__eq__, kind
