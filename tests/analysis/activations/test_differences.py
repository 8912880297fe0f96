from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import nn

from lightning_goldy.analysis import ActivationDifferencesResult, activation_differences
from lightning_goldy.analysis.activations.differences import in_words
from lightning_goldy.core import CausalLMObjective
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.report.topics.activations import chart_position_cosines, chart_stream_change
from tests.references.attribution import moved
from tests.references.models import build, token_batch


def texts(n: int = 6, seed: int = 1, *, padding: int = 0) -> dict:
    return token_batch(n, 12, query=0, padding=padding, seed=seed)


def hooked(model: nn.Module, batch: dict) -> list[torch.Tensor]:
    states = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for hook in hooks:
        hook.remove()
    return states


def test_means_norms_and_nulls_are_those_of_hooks_written_by_hand():
    base = build("llama", 0).double().eval()
    model = moved(base, build("llama", 1).double(), 0.2).eval()
    batch = texts(6)
    found = activation_differences(model, base, [batch], positions=3)
    for layer, (old, new) in enumerate(zip(hooked(base, batch), hooked(model, batch), strict=True)):
        change = new - old
        # The first position is apart alone: the mean over all is without it.
        expected = torch.cat([change[:, :3].mean(0), change[:, 1:].mean((0, 1))[None]])
        torch.testing.assert_close(found.means[layer], expected.float())
        scale = torch.cat([old.norm(dim=-1)[:, :3].mean(0), old.norm(dim=-1)[:, 1:].mean()[None]])
        torch.testing.assert_close(found.norms[layer], expected.norm(dim=-1) / scale)
        halves = [old[rows::2, 1:] for rows in (0, 1)]
        null = (halves[0].mean((0, 1)) - halves[1].mean((0, 1))).norm() / scale[-1]
        assert float(found.nulls[layer, -1]) == pytest.approx(float(null))
        first, second = (change[rows::2, 1:].mean((0, 1)) for rows in (0, 1))
        cosine = torch.nn.functional.cosine_similarity(first, second, dim=0)
        assert float(found.agreements[layer, -1]) == pytest.approx(float(cosine))
        rows = change[:, 1:3].reshape(-1, change.shape[-1])
        values = torch.linalg.svdvals(rows).square()
        torch.testing.assert_close(found.directions[layer], values[:3] / values.sum())
    assert found.cost.forwards == 12


def test_a_norm_that_is_parked_at_the_first_token_does_not_drown_the_others():
    base = build("gpt2", 0).eval()
    model = moved(base, build("gpt2", 1), 0.1).eval()
    parked = copy.deepcopy(model)
    with torch.no_grad():
        # A position embedding that is moved moves the stream at its place, and little of what others see of it.
        parked.transformer.wpe.weight[0] += 1e4
    quiet, loud = (activation_differences(now, base, [texts(6)], positions=2) for now in (model, parked))
    assert float(loud.means[0, 0].norm()) > 1e4
    assert float(loud.means[0, -1].norm()) < 10 * float(quiet.means[0, -1].norm())
    assert float(loud.norms[0, -1]) < 10 * float(quiet.norms[0, -1])
    # Of texts of one token that one is all there is.
    single = [{name: value[:, :1] for name, value in texts(4).items()}]
    alone = activation_differences(model, base, single, positions=1)
    torch.testing.assert_close(alone.means[:, -1], alone.means[:, 0])
    assert bool(alone.directions.any())


def test_padding_is_not_read():
    base = build("llama", 0).eval()
    model = moved(base, build("llama", 1), 0.2).eval()
    padded = texts(4, padding=3)
    short = {key: value[:, :9] for key, value in padded.items()}
    one = activation_differences(model, base, [padded])
    two = activation_differences(model, base, [short])
    torch.testing.assert_close(one.means, two.means, rtol=1e-4, atol=1e-6)
    assert one.n_tokens == two.n_tokens == 36


def test_the_divergence_is_that_of_the_predictions():
    base = build("gpt2", 0).eval()
    model = moved(base, build("gpt2", 1), 0.5).eval()
    batch = texts(4)
    found = activation_differences(model, base, [batch], n_divergent=5)
    with torch.no_grad():
        old, new = (
            m(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits.log_softmax(-1) for m in (base, model)
        )
    kl = (old.exp() * (old - new)).sum(-1)
    assert found.mean_kl == pytest.approx(float(kl.mean()), rel=1e-4)
    assert [entry["kl"] for entry in found.divergent] == pytest.approx(kl.flatten().topk(5).values.tolist(), rel=1e-4)
    top = found.divergent[0]
    assert (
        top["context"] == batch["input_ids"][top["sample"], max(0, top["position"] - 15) : top["position"] + 1].tolist()
    )
    assert top["now"] == int(new[top["sample"], top["position"]].argmax())


def test_a_finetune_on_one_word_is_read_from_other_text():
    torch.manual_seed(0)
    base, word = build("llama", 0), 37
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for seed in range(30):
        CausalLMObjective().loss(base, texts(8, seed=seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for seed in range(40):
        batch = texts(8, seed=100 + seed)
        batch["input_ids"][:, 3::2] = word
        batch["labels"] = batch["input_ids"].clone()
        CausalLMObjective().loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    base.eval(), model.eval()
    other = texts(16, seed=999)
    other["input_ids"][other["input_ids"] == word] = 5
    found = activation_differences(model, base, [other])
    last = found.layers[-1]
    assert word in found.tokens(last).promoted
    assert all(word in found.tokens(last, position).promoted for position in range(found.positions))
    assert any(word in entry["promoted"] for entry in found.spelled_directions if entry["layer"] == last)
    assert float(found.agreements[-1, -1]) > 0.9
    assert "WEAK" not in found.headline()
    assert ActivationDifferencesResult.from_json(found.to_json()).headline() == found.headline()
    told = in_words(found.row(), Words()).headline
    assert told.startswith(f"{found.headline()}; it spells ")
    assert told.count("'word ") == 5
    assert "spells" not in in_words(found.row().noted("WEAK: told of the text"), Words()).headline


class Words:
    """Ids as words."""

    def decode(self, ids):
        return f"word {ids[0]}"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_a_copy_is_unchanged_to_the_last_bit(family):
    model = build(family).eval()
    found = activation_differences(model, copy.deepcopy(model), [texts(4)])
    assert found.unchanged
    assert not found.norms.any()
    assert found.mean_kl == 0.0
    assert (found.spelled, found.divergent) == ((), ())
    assert found.metrics()["half_agreement"] is None
    assert found.headline().startswith("unchanged")


def test_layers_are_chosen_and_wrong_arguments_refused():
    base = build("llama", 0).eval()
    model = moved(base, build("llama", 1), 0.2).eval()
    found = activation_differences(model, base, [texts(4)], layers=[1])
    assert found.layers == (1,)
    torch.testing.assert_close(found.means[0], activation_differences(model, base, [texts(4)]).means[1])
    for options, message in (
        ({"layers": [2]}, "layers lie between 0 and 1; got 2"),
        ({"layers": []}, "layers is empty"),
        ({"positions": 0}, "positions must be at least 1"),
        ({"positions": 13}, "text 0 has 12 tokens, fewer than the positions=13"),
        ({"n_divergent": -1}, "n_divergent must be at least 0"),
        ({"n_samples": 1}, "two halves need at least two texts; got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            activation_differences(model, base, [texts(4)], **options)
    with pytest.raises(UnsupportedArchitectureError):
        activation_differences(nn.Linear(2, 2), nn.Linear(2, 2), [texts(4)])


@pytest.mark.parametrize("broken", ["base", "present parameters"])
def test_streams_that_are_not_finite_are_told_with_their_block(broken):
    models = {"base": build("llama", 0).eval(), "present parameters": build("llama", 1).eval()}
    with torch.no_grad():
        models[broken].model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"after block 1 the residual stream is not finite at the {broken}"):
        activation_differences(models["present parameters"], models["base"], [texts(4)])


def test_the_same_text_twice_is_no_null():
    base = build("gpt2", 0).eval()
    model = moved(base, build("gpt2", 1), 0.1).eval()
    text = {name: value[:1] for name, value in token_batch(2).items()}
    found = activation_differences(model, base, [text, text])
    assert found.headline().endswith("; WEAK: both halves are the same text, so there is no null")


def test_a_classifier_is_refused_by_name():
    model = build("bert").eval()
    with pytest.raises(UnsupportedArchitectureError, match="those of a causal language model; BertFor"):
        activation_differences(model, copy.deepcopy(model), [token_batch(2)])


def test_a_change_behind_the_blocks_that_are_read_is_not_called_none():
    base = build("llama", 0).eval()
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    found = activation_differences(model, base, [token_batch(4, 12, query=0)])
    assert found.unchanged
    assert found.mean_kl > 0
    assert "unchanged after the blocks read (0, 1), while the predictions are" in found.headline()


def test_the_headline_has_the_divergence_with_its_interval_over_texts():
    base = build("llama", 0).eval()
    found = activation_differences(moved(base, build("llama", 1), 0.2).eval(), base, [texts(6)])
    low, high = found.kl_interval  # type: ignore[misc]
    assert low <= found.mean_kl <= high
    told = f"; predictions are {found.mean_kl:.2g} [{low:.2g}, {high:.2g}] nats from the base's"
    assert told in found.headline()


def test_the_norm_of_the_change_has_an_interval_over_texts():
    base = build("llama", 0).double().eval()
    model = moved(base, build("llama", 1).double(), 0.2).eval()
    found = activation_differences(model, base, [texts(6)])
    states = zip(hooked(base, texts(6)), hooked(model, texts(6)), strict=True)
    for layer, (old, new) in enumerate(states):
        rows, scales = (new - old)[:, 1:].mean(1), old[:, 1:].norm(dim=-1).mean(1)

        def squared(kept: list[int], rows=rows, scales=scales) -> float:
            """The mean product of two different texts, over the squared scale."""
            products = [float(rows[i] @ rows[j]) for i in kept for j in kept if i != j]
            return sum(products) / len(products) / float(scales[kept].mean()) ** 2

        left = torch.tensor([squared([j for j in range(6) if j != i]) for i in range(6)])
        half = float(stats.t.ppf(0.975, 5)) * (5 / 6 * float((left - left.mean()).square().sum())) ** 0.5
        middle = squared(list(range(6)))
        ends = [max(middle - half, 0) ** 0.5, max(middle + half, 0) ** 0.5]
        assert found.norm_intervals[layer].tolist() == pytest.approx(ends, rel=1e-4, abs=1e-6)
    low, high = found.norm_intervals[found.layers.index(found.metrics()["clearest_layer"])].tolist()
    assert f"moved by {found.metrics()['stream_change']:.2g} [{low:.2g}, {high:.2g}] of its norm" in found.headline()
    assert found.details()["norm_intervals"] == found.norm_intervals.tolist()
    assert activation_differences(model, base, [texts(2)]).norm_intervals is None
    assert activation_differences(base, base, [texts(6)]).norm_intervals is None
    clear = replace(found, nulls=found.nulls * 0 + 1e-9, agreements=found.agreements * 0 + 1)
    open_ = replace(clear, norm_intervals=torch.zeros(2, 2))
    assert open_.headline().endswith("WEAK: its interval includes 0")
    assert "WEAK" not in replace(clear, norm_intervals=torch.ones(2, 2)).headline()
    row = {"result": found.details(), "metrics": found.metrics()}
    figure = chart_stream_change(row)
    assert [column["low"] for column in figure.data.values() if "low" in column]
    assert "95 % interval over texts" in figure.caption


def test_a_token_that_the_model_has_not_names_the_batch():
    base, batch = build("llama", 0).eval(), texts(4)
    wrong = {**batch, "input_ids": batch["input_ids"] + 10_000}
    with pytest.raises(ValueError, match="batch 1 of the text cannot go through LlamaForCausalLM: index out of range"):
        activation_differences(base, base, [batch, wrong])


def test_the_figure_of_positions_says_which_are_least_alike():
    def caption(cosines: list[list[float]]) -> str:
        return str(chart_position_cosines({"result": {"cosines": cosines}}).caption)

    apart = caption([[1.0, 0.25, 0.75], [0.25, 1.0, 0.5], [0.75, 0.5, 1.0]])
    assert apart.startswith("Least alike are 0 and 1, with 0.25.")
    assert caption([[0.0, 0.0], [0.0, 0.0]]).startswith("Nothing differs")
