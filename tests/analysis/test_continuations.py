from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import Continuations, continue_prompts
from lightning_goldy.core import ParameterVector
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.space import SpaceError
from lightning_goldy.data.tokenization import byte_tokenizer
from tests.references.models import build

PROMPTS = ["The cat", "1 + 1 ="]


def scaled(seed):
    """A random model whose predictions are far from uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            n_layer=2, n_head=2, n_embd=16, vocab_size=258, n_positions=32, bos_token_id=256, eos_token_id=256
        )
        model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


@pytest.fixture
def model():
    return scaled(0)


@pytest.fixture
def before():
    return scaled(1)


def argmax_continuation(model, ids, length):
    """The most probable token, one whole pass after the other; ends after the eos token."""
    model.eval()
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + length and (len(ids) == start or ids[-1] != 256):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[start:]


def mean_divergence(model, base, ids, answer):
    """KL(model || base) at each of the answer's positions, token by token in float64."""
    total = 0.0
    with torch.no_grad():
        for place in range(len(answer)):
            seen = torch.tensor([[*ids, *answer[:place]]])
            p, q = (each(input_ids=seen).logits[0, -1].double().log_softmax(-1) for each in (model, base))
            total += float((p.exp() * (p - q)).sum())
    return total / len(answer)


def test_greedy_continuations_are_the_most_probable_tokens_of_both(model, before):
    tokenizer = byte_tokenizer()
    found = continue_prompts(model, tokenizer, PROMPTS, base=ParameterVector.of(before), max_new_tokens=8)
    for index, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt).input_ids
        present, base = (argmax_continuation(each, ids, 8) for each in (model, before))
        assert found.present[index] == tokenizer.decode(present, skip_special_tokens=True)
        assert found.base[index] == tokenizer.decode(base, skip_special_tokens=True)
        same = sum(a == b for a, b in zip(present, base, strict=False)) / max(len(present), len(base))
        assert found.agreement[index] == same
        expected = mean_divergence(model, before.eval(), ids, present)
        assert found.kl_per_token[index] == pytest.approx(expected, rel=1e-4)
    assert found.metrics() == {
        "prompts": 2,
        "agreement": sum(found.agreement) / 2,
        "kl_per_token": pytest.approx(sum(found.kl_per_token) / 2),
    }
    assert min(found.kl_per_token) > 0.1


def test_drawn_continuations_are_those_of_generate(model, before):
    tokenizer = byte_tokenizer()
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9}
    base = BaseParameters(ParameterVector.of(before))
    found = continue_prompts(model, tokenizer, PROMPTS, base=base, seed=5, **options)
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer(prompt).input_ids)[None]
        for each, text in ((model, found.present[index]), (before, found.base[index])):
            torch.manual_seed(5 + index)
            whole = each.eval().generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=257, **options)
            assert text == tokenizer.decode(whole[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert continue_prompts(model, tokenizer, PROMPTS, base=base, seed=6, **options).present != found.present


def test_passes_are_counted_as_the_models_hooks_count_them(model, before):
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(output.logits)))
    found = continue_prompts(model, byte_tokenizer(), PROMPTS, max_new_tokens=8)
    assert found.cost.forwards == sum(passes) > 0
    for base in (before, BaseParameters(ParameterVector.of(before))):
        passes.clear()
        found = continue_prompts(model, byte_tokenizer(), PROMPTS, base=base, max_new_tokens=8, do_sample=True)
        assert vars(found.row().cost) == {"forwards": sum(passes), "backwards": 0}


def test_the_present_model_is_its_own_base(model):
    found = continue_prompts(model, byte_tokenizer(), PROMPTS, base=ParameterVector.of(model), max_new_tokens=4)
    assert found.base == found.present
    assert (found.agreement, found.kl_per_token) == ((1.0, 1.0), (0.0, 0.0))


def test_without_a_base_the_texts_stand_alone(model, before):
    tokenizer = byte_tokenizer()
    found = continue_prompts(model, tokenizer, PROMPTS, max_new_tokens=4)
    compared = continue_prompts(model, tokenizer, PROMPTS, base=ParameterVector.of(before), max_new_tokens=4)
    assert found.present == compared.present
    assert found.metrics() == {"prompts": 2}
    nothing = {"base": None, "agreement": None, "kl_per_token": None}
    assert found.rows()[1] == {"prompt": PROMPTS[1], "present": found.present[1], **nothing}
    for each in (found, compared):
        assert Continuations.from_json(each.to_json()) == each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_and_random_state_come_back(model, before, dtype):
    model.to(dtype).train()
    values, rng = ParameterVector.of(model), torch.get_rng_state()
    base = ParameterVector.of(before.to(dtype))
    found = continue_prompts(model, byte_tokenizer(), PROMPTS, base=base, max_new_tokens=4, do_sample=True)
    assert all(math.isfinite(value) for value in found.kl_per_token)
    assert all(torch.equal(values[name], after) for name, after in ParameterVector.of(model).items())
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([""], {}, "prompt 0 is '': it has no token"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        (["a"], {"temperature": 0.0}, "temperature must be positive"),
        (["b", "a" * 30], {"max_new_tokens": 3}, "prompt 1 has 30 tokens; with max_new_tokens=3 .* 32 positions"),
    ],
)
def test_wrong_arguments_are_named(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        continue_prompts(model, byte_tokenizer(), prompts, **options)


def test_wrong_models_and_bases_are_named(model):
    with pytest.raises(TypeError, match=r"Linear has no generate\(\)"):
        continue_prompts(torch.nn.Linear(2, 2), byte_tokenizer(), ["a"])
    with pytest.raises(TypeError, match=r"a base is a module, .*; got int"):
        continue_prompts(model, byte_tokenizer(), ["a"], base=3, max_new_tokens=2)
    with pytest.raises(SpaceError):
        continue_prompts(model, byte_tokenizer(), ["a"], base=ParameterVector.of(build("llama")), max_new_tokens=2)
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(math.nan)
    base = ParameterVector.of(scaled(0))
    with pytest.raises(ValueError, match="prompt 0: the divergence from the base is nan nats, not finite"):
        continue_prompts(model, byte_tokenizer(), ["a"], base=base, max_new_tokens=2)


def test_prompts_that_are_no_text_are_refused(model, before):
    with pytest.raises(TypeError, match="prompt 1 is a text or a tensor of token ids; got int"):
        continue_prompts(model, byte_tokenizer(), ["a", 3], base=ParameterVector.of(before), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"prompt 0 is .*, which is no Unicode text: it has half of a surrogate pair"):
        continue_prompts(model, byte_tokenizer(), ["\ud800"], base=ParameterVector.of(before), max_new_tokens=2)
