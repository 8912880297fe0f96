"""Tests that harmless heads are found in a model that has learnt something."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis.heads import head_importance, prune_heads, regrow_heads
from lightning_goldy.core.architecture import Head, HeadGates
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.vector import ParameterVector
from tests.data.shared_data import shared_file

# The training takes ten seconds.
pytestmark = pytest.mark.slow

LENGTH = 64
LEVEL = 0.25


class Trained:
    """A character model after some seconds of plays, with probe rows from what it was trained on and others."""

    def __init__(self) -> None:
        text = shared_file("tinyshakespeare.txt").read_text(encoding="utf-8")
        characters = sorted(set(text))
        index = {character: place for place, character in enumerate(characters)}
        self.ids = torch.tensor([index[character] for character in text])
        self.generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(characters),
            n_positions=LENGTH,
            n_embd=64,
            n_layer=3,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        self.model: Any = GPT2LMHeadModel(config)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        for _ in range(350):
            optimizer.zero_grad()
            CausalLMObjective().loss(self.model, self.rows(16, 0, 900_000)).backward()
            optimizer.step()
        self.model.eval()
        self.gates = HeadGates(self.model)
        self.probe = [self.rows(32, 0, 900_000)]
        self.held_out = self.rows(64, 920_000, 1_100_000)
        self.before = self.loss(())

    def rows(self, count: int, first: int, last: int) -> dict[str, Tensor]:
        starts = torch.randint(first, last, (count,), generator=self.generator).tolist()
        return {"input_ids": torch.stack([self.ids[start : start + LENGTH] for start in starts])}

    @torch.no_grad()
    def loss(self, closed: tuple[Head, ...]) -> float:
        with self.gates.closing_only(closed):
            return float(CausalLMObjective().loss(self.model, self.held_out))

    def cost(self, strategy: str, seed: int = 0) -> float:
        """Loss on held-out text that cutting a quarter of the heads adds, nats."""
        scores = head_importance(self.model, self.probe, strategy=strategy, seed=seed)
        return self.loss(scores.least_important(LEVEL)) - self.before


@pytest.fixture(scope="module")
def trained() -> Trained:
    return Trained()


def test_it_has_learnt(trained: Trained) -> None:
    assert trained.before < 2.6  # 4.17 nats for uniform guesses, 3.3 for frequencies of characters


@pytest.mark.parametrize("strategy", ["taylor", "combined"])
def test_harmless_heads_are_found(trained: Trained, strategy: str) -> None:
    random = torch.tensor([trained.cost("random", seed) for seed in range(20)])
    assert random.mean() > 0.02
    # Of what a random quarter costs, the chosen quarter costs less than a third.
    assert trained.cost(strategy) < random.mean() / 3


def test_taylor_ranks_heads_as_ablation_does(trained: Trained) -> None:
    taylor, ablation = (
        head_importance(trained.model, trained.probe, strategy=strategy).scores.flatten().argsort().argsort().double()
        for strategy in ("taylor", "ablation")
    )
    assert torch.corrcoef(torch.stack([taylor, ablation]))[0, 1] > 0.6


def test_what_was_cut_grows_again(trained: Trained) -> None:
    base = BaseParameters(ParameterVector.of(trained.model))
    worst = head_importance(trained.model, trained.probe, strategy="ablation").ranking()[-3:]
    prune_heads(trained.model, worst)
    assert trained.loss(trained.gates.closed) > trained.before + 0.1
    regrow_heads(trained.model, worst, base=base)
    assert trained.loss(()) == trained.before
