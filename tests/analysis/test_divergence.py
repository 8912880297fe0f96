from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import AnchoredDivergence, divergence_sum, shortened
from lightning_goldy.core import CausalLMObjective, ClassifierObjective
from tests.references.models import build, token_batch
from tests.references.volume import divergence_reference


def moved(model: nn.Module, size: float) -> nn.Module:
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("shift", [1e-4, 1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 2), (50, 11), (7, 40_000), (900, 5000)])
def test_equals_its_definition_in_float64(rows: int, vocabulary: int, shift: float) -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(rows, vocabulary)
    other = logits + shift * torch.randn_like(logits)
    found = divergence_sum(torch.log_softmax(logits, -1), other) / rows
    # float32 log-probabilities are off by 1e-6, which beside a difference of `shift` is a share of 1e-6 / shift.
    assert found == pytest.approx(divergence_reference(logits, other), rel=1e-5 + 1e-6 / shift)


def plain_sum(log_probs: Tensor, logits: Tensor) -> float:
    """The same terms, each by a formula without cases of its own for what underflows."""
    found = torch.log_softmax(logits, dim=-1)
    probability, difference = log_probs.exp(), found - log_probs
    near = probability * (torch.expm1(difference) - difference)
    low, high = map(float, difference.aminmax())
    if -math.inf < low and high < 80:
        return float(near.sum(dtype=torch.float64))
    far = found.exp() - probability - torch.where(probability == 0, 0.0, probability * difference)
    lost = torch.isneginf(log_probs)
    terms = torch.where(difference.abs() < 1, near, far).masked_fill(lost, 0.0).sum(dtype=torch.float64)
    return float(terms + torch.where(lost, found.exp(), 0.0).sum(dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0.5, 10.0, 40.0, 300.0])
@pytest.mark.parametrize("lost", [False, True])
def test_what_underflows_is_left_out_only_where_no_bit_depends_on_it(
    dtype: torch.dtype, width: float, lost: bool
) -> None:
    generator = torch.Generator().manual_seed(int(width))
    base = (width / 3) * torch.randn(40, 997, generator=generator, dtype=dtype)
    moved = base + width * torch.randn(40, 997, generator=generator, dtype=dtype)
    # Unlikely at first and certain later, so that no exponential of the difference may be taken.
    base[:, 3], moved[:, 3] = -4 * width - 60, 4 * width + 40
    if lost:
        base[0, 5] = -math.inf
    log_probs = torch.log_softmax(base, -1)
    assert divergence_sum(log_probs, moved) == plain_sum(log_probs, moved)
    assert divergence_sum(log_probs, log_probs + moved / width) == plain_sum(log_probs, log_probs + moved / width)


def test_far_logits_take_no_longer_than_near_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each exponential of what underflows takes up to fifty times as long as another.
    taken: list[Tensor] = []
    original = Tensor.exp

    def watched(tensor: Tensor) -> Tensor:
        taken.append(tensor)
        return original(tensor)

    monkeypatch.setattr(Tensor, "exp", watched)
    log_probs = torch.log_softmax(torch.tensor([[0.0, 1.0, -60.0]]), -1)
    divergence_sum(log_probs, torch.tensor([[0.0, -95.0, 90.0]]))
    assert all(float(part.min()) > -87.3 for part in taken)


def test_impossible_tokens_and_certain_ones_are_no_numbers_out_of_thin_air() -> None:
    low = -math.inf
    logits = torch.tensor([[0.0, 0.0, low], [200.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    same = divergence_sum(torch.log_softmax(logits, -1), logits)
    assert same == pytest.approx(0, abs=1e-6)
    other = torch.tensor([[0.0, 0.0, 0.0], [0.0, 200.0, 0.0], [0.0, 0.0, 0.0]])
    found = divergence_sum(torch.log_softmax(logits, -1), other)
    assert found == pytest.approx(math.log(1.5) + 200.0, rel=1e-6)
    masked = torch.tensor([[0.0, 0.0, low], [0.0, 0.0, 0.0], [0.0, 0.0, low]])
    assert divergence_sum(torch.log_softmax(logits, -1), masked) == math.inf


@pytest.mark.parametrize("cache", ["auto", "device", "cpu", "none"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_cache_gives_the_divergence_over_the_target_positions_of_all_batches(family: str, cache: str) -> None:
    torch.manual_seed(0)
    model = build(family).eval()
    batches = [token_batch(3, 9), token_batch(2, 6)]
    batches[0]["labels"] = batches[0]["input_ids"].clone()
    batches[0]["labels"][:, :4] = -100
    objective = CausalLMObjective()
    divergence = AnchoredDivergence(model, batches, objective, cache=cache)
    assert divergence(model) == 0
    with torch.no_grad():
        before = torch.cat([objective.logits_and_targets(model, batch).logits for batch in batches])
        values = [parameter.clone() for parameter in model.parameters()]
        moved(model, 0.02)
        after = torch.cat([objective.logits_and_targets(model, batch).logits for batch in batches])
    assert divergence.positions == len(before)
    assert divergence(model) == pytest.approx(divergence_reference(before, after), rel=1e-4)
    assert divergence.cache != "auto"
    # The evaluation leaves the moved weights where they are.
    assert not any(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), values, strict=True))


@pytest.mark.parametrize(("dtype", "bias"), [(torch.bfloat16, 1e-3), (torch.float16, 1e-5)])
def test_a_rounded_cache_tells_its_bias_at_the_anchor(dtype: torch.dtype, bias: float) -> None:
    torch.manual_seed(0)
    model = build("gpt2").eval()
    batch = token_batch(3, 9)
    exact = AnchoredDivergence(model, [batch], CausalLMObjective())
    rounded = AnchoredDivergence(model, [batch], CausalLMObjective(), cache_dtype=dtype)
    at_anchor = rounded(model)
    assert 0 < at_anchor < bias
    assert rounded.at_anchor(model) == at_anchor
    moved(model, 0.05)
    # The bias and its product with the divergence, no more.
    assert abs(rounded(model) - exact(model)) < 2 * at_anchor + 2 * math.sqrt(at_anchor * exact(model))


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_value_at_the_anchor_is_that_of_an_evaluation(cache: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = build("llama").eval()
    batches = [token_batch(3, 9), token_batch(2, 6), token_batch(1, 12)]
    divergence = AnchoredDivergence(model, batches, CausalLMObjective(), cache=cache, cache_dtype=dtype)
    assert divergence.at_anchor(model) == pytest.approx(divergence(model), rel=1e-5)
    assert (divergence.at_anchor(model) == 0) == (dtype is None or cache == "none")


def test_random_predictions_are_seen_at_the_anchor() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * torch.randn_like(x)

    batches = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long)) for _ in range(3)]
    for cache in ("device", "none"):
        model = Noisy().requires_grad_(False)
        model.weight = nn.Parameter(torch.zeros(1))
        assert AnchoredDivergence(model, batches, ClassifierObjective(), cache=cache).at_anchor(model) > 1e-4


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x)


def test_one_forward_per_batch_and_evaluation() -> None:
    model = Counting()
    batches = [(torch.randn(5, 4), torch.zeros(5, dtype=torch.long)) for _ in range(3)]
    divergence = AnchoredDivergence(model, batches, ClassifierObjective())
    assert model.calls == 3
    for _ in range(4):
        divergence(model)
    assert model.calls == 3 + 4 * 3
    for _ in range(2):
        divergence.at_anchor(model)
    assert model.calls == 3 + 4 * 3 + 2


def test_batches_are_cut_to_samples_and_lengths() -> None:
    batches = [token_batch(3, 8), token_batch(3, 8)]
    cut = shortened(batches, CausalLMObjective(), 4, 5)
    assert [tuple(batch["input_ids"].shape) for batch in cut] == [(3, 5), (1, 5)]
    assert torch.equal(cut[1]["input_ids"], batches[1]["input_ids"][:1, :5])
    pairs = [(torch.ones(2, 3), torch.zeros(2))]
    assert [part[0].shape[0] for part in shortened(pairs, ClassifierObjective(), 1, None)] == [1]


def test_bad_input_is_refused() -> None:
    model, objective = nn.Linear(2, 2), ClassifierObjective()
    batch = (torch.ones(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match="there is no batch"):
        AnchoredDivergence(model, [], objective)
    with pytest.raises(ValueError, match="unknown cache 'gpu'"):
        AnchoredDivergence(model, [batch], objective, cache="gpu")
    with pytest.raises(ValueError, match=r"cache_dtype must be one of torch\.float32"):
        AnchoredDivergence(model, [batch], objective, cache_dtype=torch.int8)
    with pytest.raises(ValueError, match="n_samples=3, but the batches hold only 1"):
        shortened([batch], objective, 3, None)
    with pytest.raises(ValueError, match="the batches are empty"):
        shortened([], objective, None, None)
    with pytest.raises(ValueError, match="max_seq_len cuts token sequences"):
        shortened([batch], objective, None, 4)
    for options in ((0, None), (None, 1)):
        with pytest.raises(ValueError, match="must be at least"):
            shortened([batch], objective, *options)
