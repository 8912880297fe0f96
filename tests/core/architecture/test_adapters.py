"""Tests of adapters of PEFT: several of them, switched off, and methods that learn tokens or keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_goldy.analysis import attention_maps, attention_statistics, head_importance
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.objective import objective_for
from lightning_goldy.core.tasks import virtual_tokens
from tests.core.architecture.test_architecture_slices import check_output_slices, check_value_slices
from tests.references.model_zoo import batch_for, build_family

peft = pytest.importorskip("peft")
VIRTUAL = {
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def adapted(config: Any) -> Any:
    torch.manual_seed(2)
    return peft.get_peft_model(build_family("Llama"), config).eval()


@contextmanager
def used(model: Any, adapters: list[str]) -> Iterator[None]:
    if not adapters:
        with model.disable_adapter():
            yield
        return
    model.base_model.set_adapter(adapters)
    yield


@pytest.mark.parametrize("adapters", [["first"], ["second"], ["first", "second"], []], ids="-".join)
def test_heads_are_those_of_the_adapters_in_use(adapters: list[str]) -> None:
    def config() -> Any:
        return peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj"], init_lora_weights=False)

    torch.manual_seed(2)
    model = peft.get_peft_model(build_family("Llama"), config(), adapter_name="first")
    model.add_adapter("second", config())
    with used(model.eval(), adapters):
        architecture = describe_architecture(model)
        # The slices hold every adapter's factors, so that a head stays cut when another one is switched on.
        names = [part.name.rpartition("o_proj.")[2] for part in architecture.blocks[0].output_slice(1)]
        assert names == ["base_layer.weight", "lora_A.first.weight", "lora_A.second.weight"]
        check_output_slices(model, architecture)
        check_value_slices(model, architecture)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_patterns_beside_learned_tokens_are_refused_and_those_without_them_are_read(kind: str) -> None:
    model = adapted(VIRTUAL[kind]())
    batch = batch_for(model.get_base_model())
    for read in (lambda: attention_statistics(model, [batch]), lambda: attention_maps(model, batch)):
        with pytest.raises(UnsupportedArchitectureError, match=rf"PEFT's {kind} puts 3 .*disable_adapter"):
            read()
    expected = attention_maps(build_family("Llama"), batch)
    with model.disable_adapter():
        found = attention_maps(model, batch)
    torch.testing.assert_close(found.patterns, expected.patterns)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_heads_beside_learned_tokens_are_gated_and_scored(kind: str) -> None:
    model = adapted(VIRTUAL[kind]())
    batch = batch_for(model.get_base_model())
    check_output_slices(model, describe_architecture(model))
    entropy = head_importance(model, [batch], strategy="entropy").measured["entropy"]
    weights: list[Tensor] = []
    module = model.get_base_model()
    module.set_attn_implementation("eager")
    module.config.output_attentions = True
    hook = module.model.layers[1].self_attn.register_forward_hook(lambda _, __, output: weights.append(output[1]))
    objective_for(model).loss(model, batch)
    hook.remove()
    pattern = weights[0][:, :, -7:].double()  # of the batch's own queries; keys are theirs and the learned ones
    n_keys = torch.arange(4, 11).double()
    share = torch.special.entr(pattern).sum(-1) / n_keys.log()
    torch.testing.assert_close(entropy[1], share.mean(dim=(0, 2)), rtol=1e-4, atol=1e-5)
    for strategy in ("magnitude", "ablation"):
        assert torch.isfinite(head_importance(model, [batch], strategy=strategy).scores).all()
    gates = HeadGates(model)
    gates.remove()


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_learned_tokens_that_are_switched_off_shift_nothing(kind: str) -> None:
    model = adapted(VIRTUAL[kind]())
    batch = batch_for(model.get_base_model())
    assert virtual_tokens(model) == 3
    with model.disable_adapter(), torch.no_grad():
        assert virtual_tokens(model) == 0
        torch.testing.assert_close(objective_for(model).loss(model, batch), build_family("Llama")(**batch).loss)


def test_an_adaption_prompt_is_refused_by_name_and_read_without() -> None:
    model = adapted(peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1))
    with pytest.raises(UnsupportedArchitectureError, match=r"adaption prompt adds .*layers\.1\.self_attn.*disable_ad"):
        describe_architecture(model)
    with model.disable_adapter():
        check_output_slices(model, describe_architecture(model))
