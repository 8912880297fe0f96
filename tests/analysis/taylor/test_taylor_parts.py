from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jvp

from lightning_goldy.analysis import TaylorApproximation, TaylorDiffResult, change_attribution, taylor_diff
from lightning_goldy.analysis.taylor import approximation as approximation_module
from lightning_goldy.analysis.taylor import taylor as terms_module
from lightning_goldy.analysis.taylor.approximation import batch_parts, logits_by_parts, parts_of_order
from lightning_goldy.core import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    ParameterSpace,
    ParameterVector,
)
from lightning_goldy.core.autodiff import Jet
from lightning_goldy.core.objective import IGNORE_INDEX, map_batch
from tests.core.test_autodiff import without_casts  # noqa: F401  a fixture
from tests.references.models import build, class_batch, token_batch


def moved(model: nn.Module, size: float = 0.02, space: ParameterSpace | None = None) -> ParameterVector:
    base = ParameterVector.of(model, space)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in base.space.resolve(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return base


def flat(found: TaylorDiffResult) -> dict[str, float]:
    """All numbers of a result under one level of names."""
    numbers = {
        name: getattr(found, name)
        for name in ("base_loss", "loss", "first_order", "second_order", "step_norm", "gradient_norm", "n_targets")
    }
    for fit in found.fits:
        numbers |= {f"{name}{fit['order']}": value for name, value in fit.items() if value is not None}
    numbers |= {f"loss {name}": share for name, share in found.loss_shares.items()}
    return numbers | {f"function {name}": share for name, share in found.function_shares.items()}


def padded(side: str) -> dict[str, Tensor]:
    """Five samples of several lengths, one of them without a target."""
    batch = {name: tensor.clone() for name, tensor in token_batch(5, 9).items()}
    mask = torch.ones(5, 9, dtype=torch.long)
    for row, padding in enumerate((0, 3, 1, 0, 2)):
        if padding:
            mask[row, slice(padding) if side == "left" else slice(-padding, None)] = 0
    batch["attention_mask"] = mask
    batch["labels"] = batch["input_ids"].masked_fill(mask == 0, IGNORE_INDEX)
    batch["labels"][2] = IGNORE_INDEX
    return batch


CASES = {
    "gpt2": ("gpt2", CausalLMObjective(), token_batch(5, 8)),
    "padding on the right": ("llama", CausalLMObjective(), padded("right")),
    "padding on the left": ("gpt2", CausalLMObjective(), padded("left")),
    "classes": ("bert", ClassifierObjective(), class_batch(5, 8)),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("function_space", [True, False])
@pytest.mark.usefixtures("without_casts")
def test_parts_add_up_to_the_whole(case: str, function_space: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    family, objective, batch = CASES[case]
    model = build(family).double().eval()
    base = moved(model)

    def compare() -> dict[str, float]:
        return flat(taylor_diff(model, base, [batch], objective, by="tensor", function_space=function_space))

    monkeypatch.setattr(terms_module, "_PART", 1)
    by_parts = compare()
    monkeypatch.setattr(terms_module, "parts_of_order", lambda order, gradients: 1)
    monkeypatch.setattr(terms_module, "_PIECE", 1 << 30)
    assert by_parts == pytest.approx(compare(), rel=1e-9, abs=1e-13)


def test_pieces_of_the_logits_add_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2").double().eval()
    base = moved(model)
    whole = flat(taylor_diff(model, base, [token_batch(3, 8)], by=None))
    monkeypatch.setattr(terms_module, "_PIECE", 1)
    assert flat(taylor_diff(model, base, [token_batch(3, 8)], by=None)) == pytest.approx(
        whole, rel=1e-12, abs=1e-14, nan_ok=True
    )


@pytest.mark.parametrize("family", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("without_casts")
def test_the_loss_by_way_of_logits_has_the_derivatives_of_the_loss_itself(family: str) -> None:
    model = build(family).double().eval()
    base = moved(model)
    batch, objective = token_batch(4, 8), CausalLMObjective()
    found = flat(taylor_diff(model, base, [batch], objective, orders=(1, 2, 3), function_space=False))
    own = taylor_diff(model, base, [batch], FunctionObjective(objective.loss), orders=(1, 2, 3), function_space=False)
    expected = flat(own) | {"n_targets": found["n_targets"]}
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-13)


def test_a_loss_that_couples_samples_is_never_cut() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    base = moved(model, 1.0)
    coupled = FunctionObjective(lambda model, x: model(x).mean() ** 2)
    x = torch.randn(8, 3, dtype=torch.float64)
    found = taylor_diff(model, base, [x], coupled, function_space=False, by=None)

    def along(t: Tensor) -> Tensor:
        weight = base["weight"] + t * (model.weight.detach() - base["weight"])
        return (x @ weight.t() + base["bias"] + t * (model.bias.detach() - base["bias"])).mean() ** 2

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, second = jvp(lambda t: jvp(along, (t,), (one,))[1], (zero,), (one,))
    assert found.second_order == pytest.approx(float(second) / 2, rel=1e-12)
    assert abs(found.orders[1].residual) < 1e-12


def sizes(batch: Any, objective: Any, count: int) -> list[int]:
    parts = batch_parts(batch, objective, count)
    return [len(part[0] if isinstance(part, tuple) else part["input_ids"]) for part in parts]


def test_batches_are_cut_where_that_is_safe() -> None:
    causal, classes = CausalLMObjective(), ClassifierObjective()
    assert [parts_of_order(order) for order in (1, 2, 3)] == [2, 4, 8]
    assert parts_of_order(2, gradients=True) == 8
    assert sizes(token_batch(8, 6), causal, 4) == [2, 2, 2, 2]
    assert sizes(token_batch(5, 6), causal, 4) == [2, 2, 1]
    assert sizes(token_batch(1, 6), causal, 4) == [1]
    assert sizes(padded("left"), causal, 8) == [1, 1, 1, 1]
    assert sizes((torch.zeros(4, 2), torch.tensor([0, IGNORE_INDEX, 1, 2])), classes, 2) == [2, 1]
    assert sizes(class_batch(6, 8), classes, 3) == [2, 2, 2]

    class Weighted(CausalLMObjective):
        pass

    for objective in (Weighted(), FunctionObjective(causal.loss)):
        assert sizes(token_batch(8, 6), objective, 4) == [8]
    uneven = {**token_batch(4, 6), "position_ids": torch.arange(6)[None]}
    assert sizes(uneven, causal, 4) == [4]


def test_a_batch_without_any_target_is_refused_as_before() -> None:
    model = build("gpt2").eval()
    batch = padded("left")
    batch["labels"][:] = IGNORE_INDEX
    with pytest.raises(ValueError, match="a batch of 5 samples of 9 tokens has no target"):
        taylor_diff(model, moved(model), [batch])


def test_progress_counts_batches_and_not_parts() -> None:
    model = build("gpt2").eval()
    told: list[tuple[int, int]] = []
    taylor_diff(
        model,
        moved(model),
        [token_batch(4, 6), token_batch(3, 6)],
        by=None,
        progress=lambda done, of: told.append((done, of)),
    )
    assert told == [(1, 2), (2, 2)]


CALLS = {
    "ids": lambda batch: ((), {"input_ids": batch["input_ids"]}),
    "by position": lambda batch: ((batch["input_ids"],), {"use_cache": False}),
    "padding": lambda batch: (
        (),
        {**map_batch(batch, lambda tensor: tensor), "position_ids": torch.arange(9)[None], "use_cache": False},
    ),
    "last logits": lambda batch: ((), {"input_ids": batch["input_ids"], "logits_to_keep": 3}),
    "as many positions as samples": lambda batch: (
        (),
        {"input_ids": batch["input_ids"], "logits_to_keep": torch.tensor([8, 1, 0, 2, 5])},
    ),
}


@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.usefixtures("without_casts")
def test_an_approximation_by_parts_is_that_of_the_whole(call: str, order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").double().eval()
    approximation = TaylorApproximation(model, moved(model), order)
    args, kwargs = CALLS[call](padded("right"))
    calls: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])),
        with_kwargs=True,
    )
    found = approximation(*args, **kwargs).logits
    assert len(calls) == {1: 2, 2: 3}[order]
    assert sum(calls) == 5
    monkeypatch.setattr(approximation_module, "parts_of_order", lambda order: 1)
    torch.testing.assert_close(found, approximation(*args, **kwargs).logits, rtol=1e-10, atol=1e-12)


def test_calls_that_are_not_a_language_models_stay_whole() -> None:
    model = build("gpt2").eval()
    ids = torch.zeros(4, 3, dtype=torch.long)

    def lengths(args: tuple[Any, ...], kwargs: dict[str, Any], model: nn.Module = model) -> list[int]:
        seen: list[int] = []

        def logits(some: Any, named: Any) -> Tensor:
            tensor = next(each for each in (*some, *named.values()) if isinstance(each, Tensor))
            seen.append(len(tensor))
            return tensor

        logits_by_parts(model, logits, args, kwargs, 2)
        return seen

    assert lengths((ids,), {}) == [2, 2]
    assert lengths((ids,), {"past_key_values": ((ids, ids),)}) == [4]
    assert lengths((ids,), {"encoder_hidden_states": torch.zeros(4, 3, 16)}) == [4]
    assert lengths((ids,), {"attention_mask": torch.ones(3, 3)}) == [4]
    assert lengths((torch.zeros(4, 2),), {}, nn.Linear(2, 2)) == [4]
    # What does not come out one row per sample is asked for at once.
    rows: list[int] = []

    def total(some: Any, named: Any) -> Tensor:
        rows.append(len(some[0] if some else named["input_ids"]))
        return torch.zeros(())

    assert logits_by_parts(model, total, (ids,), {}, 2).shape == ()
    assert rows == [2, 4]


@pytest.mark.parametrize("patterns", [("*",), ("*ln_*",)], ids=["all", "some"])
def test_no_graph_is_kept_of_any_parameter(patterns: tuple[str, ...]) -> None:
    model = build("gpt2").eval()
    base = moved(model, space=ParameterSpace.of(model, include=patterns))
    recorded: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        tensor = output
        if isinstance(tensor, Jet):
            recorded.extend(part.requires_grad for part in tensor.parts if part is not None)
            return
        while True:
            recorded.append(tensor.requires_grad)
            if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                return
            tensor = torch._C._functorch.get_unwrapped(tensor)

    model.lm_head.register_forward_hook(look)
    TaylorApproximation(model, base, 2)(**token_batch(2, 6))
    taylor_diff(model, base, [token_batch(2, 6)], by=None)
    assert len(recorded) > 6
    assert not any(recorded)


def test_shares_of_some_parameters_leave_no_gradient_on_the_others() -> None:
    model = build("gpt2").double().eval()
    base = moved(model, space=ParameterSpace.of(model, include=["*ln_*"]))
    batch, objective = token_batch(3, 6), CausalLMObjective()
    found = taylor_diff(model, base, [batch], by="tensor")
    assert all(parameter.grad is None for parameter in model.parameters())
    step = {name: model.get_parameter(name).detach() - value for name, value in base.items()}
    with torch.no_grad():
        for name, value in base.items():
            model.get_parameter(name).copy_(value)
    gradients = torch.autograd.grad(objective.loss(model, batch), [model.get_parameter(name) for name in base])
    expected = {name: float((g * step[name]).sum()) for name, g in zip(base, gradients, strict=True)}
    assert found.loss_shares == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert found.gradient_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients)), rel=1e-9)


def test_a_parameter_that_the_loss_does_not_see_has_a_gradient_of_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "spare": nn.Linear(2, 1)})
    base = moved(model)
    objective = FunctionObjective(lambda model, x: model(x).square().mean())

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = model["used"], model["spare"]

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    assert base.space.names[0].startswith("used")
    found = taylor_diff(Part(), base, [torch.ones(2, 2)], objective, function_space=False, by="tensor")
    assert found.loss_shares["spare.weight"] == found.loss_shares["spare.bias"] == 0
    assert math.fsum(found.loss_shares.values()) == pytest.approx(found.first_order, rel=1e-5)
    nothing = FunctionObjective(lambda model, x: x.mean() + 0 * model(x).detach().sum())
    with pytest.raises(ValueError, match=r"depends on none of the 4 parameters that the base holds"):
        taylor_diff(Part(), base, [torch.ones(2, 2)], nothing, function_space=False)


def test_a_padding_token_that_is_read_counts_in_shares_and_contributions() -> None:
    model, batch = build("llama"), token_batch()
    embedding = model.get_input_embeddings()
    batch["input_ids"][:, ::3] = 1
    batch["labels"] = batch["input_ids"].masked_fill(batch["labels"] == IGNORE_INDEX, IGNORE_INDEX)
    base = moved(model, 0.002)
    expected = taylor_diff(model, base, [batch])
    embedding.padding_idx = 1  # as of a model whose padding token ends its turns, too
    found = taylor_diff(model, base, [batch])
    assert found.first_order == expected.first_order
    assert found.loss_shares == expected.loss_shares
    contributions = change_attribution(model, base, [batch], shares=())
    assert abs(contributions.metrics()["gap"]) < 0.01
    assert embedding.padding_idx == 1
