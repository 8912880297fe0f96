"""Activation similarity against one forward pass per question."""

from __future__ import annotations

import pytest
import torch

from lightning_goldy.analysis import CouplingError, activation_similarity
from lightning_goldy.core import ClassifierObjective
from tests.references.coupling import log_prob, rows_of
from tests.references.coupling_models import TinyLM, pieces
from tests.references.models import CAUSAL, build, class_batch

LENGTHS = [7, 12, 5, 9, 12]


def reference(model, rows, names, pooling, center):
    """Mean over layers of cosines between pooled outputs, one piece at a time."""
    model.eval()
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    pooled = {name: [] for name in names}
    for ids, labels in rows:
        first = next(t for t in range(1, len(ids)) if labels[t] != -100)
        for name, module in modules.items():
            caught = []
            handle = module.register_forward_hook(lambda _, __, output, caught=caught: caught.append(output))
            with torch.no_grad():
                model(input_ids=ids[None])
            handle.remove()
            tokens = caught[0].reshape(len(ids), -1).double()
            pooled[name].append(tokens[first - 1] if pooling == "last" else tokens[:first].mean(dim=0))
    cosines, squares = 0, 0
    for vectors in map(torch.stack, pooled.values()):
        if center:
            vectors = vectors - vectors.mean(dim=0)
        norms = vectors.norm(dim=1)
        cosines = cosines + vectors @ vectors.T / norms[:, None] / norms
        squares = squares + norms.square()
    return cosines / len(names), squares.sqrt()


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_equals_one_pass_per_question(family, pooling, center):
    model = build(family)
    batches = [pieces(LENGTHS[:3], side="left"), pieces(LENGTHS[3:], side="right", width=15, seed=2)]
    rows = [row for batch in batches for row in rows_of(batch)]
    result = activation_similarity(model, batches, pooling=pooling, center=center)
    expected, norms = reference(model, rows, result.parameters, pooling, center)
    torch.testing.assert_close(result.matrix.double(), expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(result.norms, norms, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.matrix, result.matrix.T)
    expected_log_probs = [float(log_prob(model, *row).detach()) for row in rows]
    assert result.log_probs.tolist() == pytest.approx(expected_log_probs, rel=1e-5)
    assert (result.measure, result.center, result.normalize) == ("activation", center, True)


def test_answers_do_not_count_and_the_model_comes_back():
    model, batch = build("gpt2"), pieces(LENGTHS)
    state = torch.get_rng_state()
    before = activation_similarity(model, [batch], layers="last:1")
    answers = batch["labels"] != -100
    batch["input_ids"][answers] = 5
    batch["labels"][answers] = 5
    after = activation_similarity(model, [batch], layers="last:1")
    torch.testing.assert_close(before.matrix, after.matrix)
    assert not torch.allclose(before.log_probs, after.log_probs)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_float64_model_gives_float64():
    model, batch = build("llama").double(), pieces(LENGTHS)
    result = activation_similarity(model, [batch])
    expected, _ = reference(model, rows_of(batch), result.parameters, "last", False)
    torch.testing.assert_close(result.matrix, expected, rtol=1e-10, atol=1e-12)


def test_a_failing_piece_is_an_error_or_a_row_of_nan():
    model, batch = build("gpt2"), pieces([7, 6, 6, 5, 6])
    others = [0, 1, 3, 4]
    expected = activation_similarity(model, [{name: tensor[others] for name, tensor in batch.items()}])
    for entry, value, reason in (("labels", -100, "no target"), ("input_ids", 999, "out of range")):
        broken = {name: tensor.clone() for name, tensor in batch.items()}
        broken[entry][2] = value
        with pytest.raises(CouplingError, match=f"piece 2, id '2': .*{reason}"):
            activation_similarity(model, [broken])
        found = activation_similarity(model, [broken], on_error="nan")
        torch.testing.assert_close(found.matrix[others][:, others], expected.matrix)
        assert found.matrix[2].isnan().all()
        assert found.norms.isnan().tolist() == [False, False, True, False, False]
        assert [each["index"] for each in found.failed] == [2]


def test_flat_layers_serve_and_others_are_refused():
    torch.manual_seed(0)
    batch = pieces([5, 5, 7, 5, 4])
    flat = TinyLM("flat")
    result = activation_similarity(flat, [batch], select=["layer.weight", "first.weight"])
    expected, _ = reference(flat, rows_of(batch), result.parameters, "last", False)
    torch.testing.assert_close(result.matrix.double(), expected, rtol=1e-5, atol=1e-6)
    for odd, message in (
        ("sequence first", "not one row of activations per token"),
        ("idle", "is not called"),
        ("twice", "is called more than once"),
    ):
        with pytest.raises(CouplingError, match=message):
            activation_similarity(TinyLM(odd), [batch], select=["layer.weight"])
    for select in (["embedding*"], ["norm.weight"], ["layer.bias"]):
        with pytest.raises(CouplingError, match="is not the weight of one linear layer"):
            activation_similarity(TinyLM(), [batch], select=select)
    with pytest.raises(CouplingError, match="not a sequence of tokens with labels"):
        activation_similarity(build("bert"), [class_batch()], objective=ClassifierObjective())
    with pytest.raises(ValueError, match="unknown pooling 'first'"):
        activation_similarity(flat, [batch], pooling="first")
    twice = {name: tensor[:1].repeat(2, 1) for name, tensor in batch.items()}
    with pytest.raises(CouplingError, match="leaves nothing"):
        activation_similarity(flat, [twice], select=["layer.weight"], center=True)
