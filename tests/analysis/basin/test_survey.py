"""Volumes of several splits and cutoffs: what they cost, which proposals they use, what a row says of them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from lightning_goldy.analysis.basin import (
    BasinVolumes,
    Estimator,
    KroneckerPreconditioner,
    Selection,
    VolumeSurvey,
    adam_preconditioner,
    basin_volume,
    fit_exponents,
    kronecker_fisher,
    kronecker_preconditioner,
    tuned_preconditioner,
)
from lightning_goldy.core import ClassifierObjective, ParameterSpace

OBJECTIVE = ClassifierObjective()


def subject() -> tuple[nn.Module, torch.optim.Adam]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for batch in batches(3):
        optimizer.zero_grad()
        OBJECTIVE.loss(model, batch).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval(), optimizer


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of three samples."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3, 4, generator=generator), torch.randint(3, (3,), generator=generator)) for _ in range(2)]


def survey_of(**options: Any) -> VolumeSurvey:
    return VolumeSurvey(**{"n_directions": 3, "cutoffs": (1e-2,), **options})


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize("preconditioner", ["none", "adam", "best", "kronecker"])
def test_the_cost_is_every_sample_that_passed_through_the_model(preconditioner: Any, cache: Any) -> None:
    model, optimizer = subject()
    forwards, backwards = [], []

    def count(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        forwards.append(len(output))
        if output.requires_grad:
            output.register_hook(lambda gradient: backwards.append(len(gradient)))

    handle = model.register_forward_hook(count)
    survey = survey_of(
        cutoffs=(1e-2, 1e-3), preconditioner=preconditioner, n_samples=5, estimator=Estimator(cache=cache)
    )
    adam = partial(adam_preconditioner, optimizer, ParameterSpace.of(model), module=model)
    for _ in range(2):
        forwards.clear()
        backwards.clear()
        found = survey.measure(model, OBJECTIVE, {"a": batches(0), "b": batches(1)}, adam=lambda eps: adam(eps=eps))
        assert (found.cost.forwards, found.cost.backwards) == (sum(forwards), sum(backwards))
        assert found.cost.backwards == (10 if preconditioner in ("kronecker", "best") else 0)
        assert found.row().cost == found.cost
    handle.remove()


@pytest.mark.parametrize("preconditioner", ["adam", "best", "kronecker"])
def test_where_nothing_leaves_the_region_the_volume_is_missing_and_no_run_ends(preconditioner: Any) -> None:
    model, optimizer = subject()
    with torch.no_grad():
        model[2].weight.mul_(1e-9)  # type: ignore[operator, union-attr]
        model[2].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False)
    space = ParameterSpace.of(model)
    survey = survey_of(preconditioner=preconditioner)
    with pytest.warns(UserWarning, match=r"no damping of .* gives a lower bound.*measured without a preconditioner"):
        found = survey.measure(
            model,
            OBJECTIVE,
            {"a": batches(0)},
            adam=lambda eps: adam_preconditioner(optimizer, space, module=model, eps=eps),
        )
    (result,) = found.volumes["a"]
    assert result.preconditioner == "none"
    assert found.eps is None
    assert len(result.unbounded) == 3


def test_kronecker_takes_each_splits_own_fisher_at_the_damping_of_the_first() -> None:
    model, _ = subject()
    survey = survey_of(preconditioner="kronecker", estimator=Estimator(seed=4, rtol=1e-3))
    found = survey.measure(model, OBJECTIVE, {"a": batches(0), "b": batches(1)})
    fisher = kronecker_fisher(model, batches(0), OBJECTIVE, seed=4)
    tuned = tuned_preconditioner(
        lambda eps: KroneckerPreconditioner(fisher, eps=eps),
        lambda proposal: basin_volume(
            model, batches(0), OBJECTIVE, preconditioner=proposal, n_directions=2, seed=5, rtol=1e-3
        ),
    )
    assert found.eps == tuned.eps
    for split, seed in (("a", 0), ("b", 1)):
        proposal = kronecker_preconditioner(model, batches(seed), OBJECTIVE, eps=tuned.eps, seed=4)
        expected = basin_volume(
            model, batches(seed), OBJECTIVE, n_directions=3, preconditioner=proposal, seed=4, rtol=1e-3
        )
        (result,) = found.volumes[split]
        assert result.preconditioner == "kronecker"
        assert torch.equal(result.estimates, expected.estimates)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_kronecker_without_a_linear_layer_is_refused() -> None:
    survey = survey_of(preconditioner="kronecker", selection=Selection(include=["*bias"]))
    with pytest.raises(ValueError, match=r"needs the weight of a linear layer .* none of the 2 selected parameters of"):
        survey.measure(subject()[0], OBJECTIVE, {"a": batches(0)})
    with pytest.raises(ValueError, match="measure='sphere' takes no preconditioner; got preconditioner='kronecker'"):
        survey_of(preconditioner="kronecker", estimator=Estimator(measure="sphere"))


def test_what_is_not_asked_for_is_not_used() -> None:
    model, optimizer = subject()
    adam = partial(adam_preconditioner, optimizer, ParameterSpace.of(model), module=model)
    found = survey_of().measure(model, OBJECTIVE, {"a": batches(0)}, adam=lambda eps: adam(eps=eps))
    assert (found.eps, found.details()["preconditioner_used"]) == (None, "none")
    assert found.volumes["a"][0].estimates.equal(basin_volume(model, batches(0), OBJECTIVE, n_directions=3).estimates)


def test_a_row_names_splits_and_cutoffs_and_the_only_split_not() -> None:
    model, _ = subject()
    names = {}
    for splits in (("probe",), ("probe-x", "b")):
        for cutoffs in ((1e-2,), (1, 1e-2)):
            found = survey_of(cutoffs=cutoffs).measure(model, OBJECTIVE, dict.fromkeys(splits, batches(0)))
            assert BasinVolumes.from_json(found.to_json()).row() == found.row()
            names[splits, len(cutoffs)] = [name for name in found.row().metrics if name.startswith("log_volume")]
            assert found.row().result["cutoffs"] == sorted(cutoffs)
    assert names[("probe",), 1] == ["log_volume"]
    assert names[("probe",), 2] == ["log_volume/0.01", "log_volume/1.0"]
    assert names[("probe-x", "b"), 1] == ["log_volume/probe-x", "log_volume/b"]
    assert names[("probe-x", "b"), 2][:2] == ["log_volume/probe-x-0.01", "log_volume/probe-x-1.0"]


def test_the_fit_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    cutoffs = [1e-4, 3e-4, 1e-2, 0.5]
    values = (torch.randn(4, generator=generator, dtype=torch.float64) * 10).tolist()
    design = torch.tensor([[1.0, math.log(cutoff)] for cutoff in cutoffs], dtype=torch.float64)
    solution = torch.linalg.lstsq(design, torch.tensor(values, dtype=torch.float64)[:, None]).solution.flatten()
    slope, intercept, smallest = fit_exponents(cutoffs, values)
    assert (intercept, slope) == pytest.approx(tuple(solution.tolist()), rel=1e-12)
    assert smallest == pytest.approx((values[1] - values[0]) / math.log(3), rel=1e-12)
    assert fit_exponents([0.1], [1.0]) is None
    assert fit_exponents([0.1, 0.2], [1.0, math.nan]) is None


def test_progress_reaches_the_number_of_directions():
    survey = VolumeSurvey(
        n_directions=4,
        cutoffs=(1e-3, 1e-2),
    )
    batch = (torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0]))
    told = []
    model = torch.nn.Linear(4, 3)
    survey.measure(
        model, ClassifierObjective(), {"a": [batch], "b": [batch]}, progress=lambda *counts: told.append(counts)
    )
    assert {total for _, total in told} == {16}
    done = [count for count, _ in told]
    assert done == sorted(done)
    assert 12 <= done[-1] <= 16
