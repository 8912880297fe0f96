from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer

from lightning_goldy.analysis import adam_curvature, adam_curvature_from_state, adam_preconditioner
from lightning_goldy.core import ParameterSpace
from tests.references.preconditioner import (
    Small,
    adam_first_moment,
    adam_second_moment,
    dense_map,
    diagonal_scales,
)


def ones(space, name):
    return torch.ones(math.prod(space.shape(name)))


def train(model, optimizer, steps=4, skip=()):
    """Gradients by parameter name; the parameters in ``skip`` have none before the last step."""
    gradients = {name: [] for name, _ in model.named_parameters()}
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        for name, parameter in model.named_parameters():
            if name in skip and step < steps - 1:
                parameter.grad = None
            else:
                gradients[name].append(parameter.grad.clone())
        optimizer.step()
    return gradients


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, betas=(0.8, 0.9)),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.9), fused=True),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.9), foreach=True),
    "amsgrad": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, betas=(0.8, 0.9), amsgrad=True),
    "nadam": lambda parameters: torch.optim.NAdam(parameters, lr=1e-2, betas=(0.8, 0.9)),
    "radam": lambda parameters: torch.optim.RAdam(parameters, lr=1e-2, betas=(0.8, 0.9)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_moments_are_the_weighted_means_of_the_gradients_also_after_unequal_steps(kind, wrapped):
    model = Small()
    optimizer = OPTIMIZERS[kind](list(model.parameters())[::-1])  # another order than the module's
    gradients = train(model, optimizer, skip=("layer.bias",))
    assert len(gradients["layer.bias"]) == 1
    space = ParameterSpace.of(model)
    given = LightningOptimizer(optimizer) if wrapped else optimizer
    for order, moment, beta in ((1, adam_first_moment, 0.8), (2, adam_second_moment, 0.9)):
        curvature = adam_curvature(given, space, module=model, order=order)
        for name in space:
            assert torch.allclose(curvature[name].double(), moment(gradients[name], beta), rtol=1e-5, atol=1e-12), name
        expected = diagonal_scales(list(curvature.values()), eps=0.2, exponent=0.5)
        preconditioner = adam_preconditioner(given, space, module=model, eps=0.2, order=order)
        scales = torch.cat([preconditioner.apply(name, ones(space, name), 0) for name in space])
        assert scales.tolist() == pytest.approx(expected, rel=1e-5)
        assert abs(float(scales.double().log().sum())) < 1e-5
        assert preconditioner.name == "adam"


def test_the_preconditioner_holds_the_optimizers_own_tensors_and_says_when_they_have_changed():
    for kind in ("adam", "fused", "foreach", "amsgrad"):
        model = Small()
        optimizer = OPTIMIZERS[kind](model.parameters())
        train(model, optimizer)
        space = ParameterSpace.of(model)
        preconditioner = adam_preconditioner(optimizer, space, module=model)
        held = preconditioner._curvature["layer.weight"]
        assert held.data_ptr() == optimizer.state[model.layer.weight]["exp_avg_sq"].data_ptr()
        copied = adam_curvature(optimizer, space, module=model)
        before = {name: tensor.clone() for name, tensor in copied.items()}
        train(model, optimizer, steps=1)
        with pytest.raises(RuntimeError, match=r"curvature of layer\.weight has changed since .* 'adam' was made"):
            preconditioner.apply("layer.weight", torch.ones(6), 0)
        assert all(torch.equal(copied[name], before[name]) for name in before)


def test_a_part_of_the_parameters_and_low_precision():
    model = Small().bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.9))
    model(torch.randn(5, 3).bfloat16()).square().mean().backward()
    optimizer.step()
    space = ParameterSpace.of(model, include=["layer.*"])
    curvature = adam_curvature(optimizer, space, module=model)
    assert list(curvature) == ["layer.weight", "layer.bias"]
    assert curvature["layer.weight"].dtype == torch.float32
    assert torch.allclose(curvature["layer.weight"], model.layer.weight.grad.float() ** 2, rtol=2e-2)
    preconditioner = adam_preconditioner(optimizer, space, module=model, eps=0.0)
    assert abs(float(torch.linalg.slogdet(dense_map(preconditioner)).logabsdet)) < 1e-5


def test_before_the_first_step_there_is_nothing_to_read():
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"AdamW has no state for 'gain' or any other parameter: it has made no step"):
        adam_preconditioner(optimizer, ParameterSpace.of(model), module=model)
    train(model, optimizer, steps=1)
    optimizer.state[model.layer.bias]["step"].zero_()
    with pytest.raises(ValueError, match=r"AdamW has made no step yet for 'layer\.bias'"):
        adam_preconditioner(optimizer, ParameterSpace.of(model), module=model)


def test_optimizers_without_these_moments_say_what_they_have():
    model = Small()
    space = ParameterSpace.of(model)
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, momentum)
    with pytest.raises(ValueError, match=r"SGD keeps no 'exp_avg_sq' for 'gain'; it has \['momentum_buffer'\]"):
        adam_preconditioner(momentum, space, module=model)
    infinite = torch.optim.Adamax(model.parameters(), betas=(0.8, 0.9))
    train(model, infinite)
    with pytest.raises(ValueError, match=r"Adamax keeps no 'exp_avg_sq' .* it has \['exp_avg', 'exp_inf', 'step'\]"):
        adam_preconditioner(infinite, space, module=model)
    assert adam_preconditioner(infinite, space, module=model, order=1).space is space
    with pytest.raises(ValueError, match="a torch optimizer, or a wrapper of one, is needed; got Small"):
        adam_preconditioner(model, space, module=model)


def test_parameters_that_the_optimizer_lacks_or_never_stepped_are_named():
    model = Small()
    part = torch.optim.Adam(model.layer.parameters())
    train(model, part)
    space = ParameterSpace.of(model)
    with pytest.raises(ValueError, match=r"Adam does not hold 'gain' \(1 of the space's 3 parameters\)"):
        adam_preconditioner(part, space, module=model)
    with pytest.raises(ValueError, match=r"does not hold 'gain' \(3 of the space's 3"):
        adam_preconditioner(part, space, module=copy.deepcopy(model))
    whole = torch.optim.Adam(model.parameters())
    for _ in range(2):
        whole.zero_grad()
        model.layer(torch.randn(2, 3)).sum().backward()
        whole.step()
    # What the loss does not use has the moment of a gradient that is always zero.
    unused = adam_curvature(whole, space, module=model)
    assert unused["gain"].count_nonzero() == 0
    whole.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    seen = torch.optim.Adam(model.parameters())
    seen.step()
    assert adam_curvature(seen, space, module=model)["gain"].equal(unused["gain"])
    assert adam_preconditioner(whole, space, module=model).space == space
    with pytest.raises(ValueError, match=r"order is 1 .* or 2 .*; got 3"):
        adam_curvature(whole, space, module=model, order=3)


# Saved optimizers


def two_groups(model):
    groups = [{"params": [model.layer.bias, model.gain], "weight_decay": 0.0}, {"params": [model.layer.weight]}]
    return torch.optim.AdamW(groups, betas=(0.8, 0.9))


def test_a_checkpoint_gives_the_same_curvature(tmp_path):
    model = Small()
    optimizer = two_groups(model)
    train(model, optimizer, skip=("gain",))
    torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    restored = Small()
    restored.load_state_dict(checkpoint["state_dict"])
    space = ParameterSpace.of(restored)
    for order in (1, 2):
        expected = adam_curvature(optimizer, ParameterSpace.of(model), module=model, order=order)
        found = adam_curvature_from_state(
            checkpoint["optimizer_states"][0], two_groups(restored), space=space, module=restored, order=order
        )
        assert {name: torch.equal(found[name], expected[name]) for name in expected} == dict.fromkeys(space, True)
        # What is computed from it later must not follow the checkpoint's tensors.
        assert found["gain"].data_ptr() != checkpoint["optimizer_states"][0]["state"][1]["exp_avg"].data_ptr()


def test_states_that_do_not_fit_are_refused():
    model = Small()
    optimizer = two_groups(model)
    train(model, optimizer)
    state, space = optimizer.state_dict(), ParameterSpace.of(model)
    with pytest.raises(ValueError, match=r"keys 'state' and 'param_groups'; this one is \['optimizer_states'\]"):
        adam_curvature_from_state({"optimizer_states": [state]}, two_groups(model), space=space, module=model)
    with pytest.raises(ValueError, match="this one is list"):
        adam_curvature_from_state([state], two_groups(model), space=space, module=model)
    with pytest.raises(ValueError, match="AdamW has state already"):
        adam_curvature_from_state(state, optimizer, space=space, module=model)
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        adam_curvature_from_state(state, other, space=space, module=model)
    groups = [{"params": [model.gain, model.layer.weight]}, {"params": [model.layer.bias]}]
    with pytest.raises(ValueError, match=r"the optimizer's moment has shape \(2,\), the parameter \(\);"):
        adam_curvature_from_state(state, torch.optim.AdamW(groups), space=space, module=model)
