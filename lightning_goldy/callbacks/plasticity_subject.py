"""The model that heads are cut from, with the samples that decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from lightning_goldy.analysis.attention_entropy import batch_length
from lightning_goldy.analysis.head_patterns import attention_maps
from lightning_goldy.analysis.head_probe import HeadProbe
from lightning_goldy.analysis.heads import HeadScores, head_importance, heads_to_regrow
from lightning_goldy.callbacks.plasticity_settings import Regrowth, Scoring
from lightning_goldy.core.gates import Head, HeadGates
from lightning_goldy.core.objective import Objective, map_batch
from lightning_goldy.core.sharding import Replicas

T = TypeVar("T")
# Forward passes per probe batch; a backward pass counts as two.
_PASSES = {"entropy": 1, "random": 0, "magnitude": 3, "taylor": 3, "combined": 4}


@dataclass
class PlasticitySubject:
    """A gated model, its probe, and what has been spent on them.

    Every answer is the same on all ranks to the last bit: rank 0's counts.

    Args:
        model: In evaluation mode, isolated from the training.
        gates: Its gates.
        batches: The probe, on the CPU.
        objective: How a batch becomes a loss.
        scoring: How heads are scored.
        evaluations: Forward passes spent so far.
    """

    model: nn.Module
    gates: HeadGates
    batches: Sequence[Any]
    objective: Objective
    scoring: Scoring
    evaluations: int = 0
    _loss: float | None = None

    def changed(self) -> None:
        """Says that gates or weights have changed, so that the loss must be measured anew."""
        self._loss = None

    def loss(self) -> float:
        """Mean loss of the probe's samples, nats.

        Raises:
            ValueError: It is not finite.
        """
        if self._loss is not None:
            return self._loss
        replicas = Replicas.of(self.model)
        probe = HeadProbe(self.model, self.batches, self.objective, gates=self.gates, replicas=replicas)
        loss = agreed(probe.loss())
        self.evaluations += len(self.batches)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of the probe is {loss}, not finite")
        self._loss = loss
        return loss

    def scores(self, strategy: str, cycle: int, progress: Any = None) -> HeadScores:
        """How important each head is now."""
        passes = _PASSES.get(strategy, len(self.gates.heads) + 1 if strategy == "ablation" else 3)
        self.evaluations += passes * len(self.batches)
        return head_importance(
            self.model,
            self.batches,
            self.objective,
            strategy=strategy,
            weights=self.scoring.weights,
            seed=self.scoring.seed + cycle,
            progress=progress,
        )

    def to_cut(self, scores: HeadScores, count: int, min_heads_per_layer: int) -> tuple[Head, ...]:
        """The heads to cut now, the least important first."""
        level = count / len(self.gates.heads)
        return agreed(scores.least_important(level, min_heads_per_layer=min_heads_per_layer, unit=self.scoring.unit))

    def to_regrow(self, count: int, regrowth: Regrowth, cycle: int) -> tuple[Head, ...]:
        """The closed heads to open now, the most wanted first.

        With ``copy`` a layer regrows no more heads than it has open ones to copy, so there may be fewer.
        """
        seed, closed = self.scoring.seed + cycle, len(self.gates.closed)
        ranking = heads_to_regrow(
            self.model, self.batches, self.objective, count=closed, strategy=regrowth.choice, seed=seed
        )
        self.evaluations += 3 * len(self.batches) if regrowth.choice == "gradient" else 0
        if self.scoring.unit == "group":
            ranking = self._whole_groups(ranking)
        if regrowth.initialisation == "copy":
            ranking = self._with_donors(ranking)
        return agreed(ranking[:count])

    def maps(self, heads: Sequence[Head]) -> Tensor:
        """Attention maps of heads for the first sample, shape ``[heads, T, T]``."""
        device = next(self.model.parameters()).device
        sample = map_batch(self.batches[0], lambda tensor: tensor[:1].to(device))
        self.evaluations += 1
        return attention_maps(self.model, sample, self.objective, heads)

    def _whole_groups(self, ranking: Iterable[Head]) -> tuple[Head, ...]:
        blocks, closed = self.gates.architecture.blocks, set(self.gates.closed)
        order: dict[Head, None] = {}
        for layer, head in ranking:
            block = blocks[layer]
            order.update(
                dict.fromkeys(
                    (layer, other)
                    for other in block.query_heads(block.key_value_head(head))
                    if (layer, other) in closed
                )
            )
        return tuple(order)

    def _with_donors(self, ranking: Iterable[Head]) -> tuple[Head, ...]:
        donors = [sum(layer == at for at, _ in self.gates.opened) for layer in range(len(self.gates.heads_per_layer))]
        kept = []
        for layer, head in ranking:
            if donors[layer]:
                donors[layer] -= 1
                kept.append((layer, head))
        return tuple(kept)


def agreed(value: T) -> T:
    """Rank 0's value, on every rank: sums of several ranks may differ in their last bit.

    Example:
        >>> agreed(3)
        3
    """
    return Replicas.world().gather_objects(value)[0]


def first_samples(batches: Sequence[Any], n_samples: int | None) -> list[Any]:
    """The batches that hold the first samples, the last one cut to fit.

    Example:
        >>> import torch
        >>> batches = [{"input_ids": torch.zeros(3, 2)}, {"input_ids": torch.zeros(3, 2)}]
        >>> [len(batch["input_ids"]) for batch in first_samples(batches, 4)]
        [3, 1]
    """
    if n_samples is None:
        return list(batches)
    kept, left = [], n_samples
    for batch in batches:
        size = batch_length(batch)
        if left <= 0:
            break
        kept.append(batch if size <= left else map_batch(batch, lambda tensor, left=left: tensor[:left]))  # type: ignore[misc]
        left -= size
    return kept
