"""Pieces on their way to batches, and pieces that fail."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from lightning_goldy.analysis import CouplingError, knowledge_coupling
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import AnswerTokens, KnowledgePiece, encode_pieces
from lightning_goldy.data import byte_tokenizer
from lightning_goldy.training.models import build_model, complete_config
from tests.references.coupling import cosines, gradients
from tests.references.coupling_models import pieces
from tests.references.models import build

CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 64}
KNOWLEDGE = [
    KnowledgePiece("a", "What is the capital of Peru?", "Lima", category="capital", group="Peru", hop=1),
    KnowledgePiece("b", "On which continent is Peru?", "South America", category="continent", group="Peru", hop=2),
    KnowledgePiece("c", "What is the capital of Chad?", "N'Djamena", category="capital"),
    KnowledgePiece("d", "Q", "x"),
]


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    return build_model(complete_config(CONFIG, tokenizer)).eval(), tokenizer


@pytest.mark.parametrize("tokens", [None, *get_args(AnswerTokens)])
def test_knowledge_pieces_are_asked_by_the_template_and_described(subject, tokens):
    model, tokenizer = subject
    chosen = {} if tokens is None else {"tokens": tokens}
    template = "Q: {question}\n"
    result = knowledge_coupling(model, KNOWLEDGE, tokenizer=tokenizer, template=template, **chosen)
    rows = []
    for sample in encode_pieces(KNOWLEDGE, tokenizer, template=template):
        labels = sample["labels"].clone()
        answer = (labels >= 0).nonzero().flatten()
        if tokens in (None, "answer"):  # the end of the text counts only where it is asked for
            assert labels[answer[-1]] == tokenizer.eos_token_id
            labels[answer[-1]] = -100
        if tokens == "first_token":
            labels[answer[1:]] = -100
        rows.append((sample["input_ids"], labels))
    flat = gradients(model, rows, result.parameters)
    torch.testing.assert_close(result.matrix.double(), cosines(flat), rtol=1e-5, atol=1e-6)
    assert result.ids == ("a", "b", "c", "d")
    assert result.column("category") == ("capital", "continent", "capital", None)
    assert result.column("group") == ("Peru", "Peru", None, None)
    assert result.column("hop") == (1, 2, None, None)
    assert result.column("answer")[1] == "South America"


def test_pieces_that_cannot_be_had(subject):
    model, tokenizer = subject
    with pytest.raises(ValueError, match="there is no piece"):
        knowledge_coupling(model, [])
    with pytest.raises(ValueError, match="pass tokenizer="):
        knowledge_coupling(model, KNOWLEDGE)
    with pytest.raises(ValueError, match="number 1 is a dict"):
        knowledge_coupling(model, [KNOWLEDGE[0], {"input_ids": torch.ones(1, 2)}], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="unknown tokens 'all'; Valid: answer_with_end, answer, first_token"):
        knowledge_coupling(model, KNOWLEDGE, tokenizer=tokenizer, tokens="all")
    with pytest.raises(ValueError, match="exactly once"):
        knowledge_coupling(model, KNOWLEDGE, tokenizer=tokenizer, template="nothing")
    with pytest.raises(ValueError, match="'input_ids' of shape"):
        knowledge_coupling(model, [{"input_ids": torch.ones(2)}])
    with pytest.raises(ValueError, match="labels has shape"):
        knowledge_coupling(model, [{"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 3)}])


def test_a_piece_that_cannot_be_tokenised_is_an_error_or_a_row_of_nan(subject):
    model, tokenizer = subject
    given = [KNOWLEDGE[0], KnowledgePiece("empty", "Nothing?", " "), *KNOWLEDGE[1:]]
    with pytest.raises(CouplingError, match=r"piece 1, id 'empty' \('Nothing\?'\): the answer to .* is empty"):
        knowledge_coupling(model, given, tokenizer=tokenizer)
    result = knowledge_coupling(model, given, tokenizer=tokenizer, on_error="nan")
    assert [(each["index"], each["id"]) for each in result.failed] == [(1, "empty")]
    assert "is empty" in result.failed[0]["reason"]
    others = [0, 2, 3, 4]
    expected = knowledge_coupling(model, KNOWLEDGE, tokenizer=tokenizer).matrix
    torch.testing.assert_close(result.matrix[others][:, others], expected, rtol=1e-5, atol=1e-6)
    assert result.matrix[1].isnan().all()
    assert result.matrix[:, 1].isnan().all()
    assert result.valid.tolist() == [True, False, True, True, True]
    assert result.log_probs.isnan().tolist() == [False, True, False, False, False]


def broken(kind):
    """A model and five pieces of which the third fails."""
    model, batch = build("gpt2").eval(), pieces([7, 6, 6, 5, 6])
    if kind == "no target":
        batch["labels"][2] = -100
    elif kind == "unknown token":
        batch["input_ids"][2, 0] = 999
    else:
        batch["input_ids"][2, 0] = 50
        batch["input_ids"][torch.tensor([0, 1, 3, 4])] %= 50
        value = {"not finite": float("nan"), "infinite": float("inf")}[kind]
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # no longer tied
            model.transformer.wte.weight[50] = value
    return model, batch


@pytest.mark.parametrize("chunk_size", ["auto", 1, 2])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [("no target", "no target"), ("unknown token", "out of range"), ("not finite", "nan"), ("infinite", "nan")],
)
@pytest.mark.parametrize("options", [{}, {"projection": 64}, {"center": True}])
def test_one_failing_piece_never_shifts_the_others(kind, reason, chunk_size, options):
    model, batch = broken(kind)
    others = torch.tensor([0, 1, 3, 4])
    expected = knowledge_coupling(model, [{name: tensor[others] for name, tensor in batch.items()}], **options)
    found = knowledge_coupling(model, [batch], on_error="nan", chunk_size=chunk_size, **options)
    torch.testing.assert_close(found.matrix[others][:, others], expected.matrix, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.norms[others], expected.norms)
    assert found.matrix[2].isnan().all()
    assert found.matrix[:, 2].isnan().all()
    assert (found.failed[0]["index"], len(found.failed)) == (2, 1)
    assert reason in found.failed[0]["reason"]
    with pytest.raises(CouplingError, match=r"piece 2, id '2': .*" + reason):
        knowledge_coupling(model, [batch], chunk_size=chunk_size, **options)


def test_the_longest_piece_may_fail_and_all_may():
    model, batch = build("gpt2"), pieces([9, 6, 5])
    batch["labels"][0] = -100
    assert [each["index"] for each in knowledge_coupling(model, [batch], on_error="nan").failed] == [0]
    batch["labels"][:] = -100
    with pytest.raises(CouplingError, match=r"every piece failed, the first so: piece 0, id '0'"):
        knowledge_coupling(model, [batch], on_error="nan")


def test_a_gradient_that_centring_takes_away_is_named():
    row = pieces([6])
    twice = {name: tensor.repeat(2, 1) for name, tensor in row.items()}
    with pytest.raises(CouplingError, match="leaves nothing of piece 0"):
        knowledge_coupling(build("gpt2"), [twice], center=True)


def test_batches_with_other_entries_run_as_they_are():
    model, batch = build("gpt2").eval(), pieces([6, 6, 6])
    expected = knowledge_coupling(model, [batch]).matrix
    batch["position_ids"] = torch.arange(6).expand(3, 6)
    torch.testing.assert_close(knowledge_coupling(model, [batch]).matrix, expected)
    batch["position_ids"] = batch["position_ids"] + 2
    assert not torch.allclose(knowledge_coupling(model, [batch]).matrix, expected, atol=1e-4)


def test_batches_made_in_inference_mode_serve():
    model = build("gpt2").eval()
    expected = knowledge_coupling(model, [pieces([6, 5])]).matrix
    with torch.inference_mode():
        found = knowledge_coupling(model, [pieces([6, 5])])
    torch.testing.assert_close(found.matrix, expected)


def test_an_objective_that_returns_something_else_is_refused():
    class Odd(CausalLMObjective):
        def log_probs(self, model, batch):
            return super().log_probs(model, batch).sum()

    with pytest.raises(CouplingError, match=r"shape \(\) for 1 pieces"):
        knowledge_coupling(build("gpt2"), [pieces([6, 5])], objective=Odd())
