"""How much of parameter space gives the predictions of a trained model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lightning_goldy.analysis.divergence import AnchoredDivergence, Cache, check_cache, shortened
from lightning_goldy.analysis.volume import local_volume
from lightning_goldy.analysis.volume_result import VolumeResult, best_of
from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.ray import Preconditioner
from lightning_goldy.core.sharding import unshard_guard


def basin_volume(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    cutoff: float = 1e-2,
    preconditioner: Preconditioner | Mapping[str, Preconditioner | None] | None = None,
    cache: Cache = "auto",
    cache_dtype: torch.dtype | None = None,
    val_size: int | None = None,
    max_seq_len: int | None = None,
    **options: Any,
) -> VolumeResult:
    r"""Estimates the log-volume of the region around a model where its predictions stay within a KL divergence.

    .. math:: B = \Big\{\theta : \tfrac{1}{|T|} \sum_{t \in T}
        \mathrm{KL}\big(p_A(\cdot \mid x_{<t}) \,\|\, p_\theta(\cdot \mid x_{<t})\big) \le \text{cutoff}\Big\}

    taken as far as it can be seen from the anchor along straight lines. See
    :func:`~lightning_goldy.analysis.volume.local_volume` for the estimator and its other options. One forward pass per
    batch and evaluation, about two evaluations per direction.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module: the anchor.
        batches: Batches that the objective understands, the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        cutoff: The mean divergence at the boundary, nats per target.
        preconditioner: One, or several proposals by name (None for the plain one), of which the best is returned with
            every one's own numbers.
        cache: Where the anchor's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.
        cache_dtype: Of what is kept; a rounder dtype than the logits' adds the ``anchor_cost`` of the result to every
            divergence.
        val_size: Use only the first so many samples.
        max_seq_len: Use only the first so many tokens of each sample.
        **options: ``n_directions``, ``sigma``, ``measure``, ``rtol``, ``max_evaluations``, ``max_radius``, ``l2_reg``,
            ``seed``, ``first_direction``, ``space``, ``directions``, ``progress`` and ``split_over_ranks`` of
            ``local_volume``.

    Returns:
        The estimates, direction by direction, in nats.

    Raises:
        ValueError: An argument is out of range, there is no sample, or a weight is not finite.

    Source: Scherlis and Belrose, "Estimating the Probability of Sampling a Trained Neural Network at Random",
    arXiv 2501.18812, section 4.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 2]))
        >>> result = basin_volume(nn.Linear(3, 3), [batch], ClassifierObjective(), n_directions=4)
        >>> result.log_volume < 0, len(result.estimates)
        (True, 4)
    """
    check_cache(cache, cache_dtype)
    objective = objective or CausalLMObjective()
    device = next(model.parameters()).device
    unshard_guard(model)
    chosen = [
        map_batch(batch, lambda tensor: tensor.to(device))
        for batch in shortened(batches, objective, val_size, max_seq_len)
    ]
    with preserved(model):
        divergence = AnchoredDivergence(model, chosen, objective, cache=cache, cache_dtype=cache_dtype)

        def volume(proposal: Preconditioner | None) -> VolumeResult:
            return local_volume(model, divergence, cutoff=cutoff, preconditioner=proposal, **options)

        if not isinstance(preconditioner, Mapping):
            return volume(preconditioner)
        best = best_of({name: volume(proposal) for name, proposal in preconditioner.items()})
    spent = sum(numbers["evaluations"] for numbers in best.proposals.values())
    # What the other proposals cost belongs to the choice.
    return dataclasses.replace(best, extra_evaluations=spent - int(best.evaluations.sum()))
