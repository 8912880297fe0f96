"""Change attribution the slow obvious way: a midpoint sum over many models between base and finetune."""

from __future__ import annotations

import copy
import functools

import torch
from torch import Tensor, nn

from lightning_goldy.analysis import ChangeAttributionResult
from lightning_goldy.core import CausalLMObjective
from tests.references.models import build, token_batch


def riemann_attribution(model: nn.Module, base: nn.Module, value, points: int = 512) -> dict[str, torch.Tensor]:
    """Of every element its change times the mean gradient of ``value(model)`` along the straight line."""
    between = copy.deepcopy(model).eval()
    ends = [dict(end.named_parameters()) for end in (base, model)]
    total = {name: torch.zeros_like(parameter) for name, parameter in between.named_parameters()}
    for point in range(points):
        t = (point + 0.5) / points
        with torch.no_grad():
            for name, parameter in between.named_parameters():
                parameter.copy_((1 - t) * ends[0][name] + t * ends[1][name])
        names, parameters = zip(*between.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value(between), parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient / points
    return {name: (ends[1][name] - ends[0][name]).detach() * gradient for name, gradient in total.items()}


def moved(base: nn.Module, other: nn.Module, step: float) -> nn.Module:
    """The base, a part of the way towards another model of its shapes."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, target in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(target, step)
    return model


def pairs_of_tokens(step: int, seed: int) -> dict:
    """Tokens in pairs, of which the second, the only target, is the first moved on by a step."""
    batch = token_batch(32, 12, seed=seed)
    batch["input_ids"][:, 1::2] = 1 + (batch["input_ids"][:, ::2] - 1 + step) % 52
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, ::2] = -100
    return batch


def _trained(model: nn.Module, *, step: int, n_steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for seed in range(n_steps):
        CausalLMObjective().loss(model, pairs_of_tokens(step, seed + 10)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@functools.cache
def finetuned_pair() -> tuple[nn.Module, nn.Module, dict, dict]:
    """A model that says the next token, its base that says each again, samples that score, and samples held out."""
    base = _trained(build("gpt2", 0), step=0, n_steps=60)
    model = _trained(copy.deepcopy(base), step=1, n_steps=40)
    ids = pairs_of_tokens(step=1, seed=9)
    scored, held_out = ({key: value[rows] for key, value in ids.items()} for rows in (slice(16), slice(16, 32)))
    return model, base, scored, held_out


def units_of(result: ChangeAttributionResult, kind: str) -> dict[str, Tensor]:
    """What units of one kind contribute, by place.

    Args:
        result: Of :func:`change_attribution`.
        kind: ``head``, ``key_value``, ``neuron``, ``row`` or ``rest``.
    """
    found: dict[str, Tensor] = {}
    for unit in result.units:
        if unit["kind"] == kind:
            found[unit["place"]] = (
                torch.cat([found[unit["place"]], unit["values"]]) if unit["place"] in found else unit["values"]
            )
    return found
