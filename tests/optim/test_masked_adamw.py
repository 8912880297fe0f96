"""MaskedAdamW: every element moves as torch's AdamW at its rate would move it, to the last bit."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lightning_goldy import MaskedAdamW, ParameterMask, ParameterSpace
from lightning_goldy.core import SpaceError
from lightning_goldy.optim import masked_adamw as masked_update
from tests.references.common import paired
from tests.references.masked_adamw import element_loop, two_whole_runs

SHAPES = {"weight": (37, 53), "other": (1000,), "scalar": (), "bias": (5,), "empty": (0, 3)}
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float64)}
IMPLEMENTATIONS = {"single": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def named(*values):
    return {str(value): value for value in values}


def subject(shapes=None, dtype=torch.float32, seed=0, density=0.3):
    """Start values, and gradients and masks for them; some starts are -0.0, some gradients 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes or SHAPES
    starts = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    for start in starts.values():
        start[torch.rand(start.shape, generator=generator) < 0.05] = -0.0
    masks = {
        name: torch.rand(shape, generator=generator) < density
        for name, shape in shapes.items()
        if not name.startswith("b")
    }
    return starts, masks


def gradients(starts, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: torch.randn(start.shape, generator=generator).to(start.dtype) for name, start in starts.items()}
        for _ in range(steps)
    ]


def parameters(starts):
    return {name: nn.Parameter(start.clone()) for name, start in starts.items()}


def train(optimizer, held, gradients_of_steps, scheduler=None):
    for step in gradients_of_steps:
        for name, parameter in held.items():
            parameter.grad = step[name].clone()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same_bits(first, second) -> bool:
    def bits(tensor):
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(first[name]), bits(second[name])) for name in first)


@pytest.fixture
def small_stretches(monkeypatch):
    """Stretches so short that every parameter is cut, at places that no vector instruction divides."""
    monkeypatch.setattr(masked_update, "_CACHED", 171)
    monkeypatch.setattr(masked_update, "_BATCHED", 171)


@paired(
    {
        "dtype": DTYPES,
        "implementation": {name: name for name in IMPLEMENTATIONS},
        "options": named({}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}),
    }
)
def test_equal_rates_are_torchs_adamw_over_100_steps(implementation, options, dtype):
    starts, masks = subject(dtype=dtype)
    mine, theirs = parameters(starts), parameters(starts)
    chosen = {**options, **IMPLEMENTATIONS[implementation]}
    optimizer = MaskedAdamW(mine.items(), masks, 1e-2, 1e-2, **chosen)
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, **chosen)
    steps = gradients(starts, 100)
    train(optimizer, mine, steps)
    train(reference, theirs, steps)
    assert same_bits(mine, theirs)
    for name, parameter in mine.items():
        assert same_bits(optimizer.state[parameter], reference.state[theirs[name]])


@paired(
    {
        "density": {"held as indices": 0.05, "held as booleans": 0.3},
        "dtype": DTYPES,
        "implementation": {name: name for name in IMPLEMENTATIONS},
        "options": named({}, {"amsgrad": True, "maximize": True}, {"weight_decay": 0.0}),
        "rates": named((1e-2, 0.0), (0.0, 1e-2), (1e-2, 1e-3), (1e-4, 1e-2)),
    }
)
@pytest.mark.usefixtures("small_stretches")
def test_each_side_is_torchs_adamw_at_its_rate(implementation, options, rates, dtype, density):
    starts, masks = subject(dtype=dtype, density=density)
    held = parameters(starts)
    chosen = {**options, **IMPLEMENTATIONS[implementation]}
    optimizer = MaskedAdamW(held.items(), masks, *rates, **chosen)
    steps = gradients(starts, 12)
    train(optimizer, held, steps)
    assert same_bits(two_whole_runs(starts, steps, masks, [rates] * 12, **chosen), held)
    torch_alone = parameters(starts)
    reference = torch.optim.AdamW(torch_alone.values(), lr=1.0, **chosen)
    train(reference, torch_alone, steps)
    for name, parameter in held.items():
        assert same_bits(optimizer.state[parameter], reference.state[torch_alone[name]])


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "betas": (0.5, 0.6)}], ids=str)
def test_the_loop_over_elements_agrees(options):
    starts, masks = subject({"weight": (4, 3)}, torch.float64)
    held = parameters(starts)
    steps = gradients(starts, 20)
    train(MaskedAdamW(held.items(), masks, 0.05, 0.002, weight_decay=0.1, **options), held, steps)
    expected = element_loop(
        starts["weight"], [s["weight"] for s in steps], masks["weight"], 0.05, 0.002, weight_decay=0.1, **options
    )
    torch.testing.assert_close(held["weight"].detach(), expected, rtol=1e-12, atol=1e-14)


def test_the_first_step_in_closed_form():
    # The first step's moments are g and g^2 whatever the betas, so that it is the sign of g but for eps.
    weight = nn.Parameter(torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64))
    mask = {"weight": torch.tensor([True, False, True])}
    optimizer = MaskedAdamW([("weight", weight)], mask, 0.1, 0.01, weight_decay=0.5, eps=0.0)
    weight.grad = torch.tensor([3.0, 3.0, -7.0], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([2 * 0.95 - 0.1, 2 * 0.995 - 0.01, 2 * 0.95 + 0.1], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("frozen", ["inside", "outside"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("density", [0.05, 0.3], ids=["held as indices", "held as booleans"])
@pytest.mark.usefixtures("small_stretches")
def test_an_element_with_rate_0_never_changes_whatever_its_gradient(frozen, implementation, density):
    starts, masks = subject(density=density)
    held = parameters(starts)
    rates = (0.0, 0.1) if frozen == "inside" else (0.1, 0.0)
    optimizer = MaskedAdamW(held.items(), masks, *rates, weight_decay=0.3, **IMPLEMENTATIONS[implementation])
    steps = gradients(starts, 5)
    still = {name: masks.get(name, torch.zeros(()).bool()) == (frozen == "inside") for name in starts}
    for name in starts:
        steps[2][name][still[name].expand(starts[name].shape)] = float("nan")
    train(optimizer, held, steps)
    for name, start in starts.items():
        mine = still[name].expand(start.shape)
        assert same_bits({"": held[name][mine]}, {"": start[mine]})
        moving = held[name][~mine]
        assert not torch.equal(moving, start[~mine]) or not moving.numel()
        assert moving.isfinite().all()


@given(
    shape=st.lists(st.integers(0, 9), max_size=3),
    density=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    rates=st.tuples(*[st.sampled_from([0.0, 1e-3, 0.1])] * 2),
    steps=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_dtype_and_density(shape, density, dtype, rates, steps):
    starts, _ = subject({"weight": tuple(shape)}, dtype)
    masks = {"weight": torch.rand(shape, generator=torch.Generator().manual_seed(3)) < density}
    held = parameters(starts)
    course = gradients(starts, steps)
    train(MaskedAdamW(held.items(), masks, *rates, foreach=True), held, course)
    expected = two_whole_runs(starts, course, masks, [rates] * steps, foreach=True)
    if rates == (0.0, 0.0):
        # The same at both rates is torch's, which turns -0.0 into 0.0 at rate 0.
        assert torch.equal(held["weight"], expected["weight"])
    else:
        assert same_bits(expected, held)


def test_other_memory_layouts():
    starts = {"conv": torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), "part": torch.randn(8, 6)[:, ::2]}
    masks = {name: torch.rand(start.shape) < 0.5 for name, start in starts.items()}
    held = {name: nn.Parameter(start.clone()) for name, start in starts.items()}
    assert not held["conv"].is_contiguous()
    steps = gradients(starts, 3)
    train(MaskedAdamW(held.items(), masks, 0.1, 0.01), held, steps)
    assert same_bits(two_whole_runs(starts, steps, masks, [(0.1, 0.01)] * 3), held)


def test_a_scheduler_moves_both_rates():
    starts, masks = subject()
    held = parameters(starts)
    # Powers of two, so that the products are exact.
    optimizer = MaskedAdamW(held.items(), masks, 2**-4, 2**-7)
    scheduler = LambdaLR(optimizer, lambda step: 2.0**-step if step < 4 else 0.0)
    steps = gradients(starts, 6)
    train(optimizer, held, steps, scheduler)
    rates = [(2.0 ** -(4 + step), 2.0 ** -(7 + step)) for step in range(4)]
    expected = two_whole_runs(starts, steps[:4], masks, rates)
    assert same_bits(expected, held), "the last two steps have rate 0 and change nothing"


def test_a_scheduler_that_sets_rates_outright_keeps_their_ratio():
    starts, masks = subject()
    held = parameters(starts)
    optimizer = MaskedAdamW(held.items(), masks, 1e-3, 4e-3)
    scheduler = OneCycleLR(optimizer, max_lr=8e-3, total_steps=10, cycle_momentum=False)
    train(optimizer, held, gradients(starts, 3), scheduler)
    inside, outside = masked_adamw_rates(optimizer)
    assert outside == optimizer.param_groups[0]["lr"]
    assert inside == pytest.approx(outside / 4, rel=1e-12)


def masked_adamw_rates(optimizer):
    from lightning_goldy.optim.masked_adamw import current_rates

    return current_rates(optimizer.param_groups[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(implementation, amsgrad):
    starts, masks = subject()
    options = {"amsgrad": amsgrad, **IMPLEMENTATIONS[implementation]}
    steps = gradients(starts, 10)
    whole = parameters(starts)
    train(MaskedAdamW(whole.items(), masks, 1e-2, 0.0, **options), whole, steps)
    first = parameters(starts)
    optimizer = MaskedAdamW(first.items(), masks, 1e-2, 0.0, **options)
    train(optimizer, first, steps[:4])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = parameters({name: parameter.detach() for name, parameter in first.items()})
    again = MaskedAdamW(second.items(), masks, 0.5, 0.5, **options)
    again.load_state_dict(torch.load(file, weights_only=True))
    train(again, second, steps[4:])
    assert same_bits(whole, second)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_states_pass_between_torchs_adamw_and_this_one(implementation):
    starts, masks = subject()
    options = IMPLEMENTATIONS[implementation]
    steps = gradients(starts, 9)
    expected, held = parameters(starts), parameters(starts)
    train(torch.optim.AdamW(expected.values(), lr=1e-2, **options), expected, steps)
    first = torch.optim.AdamW(held.values(), lr=1e-2, **options)
    train(first, held, steps[:3])
    second = MaskedAdamW(held.items(), masks, 1e-2, 1e-2, **options)
    second.load_state_dict(first.state_dict())
    train(second, held, steps[3:6])
    third = torch.optim.AdamW(held.values(), lr=1e-2, **options)
    third.load_state_dict(second.state_dict())
    train(third, held, steps[6:])
    assert same_bits(expected, held)
    second.load_state_dict(third.state_dict())
    assert (second.param_groups[0]["lr_inside"], second.param_groups[0]["lr_outside"]) == (1e-2, 1e-2)


def test_a_state_of_torch_keeps_the_two_rates():
    starts, masks = subject()
    held = parameters(starts)
    reference = torch.optim.AdamW(held.values(), lr=1e-3)
    train(reference, held, gradients(starts, 1))
    optimizer = MaskedAdamW(held.items(), masks, 1e-3, 1e-5)
    optimizer.load_state_dict(reference.state_dict())
    before = {name: parameter.detach().clone() for name, parameter in held.items()}
    train(optimizer, held, gradients(starts, 1, seed=2))
    moved = {name: (held[name] - before[name]).abs() for name in ("weight", "other")}
    for name, change in moved.items():
        assert change[masks[name]].median() > 50 * change[~masks[name]].median()


def test_groups_with_rates_of_their_own():
    starts, masks = subject()
    held = parameters(starts)
    groups = [
        {"params": [("weight", held["weight"])], "lr_inside": 0.1, "lr_outside": 0.1, "weight_decay": 0.0},
        {"params": [(name, held[name]) for name in starts if name != "weight"]},
    ]
    optimizer = MaskedAdamW(groups, masks, 0.01, 0.0)
    steps = gradients(starts, 3)
    train(optimizer, held, steps)
    first = two_whole_runs(starts, steps, masks, [(0.1, 0.1)] * 3, weight_decay=0.0)
    second = two_whole_runs(starts, steps, masks, [(0.01, 0.0)] * 3)
    assert same_bits({"weight": first["weight"]}, held)
    assert same_bits({name: second[name] for name in starts if name != "weight"}, held)


def test_a_mask_may_come_later_and_change():
    starts, masks = subject()
    held = parameters(starts)
    optimizer = MaskedAdamW(held.items(), None, 0.1, 0.0)
    assert optimizer.mask is None
    with pytest.raises(RuntimeError, match=r"no mask.*0.1 inside, 0.0 outside.*set_mask"):
        train(optimizer, held, gradients(starts, 1))
    optimizer.set_mask(masks)
    train(optimizer, held, gradients(starts, 1))
    after = {name: parameter.detach().clone() for name, parameter in held.items()}
    optimizer.set_mask({})
    train(optimizer, held, gradients(starts, 3))
    assert same_bits(after, held)


@pytest.mark.parametrize("density", [0.001, 0.12, 0.13, 0.9])
def test_the_mask_is_held_once_in_at_most_a_byte_per_element(density):
    starts, masks = subject({"weight": (400, 300), "other": (64,)}, density=density)
    held = parameters(starts)
    optimizer = MaskedAdamW(held.items(), masks, 0.1, 0.0)
    found = optimizer.mask
    assert isinstance(found, ParameterMask)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: m.tolist() for n, m in masks.items()}
    assert all(held.nbytes <= parameter.numel() for parameter, held in optimizer._masks.items())
    masks["weight"].logical_not_()
    assert not torch.equal(found["weight"], masks["weight"]), "a caller's later change is not taken over"
    train(optimizer, held, gradients(starts, 1))
    assert {key for state in optimizer.state.values() for key in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert "mask" not in str(optimizer.state_dict().keys())


def test_a_parameter_mask_of_a_part_of_the_model_leaves_the_rest_outside():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    mask = ParameterMask.random(ParameterSpace.of(model, ["1.*"]), 50)
    before = copy.deepcopy(model.state_dict())
    optimizer = MaskedAdamW(torch.compile(model).named_parameters(), mask, 0.1, 0.0)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        wanted = mask[name] if name in mask else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(value != before[name], wanted & (value != before[name]))
        assert ((value != before[name]) == wanted).all() or name == "1.weight"


def test_a_copy_goes_on_by_itself():
    starts, masks = subject()
    held = parameters(starts)
    optimizer = MaskedAdamW(held.items(), masks, 0.1, 0.0)
    train(optimizer, held, gradients(starts, 2))
    twin, both = copy.deepcopy((optimizer, held))
    train(optimizer, held, gradients(starts, 2, seed=5))
    train(twin, both, gradients(starts, 2, seed=5))
    assert same_bits(held, both)


def test_a_closure_gives_the_loss_and_missing_gradients_are_left_out():
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([("first", first), ("second", second)], {"first": torch.ones(3).bool()}, 0.1, 0.1 / 2)

    def closure():
        optimizer.zero_grad()
        loss = (first * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 6
    assert second.tolist() == [1, 1, 1]
    assert second not in optimizer.state


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda w: MaskedAdamW([w], {}), TypeError, "named_parameters"),
        (lambda w: MaskedAdamW([("w", w)], {}, -1.0), ValueError, "lr_inside must be a finite number.*-1.0"),
        (lambda w: MaskedAdamW([("w", w)], {}, 1.0, float("nan")), ValueError, "lr_outside.*nan"),
        (lambda w: MaskedAdamW([("w", w)], {}, torch.tensor(1.0)), TypeError, "lr_inside is a number"),
        (lambda w: MaskedAdamW([("w", w)], {}, differentiable=True), ValueError, "differentiable=True"),
        (lambda w: MaskedAdamW([{"params": [("w", w)], "lr": 1.0}], {}), ValueError, "in place of lr; got lr=1.0"),
        (lambda w: MaskedAdamW([{"params": [("w", w)], "lr_inside": -2.0}], {}), ValueError, "group's lr_inside"),
        (lambda w: MaskedAdamW([("w", w)], {"v": torch.ones(2).bool()}), SpaceError, "names 'v'.*Valid: w"),
        (
            lambda w: MaskedAdamW([("w", w)], {"w": torch.ones(2)}),
            ValueError,
            "w: a mask is boolean",
        ),
        (
            lambda w: MaskedAdamW([("w", w)], {"w": torch.ones(3).bool()}),
            SpaceError,
            r"w: mask of shape \(3,\)",
        ),
        (lambda w: MaskedAdamW([("w", nn.Parameter(w * 1j))], {}), ValueError, "w is complex"),
        (lambda w: MaskedAdamW([("w", w)], {}, foreach=True, fused=True), RuntimeError, "cannot be `True` together"),
    ],
)
def test_what_cannot_work_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(nn.Parameter(torch.ones(2)))


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = MaskedAdamW(table.named_parameters(), {"weight": torch.ones(4, 2).bool()})
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_the_fused_step_takes_a_scalers_factor(found):
    starts, masks = subject({"weight": (6, 5)})
    steps = gradients(starts, 2)
    scaled = [{name: gradient * 8 for name, gradient in step.items()} for step in steps]
    held = parameters(starts)
    optimizer = MaskedAdamW(held.items(), masks, 0.1, 0.01, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(found)
    train(optimizer, held, scaled)
    expected = starts if found else two_whole_runs(starts, steps, masks, [(0.1, 0.01)] * 2, fused=True)
    assert same_bits(expected, held)
    assert optimizer.state[held["weight"]]["step"].item() == (0 if found else 2)
