"""Scores of the unmasked model, summed over samples: what a mask is that is chosen without a search."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.masked_divergence import SharedDivergence, taken_gradients, zeros_like_part
from lightning_goldy.analysis.scores import SCORES
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import local

SINGLE_SHOTS = ("gradient", "taylor", "fisher")
"""The scores that every search is measured against."""


def single_shot_scores(
    model: nn.Module,
    samples: SharedDivergence,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    extra: str,
) -> dict[str, dict[str, Tensor]]:
    r"""Sums of scores over the forward and backward passes of all pieces, by name of the score.

    .. math:: \sum_i |g_i|, \qquad \sum_i |g_i \theta|, \qquad \sum_i g_i^2 \theta^2

    The last is, up to a factor, the second-order estimate of the divergence that zeroing one element causes, with the
    Fisher matrix's diagonal taken at the data's own labels. At the unmasked weights the divergence has no gradient.

    Args:
        model: The unmasked module.
        samples: The pieces; each is one pass.
        objective: Gives the log-probabilities to differentiate.
        parameters: Name to parameter.
        extra: Another registered score to sum; may be one of the three.

    Returns:
        Name of a score to name of a parameter to this process's part, in at least float32.

    Raises:
        ValueError: A parameter has received no gradient; it is named.
    """
    first = {name: zeros_like_part(parameter) for name, parameter in parameters.items()}
    second = {name: zeros_like_part(parameter) for name, parameter in parameters.items()}
    own = {} if extra in SINGLE_SHOTS else {name: zeros_like_part(parameter) for name, parameter in parameters.items()}
    seen = dict.fromkeys(parameters, 0)
    for piece in samples.pieces:
        objective.log_probs(model, piece).mean().backward()
        for name, gradient in taken_gradients(model, parameters):
            seen[name] = 1
            first[name] += gradient.abs()
            second[name].addcmul_(gradient, gradient)
            if own:
                value = local(parameters[name])
                own[name] += SCORES[extra](gradient.clone(), value.to(gradient.dtype))
    _require_all(seen, samples, next(iter(first.values())).device)
    for sums in (first, second, own):
        for each in sums.values():
            samples.replicas.sum_(each)
    values = {name: local(parameter).to(first[name].dtype) for name, parameter in parameters.items()}
    scores = {
        "gradient": first,
        "taylor": {name: first[name] * value.abs() for name, value in values.items()},
        "fisher": {name: second[name].mul_(value.square()) for name, value in values.items()},
    }
    return scores | ({extra: own} if own else {})


def _require_all(seen: dict[str, int], samples: SharedDivergence, device: torch.device) -> None:
    total = samples.replicas.sum_(torch.tensor(list(seen.values()), dtype=torch.int32, device=device))
    missing = [name for name, count in zip(seen, total.tolist(), strict=True) if not count]
    if missing:
        raise ValueError(
            f"the objective does not depend on {missing[0]} ({len(missing)} such parameters): no sample gave it a "
            "gradient; leave it out with exclude="
        )
