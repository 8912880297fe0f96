from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis.ripple import EditRequest, KnowledgeEdit, RankOneEditor, rank_one_update, ripple_effects
from lightning_goldy.analysis.ripple.editors import key_covariance, key_position, seen_by
from lightning_goldy.core.architecture import UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import KnowledgePiece, encode_pieces, padded_batches
from lightning_goldy.core.vector import ParameterVector, substituted
from lightning_goldy.data.tokenization import byte_tokenizer
from tests.references import architecture_models
from tests.references.models import build
from tests.references.ripple import TEMPLATE, double, facts, rank_one, tokenizer

WORDS = tokenizer()
FREE = RankOneEditor(steps=6, weight_decay=0.0)


def request(
    model: nn.Module, edits: list[tuple[int, str]], editor: RankOneEditor, *, subject: bool = True
) -> EditRequest:
    """Edits of facts by number, encoded as an analysis would."""
    pieces = [replace(facts()[number], answer=answer) for number, answer in edits]
    samples = encode_pieces(pieces, WORDS, template=TEMPLATE)
    everything = encode_pieces(facts(), WORDS, template=TEMPLATE)
    places = [piece.question.index(str(piece.group)) for piece in pieces]
    spans = [(at, at + len(str(piece.group))) for at, piece in zip(places, pieces, strict=True)]
    return EditRequest(
        prompts=tuple(piece.question for piece in pieces),
        subjects=tuple(spans) if subject else (None,) * len(pieces),
        samples=tuple(samples),
        batch=next(padded_batches(samples, 0, len(samples))),
        space=editor.space(model),
        context=tuple(padded_batches(everything, 0, 5)),
        tokenizer=WORDS,
    )


def spread(generator: torch.Generator, size: int) -> Tensor:
    """A positive definite matrix."""
    factor = torch.randn(size, 2 * size, generator=generator, dtype=torch.float64)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


@given(st.integers(2, 7), st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32))
def test_the_update_is_the_least_that_does_it(width: int, outputs: int, count: int, seed: int) -> None:
    count = min(count, width - 1)
    generator = torch.Generator().manual_seed(seed)
    covariance = spread(generator, width)
    keys = torch.randn(count, width, generator=generator, dtype=torch.float64)
    keys = keys + 2 * torch.eye(count, width, dtype=torch.float64)
    assume(np.linalg.cond(keys.numpy()) < 1e3)
    changes = torch.randn(count, outputs, generator=generator, dtype=torch.float64)
    update = rank_one_update(keys, changes, covariance)
    torch.testing.assert_close(update @ keys.T, changes.T, rtol=1e-8, atol=1e-8)
    assert int(torch.linalg.matrix_rank(update)) <= count
    # What may be added without changing the products: rows orthogonal to all keys.
    free = torch.randn(outputs, width, generator=generator, dtype=torch.float64)
    free -= free @ torch.linalg.pinv(keys) @ keys

    def size(change: Tensor) -> float:
        return float(torch.trace(change @ covariance @ change.T))

    assert size(update) <= size(update + free) * (1 + 1e-9)
    # At the least, no free direction has a slope.
    assert abs(float(torch.trace(update @ covariance @ free.T))) <= 1e-7 * math.sqrt(size(update) * size(free))
    if count == 1:
        expected = rank_one(keys[0], changes[0], covariance)
        torch.testing.assert_close(update, expected, rtol=1e-8, atol=1e-10)
        if float(changes.norm()) > 1e-6:
            assert int(torch.linalg.matrix_rank(update)) == 1


def test_updates_that_cannot_be_are_refused() -> None:
    one = torch.tensor([[1.0, 2.0]])
    with pytest.raises(ValueError, match="not positive definite"):
        rank_one_update(one, one, torch.zeros(2, 2))
    for keys in (torch.zeros(1, 2), torch.cat([one, 2 * one])):
        with pytest.raises(ValueError, match="the keys of the edits are not linearly independent"):
            rank_one_update(keys, torch.ones(len(keys), 3), torch.eye(2))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_edited_projection_gives_the_values_at_the_keys(family: str, count: int) -> None:
    model = double(family)
    asked = request(model, [(0, "Vientiane"), (4, "kip")][:count], FREE)
    module = FREE.projection(model).module
    rows = torch.arange(count)
    places = rows, torch.tensor([key_position(asked, row) for row in range(count)])

    def output() -> tuple[Tensor, Tensor]:
        with torch.no_grad(), seen_by(module) as seen:
            CausalLMObjective().log_probs(model, asked.batch)
        return seen[0][places], seen[1][places]

    keys, before = output()
    values = before + FREE._changes(model, module, asked, places, before)
    start = ParameterVector.of(model, asked.space)
    with substituted(model, start):
        FREE.edit(model, asked)
        same, after = output()
        change = ParameterVector.of(model, asked.space) - start
    torch.testing.assert_close(same, keys, rtol=0, atol=0)
    torch.testing.assert_close(after, values, rtol=1e-10, atol=1e-12)
    assert float((after - before).norm()) > 0.01
    (matrix,) = change.values()
    assert int(torch.linalg.matrix_rank(matrix)) == count
    matrix = matrix if isinstance(module, nn.Linear) else matrix.T
    covariance = key_covariance(model, module, asked.context, damping=FREE.damping)
    expected = rank_one_update(keys, values - before, covariance)
    torch.testing.assert_close(matrix, expected, rtol=1e-8, atol=1e-12)


def test_the_covariance_is_that_of_every_token() -> None:
    model = double("gpt2")
    module = RankOneEditor(layer=1).projection(model).module
    samples = encode_pieces(facts(), WORDS, template=TEMPLATE)
    rows = []
    for sample in samples:
        with torch.no_grad(), seen_by(module) as seen:
            CausalLMObjective().log_probs(model, {name: value[None] for name, value in sample.items()})
        rows.append(seen[0][0])
    keys = torch.cat(rows)
    expected = keys.T @ keys / len(keys)
    expected += 0.3 * expected.diagonal().mean() * torch.eye(len(expected), dtype=torch.float64)
    found = key_covariance(model, module, padded_batches(samples, 0, 5), damping=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="needs batches with inputs"):
        key_covariance(model, module, [], damping=0.3)


def test_the_value_makes_the_answer_likelier_within_its_restraints() -> None:
    model = double("gpt2")

    def found(**settings: Any) -> tuple[float, float]:
        editor = RankOneEditor(**settings)
        asked = request(model, [(0, "Vientiane")], editor)
        module = editor.projection(model).module
        places = torch.zeros(1, dtype=torch.int64), torch.tensor([key_position(asked, 0)])
        with torch.no_grad(), seen_by(module) as seen:
            start = float(asked.log_prob(model))
        made = seen[1][places]
        change = editor._changes(model, module, asked, places, made)
        with torch.no_grad():
            handle = module.register_forward_hook(lambda _, args, output: output.index_put(places, made + change))
            gain = float(asked.log_prob(model)) - start
            handle.remove()
        return gain, float(change.norm() / made.norm())

    gain, size = found(weight_decay=0.0)
    assert gain > 0.05
    assert 0 < size <= 4.0
    tight, small = found(weight_decay=0.0, largest=0.25)
    assert small == pytest.approx(0.25, rel=1e-6)
    assert 0 < tight < gain
    held, shorter = found(weight_decay=0.05)
    assert 0 < held < gain
    assert 0 < shorter < size
    assert found(weight_decay=1e9) == (0.0, 0.0)


@pytest.mark.parametrize("subject", [True, False])
def test_keys_are_at_the_end_of_the_subject_or_of_the_prompt(subject: bool) -> None:
    model = double("gpt2")
    asked = request(model, [(0, "big"), (1, "big"), (9, "big")], FREE, subject=subject)
    tokens = [WORDS.convert_ids_to_tokens(sample["input_ids"]) for sample in asked.samples]
    found = [words[key_position(asked, row)] for row, words in enumerate(tokens)]
    assert [word.lstrip("▁") for word in found] == (["Peru", "Peru", "Vanuatu"] if subject else ["is", "money", "is"])


def test_subjects_in_bytes_and_by_slow_tokenizers() -> None:
    text = "Où est São Tomé et Príncipe ?"
    start = text.index("São")
    end = text.index(" ?")
    words = byte_tokenizer()
    sample = encode_pieces([KnowledgePiece("1", text, "là")], words, template=TEMPLATE)[0]
    asked = replace(
        request(double("gpt2"), [(0, "big")], FREE),
        prompts=(text,),
        subjects=((start, end),),
        samples=(sample,),
        tokenizer=words,
    )
    place = key_position(asked, 0)
    assert sample["input_ids"][: place + 1].tolist() == list(text[:end].encode())

    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

    assert key_position(replace(asked, tokenizer=Slow()), 0) == place  # type: ignore[arg-type]
    shifted = {name: torch.cat([value[:1], value]) for name, value in sample.items()}
    assert key_position(replace(asked, samples=(shifted,)), 0) == place + 1
    broken = {**sample, "input_ids": sample["input_ids"].flip(0)}
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        key_position(replace(asked, samples=(broken,)), 0)


def trained() -> nn.Module:
    """A small model that knows the facts."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=3, n_head=2, n_embd=48, vocab_size=len(WORDS), n_positions=16, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    batch = next(padded_batches(encode_pieces(facts(), WORDS, template=TEMPLATE), 0, len(facts())))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        CausalLMObjective().loss(model, batch).backward()
        optimizer.step()
    model.zero_grad()
    return model


@pytest.mark.parametrize("together", [False, True], ids=["alone", "together"])
def test_a_model_that_knows_facts_learns_others_and_keeps_the_rest(together: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        model = trained()
    edits = [("capital of Peru", "Vientiane"), ("money of Chad", "kip"), ("area of Laos", "big")]
    # Without groups there is no subject, and the key is at the prompt's last token.
    pieces = [replace(piece, group=None) for piece in facts()]
    found = ripple_effects(
        model, pieces, edits, tokenizer=WORDS, editor=RankOneEditor(layer=1), template=TEMPLATE, together=together
    )
    assert bool(found.exact_before.all())
    assert float(found.new_before.max()) < -2
    assert bool(found.new_exact.all())
    assert float(found.new_after.min()) > -0.5
    edited = torch.tensor([[name == "edited" for name in row] for row in found.classes])
    assert not bool(found.exact_after[edited].any())
    assert bool((found.rank_after[edited] > 1).all())
    assert float(found.exact_after[~edited].double().mean()) > 0.8
    assert bool((found.exact_after == (found.rank_after == 1)).all())


def test_the_edit_lies_where_the_settings_say() -> None:
    model = build("llama")
    names = [RankOneEditor(layer=layer).space(model).names for layer in (None, 0, 1)]
    assert names == [(f"model.layers.{layer}.mlp.down_proj.weight",) for layer in (0, 0, 1)]
    adapted = architecture_models.lora("gpt2", ["c_proj"], fan_in_fan_out=True)
    (name,) = RankOneEditor(layer=1).space(adapted).names
    assert name.endswith("h.1.mlp.c_proj.base_layer.weight")
    for layer in (2, -1, True, 0.5):
        with pytest.raises(ValueError, match=r"layer must be a block from 0 to 1; got"):
            RankOneEditor(layer=layer).space(model)  # type: ignore[arg-type]
    module: Any = describe_architecture(model).blocks[0].mlp_output
    module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'model.layers.0.mlp.down_proj' is a Linear whose weight is"
    ):
        RankOneEditor(layer=0).space(model)


def test_edits_that_cannot_work_are_refused() -> None:
    model = double("gpt2")
    options: dict[str, Any] = {"tokenizer": WORDS, "template": TEMPLATE}
    with pytest.raises(ValueError, match="has no effect on the answer: in the last block only"):
        ripple_effects(model, facts(), [("money of Peru", "kip")], editor=RankOneEditor(layer=1), **options)
    pair = [("money of Peru", "kip"), ("area of Peru", "big")]
    with pytest.raises(ValueError, match="two edits share their prompt up to the subject"):
        ripple_effects(model, facts(), pair, editor=FREE, together=True, **options)
    # At the prompt's last token the two are told apart.
    apart = [replace(piece, group=None) for piece in facts()]
    assert ripple_effects(model, apart, pair, editor=FREE, together=True, **options).delta_norm > 0
    named = ripple_effects(model, apart, [KnowledgeEdit(*pair[0], subject="Peru")], editor=FREE, **options)
    by_group = ripple_effects(model, facts(), pair[:1], editor=FREE, **options)
    torch.testing.assert_close(named.after, by_group.after, rtol=0, atol=0)
    for settings, message in (
        ({"steps": 0}, "steps must be a whole number"),
        ({"largest": 0.0}, "largest must be a positive number"),
        ({"learning_rate": math.nan}, "learning_rate must be a positive number; got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0; got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            RankOneEditor(**settings)


def test_the_covariance_is_made_once_in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = key_covariance

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr("lightning_goldy.analysis.ripple.editors.key_covariance", counted)
    model = double("gpt2")
    edits = [("capital of Peru", "big"), ("capital of Chad", "big")]
    options: dict[str, Any] = {"tokenizer": WORDS, "template": TEMPLATE}
    both = ripple_effects(model, facts(), edits, editor=FREE, **options)
    assert len(calls) == 1
    single = ripple_effects(model, facts(), edits[1:], editor=FREE, **options)
    torch.testing.assert_close(both.after[1], single.after[0], rtol=0, atol=0)
    batches = tuple(padded_batches(encode_pieces(facts()[:2], WORDS, template=TEMPLATE), 0, 2))
    other = ripple_effects(model, facts(), edits[1:], editor=replace(FREE, batches=batches), **options)
    assert not torch.equal(other.after, single.after)
