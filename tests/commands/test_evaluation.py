"""Knowledge as greedy decoding shows it."""

from __future__ import annotations

import pytest
import torch

from lightning_goldy.commands.demo import answers_known, share_known
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.data import PadCollator, byte_tokenizer, encode_pairs
from lightning_goldy.training.models import build_model, complete_config

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 24, "resid_pdrop": 0.5}
QUESTIONS = [("a?", "bc"), ("longer prompt:", "x"), ("d?", "yz"), ("e?", "q")]


@pytest.fixture(scope="module")
def trained():
    """A model that has learned the first three answers by heart."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    model = build_model(complete_config(CONFIG, tokenizer)).eval()
    samples = encode_pairs(tokenizer, [*QUESTIONS[:3], ("e?", "other")])
    batch = PadCollator(tokenizer.pad_token_id)(samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        CausalLMObjective().loss(model, batch).backward()
        optimizer.step()
    return model, tokenizer


def _generated(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer(prompt).input_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=6,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_known_is_what_generation_answers(trained, batch_size):
    model, tokenizer = trained
    expected = [_generated(model, tokenizer, prompt) == answer for prompt, answer in QUESTIONS]
    assert expected == [True, True, True, False]
    assert answers_known(model, tokenizer, QUESTIONS, batch_size) == expected
    assert share_known(model, tokenizer, QUESTIONS, batch_size) == 0.75


def test_an_answer_that_goes_on_is_not_the_answer(trained):
    model, tokenizer = trained
    assert answers_known(model, tokenizer, [("a?", "b")]) == [False]


def test_the_model_is_left_as_it_was(trained):
    model, tokenizer = trained
    model.train()
    state = torch.get_rng_state()
    share_known(model, tokenizer, QUESTIONS)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    model.eval()


def test_no_questions_is_an_error(trained):
    with pytest.raises(ValueError, match="no questions"):
        share_known(*trained, [])
