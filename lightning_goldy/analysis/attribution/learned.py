"""Masks that are learned: which part of a change recovers most of its effect, by gradients of the graft itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attribution.attribution import ChangeAttributionResult
from lightning_goldy.analysis.attribution.path import ChangePath, Measure, Metric, Passage, passages
from lightning_goldy.analysis.attribution.units import margins_of, unit_groups, unit_mask
from lightning_goldy.analysis.gradients import (
    backward,
    only_these_require_gradients,
    streamed_gradients,
    taken_gradients,
)
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import move_batch, sample_count
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import require_at_least, require_choice, require_kinds
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.selection import kth_largest, select_largest
from lightning_goldy.core.sharding import gather, inside_parallel, is_sharded, like, local, scatter_like

Relaxation = Literal["straight_through", "sigmoid"]


@dataclass(frozen=True)
class LearnOptions:
    """How a mask is learned.

    Args:
        steps: Passages that the scores are corrected on.
        rate: What a correction counts for beside the attribution that the scores begin with.
        penalty: Nats of the metric that a nat of divergence from the base on other text is worth; read where there is
            other text.
        relaxation: ``straight_through`` grafts exactly the strongest elements while it learns, ``sigmoid`` lets
            elements near the threshold in by a part, which shrinks to nothing by the last step.
        pieces: Whether single ``elements`` have scores, or whole ``units`` (heads, neurons, token rows).
        seed: Of the order of the passages.

    Raises:
        ValueError: A value is out of range or unknown.

    Example:
        >>> LearnOptions(steps=0)
        Traceback (most recent call last):
        ValueError: steps must be at least 1; got 0
    """

    steps: int = 32
    rate: float = 0.3
    penalty: float = 1.0
    relaxation: Relaxation = "straight_through"
    pieces: Literal["elements", "units"] = "elements"
    seed: int = 0

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        require_at_least("steps", self.steps, 1)
        require_choice("relaxation", self.relaxation, get_args(Relaxation))
        require_choice("pieces", self.pieces, ("elements", "units"))
        for name in ("rate", "penalty"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0; got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class LearnedMask:
    """The best mask that was found.

    Args:
        mask: Of the share that was asked for; of units at most that.
        values: What every mask that was tried in full was worth on the samples that teach, nats: the metric in the
            direction of the change, less the penalty. The first is that of the attribution's own mask.
        cost: Passes of the model.
    """

    mask: ParameterMask
    values: tuple[float, ...]
    cost: Cost


def learn_mask(
    model: nn.Module,
    base: Base,
    attribution: ChangeAttributionResult,
    batches: Iterable[Any],
    collateral: Iterable[Any] | None = None,
    *,
    share: float,
    objective: Objective | None = None,
    metric: Metric | None = None,
    options: LearnOptions = LearnOptions(),
) -> LearnedMask:
    r"""Learns which share of a change to keep, beginning with the one that contributes most.

    .. math::
        \max_{|S| \le k} \; \pm m(\theta_0 + 1_S \Delta) - \lambda \, \mathrm{KL}(p_0 \| p_S), \qquad
        s_j \leftarrow s_j + \eta \, \Delta_j \frac{\partial}{\partial \theta_j} (\pm m - \lambda \mathrm{KL})

    S holds the largest scores; s begins with the contributions, and each step adds to it, at the graft as it stands,
    what letting an element in would do. Every few steps the mask is tried on all samples, and the best one comes back,
    the attribution's own at worst. Beside a path's memory stands one score in at least float32 for each element.

    Args:
        model: The finetuned model; it comes back as it was.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        attribution: Of the same change; with ``keep_scores``, or else the scores begin with its levels.
        batches: The samples that teach.
        collateral: Other text, on which divergence from the base is penalised.
        share: Of all elements, a fraction in (0, 1].
        objective: The loss; next-token prediction by default.
        metric: What is recovered; the attribution's by default.
        options: Of the learning.

    Returns:
        The mask.

    Raises:
        ValueError: The share is out of range, the attribution is of another change or of a function that is not given
            again, or there is no sample.

    Source: masks of a finetune's change by gradients: Panigrahi et al. 2023, arXiv 2302.06600, section 2; straight
        through: Bengio et al. 2013, arXiv 1308.3432.

    Example:
        >>> from lightning_goldy.analysis.attribution.attribution import change_attribution
        >>> from lightning_goldy.core import FunctionObjective, ParameterSpace, ParameterVector
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> base = ParameterVector(ParameterSpace.of(layer), {"weight": torch.zeros(1, 4)})
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 3.0, 0.1, 0.1]]))
        >>> square = FunctionObjective(lambda model, x: model(x).square().mean())
        >>> found = change_attribution(layer, base, [torch.eye(4)], square, shares=[0.25])
        >>> learn_mask(layer, base, found, [torch.eye(4)], share=0.25, objective=square).mask["weight"].tolist()
        [[False, True, False, False]]
    """
    model = inside_parallel(model)
    objective = objective_for(model, objective)
    with preserved(model), ChangePath(model, base, attribution.space) as path:
        return learn_along(path, attribution, batches, collateral, share, objective, metric, options)


def learn_along(
    path: ChangePath,
    attribution: ChangeAttributionResult,
    batches: Iterable[Any],
    collateral: Iterable[Any] | None,
    share: float,
    objective: Objective,
    metric: Metric | None,
    options: LearnOptions,
) -> LearnedMask:
    """As :func:`learn_mask`, of a path that is entered; the model stays where the last graft put it."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1]; got {share}")
    require_same_change(attribution, path)
    learner = _Learner(path, attribution, share, options)
    learner.read(batches, collateral, objective, metric_of(attribution, metric))
    best, values = learner.flags(), [learner.value(learner.flags())]
    with torch.enable_grad():
        for step in range(options.steps):
            learner.correct(step)
            if (step + 1) % max(1, options.steps // 4) == 0 or step + 1 == options.steps:
                flags = learner.flags()
                values.append(learner.value(flags))
                best = flags if values[-1] > max(values[:-1]) else best
    references = {name: own.detach() for name, own in path.parameters.items()}
    mask = ParameterMask(path.space, {name: gather(like(references[name], best[name])).cpu() for name in path.space})
    return LearnedMask(mask, tuple(values), learner.cost)


def metric_of(attribution: ChangeAttributionResult, metric: Metric | None) -> Metric:
    """The metric that is given, or the attribution's own.

    Raises:
        ValueError: That is a function, which a result does not hold.
    """
    if metric is not None:
        return metric
    if attribution.metric == "function":
        raise ValueError("the attribution is of a function's values; give the function again as metric=")
    return attribution.metric  # type: ignore[return-value]


def require_same_change(attribution: ChangeAttributionResult, path: ChangePath) -> None:
    """Checks that an attribution is of the change that a path is along.

    Raises:
        ValueError: They have other parameters, or ||Delta|| differs by more than a thousandth.
    """
    if path.space.names != attribution.names:
        raise ValueError(
            f"the attribution is of {len(attribution.names)} parameters ({attribution.names[0]}, ...), the change "
            f"of {len(path.space)} ({path.space.names[0]}, ...); both must have one base and space"
        )
    norms = [math.sqrt(math.fsum(squares)) for squares in (attribution.squared_changes, path.squares())]
    if not math.isclose(*norms, rel_tol=1e-3):
        raise ValueError(
            f"the attribution is of a change of norm {norms[0]:.6g}, the change here has norm {norms[1]:.6g}; both "
            "must have one base and space"
        )


class _Learner:
    """Scores, and the grafts that they make."""

    def __init__(
        self, path: ChangePath, attribution: ChangeAttributionResult, share: float, options: LearnOptions
    ) -> None:
        self.path, self.options, self.cost = path, options, Cost()
        self.device = next(path.model.parameters()).device
        self.sign = 1.0 if attribution.change >= 0 else -1.0
        self.count = max(1, round(share * path.space.numel))
        self.references = {name: own.detach() for name, own in path.parameters.items()}
        self.groups = unit_groups(attribution, path.model) if options.pieces == "units" else ()
        if self.groups:
            self.unit_scores = self.sign * torch.cat([torch.as_tensor(row["values"]) for row in attribution.units])
            self.sizes = torch.tensor([group.size(path.space) for group in self.groups for _ in range(group.count)])
        else:
            self.scores = self._begin(attribution)

    def _begin(self, attribution: ChangeAttributionResult) -> dict[str, Tensor]:
        """This process's part of the contributions in the direction of the change, or of their levels."""
        start: Mapping[str, Tensor] | None = attribution.scores
        if start is None and attribution.levels is None:
            raise ValueError("the attribution has neither scores nor levels to begin with: nothing has changed")
        # A level counts as much as the mean contribution of an element that carries.
        level = abs(attribution.change) / self.count / max(1, len(attribution.shares))
        begun = {}
        for name, reference in self.references.items():
            whole = start[name] * self.sign if start is not None else -level * attribution.levels[name].float()  # type: ignore[index]
            own = local(scatter_like(reference, whole) if is_sharded(reference) else whole.to(reference.device))
            begun[name] = own.to(torch.promote_types(reference.dtype, torch.float32), copy=True)
        return begun

    def read(
        self, batches: Iterable[Any], collateral: Iterable[Any] | None, objective: Objective, metric: Metric
    ) -> None:
        """Takes in the samples; the model goes to its base."""
        self.measure, self.penalty = Measure(metric, objective), Measure("kl", objective)
        self.samples = passages(batches, objective, None, None)
        self.other = passages(collateral, objective, None, None) if collateral is not None else []
        only_these_require_gradients(self.path.model, self.path.parameters)
        self.path.move_to(0.0)
        with torch.no_grad():
            for measure, held in ((self.measure, self.samples), (self.penalty, self.other)):
                for index, passage in enumerate(held):
                    measure.keep_anchor(self.path.model, index, self._batch(passage))
                    self.cost += Cost(forwards=sample_count(passage.batch) * (measure.metric == "kl"))

    def _batch(self, passage: Passage) -> Any:
        return move_batch(passage.batch, self.device)

    def flags(self) -> dict[str, Tensor]:
        """This process's part of the mask of the largest scores."""
        if not self.groups:
            directed = [like(self.references[name], score) for name, score in self.scores.items()]
            return dict(zip(self.scores, select_largest(directed, self.count), strict=True))
        order = (self.unit_scores / self.sizes).argsort(descending=True, stable=True)
        inside = torch.zeros(len(order), dtype=torch.bool)
        inside[order] = self.sizes[order].cumsum(0) <= self.count
        inside[order[0]] = True
        chosen = inside.split([group.count for group in self.groups])
        masks = unit_mask(self.path.space, self.groups, chosen)
        return {name: local(scatter_like(self.references[name], masks[name])) for name in self.path.space}

    def value(self, flags: Mapping[str, Tensor]) -> float:
        """What a mask is worth on all samples, nats."""
        self.path.write(lambda name, base, present: torch.where(flags[name], present, base))
        with torch.no_grad():
            gain = self._mean(self.measure, self.samples)
            return self.sign * gain - (
                self.options.penalty * self._mean(self.penalty, self.other) if self.other else 0.0
            )

    def _mean(self, measure: Measure, samples: Sequence[Passage]) -> float:
        total, counted = 0.0, 0.0
        for index, passage in enumerate(samples):
            sums, counts = measure.by_sample(self.path.model, index, self._batch(passage))
            total, counted = total + float(sums.sum()), counted + float(counts.sum())
            self.cost += Cost(forwards=sample_count(passage.batch))
        return total / counted

    def correct(self, step: int) -> None:
        """Grafts by the scores as they are, and adds what the gradient there says of each."""
        gates = self._graft(step)
        sums: dict[str, Tensor] = {}

        def take(name: str, gradient: Tensor) -> None:
            sums[name] = sums[name].add_(gradient) if name in sums else gradient.clone()

        parts: list[tuple[float, Measure, Sequence[Passage]]] = [(self.sign, self.measure, self.samples)]
        if self.other and self.options.penalty:
            parts.append((-self.options.penalty, self.penalty, self.other))
        with streamed_gradients(self.path.parameters, take):
            for weight, measure, samples in parts:
                index = self._turn(step, len(samples))
                backward(weight * measure.value(self.path.model, index, self._batch(samples[index])))
                count = sample_count(samples[index].batch)
                self.cost += Cost(count, count)
        for name, gradient in taken_gradients(self.path.model, self.path.parameters):
            take(name, gradient)
        for name, total in sums.items():
            total.mul_(self.path.change(name))
            if gates is not None:
                total.mul_(gates[name])
        if self.groups:
            zeros = torch.zeros(())
            margins = {
                name: margins_of(gather(like(own, sums[name])) if name in sums else zeros.expand(own.shape))
                for name, own in self.references.items()
            }
            self.unit_scores += self.options.rate * torch.cat([group.sums(margins) for group in self.groups])
        else:
            for name, total in sums.items():
                self.scores[name].add_(total, alpha=self.options.rate)

    def _turn(self, step: int, count: int) -> int:
        """The passage of a step: all in a random order, round by round."""
        generator = torch.Generator().manual_seed(self.options.seed + step // count)
        return int(torch.randperm(count, generator=generator)[step % count])

    def _graft(self, step: int) -> dict[str, Tensor] | None:
        """Moves the model to its graft; of a soft one how much each score moves its gate, at most 1."""
        if self.options.relaxation == "straight_through" or self.groups:
            flags = self.flags()
            self.path.write(lambda name, base, present: torch.where(flags[name], present, base))
            return None
        flat = torch.cat([gather(like(self.references[n], s)).flatten() for n, s in self.scores.items()])
        edge = kth_largest(flat, self.count)
        width = float((flat - edge).abs().mean()) * max(1 - step / self.options.steps, 1e-3) / 4
        gates = {name: torch.sigmoid((score - edge) / max(width, 1e-30)) for name, score in self.scores.items()}
        self.path.write(
            lambda name, base, present: torch.lerp(base.to(gates[name]), present.to(gates[name]), gates[name])
        )
        return {name: 4 * gate * (1 - gate) for name, gate in gates.items()}
