"""Coupling in a model that has learnt the atlas: what belongs together is coupled, and steps move what is coupled."""

from __future__ import annotations

import pytest
import torch

from lightning_goldy.analysis import CouplingResult, activation_similarity, coupling_statistics, knowledge_coupling
from lightning_goldy.commands.demo import DemoSettings
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import KnowledgePiece, encode_pieces
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector, applied
from lightning_goldy.data import PadCollator
from lightning_goldy.training.models import build_model, complete_config


class Atlas:
    """Sixteen countries after seconds of training, each fact asked in two phrasings."""

    def __init__(self) -> None:
        settings = DemoSettings.fast()
        data = settings.pretraining_data()
        data.setup()
        torch.manual_seed(0)
        self.model = build_model(complete_config(settings.model_config, data.tokenizer))
        batches = list(data.question_dataloader(data.training_questions()))
        self.pieces = [
            KnowledgePiece(
                f"{fact.subject} {fact.relation} {number}",
                fact.prompts[number],
                fact.answer,
                category=fact.relation,
                group=fact.subject,
            )
            for fact in data.facts
            for number in (0, 1)
        ]
        self.options = {"tokenizer": data.tokenizer, "template": "{question}"}
        self.untrained = self.coupling()
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        for _ in range(30):
            for place in torch.randperm(len(batches)):
                optimizer.zero_grad()
                CausalLMObjective().loss(self.model, batches[place]).backward()
                optimizer.step()
        self.model.eval()

    def coupling(self) -> CouplingResult:
        return knowledge_coupling(self.model, self.pieces, **self.options)


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas()


def mean_where(result: CouplingResult, same: dict[str, bool]) -> float:
    """Mean coupling of pairs that share these columns and differ in those."""
    chosen = ~torch.eye(len(result), dtype=torch.bool)
    for name, wanted in same.items():
        values = result.column(name)
        chosen &= torch.tensor([[(one == other) is wanted for one in values] for other in values])
    return float(result.matrix[chosen].mean())


def test_what_belongs_together_is_coupled(atlas: Atlas) -> None:
    result = atlas.coupling()
    assert result.log_probs.mean() > atlas.untrained.log_probs.mean() + 3  # it has learnt
    one_fact = mean_where(result, {"group": True, "category": True})
    one_answer = mean_where(result, {"group": False, "answer": True})
    unrelated = mean_where(result, {"group": False, "category": False, "answer": False})
    assert one_fact > one_answer > unrelated + 0.3
    assert one_fact > 0.8
    assert abs(unrelated) < 0.05
    contrasts = coupling_statistics(result).contrasts
    # One subject: two phrasings of one fact, and other facts, which hardly count.
    for name, least in (("group", 0.08), ("answer", 0.5), ("category", 0.02)):
        assert contrasts[name]["difference"] > least, (name, contrasts[name])


def test_the_rival_sees_what_is_asked(atlas: Atlas) -> None:
    result = activation_similarity(atlas.model, atlas.pieces, center=True, **atlas.options)
    contrasts = coupling_statistics(result).contrasts
    assert all(contrasts[name]["difference"] > 0.3 for name in ("answer", "category"))


def test_a_step_along_one_gradient_moves_the_others_as_they_are_coupled(atlas: Atlas) -> None:
    pieces = atlas.pieces[::5]
    before = knowledge_coupling(atlas.model, pieces, normalize=False, **atlas.options)
    space = ParameterSpace.of(atlas.model).subspace(before.parameters)
    batch = PadCollator(0)(encode_pieces(pieces[:1], **atlas.options, tokens="answer"))
    log_prob = CausalLMObjective().log_probs(atlas.model, batch).sum()
    gradient = torch.autograd.grad(log_prob, list(space.resolve(atlas.model).values()))
    step = 1e-3 / float(before.norms[0]) ** 2
    with applied(atlas.model, ParameterVector(space, dict(zip(space.names, gradient, strict=True))), step):
        after = knowledge_coupling(atlas.model, pieces, **atlas.options)
    moved = after.log_probs - before.log_probs
    torch.testing.assert_close(moved, step * before.matrix[0].double(), rtol=0.05, atol=5e-6)
