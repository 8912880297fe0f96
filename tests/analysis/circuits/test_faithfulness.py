from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from lightning_goldy.analysis.attribution.attribution import interval_of, resampled
from lightning_goldy.analysis.circuits import (
    CircuitGraph,
    FlatMetricError,
    PromptPairs,
    TrackedCircuit,
    TrackingOptions,
    circuit_overlap,
    faithfulness,
    find_circuits,
    node_effects,
    track_circuit,
)
from lightning_goldy.analysis.circuits.circuit import Mover
from lightning_goldy.analysis.circuits.faithfulness import Faithfulness
from lightning_goldy.analysis.circuits.graph import Wiring
from lightning_goldy.analysis.circuits.nulls import (
    NULLS,
    exchanged_circuits,
    joined_circuits,
    random_circuits,
    shuffled_circuits,
)
from lightning_goldy.analysis.circuits.runs import CircuitOptions, measure, wired
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.core.files import finite
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.data import induction_pairs
from lightning_goldy.report import draw_figures
from tests.analysis.circuits.test_scores import prompts
from tests.references.architecture_models import build, lora
from tests.references.induction import TOKENS, built
from tests.references.model_zoo import ZOO, build_family

FAST = ("GPT-J", "Mixtral", "Cohere 2")
DECODERS = (
    *("GPT-2", "Llama", "Mistral", "Qwen2", "Qwen2-MoE", "Qwen3", "Qwen3-MoE", "OLMoE", "GPT-OSS", "EXAONE-MoE"),
    *("Granite-MoE", "Aria", "Phi-3", "GPT-Neo", "GPT-NeoX", "OPT"),
)


def patched_node(model: Any, module: nn.Module, columns: slice | None, pairs: PromptPairs) -> Tensor:
    """Logits of the clean prompts with what a head or MLP makes taken from the other prompts, by plain hooks."""
    kept: dict[str, Tensor] = {}

    def first(output: Any) -> Tensor:
        return output if isinstance(output, Tensor) else output[0]

    def changed(given: Tensor) -> Tensor:
        given = given.clone()
        given[..., columns] = kept["other"][..., columns]
        return given

    def hooked(act: Callable[[Any], Any], prompts: Any) -> Tensor:
        if columns is None:
            hook = module.register_forward_hook(lambda _, args, output: act(output))
        else:
            hook = module.register_forward_pre_hook(lambda _, args: act(args[0]))
        with hook, torch.no_grad():
            return model(input_ids=torch.tensor(prompts), use_cache=False).logits[:, -1]

    hooked(lambda given: kept.update(other=first(given).clone()), pairs.corrupted)
    if columns is not None:
        return hooked(lambda given: (changed(given),), pairs.clean)
    put = lambda given: kept["other"] if isinstance(given, Tensor) else (kept["other"], *given[1:])  # noqa: E731
    return hooked(put, pairs.clean)


@pytest.mark.parametrize("family", [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in DECODERS)])
def test_nodes_of_every_family_do_what_plain_hooks_say(family: str) -> None:
    model = build_family(family).eval()
    pairs = induction_pairs(range(3, model.config.vocab_size), 3)

    def value(logits: Tensor) -> float:
        rows = zip(logits.double(), pairs.answers, pairs.wrong, strict=True)
        return float(sum(row[right[0]] - row[wrong[0]] for row, right, wrong in rows)) / len(pairs)

    effects = node_effects(model, pairs)
    with torch.no_grad():
        clean = value(model(input_ids=torch.tensor(pairs.clean), use_cache=False).logits[:, -1])
    wiring = Wiring.of(model)
    for stage in wiring.stages:
        for place, column in enumerate(stage.writers):
            width = stage.block.output.layout.head_dim
            columns = slice(place * width, (place + 1) * width) if stage.is_attention else None
            expected = clean - value(patched_node(model, stage.output, columns, pairs))
            assert effects[wiring.graph.writers[column]] == pytest.approx(expected, abs=2e-5)
    assert max(map(abs, effects.values())) > 1e-3


def test_intervals_are_of_resampled_pairs() -> None:
    model, pairs = build("gpt2"), prompts(6)
    found = find_circuits(model, pairs, method="eap", n_edges=40)
    curve = faithfulness(model, found, pairs, sizes=[0, 40, found.graph.n_edges], n_random=2)
    assert (curve.intervals[0], curve.intervals[-1]) == ((0.0, 0.0), (1.0, 1.0))
    with wired(model, pairs, TrackingOptions().patching) as wiring:
        whole = found.graph.edges()
        values, _ = measure(wiring, pairs, TrackingOptions().patching, [whole, whole & False, found.kept])
    draws = torch.randint(6, (20_000, 6), generator=torch.Generator().manual_seed(1))
    clean, patched, kept = (row[draws].mean(1) for row in values)
    expected = ((kept - patched) / (clean - patched)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = curve.intervals[1]
    spread = float(expected[1] - expected[0])
    assert [low, high] == pytest.approx(expected.tolist(), abs=0.15 * spread)
    assert low < curve.values[1] < high
    metrics = faithfulness(model, found, pairs, n_random=2).metrics()
    assert (metrics["faithfulness_low"], metrics["faithfulness_high"]) == pytest.approx((low, high))


@pytest.mark.parametrize("method", ["eap", "nodes", "exact"])
def test_scores_without_a_group_are_those_of_the_other_pairs(method: Any) -> None:
    model, pairs = build("gpt2").double(), prompts(5)
    found = find_circuits(model, pairs, method=method, n_edges=20, n_groups=2, batch_size=8)
    # Batches of two pairs, in turns; of edges that are patched, pair by pair.
    groups = [[0, 2, 4], [1, 3]] if method == "exact" else [[0, 1, 4], [2, 3]]
    for other, group in zip(found.without_groups(), groups, strict=True):
        rest = pairs.take([place for place in range(5) if place not in group])
        expected = find_circuits(model, rest, method=method, n_edges=20).scores * len(rest) / 5
        torch.testing.assert_close(other.scores, expected, atol=1e-9, rtol=1e-6)
    plain = find_circuits(model, pairs, method=method, n_edges=20)
    torch.testing.assert_close(found.scores, plain.scores, atol=1e-9, rtol=1e-6)
    assert (found.cost, plain.left_out.numel()) == (plain.cost, 0)


def test_the_choice_of_the_edges_widens_the_interval() -> None:
    model, pairs, others = build("gpt2").double(), prompts(6), prompts(4)
    found = find_circuits(model, pairs, method="eap", n_edges=60, n_groups=3)
    curve = faithfulness(model, found, others, sizes=[30, 60], n_random=1)
    for place, size in enumerate((30, 60)):
        chosen = [other.chosen(n_edges=size) for other in found.without_groups()]
        values = [faithfulness(model, one, others, n_random=0).value for one in chosen]
        assert curve.choices[place].tolist() == pytest.approx(values)
        mean = sum(values) / 3
        error = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in values))
        assert curve.choice_errors[place] == pytest.approx(error)
        (low, high), (least, most) = curve.intervals[place], curve.wide_intervals[place]
        assert curve.values[place] - least == pytest.approx(math.hypot(curve.values[place] - low, 1.96 * error))
        assert most - curve.values[place] == pytest.approx(math.hypot(high - curve.values[place], 1.96 * error))
    assert "with the choice of the edges" in curve.headline()
    assert curve.metrics()["faithfulness_choice_error"] == curve.choice_errors[-1] > 0
    assert Faithfulness.from_json(curve.to_json()) == curve
    for wrong, told in (
        (1, "n_groups is 0, or at least 2 and at most 6"),
        (7, "at most 6, the number of pairs; got 7"),
    ):
        with pytest.raises(ValueError, match=told):
            find_circuits(model, pairs, method="eap", n_groups=wrong)


def test_random_circuits_that_join_the_ends_stand_beside_it() -> None:
    model, pairs = build("llama"), prompts(3)
    found = track_circuit(model, pairs, TrackingOptions(method="eap", sizes=(0.1, 0.5), n_random=2))
    graph = found.circuit.graph
    for place, size in enumerate(found.curve.sizes):
        for number, kept in enumerate(joined_circuits(graph, size, 2)):
            value = faithfulness(model, replace(found.circuit, kept=kept), pairs, n_random=0).value
            assert float(found.curve.joined[place, number]) == pytest.approx(value, abs=1e-6)
    assert f"joined from end to end {float(found.curve.joined[-1].mean()):.2f}" in found.headline()
    row = found.row().result["curve"]
    assert row["joined"] == pytest.approx(found.curve.joined.mean(1).tolist())
    assert len(row["joined_band"]) == 2
    assert found.metrics()["faithfulness_joined"] == row["joined"][-1]
    drawn = draw_figures({**found.row().to_dict(), "step": 0})["faithfulness"]
    assert "random, joined from end to end" in json.dumps(drawn.data)
    weak = replace(found.curve, values=(2.0, 2.0), intervals=((1.9, 2.1),) * 2, joined=found.curve.joined * 0 + 3)
    weak = replace(weak, clean=1.0, patched=0.0, span=(0.5, 1.5), random=weak.random * 0)
    assert weak.weak() == "no more than a random circuit joined from end to end"


def copied_heads(model: Any) -> Any:
    """A GPT-2 whose heads of a block are all the first one."""
    size = model.config.n_embd // model.config.n_head
    with torch.no_grad():
        for block in model.transformer.h:
            into, out = block.attn.c_attn, block.attn.c_proj
            for head in range(1, model.config.n_head):
                there, first = slice(head * size, (head + 1) * size), slice(size)
                out.weight[there] = out.weight[first]
                for start in range(0, 3 * model.config.n_embd, model.config.n_embd):
                    to, source = slice(start + there.start, start + there.stop), slice(start, start + size)
                    into.weight[:, to], into.bias[to] = into.weight[:, source], into.bias[source]
    return model


def test_exchanged_heads_keep_all_where_heads_are_alike_and_nothing_where_one_does_all() -> None:
    """Copies of a head carry what it carried; heads of noise carry nothing of an induction circuit."""
    model, pairs = copied_heads(build("gpt2").double()), prompts(4)
    alike = faithfulness(model, find_circuits(model, pairs, method="eap"), pairs, sizes=[0.2, 0.5])
    assert alike.exchanged.shape == (2, 10)
    for value, exchanged in zip(alike.values, alike.exchanged, strict=True):
        assert exchanged.tolist() == pytest.approx([value] * 10, abs=1e-9)
    assert alike.exchanged_area == pytest.approx(alike.area, abs=1e-9)
    model, pairs = built(), induction_pairs(TOKENS, 16, length=5)
    curve = faithfulness(model, find_circuits(model, pairs, n_edges=12), pairs)
    assert curve.value > 0.9
    assert float(curve.exchanged.max()) < 0.1
    assert curve.weak() == ""
    assert curve.metrics()["faithfulness_exchanged"] == pytest.approx(float(curve.exchanged.mean()))


def test_a_circuit_of_no_heads_has_none_to_exchange() -> None:
    model, pairs = build("gpt2"), prompts(3)
    circuit = find_circuits(model, pairs, n_edges=0)
    kept = circuit.kept.clone()
    for edge in ("input->m0", "m0->output", "input->output"):
        kept[circuit.graph.place(edge)] = True
    curve = faithfulness(model, replace(circuit, kept=kept), pairs, n_random=2)
    assert curve.exchanged.isnan().all()
    assert "heads exchanged" not in curve.headline()
    assert curve.metrics()["faithfulness_exchanged"] is None
    row = finite(curve.details())
    assert (row["exchanged"], row["exchanged_band"]) == ([None], [[None, None]])
    ends = [replace(circuit, kept=whole) for whole in (circuit.graph.edges(), circuit.kept)]
    assert [faithfulness(model, end, pairs, n_random=2).exchanged.tolist() for end in ends] == [[[1, 1]], [[0, 0]]]


def test_margins_are_of_the_same_pairs_as_what_the_hardest_null_keeps() -> None:
    """The mean of a null is compared pair by pair: against the circuit itself nothing is left, against none all."""
    model, pairs = build("llama"), shown(prompts(6), build("llama"))
    circuit = find_circuits(model, pairs, method="eap", n_edges=30)
    itself = faithfulness(model, circuit, pairs, n_random=0, others={"itself": circuit})
    assert itself.margins == ((0.0, 0.0),)
    nothing = faithfulness(model, circuit, pairs, sizes=[0], n_random=1)
    assert nothing.margins == ((0.0, 0.0),)
    curve = faithfulness(model, circuit, pairs, n_random=2)
    with wired(model, pairs, CircuitOptions()) as wiring:
        ends = [circuit.graph.edges(), circuit.kept & False]
        nulls = {
            "random ones": random_circuits(circuit.graph, 30, 2),
            "joined from end to end": joined_circuits(circuit.graph, 30, 2),
            "heads exchanged": exchanged_circuits(circuit.graph, circuit.kept, 2),
            "edges shuffled within layers": shuffled_circuits(circuit.graph, circuit.kept, 2),
        }[curve.nulls()[0][0]]
        values, _ = measure(wiring, pairs, CircuitOptions(), [*ends, circuit.kept, *nulls])
    counts = resampled(6)
    shares = counts @ (values[2] - values[3:].mean(0)) / (counts @ (values[0] - values[1]))
    assert curve.margins[0] == pytest.approx(interval_of(shares), abs=1e-9)
    assert finite(curve.details())["margins"] == [pytest.approx(curve.margins[0])]
    assert faithfulness(model, circuit, prompts(1), n_random=1).margins == ()
    assert faithfulness(model, circuit, pairs, n_random=0).margins == ()


def test_the_circuits_of_other_tasks_stand_beside_it() -> None:
    model, pairs, other = build("llama"), shown(prompts(5), build("llama")), prompts(4, seed=3)
    options = TrackingOptions(method="eap", sizes=(0.2, 0.5), n_random=2, n_groups=2)
    found = track_circuit(model, pairs, options, others={"induction": other, "itself": pairs})
    curve, rival = found.curve, find_circuits(model, other, method="eap")
    for place, size in enumerate(curve.sizes):
        alone = faithfulness(model, rival.chosen(n_edges=size), pairs, n_random=0).value
        assert curve.others[place].tolist() == pytest.approx([alone, curve.values[place]], abs=1e-6)
    assert curve.other_tasks == ("induction", "itself")
    assert curve.choices.shape == (2, 2)
    searches = [find_circuits(model, own, method="eap").cost for own in (pairs, other, pairs)]
    measured = curve.cost + found.circuit.cost
    without = track_circuit(model, pairs, options)
    assert measured.backwards - without.cost.backwards == sum(cost.backwards for cost in searches[1:])
    values = [float(null[-1].mean()) for _, null in curve.nulls()]
    assert values == sorted(values, reverse=True)
    name, hardest = curve.nulls()[0]
    assert f" with the choice of the edges, {name} {float(hardest[-1].mean()):.2f} (less by [" in curve.summary()
    row = json.loads(json.dumps(found.row().result))["curve"]
    assert row["others"]["itself"] == pytest.approx(list(curve.values))
    assert row["hardest"] == name
    assert found.metrics()["faithfulness_other_task"] == pytest.approx(float(curve.others[-1].max()))
    drawn = json.dumps(draw_figures({**found.row().to_dict(), "step": 0})["faithfulness"].data)
    assert "circuit of induction" in drawn
    assert "the circuit, its heads exchanged" in drawn
    assert "the circuit, its edges shuffled within layers" in drawn
    again = Faithfulness.from_json(curve.to_json())
    assert torch.equal(again.others, curve.others)
    assert again.other_tasks == curve.other_tasks
    nulls: dict[str, Any] = {name: getattr(curve, name) * 0 for name in NULLS}
    nulls |= {"choices": curve.choices[:, :0], "others": torch.tensor([[0.0, 0.0], [0.2, 0.3]])}
    held = replace(curve, clean=1.0, patched=0.0, span=(0.5, 1.5), values=(0.1, 0.9), **nulls)
    held = replace(held, intervals=((0.0, 0.2), (0.8, 1.0)), margins=(), n_pairs=8)
    assert held.weak() == ""
    margined = replace(held, margins=((-0.2, 0.1), (0.5, 0.7)))
    assert margined.summary().split("pairs, ")[1].startswith("circuit of itself 0.30 (less by [0.50, 0.70])")
    assert margined.weak() == ""
    # One draw that keeps as much is not what its null keeps on average; without the pairs of both it speaks against it.
    lucky = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.95]])
    assert replace(margined, random=lucky).weak() == ""
    assert replace(held, random=lucky).weak() == "no more than a random circuit"
    # Which pairs chose the edges widens it: 0.6 less 1.96 times an error of 0.4.
    chosen = torch.tensor([[0.1, 0.1], [0.5, 1.3]])
    assert replace(margined, choices=chosen).wide_margins[1] == pytest.approx(
        (0.6 - math.hypot(0.1, 1.96 * 0.4), 0.6 + math.hypot(0.1, 1.96 * 0.4))
    )
    assert replace(margined, choices=chosen).weak() == "the interval reaches what the circuit of itself keeps"
    assert replace(margined, margins=((-0.2, 0.1), (-0.1, 0.9))).weak() == (
        "the interval reaches what the circuit of itself keeps"
    )
    for more, doubt in (
        (0.85, "the interval reaches what the circuit of itself keeps"),
        (0.95, "no more than the circuit of itself"),
    ):
        assert replace(held, others=torch.tensor([[0.0, 0.0], [0.2, more]])).weak() == doubt
    reached = replace(held, exchanged=held.exchanged + 0.95)
    assert reached.weak() == "no more than the circuit with its heads exchanged"
    with pytest.raises(ValueError, match=r"others are circuits by name, as .*; got \['far'\]"):
        faithfulness(model, rival, pairs, others=["far"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"the circuit of 'far' is of another graph, of .* edges, than the one"):
        faithfulness(model, rival, pairs, others={"far": find_circuits(build("gpt2"), pairs, method="eap")})


def test_the_headline_has_interval_and_null_and_one_pair_is_told() -> None:
    model = build("llama")
    found = track_circuit(model, prompts(4), TrackingOptions(method="eap", sizes=(0.5,)))
    (low, high), random = found.curve.intervals[-1], float(found.curve.random[-1].mean())
    told = f"{found.curve.value:.2f} [{low:.2f}, {high:.2f}] of the behaviour over 4 pairs"
    hardest, most = max(
        (("random ones", random), *((name, float(null[-1].mean())) for name, null in found.curve.nulls())),
        key=lambda named: named[1],
    )
    (least, largest), label = found.curve.margins[-1], f"{hardest} {most:.2f}"
    assert f"{told}, {label} (less by [{least:.2f}, {largest:.2f}]), " in found.headline()
    assert f", random ones {random:.2f}" in found.headline()
    row = json.loads(json.dumps(found.row().result))
    assert row["curve"]["intervals"] == [[low, high]]
    assert row["curve"]["n_pairs"] == 4
    alone = track_circuit(model, prompts(1), TrackingOptions(method="eap", sizes=(0.5,)))
    assert alone.curve.intervals == ()
    assert "(no interval: one pair)" in alone.headline()
    assert alone.metrics()["faithfulness_low"] is None
    assert Faithfulness.from_json(found.curve.to_json()).intervals == found.curve.intervals


def test_an_interval_that_reaches_random_circuits_is_weak() -> None:
    circuit = find_circuits(build("gpt2"), prompts(2), method="eap", n_edges=3)
    for value, interval, doubt in (
        (0.1, (0.0, 0.4), "; WEAK: no more than a random circuit"),
        (0.5, (0.1, 0.8), "; WEAK: the interval reaches what a random circuit keeps"),
        (0.9, (0.7, 1.0), ""),
    ):
        random = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
        curve = Faithfulness((3,), 9, (value,), (0.0,), random, 1.0, 0.0, n_pairs=8, intervals=(interval,))
        headline = TrackedCircuit(circuit, curve, (0.5,), None).headline()
        assert headline.endswith(doubt) if doubt else "WEAK" not in headline


def test_the_bases_circuit_is_that_of_the_base() -> None:
    options, pairs = TrackingOptions(method="eap"), prompts(3)
    model = lora("llama", ["q_proj", "o_proj", "down_proj"])
    with model.disable_adapter():
        expected = find_circuits(model, pairs, method="eap", n_edges=0)
    base = build_base(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = options.find_at_base(model, base, pairs)
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert circuit_overlap(found, options.find(model, pairs)).intersection_over_union < 1


def build_base(model: Any) -> Any:
    """The adapters as they begin: they add nothing."""
    space = ParameterSpace.of(model)
    values = {name: value.detach().clone() for name, value in space.resolve(model).items()}
    return ParameterVector(
        space, {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in values.items()}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sizes": [math.nan]}, "a size must be a finite number; got nan"),
        ({"sizes": ["1 %"]}, "a size must be a finite number; got '1 %'"),
        ({"sizes": [1.5]}, "shares between 0 and 1; got 1.5"),
        ({"sizes": [-1]}, "sizes are numbers of edges up to 110"),
        (
            {"metric": "logits"},
            "unknown metric 'logits'; Valid: logit_difference, kl, probability, probability_difference",
        ),
        ({"ablation": "resample"}, "unknown ablation 'resample'; Valid: counterfactual, mean, zero"),
        ({"metric": lambda logits, pairs, clean: logits[:, 0].mean()}, r"one value per pair, .* \(3,\); got \(\)"),
        ({"metric": lambda logits, pairs, clean: logits[:, 0] / 0}, "of prompt '0' is not finite"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(options: dict[str, Any], message: str) -> None:
    model = build_family("GPT-2")
    circuit = find_circuits(model, prompts(3), method="eap", n_edges=4)
    with pytest.raises(ValueError, match=message):
        faithfulness(model, circuit, prompts(3), **options)


def test_thresholds_and_prompts_that_a_model_cannot_take_are_told() -> None:
    model, pairs = build_family("GPT-2"), prompts(2)
    for threshold, message in ((-0.1, "at least 0; got -0.1"), (math.nan, "finite number; got nan"), ("a", "got 'a'")):
        with pytest.raises(ValueError, match=message):
            find_circuits(model, pairs, threshold=threshold)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_edges must be a whole number; got 0\.05"):
        find_circuits(model, pairs, n_edges=0.05)  # type: ignore[arg-type]
    for ids, message in (
        ((3, 10_000), "prompt 'odd' has tokens beyond the model's 67: from 3 to 10000"),
        ((3, -1), "prompt 'odd' has tokens beyond the model's 67: from -1 to 5"),
        ((3,) * 40, "prompt 'odd' has 40 tokens, more than the model's 32 positions"),
    ):
        odd = PromptPairs((ids,), ((4,) * len(ids),), ((5,),), ((4,),), ("odd",))
        with pytest.raises(ValueError, match=message):
            find_circuits(model, odd)
    with pytest.raises(ValueError, match="prompt 'odd' has 2 tokens and its corrupted version 3"):
        PromptPairs(((3, 4),), ((3, 4, 5),), ((5,),), ((4,),), ("odd",))
    assert find_circuits(model, pairs, threshold=1e9).n_edges == 0


def test_a_metric_without_a_gradient_and_shares_that_are_no_numbers_are_told() -> None:
    with pytest.raises(ValueError, match="the metric has no gradient: make it of the logits"):
        find_circuits(build("gpt2"), prompts(2), lambda logits, pairs, clean: logits[:, 0].detach())
    for options in ({"sizes": ("a",)}, {"share": "a"}, {"sizes": (math.nan,)}, {"share": True}):
        with pytest.raises(ValueError, match="of all edges, above 0 and at most 1; got"):
            TrackingOptions(**options)  # type: ignore[arg-type]
    circuit = find_circuits(build("gpt2"), prompts(2), method="eap", n_edges=0)
    assert circuit_overlap(circuit, circuit).metrics()["overlap_by_chance"] is None


@pytest.mark.parametrize("find", [find_circuits, node_effects, TrackingOptions().find])
def test_an_interrupted_search_leaves_the_model_as_it_was(find: Callable[..., Any]) -> None:
    model, pairs = build("gpt2").train(), prompts(3)
    base = ParameterVector.of(build("gpt2"), ParameterSpace.of(model)).map(lambda value: value + 0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    searches = [lambda: find(model, pairs, progress=interrupt)]
    searches.append(lambda: TrackingOptions().find_at_base(model, base, pairs, interrupt))
    for search in searches:
        with pytest.raises(KeyboardInterrupt):
            search()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
        assert model.training
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_weights_that_are_not_finite_and_models_without_tokens_are_told() -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"after model\.layers\.1 the residual stream is not finite"):
        CircuitGraph.of(model)
    assert "ViT" in ZOO
    with pytest.raises(UnsupportedArchitectureError, match="ViTForImageClassification takes no tokens"):
        CircuitGraph.of(build_family("ViT"))


def exchanged(pairs: PromptPairs) -> PromptPairs:
    return PromptPairs(pairs.corrupted, pairs.clean, pairs.answers, pairs.wrong)


def shown(pairs: PromptPairs, model: Any) -> PromptPairs:
    """Each pair in the order in which its clean version is right more often."""
    with torch.no_grad():
        logs = [
            model(input_ids=torch.tensor(ids)).logits[:, -1].log_softmax(-1) for ids in (pairs.clean, pairs.corrupted)
        ]
    gains = [
        float((logs[0] - logs[1])[place, right[0]] - (logs[0] - logs[1])[place, wrong[0]])
        for place, (right, wrong) in enumerate(zip(pairs.answers, pairs.wrong, strict=True))
    ]
    clean, corrupted = zip(
        *(
            (one, other) if gain > 0 else (other, one)
            for one, other, gain in zip(pairs.clean, pairs.corrupted, gains, strict=True)
        ),
        strict=True,
    )
    return PromptPairs(clean, corrupted, pairs.answers, pairs.wrong)


def test_a_behaviour_that_the_model_does_not_show_is_weak() -> None:
    model = build("llama")
    options = TrackingOptions(method="eap", sizes=(0.5,))
    right = shown(prompts(6), model)
    there, wrong = (track_circuit(model, pairs, options) for pairs in (right, exchanged(right)))
    assert (there.curve.absent(), there.curve.clean > there.curve.patched) == ("", True)
    span = there.curve.span
    assert span is not None
    assert 0 < span[0] < there.curve.clean - there.curve.patched < span[1]
    assert "; WEAK: the model does not show the behaviour on these prompts: logit_difference is" in wrong.headline()
    assert wrong.row().result["curve"]["absent"] == wrong.curve.absent()
    # Of six pairs one tells anything: a third of all draws are without it.
    lone = PromptPairs(right.clean, (right.corrupted[0], *right.clean[1:]), right.answers, right.wrong)
    curve = faithfulness(model, there.circuit, lone)
    assert curve.span is not None
    assert curve.span[0] == 0
    assert "; WEAK: whether these prompts show the behaviour is open: " in curve.headline()


def test_a_model_without_the_behaviour_is_tracked_and_told() -> None:
    model, pairs = build("gpt2"), prompts(3)
    same = PromptPairs(pairs.clean, pairs.clean, pairs.answers, pairs.wrong)
    with pytest.raises(FlatMetricError, match="the pairs do not tell the behaviour from its absence"):
        faithfulness(model, find_circuits(model, same, n_edges=3), same)
    found = track_circuit(model, same, TrackingOptions(sizes=(0.1, 0.5)))
    assert found.metrics()["faithfulness_10_percent"] is None
    assert found.metrics()["area"] is None
    assert found.headline().startswith("what 55 of 110 edges keep of the behaviour cannot be told; on the prompts that")
    assert "WEAK: the model does not show the behaviour" in found.headline()
    row = json.loads(json.dumps(found.row().at(step=0, epoch=0, trigger="end").to_dict()))
    assert "faithfulness" in draw_figures(row)


def test_it_is_told_whether_the_prompts_chose_the_edges() -> None:
    model, pairs = build("gpt2"), prompts(4)
    circuit = find_circuits(model, pairs, method="eap", n_edges=20)
    other = prompts(4, seed=1)
    mixed = PromptPairs(
        (*pairs.clean[:1], *other.clean[1:]),
        (*pairs.corrupted[:1], *other.corrupted[1:]),
        (*pairs.answers[:1], *other.answers[1:]),
        other.wrong,
    )
    for measuring, n_shared, told in (
        (pairs, 4, "; on the prompts that chose the edges, which flatters"),
        (exchanged(pairs), 4, "; on the prompts that chose the edges, which flatters"),
        (mixed, 1, "; on prompts 1 of which are among the prompts that chose the edges, which flatters"),
        (other, 0, "; on other prompts than chose the edges"),
    ):
        curve = faithfulness(model, circuit, measuring, n_random=1)
        assert (curve.n_shared, curve.details()["n_shared"]) == (n_shared, n_shared)
        assert told in curve.headline()
    options = TrackingOptions(method="eap", sizes=(0.5,))
    found = track_circuit(model, pairs, options, held_out=other)
    assert found.curve.values == faithfulness(model, options.find(model, pairs), other, sizes=[0.5]).values
    assert "; on other prompts than chose the edges; " in found.headline()
    assert found.curve.values != track_circuit(model, pairs, options).curve.values


def test_metric_and_patches_are_by_default_those_of_the_search() -> None:
    model, pairs = build("gpt2"), prompts(4)
    circuit = find_circuits(model, pairs, "kl", ablation="zero", n_edges=20)
    expected = faithfulness(model, circuit, pairs, "kl", ablation="zero")
    found = faithfulness(model, circuit, pairs)
    assert (found.values, found.clean, found.patched) == (expected.values, expected.clean, expected.patched)
    assert (found.details()["metric"], found.details()["ablation"]) == ("kl", "zero")
    own = find_circuits(model, pairs, lambda logits, pairs, clean: logits[:, 3], n_edges=20)
    with pytest.raises(ValueError, match="the circuit was found with a function, '<lambda>': give metric="):
        faithfulness(model, own, pairs)


def test_an_overlap_stands_beside_chance() -> None:
    model, pairs = build("gpt2"), prompts(3)
    options = TrackingOptions(method="eap")
    found = track_circuit(model, pairs, options, base=options.find(model, pairs))
    assert found.overlap is not None
    assert f"overlap with the base's 1.00 ({found.overlap.by_chance:.2f} by chance)" in found.headline()


def test_pairs_are_lists_of_ids_or_told() -> None:
    pairs = prompts(3)
    columns = (pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong)
    assert PromptPairs(*([list(ids) for ids in column] for column in columns)) == pairs  # type: ignore[arg-type]
    assert PromptPairs(*map(torch.tensor, columns)) == pairs  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="answers are token ids, a list for each prompt; of prompt 0 got 4"):
        PromptPairs(((3, 4),), ((3, 5),), (4,), (5,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clean are token ids, a list for each prompt; of prompt 0 got 'Ada saw'"):
        PromptPairs(("Ada saw",), ((3, 5),), ((4,),), ((5,),))  # type: ignore[arg-type]
    model = build("gpt2")
    with pytest.raises(ValueError, match=r"pairs are PromptPairs, such as text_pairs.* makes; got list \['a'\]"):
        find_circuits(model, ["a"])  # type: ignore[arg-type]


def test_models_that_look_ahead_are_told() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=30))
    with pytest.raises(UnsupportedArchitectureError, match="in BertForMaskedLM a token changes what is said at those"):
        CircuitGraph.of(model)


def test_circuits_that_were_found_otherwise_are_told_apart() -> None:
    model, pairs = build("gpt2"), prompts(3)
    circuit = find_circuits(model, pairs, method="eap", n_edges=9)
    assert circuit_overlap(circuit, circuit).different == ()
    other = find_circuits(model, prompts(3, seed=1), "probability", ablation="zero", n_edges=9)
    overlap = circuit_overlap(circuit, other)
    assert overlap.different == overlap.details()["different"] == ("method", "metric", "ablation", "prompts")
    assert overlap.headline().endswith("; found with different method, metric, ablation, prompts")
    empty = circuit.chosen(n_edges=0)
    assert "removed: neither circuit has an edge" in circuit_overlap(empty, empty).headline()


@pytest.mark.parametrize(("n_pairs", "weak"), [(2, True), (5, True), (6, False)])
def test_an_interval_over_too_few_pairs_says_so(n_pairs: int, weak: bool) -> None:
    random = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    curve = Faithfulness((3,), 9, (0.9,), (0.0,), random, 1.0, 0.0, n_pairs=n_pairs, intervals=((0.8, 1.0),))
    told = f"only {n_pairs} pairs of prompts, and below 6 not even their whole range is a 95 % interval"
    assert curve.weak() == curve.details()["weak"] == (told if weak else "")
    assert curve.headline().endswith(f"; WEAK: {told}") == weak
    mover = Mover("a1.h1", 0.5, 0.9, 0.1, 0.7, 0.9, n_pairs)
    assert ("; WEAK: only" in mover.headline()) == weak
