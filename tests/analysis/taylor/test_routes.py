"""Expansions of models that torch has no forward mode for, and of those that look so."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_goldy.analysis import TaylorApproximation, taylor_diff
from lightning_goldy.analysis.linearized import FrozenAttention, LinearizedMLP, TangentModel
from lightning_goldy.analysis.taylor import expansion_route
from lightning_goldy.analysis.taylor.taylor import Expansion
from lightning_goldy.core import CausalLMObjective, ClassifierObjective, ParameterVector
from lightning_goldy.core.autodiff import ForwardModeError
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.sharding import Replicas
from tests.references.architecture_models import lora
from tests.references.models import build, token_batch

SIZES = {
    "vocab_size": 53,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
EXPERTS = {**SIZES, "intermediate_size": 16, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
BLOOM = {"vocab_size": 53, "hidden_size": 16, "n_layer": 2, "n_head": 2}
GEMMA = {**SIZES, "num_hidden_layers": 3, "intermediate_size": 24, "lru_width": 16, "num_key_value_heads": 1}
RWKV = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "context_length": 32}
WITHOUT = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**EXPERTS, num_experts=4, head_dim=8)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=8)),
    "phimoe": lambda: hf.PhimoeForCausalLM(hf.PhimoeConfig(**EXPERTS, num_local_experts=4)),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(**BLOOM)),
    "recurrent_gemma": lambda: hf.RecurrentGemmaForCausalLM(hf.RecurrentGemmaConfig(**GEMMA)),
    "rwkv": lambda: hf.RwkvForCausalLM(hf.RwkvConfig(**RWKV)),
}


def moved(model: nn.Module, size: float) -> ParameterVector:
    base = ParameterVector.of(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.space.resolve(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return base


@pytest.mark.parametrize("family", WITHOUT)
def test_families_that_torch_has_no_forward_mode_for_are_expanded_exactly(family: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = WITHOUT[family]().eval()
    moved(model, 0.03)  # away from the start, where some of them are flat
    base = moved(model, 1e-3)
    batch = token_batch(2, 6)
    found = taylor_diff(model, base, [batch], by="tensor")
    assert (found.route, found.error) == ("forward", 0.0)
    assert math.fsum(found.loss_shares.values()) == pytest.approx(found.first_order, rel=2e-3, abs=1e-6)
    work = Expansion(model, base, [batch], CausalLMObjective(), (1, 2), False, True, Replicas(), "differences")
    with preserved(model):
        differences = work.whole()
    assert found.first_order == pytest.approx(differences.mean("derivative", 1), rel=5e-3, abs=2e-6)
    error = differences.mean("difference") / 6
    assert found.second_order == pytest.approx(differences.mean("derivative", 2) / 2, abs=2 * error + 1e-6)


class Distances(nn.Module):
    """Classifies by distances, which torch has no forward mode for."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(3, 4)
        self.centres = nn.Parameter(torch.randn(5, 4, generator=generator))
        self.layer.weight.data = torch.randn(4, 3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(self.layer(x).sin(), self.centres)


class ComposedDistances(Distances):
    def forward(self, x: Tensor) -> Tensor:
        return -(self.layer(x).sin()[:, None] - self.centres).square().sum(-1).sqrt()


BATCH = (torch.linspace(-1, 1, 18).view(6, 3), torch.arange(6) % 5)


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_without_forward_mode_differences_give_the_same_expansion_and_their_error(precision: torch.dtype) -> None:
    model, exact = Distances().to(precision), ComposedDistances().to(precision)
    base = moved(model, 0.05)
    exact.load_state_dict(model.state_dict())
    batch = (BATCH[0].to(precision), BATCH[1])
    orders = (1, 2, 3)
    found = taylor_diff(model, base, [batch], ClassifierObjective(), orders=orders, by="tensor")
    right = taylor_diff(exact, base, [batch], ClassifierObjective(), orders=orders, by="tensor")
    assert (found.route, right.route, right.error) == ("differences", "forward", 0.0)
    assert found.first_order == pytest.approx(right.first_order, rel=1e-4)
    assert 0 < abs(found.second_order - right.second_order) < found.error < 0.5 * abs(right.second_order)
    assert found.nonlinearity == pytest.approx(right.nonlinearity, rel=1e-3)
    assert found.regime == right.regime
    assert found.loss_shares == pytest.approx(right.loss_shares, rel=1e-4)
    assert found.function_shares == pytest.approx(right.function_shares, rel=1e-3)
    assert found.orders[2].loss == pytest.approx(right.orders[2].loss, rel=1e-3)


def test_the_route_is_found_by_one_sample_and_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Distances())
    route, why = expansion_route(model, BATCH, ClassifierObjective())
    assert route == "differences"
    assert why.startswith("Sequential has no forward-mode derivative in '1' (Distances): torch has none of _")
    assert expansion_route(ComposedDistances(), BATCH, ClassifierObjective()) == ("forward", "")
    for variant in (TangentModel(model, model), TaylorApproximation(model, model, order=1)):
        with pytest.raises(ForwardModeError, match=r"in '1' \(Distances\)"):
            variant(BATCH[0])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_and_gradients_of_inputs_change_nothing(family: str, reentrant: bool) -> None:
    model, plain = build(family).double(), build(family).double()
    bases = [moved(each, 0.02) for each in (model, plain)]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    hooks = dict(model.get_input_embeddings()._forward_hooks)
    batch = token_batch(2, 6)
    found, right = (taylor_diff(each, base, [batch]) for each, base in zip((model, plain), bases, strict=True))
    assert found == right
    assert dict(model.get_input_embeddings()._forward_hooks) == hooks
    assert model.is_gradient_checkpointing


@pytest.mark.parametrize("make", [TangentModel, FrozenAttention, LinearizedMLP])
def test_variants_train_under_gradient_checkpointing_as_without(make) -> None:
    gradients = []
    for checkpointed in (True, False):
        model = build("llama").double()
        base = moved(model, 0.02)
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model.train()
        inputs = {key: value for key, value in token_batch(2, 6).items() if key != "labels"}
        make(model, base)(**inputs).logits.sin().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(gradient is not None for gradient in gradients[1].values())
    for name, gradient in gradients[1].items():
        assert (gradient is None) == (gradients[0][name] is None)
        assert gradient is None or torch.allclose(gradients[0][name], gradient, rtol=1e-12, atol=1e-14)


def test_the_usual_lora_set_up_is_expanded() -> None:
    model = lora("llama", ["q_proj", "down_proj"]).eval()
    model.enable_input_require_grads()
    base = moved(model, 0.05)
    found = taylor_diff(model, base, [token_batch(2, 6)])
    assert found.route == "forward"
    assert math.fsum(found.loss_shares.values()) == pytest.approx(found.first_order, rel=1e-3)


def test_sparse_gradients_of_embeddings_are_those_of_dense_ones() -> None:
    class Counted(nn.Module):
        def __init__(self, *, sparse: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(5, 4, sparse=sparse)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embedding(tokens)).mean(dim=1))

    batch = (torch.tensor([[0, 1, 1], [2, 3, 1]]), torch.tensor([0, 2]))
    found = []
    for sparse in (True, False):
        model = Counted(sparse=sparse)
        base = ParameterVector.of(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1)
        found.append(taylor_diff(model, base, [batch], ClassifierObjective(), by="tensor"))
        assert model.embedding.sparse is sparse
    assert found[0] == found[1]
