"""Importance of attention heads on a probe: scores, and which heads to cut or to regrow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention.patterns import recorded_entropies
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture import Head, HeadError, HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.architecture.gates import BatchMismatchError
from lightning_goldy.core.batches import batch_length, move_batch, split_batch, take_samples
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import Registry, require_at_least, require_choice, suggestion
from lightning_goldy.core.objective import FunctionObjective, Objective, map_batch, objective_for
from lightning_goldy.core.sharding import Replicas, is_sharded

Progress = Callable[[int, int], None]


class Table:
    """One measurement of N samples.

    Args:
        values: Shape ``[N, ...]``, float64, on the CPU.
        weights: Likewise, or what broadcasts to it: how much each counts.
    """

    def __init__(self, values: Tensor, weights: Tensor) -> None:
        self.values, self.weights = values, weights
        self.total, self.weight = (values * weights).sum(dim=0), weights.sum(dim=0)


class HeadProbe:
    """The measurements that strategies of importance are made of, each made once and averaged over samples.

    All are of shape ``[layers, heads]``, float64, on the CPU; where a layer has fewer heads the values mean nothing.
    Padding never counts, and every sample counts the same however long it is. ``cost`` holds the passes made so far, of
    all ranks.

    Args:
        model: In evaluation mode.
        batches: The same on every rank.
        objective: How a batch becomes log-probabilities.
        gates: Of the model.
        replicas: The ranks that share the samples out.
        seed: Of random strategies.
        weights: What a strategy weighs, by name.
        progress: Called with (passes done, passes in all) of one measurement on this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        objective: Objective,
        *,
        gates: HeadGates,
        replicas: Replicas,
        seed: int = 0,
        weights: dict[str, float] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.objective, self.gates = model, objective, gates
        self.seed, self.weights, self._replicas = seed, dict(weights or {}), replicas
        self._device = next(model.parameters()).device
        self._progress = progress or (lambda done, total: None)
        with replicas.together("reading the samples"):
            self._batches, self.n_samples = _share(batches, replicas, self._device)
        self.measured: dict[str, Tensor] = {}
        self.cost = self._made = Cost()
        self._left: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and the largest number of heads of a layer."""
        return (len(self.gates.heads_per_layer), max(self.gates.heads_per_layer))

    def magnitude(self) -> Tensor:
        r"""Mean magnitude of the gate's gradient, :math:`\mathbb E_i |\partial L_i / \partial \xi_h|`, nats."""
        return self._keep("magnitude", self._mean(self._gradient_moments)[1])

    def gradient(self) -> Tensor:
        r"""Mean gradient of the gate, :math:`\mathbb E_i\, \partial L_i / \partial \xi_h`, nats."""
        return self._keep("gradient", self._mean(self._gradient_moments)[0])

    def curvature(self) -> Tensor:
        r"""Second derivative in the gate by the empirical Fisher information of the mean loss per token, nats.

        .. math:: \mathbb E_i \big[ T_i \, (\partial L_i / \partial \xi_h)^2 \big]

        where T_i is the number of the sample's targets, whose terms are taken for independent.
        """
        return self._keep("curvature", self._mean(self._gradient_moments)[2])

    def entropy(self) -> Tensor:
        """Mean entropy of attention rows over the logarithm of the visible length, a fraction in [0, 1].

        Raises:
            UnsupportedArchitectureError: The family's attention patterns cannot be read.
            ValueError: No sample has a row that sees two keys.
        """
        return self._keep("entropy", self._mean(self._entropy))

    def ablation(self) -> Tensor:
        """What the mean loss gains when a head alone is closed (of a closed head: loses when it alone is opened), nats.

        One forward pass over all samples per head.
        """
        return self._keep("ablation", self._mean(self._ablation))

    def loss(self) -> float:
        """Mean loss of the samples with the present gates, nats."""
        return float(self._mean(self._table((losses, torch.ones_like(losses)) for losses in self._losses())))

    def without(self, sample: int) -> HeadProbe:
        """What has been measured, without one sample; nothing else can be measured."""
        rest = copy.copy(self)
        rest.measured, rest._left = {}, sample
        del rest.model, rest.objective, rest._batches
        return rest

    @cached_property
    def _gradient_moments(self) -> Table:
        """Gradients, magnitudes, and squares times the number of targets: [N, 3, layers, heads]."""

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for done, batch in enumerate(self._batches, 1):
                for gradient, targets in self._in_parts(batch, self._gradients):
                    square = targets[:, None, None] * gradient.square()
                    moments = torch.stack([gradient, gradient.abs(), square], dim=1)  # [B, 3, layers, heads]
                    yield moments, torch.ones_like(moments[:, :1, :1, :1])
                self._progress(done, len(self._batches))

        frozen = [parameter for parameter in self.model.parameters() if not is_sharded(parameter)]
        needed = [parameter.requires_grad for parameter in frozen]
        try:
            # Only gradients of activations are needed; FSDP2 decides for itself what to differentiate.
            for parameter in frozen:
                parameter.requires_grad_(False)
            return self._table(rows())
        finally:
            for parameter, before in zip(frozen, needed, strict=True):
                parameter.requires_grad_(before)

    def _gradients(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Gradient of each sample's loss in its gates, [B, layers, heads] float64, and its number of targets."""
        with self.gates.measured(batch_length(batch)) as leaf:
            log_probs, targets = self._log_probs(batch)
            (gradient,) = torch.autograd.grad(-log_probs.sum(), [leaf], materialize_grads=True)
        self._made += Cost(batch_length(batch), batch_length(batch))
        return gradient.double(), targets

    def _in_parts(self, batch: Any, measure: Callable[[Any], Any]) -> Iterator[Any]:
        """Measures a batch at once, or sample by sample when the objective calls the model so."""
        alone = batch_length(batch) == 1
        if alone or not isinstance(self.objective, FunctionObjective):
            try:
                yield measure(batch)
                return
            except BatchMismatchError:
                if alone:
                    raise
        for sample in split_batch(batch):
            yield measure(sample)

    def _log_probs(self, batch: Any) -> tuple[Tensor, Tensor]:
        if isinstance(self.objective, FunctionObjective) and self.objective.logits is None:
            log_probs = self.objective.log_probs(self.model, batch)
            return log_probs, torch.ones_like(log_probs, dtype=torch.float64)
        target = self.objective.logits_and_targets(self.model, batch)
        return target.log_probs(), torch.bincount(target.sample, minlength=target.n_samples).double()

    @cached_property
    def _entropy(self) -> Table:
        def measure(batch: Any) -> list[Tensor]:
            with recorded_entropies(self.model, self.gates.architecture, batch) as layers, torch.no_grad():
                self.objective.log_probs(self.model, batch)
            self._made += Cost(batch_length(batch))
            return layers

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            for done, batch in enumerate(self._batches, 1):
                for layers in self._in_parts(batch, measure):
                    found = layers[0].new_zeros(len(layers[0]), *self.shape, dtype=torch.float64)
                    for index, layer in enumerate(layers):
                        found[:, index, : layer.shape[1]] = layer
                    yield found.nan_to_num(nan=0.0), (~found.isnan()).double()
                self._progress(done, len(self._batches))

        table = self._table(rows())
        entropy = self._mean(table)
        if any(bool(entropy[layer, :size].isnan().any()) for layer, size in enumerate(self.gates.heads_per_layer)):
            raise ValueError("entropy needs a sample of at least two tokens: no attention row sees two keys")
        return table

    @cached_property
    def _ablation(self) -> Table:
        present, heads = set(self.gates.closed), self.gates.heads

        def rows() -> Iterator[tuple[Tensor, Tensor]]:
            kept = torch.cat([*self._losses(), torch.zeros(0, dtype=torch.float64, device=self._device)])
            gained = kept.new_zeros(len(kept), *self.shape)
            for done, (layer, head) in enumerate(heads, 1):
                with self.gates.closing_only(sorted(present ^ {(layer, head)})):
                    changed = torch.cat([*self._losses(), kept[:0]])
                gained[:, layer, head] = kept - changed if (layer, head) in present else changed - kept
                self._progress(done, len(heads))
            yield gained, torch.ones_like(gained[:, :1, :1])

        return self._table(rows())

    def _losses(self) -> Iterator[Tensor]:
        for batch in self._batches:
            with torch.no_grad():
                losses = -self.objective.log_probs(self.model, batch).double()
            self._made += Cost(batch_length(batch))
            yield losses

    def _table(self, rows: Iterable[tuple[Tensor, Tensor]]) -> Table:
        """Measurements of the samples of all ranks, from (values, weights) whose first dimension is samples."""
        # What fails on one rank must not leave the others waiting for its measurements.
        with self._replicas.together("measuring heads"):
            mine = [(values.cpu(), weights.cpu()) for values, weights in rows]
        parts = [part for rank in self._replicas.gather_objects(mine) for part in rank]
        # And the passes that the ranks have made since the measurement before.
        passes = torch.tensor([self._made.forwards, self._made.backwards], device=self._device)
        self.cost += Cost(*self._replicas.sum_(passes).tolist())
        self._made = Cost()
        return Table(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _mean(self, table: Table) -> Tensor:
        """Weighted mean over the samples, but for one that may be left out."""
        total, weight = table.total, table.weight
        if self._left is not None:
            weight = weight - table.weights[self._left]
            total = total - table.values[self._left] * table.weights[self._left]
        return total / weight

    def _keep(self, name: str, value: Tensor) -> Tensor:
        self.measured[name] = value
        return value


def _share(batches: Iterable[Any], replicas: Replicas, device: torch.device) -> tuple[list[Any], int]:
    """This rank's rows of every batch, and the number of samples of all."""
    mine, seen = [], 0
    for batch in batches:
        length = batch_length(batch)
        rows = torch.tensor(list(range((replicas.rank - seen) % replicas.size, length, replicas.size)))
        seen += length
        if len(rows) == length:
            mine.append(map_batch(batch, lambda tensor: tensor.to(device)))
        elif len(rows):
            mine.append(move_batch(take_samples(batch, rows), device))
    if not seen:
        raise ValueError("there is no sample: the batches are empty")
    return mine, seen


HeadScore = Callable[[HeadProbe], Tensor]
"""``score(probe)``: shape ``[layers, heads]``; larger is more important. Cut heads are those of the smallest scores."""

HEAD_SCORES: Registry[HeadScore] = Registry("head score")
register_head_score = HEAD_SCORES.register

DEFAULT_STRATEGY = "taylor"
"""The score by which a fifth of a real model's heads could be closed at the least cost."""
DEFAULT_WEIGHTS = {"entropy": 0.5, "magnitude": 0.5}
"""What ``combined`` weighs its two scores with, fractions."""


@register_head_score("entropy")
def entropy(probe: HeadProbe) -> Tensor:
    """One minus the normalised entropy of the attention rows: heads that look somewhere count, uniform ones do not.

    Source: Voita et al. 2019, "Analyzing Multi-Head Self-Attention", section 5 (confident heads).
    """
    return 1 - probe.entropy()


@register_head_score("magnitude")
def magnitude(probe: HeadProbe) -> Tensor:
    r"""Gradient of the loss in the gate, :math:`\mathbb E_i |\partial L_i / \partial \xi_h|`.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 4.1.
    """
    return probe.magnitude()


@register_head_score("combined")
def combined(probe: HeadProbe) -> Tensor:
    r"""Weighted sum of standardised scores, :math:`\sum_s w_s (s_h - \mathrm{mean}\, s) / \mathrm{std}\, s`.

    The probe's ``weights`` name any registered strategies; by default entropy and magnitude count the same.
    """
    total = torch.zeros(probe.shape, dtype=torch.float64)
    for name, weight in (probe.weights or DEFAULT_WEIGHTS).items():
        total += weight * standardised(HEAD_SCORES[name](probe), probe.gates.heads_per_layer)
    return total


@register_head_score("random")
def random(probe: HeadProbe) -> Tensor:
    """Uniform numbers in [0, 1), a function of the seed."""
    generator = torch.Generator().manual_seed(probe.seed)
    return torch.rand(probe.shape, dtype=torch.float64, generator=generator)


@register_head_score("first_order")
def first_order(probe: HeadProbe) -> Tensor:
    r"""The loss that closing the head costs, to first order in its gate, nats.

    .. math:: L(\xi_h = 0) - L(\xi_h = 1) \approx -\frac{\partial L}{\partial \xi_h}

    Of all scores it orders heads most as ``ablation`` of each alone does. Heads that gain most alone interact, though:
    closed together they cost more than those of ``taylor`` (docs/head_plasticity.md).

    Source: Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", section 3.1.
    """
    return -probe.gradient()


@register_head_score("taylor")
def taylor(probe: HeadProbe) -> Tensor:
    r"""The loss that closing the head costs, to second order in its gate, nats.

    .. math:: L(\xi_h = 0) - L(\xi_h = 1) \approx -\frac{\partial L}{\partial \xi_h} + \frac12 F_{hh}

    with the empirical Fisher information F in the place of the second derivative, so one backward pass serves all
    heads. It takes the terms of a sample's tokens for independent, and so orders single heads less as ``ablation`` does
    than ``first_order``; but it spares heads with large gradients, which is what counts where many are closed at once.

    Source: LeCun et al. 1990, "Optimal Brain Damage"; Molchanov et al. 2019, "Importance Estimation for Neural Network
    Pruning", section 3.1.
    """
    return -probe.gradient() + probe.curvature() / 2


@register_head_score("ablation")
def ablation(probe: HeadProbe) -> Tensor:
    """The loss that closing the head alone costs, measured with one forward pass per head; the reference, nats."""
    return probe.ablation()


def standardised(scores: Tensor, heads_per_layer: tuple[int, ...]) -> Tensor:
    """Scores minus their mean over all heads, in their standard deviations; 0 when all are equal.

    Example:
        >>> standardised(torch.tensor([[1.0, 3.0]]), (2,)).tolist()
        [[-1.0, 1.0]]
    """
    real = torch.cat([row[:size] for row, size in zip(scores, heads_per_layer, strict=True)])
    spread = real.std(correction=0)
    return (scores - real.mean()) / spread if spread > 0 else torch.zeros_like(scores)


def check_weights(strategy: str, weights: dict[str, float] | None) -> None:
    """Checks a strategy and its weights before there is a model.

    Raises:
        ValueError: The strategy or a weighed score is unknown, a weight is negative, all are 0, or the strategy takes
            none.
    """
    HEAD_SCORES[strategy]
    for name, weight in (weights or {}).items():
        if name not in HEAD_SCORES or name == "combined":
            raise ValueError(f"weights: {suggestion(str(name), [each for each in HEAD_SCORES if each != 'combined'])}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights: the weight of {name!r} must be a finite number from 0; got {weight}")
    if weights is not None and strategy != "combined":
        raise ValueError(f"weights belong to the strategy 'combined'; got them with {strategy!r}")
    if weights is not None and not any(weights.values()):
        raise ValueError(f"weights: at least one must be above 0; got {weights}")


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
        cost: Passes made.
        errors: Standard error of each score over the samples, of the scores' shape; NaN where it is not known: of a
            single sample, and of a score that measures the model by itself.
    """

    analysis = "head_importance"

    scores: Tensor
    measured: dict[str, Tensor]
    heads_per_layer: tuple[int, ...]
    groups_per_layer: tuple[int, ...]
    closed: tuple[Head, ...]
    strategy: str
    n_samples: int
    cost: Cost = field(default=Cost(), compare=False)
    errors: Tensor | None = None

    def metrics(self) -> dict[str, float | None]:
        """Heads, closed ones, and the smallest and largest score."""
        known = [float(self.scores[head]) for head in self.ranking()]
        return {
            "heads": len(known),
            "closed_heads": len(self.closed),
            "smallest_score": known[0],
            "largest_score": known[-1],
        }

    def details(self) -> dict[str, Any]:
        """Everything that the scores rest on, by layer."""
        tables = {"values": self.scores, **self.measured}
        if self.errors is not None:
            tables["standard_errors"] = self.errors
        return {
            "strategy": self.strategy,
            "n_samples": self.n_samples,
            "heads_per_layer": list(self.heads_per_layer),
            "closed": [list(head) for head in self.closed],
            **{name: table.tolist() for name, table in tables.items()},
        }

    def ranking(self) -> tuple[Head, ...]:
        """All heads, the least important first; ties by layer and head."""
        heads = [(layer, head) for layer, size in enumerate(self.heads_per_layer) for head in range(size)]
        return tuple(sorted(heads, key=lambda head: float(self.scores[head])))

    def most_wanted(self) -> tuple[Head, ...]:
        """The closed heads, that of the largest score first; of ``magnitude``, the largest gradient at the gate."""
        return tuple(sorted(self.closed, key=lambda head: -float(self.scores[head])))

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
        if not 0 <= level < 1:
            raise ValueError(f"level is the share of heads to cut, in [0, 1); got {level}")
        require_at_least("min_heads_per_layer", min_heads_per_layer, 1)
        require_choice("unit", unit, ("head", "group"))
        total, closed = sum(self.heads_per_layer), set(self.closed)
        wanted = math.floor(level * total + 0.5)
        left = [size - sum(layer == at for at, _ in closed) for layer, size in enumerate(self.heads_per_layer)]
        cut: list[Head] = []
        units = self._units(unit)
        for together in units:
            heads = [head for head in together if head not in closed]
            layer = together[0][0]
            nearer = len(cut) < wanted and len(cut) + len(heads) / 2 <= wanted
            if heads and left[layer] - len(heads) >= min_heads_per_layer and nearer:
                left[layer] -= len(heads)
                cut += heads
        # Up to half a group may be missing, and nothing at all only at level 0.
        if wanted and (not cut or wanted - len(cut) >= max(map(len, units))):
            raise HeadError(
                f"level {level} asks for {wanted} of {total} heads by {unit}, but {len(cut)} can be cut: {len(closed)} "
                f"are closed, and min_heads_per_layer={min_heads_per_layer} stay open in each of {len(left)} layers"
            )
        return tuple(cut)

    def _units(self, unit: str) -> list[list[Head]]:
        """Heads, or the heads of each key/value group, in order of their mean score."""
        groups: list[list[Head]] = []
        for layer, (heads, count) in enumerate(zip(self.heads_per_layer, self.groups_per_layer, strict=True)):
            size = heads // max(count, 1) if unit == "group" else 1
            groups += [[(layer, head) for head in range(first, first + size)] for first in range(0, heads, size)]
        return sorted(groups, key=lambda group: sum(float(self.scores[head]) for head in group) / len(group))


def head_importance(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    strategy: str = DEFAULT_STRATEGY,
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
        strategy: ``taylor``, ``first_order`` and ``magnitude`` (one forward and backward pass), ``entropy`` (one
            forward pass), ``combined`` (both), ``random``, ``ablation`` (one forward pass per head), or a user's own.
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
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
        >>> scores = head_importance(model, [{"input_ids": torch.tensor([[1, 2, 3, 4]])}], strategy="magnitude")
        >>> tuple(scores.scores.shape), len(scores.least_important(0.25))
        ((2, 2), 1)
    """
    check_weights(strategy, weights)
    with _gated(model, batches) as gates:
        replicas = Replicas.of(model) if split_over_ranks else Replicas()
        with preserved(model):
            objective = objective_for(model, objective)
            options: dict[str, Any] = {"seed": seed, "weights": weights, "progress": progress}
            probe = HeadProbe(model, batches, objective, gates=gates, replicas=replicas, **options)
            score = HEAD_SCORES[strategy]
            scores = _masked(score(probe).double(), gates)
            measured = {name: _masked(value, gates) for name, value in probe.measured.items()}
            _require_finite(scores, strategy, gates)
            errors = _masked(standard_errors(score, probe), gates)
        return HeadScores(
            scores=scores,
            measured=measured,
            heads_per_layer=gates.heads_per_layer,
            groups_per_layer=tuple(block.n_key_value_heads for block in gates.architecture.blocks),
            closed=gates.closed,
            strategy=strategy,
            n_samples=probe.n_samples,
            cost=probe.cost,
            errors=errors,
        )


def standard_errors(score: HeadScore, probe: HeadProbe) -> Tensor:
    r"""Standard error of each head's score over the samples, by leaving out one after the other (jackknife).

    .. math:: \sigma_h^2 = \frac{N - 1}{N} \sum_i (s_{h, -i} - \bar s_{h, -})^2

    Of a mean over samples it is their standard deviation over the root of N. No pass is made.

    Args:
        score: Made of the probe's measurements; one that looks at the model itself has NaN.
        probe: Has measured what the score is made of.

    Source: Efron and Stein 1981, "The Jackknife Estimate of Variance".
    """
    count = probe.n_samples
    try:
        left = torch.stack([score(probe.without(sample)).double() for sample in range(count)])  # [N, layers, heads]
    except AttributeError:
        return torch.full(probe.shape, math.nan, dtype=torch.float64)
    spread = (left - left.mean(dim=0)).square().sum(dim=0)
    return (spread * (count - 1) / count).sqrt() if count > 1 else torch.full_like(spread, math.nan)


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
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
        >>> HeadGates(model).disable([(0, 1), (1, 0)])
        >>> heads_to_regrow(model, count=1, strategy="last_pruned")
        ((1, 0),)
    """
    require_choice("choice of heads", strategy, get_args(RegrowChoice))
    gates = HeadGates.of(model)
    if gates is None:
        raise HeadError("the model has no gates, so no head is closed")
    if not 0 <= count <= len(gates.closed):
        raise HeadError(f"{count} heads cannot be grown again: {len(gates.closed)} are closed")
    if strategy == "gradient" and count:
        return head_importance(model, batches, objective, strategy="magnitude").most_wanted()[:count]
    return unmeasured_choice(gates, strategy, seed)[:count]


def unmeasured_choice(gates: HeadGates, strategy: RegrowChoice, seed: int) -> tuple[Head, ...]:
    """All closed heads, the most wanted first, by a strategy that needs no sample."""
    if strategy != "random":
        return gates.last_closed
    order = torch.randperm(len(gates.closed), generator=torch.Generator().manual_seed(seed))
    return tuple(gates.closed[index] for index in order.tolist())


@contextmanager
def _gated(model: nn.Module, batches: Iterable[Any]) -> Iterator[HeadGates]:
    """The model's gates, or gates for the length of the block, found with a sample where the model must be seen."""
    present = HeadGates.of(model)
    gates = present or _new_gates(model, batches)
    try:
        yield gates
    finally:
        if present is None:
            gates.remove()


def _new_gates(model: nn.Module, batches: Iterable[Any]) -> HeadGates:
    try:
        return HeadGates(model)
    except UnsupportedArchitectureError:
        if not isinstance(batches, Sequence) or not batches or not isinstance(batches[0], Mapping):
            raise
        sample = map_batch(batches[0], lambda tensor: tensor[:1].to(next(model.parameters()).device))
        return HeadGates(model, sample_batch={name: value for name, value in sample.items() if name != "labels"})


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
