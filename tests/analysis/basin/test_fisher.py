from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import kronecker_fisher
from lightning_goldy.analysis.basin import KroneckerPreconditioner
from lightning_goldy.analysis.basin import kronecker as fisher_module
from lightning_goldy.analysis.gradients import exact_products, sampled_labels
from lightning_goldy.core import CausalLMObjective, ClassifierObjective, FunctionObjective
from tests.references.kronecker import Mlp, least_likely, split_tensors
from tests.references.models import build, token_batch
from tests.references.preconditioner import dense_map


def test_labels_are_drawn_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0, -1.0])
    n = 40_000
    labels = sampled_labels(logits.expand(n, 5), seed=3)
    counts = torch.bincount(labels, minlength=5)
    expected = logits.double().softmax(dim=0) * n
    assert counts[2] == 0
    kept = expected > 0
    # Chi squared with 3 degrees of freedom exceeds 16.3 once in a thousand.
    assert float(((counts - expected)[kept] ** 2 / expected[kept]).sum()) < 16.3
    assert torch.equal(labels, sampled_labels(logits.expand(n, 5), seed=3))
    assert not torch.equal(labels, sampled_labels(logits.expand(n, 5), seed=4))


def test_labels_do_not_depend_on_how_the_rows_are_cut(monkeypatch):
    logits = torch.randn(50, 11)
    whole = sampled_labels(logits, seed=1)
    monkeypatch.setattr("lightning_goldy.analysis.gradients._CHUNK", 33)
    assert torch.equal(sampled_labels(logits, seed=1), whole)
    assert whole.shape == (50,)


def test_the_scores_of_drawn_labels_add_up_over_a_batch():
    # Independent and 0 on average: batches of 1 and of 16 estimate the same mean squares.
    model, x = Mlp(), torch.randn(16, 4)
    labels = torch.zeros(16, dtype=torch.long)
    single = kronecker_fisher(model, list(split_tensors((x, labels), 1)), ClassifierObjective(), n_draws=75)
    joint = kronecker_fisher(model, [(x, labels)], ClassifierObjective(), n_draws=1200, seed=1)
    for name, value in single.scalars.items():
        # 1,200 gradients each of few degrees of freedom: 4 to 8 %.
        assert joint.scalars[name] == pytest.approx(value, rel=0.15), name
    assert joint.mean == pytest.approx(single.mean, rel=0.15)


def test_a_wide_side_gets_a_diagonal_factor(monkeypatch):
    monkeypatch.setattr(fisher_module, "sampled_labels", least_likely)
    model, batch = Mlp(), (torch.randn(12, 4), torch.zeros(12, dtype=torch.long))
    exact, narrow = (
        kronecker_fisher(model, [batch], ClassifierObjective(), max_dimension=largest) for largest in (5, 4)
    )
    for name, sides in {"first.weight": ("outputs",), "last.weight": ("inputs",)}.items():
        for side in ("inputs", "outputs"):
            full, cut = getattr(exact.layers[name], side), getattr(narrow.layers[name], side)
            matrix = full.vectors @ torch.diag(full.values) @ full.vectors.T
            assert (cut.vectors is None) is (side in sides)
            if side in sides:
                assert torch.allclose(cut.values, matrix.diagonal(), rtol=1e-4, atol=1e-6)
            else:
                assert torch.allclose(cut.values, full.values, rtol=1e-4, atol=1e-6)
    preconditioner = KroneckerPreconditioner(narrow, eps=0.01)
    dense = dense_map(preconditioner)
    assert abs(float(torch.linalg.slogdet(dense).logabsdet)) < 1e-4
    block = dense[:20, :20]  # first.weight, 5 x 4: diagonal in its 5 outputs
    assert float(block[:4, 4:].abs().max()) == 0
    assert float(block[:4, :4].abs().min()) > 0


def test_the_language_model_default_is_next_token_prediction():
    model, batch = build("llama"), token_batch(3)
    plain, named = (kronecker_fisher(model, [batch], objective) for objective in (None, CausalLMObjective()))
    assert plain.scalars == named.scalars
    assert plain.n_targets == int((batch["labels"][:, 1:] != -100).sum())


def test_factors_under_autocast_are_summed_in_full_precision():
    model, batch = Mlp(), (torch.randn(20, 4), torch.zeros(20, dtype=torch.long))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fisher = kronecker_fisher(model, [batch], ClassifierObjective())
    inputs = fisher.layers["first.weight"].inputs
    exact = batch[0].T @ batch[0] / 20
    assert torch.allclose(inputs.vectors @ torch.diag(inputs.values) @ inputs.vectors.T, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("legacy", [True, False])
def test_products_are_exact_whatever_precision_was_asked_for(legacy):
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        if legacy:
            torch.set_float32_matmul_precision("medium")
        else:
            backends[0].fp32_precision = "tf32"
        asked = [backend.fp32_precision for backend in backends]
        assert "tf32" in asked
        with exact_products(torch.device("cpu")):
            assert {backend.fp32_precision for backend in backends} <= {"ieee", "none"}
            assert not torch.is_grad_enabled()
        assert [backend.fp32_precision for backend in backends] == asked
        # Setting the precision of one backend must not make the legacy question fail afterwards.
        assert not legacy or torch.get_float32_matmul_precision() == "medium"
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
        if legacy:
            torch.set_float32_matmul_precision("highest")


def test_only_the_first_batches_are_read_and_progress_is_told():
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    told = []

    def endless():
        while True:
            yield batch

    fisher = kronecker_fisher(
        Mlp(), endless(), ClassifierObjective(), n_batches=2, n_draws=2, progress=lambda *counts: told.append(counts)
    )
    assert fisher.n_targets == 20
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_what_cannot_be_measured_is_refused():
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match="the batches are empty"):
        kronecker_fisher(Mlp(), [], ClassifierObjective())
    with pytest.raises(TypeError, match="has a loss but no logits"):
        kronecker_fisher(Mlp(), [batch], FunctionObjective(lambda model, batch: model(batch[0]).sum()))
    model = Mlp()
    with torch.no_grad():
        model.last.bias[0] = math.nan
    with pytest.raises(ValueError, match=r"the weights of last\.bias are not finite"):
        kronecker_fisher(model, [batch], ClassifierObjective())
    infinite = (torch.full((5, 4), math.inf), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"the gradient of first\.weight is not finite"):
        kronecker_fisher(Mlp(), [infinite], ClassifierObjective())


def test_a_layer_that_is_not_whole_is_named_and_the_model_comes_back():
    class Half(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, : self.out_features // 2]

    model = nn.Sequential(nn.Linear(4, 4), Half(4, 6))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(
        ValueError, match=r"layer of 1\.weight sees .* \(5, 4\) and \(5, 3\) where its weight is 4 to 6"
    ):
        kronecker_fisher(model, [batch], ClassifierObjective())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(float(parameter.grad.min()) == 1 for parameter in model.parameters())
    assert model.training
