"""Which attention heads matter, which to cut, and which to grow again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.head_probe import HeadProbe, Progress
from lightning_goldy.analysis.head_scores import HEAD_SCORES, check_weights
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.gates import Head, HeadError, HeadGates
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.sharding import Replicas

RegrowChoice = Literal["gradient", "random", "last_pruned"]


@dataclass(frozen=True)
class HeadScores(AnalysisResult):
    """How important each head is.

    Args:
        scores: Shape ``[layers, heads]``, float64; larger is more important; NaN where a layer has fewer heads.
        measured: What was measured to get there, by name (``entropy``, ``magnitude``, ``gradient``, ``curvature``,
            ``ablation``), each of that shape.
        heads_per_layer: Number of heads of each layer.
        groups_per_layer: Number of key/value groups of each layer.
        closed: Heads whose gates were closed.
        strategy: Name of the strategy.
        n_samples: Samples measured.
    """

    scores: Tensor
    measured: dict[str, Tensor]
    heads_per_layer: tuple[int, ...]
    groups_per_layer: tuple[int, ...]
    closed: tuple[Head, ...]
    strategy: str
    n_samples: int

    def ranking(self) -> tuple[Head, ...]:
        """All heads, the least important first; ties by layer and head."""
        heads = [(layer, head) for layer, size in enumerate(self.heads_per_layer) for head in range(size)]
        return tuple(sorted(heads, key=lambda head: float(self.scores[head])))

    def least_important(
        self, level: float, *, min_heads_per_layer: int = 1, unit: Literal["head", "group"] = "head"
    ) -> tuple[Head, ...]:
        """The open heads to cut, the least important first.

        Args:
            level: Share of all heads of the model to cut now, a fraction in [0, 1).
            min_heads_per_layer: Heads that stay open in every layer.
            unit: ``head``, or ``group`` to cut whole key/value groups by their mean score, as ``compact`` can remove
                them; the number of heads is then the nearest that groups allow.

        Raises:
            ValueError: An argument is out of range.
            HeadError: So many heads cannot be cut.
        """
        return _least_important(self, level, min_heads_per_layer, unit)


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    strategy: str = "entropy",
    weights: dict[str, float] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    split_over_ranks: bool = True,
) -> HeadScores:
    """Scores every attention head on probe samples, in evaluation mode; the model comes back as it was.

    Gates of the model that are closed stay closed meanwhile. On several ranks the samples are shared out and the sums
    added, so the scores are the same on any number of ranks to rounding; every rank must call.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module, with or without :class:`HeadGates`.
        batches: Batches that the objective understands, of any size; the same on every rank.
        objective: What to differentiate; next-token prediction by default.
        strategy: ``entropy`` (one forward pass), ``magnitude`` and ``taylor`` (one forward and backward pass),
            ``combined`` (both), ``random``, ``ablation`` (one forward pass per head), or a user's own.
        weights: For ``combined``: strategies and their weights, fractions; entropy and magnitude 0.5 each by default.
        seed: Of ``random``.
        progress: Called with (passes done, passes in all) of each measurement on this rank.
        split_over_ranks: Whether to share samples out over the ranks of an initialised process group.

    Returns:
        The scores.

    Raises:
        ValueError: An argument is unknown or out of range, there is no sample, or a score is not finite.
        UnsupportedArchitectureError: The model has no attention that could be found, or hides its patterns from
            ``entropy``.

    Source: Michel et al. 2019 (gates); Voita et al. 2019 (confidence); Molchanov et al. 2019 (Taylor).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> scores = head_importance(model, [{"input_ids": torch.tensor([[1, 2, 3, 4]])}], strategy="magnitude")
        >>> tuple(scores.scores.shape), len(scores.least_important(0.25))
        ((2, 2), 1)
    """
    check_weights(strategy, weights)
    with _gated(model) as gates:
        replicas = Replicas.of(model) if split_over_ranks else Replicas()
        with preserved(model):
            options: dict[str, Any] = {"seed": seed, "weights": weights, "progress": progress}
            probe = HeadProbe(
                model, batches, objective or CausalLMObjective(), gates=gates, replicas=replicas, **options
            )
            scores = _masked(HEAD_SCORES[strategy](probe).double(), gates)
            measured = {name: _masked(value, gates) for name, value in probe.measured.items()}
            _require_finite(scores, strategy, gates)
        return HeadScores(
            scores=scores,
            measured=measured,
            heads_per_layer=gates.heads_per_layer,
            groups_per_layer=tuple(block.n_key_value_heads for block in gates.architecture.blocks),
            closed=gates.closed,
            strategy=strategy,
            n_samples=probe.n_samples,
        )


def heads_to_regrow(
    model: nn.Module,
    batches: Iterable[Any] = (),
    objective: Objective | None = None,
    *,
    count: int,
    strategy: RegrowChoice = "gradient",
    seed: int = 0,
) -> tuple[Head, ...]:
    r"""Chooses closed heads to open again, the most wanted first.

    Args:
        model: Has :class:`HeadGates`.
        batches: For ``gradient``: probe batches, the same on every rank.
        objective: For ``gradient``; next-token prediction by default.
        count: How many heads.
        strategy: ``gradient`` (mean :math:`|\partial L_i / \partial \xi_h|` at the closed gates, one backward pass),
            ``random`` (seeded), or ``last_pruned`` (what was cut last comes first).
        seed: Of ``random``.

    Raises:
        HeadError: The model has no gates, or fewer closed heads.
        ValueError: The strategy is unknown, or there is no sample.

    Source: gradients at absent weights choose what to grow: Evci et al. 2020, "Rigging the Lottery", section 3.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> HeadGates(model).disable([(0, 1), (1, 0)])
        >>> heads_to_regrow(model, count=1, strategy="last_pruned")
        ((1, 0),)
    """
    if strategy not in ("gradient", "random", "last_pruned"):
        raise ValueError(
            f"unknown choice of heads {strategy!r}; {suggestion(str(strategy), ('gradient', 'random', 'last_pruned'))}"
        )
    gates = HeadGates.of(model)
    if gates is None:
        raise HeadError("the model has no gates, so no head is closed")
    if not 0 <= count <= len(gates.closed):
        raise HeadError(f"{count} heads cannot be grown again: {len(gates.closed)} are closed")
    if strategy == "last_pruned" or count == 0:
        return gates.last_closed[:count]
    if strategy == "random":
        order = torch.randperm(len(gates.closed), generator=torch.Generator().manual_seed(seed))
        return tuple(gates.closed[index] for index in order.tolist()[:count])
    scores = head_importance(model, batches, objective, strategy="magnitude").scores
    return tuple(sorted(gates.closed, key=lambda head: -float(scores[head]))[:count])


@contextmanager
def _gated(model: nn.Module) -> Iterator[HeadGates]:
    """The model's gates, or gates for the length of the block."""
    present = HeadGates.of(model)
    gates = present or HeadGates(model)
    try:
        yield gates
    finally:
        if present is None:
            gates.remove()


def _masked(scores: Tensor, gates: HeadGates) -> Tensor:
    scores = scores.clone()
    for layer, size in enumerate(gates.heads_per_layer):
        scores[layer, size:] = math.nan
    return scores


def _require_finite(scores: Tensor, strategy: str, gates: HeadGates) -> None:
    if scores.shape != (len(gates.heads_per_layer), max(gates.heads_per_layer)):
        raise ValueError(
            f"the head score {strategy!r} returned shape {tuple(scores.shape)}; wanted {tuple(gates.closing.shape)}"
        )
    for head in gates.heads:
        if not math.isfinite(float(scores[head])):
            raise ValueError(f"the {strategy} score of head {head} is {float(scores[head])}, not finite")


def _least_important(scores: HeadScores, level: float, least: int, unit: str) -> tuple[Head, ...]:
    if not 0 <= level < 1:
        raise ValueError(f"level is the share of heads to cut, in [0, 1); got {level}")
    if least < 1:
        raise ValueError(f"min_heads_per_layer must be at least 1; got {least}")
    if unit not in ("head", "group"):
        raise ValueError(f"unknown unit {unit!r}; {suggestion(unit, ('head', 'group'))}")
    total = sum(scores.heads_per_layer)
    wanted = math.floor(level * total + 0.5)
    closed = set(scores.closed)
    left = [size - sum(layer == at for at, _ in closed) for layer, size in enumerate(scores.heads_per_layer)]
    cut: list[Head] = []
    for heads in _units(scores, unit):
        heads = [head for head in heads if head not in closed]
        layer = heads[0][0] if heads else 0
        nearer = len(cut) < wanted and len(cut) + len(heads) / 2 <= wanted
        if heads and left[layer] - len(heads) >= least and nearer:
            left[layer] -= len(heads)
            cut += heads
    # Up to half a group may be missing, and nothing at all only at level 0.
    if wanted and (not cut or wanted - len(cut) >= max(map(len, _units(scores, unit)))):
        raise HeadError(
            f"level {level} asks for {wanted} of {total} heads by {unit}, but {len(cut)} can be cut: {len(closed)} are "
            f"closed, and min_heads_per_layer={least} stay open in each of {len(left)} layers"
        )
    return tuple(cut)


def _units(scores: HeadScores, unit: str) -> list[list[Head]]:
    """Heads, or the heads of each key/value group, in order of their mean score."""
    groups: list[list[Head]] = []
    for layer, (heads, count) in enumerate(zip(scores.heads_per_layer, scores.groups_per_layer, strict=True)):
        size = heads // count if unit == "group" else 1
        groups += [[(layer, head) for head in range(first, first + size)] for first in range(0, heads, size)]
    return sorted(groups, key=lambda group: sum(float(scores.scores[head]) for head in group) / len(group))
