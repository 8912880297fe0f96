"""Tests that every strategy of head importance equals its slow version, and that padding, batching and kernels do not
matter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.heads import head_importance, register_head_score
from lightning_goldy.analysis.heads.importance import DEFAULT_WEIGHTS, HEAD_SCORES
from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.core.architecture import describe_architecture
from lightning_goldy.core.objective import CausalLMObjective, FunctionObjective
from tests.references.architecture_models import REGISTERED, VOCABULARY, lora
from tests.references.head_subjects import subject
from tests.references.heads import (
    ablation_reference,
    entropy_reference,
    magnitude_reference,
    taylor_reference,
)

CLOSE = {"rtol": 2e-4, "atol": 1e-6}


@pytest.mark.parametrize("family", REGISTERED)
def test_magnitude_equals_the_slow_reference(family: str) -> None:
    model, batch, objective = subject(family)
    found = head_importance(model, [batch], objective, strategy="magnitude")
    torch.testing.assert_close(found.scores, magnitude_reference(model, batch), **CLOSE)
    assert found.n_samples == 4
    assert (found.scores > 1e-4).all()


@pytest.mark.parametrize("family", REGISTERED)
def test_entropy_equals_the_slow_reference(family: str) -> None:
    model, batch, objective = subject(family)
    found = head_importance(model, [batch], objective, strategy="entropy")
    expected = entropy_reference(model, batch)
    torch.testing.assert_close(found.measured["entropy"], expected, **CLOSE)
    torch.testing.assert_close(found.scores, 1 - expected, **CLOSE)
    assert expected.std() > 1e-4


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_taylor_equals_the_slow_reference(family: str) -> None:
    model, batch, objective = subject(family)
    found = head_importance(model, [batch], objective, strategy="taylor")
    torch.testing.assert_close(found.scores, taylor_reference(model, batch), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_the_first_order_is_what_taylor_says_without_its_curvature(family: str) -> None:
    model, batch, objective = subject(family)
    found = head_importance(model, [batch], objective, strategy="first_order")
    taylor = head_importance(model, [batch], objective)
    assert taylor.strategy == "taylor"
    torch.testing.assert_close(found.scores, -taylor.measured["gradient"], rtol=0, atol=0)
    curvature = taylor_reference(model, batch) - taylor.measured["curvature"] / 2
    torch.testing.assert_close(found.scores, curvature, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strategy", ["first_order", "magnitude", "entropy", "ablation", "taylor", "combined"])
def test_standard_errors_are_those_of_leaving_samples_out(strategy: str) -> None:
    model, batch, objective = subject("llama")
    found = head_importance(model, [batch], objective, strategy=strategy)

    def scored(rows: list[int]) -> Tensor:
        part = {name: tensor[rows] for name, tensor in batch.items()}
        return head_importance(model, [part], objective, strategy=strategy).scores

    left = torch.stack([scored([row for row in range(4) if row != out]) for out in range(4)])
    expected = (left - left.mean(dim=0)).square().sum(dim=0).mul(3 / 4).sqrt()
    torch.testing.assert_close(found.errors, expected, rtol=1e-3, atol=1e-7)
    assert (found.errors > 0).all()
    if strategy not in ("combined", "entropy"):  # a mean over samples
        alone = torch.stack([scored([row]) for row in range(4)])
        torch.testing.assert_close(found.errors, alone.std(dim=0) / 2, rtol=1e-3, atol=1e-7)
    assert found.row().result["standard_errors"] == found.errors.tolist()


def test_standard_errors_that_are_not_known_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, _ = subject("gpt2")
    one = {name: tensor[:1] for name, tensor in batch.items()}
    assert head_importance(model, [one]).errors.isnan().all()
    assert (head_importance(model, [batch], strategy="random").errors == 0).all()
    seen = []

    def own(probe: Any) -> Tensor:
        seen.append(next(probe.model.parameters()).sum())
        return probe.magnitude()

    monkeypatch.setattr("lightning_goldy.analysis.heads.importance.HEAD_SCORES", {"by itself": own})
    assert head_importance(model, [batch], strategy="by itself").errors.isnan().all()
    assert len(seen) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert"])
def test_ablation_equals_the_slow_reference(family: str) -> None:
    model, batch, objective = subject(family)
    found = head_importance(model, [batch], objective, strategy="ablation")
    torch.testing.assert_close(found.scores, ablation_reference(model, batch), rtol=1e-3, atol=1e-6)


def test_combined_is_the_weighted_sum_of_standardised_scores() -> None:
    model, batch, _ = subject("llama")
    entropy, magnitude, taylor = (
        head_importance(model, [batch], strategy=each).scores for each in ("entropy", "magnitude", "taylor")
    )

    def z(scores: Tensor) -> Tensor:
        return (scores - scores.mean()) / scores.std(correction=0)

    assert DEFAULT_WEIGHTS == {"entropy": 0.5, "magnitude": 0.5}
    found = head_importance(model, [batch], strategy="combined")
    torch.testing.assert_close(found.scores, 0.5 * z(entropy) + 0.5 * z(magnitude))
    assert set(found.measured) == {"entropy", "magnitude"}
    found = head_importance(model, [batch], strategy="combined", weights={"taylor": 3, "magnitude": 1})
    torch.testing.assert_close(found.scores, 3 * z(taylor) + z(magnitude))


def test_random_is_a_function_of_the_seed() -> None:
    model, batch, _ = subject("gpt2")
    first, again, other = (head_importance(model, [batch], strategy="random", seed=seed).scores for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_uniform_attention_has_entropy_one() -> None:
    model, batch, _ = subject("llama")
    for block in describe_architecture(model).blocks:
        for part in block.query.head_slice(2):
            part.of(part.parameter.data).zero_()
    scores = head_importance(model, [batch], strategy="entropy").scores
    torch.testing.assert_close(scores[:, 2], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-6)
    assert (scores[:, [0, 1, 3]] > 1e-4).all()


@pytest.mark.parametrize("strategy", ["magnitude", "taylor", "ablation"])
def test_a_head_that_writes_nothing_scores_zero(strategy: str) -> None:
    model, batch, _ = subject("gpt2")
    for part in describe_architecture(model).blocks[1].output_slice(2):
        part.of(part.parameter.data).zero_()
    scores = head_importance(model, [batch], strategy=strategy).scores
    assert scores[1, 2] == 0
    assert (scores != 0).sum() == 7


def test_taylor_is_ablation_where_a_head_writes_little() -> None:
    model, batch, _ = subject("gpt2")
    model = model.double()
    remainders = []
    for scale in (1e-2, 1e-3):
        for part in describe_architecture(model).blocks[0].output_slice(1):
            part.of(part.parameter.data).mul_(scale)
        taylor, ablation = (
            head_importance(model, [batch], strategy=each).scores[0, 1] for each in ("taylor", "ablation")
        )
        assert taylor == pytest.approx(float(ablation), rel=20 * scale)
        remainders.append(abs(float(taylor - ablation)))
        for part in describe_architecture(model).blocks[0].output_slice(1):
            part.of(part.parameter.data).div_(scale)
    # The remainder is of second order: a tenth of the output leaves a hundredth of it.
    assert remainders[1] == pytest.approx(remainders[0] / 100, rel=0.2)


@pytest.mark.parametrize("strategy", ["entropy", "magnitude", "taylor", "ablation", "combined"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "bert"])
def test_padding_batching_and_kernels_do_not_matter(family: str, strategy: str) -> None:
    model, batch, objective = subject(family)
    expected = head_importance(model, [batch], objective, strategy=strategy).scores
    parts = [{key: value[[row]] for key, value in batch.items()} for row in range(4)]
    pairs = [{key: value[row : row + 2] for key, value in batch.items()} for row in (0, 2)]
    padded = {}
    for key, value in batch.items():
        fill = -100 if key == "labels" else 0
        padded[key] = value if value.ndim == 1 else nn.functional.pad(value, (0, 4), value=fill)
    for batches in (parts, pairs, [padded]):
        found = head_importance(model, batches, objective, strategy=strategy).scores
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    model.set_attn_implementation("eager")
    found = head_importance(model, [batch], objective, strategy=strategy).scores
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("strategy", ["entropy", "magnitude"])
def test_padding_on_the_left_does_not_matter(strategy: str) -> None:
    model, batch, _ = subject("llama")
    left = {}
    for key, value in batch.items():
        lengths = batch["attention_mask"].sum(dim=1).tolist()
        left[key] = torch.stack([row.roll(9 - length) for row, length in zip(value, lengths, strict=True)])
    found, expected = (head_importance(model, [each], strategy=strategy).scores for each in (left, batch))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_a_sliding_window_shortens_what_a_row_sees() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=3,
    )
    model = hf.MistralForCausalLM(config).eval()
    batch = subject("mistral")[1]
    found = head_importance(model, [batch], strategy="entropy").measured["entropy"]
    torch.testing.assert_close(found, entropy_reference(model, batch, window=3), **CLOSE)


def test_a_row_that_sees_one_key_does_not_count() -> None:
    model, _, _ = subject("gpt2")
    single = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    with_one = {
        "input_ids": torch.tensor([[7, 0, 0], [5, 6, 0]]),
        "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    }
    objective = FunctionObjective(
        lambda model, batch: model(**batch).logits.mean(),
    )
    expected = head_importance(model, [single], objective, strategy="entropy").scores
    torch.testing.assert_close(head_importance(model, [with_one], objective, strategy="entropy").scores, expected)
    lonely = {"input_ids": torch.tensor([[7, 0]]), "attention_mask": torch.tensor([[1, 0]])}
    with pytest.raises(ValueError, match="at least two tokens"):
        head_importance(model, [lonely], objective, strategy="entropy")


@pytest.mark.parametrize("strategy", ["entropy", "magnitude", "taylor", "ablation"])
def test_any_loss_is_measured_sample_by_sample(strategy: str) -> None:
    model, batch, _ = subject("llama")

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())

    found = head_importance(model, [batch], FunctionObjective(loss), strategy=strategy)
    expected = head_importance(model, [batch], strategy=strategy)
    if strategy == "taylor":  # a plain loss does not tell the number of targets, so it counts as one
        curvature = torch.stack(
            [
                head_importance(model, [part], strategy="taylor").measured["gradient"].square()
                for part in CausalLMObjective().samples(batch)
            ]
        ).mean(dim=0)
        torch.testing.assert_close(found.scores, -expected.measured["gradient"] + curvature / 2, rtol=1e-3, atol=1e-6)
    else:
        torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strategy", ["entropy", "magnitude", "ablation"])
def test_adapters_are_scored_as_the_merged_model(strategy: str) -> None:
    batch = subject("llama")[1]
    torch.manual_seed(0)
    model = lora("llama", ["q_proj", "v_proj", "o_proj"])
    found = head_importance(model, [batch], strategy=strategy)
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        found.scores, head_importance(merged, [batch], strategy=strategy).scores, rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("strategy", ["entropy", "magnitude"])
def test_low_precision_is_scored(strategy: str) -> None:
    model, batch, _ = subject("llama")
    expected = head_importance(model, [batch], strategy=strategy).scores
    found = head_importance(model.bfloat16(), [batch], strategy=strategy).scores
    # Weights and activations have 8 bits.
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.01)


def test_progress_counts_the_passes() -> None:
    model, batch, _ = subject("gpt2")
    calls: list[tuple[int, int]] = []
    head_importance(model, [batch, batch], strategy="magnitude", progress=lambda *call: calls.append(call))
    head_importance(model, [batch], strategy="ablation", progress=lambda *call: calls.append(call))
    assert calls == [(1, 2), (2, 2)] + [(done, 8) for done in range(1, 9)]


@contextmanager
def counted(model: nn.Module) -> Iterator[list[int]]:
    """Samples that went forwards through a GPT-2 and backwards."""
    passes = [0, 0]

    def forward(module: nn.Module, args: Any, options: Any, output: Any) -> None:
        passes[0] += len(options["input_ids"] if "input_ids" in options else args[0])

    def backward(gradient: Tensor) -> None:
        passes[1] += len(gradient)

    def watch(module: nn.Module, args: Any, output: Tensor) -> None:
        # A backward hook of the module would hear nothing of an analysis.
        if output.requires_grad:
            output.register_hook(backward)

    handles = [
        model.register_forward_hook(forward, with_kwargs=True),
        model.transformer.ln_f.register_forward_hook(watch),  # type: ignore[union-attr, operator]
    ]
    yield passes
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("alone", [False, True], ids=["batches", "samples"])
@pytest.mark.parametrize("strategy", ["entropy", "magnitude", "taylor", "combined", "ablation", "random", "own"])
def test_the_cost_is_what_ran(strategy: str, alone: bool) -> None:
    model, batch, objective = subject("gpt2")
    if alone:
        objective = FunctionObjective(
            lambda model, batch: model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        )
    if strategy == "own":
        register_head_score("own")(lambda probe: probe.curvature() + probe.ablation())
    try:
        with counted(model) as passes:
            found = head_importance(model, [batch, batch], objective, strategy=strategy)
    finally:
        HEAD_SCORES._entries.pop("own", None)
    assert [found.cost.forwards, found.cost.backwards] == passes
    forwards, backwards = {
        "random": (0, 0),
        "entropy": (8, 0),
        "combined": (16, 8),
        "ablation": (72, 0),
        "own": (80, 8),
    }.get(strategy, (8, 8))
    assert found.cost == Cost(forwards, backwards)


def test_scores_tell_their_row() -> None:
    model, batch, _ = subject("gpt2")
    found = head_importance(model, [batch], strategy="taylor")
    row = found.row()
    assert isinstance(row, Row)
    assert (row.analysis, row.cost) == ("head_importance", Cost(4, 4))
    assert row.metrics["smallest_score"] == float(found.scores.min())
    assert row.metrics["largest_score"] == float(found.scores.max())
    assert row.result["values"] == found.scores.tolist()
    assert set(row.result) >= {"gradient", "curvature", "strategy", "n_samples"}
    json.dumps(row.to_dict(), allow_nan=False)


class Repeating(CausalLMObjective):
    """An objective that calls the model with one sample at a time."""

    def logits_and_targets(self, model: nn.Module, batch: Any) -> Any:
        for sample in self.samples(batch):
            model(input_ids=sample["input_ids"])
        return super().logits_and_targets(model, batch)


def test_an_objective_that_runs_samples_alone_is_measured_alone() -> None:
    model, batch, _ = subject("llama")
    found = head_importance(model, [batch], Repeating(), strategy="magnitude")
    torch.testing.assert_close(found.scores, magnitude_reference(model, batch), **CLOSE)
