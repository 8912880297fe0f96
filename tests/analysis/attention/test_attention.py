"""Tests that attention statistics are those of the library's own patterns, of a slow reference, and of closed forms."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_goldy.analysis.attention import (
    STATISTICS,
    AttentionMaps,
    AttentionStatistics,
    attention_maps,
    attention_statistics,
)
from lightning_goldy.analysis.attention.patterns import Tokens, UnreadableAttentionError, statistic_sums
from lightning_goldy.analysis.divergence import jensen_shannon
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core import CausalLMObjective, FunctionObjective, ParameterSpace, ParameterVector, SpaceError
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from tests.references.architecture_models import REGISTERED, UNREGISTERED, build
from tests.references.attention import divergence, eager_patterns, mean_divergence, mean_statistics, moved

EVERYTHING: Any = lambda t, s: True  # noqa: E731
SEES = {"bert": EVERYTHING, "roberta": EVERYTHING}


def batch_of(padding: str = "right", n_samples: int = 4, length: int = 11, seed: int = 4) -> dict[str, Tensor]:
    """Few different tokens, so that they repeat, and samples of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 7, (n_samples, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(n_samples if padding != "none" else 0):
        if padding == "right":
            mask[row, length - row :] = 0
        else:
            mask[row, :row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def close(found: AttentionStatistics, expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(expected) == set(STATISTICS)
    for name in STATISTICS:
        torch.testing.assert_close(found.statistic(name), expected[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("family", [name for name in REGISTERED if name != "roberta"])
def test_maps_are_the_librarys_own(family: str) -> None:
    model, batch = build(family), batch_of()
    maps = attention_maps(model, batch)
    for pattern, expected in zip(maps.patterns, eager_patterns(model, batch), strict=True):
        real = batch["attention_mask"].bool()[:, None, :, None].expand_as(pattern)
        torch.testing.assert_close(pattern[real].double(), expected[real], rtol=0, atol=1e-6)
    assert maps.layers == (0, 1)
    assert maps.pattern(1, 2, sample=3).shape == (8, 8)
    torch.testing.assert_close(maps.pattern(1, 2, sample=3).sum(dim=1), torch.ones(8), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "padding"),
    # BERT counts positions from the left edge, padding included.
    [(family, padding) for family in ("gpt2", "llama", "gpt_neox") for padding in ("none", "right", "left")]
    + [("bert", "none"), ("bert", "right")],
)
def test_statistics_are_those_of_the_librarys_patterns(family: str, padding: str) -> None:
    model, batch = build(family), batch_of(padding)
    found = attention_statistics(model, [batch])
    close(found, mean_statistics(eager_patterns(model, batch), batch, SEES.get(family, lambda t, s: s <= t)))
    assert found.n_samples == 4
    for name in STATISTICS:
        # Heads differ, so a mix-up would show.
        assert found.statistic(name).std() > 1e-4, name


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "mistral", "phi3", "opt"])
def test_other_families_too(family: str) -> None:
    model, batch = build(family), batch_of()
    close(attention_statistics(model, [batch]), mean_statistics(eager_patterns(model, batch), batch))


def test_a_sliding_window_counts_only_what_it_shows() -> None:
    model = build("mistral")
    model.config.sliding_window = 3
    batch = batch_of("none", n_samples=2)
    expected = mean_statistics(eager_patterns(model, batch), batch, lambda t, s: t - 3 < s <= t)
    close(attention_statistics(model, [batch]), expected)
    whole = attention_statistics(build("mistral"), [batch])
    assert (attention_statistics(model, [batch]).queries < whole.queries).any()


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_the_kernel_does_not_matter_and_comes_back(kernel: str) -> None:
    model, batch = build("llama"), batch_of()
    expected = attention_statistics(model, [batch])
    model.set_attn_implementation(kernel)
    found = attention_statistics(model, [batch])
    assert model.config._attn_implementation == kernel
    for name in STATISTICS:
        torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=0, atol=1e-6)


def pattern_model(scores: Tensor) -> Tensor:
    """A pattern of one head from scores ``[T, T]``, causal, as a layer would show it."""
    length = len(scores)
    causal = torch.full((length, length), -math.inf).triu(1)
    return torch.softmax(scores + causal, dim=-1)[None, None]


def means(pattern: Tensor, ids: list[int]) -> dict[str, float]:
    tokens = Tokens(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool))
    length = len(ids)
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)
    sums, counts = statistic_sums(pattern, mask, tokens)
    return dict(zip(STATISTICS, (sums[:, 0] / counts).tolist(), strict=True))


def test_uniform_causal_attention_in_closed_form() -> None:
    length = 9
    found = means(pattern_model(torch.zeros(length, length)), list(range(length)))
    sizes = range(1, length + 1)
    assert found["entropy"] == pytest.approx(math.fsum(map(math.log, sizes)) / length, abs=1e-6)
    assert found["normalised_entropy"] == pytest.approx(1.0, abs=1e-6)
    # The mean of 0, ..., n - 1 over queries that see n keys.
    assert found["distance"] == pytest.approx((length - 1) / 4, abs=1e-6)
    harmonic = math.fsum(1 / n for n in sizes)
    assert found["first_token"] == pytest.approx(harmonic / length, abs=1e-6)
    assert found["diagonal"] == pytest.approx(harmonic / length, abs=1e-6)
    assert found["previous_token"] == pytest.approx((harmonic - 1) / (length - 1), abs=1e-6)
    assert math.isnan(found["induction"])
    assert math.isnan(found["duplicate_token"])


@pytest.mark.parametrize(
    ("name", "key_of"),
    [
        ("previous_token", lambda t: t - 1),
        ("diagonal", lambda t: t),
        ("first_token", lambda t: 0),
        # The sequence has a period of 4.
        ("duplicate_token", lambda t: t - 4),
        ("induction", lambda t: t - 3),
    ],
)
def test_a_planted_pattern_scores_one(name: str, key_of: Any) -> None:
    ids = [5, 6, 7, 8] * 3
    pattern = torch.zeros(1, 1, 12, 12)
    for t in range(12):
        pattern[
            0, 0, t, max(0, key_of(t)) if t >= 4 or name in ("previous_token", "diagonal", "first_token") else t
        ] = 1
    found = means(pattern, ids)
    assert found[name] == pytest.approx(1.0, abs=1e-12)
    assert found["entropy"] == pytest.approx(0.0, abs=1e-12)
    others = {"previous_token", "duplicate_token", "induction"} - {name}
    assert all(found[other] < 0.5 for other in others)


def test_a_run_of_one_token_is_no_induction_to_itself() -> None:
    # Key 1 follows token 0, which is query 1's token; but it is the query itself.
    pattern = torch.eye(3)[None, None]
    found = means(pattern, [5, 5, 5])
    assert found["induction"] == 0.0
    assert found["diagonal"] == 1.0


def test_a_planted_head_of_a_whole_model() -> None:
    """GPT-2 whose head 1 of layer 0 compares positions: its query at t is its key at t - 1."""
    model = build("gpt2")
    width, head_dim = 32, 8
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.zero_()
        angles = torch.arange(1024)[:, None] * torch.tensor([0.7, 1.1])  # [positions, 2]
        model.transformer.wpe.weight[:, 0:2] = angles.cos()
        model.transformer.wpe.weight[:, 2:4] = angles.sin()
        # Without changing their length, the norm must pass them through.
        model.transformer.wpe.weight[:, 4:8] = -model.transformer.wpe.weight[:, 0:4]
        block = model.transformer.h[0]
        block.ln_1.weight.fill_(1.0)
        block.ln_1.bias.zero_()
        projection = block.attn.c_attn
        query, key = head_dim, width + head_dim  # where head 1 starts
        projection.weight[:, query : query + head_dim] = 0
        projection.weight[:, key : key + head_dim] = 0
        projection.bias[query : query + head_dim] = 0
        projection.bias[key : key + head_dim] = 0
        scale = 8.0
        for index, step in enumerate((0.7, 1.1)):
            cosine, sine = math.cos(step) * scale, math.sin(step) * scale
            # The query turns its position back by one step: cos(a - s), sin(a - s).
            projection.weight[index, query + index] = cosine
            projection.weight[2 + index, query + index] = sine
            projection.weight[2 + index, query + 2 + index] = cosine
            projection.weight[index, query + 2 + index] = -sine
            projection.weight[index, key + index] = 1.0
            projection.weight[2 + index, key + 2 + index] = 1.0
    found = attention_statistics(model, [batch_of("none", length=8)])
    assert found.strongest("previous_token") == (0, 1)
    assert found.previous_token[0, 1] > 0.98
    assert found.distance[0, 1] == pytest.approx(7 / 8, abs=0.05)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_drift_is_the_divergence_between_both_models_patterns(family: str) -> None:
    base, batch = build(family), batch_of()
    model = moved(base, 0.05)
    vector = ParameterVector.of(base)
    found = attention_statistics(model, [batch], base=vector)
    assert found.drift is not None
    expected = mean_divergence(eager_patterns(model, batch), eager_patterns(base, batch), batch["attention_mask"])
    torch.testing.assert_close(found.drift, expected, rtol=0, atol=1e-6)
    assert (expected > 1e-5).all()
    alone = attention_statistics(model, [batch])
    for name in STATISTICS:
        assert torch.equal(found.statistic(name), alone.statistic(name))


def test_no_change_is_no_drift() -> None:
    model = build("llama")
    found = attention_statistics(model, [batch_of()], base=ParameterVector.of(model))
    assert torch.equal(found.drift, torch.zeros(2, 4, dtype=torch.float64))


def test_the_divergence_of_single_rows() -> None:
    generator = torch.Generator().manual_seed(1)
    for scale in (1.0, 30.0):
        first, second = torch.softmax(scale * torch.randn(2, 50, 6, generator=generator, dtype=torch.float64), dim=-1)
        expected = torch.tensor(
            [divergence(p.tolist(), q.tolist()) for p, q in zip(first, second, strict=True)], dtype=torch.float64
        )
        torch.testing.assert_close(jensen_shannon(first, second), expected, rtol=0, atol=1e-13)
        assert torch.equal(jensen_shannon(first, second), jensen_shannon(second, first))
        assert (jensen_shannon(first, second) <= math.log(2) + 1e-12).all()
    apart = jensen_shannon(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.3, 0.7]))
    assert apart.item() == pytest.approx(math.log(2), abs=1e-7)


def test_a_small_divergence_keeps_its_digits() -> None:
    # To second order it is the sum of squares over eight times the distribution.
    p = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    for size in (1e-3, 1e-5, 1e-7):
        change = size * torch.tensor([1.0, -1.5, 0.5], dtype=torch.float64)
        expected = float((change.square() / p).sum()) / 8
        assert jensen_shannon(p + change, p).item() == pytest.approx(expected, rel=20 * size + 1e-8)


@pytest.mark.parametrize("with_base", [False, True])
def test_batching_and_memory_do_not_matter(with_base: bool) -> None:
    base, batch = build("llama"), batch_of()
    model = moved(base, 0.05)
    vector = ParameterVector.of(base) if with_base else None
    expected = attention_statistics(model, [batch], base=vector)
    singles = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(4)]
    # 1 byte: every layer of every sample is compared on its own.
    for batches, memory in ((singles, 2**20), ([batch], 2 * 4 * 4 * 11 * 11 * 2), ([batch], 1)):
        found = attention_statistics(model, batches, base=vector, memory=memory)
        for name in expected.names:
            torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=0, atol=1e-7)
        assert torch.equal(found.queries, expected.queries)
    # Four samples; one layer at a time needs two passes for each of both.
    assert expected.cost == Cost(forwards=4 * (2 if with_base else 1))
    assert found.cost == Cost(forwards=4 * (2 * 2 if with_base else 1))


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest number of base patterns that are held at once, under a limit and without one."""
    import lightning_goldy.analysis.attention.statistics as module

    held: list[int] = []
    original = module.divergence_sums

    def watching(first: Tensor, second: Tensor, tokens: Tokens) -> Any:
        held.append(second.numel() * 4)
        return original(first, second, tokens)

    monkeypatch.setattr(module, "divergence_sums", watching)
    model, batch = build("gpt2"), batch_of("none")
    base = ParameterVector.of(model)
    one_layer = 4 * 11 * 11 * 4
    attention_statistics(model, [batch], base=base, memory=2 * one_layer)
    assert max(held) == one_layer
    assert len(held) == 4 * 2
    held.clear()
    attention_statistics(model, [batch], base=base)
    assert held == [4 * one_layer] * 2


def test_only_the_first_samples_count() -> None:
    model, batch = build("gpt2"), batch_of()
    found = attention_statistics(model, [batch, batch], n_samples=3)
    first = {key: value[:3] for key, value in batch.items()}
    close(found, {name: attention_statistics(model, [first]).statistic(name) for name in STATISTICS}, 1e-12)
    assert found.n_samples == 3


def test_an_objective_may_call_the_model() -> None:
    model, batch = build("gpt2"), batch_of()
    expected = attention_statistics(model, [batch])
    found = attention_statistics(model, [batch], CausalLMObjective())
    for name in STATISTICS:
        torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=0, atol=1e-6)

    def twice(model: Any, batch: Any) -> Tensor:
        return model(**batch).logits.sum() + model(**batch).logits.sum()

    with pytest.raises(ValueError, match="layer 0 ran its attention twice"):
        attention_statistics(model, [batch], FunctionObjective(twice))


def test_the_model_comes_back_as_it_was() -> None:
    base = ParameterVector.of(build("gpt2"))
    model = moved(build("gpt2"), 0.1).train()
    model.transformer.h[0].eval()
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [part.training for part in model.modules()]
    kernel = model.config._attn_implementation
    attention_statistics(model, [batch_of()], base=base)
    attention_maps(model, batch_of())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [part.training for part in model.modules()]
    assert bool((model.transformer.wte.weight.grad == 1).all())
    assert model.config._attn_implementation == kernel


def test_low_precision_to_its_rounding() -> None:
    model, batch = build("llama"), batch_of()
    expected = attention_statistics(model, [batch])
    found = attention_statistics(model.bfloat16(), [batch])
    for name in STATISTICS:
        # Eight bits of mantissa, in scores as in weights; distances are up to ten times as large as shares.
        tolerance = 1e-2 if name == "distance" else 1e-3
        torch.testing.assert_close(found.statistic(name), expected.statistic(name), rtol=0, atol=tolerance, msg=name)


def test_singular_values_are_those_of_the_unpadded_pattern() -> None:
    model, batch = build("llama"), batch_of()
    maps = attention_maps(model, batch, layers=[1])
    values = maps.singular_values(3, sample=2)
    assert values.shape == (1, 4, 3)
    for head in range(4):
        pattern = maps.pattern(1, head, sample=2).double()
        squares = torch.linalg.eigvalsh(pattern.T @ pattern).flip(0)[:3]
        torch.testing.assert_close(values[0, head], squares.clamp_min(0).sqrt(), rtol=0, atol=1e-9)
    short = attention_maps(model, {"input_ids": torch.tensor([[3, 4]])}).singular_values(4)
    assert short[..., :2].isfinite().all()
    assert short[..., 2:].isnan().all()


def test_singular_values_of_pure_patterns() -> None:
    length = 6
    sink, shift = torch.zeros(length, length), torch.zeros(length, length)
    sink[:, 0] = 1
    shift[0, 0] = 1
    shift[range(1, length), range(length - 1)] = 1
    maps = AttentionMaps(
        (0,),
        (torch.stack([sink, shift])[None],),
        torch.ones(1, length, dtype=torch.bool),
        (tuple("abcdef"),),
    )
    values = maps.singular_values(6)[0]
    assert values[0].tolist() == pytest.approx([math.sqrt(6), 0, 0, 0, 0, 0], abs=1e-12)
    # Two queries share the first key.
    assert values[1].tolist() == pytest.approx([math.sqrt(2), 1, 1, 1, 1, 0], abs=1e-12)


def test_results_come_back_from_json() -> None:
    model, batch = build("gpt2"), batch_of()
    found = attention_statistics(model, [batch], base=ParameterVector.of(model))
    again = AttentionStatistics.from_json(found.to_json())
    assert all(torch.equal(again.statistic(name), found.statistic(name)) for name in found.names)
    maps = attention_maps(model, batch, name_tokens=lambda ids: [f"<{each}>" for each in ids])
    again = AttentionMaps.from_json(maps.to_json())
    assert again.tokens == maps.tokens
    assert torch.equal(again.pattern(1, 3, sample=1), maps.pattern(1, 3, sample=1))
    assert maps.token_names(3) == tuple(f"<{each}>" for each in batch["input_ids"][3, :8].tolist())


@pytest.mark.parametrize(("family", "named"), [("bloom", "BloomForCausalLM"), ("falcon", "FalconForCausalLM")])
def test_a_family_that_cannot_be_read_is_named(family: str, named: str) -> None:
    assert family in UNREGISTERED
    with pytest.raises(UnsupportedArchitectureError, match=f"{named} ignores .*such as gpt2, llama") as error:
        attention_statistics(build(family), [batch_of()])
    assert "strategy" not in str(error.value)
    cause = error.value.__cause__
    assert isinstance(cause, UnreadableAttentionError)
    assert str(error.value).startswith(f"{cause.reason}; attention can be read of")
    assert str(cause).startswith(f"{cause.reason}; use a strategy that needs gradients")
    again = pickle.loads(pickle.dumps(cause))
    assert (again.reason, str(again)) == (cause.reason, str(cause))


def test_another_error_of_the_model_is_not_taken_for_one_of_attention() -> None:
    def fails(model: Any, batch: Any) -> Tensor:
        raise UnsupportedArchitectureError("no such part; use a strategy of another kind")

    with pytest.raises(UnsupportedArchitectureError) as error:
        attention_statistics(build("gpt2"), [batch_of()], FunctionObjective(fails))
    assert str(error.value) == "no such part; use a strategy of another kind"


def test_bad_input_is_named() -> None:
    model, batch = build("gpt2"), batch_of()
    ids = batch["input_ids"]
    for arguments, message in (
        ({"batches": []}, "the batches are empty"),
        ({"batches": [batch], "n_samples": 9}, "n_samples=9, but the batches hold only 4"),
        ({"batches": [batch], "n_samples": 0}, "n_samples must be at least 1; got 0"),
        ({"batches": [batch], "memory": 0}, "memory is a number of bytes, at least 1; got 0"),
        ({"batches": [ids]}, "dicts with 'input_ids' of shape .*; got Tensor"),
        ({"batches": [{"input_ids": ids, "attention_mask": ids[:2]}]}, r"shape of input_ids, \(4, 11\); got \(2, 11\)"),
        ({"batches": [{"input_ids": ids, "attention_mask": 0 * ids}]}, r"samples \[0, 1, 2, 3\] of a batch of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_statistics(model, **arguments)
    with pytest.raises(SpaceError, match="has no parameter"):
        attention_statistics(model, [batch], base=ParameterVector.of(build("llama")))
    with pytest.raises(ValueError, match="there is no layer 5; the model has 2"):
        attention_maps(model, batch, layers=[0, 5])
    with pytest.raises(ValueError, match="name_tokens gave 1 names for 11"):
        attention_maps(model, batch, name_tokens=lambda ids: ["a"])
    maps = attention_maps(model, batch, layers=[1])
    with pytest.raises(IndexError, match=r"layer 0 was not recorded; those recorded: \[1\]"):
        maps.pattern(0, 0)
    with pytest.raises(IndexError, match="head 4: there are 4, from 0 to 3"):
        maps.pattern(1, 4)
    with pytest.raises(ValueError, match="unknown statistic 'drift'; Valid: entropy"):
        attention_statistics(model, [batch]).statistic("drift")
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 8] = math.nan
    with pytest.raises(ValueError, match="attention of layer 1, head 1 is not finite"):
        attention_statistics(model, [batch])
    with pytest.raises(ValueError, match="attention of layer 1 is not finite"):
        attention_maps(model, batch)


def test_a_base_of_a_part_of_the_parameters() -> None:
    base, batch = build("gpt2"), batch_of()
    model = moved(base, 0.05)
    space = ParameterSpace.of(base, ["transformer.h.1.*"])
    found = attention_statistics(model, [batch], base=ParameterVector.of(base, space))
    # What comes before the replaced block is the present model's.
    assert torch.equal(found.drift[0], torch.zeros(4, dtype=torch.float64))
    assert (found.drift[1] > 1e-6).all()
