from __future__ import annotations

import importlib
import itertools
import random
from array import array
from collections import UserDict, UserList
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_goldy.analysis import golden_parameters, head_importance
from lightning_goldy.core.autodiff import call_with, directional_derivatives
from lightning_goldy.core.composed import undetached
from lightning_goldy.core.isolation import Kept, _is_of_the_user, isolated_rng, preserved, undisturbed
from lightning_goldy.training.subject import find_model


class Model(nn.Module):
    """Everything that a forward may change: batch statistics, a counter that is replaced, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)
        self.first.bias.requires_grad = False
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("nothing", None)
        self.register_buffer("temporary", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.dropout(self.norm(self.first(x))))
        self.average = 0.9 * self.average + 0.1 * y.detach().mean(dim=0)  # a new tensor in the buffer's place
        if self.nothing is None:
            self.nothing = torch.ones(3)
        self.temporary.add_(1)
        return y


def mixed() -> Model:
    """A model in the middle of training, with modes and gradients as mixed as they may be."""
    model = Model()
    model(torch.randn(5, 3)).sum().backward()
    model.nothing = None
    model.norm.eval()
    model.dropout.eval()
    model.last.bias.grad = None
    return model


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "buffers": {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()},
        "slots": {name: list(child._buffers) for name, child in model.named_modules()},
        "grads": {
            name: (p.grad, None if p.grad is None else p.grad.clone(), p.requires_grad)
            for name, p in model.named_parameters()
        },
        "parameters": dict(model.named_parameters()),
        "modes": [child.training for child in model.modules()],
        "rng": rng(),
    }


def rng() -> tuple:
    state = np.random.get_state()
    return random.getstate(), (state[0], state[1].tolist(), *state[2:]), torch.get_rng_state().tolist()


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    assert now["modes"] == before["modes"]
    assert now["slots"] == before["slots"]
    assert list(now["buffers"]) == list(before["buffers"])
    for name, (buffer, value) in before["buffers"].items():
        assert now["buffers"][name][0] is buffer, name
        assert torch.equal(buffer, value), name
    for name, (gradient, value, needed) in before["grads"].items():
        assert now["grads"][name][0] is gradient, name
        assert gradient is None or torch.equal(gradient, value)
        assert now["grads"][name][2] is needed
        assert now["parameters"][name] is before["parameters"][name]
    assert now["rng"] == before["rng"]


def disturb(model: nn.Module) -> None:
    """Everything an analysis might do."""
    random.random()
    np.random.rand()
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(torch.randn(5, 3)).square().sum().backward()
    model.last.eval()


@contextmanager
def within(trainer_like: bool, model: nn.Module, **options: Any):
    if trainer_like:
        trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=nullcontext))
        with undisturbed(trainer, model, **options) as inside:
            yield inside
    else:
        with preserved(model, **options) as inside:
            yield inside


OUTSIDE: dict[str, Callable[[], AbstractContextManager]] = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("trainer_like", [False, True])
@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_behind(trainer_like: bool, outside: str, error: type[BaseException] | None) -> None:
    model = mixed()
    before = snapshot(model)
    with OUTSIDE[outside]():
        enabled, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        expected = nullcontext() if error is None else pytest.raises(error, match="planted")
        with expected, within(trainer_like, model) as inside:
            assert inside is model
            disturb(model)
            assert rng() != before["rng"]
            if error is not None:
                raise error("planted")
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == (enabled, inference)
    assert_untouched(model, before)
    # Training goes on, also for what the analysis touched in inference mode.
    model.train()
    model(torch.randn(5, 3)).sum().backward()


def test_the_disturbance_is_real() -> None:
    model = mixed()
    before = snapshot(model)
    disturb(model)
    with pytest.raises(AssertionError):
        assert_untouched(model, before)
    assert not torch.equal(model.norm.running_mean, before["buffers"]["norm.running_mean"][1])
    assert model.average is not before["buffers"]["average"][0]
    assert model.temporary.item() != before["buffers"]["temporary"][1].item()


@pytest.mark.parametrize("outside", OUTSIDE)
def test_inside_gradients_work_and_start_empty(outside: str) -> None:
    model = mixed()
    with OUTSIDE[outside](), preserved(model):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert all(parameter.grad is None for parameter in model.parameters())
        model(torch.randn(2, 3)).sum().backward()
        assert model.last.weight.grad is not None
        assert not model.last.weight.grad.is_inference()
        assert model.first.bias.grad is None


@pytest.mark.parametrize(("training", "expected"), [(False, {False}), (True, {True}), (None, {True, False})])
def test_modes_inside(training: bool | None, expected: set[bool]) -> None:
    model = mixed()
    modes = [child.training for child in model.modules()]
    for trainer_like in (False, True):
        with within(trainer_like, model, training=training):
            assert {child.training for child in model.modules()} == expected
            if training is None:
                assert [child.training for child in model.modules()] == modes


def test_it_nests() -> None:
    model = mixed()
    before = snapshot(model)
    with preserved(model, training=True):
        disturb(model)
        middle = snapshot(model)
        with preserved(model):
            disturb(model)
        assert_untouched(model, middle)
    assert_untouched(model, before)


def test_gradients_are_set_aside_and_not_copied() -> None:
    model = mixed()
    address = model.last.weight.grad.data_ptr()
    with preserved(model):
        pass
    assert model.last.weight.grad.data_ptr() == address


def test_buffers_made_in_inference_mode() -> None:
    model = mixed().eval()
    with torch.inference_mode():
        model(torch.randn(2, 3))
        assert model.average.is_inference()
    before = snapshot(model)
    with preserved(model):
        with torch.inference_mode():
            model.average.add_(1)
        model.temporary.add_(1)
    assert_untouched(model, before)


@pytest.mark.parametrize("error", [None, ValueError])
def test_the_random_states_alone(error: type[Exception] | None) -> None:
    before = rng()
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.setstate(before[0])
    np.random.set_state((before[1][0], np.array(before[1][1], dtype=np.uint32), *before[1][2:]))
    torch.set_rng_state(torch.tensor(before[2], dtype=torch.uint8))
    try:
        with isolated_rng():
            for seed in (1, 2):
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
            if error:
                raise error
    except ValueError:
        assert error is ValueError
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_the_trainers_autocast_is_on_inside_and_its_cache_empty_on_both_sides() -> None:
    model, x = nn.Linear(8, 8), torch.randn(2, 8)
    plugin = SimpleNamespace(forward_context=lambda: torch.autocast("cpu", torch.bfloat16))
    trainer = SimpleNamespace(precision_plugin=plugin)

    def fresh() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return model(x)

    with torch.autocast("cpu", torch.bfloat16):
        first = model(x)  # caches the weight
        with torch.no_grad():
            model.weight.add_(1)
        with undisturbed(trainer, model):
            assert torch.is_autocast_enabled("cpu")
            inside = model(x)
            assert torch.equal(inside, fresh())
            assert not torch.equal(inside, first)
            with torch.no_grad():
                model.weight.sub_(2)
        assert torch.equal(model(x), fresh())
        assert not torch.equal(model(x), inside)
    with undisturbed(trainer, model):
        assert model(x).dtype == torch.bfloat16
    assert model(x).dtype == torch.float32


def test_a_forward_context_that_fails_leaves_nothing() -> None:
    model = mixed()
    before = snapshot(model)

    def broken() -> AbstractContextManager:
        raise RuntimeError("no such precision")

    with (
        pytest.raises(RuntimeError, match="no such precision"),
        undisturbed(SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=broken)), model),
    ):
        pytest.fail("the block must not run")
    assert_untouched(model, before)


class Helper:
    def __init__(self) -> None:
        self.calls, self.inner = 0, {"seen": [1]}


class Remembering(nn.Module):
    """Everything that a forward may keep outside parameters and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)
        self.longest, self.history, self._cache, self.helper = 4, [1.0], {"a": [1]}, Helper()
        self.running, self.alias = torch.zeros(2), self.layer.weight.detach()
        self.generator, self.noise = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        self.longest = max(self.longest, len(x))
        self.register_buffer("inv_freq", torch.zeros(len(x)), persistent=False)
        self.register_buffer("mask", torch.zeros(len(x)), persistent=False)
        self.history.append(x.sum().item())
        self._cache["a"].append(2)
        self._cache[len(x)] = x
        self.helper.calls += 1
        self.helper.inner["seen"].append(self.noise.random())
        self.running.add_(1)
        self.last = self.layer(x) + torch.rand((), generator=self.generator)
        return self.last


def test_what_a_forward_keeps_in_attributes_comes_back() -> None:
    model = Remembering()
    helper, running = model.helper, model.running
    expected = (torch.rand(1, generator=torch.Generator().manual_seed(1)), np.random.default_rng(1).random())
    with preserved(model):
        model(torch.ones(9, 2))
        with torch.no_grad():
            model.layer.weight.fill_(3)  # the parameters are the business of others, and so are their views
    assert (model.longest, model.history, model._cache) == (4, [1.0], {"a": [1]})
    assert model.helper is helper
    assert (helper.calls, helper.inner) == (0, {"seen": [1]})
    assert model.running is running
    assert running.tolist() == [0, 0]
    assert list(dict(model.named_buffers())) == ["inv_freq"]
    assert model.inv_freq.tolist() == [1, 1]
    assert not hasattr(model, "last")
    assert model.layer.weight.unique().tolist() == model.alias.unique().tolist() == [3]
    assert (torch.rand(1, generator=model.generator), model.noise.random()) == expected


def test_a_tensor_that_a_graph_needs_is_not_written_to() -> None:
    model = Remembering()
    model.running = model.layer(torch.ones(1, 2)).exp()
    loss = model.running.square().sum()
    (expected,) = torch.autograd.grad(loss, model.layer.weight, retain_graph=True)
    with preserved(model):
        pass
    loss.backward()
    assert model.layer.weight.grad is not None
    assert torch.equal(model.layer.weight.grad, expected)


def test_a_trainer_and_its_callbacks_go_their_own_way() -> None:
    import lightning.pytorch as L

    class Counting(L.Callback):
        runs = 0

    model = Remembering()
    model.watcher = callback = Counting()
    with preserved(model):
        callback.runs += 1
    assert callback.runs == 1


def test_what_objects_hold_is_put_back(tmp_path: Any) -> None:
    file = (tmp_path / "rows.txt").open("w+")
    file.write("one two")
    file.seek(3)
    count = 0

    def step() -> None:
        nonlocal count
        count += 1

    class Source:
        def __init__(self) -> None:
            self.file, self.step, self.random, self.names = file, step, random.Random(1), {"a"}

    source = Source()
    kept = Kept([source])
    step()
    first = source.random.random()
    file.seek(5)
    source.names.add("b")
    source.more = 1
    del source.step
    kept.restore()
    assert (count, file.tell(), source.names, source.step) == (0, 3, {"a"}, step)
    assert not hasattr(source, "more")
    assert source.random.random() == first
    assert len(Kept([list("ab"), (x for x in "ab")]).iterators) == 1
    file.close()


class Merging(nn.Linear):
    """A layer that merges its adapter into its weight in evaluation mode, as loralib's do."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.adapter, self.merged = nn.Parameter(torch.ones(2, 2)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            with torch.no_grad():
                self.weight.add_(self.adapter if not mode else -self.adapter)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0 if self.merged else x @ self.adapter.T)


NOISE, COUNTS = {"numpy": [np.random.default_rng(5)], "python": random.Random(3)}, [0]


class Packed:
    """An object without a dictionary of attributes."""

    __slots__ = ("count", "later")

    def __init__(self) -> None:
        self.count = 0


PACKED = Packed()


class Shared:
    """Draws from what the program and the class share, and counts in what it holds itself."""

    generator = torch.Generator().manual_seed(2)
    calls = 0

    def __init__(self) -> None:
        self.many = {index: [0] for index in range(1000)}
        self.long = np.zeros(200_000, dtype=np.int64)

    def draw(self, noise: list[Any] = [np.random.RandomState(4)]) -> list[float]:  # noqa: B006, B008
        Shared.calls += 1
        COUNTS.append(1)
        self.many[900][0] += 1
        self.long[100_000] += 1
        PACKED.count += 1
        PACKED.later = 1
        drawn = [NOISE["numpy"][0].random(), NOISE["python"].random(), noise[0].random(), drawn_by.generator.random()]
        return [*drawn, torch.rand(1, generator=self.generator).item()]


def drawn_by() -> None:
    """Holds a generator as an attribute of a function."""


drawn_by.generator = random.Random(1)  # type: ignore[attr-defined]


def test_what_a_program_shares_draws_again_and_its_counts_stay() -> None:
    shared = Shared()
    kept = Kept([shared])
    first = shared.draw()
    kept.restore()
    assert (shared.many[900], shared.long.sum(), PACKED.count, hasattr(PACKED, "later")) == ([0], 0, 0, False)
    assert shared.draw() == first
    assert (Shared.calls, len(COUNTS)) == (2, 3)


def test_evaluation_mode_merges_nothing() -> None:
    model = nn.Sequential(Merging(), nn.Dropout(0.5)).train()
    before = model[0].weight.detach().clone()
    with preserved(model):
        assert [child.training for child in model.modules()] == [False] * 3
        model(torch.ones(1, 2)).sum().backward()
        assert model[0].adapter.grad.abs().sum() > 0
    assert torch.equal(model[0].weight, before)
    assert [child.training for child in model.modules()] == [True] * 3
    model.eval()
    assert model[0].merged
    with preserved(model):
        pass
    model.train()
    assert torch.allclose(model[0].weight, before)


def test_embeddings_that_a_forward_shortens_come_back() -> None:
    model = nn.Embedding(4, 2, max_norm=0.1)
    before = model.weight.detach().clone()
    with preserved(model):
        model(torch.tensor([1, 2]))
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_a_model_whose_evaluation_divides_its_weights_is_refused_before_it_does() -> None:
    options = {"hidden_size": 8, "attention_hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3}
    model = hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=11, rescale_every=2, **options)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {"input_ids": torch.tensor([[1, 2, 3]])}
    module = nn.Module()
    module.model = model
    for attempt in (
        lambda: golden_parameters(model, [batch]),
        lambda: head_importance(model, [batch]),
        lambda: find_model(module, None),
    ):
        with pytest.raises(ValueError, match=r"set its config's rescale_every to 0; it is 2 with 3 layers"):
            attempt()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.config.rescale_every = 0
    assert golden_parameters(model, [batch]).mask.total > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_that_wait_for_gradients_do_not_hear_of_an_analysis() -> None:
    """As of an optimizer that steps within the backward pass."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heard: list[str] = []

    def stepped(parameter: Tensor) -> None:
        heard.append("training")
        optimizer.step()

    handle = model.weight.register_post_accumulate_grad_hook(stepped)
    before = model.weight.detach().clone()
    with preserved(model):
        own = model.weight.register_post_accumulate_grad_hook(lambda _: heard.append("analysis"))
        model(torch.ones(1, 2)).sum().backward()
        own.remove()
    assert heard == ["analysis"]
    assert torch.equal(model.weight, before)
    model(torch.ones(1, 2)).sum().backward()
    assert heard == ["analysis", "training"]
    handle.remove()
    model(torch.ones(1, 2)).sum().backward()
    assert len(heard) == 2


class Averaging(nn.Module):
    """Moves averages of its activations in place, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("mean", torch.zeros(2))
        self.other = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        for average in (self.mean, self.other):
            average.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return y


def test_what_a_forward_writes_to_comes_back_without_the_graph_of_an_analysis() -> None:
    model, x = Averaging(), torch.ones(3, 2)
    with preserved(model), undetached():
        model(x).sum().backward()
        assert model.mean.requires_grad
    assert (model.mean.requires_grad, model.other.requires_grad) == (False, False)
    assert not model.mean.any()
    assert not model.other.any()
    # The training goes on, whose loss may depend on them.
    (model(x).sum() * model.mean.sum() * model.other.sum()).backward()


class Listener:
    """Hooks that count."""

    def __init__(self) -> None:
        self.heard = {"forward": 0, "backward": 0, "gradient": 0}

    def forward(self, *_: object) -> None:
        self.heard["forward"] += 1

    def backward(self, *_: object) -> None:
        self.heard["backward"] += 1

    def gradient(self, _: object) -> None:
        self.heard["gradient"] += 1


def test_what_hooks_keep_comes_back_and_backward_hooks_hear_nothing_of_an_analysis() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    listener, passes = Listener(), []
    heard = listener.heard
    model[0].register_forward_hook(listener.forward)
    model[0].register_forward_hook(lambda *_: passes.append(1))
    model[1].register_full_backward_hook(listener.backward)
    model[1].weight.register_hook(listener.gradient)
    x = torch.ones(1, 2)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    with preserved(model):
        model(x).sum().backward()
        directional_derivatives(lambda p: call_with(model, p, (x,), {}).sum(), values, values, 1)
        assert heard["backward"] == 0
    assert heard == {"forward": 0, "backward": 0, "gradient": 0}
    # A function may count what an analysis costs.
    assert passes == [1, 1]
    model(x).sum().backward()
    assert heard == {"forward": 1, "backward": 1, "gradient": 1}


class HooksOnce(nn.Module):
    """Registers hooks in its first forward, as libraries do that capture what layers give, and marks that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.captured: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not getattr(self, "_hooked", False):
            self.layer.register_forward_hook(lambda *given: self.captured.append(given[-1]))
            self.layer.register_forward_pre_hook(lambda *_: None, with_kwargs=False)
            self._hooked = True
        return self.layer(x)


def test_hooks_that_a_forward_registers_once_are_not_there_twice() -> None:
    model = HooksOnce()
    model.layer.register_forward_hook(lambda *_, **__: None, with_kwargs=True, always_call=True)
    own = list(model.layer._forward_hooks)
    for _ in range(2):
        with preserved(model):
            model(torch.ones(1, 2))
    assert list(model.layer._forward_hooks) == list(model.layer._forward_hooks_with_kwargs) == own
    assert not model.layer._forward_pre_hooks
    model(torch.ones(1, 2))
    assert len(model.captured) == 1
    # What was registered before stays so.
    with preserved(model):
        model(torch.ones(1, 2))
    assert (len(model.layer._forward_hooks), len(model.layer._forward_pre_hooks)) == (2, 1)


def test_a_model_captures_each_router_once_after_an_analysis() -> None:
    config = hf.MixtralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True,
    )  # fmt: skip
    model, tokens = hf.MixtralForCausalLM(config), torch.tensor([[1, 2, 3]])
    with preserved(model):
        model(tokens)
    assert len(model(tokens).router_logits) == len(model(tokens).router_logits) == 2


def test_a_reentrant_checkpoint_gives_gradients_of_what_is_asked_for() -> None:
    model = nn.Linear(2, 2)
    x = torch.ones(1, 2, requires_grad=True)
    before = torch.utils.checkpoint.CheckpointFunction
    with preserved(model):
        loss = checkpoint(lambda y: model(y).square(), x, use_reentrant=True).sum()
        (found,) = torch.autograd.grad(loss, [model.weight])
    assert torch.equal(found, torch.autograd.grad(model(x).square().sum(), [model.weight])[0])
    assert torch.utils.checkpoint.CheckpointFunction is before


class Masking:
    """A collator of the user's around what libraries draw with."""

    def __init__(self) -> None:
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")))
        tokenizer.add_special_tokens({"mask_token": "[MASK]", "pad_token": "[PAD]"})
        self.inner = hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=3)
        self.points = torch.quasirandom.SobolEngine(2, scramble=True, seed=1)
        self.bits = np.random.PCG64(1)

    def draw(self) -> tuple[list[float], list[int], int]:
        masked = self.inner([{"input_ids": torch.zeros(64, dtype=torch.long)}])["labels"]
        return self.points.draw(1).flatten().tolist(), masked.flatten().tolist(), int(self.bits.random_raw())


@pytest.mark.parametrize("used", [False, True])
def test_what_libraries_draw_with_is_put_back(used: bool) -> None:
    expected, masking = Masking(), Masking()
    if used:
        expected.draw()
        masking.draw()
    kept = Kept([masking])
    masking.draw()
    kept.restore()
    assert masking.draw() == expected.draw()


class Boxes:
    """Containers of Python that are no list, dict or set."""

    def __init__(self) -> None:
        self.space, self.named = SimpleNamespace(n=0), UserDict(n=0)
        self.listed, self.waiting = UserList([0]), Queue[int]()
        self.raw, self.numbers = bytearray(1), array("l", [0])
        for number in range(4):
            self.waiting.put(number)

    def draw(self) -> list[int]:
        self.space.n += 1
        for box, place in ((self.named, "n"), (self.listed, 0), (self.raw, 0), (self.numbers, 0)):
            box[place] += 1
        self.raw.append(1)
        return [self.space.n, self.named["n"], self.listed[0], self.waiting.get(), *self.raw, *self.numbers]


def test_containers_of_other_kinds_are_put_back() -> None:
    boxes = Boxes()
    kept = Kept([boxes])
    first = boxes.draw()
    kept.restore()
    assert boxes.draw() == first


class Numbered(nn.Module):
    """A module whose forward takes from iterators that cannot go back, one of them through a closure."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count, self.rest = nn.Linear(1, 1), itertools.count(), [iter("abcdef")]
        hidden = (number for number in range(99))
        self.draw = lambda: next(hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = next(self.count), next(self.rest[0]), self.draw()
        return self.layer(x)


def test_iterators_that_cannot_go_back_give_again_what_an_analysis_took() -> None:
    model = Numbered()
    x, given = torch.ones(1, 1), (model.count, model.rest[0])
    with preserved(model):
        pass
    assert (model.count, model.rest[0]) == given  # nothing was taken
    for times in (2, 0, 3):
        with preserved(model):
            for _ in range(times):
                model(x)
            with preserved(model):
                model(x)
    found = []
    for _ in range(4):
        model(x)
        found.append(model.seen)
    assert found == [(0, "a", 0), (1, "b", 1), (2, "c", 2), (3, "d", 3)]
    with preserved(model):
        pass
    assert (model.count, model.rest[0]) == given  # all of it has been given again


class _Slotted:
    __slots__ = ("value",)


class _Computed(_Slotted):
    """As mpmath's constants: a property in the place of the slot that its base has."""

    @property
    def value(self) -> tuple[int, ...]:  # type: ignore[override]
        return (int("1"), 2)  # another tuple each time


def test_a_property_in_a_slots_place_is_left_alone() -> None:
    model = nn.Linear(1, 1)
    model.held = _Computed()  # type: ignore[assignment]
    with preserved(model):
        pass
    assert model.held.value == (1, 2)


def test_libraries_elsewhere_are_not_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a virtual environment that sees the system's packages."""
    for place, own in (("site-packages", False), ("dist-packages", False), ("project", True)):
        name = f"module_of_{place.replace('-', '_')}"
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{name}.py").touch()
        monkeypatch.syspath_prepend(tmp_path / place)
        importlib.import_module(name)
        assert _is_of_the_user(name) is own


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "overridden"])
def test_a_padding_token_that_is_read_has_its_gradient_and_the_training_none(scaled: bool) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = (Scaled if scaled else nn.Embedding)(3, 2, padding_idx=1)
    with preserved(model):
        model(torch.tensor([1, 2])).sum().backward()
        assert model.weight.grad is not None
        assert bool(model.weight.grad[1].ne(0).all())
    assert model.padding_idx == 1
    model(torch.tensor([1, 2])).sum().backward()
    assert bool(model.weight.grad[1].eq(0).all())
    assert bool(model.weight.grad[2].ne(0).all())


def test_a_row_that_is_read_twice_has_its_whole_gradient_and_the_training_its_mean() -> None:
    model = nn.Embedding(3, 2, scale_grad_by_freq=True)
    with preserved(model):
        model(torch.tensor([1, 1])).sum().backward()
        assert torch.equal(model.weight.grad[1], torch.full((2,), 2.0))
    assert model.scale_grad_by_freq
    model(torch.tensor([1, 1])).sum().backward()
    assert torch.equal(model.weight.grad[1], torch.ones(2))


def test_an_embedding_whose_forward_reads_its_padding_keeps_it() -> None:
    class Places(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input + self.padding_idx)

    model = Places(4, 2, padding_idx=1)
    with preserved(model):
        assert torch.equal(model(torch.tensor([0])), model.weight[1:2])


class Shy:
    """Says slowly of what class it is, as configurations of transformers do, and counts how often it is asked."""

    asked = 0

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            Shy.asked += 1
        return object.__getattribute__(self, name)


def test_a_configuration_that_all_modules_hold_is_looked_at_once() -> None:
    """An iterator is given again all the same, in each of its places, and a mode in training as in evaluation."""
    model, shy, counted = nn.Sequential(*(nn.Linear(1, 1) for _ in range(40))), Shy(), iter(range(9))
    for part in model:
        part.config = shy
    model[0].source, model[1].sources = counted, [counted]
    for first, training in enumerate((True, False)):
        model.train(training)
        Shy.asked = 0
        with preserved(model):
            model[2].config, model[3].seen = None, 1
            assert next(model[0].source) == first
            assert next(model[1].sources[0]) == first + 1
        assert Shy.asked < 2 * len(model)
        assert model[2].config is shy
        assert not hasattr(model[3], "seen")
        assert all(part.training is training for part in model.modules())
        assert model[0].source is model[1].sources[0]
        assert next(model[1].sources[0]) == first
