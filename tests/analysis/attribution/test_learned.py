"""Masks that are learned recover at least what attribution's do, more where elements stand in for one another."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_goldy.analysis import LearnOptions, change_attribution, graft_curve, learn_mask
from tests.references.attribution import finetuned_pair, moved
from tests.references.models import build, token_batch


@pytest.mark.parametrize("relaxation", ["straight_through", "sigmoid"])
def test_a_learned_mask_recovers_more_than_attribution_at_equal_share(relaxation) -> None:
    model, base, scored, held_out = finetuned_pair()
    found = change_attribution(model, base, [scored], shares=[0.2], keep_scores=True)
    settings = {"share": 0.2, "options": LearnOptions(steps=16, relaxation=relaxation)}
    before = copy.deepcopy(model.state_dict())
    made = learn_mask(model, base, found, [scored], **settings)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert made.mask.total == found.mask(0.2).total
    assert max(made.values) > made.values[0]
    options = {"baselines": ["learned"], "learn": settings["options"], "masks": {"again": [made.mask]}}
    curve = graft_curve(model, base, found, [scored], [held_out], **options)
    (attributed,), (learned,), (given,) = (curve.of(name) for name in ("attribution", "learned", "again"))
    assert learned.recovered > attributed.recovered + 0.05
    assert learned.value == given.value  # the same seed learns the same mask
    assert curve.cost.backwards == made.cost.backwards == 16 * 2


def test_the_penalty_keeps_the_divergence_on_other_text_down() -> None:
    base = build("gpt2", 0).eval()
    model = moved(base, build("gpt2", 1), 0.5).eval()
    scored, held_out, other = (token_batch(8, seed=seed) for seed in (1, 2, 3))
    found = change_attribution(model, base, [scored], metric="kl", shares=[0.1], keep_scores=True)
    curves = [
        graft_curve(
            model,
            base,
            found,
            [scored],
            [held_out],
            [other],
            baselines=["learned"],
            learn=LearnOptions(penalty=penalty),
        )
        for penalty in (0.0, 5.0)
    ]
    free, held = (curve.of("learned")[0] for curve in curves)
    assert held.kl < 0.8 * free.kl
    assert curves[0].n_collateral == 4  # the other half taught


def test_units_are_learned_whole_and_levels_are_enough_to_begin_with() -> None:
    base = build("llama", 0).eval()
    model = moved(base, build("llama", 1), 0.5).eval()
    scored = token_batch(6)
    found = change_attribution(model, base, [scored], metric="kl", shares=[0.1, 0.3])
    made = learn_mask(model, base, found, [scored], share=0.3, options=LearnOptions(steps=8, pieces="units"))
    assert 0 < made.mask.density <= 0.3
    embedding = made.mask["model.embed_tokens.weight"]
    assert bool((embedding.all(1) | ~embedding.any(1)).all())
    single = learn_mask(model, base, found, [scored], share=0.3, options=LearnOptions(steps=4))
    assert single.mask.density == pytest.approx(0.3, rel=1e-3)
    assert len(single.values) == 5


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"rate": -1.0}, "rate must be a number of at least 0; got -1"),
        ({"relaxation": "hard"}, "unknown relaxation 'hard'"),
        ({"pieces": "blocks"}, "unknown pieces 'blocks'"),
    ):
        with pytest.raises(ValueError, match=message):
            LearnOptions(**options)
    base = build("gpt2", 0).eval()
    model = moved(base, build("gpt2", 1), 0.5).eval()
    found = change_attribution(model, base, [token_batch(6)], nodes=1)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]; got 2"):
        learn_mask(model, base, found, [token_batch(6)], share=2)
