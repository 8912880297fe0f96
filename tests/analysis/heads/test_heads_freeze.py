"""Tests that closed heads stand still to the last bit under every optimizer, and the others move as ever."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.heads import HeadFreeze, prune_heads, regrow_heads
from lightning_goldy.analysis.heads.optimizer import ParameterRows
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.vector import ParameterVector
from tests.references.architecture_models import REGISTERED, lora
from tests.references.head_training import BATCH, CUT, build, owned, penalised, train

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.3, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p),
    "adafactor": lambda p: torch.optim.Adafactor(p, weight_decay=0.1),
}


@pytest.mark.parametrize("steps_before", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_closed_heads_stand_still_and_the_others_move_as_ever(name: str, steps_before: int) -> None:
    runs = []
    for frozen in (True, False):
        model = build("llama")
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, steps_before)
        prune_heads(model, CUT)
        values = {key: value.detach().clone() for key, value in model.named_parameters()}
        states = {
            key: {kind: state.clone() for kind, state in optimizer.state.get(value, {}).items() if state.ndim}
            for key, value in model.named_parameters()
        }
        if frozen:
            with HeadFreeze(model, optimizer) as freeze:
                train(model, optimizer, 3, freeze.zero_gradients)
        else:
            train(model, optimizer, 3)
        runs.append((model, optimizer, values, states))
    (model, optimizer, values, states), (other, *_) = runs
    masks = owned(model, CUT)
    for key, parameter in model.named_parameters():
        mask = masks.get(key, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter[mask], values[key][mask]), key
        for kind, state in optimizer.state[parameter].items():
            if state.shape == parameter.shape and steps_before:
                assert torch.equal(state[mask], states[key][kind][mask]), (key, kind)
            elif state.shape == parameter.shape and kind in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                assert not state[mask].any(), (key, kind)
        if mask.any():
            assert not torch.equal(other.get_parameter(key)[mask], values[key][mask])
        if name not in ("adafactor",):  # which divides by root mean squares of whole matrices
            assert torch.equal(parameter[~mask], other.get_parameter(key)[~mask]), key
        assert not torch.equal(parameter[~mask], values[key][~mask]), key


@pytest.mark.parametrize("family", REGISTERED)
def test_every_family_freezes_what_its_closed_heads_own(family: str) -> None:
    model = build(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    prune_heads(model, CUT)
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    with HeadFreeze(model, optimizer):
        train(model, optimizer, 2)
    masks = owned(model, CUT)
    for key, parameter in model.named_parameters():
        mask = masks.get(key, torch.zeros(parameter.shape, dtype=torch.bool))
        moved = parameter != values[key]
        assert not moved[mask].any(), key
        assert key in masks or moved.any(), key


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("index", [[0], [1, 2, 5], [0, 1, 2, 3, 4, 5], [5], []])
def test_rows_by_runs_and_by_index_are_the_same(dim: int, index: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr("lightning_goldy.analysis.heads.optimizer._BY_RUNS", devices)
        tensor = torch.arange(36.0).view(6, 6)
        rows = ParameterRows("weight", nn.Parameter(tensor), dim, torch.tensor(index, dtype=torch.long))
        read = rows.read(tensor)
        assert torch.equal(read, tensor.index_select(dim, torch.tensor(index, dtype=torch.long)))
        written, zeroed = tensor.clone(), tensor.clone()
        rows.write(written, -1 - read)
        rows.zero(zeroed)
        assert (written < 0).sum() == (zeroed != tensor).sum() + (0 in index) == 6 * len(index)
        found.append(torch.stack([written, zeroed]))
    assert torch.equal(*found)


def test_clipping_does_not_see_closed_heads() -> None:
    model = build("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prune_heads(model, CUT)
    with HeadFreeze(model, optimizer) as freeze:
        penalised(model).backward()
        masks = owned(model, CUT)
        whole = math.fsum(float(p.grad.double().square().sum()) for p in model.parameters())
        closed = math.fsum(
            float(p.grad[masks[k]].double().square().sum()) for k, p in model.named_parameters() if k in masks
        )
        assert closed > 0
        freeze.zero_gradients()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert float(norm) ** 2 == pytest.approx(whole - closed, rel=1e-5)


def test_the_freeze_follows_the_gates_and_lets_go() -> None:
    model = build("llama")
    gates = HeadGates(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    freeze = HeadFreeze(model, optimizer)
    part = gates.architecture.blocks[0].query.head_slice(0)[0]
    value_rows = gates.architecture.blocks[0].value.head_slice(0)[0]

    def moved(heads: list, parts=(part, value_rows)) -> list[bool]:
        gates.enable(gates.closed)
        gates.disable(heads)
        before = [each.of(each.parameter).detach().clone() for each in parts]
        train(model, optimizer, 1)
        return [not torch.equal(a, b.of(b.parameter)) for a, b in zip(before, parts, strict=True)]

    assert moved([]) == [True, True]
    assert moved([(0, 0)]) == [False, True]
    assert moved([(0, 0), (0, 1)]) == [False, False]
    assert moved([(0, 1)]) == [True, True]
    freeze.remove()
    assert moved([(0, 0), (0, 1)]) == [True, True]
    optimizer.zero_grad()
    optimizer.step()
    assert not optimizer._optimizer_step_pre_hooks


def test_a_closure_that_runs_the_model_inside_the_step() -> None:
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    prune_heads(model, CUT)
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    losses = []
    with HeadFreeze(model, optimizer) as freeze:

        def closure() -> float:
            optimizer.zero_grad()
            loss = penalised(model)
            loss.backward()
            freeze.zero_gradients()
            losses.append(float(loss.detach()))
            return losses[-1]

        for _ in range(3):
            optimizer.step(closure)
    for key, mask in owned(model, CUT).items():
        assert torch.equal(model.get_parameter(key)[mask], values[key][mask])
        state = optimizer.state[model.get_parameter(key)]
        assert not state["exp_avg"][mask].any()
    assert losses == sorted(losses, reverse=True)


def test_parameters_that_join_later_are_frozen_too() -> None:
    model = build("llama")
    late = [parameter for name, parameter in model.named_parameters() if "o_proj" in name]
    for parameter in late:
        parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    prune_heads(model, CUT)
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    with HeadFreeze(model, optimizer):
        train(model, optimizer, 1)
        for parameter in late:
            parameter.requires_grad_(True)
        optimizer.add_param_group({"params": late})
        train(model, optimizer, 2)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        train(model, optimizer, 1)
    for key, mask in owned(model, CUT).items():
        assert torch.equal(model.get_parameter(key)[mask], values[key][mask]), key
        assert not torch.equal(model.get_parameter(key)[~mask], values[key][~mask]), key


def test_heads_closed_inside_a_step() -> None:
    model = build("llama")
    gates = HeadGates(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with HeadFreeze(model, optimizer):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = penalised(model)
            loss.backward()
            gates.enable(gates.closed)
            gates.disable(CUT)
            return loss

        optimizer.step(closure)
        values = {key: value.detach().clone() for key, value in model.named_parameters()}
        optimizer.step(closure)
    for key, mask in owned(model, CUT).items():
        assert torch.equal(model.get_parameter(key)[mask], values[key][mask]), key


def test_gradients_are_cleared_at_the_step_at_the_latest() -> None:
    model = build("gpt2")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    prune_heads(model, CUT)
    with HeadFreeze(model, optimizer):
        train(model, optimizer, 2)
    for key, mask in owned(model, CUT).items():
        assert not optimizer.state[model.get_parameter(key)]["exp_avg"][mask].any()


def test_autocast_sees_the_new_weights() -> None:
    model = build("gpt2")
    prune_heads(model, CUT)
    with torch.autocast("cpu", torch.bfloat16):
        model(**BATCH)
        regrow_heads(model, CUT, initialisation="noise", noise_scale=3.0)
        found = model(**BATCH).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**BATCH).logits, found)


def test_only_the_parameters_of_an_optimizer_matter() -> None:
    model = build("llama")
    prune_heads(model, CUT)
    some = [parameter for name, parameter in model.named_parameters() if "v_proj" not in name]
    rest = [parameter for name, parameter in model.named_parameters() if "v_proj" in name]
    optimizers = [torch.optim.AdamW(some, lr=0.01), torch.optim.SGD(rest, lr=0.01, weight_decay=1.0)]
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    with HeadFreeze(model, optimizers):
        for optimizer in optimizers:
            train(model, optimizer, 2)
    assert all(
        torch.equal(model.get_parameter(key)[mask], values[key][mask]) for key, mask in owned(model, CUT).items()
    )


def test_lightning_s_optimizers_are_frozen() -> None:
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = build("gpt2")
    inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    train(model, inner, 1)
    prune_heads(model, CUT)
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    wrapped = LightningOptimizer(inner)
    with HeadFreeze(model, wrapped):
        penalised(model).backward()
        inner.step()
    masks = owned(model, CUT)
    assert all(torch.equal(model.get_parameter(key)[mask], values[key][mask]) for key, mask in masks.items())
    regrow_heads(model, CUT, initialisation="zero", optimizer=wrapped)
    for key, mask in masks.items():
        assert not inner.state[model.get_parameter(key)]["exp_avg"][mask].any()


def build_lora() -> Any:
    return lora("llama", ["q_proj", "k_proj", "v_proj", "o_proj"])


def test_freezing_lora() -> None:
    model = lora("llama", ["q_proj", "k_proj", "v_proj", "o_proj"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05, weight_decay=0.1)
    prune_heads(model, CUT)
    values = {key: value.detach().clone() for key, value in model.named_parameters()}
    with HeadFreeze(model, optimizer):
        train(model, optimizer, 3)
    masks = owned(model, CUT)
    assert any("lora_A" in key for key in masks)
    assert any("lora_B" in key for key in masks)
    for key, mask in masks.items():
        assert torch.equal(model.get_parameter(key)[mask], values[key][mask]), key
        if "lora" in key:
            assert not torch.equal(model.get_parameter(key)[~mask], values[key][~mask]), key
    base = BaseParameters(ParameterVector.of(build_lora()))
    assert all("lora" in name for name in base.space.names)
    regrow_heads(model, CUT[:1], base=base)
    with pytest.raises(ValueError, match=r"'zero' would change .*base_layer\.weight, which is frozen.*golden"):
        regrow_heads(model, CUT[1:], initialisation="zero")


def test_what_cannot_be_frozen() -> None:
    model = build("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no gates"):
        HeadFreeze(model, optimizer)
    HeadGates(model)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer; got str"):
        HeadFreeze(model, "adam")
    adapted = lora("llama", ["o_proj"], use_dora=True)
    HeadGates(adapted)
    with pytest.raises(UnsupportedArchitectureError, match="plain LoRA"):
        HeadFreeze(adapted, torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1))
