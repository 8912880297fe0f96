from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_goldy.analysis.circuits import CircuitGraph, PromptPairs, faithfulness, find_circuits, node_effects
from lightning_goldy.analysis.circuits.nulls import random_circuits
from lightning_goldy.analysis.circuits.runs import CircuitOptions, measure, wired
from lightning_goldy.analysis.circuits.scores import grouped_scores
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from tests.references.architecture_models import REGISTERED, UNREGISTERED, VOCABULARY, build, lora
from tests.references.circuits import FAMILIES, groups_of, in_float64, patched_by_hand, slope_by_hand

REFUSED = {
    "bert": "normalise the stream itself",
    "roberta": "normalise the stream itself",
}
DECODERS = [family for family in (*REGISTERED, *UNREGISTERED) if family not in REFUSED]


def prompts(n: int = 3, length: int = 5, seed: int = 0) -> PromptPairs:
    draw = random.Random(seed)
    clean = tuple(tuple(draw.randrange(2, VOCABULARY) for _ in range(length)) for _ in range(n))
    corrupted = tuple((*ids[:2], draw.randrange(2, VOCABULARY), *ids[3:]) for ids in clean)
    return PromptPairs(clean, corrupted, tuple((3 + place,) for place in range(n)), ((20,),) * n)


@pytest.fixture
def exact_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention in float64: it takes its softmax in float32 of itself."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda value, dim, dtype=None: softmax(value, dim))


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("family", FAMILIES)
def test_patched_runs_are_those_written_by_hand(family: str):
    model, pairs, options = in_float64(build(family)), prompts(2), CircuitOptions()
    with wired(model, pairs, options) as wiring:
        graph = wiring.graph
        seen: list[Tensor] = []
        watching = CircuitOptions(metric=lambda logits, *_: seen.append(logits) or logits[:, 0])  # type: ignore
        for kept in random_circuits(graph, graph.n_edges // 2, 2):
            measure(wiring, pairs, watching, [kept])
            expected = patched_by_hand(model, family, graph, kept, pairs)
            torch.testing.assert_close(seen[-1], expected, atol=1e-9, rtol=1e-9)
            assert not torch.allclose(expected, model(torch.tensor(pairs.clean)).logits[:, -1], atol=1e-4)


@pytest.mark.usefixtures("exact_softmax")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edge_is_scored_by_the_slope_along_it(family: str):
    model, pairs, options = in_float64(build(family)), prompts(2), CircuitOptions()
    with wired(model, pairs, options) as wiring:
        scores, _, _ = grouped_scores(wiring, pairs, options, method="eap")
        graph, draw = wiring.graph, random.Random(1)
        places = graph.edges().nonzero().tolist()
        chosen = [*draw.sample(places, 8), [graph.readers.index("output"), 2]]
        for row, column in chosen:
            expected = slope_by_hand(
                model, family, graph, (row, column), pairs, lambda logits: options.value(logits, pairs, logits)
            )
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-7, rel=1e-4)
    assert float(scores[~graph.edges()].abs().max()) == 0


def linear_network() -> Any:
    """Attention that looks at all alike, no norms, MLPs without a bend: every path is linear."""
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, activation_function="linear", bos_token_id=1
    )
    model = hf.GPT2LMHeadModel(config).double().eval()
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
        with torch.no_grad():
            block.attn.c_attn.weight[:, :32] = 0
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                layer.weight.mul_(30)
    model.transformer.ln_f = nn.Identity()
    return model


@pytest.mark.parametrize("ablation", ["counterfactual", "mean", "zero"])
def test_attribution_is_exact_on_a_linear_network(ablation: Any):
    model, pairs = linear_network(), prompts(3)

    def metric(logits: Tensor, pairs: PromptPairs, clean: Tensor) -> Tensor:
        return torch.stack([row[right[0]] - row[20] for row, right in zip(logits, pairs.answers, strict=True)])

    linear: dict[str, Any] = {"metric": metric, "ablation": ablation, "n_edges": 5}
    exact = find_circuits(model, pairs, method="exact", **linear)
    assert float(exact.scores.abs().max()) > 1e-2
    for method in ("eap", "eap_ig_inputs", "eap_ig_activations"):
        found = find_circuits(model, pairs, method=method, **linear)
        torch.testing.assert_close(found.scores, exact.scores, atol=1e-6, rtol=1e-6)
    effects = node_effects(model, pairs, metric, ablation=ablation)
    assert exact.node_scores() == pytest.approx(effects, abs=1e-6)


def test_the_line_is_integrated_to_the_change_along_it():
    model, pairs = build("llama").double(), prompts(2)
    options = CircuitOptions(metric="probability")
    with wired(model, pairs, options) as wiring:
        scores, _, cost = grouped_scores(wiring, pairs, options, method="eap_ig_inputs", steps=12)
        whole = wiring.graph.edges()
        ends, _ = measure(wiring, pairs, options, [whole, torch.zeros_like(whole)])
    # All that the input tells by any path: the edges from it, each through its readers' own slopes.
    assert (cost.backwards, cost.forwards) == (24, 2 + 2 + 24)
    patched = whole.clone()
    patched[:, 0] = False
    assert float((ends[0] - ends[1]).mean()) == pytest.approx(float(scores[:, 0].sum()), rel=1e-3)


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_has_a_graph(family: str):
    model = build(family)
    graph, config = CircuitGraph.of(model), model.config
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    groups = groups_of(config)
    assert len(graph.writers) == 1 + layers * (heads + 1)
    assert len(graph.readers) == layers * (heads + 2 * groups + 1) + 1
    beside = family in ("gpt_neox", "phi", "falcon")
    assert graph.seen[graph.readers.index("m0")] == (1 if beside else 1 + heads)
    assert (graph.seen[0], graph.seen[-1]) == (1, len(graph.writers))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_attention_that_begins_at_nothing_is_read_by_the_mlp_of_its_block_as_ever(family: str):
    model, graph = build(family), CircuitGraph.of(build(family))
    names = ("o_proj", "attn.c_proj", "attention.dense")
    for name, parameter in model.named_parameters():
        if any(f".{part}." in f".{name}" for part in names):
            parameter.data.zero_()
    state = copy.deepcopy(model.state_dict())
    assert CircuitGraph.of(model) == graph
    circuit = find_circuits(model, prompts(), method="eap", ablation="zero", n_edges=graph.n_edges)
    assert circuit.graph == graph
    assert faithfulness(model, circuit, prompts(), n_random=0).value == 1
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_the_whole_graph_keeps_all_and_the_empty_one_nothing_exactly():
    for family in ("gpt2", "llama", "gpt_neox", "gemma2"):
        model, pairs = build(family), prompts(5)
        found = find_circuits(model, pairs, n_edges=0, method="eap", batch_size=2)
        curve = faithfulness(model, found, pairs, sizes=[0, 10, found.graph.n_edges], n_random=2, batch_size=2)
        assert (curve.values[0], curve.values[-1]) == (0.0, 1.0) == (curve.complements[-1], curve.complements[0])
        with torch.no_grad():
            ends = [model(torch.tensor(ids)).logits[:, -1] for ids in (pairs.clean, pairs.corrupted)]
        means = [float(sum(row[3 + place] - row[20] for place, row in enumerate(one.double())) / 5) for one in ends]
        assert [curve.clean, curve.patched] == pytest.approx(means, abs=1e-5)


def test_a_model_is_left_as_it_was():
    model, pairs = build("gpt2"), prompts(3)
    model.train()
    model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    before = copy.deepcopy(model.state_dict())
    asked = [parameter.requires_grad for parameter in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for method in ("eap", "eap_ig_inputs", "eap_ig_activations", "nodes"):
        circuit = find_circuits(model, pairs, method=method, steps=2)  # type: ignore[arg-type]
    faithfulness(model, circuit, pairs, n_random=1)
    node_effects(model, pairs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert asked == [parameter.requires_grad for parameter in model.parameters()]
    assert model.training
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox"])
def test_models_of_low_precision_have_the_circuits_of_full_precision(family: str):
    pairs, model = prompts(4), build(family).bfloat16()
    low = find_circuits(model, pairs, n_edges=20)
    full = find_circuits(copy.deepcopy(model).float(), pairs, n_edges=20)
    correlation = torch.corrcoef(torch.stack([low.scores.flatten(), full.scores.flatten()]))[0, 1]
    assert float(correlation) > 0.95
    ends = faithfulness(model, low, pairs, sizes=[0, low.graph.n_edges], n_random=0).values
    assert ends == (0.0, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = find_circuits(copy.deepcopy(model).float(), pairs, n_edges=20)
    correlation = torch.corrcoef(torch.stack([mixed.scores.flatten(), full.scores.flatten()]))[0, 1]
    assert float(correlation) > 0.95


def test_adapters_count_as_the_weights_that_they_come_to():
    model, pairs = lora("llama", ["q_proj", "v_proj", "o_proj"]).double(), prompts(2)
    options = CircuitOptions()
    merged = copy.deepcopy(model).merge_and_unload()
    found = [find_circuits(one, pairs, method="eap", n_edges=20) for one in (model, merged)]
    torch.testing.assert_close(found[0].scores, found[1].scores)
    with wired(model, pairs, options) as wiring:
        kept = random_circuits(wiring.graph, 60, 1)
        values, _ = measure(wiring, pairs, options, kept)
    with wired(merged, pairs, options) as wiring:
        torch.testing.assert_close(values, measure(wiring, pairs, options, kept)[0])


def test_models_without_a_sum_are_refused():
    for family, message in REFUSED.items():
        with pytest.raises(UnsupportedArchitectureError, match=message):
            CircuitGraph.of(build(family))
    config = hf.GraniteConfig(
        vocab_size=67,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        residual_multiplier=0.3,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    assert CircuitGraph.of(hf.GraniteForCausalLM(config)).n_edges  # a factor on what is written is found


def test_arguments_are_checked():
    model, pairs = build("gpt2"), prompts(2)
    for options, message in (
        ({"method": "eip"}, "unknown method 'eip'; did you mean 'eap'"),
        ({"metric": "kl", "method": "eap"}, "where kl has none"),
        ({"n_edges": 3, "threshold": 0.1}, "give one of"),
        ({"n_edges": 10_000}, "lies between 0 and"),
        ({"ablation": "mean", "pairs": pairs.take([0])}, "the only one of 5 tokens"),
        ({"pairs": PromptPairs(pairs.clean, pairs.corrupted, pairs.answers, ((), (20,)))}, "prompt '0' has none"),
        ({"steps": 0}, "steps must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            find_circuits(model, options.pop("pairs", pairs), **options)  # type: ignore[arg-type]
    circuit = find_circuits(model, pairs, method="eap")
    with pytest.raises(ValueError, match="of another graph"):
        faithfulness(build("llama"), circuit, pairs)
    same = PromptPairs(pairs.clean, pairs.clean, pairs.answers, pairs.wrong)
    with pytest.raises(ValueError, match="do not tell the behaviour"):
        faithfulness(model, circuit, same)


def test_kl_and_probabilities_are_those_of_the_definition():
    logits, clean = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    pairs = PromptPairs(((1,), (1,)), ((2,), (2,)), ((3,), (3, 4)), ((5,), (6,)))
    p, q = clean.softmax(-1), logits.softmax(-1)
    value = {
        name: CircuitOptions(name).value(logits, pairs, clean)
        for name in ("logit_difference", "kl", "probability", "probability_difference")
    }  # type: ignore[arg-type]
    torch.testing.assert_close(value["kl"], -(p * (p / q).log()).sum(-1))
    right, wrong = torch.stack([q[0, 3], q[1, 3] + q[1, 4]]), torch.stack([q[0, 5], q[1, 6]])
    torch.testing.assert_close(value["probability"], right)
    torch.testing.assert_close(value["probability_difference"], right - wrong)
    torch.testing.assert_close(value["logit_difference"], (right / wrong).log())
    torch.testing.assert_close(value["logit_difference"][0], logits[0, 3] - logits[0, 5])
