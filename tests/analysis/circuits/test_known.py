"""Circuits that are known: built by hand, or learned on the spot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.circuits import PromptPairs, faithfulness, find_circuits, name_movers, node_effects
from lightning_goldy.data import induction_pairs
from tests.references.attention import eager_patterns
from tests.references.induction import KNOWN, TOKENS, built, trained


def answered(model: Any, pairs: PromptPairs) -> float:
    with torch.no_grad():
        likeliest = model(torch.tensor(pairs.clean)).logits[:, -1].argmax(-1).tolist()
    return sum(token in right for token, right in zip(likeliest, pairs.answers, strict=True)) / len(pairs)


def node_correlation(model: Any, pairs: PromptPairs, method: Any) -> float:
    effects = node_effects(model, pairs, batch_size=64)
    scores = find_circuits(model, pairs, method=method, batch_size=64).node_scores()
    return agreement_of([scores[name] for name in effects], list(effects.values())).pearson


@pytest.mark.parametrize("method", ["eap", "eap_ig_inputs", "eap_ig_activations", "exact"])
def test_the_edges_of_a_built_induction_circuit_come_first(method: Any):
    model, pairs = built(), induction_pairs(TOKENS, 8, length=5)
    assert answered(model, pairs) == 1
    found = find_circuits(model, pairs, method=method, n_edges=3)
    assert {name for name, _ in found.edges()} == set(KNOWN)
    greedy = found.chosen(n_edges=3, select="greedy")
    assert torch.equal(greedy.kept, found.kept)
    others = found.scores.abs()[~found.kept]
    assert float(others.max()) < 0.2 * min(abs(score) for _, score in found.edges())
    held = induction_pairs(TOKENS, 8, length=5, seed=1)
    curve = faithfulness(model, found, held)
    assert curve.value > 0.95
    assert curve.completeness > 0.95
    assert float(curve.random.max()) < 0.05
    # Of so few edges one in ten or so may be the very circuit.
    assert float(curve.joined.median()) < 0.05


def test_the_head_that_brings_the_answer_looks_at_it_and_is_named() -> None:
    model, pairs = built(), induction_pairs(TOKENS, 8, length=5)
    found = name_movers(model, find_circuits(model, pairs, method="eap"), pairs, n=3)
    assert (found[0].node, found[0].moves_names, found[0].n_pairs) == ("a1.h1", True, 8)
    ids = torch.tensor(pairs.clean)
    weights = eager_patterns(model, {"input_ids": ids})[1][:, 1, -1].double()  # [pairs, T]
    for looked, answers in ((found[0].right, pairs.answers), (found[0].wrong, pairs.wrong)):
        held = torch.tensor(
            [[token in tokens for token in row] for row, tokens in zip(ids.tolist(), answers, strict=True)]
        )
        assert looked == pytest.approx(float((weights * held).sum(1).mean()))
    assert found[0].right > 0.8 > 0.1 > found[0].wrong
    assert "a name mover" in found[0].headline()
    assert not any(mover.moves_names for mover in found[1:])
    away = PromptPairs(((3, 4, 5),), ((3, 6, 5),), ((7,),), ((6,),), names=("far",))
    with pytest.raises(ValueError, match="no prompt holds its right answer, the first 'far'"):
        name_movers(model, find_circuits(model, pairs, method="eap"), away)


def test_node_scores_follow_what_patching_a_node_does():
    model, pairs = built(), induction_pairs(TOKENS, 16, length=5)
    slope, line = (node_correlation(model, pairs, method) for method in ("eap", "eap_ig_inputs"))
    assert slope > 0.9
    assert line >= slope
    assert line > 0.999


@pytest.mark.slow
def test_a_learned_circuit_beats_random_ones_by_far():
    """Of 20 % of the edges the found ones keep nine tenths, random ones a tenth at most: a margin of 0.8."""
    model, pairs = trained(), induction_pairs(30, 64)
    held = induction_pairs(30, 64, seed=1)
    assert answered(model, held) > 0.95
    for method in ("eap_ig_inputs", "eap_ig_activations"):
        # On the clean run attention is sharp and its slope flat; along the line the scores see it turn.
        assert node_correlation(model, pairs, method) > 0.9
        found = find_circuits(model, pairs, method=method, batch_size=64)
        curve = faithfulness(model, found, held, sizes=[0.2], batch_size=64)
        assert curve.value > 0.85
        assert curve.value - float(curve.random.max()) > 0.75
        assert curve.value - float(curve.joined.max()) > 0.5
        # Heads of so small a model are in part alike: some exchanges keep nearly as much.
        assert curve.value - float(curve.exchanged.mean()) > 0.3
        assert curve.completeness > 0.9
