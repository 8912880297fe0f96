from __future__ import annotations

import copy
import importlib
import math

import pytest
import torch

from lightning_goldy.analysis import activation_differences, steer_texts
from lightning_goldy.analysis.activations import steered
from lightning_goldy.data.tokenization import byte_tokenizer
from tests.references.attribution import moved
from tests.references.models import build, token_batch


@pytest.fixture(scope="module")
def subject():
    base = build("llama", 0).eval()
    model = moved(base, build("llama", 1), 0.4).eval()
    found = activation_differences(model, base, [token_batch(4, 12, query=0)])
    return model, base, found


class Numbers:
    """Ids are their own text."""

    pad_token_id, eos_token_id = 0, 0

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def test_a_direction_is_added_after_the_block_and_gone_afterwards(subject):
    model, _, found = subject
    batch = {"input_ids": token_batch(2)["input_ids"]}
    direction = found.means[0, -1]
    seen = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
        with steered(model.model.layers[0], direction, 2.0):
            model(**batch)
        model(**batch)
    hook.remove()
    plain, moved_states, again = seen
    torch.testing.assert_close(moved_states, plain + 2 * direction)
    assert torch.equal(again, plain)


def test_texts_are_steered_as_strongly_as_fluency_allows(subject):
    model, base, found = subject
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7, 8])]
    made = steer_texts(model, base, Numbers(), prompts, found, max_new_tokens=6, tolerance=0.5)
    assert [text["state"] for text in made.texts] == ["base", "base", "present", "present"]
    assert made.layer == found.layers[found.clearest]
    for text in made.texts:
        assert text["fluency"] >= text["plain_fluency"] - 0.5
        assert text["strength"] in (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
        if text["strength"] == 0.0:
            assert text["steered"] == text["plain"]
    for module, first in ((base, made.texts[0]), (model, made.texts[2])):
        with torch.no_grad():
            ids = module.generate(prompts[0][None], max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 3:]
        assert first["plain"] == Numbers().decode(ids.tolist())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    for state, words in (("base", "added to the base"), ("present", "taken from the finetuned model")):
        held = [text["strength"] for text in made.texts if text["state"] == state]
        told = f"{sum(held) / 2:.3g} ({min(held):.3g} to {max(held):.3g}) times "
        assert told in made.headline().partition(words)[0]
    loose = steer_texts(model, base, Numbers(), prompts, found, max_new_tokens=6, tolerance=100.0, repeats=1.0)
    assert {text["strength"] for text in loose.texts} == {64.0}
    assert loose.headline().startswith("texts stay fluent with 64 (64 to 64) times the difference after block ")
    assert loose.headline().endswith("in the mean over prompts (2)")


def test_a_text_that_repeats_itself_is_not_called_fluent(subject, monkeypatch):
    model, base, found = subject
    steering = importlib.import_module("lightning_goldy.analysis.activations.steering")
    written = {0.0: [1, 2, 3, 4, 5, 6], 1.0: [1, 2, 3, 1, 2, 4], 2.0: [9, 9, 9, 9, 9, 9], 4.0: [1, 2, 3, 4, 5, 7]}
    monkeypatch.setattr(steering._Steering, "_generate", lambda *_: torch.tensor(written[next(strengths)]))
    # A model that repeats a token finds it likelier than anything else.
    likely = {9: -0.1, 6: -2.0, 4: -2.2, 7: -2.1}
    monkeypatch.setattr(steering._Steering, "_fluency", lambda self, prompt, answer: likely[int(answer[-1])])
    options = {"strengths": [1.0, 2.0, 4.0], "tolerance": 0.5, "max_new_tokens": 6}
    prompts = [torch.tensor([3])]
    strengths = iter([0.0, 1.0, 2.0] * 2)
    made = steer_texts(model, base, Numbers(), prompts, found, **options)
    assert [text["strength"] for text in made.texts] == [1.0, 1.0]
    assert [(text["plain_repetition"], text["repetition"]) for text in made.texts] == [(0.0, pytest.approx(0.2))] * 2
    strengths = iter([*written] * 2)
    made = steer_texts(model, base, Numbers(), prompts, found, repeats=0.8, **options)
    assert [text["strength"] for text in made.texts] == [4.0, 4.0]


def test_wrong_arguments_are_refused(subject):
    model, base, found = subject
    for options, message in (
        ({"layer": 9}, r"layer 9 was not measured; there are \[0, 1\]"),
        ({"tolerance": 0.0}, "tolerance and strengths must be positive"),
        ({"repeats": 1.5}, r"repeats must lie in \[0, 1\]; got 1.5"),
        ({"tolerance": math.nan}, "must be positive and finite; got nan"),
        ({"strengths": [math.nan]}, "strengths must be positive and finite; got nan"),
        ({"strengths": [math.inf]}, "strengths must be positive and finite; got inf"),
        ({"strengths": [1.0, -1.0]}, "strengths must be positive and finite; got -1.0"),
        ({"strengths": [1.0, 1.0]}, "strengths name 1.0 twice"),
        ({"strengths": []}, "strengths is empty"),
        ({"strengths": 2.0}, "strengths is a list of positive numbers; got 2.0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            steer_texts(model, base, byte_tokenizer(), [torch.tensor([1])], found, **options)


def test_what_cannot_steer_is_refused(subject):
    model, base, found = subject
    with pytest.raises(ValueError, match="prompts is a list of texts; got one text, 'My'"):
        steer_texts(model, base, Numbers(), "My", found)
    same = activation_differences(model, model, [token_batch(4, 12, query=0)])
    with pytest.raises(ValueError, match="nothing differs from the base after block 0, so there is no direction"):
        steer_texts(model, model, Numbers(), [torch.tensor([1])], same)
    layer = torch.nn.Identity()
    with steered(layer, torch.ones(3)), pytest.raises(ValueError, match="the direction has width 3, and the stream 2"):
        layer(torch.zeros(1, 2))
