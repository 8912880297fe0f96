"""Marks of low precision, the floor of rounding, and expansions in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import taylor_diff
from lightning_goldy.analysis.change import weight_change
from lightning_goldy.analysis.precision import in_float32, low_precision, precision_note, with_precision
from lightning_goldy.analysis.result import Row
from lightning_goldy.core import ParameterVector
from lightning_goldy.report.formatting import remarks
from lightning_goldy.report.topics.golden import change_caption
from tests.references.models import build, token_batch


def test_the_floor_is_what_rounding_makes() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(300, 200, bias=False)
    before = ParameterVector.of(layer)
    rounded = layer.weight.detach().bfloat16().float()
    expected = float((rounded - before["weight"]).norm() / before["weight"].norm())
    layer.weight.data += 1e-5 * torch.randn_like(layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        change = weight_change(layer, before)
    assert change.rounding is not None
    assert change.rounding["relative_change"] == pytest.approx(expected, rel=0.02)
    # Of weights up to 0.06 the half of a step is mostly larger than such a change.
    assert 0.8 < change.rounding["lost_share"] < 1
    assert change.metrics()["rounding_floor"] == change.rounding["relative_change"]
    assert "rounding alone makes 0.1" in change_caption(change.row().to_dict())
    assert weight_change(layer, before).rounding is None


def test_a_model_in_bfloat16_is_expanded_in_float32_and_comes_back() -> None:
    model = build("gpt2").bfloat16()
    base = ParameterVector.of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    kept = {name: (value, value.clone()) for name, value in model.state_dict().items()}
    batches = [token_batch(3)]
    options = {"by": None, "function_space": False}
    found = taylor_diff(model, base, batches, **options)
    exact = taylor_diff(copy.deepcopy(model).float(), base.to(torch.float32), batches, **options)
    assert found.precision is not None
    assert (found.precision["dtype"], found.precision["training"]) == ("float32", "bfloat16")
    for name in ("base_loss", "loss", "first_order", "second_order", "step_norm"):
        assert getattr(found, name) == pytest.approx(getattr(exact, name), rel=1e-6), name
    assert exact.precision is None
    after = model.state_dict()
    assert all(
        after[name].data_ptr() == value.data_ptr() and torch.equal(value, copied)
        for name, (value, copied) in kept.items()
    )
    assert remarks(found.row().to_dict()) == ["Computed in float32, while the training computes in bfloat16 (weights)."]


def test_autocast_is_off_inside_an_expansion() -> None:
    model = build("gpt2")
    base = ParameterVector.of(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.1)
    batches = [token_batch(3)]
    options = {"orders": [1], "by": None, "function_space": False}
    exact = taylor_diff(model, base, batches, **options)
    with torch.autocast("cpu", torch.bfloat16):
        found = taylor_diff(model, base, batches, **options)
    assert found.first_order == exact.first_order
    assert found.precision is not None
    assert found.precision["by"] == "autocast"


def test_where_memory_does_not_allow_it_the_result_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_goldy.analysis.precision.available_memory", lambda: 10)
    model = nn.Linear(2, 2).bfloat16()
    with in_float32(model) as raised:
        assert not raised
        assert model.weight.dtype == torch.bfloat16
    model = build("gpt2").bfloat16()
    found = taylor_diff(model, ParameterVector.of(model), [token_batch(2)], orders=[1])
    assert found.precision is not None
    assert found.precision["dtype"] == "bfloat16"
    assert found.precision["loss_floor"] == pytest.approx(2**-7 * found.loss)
    assert "differences of the loss below" in remarks(found.row().to_dict())[0]


def test_rows_carry_the_mark_and_changes_below_the_floor_are_told() -> None:
    model = nn.Linear(2, 2).half()
    row = with_precision(Row("tiny", {"loss": 2.0, "change": 0.001}), model)
    assert row.result["precision"] == {
        "dtype": "float16", "by": "weights", "epsilon": 2**-10, "loss_floor": 2**-9
    }  # fmt: skip
    assert row.headline.endswith("nats may be rounding, as this change may")
    assert with_precision(row, model) is row
    assert "precision" not in with_precision(Row("tiny", {"loss": 2.0}), nn.Linear(2, 2)).result
    assert precision_note({"dtype": "float16", "by": "weights"}, {}) == "computed in float16 (weights)"
    assert low_precision(nn.Identity()) is None
