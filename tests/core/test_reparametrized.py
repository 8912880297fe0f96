"""Parameters that come to be computed of others are plain inside, and the module is as it was outside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lightning_goldy.core.space import ParameterSpace, SpaceError, hidden_parts, plain_parameters


def pruned_twice(layer: nn.Linear) -> None:
    prune.l1_unstructured(layer, "weight", 0.3)
    prune.random_structured(layer, "weight", 0.5, dim=0)


WAYS: dict[str, Callable[[nn.Linear], object]] = {
    "prune": pruned_twice,
    "weight_norm": lambda layer: weight_norm(layer, "weight"),
    "spectral_norm": lambda layer: spectral_norm(layer, "weight"),
    "parametrized weight norm": lambda layer: parametrizations.weight_norm(layer, "weight"),
    "parametrized spectral norm": lambda layer: parametrizations.spectral_norm(layer, "weight"),
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, "weight"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("way", WAYS)
def test_inside_it_is_a_plain_parameter_of_the_values_that_are_computed_with(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    space = ParameterSpace.of(model)
    WAYS[way](model[1])
    # A second one of the same module, which was there before and stays.
    parametrize.register_parametrization(model[1], "bias", nn.Softplus())
    x = torch.ones(1, 3)
    known = set(space) - {"1.bias"}
    before, names, kind = model(x), list(dict(model.named_parameters())), type(model[1])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert "1.weight" not in names
    assert hidden_parts(model, known)
    with plain_parameters(model, known) as told:
        inside = dict(model.named_parameters())
        assert inside["1.weight"].requires_grad
        assert [note.startswith("1.weight is computed of") for note in told] == [True]
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
        inside["1.weight"].data.add_(1)
        assert not torch.equal(model(x), before)
        model(x).sum().backward()
        assert inside["1.weight"].grad is not None
    assert (list(dict(model.named_parameters())), type(model[1])) == (names, kind)
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in state.items()
    }
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    refused = pytest.raises(SpaceError, match=r"HeadPlasticity changes parameters, and 1\.weight has come to be")
    with refused, plain_parameters(model, known, changes="HeadPlasticity"):
        pass


def test_what_was_computed_from_the_beginning_stays() -> None:
    layer = parametrizations.weight_norm(nn.Linear(2, 2))
    known = set(ParameterSpace.of(layer))
    with plain_parameters(layer, known) as told:
        assert (told, set(dict(layer.named_parameters()))) == ([], known)
    assert hidden_parts(layer, known) == set()
