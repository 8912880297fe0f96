from __future__ import annotations

import math
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.core import CausalLMObjective
from lightning_goldy.core.objective import accepts
from tests.references.common import causal_log_probs_reference
from tests.references.models import CAUSAL, VOCABULARY, build

LENGTHS = (9, 4, 7, 2)
QUERIES = (3, 1, 5, 1)


def ragged(side: str, *, labelled: bool = True) -> dict[str, Tensor]:
    """Samples of several lengths, padded on one side with tokens that are not the padding token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (len(LENGTHS), 10), generator=generator)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    samples = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]
    for row, (sample, query) in enumerate(zip(samples, QUERIES, strict=True)):
        place = slice(0, len(sample)) if side == "right" else slice(10 - len(sample), 10)
        ids[row, place], mask[row, place] = sample, 1
        labels[row, place] = torch.cat([torch.full((query,), -100), sample[query:]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return batch if labelled else {key: batch[key] for key in ("input_ids", "attention_mask")}


def reference(model: nn.Module, batch: dict[str, Tensor]) -> list[list[float]]:
    with torch.no_grad():
        return causal_log_probs_reference(
            lambda tokens: model(input_ids=tokens).logits,
            batch["input_ids"],
            batch.get("attention_mask"),
            batch.get("labels"),
        )


class Recorder(nn.Module):
    """A causal model that notes what it is called with; its signature offers everything or next to nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, []

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, logits_to_keep=0) -> Any:
        self.calls.append({"logits_to_keep": logits_to_keep, "position_ids": position_ids, "use_cache": use_cache})
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep
        )


class Plain(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


# Causal language models


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("labelled", [True, False])
def test_log_probs_equal_each_sample_alone_without_padding(family: str, side: str, labelled: bool) -> None:
    model, batch, objective = build(family).eval(), ragged(side, labelled=labelled), CausalLMObjective()
    rows = reference(model, batch)
    assert [len(row) for row in rows] == [
        length - (query if labelled else 1) for length, query in zip(LENGTHS, QUERIES, strict=True)
    ]
    expected = [math.fsum(row) / len(row) for row in rows]
    with torch.no_grad():
        assert objective.log_probs(model, batch).tolist() == pytest.approx(expected, abs=1e-5)
        tokens = [token for row in rows for token in row]
        assert objective.loss(model, batch).item() == pytest.approx(-math.fsum(tokens) / len(tokens), abs=1e-5)
        alone = [objective.log_probs(model, sample).item() for sample in objective.samples(batch)]
        assert alone == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", CAUSAL)
def test_targets_carry_their_tokens_and_samples(family: str) -> None:
    model, batch = build(family).eval(), ragged("right")
    with torch.no_grad():
        found = CausalLMObjective().logits_and_targets(model, batch)
    labels = batch["labels"][:, 1:]
    rows, columns = (labels != -100).nonzero(as_tuple=True)
    order = found.sample.argsort(stable=True)
    assert found.n_samples == len(LENGTHS)
    assert torch.equal(found.sample[order], rows)
    assert torch.equal(found.targets[order], labels[rows, columns])
    with torch.no_grad():
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        full = model(**inputs).logits[rows, columns]
    torch.testing.assert_close(found.logits[order], full, rtol=0, atol=1e-5)


def test_the_loss_is_the_models_own() -> None:
    for family in CAUSAL:
        model, batch = build(family).eval(), ragged("right")
        with torch.no_grad():
            expected = model(**batch).loss.item()
            assert CausalLMObjective().loss(model, batch).item() == pytest.approx(expected, abs=1e-6)


def test_a_masked_query_has_no_influence_on_what_counts() -> None:
    model, batch = build("gpt2").eval(), ragged("right")
    with torch.no_grad():
        before = CausalLMObjective().logits_and_targets(model, batch).targets
        batch["labels"][0, 5] = -100
        after = CausalLMObjective().logits_and_targets(model, batch)
    assert len(after.targets) == len(before) - 1
    assert int((after.sample == 0).sum()) == LENGTHS[0] - QUERIES[0] - 1


def test_what_stands_in_the_padding_does_not_matter() -> None:
    for side in ("left", "right"):
        model, batch, objective = build("gpt2").eval(), ragged(side), CausalLMObjective()
        with torch.no_grad():
            before = objective.log_probs(model, batch)
            padding = batch["attention_mask"] == 0
            batch["input_ids"] = batch["input_ids"].masked_fill(padding, 1)
            batch["labels"] = batch["labels"].masked_fill(padding, 3)  # forgotten there by the user
            torch.testing.assert_close(objective.log_probs(model, batch), before, rtol=0, atol=1e-6)


def test_the_batch_is_left_as_it_was() -> None:
    batch = ragged("left")
    before = {key: value.clone() for key, value in batch.items()}
    CausalLMObjective().loss(build("gpt2"), batch)
    assert list(batch) == list(before)
    assert all(torch.equal(batch[key], before[key]) for key in batch)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("side", ["right", "left"])
def test_few_logits_or_all_give_the_same(family: str, side: str) -> None:
    model, objective = build(family).eval(), CausalLMObjective()
    batch = ragged(side)
    batch["labels"][:, :-3] = -100
    if side == "right":
        batch["labels"] = torch.full_like(batch["labels"], -100)
        for row, length in enumerate(LENGTHS):
            batch["labels"][row, length - 1] = batch["input_ids"][row, length - 1]
    few, all_of_them = Recorder(model), Plain(model)
    with torch.no_grad():
        found = objective.log_probs(few, batch)
        kept = few.calls[0]["logits_to_keep"]
        assert len(kept) < 10 // 2
        if side == "right":
            torch.testing.assert_close(found, objective.log_probs(all_of_them, batch), rtol=0, atol=1e-6)
        expected = [math.fsum(row) / len(row) for row in reference(model, batch)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert few.calls[0]["use_cache"] is False


def test_many_targets_take_all_logits_and_no_positions_without_left_padding() -> None:
    model = Recorder(build("gpt2").eval())
    CausalLMObjective().loss(model, ragged("right"))
    assert model.calls == [{"logits_to_keep": 0, "position_ids": None, "use_cache": False}]
    given = torch.arange(10).expand(4, 10)
    CausalLMObjective().loss(model, {**ragged("left"), "position_ids": given})
    assert model.calls[-1]["position_ids"] is given


def test_positions_count_from_the_first_token() -> None:
    model = Recorder(build("gpt2").eval())
    CausalLMObjective().loss(model, ragged("left"))
    positions = model.calls[0]["position_ids"]
    assert positions[1].tolist() == [0] * 6 + [0, 1, 2, 3]


def test_no_mask_and_no_labels() -> None:
    model, ids = build("llama").eval(), torch.randint(1, VOCABULARY, (3, 6))
    for batch in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": None, "labels": None}):
        with torch.no_grad():
            found = CausalLMObjective().log_probs(model, batch).tolist()
        rows = reference(model, {"input_ids": ids})
        assert found == pytest.approx([math.fsum(row) / 5 for row in rows], abs=1e-5)


def test_gradients_flow_and_half_precision_losses_are_float32() -> None:
    model = build("gpt2").bfloat16()
    objective = CausalLMObjective()
    found = objective.log_probs(model, ragged("right"))
    assert found.dtype == torch.float32
    found.mean().backward()
    assert model.transformer.wte.weight.grad.abs().sum() > 0
    assert objective.log_probs(build("gpt2").double(), ragged("right")).dtype == torch.float64


def test_all_masked_is_an_error() -> None:
    batch, model = ragged("right"), build("gpt2")
    only_one = {**batch, "labels": batch["labels"].clone()}
    only_one["labels"][1:3] = -100
    with pytest.raises(ValueError, match=r"samples \[1, 2\] of a batch of 4 have no target: every label is masked"):
        CausalLMObjective().log_probs(model, only_one)
    assert CausalLMObjective().loss(model, only_one).isfinite()
    message = r"a batch of 4 samples of 10 tokens has no target: every label is masked \(-100 or padding\)"
    for empty in (
        {**batch, "labels": torch.full_like(batch["labels"], -100)},
        {**batch, "attention_mask": torch.zeros_like(batch["labels"])},
        # The first token is predicted from nothing.
        {
            **batch,
            "labels": batch["labels"]
            .clone()
            .index_fill(1, torch.arange(1, 10), -100)
            .index_fill(1, torch.tensor([0]), 3),
        },
    ):
        with pytest.raises(ValueError, match=message):
            CausalLMObjective().loss(model, empty)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": torch.zeros(1, 2)}, r"a dict with 'input_ids'; this one is \['ids'\]"),
        ((torch.zeros(1), torch.zeros(1)), "a dict with 'input_ids'; this one is tuple"),
        (
            {"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 4)},
            r"labels has shape \(2, 4\), input_ids \(2, 3\)",
        ),
        ({"input_ids": torch.zeros(2, 3), "attention_mask": torch.zeros(3)}, r"attention_mask has shape \(3,\)"),
    ],
)
def test_batches_that_are_none(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalLMObjective().loss(build("gpt2"), batch)


def test_wrapped_models_accept_what_the_inner_one_does() -> None:
    peft = pytest.importorskip("peft")
    plain = build("gpt2").eval()
    lora = peft.get_peft_model(
        build("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    ).eval()
    batch = ragged("left")
    batch["labels"][:, :-3] = -100
    wrapped = {
        "lora": lora,
        "compiled": torch.compile(plain, backend="eager"),
        "both": torch.compile(lora, backend="eager"),
    }
    with torch.no_grad():
        expected = CausalLMObjective().log_probs(plain, batch)
        for name, model in wrapped.items():
            for argument in ("logits_to_keep", "position_ids", "use_cache"):
                assert accepts(model, argument), (name, argument)
            assert not accepts(model, "no_such_argument")
            if name == "lora":  # a fresh adapter changes nothing
                torch.testing.assert_close(CausalLMObjective().log_probs(model, batch), expected, rtol=0, atol=1e-6)
    assert not accepts(Plain(plain), "logits_to_keep")


def test_a_forward_that_is_replaced_is_asked_anew() -> None:
    """On the class, and on one module alone."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    def other(self: nn.Module, x: Tensor, use_cache: bool = False, **rest: Any) -> Tensor:
        return x

    model, alone = Model(), Model()
    assert not accepts(model, "use_cache")
    assert not accepts(model, "use_cache", unnamed=True)
    alone.forward = MethodType(other, alone)
    assert accepts(alone, "use_cache")
    assert not accepts(model, "use_cache")
    Model.forward = other
    assert accepts(model, "use_cache")
    assert accepts(model, "anything", unnamed=True)
    assert not accepts(model, "anything")
