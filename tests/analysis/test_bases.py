"""Every analysis takes a base in every form, and finds the same with each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import (
    attention_statistics,
    explain_change,
    parameter_distribution,
    taylor_diff,
    track_attention,
)
from lightning_goldy.analysis.attention import Prompt
from lightning_goldy.analysis.linearized import FrozenAttention, LinearizedMLP, TangentModel, build_variant
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.vector import ParameterVector
from tests.core.test_base import SOURCES, write_vector
from tests.references.models import build

IDS = torch.tensor([[1, 2, 1, 3], [4, 5, 4, 2]])
BATCH = {"input_ids": IDS}

FORMS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "module": lambda base, folder: base,
    "base parameters": lambda base, folder: BaseParameters(ParameterVector.of(base)),
    "name of a file": lambda base, folder: str(write_vector(base, folder)),
    **{write.__name__: write for write in SOURCES},
}


def tracked(model: nn.Module, base: Any) -> str:
    prompt = Prompt.of("one", [1, 2, 3], model, None, 8)
    return track_attention(model, [BATCH], prompts=[prompt], base=base).to_json()


def logits(variant: nn.Module) -> list[Any]:
    with torch.no_grad():
        return variant(input_ids=IDS).logits.tolist()


USES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "attention_statistics": lambda model, base: attention_statistics(model, [BATCH], base=base).to_json(),
    "track_attention": tracked,
    "explain_change": lambda model, base: explain_change(model, base, [BATCH]).to_json(),
    "taylor_diff": lambda model, base: taylor_diff(model, base, [BATCH]).to_json(),
    "parameter_distribution": lambda model, base: parameter_distribution(model, base).to_json(),
    "FrozenAttention": lambda model, base: logits(FrozenAttention(model, base)),
    "LinearizedMLP": lambda model, base: logits(LinearizedMLP(model, base)),
    "TangentModel": lambda model, base: logits(TangentModel(model, base)),
    "build_variant": lambda model, base: logits(build_variant("linear_mlp", model, base)),
}


@pytest.mark.parametrize("use", USES)
def test_a_base_may_have_any_form(use: str, tmp_path: Path) -> None:
    base, model = build("gpt2", seed=0).eval(), build("gpt2", seed=1).eval()
    expected = USES[use](model, ParameterVector.of(base))
    assert expected != USES[use](model, ParameterVector.of(model))
    for form, make in FORMS.items():
        (tmp_path / form).mkdir()
        assert USES[use](model, make(base, tmp_path / form)) == expected, form


@pytest.mark.parametrize("use", USES)
def test_what_is_no_base_is_refused(use: str) -> None:
    with pytest.raises(TypeError, match=r"a base is a module, .*; got float"):
        USES[use](build("gpt2", seed=1), 0.5)
