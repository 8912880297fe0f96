from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import basin_volume, diagonal_preconditioner, kronecker_fisher, kronecker_preconditioner
from lightning_goldy.analysis.basin import KroneckerPreconditioner
from lightning_goldy.analysis.basin import kronecker as fisher_module
from lightning_goldy.core import (
    ClassifierObjective,
    ParameterSpace,
    ParameterVector,
)
from lightning_goldy.core.objective import split_batch
from tests.references.kronecker import Mlp, dense_blocks, least_likely, second_moments, split_tensors
from tests.references.models import FAMILIES, build, class_batch, token_batch
from tests.references.preconditioner import dense_map


def tiny_gpt2():
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=4, vocab_size=7, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return GPT2LMHeadModel(config)


def class_loss(batch):
    def loss(model):
        logits = model(batch[0])
        return F.cross_entropy(logits, logits.argmin(dim=-1), reduction="sum")

    return loss


def token_loss(sample):
    """Of one sample without its padding."""
    real = sample["attention_mask"][0].bool()
    ids, labels = sample["input_ids"][:, real], sample["labels"][:, real]

    def loss(model):
        logits = model(input_ids=ids).logits[0, :-1][labels[0, 1:] != -100]
        return F.cross_entropy(logits, logits.argmin(dim=-1), reduction="sum")

    return loss


def matched(factors, squares, n_targets):
    """Per target, and scaled so that the trace of each product is the weight's squared gradient."""
    result = {}
    for name, (a, g) in factors.items():
        result[name] = (a, g * (squares[name] / n_targets) / float(a.trace() * g.trace()))
    return result


def mean_diagonal(factors, means, shapes):
    traces = [float(a.trace() * g.trace()) for a, g in factors.values()]
    rest = [means[name] * math.prod(shape) for name, shape in shapes.items() if name not in factors]
    return math.fsum(traces + rest) / sum(math.prod(shape) for shape in shapes.values())


def reference(model, layers, losses, n_targets, eps, inputs_first=False):
    factors, squares = second_moments(model, layers, losses)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    factors = matched(factors, squares, n_targets)
    means = {name: square / n_targets / math.prod(shapes[name]) for name, square in squares.items()}
    damping = eps * mean_diagonal(factors, means, shapes)
    return dense_blocks(factors, means, shapes, damping, inputs_first), factors, means


# Against dense matrices


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 1.0])
def test_a_classifier_gets_the_dense_inverse_root_of_determinant_one(monkeypatch, eps):
    monkeypatch.setattr(fisher_module, "sampled_labels", least_likely)
    model, batch = Mlp(), (torch.randn(40, 4), torch.zeros(40, dtype=torch.long))
    preconditioner = kronecker_preconditioner(model, list(split_tensors(batch, 8)), ClassifierObjective(), eps=eps)
    layers = {"first.weight": model.first, "last.weight": model.last}
    losses = [class_loss(part) for part in split_tensors(batch, 1)]
    # A batch's gradients of fixed labels are not independent, so the squares must be those of the same batches.
    squares = batch_squares(model, [class_loss(part) for part in split_tensors(batch, 8)])
    factors, _ = second_moments(model, layers, losses)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    factors = matched(factors, squares, 40)
    means = {name: square / 40 / math.prod(shapes[name]) for name, square in squares.items()}
    expected = dense_blocks(factors, means, shapes, eps * mean_diagonal(factors, means, shapes))
    dense = dense_map(preconditioner)
    assert torch.allclose(dense, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert abs(float(torch.linalg.slogdet(dense).logabsdet)) < 1e-4
    assert preconditioner.factored == ("first.weight", "last.weight")
    assert (preconditioner.name, preconditioner.whole_tensors) == ("kronecker", True)


def batch_squares(model, losses):
    """Sum over batches of each parameter's squared gradient."""
    totals = dict.fromkeys(dict(model.named_parameters()), 0.0)
    for loss in losses:
        gradients = torch.autograd.grad(loss(model), list(model.parameters()))
        for name, gradient in zip(totals, gradients, strict=True):
            totals[name] += float(gradient.double().square().sum())
    return totals


def test_a_language_model_with_padding_and_masked_queries_gets_the_dense_inverse_root(monkeypatch):
    monkeypatch.setattr(fisher_module, "sampled_labels", least_likely)
    torch.manual_seed(4)
    model = tiny_gpt2().eval()
    batch = token_batch(5, 8, query=3, padding=2)
    batch = {**batch, "input_ids": batch["input_ids"] % 7, "labels": torch.where(batch["labels"] < 0, -100, 1)}
    block = model.transformer.h[0]
    layers = {
        "transformer.h.0.attn.c_attn.weight": block.attn.c_attn,
        "transformer.h.0.attn.c_proj.weight": block.attn.c_proj,
        "transformer.h.0.mlp.c_fc.weight": block.mlp.c_fc,
        "transformer.h.0.mlp.c_proj.weight": block.mlp.c_proj,
    }
    preconditioner = kronecker_preconditioner(model, [batch], eps=0.01)
    n_targets = int((batch["labels"][:, 1:] != -100).sum())
    losses = [token_loss(sample) for sample in split_batch(batch)]
    expected, _, _ = reference(model, layers, losses, n_targets, 0.01, inputs_first=True)
    dense = dense_map(preconditioner)
    assert torch.allclose(dense, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert abs(float(torch.linalg.slogdet(dense).logabsdet)) < 1e-3
    # The tied embedding, which is the head too, has a scale only.
    assert preconditioner.factored == tuple(layers)


def test_where_the_fisher_information_is_a_product_the_map_is_its_inverse_root():
    torch.manual_seed(5)
    model = nn.Linear(3, 4, bias=False)
    with torch.no_grad():
        model.weight.zero_()  # every sample has the same, uniform prediction
    x = torch.randn(16, 3) @ torch.tensor([[2.0, 0.0, 0.0], [1.5, 0.5, 0.0], [0.3, 0.1, 0.1]])
    batch = (x, torch.zeros(16, dtype=torch.long))
    fisher = kronecker_fisher(model, [batch], ClassifierObjective(), n_draws=1500)
    assert fisher.n_targets == 16 * 1500
    scores = torch.diag(torch.full((4,), 0.25)) - torch.full((4, 4), 1 / 16)  # diag(p) - p p^T
    inputs = x.T @ x / 16
    exact = torch.kron(scores, inputs).double()
    layer = fisher.layers["weight"]
    found = torch.kron(*(f.vectors @ torch.diag(f.values) @ f.vectors.T for f in (layer.outputs, layer.inputs)))
    # 24,000 labels: 0.6 % and, for the scale of the trace, 1,500 draws: 3 %.
    assert float((found - exact).norm() / exact.norm()) < 0.04
    assert fisher.mean == pytest.approx(float(exact.trace()) / 12, rel=0.04)
    damping = 0.01 * fisher.mean
    expected = dense_blocks({"weight": (inputs, scores)}, {}, {"weight": model.weight.shape}, damping)
    dense = dense_map(KroneckerPreconditioner(fisher, eps=0.01))
    assert float((dense - expected).norm() / expected.norm()) < 0.02


# In use


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_factored_and_comes_back_as_it_was(family):
    model = build(family)
    batch, objective = (class_batch(), ClassifierObjective()) if family == "bert" else (token_batch(), None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first = next(model.parameters()).requires_grad_(False)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(9)
    state = torch.get_rng_state()
    preconditioner = kronecker_preconditioner(model, [batch], objective)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
        assert parameter.requires_grad is (parameter is not first)
    space = ParameterSpace.of(model)
    assert preconditioner.space == space
    matrices = {name for name in space if len(space.shape(name)) == 2}
    # Embeddings, and the heads that are tied to them, are not linear layers.
    assert set(preconditioner.factored) == {name for name in matrices if "embed" not in name and "wpe" not in name}
    total = 0.0
    for name in space:
        direction = torch.randn(space.shape(name))
        mapped = preconditioner.apply(name, direction.clone(), 0)
        assert mapped.shape == direction.shape
        assert mapped.dtype == torch.float32
        if name in preconditioner.factored:
            left, right = preconditioner._roots[name]
            rows, columns = space.shape(name)
            total += columns * float(torch.linalg.slogdet(left.double()).logabsdet)
            total += rows * float(torch.linalg.slogdet(right.double()).logabsdet)
        else:
            total += direction.numel() * float((mapped / direction).double().log().mean())
    assert abs(total) < 1e-4 * space.numel


def test_a_narrow_valley_is_found_where_a_diagonal_cannot_see_it():
    torch.manual_seed(2)
    model = nn.Linear(6, 5, bias=False)
    mixing = torch.randn(6, 6)
    x = (torch.randn(64, 6) * torch.tensor([10.0, 3.0, 1.0, 0.3, 0.1, 0.03])) @ torch.linalg.qr(mixing).Q
    with torch.no_grad():
        model.weight.mul_(0.01)
    batch, objective = (x, torch.zeros(64, dtype=torch.long)), ClassifierObjective()
    fisher = kronecker_fisher(model, [batch], objective, n_draws=200)
    space = ParameterSpace.of(model)
    second = torch.kron(*(f.vectors @ torch.diag(f.values) @ f.vectors.T for f in fisher.layers["weight"][1::-1]))
    diagonal = ParameterVector(space, {"weight": second.diagonal().view(5, 6)})
    options = {"cutoff": 1e-4, "n_directions": 16, "sigma": 1.0}
    none, scaled, factored = (
        basin_volume(model, [batch], objective, preconditioner=P, **options)
        for P in (None, diagonal_preconditioner(diagonal, eps=0), KroneckerPreconditioner(fisher, eps=1e-4))
    )
    assert factored.lower_bound > scaled.lower_bound + 30
    assert factored.lower_bound > none.lower_bound + 30
    assert factored.spread < min(none.spread, scaled.spread)


def test_low_precision_and_autocast_do_not_coarsen_the_map():
    model, batch = Mlp().bfloat16(), (torch.randn(20, 4).bfloat16(), torch.zeros(20, dtype=torch.long))
    preconditioner = kronecker_preconditioner(model, [batch], ClassifierObjective())
    direction = torch.randn(5, 4)
    plain = preconditioner.apply("first.weight", direction.clone(), 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = preconditioner.apply("first.weight", direction.clone(), 0)
    assert plain.dtype == torch.float32
    assert torch.equal(within, plain)
    assert abs(float(torch.linalg.slogdet(dense_map(preconditioner)).logabsdet)) < 1e-4


def test_a_part_of_the_parameters_and_layers_that_are_called_otherwise():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 4)
            self.functional = nn.Linear(4, 3)
            self.idle = nn.Linear(2, 2)

        def forward(self, x):
            return F.linear(self.used(input=x), self.functional.weight)

    model, batch = Odd(), (torch.randn(10, 4), torch.zeros(10, dtype=torch.long))
    fisher = kronecker_fisher(model, [batch], ClassifierObjective())
    assert list(fisher.layers) == ["used.weight"]
    assert fisher.scalars["idle.weight"] == 0
    assert fisher.scalars["functional.weight"] > 0
    space = ParameterSpace.of(model, include=["used.*", "functional.weight"])
    part = kronecker_preconditioner(model, [batch], ClassifierObjective(), space=space)
    assert part.factored == ("used.weight",)
    assert abs(float(torch.linalg.slogdet(dense_map(part)).logabsdet)) < 1e-4
    with pytest.raises(ValueError, match=r"no parameter 'idle\.weight'"):
        part.apply("idle.weight", torch.ones(2, 2), 0)


def test_more_damping_brings_the_map_closer_to_the_identity_and_units_do_not_matter():
    model, batch = Mlp(), (torch.randn(20, 4), torch.zeros(20, dtype=torch.long))
    fisher = kronecker_fisher(model, [batch], ClassifierObjective())
    size = fisher.space.numel
    distances = [
        float((dense_map(KroneckerPreconditioner(fisher, eps=eps)) - torch.eye(size)).norm())
        for eps in (1e-4, 1e-2, 1.0, 1e6)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-2
    relative = KroneckerPreconditioner(fisher, eps=0.1)
    absolute = KroneckerPreconditioner(fisher, eps=0.1 * fisher.mean, eps_unit="absolute")
    assert torch.allclose(dense_map(relative), dense_map(absolute), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "eps must be finite and at least 0; got -1.0"),
        ({"eps": 0.0}, "the damping must be above 0"),
        ({"eps_unit": "trace"}, "unknown eps_unit 'trace'"),
        ({"n_draws": 0}, "n_draws must be at least 1; got 0"),
        ({"max_dimension": 0}, "max_dimension must be at least 1; got 0"),
        ({"n_batches": 3}, "n_batches=3, but there are only 1 batches"),
    ],
)
def test_arguments_out_of_range(options, message):
    batch = (torch.randn(5, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(ValueError, match=message):
        kronecker_preconditioner(Mlp(), [batch], ClassifierObjective(), **options)
