from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import GenerationComparison, compare_generations
from lightning_goldy.core import ParameterSpace, ParameterVector
from lightning_goldy.data.tokenization import byte_tokenizer
from tests.references.reverse_golden import masked_divergence_reference

PROMPTS = ["The cat", "1 + 1 ="]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=258, n_positions=32, bos_token_id=256, eos_token_id=256
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def mask_of(model, share, seed=1):
    generator = torch.Generator().manual_seed(seed)
    space = ParameterSpace.of(model)
    shapes = zip(space.names, space.shapes, strict=True)
    return ParameterVector(space, {name: torch.rand(shape, generator=generator) < share for name, shape in shapes})


@pytest.mark.parametrize("do_sample", [True, False])
def test_an_empty_mask_changes_nothing(model, do_sample):
    found = compare_generations(
        model, byte_tokenizer(), PROMPTS, mask_of(model, 0.0), max_new_tokens=8, do_sample=do_sample
    )
    assert found.plain == found.masked
    assert found.agreement == (1.0, 1.0)
    assert found.kl_per_token == (0.0, 0.0)
    assert (found.count, found.mean_agreement, found.mean_kl_per_token) == (0, 1.0, 0.0)


def test_texts_are_those_of_generate_and_the_divergence_that_of_the_definition(model):
    tokenizer, mask = byte_tokenizer(), mask_of(model, 0.2)
    found = compare_generations(model, tokenizer, PROMPTS, mask, max_new_tokens=8, temperature=0.9, seed=5)
    model.eval()
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9, "pad_token_id": 257}
    for index, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer(prompt)["input_ids"])[None]
        answers = []
        for weights in ({}, {name: p * ~mask[name] for name, p in model.named_parameters()}):
            copy = GPT2LMHeadModel(model.config).eval()
            # The head shares the embedding's weight, and a state dict holds both.
            shared = weights.get("transformer.wte.weight", model.lm_head.weight)
            copy.load_state_dict({**model.state_dict(), **weights, "lm_head.weight": shared})
            torch.manual_seed(5 + index)
            with torch.no_grad():
                answers.append(copy.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :])
        texts = [tokenizer.decode(answer.tolist(), skip_special_tokens=True) for answer in answers]
        assert [found.plain[index], found.masked[index]] == texts
        longest = max(map(len, answers))
        same = sum(int(a) == int(b) for a, b in zip(*answers, strict=False))
        assert found.agreement[index] == same / longest
        whole = torch.cat([ids[0], answers[0]])[None]
        start = ids.shape[1] - 1
        expected = masked_divergence_reference(
            model, dict(mask), lambda call, whole=whole, start=start: call(input_ids=whole).logits[0, start:-1]
        )
        assert found.kl_per_token[index] == pytest.approx(expected, rel=1e-4)


def test_passes_are_counted_as_the_models_hooks_count_them(model):
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(len(output.logits)))
    found = compare_generations(model, byte_tokenizer(), PROMPTS, mask_of(model, 0.2), max_new_tokens=8)
    assert vars(found.cost) == {"forwards": sum(passes), "backwards": 0}


def test_a_prompt_does_not_depend_on_the_others_and_ids_serve_as_well(model):
    tokenizer, mask = byte_tokenizer(), mask_of(model, 0.2)
    both = compare_generations(model, tokenizer, PROMPTS, mask, max_new_tokens=6)
    ids = torch.tensor(tokenizer(PROMPTS[0])["input_ids"])
    alone = compare_generations(model, tokenizer, [ids], mask, max_new_tokens=6)
    assert alone.rows() == both.rows()[:1]
    other = compare_generations(model, tokenizer, PROMPTS, mask, max_new_tokens=6, seed=9)
    assert other.plain != both.plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_and_random_state_come_back(model, dtype):
    model.to(dtype).train()
    before, rng = ParameterVector.of(model), torch.get_rng_state()
    compare_generations(model, byte_tokenizer(), PROMPTS, mask_of(model, 0.5), max_new_tokens=4)
    assert all(torch.equal(before[name], after) for name, after in ParameterVector.of(model).items())
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training


def test_result_goes_to_json_and_back(model):
    found = compare_generations(model, byte_tokenizer(), PROMPTS, mask_of(model, 0.1), max_new_tokens=4)
    assert GenerationComparison.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ([], {}, "there is no prompt"),
        ([""], {}, "prompt 0 is '': it has no token"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        (["a"], {"temperature": 0.0}, "temperature must be positive"),
        (["a" * 30], {"max_new_tokens": 3}, "prompt 0 has 30 tokens; with max_new_tokens=3 .* 32 positions"),
    ],
)
def test_wrong_arguments_are_named(model, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        compare_generations(model, byte_tokenizer(), arguments, mask_of(model, 0.1), **{"max_new_tokens": 4, **options})


def test_wrong_models_and_masks_are_named(model):
    with pytest.raises(TypeError, match=r"Linear has no generate\(\)"):
        compare_generations(torch.nn.Linear(1, 1), byte_tokenizer(), ["a"], mask_of(model, 0.1))
    with pytest.raises(ValueError, match="bool"):
        compare_generations(model, byte_tokenizer(), ["a"], ParameterVector.of(model), max_new_tokens=2)
