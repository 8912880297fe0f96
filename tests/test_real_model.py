"""Every analysis on a pretrained model of 135 M parameters: what it says there can be checked against what is known.

The folder is named by GOLDY_REAL_MODEL; without it the tests are skipped.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_goldy.analysis import (
    attention_statistics,
    basin_volume,
    explain_change,
    golden_parameters,
    head_importance,
    knowledge_coupling,
    parameter_distribution,
    reverse_golden_parameters,
    taylor_diff,
)
from lightning_goldy.analysis.change import weight_change
from lightning_goldy.core import ParameterSpace, ParameterVector
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.pieces import KnowledgePiece

pytestmark = pytest.mark.slow

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of France is Paris.",
    "Water boils at one hundred degrees Celsius at sea level, and freezes at zero degrees.",
    "She opened the door, looked into the dark room, and slowly stepped back into the hall.",
    "To be, or not to be, that is the question: whether it is nobler in the mind to suffer.",
)

QUESTIONS = (
    "What is the name of the largest planet of the solar system? Jupiter. Which one is nearest to the sun?",
    "Who wrote the novel War and Peace, and in which year was its author born? Leo Tolstoy, in 1828.",
    "Which river flows through the city of Vienna? The Danube, which ends in the Black Sea after ten countries.",
    "Are more people living in Canada or in Spain? In Spain, which has about 48 million inhabitants today.",
)


@pytest.fixture(scope="module")
def folder() -> Path:
    named = os.environ.get("GOLDY_REAL_MODEL")
    if not named or not (Path(named) / "model.safetensors").is_file():
        pytest.skip("GOLDY_REAL_MODEL names no folder with a pretrained model")
    return Path(named)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def batches(tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": torch.tensor([tokenizer.encode(text)])} for text in TEXTS]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def finetuned(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[Any, BaseParameters]:
    """The model after three small steps on one text, and its base."""
    base = BaseParameters(ParameterVector.of(model, ParameterSpace.of(model)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    model.train()
    for _ in range(3):
        model(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), base


def test_golden_parameters_are_explained_by_rows_and_columns_more_than_by_chance(
    model: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    result = golden_parameters(model, batches[:3], top_k_percent=5, quorum=1.0)
    assert result.count > 5 * 0.05**3 * result.mask.space.numel
    assert 0.1 < result.over_null < 10
    assert result.cost.forwards == result.cost.backwards == 6


def test_a_budget_of_one_element_finds_the_super_weight(
    model: Any, tokenizer: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    """It lies in a down projection, does more than any single shot's, and as much on texts that did not choose."""
    questions = [{"input_ids": torch.tensor([tokenizer.encode(text)])} for text in QUESTIONS]
    result = reverse_golden_parameters(
        model, questions, eval_batches=batches, top_k_percent=1e-9, scope="global", rounds=2
    )
    assert result.count == 1
    (place,) = [name for name in result.mask.space.names if result.mask[name].any()]
    assert place.endswith("mlp.down_proj.weight")
    assert result.kl_divergence >= 3
    assert result.kl_divergence > 2 * max(result.single_shots.values())


def test_a_small_step_is_told_by_its_first_order(
    finetuned: tuple[Any, BaseParameters], batches: list[dict[str, torch.Tensor]]
) -> None:
    result = taylor_diff(finetuned[0], finetuned[1], batches[:1], orders=(1,), by=None)
    assert result.change < 0
    assert result.first_order == pytest.approx(result.change, rel=0.1)


def test_the_change_of_the_weights_is_small_and_has_a_shape(finetuned: tuple[Any, BaseParameters]) -> None:
    model, base = finetuned
    change = weight_change(model, base)
    assert 0 < change.relative_change < 1e-3
    shape = parameter_distribution(model, base, top=2, exact_below=64).whole("stable_rank")
    assert shape is not None
    assert 1 <= shape < 576


def test_the_change_survives_frozen_attention_in_part(
    finetuned: tuple[Any, BaseParameters], batches: list[dict[str, torch.Tensor]]
) -> None:
    result = explain_change(finetuned[0], finetuned[1], batches[:1], variants=("frozen_attention",))
    assert math.isfinite(result.row().metrics["loss"])


def test_some_heads_look_at_the_first_and_some_at_the_previous_token(
    model: Any, batches: list[dict[str, torch.Tensor]]
) -> None:
    statistics = attention_statistics(model, batches)
    assert statistics.statistic("first_token").max() > 0.9
    assert statistics.statistic("previous_token").max() > 0.5
    assert statistics.statistic("entropy").shape == (30, 9)


def test_the_basin_has_a_boundary(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    result = basin_volume(model, batches[:1], n_directions=2, cutoff=1e-2, seed=1)
    assert math.isfinite(result.log_volume)
    assert result.dimension == sum(parameter.numel() for parameter in model.parameters())


def test_heads_have_different_importance(model: Any, batches: list[dict[str, torch.Tensor]]) -> None:
    scores = head_importance(model, batches[:2], strategy="taylor")
    assert len(scores.ranking()) == 30 * 9
    assert float(scores.scores.std()) > 0


def test_a_fact_is_closest_to_its_own_paraphrase(model: Any, tokenizer: Any) -> None:
    pieces = [
        KnowledgePiece("france", "What is the capital of France?", "Paris"),
        KnowledgePiece("france again", "Which city is the capital of France?", "Paris"),
        KnowledgePiece("water", "At how many degrees Celsius does water boil?", "100"),
        KnowledgePiece("colour", "What colour is a ripe banana?", "Yellow"),
    ]
    cosines = knowledge_coupling(model, pieces, tokenizer=tokenizer).matrix
    others = torch.tensor([cosines[0, 2], cosines[0, 3], cosines[1, 2], cosines[1, 3]])
    assert float(cosines[0, 1]) > float(others.max())
