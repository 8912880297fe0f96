from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lightning_goldy.analysis.linearized import ExplainedChange, TangentModel, explain_change
from lightning_goldy.analysis.linearized.explain import Explanation
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core import CausalLMObjective, ClassifierObjective, FunctionObjective, ParameterVector
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.core.base import BaseParameters
from tests.references import architecture_models
from tests.references.linearize import at_base, linear_mlp_logits, softmax_of_base
from tests.references.models import build, class_batch, token_batch

ALL = get_args(Explanation)


def moved(model: nn.Module, size: float, *, only: str = "", seed: int = 3) -> ParameterVector:
    base = ParameterVector.of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return base


def plain(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shares_are_those_of_logits_computed_one_by_one(family: str) -> None:
    model: Any = build(family).double().eval()
    base = moved(model, 0.1)
    batch = token_batch(3, 9, padding=2)
    found = explain_change(model, base, [batch], variants=ALL)
    assert [each.variant for each in found.records] == list(ALL)
    model.set_attn_implementation("eager")
    inputs = plain(batch)
    with torch.no_grad():
        with softmax_of_base(model, base, inputs):
            frozen = model(**inputs).logits
        with softmax_of_base(model, base, inputs, times=2):
            # Of the reference's two passes the first is the base's own.
            both = linear_mlp_logits(model, base, inputs, "base")
        predictions = {
            "frozen_attention": frozen,
            "linear_mlp": linear_mlp_logits(model, base, inputs, "base"),
            "linear_mlp_current": linear_mlp_logits(model, base, inputs, "current"),
            "both": both,
            "tangent": TangentModel(model, base)(**inputs).logits,
        }
        start, present = at_base(model, base)(**inputs).logits, model(**inputs).logits
    keep = batch["labels"][:, 1:] != -100
    targets = batch["labels"][:, 1:][keep]

    def loss(logits: torch.Tensor) -> float:
        return float(nn.functional.cross_entropy(logits[:, :-1][keep], targets))

    assert found.base_loss == pytest.approx(loss(start), rel=1e-9)
    assert found.loss == pytest.approx(loss(present), rel=1e-9)
    assert found.n_targets == len(targets)
    assert found.step_norm == pytest.approx(
        math.sqrt(sum(float((p.detach() - base[name]).square().sum()) for name, p in model.named_parameters()))
    )
    rows = {name: logits[:, :-1][keep] for name, logits in predictions.items()}
    first, last = start[:, :-1][keep], present[:, :-1][keep]
    change = last - first
    for each in found.records:
        row = rows[each.variant]
        assert each.loss == pytest.approx(loss(predictions[each.variant]), rel=1e-7)
        assert each.loss_share == pytest.approx((each.loss - found.base_loss) / found.change, rel=1e-9)
        assert each.logit_share == pytest.approx(
            float(((row - first) * change).sum() / change.square().sum()), rel=1e-6
        )
        assert each.relative_error == pytest.approx(float((last - row).norm() / change.norm()), rel=1e-6)
        divergence = (last.softmax(-1) * (last.log_softmax(-1) - row.log_softmax(-1))).sum(-1).mean()
        assert each.kl_divergence == pytest.approx(float(divergence), rel=1e-6)
        assert each.top1_agreement == pytest.approx(float((last.argmax(-1) == row.argmax(-1)).double().mean()))


def test_a_change_of_queries_and_keys_needs_other_patterns_and_nothing_else() -> None:
    model = build("llama").eval()
    base = ParameterVector.of(model)
    moved(model, 0.5, only="q_proj")
    found = explain_change(model, base, [token_batch(3, 9)])
    frozen = found.of("frozen_attention")
    assert (frozen.loss_share, frozen.logit_share, frozen.relative_error) == (0, 0, 1)
    assert found.of("both").loss_share == pytest.approx(0, abs=1e-3)


def test_a_change_of_the_last_projection_needs_neither() -> None:
    model = build("llama").double().eval()
    base = moved(model, 0.2, only="layers.1.mlp.down_proj")
    found = explain_change(model, base, [token_batch(3, 9)])
    for each in found.records:
        assert (each.loss_share, each.logit_share) == (pytest.approx(1, abs=1e-9), pytest.approx(1, abs=1e-9))
        assert each.relative_error == pytest.approx(0, abs=1e-9)
        assert each.kl_divergence == pytest.approx(0, abs=1e-12)
        assert each.top1_agreement == 1


def test_losses_of_batches_count_as_often_as_they_have_targets() -> None:
    model = build("gpt2").double().eval()
    base = moved(model, 0.1)
    batches = [token_batch(2, 7, seed=1), token_batch(3, 9, padding=1, seed=2)]
    whole = explain_change(model, base, batches)
    parts = [explain_change(model, base, [batch]) for batch in batches]
    assert whole.n_targets == sum(part.n_targets for part in parts)
    for name in ("loss", "base_loss"):
        total = sum(part.n_targets * getattr(part, name) for part in parts)
        assert getattr(whole, name) == pytest.approx(total / whole.n_targets, rel=1e-12)
    for name in ("frozen_attention", "linear_mlp", "both"):
        total = sum(part.n_targets * part.of(name).kl_divergence for part in parts)
        assert whole.of(name).kl_divergence == pytest.approx(total / whole.n_targets, rel=1e-9)


def test_several_ranks_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_goldy.core.sharding import Replicas

    model = build("gpt2").double().eval()
    base = moved(model, 0.1)
    batches = [token_batch(2, 7, seed=seed) for seed in (1, 2, 3)]
    alone = explain_change(model, base, batches)
    kept: list[Any] = []

    def gather(self: Replicas, value: Any) -> list[Any]:
        if value is not None and not isinstance(value, str):
            kept.append(value)
            return list(kept)
        return [value]

    monkeypatch.setattr(Replicas, "gather_objects", gather)
    # There are no other processes to tell of failures.
    monkeypatch.setattr("lightning_goldy.core.sharding._exchange", lambda state, text, timeout=None: None)
    for rank in (0, 1):
        monkeypatch.setattr(Replicas, "of", classmethod(lambda cls, module, rank=rank: cls(rank, 2)))
        together = explain_change(model, base, batches)
    assert together.n_targets == alone.n_targets
    for mine, theirs in zip(together.records, alone.records, strict=True):
        assert dataclasses.astuple(mine)[1:] == pytest.approx(dataclasses.astuple(theirs)[1:], rel=1e-12)


def test_classifiers_and_losses_without_logits_are_served() -> None:
    model = build("bert").eval()
    base = BaseParameters(moved(model, 0.1))
    batch = class_batch(5, 8)
    objective = ClassifierObjective()
    classified = explain_change(model, base, [batch], objective)
    bare = explain_change(model, base, [batch], FunctionObjective(objective.loss))
    assert classified.n_targets == bare.n_targets == 5
    for mine, theirs in zip(classified.records, bare.records, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-6)
        assert mine.logit_share is not None
        assert (theirs.logit_share, theirs.relative_error, theirs.kl_divergence) == (None, None, None)
    assert "logit_share/both" not in bare.metrics()
    assert " - " in bare.table()


def test_no_change_is_a_defined_result() -> None:
    model = build("gpt2").eval()
    found = explain_change(model, ParameterVector.of(model), [token_batch(2, 6)], variants=ALL)
    assert (found.change, found.step_norm) == (0, 0)
    for each in found.records:
        assert (each.loss_share, each.logit_share, each.relative_error) == (None, None, 0)
        assert each.loss == pytest.approx(found.loss, rel=1e-6)
        assert each.kl_divergence == pytest.approx(0, abs=1e-10)
        assert each.top1_agreement == 1


def test_it_goes_to_json_rows_and_text() -> None:
    model = build("gpt2").eval()
    found = explain_change(model, moved(model, 0.1), [token_batch(2, 6)])
    assert ExplainedChange.from_json(found.to_json()) == found
    row = found.row().at(step=7).to_dict()
    assert (row["analysis"], row["step"], row["metrics"]["loss_share/both"]) == (
        "explain_change",
        7,
        found.of("both").loss_share,
    )
    lines = found.table().splitlines()
    assert len(lines) == 6
    assert lines[3].startswith("attention frozen ")
    assert f"{100 * found.of('frozen_attention').loss_share:.1f}" in lines[3]


def test_the_model_comes_back_as_it_was() -> None:
    model: Any = build("llama").train()
    base = moved(model, 0.02)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    explain_change(model, base, [token_batch(2, 6)], variants=ALL)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert float(model.lm_head.weight.grad.mean()) == 1


def test_the_cost_is_what_ran() -> None:
    model: Any = build("gpt2").eval()
    base, samples = moved(model, 0.02), []
    # The embedding is read once in every pass, also where parameters are put in the model's place.
    hook = model.transformer.wte.register_forward_hook(lambda module, inputs, output: samples.append(len(output)))
    found = explain_change(model, base, [token_batch(2, 6), token_batch(1, 6)])
    hook.remove()
    # The model and its base; frozen attention and linear MLPs after a pass of the base; both after two.
    assert found.row().cost == Cost(forwards=sum(samples)) == Cost(forwards=3 * (1 + 1 + 2 + 2 + 3))


def test_bad_input_is_refused() -> None:
    model = build("gpt2").eval()
    base = ParameterVector.of(model)
    batch = token_batch(2, 6)
    for variants, message in (
        (("bth",), r"unknown variant 'bth'; did you mean 'both'"),
        ((), r"each of some variants once; got \[\]"),
        (("both", "both"), r"once; got \['both', 'both'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            explain_change(model, base, [batch], variants=variants)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no batch"):
        explain_change(model, base, [])
    with pytest.raises(ValueError, match=r"there is no variant 'tangent'; .*both"):
        explain_change(model, base, [batch]).of("tangent")
    with pytest.raises(ValueError, match="has no parameter"):
        explain_change(model, ParameterVector.of(build("llama")), [batch])
    bloom = architecture_models.build("bloom")
    with pytest.raises(UnsupportedArchitectureError, match="Bloom"):
        explain_change(bloom, ParameterVector.of(bloom), [batch], CausalLMObjective())
    with torch.no_grad():
        model.transformer.wte.weight[3] = math.nan
    with pytest.raises(ValueError, match="the present loss is nan: there is no change to explain"):
        explain_change(model, base, [batch], variants=("frozen_attention",))
