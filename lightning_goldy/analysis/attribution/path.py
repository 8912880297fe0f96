"""The straight line between a base and a finetune: models moved along it, and what is measured of them there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import interval_of, per_sample, resampled
from lightning_goldy.analysis.divergence import precise, shortened
from lightning_goldy.analysis.taylor.approximation import batch_parts
from lightning_goldy.core.architecture.adapters import chosen_space, merged_weights
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.batches import move_batch, sample_count, sample_keys, take_samples
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import FunctionObjective, Objective
from lightning_goldy.core.sharding import local, sum_over_shards, unshard_guard
from lightning_goldy.core.space import ParameterSpace

MetricName = Literal["loss", "log_prob", "kl"]
Metric = MetricName | Callable[[nn.Module, Any], Tensor]
"""What a change is attributed of; a function gives the mean of a batch's samples, a scalar with a graph."""

# Elements worked on at a time: on a CPU few enough to stay in a core's cache and for float32 sums, on a GPU few enough
# for the memory.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 24


@dataclass(frozen=True, eq=False)
class Passage:
    """Samples that go through the model together.

    Args:
        batch: On the CPU or where the model is.
        weight: What its mean counts for in the metric; those of all passages add up to 1.
    """

    batch: Any
    weight: float = math.nan


class Measure:
    """A metric of a model, passage by passage, with the predictions of the base where it needs them.

    Args:
        metric: ``loss`` (mean over targets, nats), ``log_prob`` (mean over samples, nats), ``kl`` (KL(p_base || p),
            mean over targets, nats), or a function.
        objective: How a batch becomes a loss.
    """

    def __init__(self, metric: Metric, objective: Objective) -> None:
        self.metric, self.objective = metric, objective
        self.anchors: dict[int, Tensor] = {}
        """Log-probabilities of the base by passage, shape ``[N, V]``."""

    def value(self, model: nn.Module, index: int, batch: Any) -> Tensor:
        """The metric on one passage, a scalar."""
        if callable(self.metric):
            found = self.metric(model, batch)
            if not isinstance(found, Tensor) or found.ndim:
                told = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"a metric that is a function must return a scalar tensor; got {told}")
            return found
        if self.metric == "loss":
            return self.objective.loss(model, batch)
        if self.metric == "log_prob":
            return self.objective.log_probs(model, batch).mean()
        logits = precise(self.objective.logits_and_targets(model, batch).logits)
        anchor = self.anchors[index].to(logits.device)
        return F.kl_div(logits.log_softmax(-1), anchor, log_target=True, reduction="sum") / len(logits)

    def keep_anchor(self, model: nn.Module, index: int, batch: Any) -> None:
        """Keeps the base's predictions, where the metric compares with them."""
        if self.metric == "kl":
            logits = precise(self.objective.logits_and_targets(model, batch).logits)
            self.anchors[index] = logits.log_softmax(-1).cpu()

    def by_sample(self, model: nn.Module, index: int, batch: Any) -> tuple[Tensor, Tensor]:
        """Sums of the metric over each sample's targets, and what each counts for, shapes ``[B]``, float64.

        What is no sum over samples, as under a function, is that of the passage as one sample.
        """
        if callable(self.metric) or isinstance(self.objective, FunctionObjective):
            count = sample_count(batch)
            sums = [count * float(self.value(model, index, batch))]
            return torch.tensor(sums, dtype=torch.float64), torch.tensor([count], dtype=torch.float64)
        if self.metric == "log_prob":
            found = self.objective.log_probs(model, batch).double().cpu()
            return found, torch.ones_like(found)
        target = self.objective.logits_and_targets(model, batch)
        if self.metric == "loss":
            values = target.token_losses()
        else:
            anchor = self.anchors[index].to(target.logits.device)
            logits = precise(target.logits).log_softmax(-1)
            values = F.kl_div(logits, anchor, log_target=True, reduction="none").sum(-1)
        where, zeros = target.sample.cpu(), torch.zeros(target.n_samples, dtype=torch.float64)
        return zeros.index_add(0, where, values.double().cpu()), torch.bincount(where, minlength=len(zeros)).double()


def passages(
    batches: Iterable[Any], objective: Objective, n_samples: int | None, samples_per_pass: int | None
) -> list[Passage]:
    """The samples that have targets, so many together.

    Args:
        batches: Batches that the objective understands.
        objective: Cuts batches into samples.
        n_samples: Only the first so many; all by default.
        samples_per_pass: Samples together; by default as many as leave 8 passages, by which intervals are told.
    """
    kept = shortened(batches, objective, n_samples, None)
    together = samples_per_pass or max(1, sum(map(sample_count, kept)) // 8)
    return [
        Passage(part) for batch in kept for part in batch_parts(batch, objective, -(-sample_count(batch) // together))
    ]


def interleaved(batches: Iterable[Any], n_samples: int) -> tuple[list[Any], list[Any]]:
    """Every other one of the first samples, and the ones between; both have the mixture that the batches have.

    Args:
        batches: That can be cut into samples.
        n_samples: Of both together, at most.

    Example:
        >>> first, second = interleaved([{"x": torch.arange(3)}, {"x": torch.arange(3, 7)}], 6)
        >>> [part["x"].tolist() for part in first], [part["x"].tolist() for part in second]
        ([[0, 2], [4]], [[1], [3, 5]])
    """
    parts: tuple[list[Any], list[Any]] = ([], [])
    seen = 0
    for batch in batches:
        size = min(sample_count(batch), n_samples - seen)
        for half in (0, 1):
            rows = torch.arange((seen + half) % 2, size, 2)
            if len(rows):
                parts[half].append(take_samples(batch, rows))
        seen += size
        if seen >= n_samples:
            break
    return parts


def tells_distributions(objective: Objective) -> bool:
    """Whether an objective has logits, by which divergences are told; one that is a function may have none.

    Example:
        >>> tells_distributions(FunctionObjective(lambda model, batch: model(batch).mean()))
        False
    """
    return not isinstance(objective, FunctionObjective) or objective.logits is not None


@torch.no_grad()
def try_metric(metric: Metric, model: nn.Module, objective: Objective, batches: Sequence[Any], told: str) -> None:
    """Measures batches once, so that what cannot be measured fails before there is anything to lose.

    Args:
        metric: As for :class:`Measure`.
        model: In evaluation mode.
        objective: How a batch becomes a loss.
        batches: That are to be measured later.
        told: What the batches are called in messages.

    Raises:
        ValueError: A batch cannot go through the model, has no target, or its metric is not finite.

    Example:
        >>> square, layer = FunctionObjective(lambda model, batch: model(batch).square().mean()), nn.Linear(1, 1)
        >>> try_metric("loss", layer, square, [torch.ones(1, 1), torch.full((1, 1), math.inf)], "collateral")
        Traceback (most recent call last):
        ValueError: collateral batch 1: the loss is [inf], not finite
    """
    measure, device = Measure(metric, objective), next(model.parameters()).device
    for index, batch in enumerate(batches):
        try:
            placed = move_batch(batch, device)
            measure.keep_anchor(model, index, placed)
            sums, _ = measure.by_sample(model, index, placed)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{told} batch {index} cannot be measured by {model_class(model)}: {error}") from error
        if not bool(sums.isfinite().all()):
            raise ValueError(f"{told} batch {index}: the {metric} is {sums.tolist()}, not finite")


class ChangePath:
    r"""A model moved between its base and where it is; the present values are copied back at the end.

    Beside the model stand the base (a copy only where it is on another device) and its change; of parameters below
    float32, whose change would be larger than they are, their present values in place of it.

    Args:
        model: Its parameters are changed in place.
        base: :math:`\theta_0`.
        within: The parameters that move, or of a model with adapters ``merged``, the weights that they come to, under
            the names that ``merge_and_unload()`` gives them, or ``adapters``.

    Raises:
        AdapterError: Merged weights cannot be told.

    Example:
        >>> from lightning_goldy.core.vector import ParameterVector
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> base = ParameterVector(ParameterSpace.of(layer), {"weight": layer.weight.detach() - 1})
        >>> with ChangePath(layer, base) as path:
        ...     path.move_to(0.0)
        ...     at_base = layer.weight.item()
        >>> round(layer.weight.item() - at_base, 6)
        1.0
    """

    def __init__(self, model: nn.Module, base: Base, within: ParameterSpace | str | None = None) -> None:
        self.model, self._given = model, base
        self._space = within if isinstance(within, ParameterSpace) else None
        named = within if isinstance(within, str) else "merged" if within is None else "adapters"
        self.weight_space = chosen_space(model, named)
        """``merged`` or ``adapters``; None of a model without adapters."""

    def __enter__(self) -> ChangePath:
        start = base_of(self._given, self.model, self._space)
        with ExitStack() as stack:
            if self.weight_space == "merged":
                start, self.parameters = stack.enter_context(merged_weights(self.model, start))
            else:
                self.parameters = start.space.resolve(self.model)
            self.space: ParameterSpace = start.space
            # Placed once: on a GPU the base would be sent there with every gradient.
            self.starts = {name: local(start.placed(name, own)) for name, own in self.parameters.items()}
            self._steps: dict[str, Tensor] = {}
            self._mended: dict[str, tuple[Tensor, Tensor]] = {}
            self._ends: dict[str, Tensor] = {}
            for name, parameter in self.parameters.items():
                self._keep(name, local(parameter))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self._stack:
            self.write(lambda name, base, present: present)

    def _keep(self, name: str, present: Tensor) -> None:
        """Keeps a change, and the values of the elements that base and change do not add up to."""
        base = self.starts[name]
        if present.dtype != base.dtype or present.dtype not in (torch.float32, torch.float64):
            self._ends[name] = present.clone()
            return
        step = present - base
        spoiled = (base + step != present).reshape(-1).nonzero().flatten()
        self._steps[name] = step
        self._mended[name] = spoiled.int() if step.numel() < 1 << 31 else spoiled, present.reshape(-1)[spoiled]

    def present(self, name: str) -> Tensor:
        """The value that a parameter came with, this process's part, to the last bit; not to be written to."""
        if name in self._ends:
            return self._ends[name]
        value, (places, kept) = self.starts[name] + self._steps[name], self._mended[name]
        value.view(-1)[places.long()] = kept
        return value

    def write(self, value: Callable[[str, Tensor, Tensor], Tensor]) -> None:
        """Gives every parameter (this process's part) a value made of its name, its base and its present value."""
        unshard_guard(self.model)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                local(parameter).copy_(value(name, self.starts[name], self.present(name)))
        # Inside autocast a low-precision copy of the old weight may be cached and would be used in its place.
        torch.clear_autocast_cache()

    def move_to(self, t: float) -> None:
        """Moves to base + t (present - base), the base and the present values themselves at 0 and 1."""
        if t in (0.0, 1.0):
            self.write(lambda name, base, present: present if t else base)
            return
        unshard_guard(self.model)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                part, base = local(parameter), self.starts[name]
                if name in self._steps:
                    torch.add(base, self._steps[name], alpha=t, out=part)
                else:
                    part.copy_(torch.lerp(precise(base), precise(self._ends[name]).to(precise(base)), t))
        torch.clear_autocast_cache()

    def change(self, name: str) -> Tensor:
        """Present value minus base of one parameter, this process's part, at least float32; not to be written to."""
        if name in self._steps:
            return self._steps[name]
        return precise(self._ends[name]) - precise(self.starts[name])

    def changes(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """The change of one parameter, flat, piece by piece with its place, in at least float32."""
        base, step = self.starts[name].reshape(-1), self._steps.get(name)
        size = _CPU_CHUNK if base.device.type == "cpu" else _GPU_CHUNK
        for start in range(0, base.numel(), size):
            piece = slice(start, start + size)
            if step is not None:
                yield piece, step.view(-1)[piece]
            else:
                present = self._ends[name].view(-1)[piece]
                wide = torch.promote_types(present.dtype, torch.float32)
                yield piece, present.to(wide) - base[piece].to(wide)

    def squares(self) -> list[float]:
        """||Delta||^2 of each parameter, over all shards."""
        sums = []
        for name, base in self.starts.items():
            total = torch.zeros((), dtype=torch.float64, device=base.device)
            for _, change in self.changes(name):
                total += torch.dot(change, change)
            sums.append(total)
        return list(map(float, sum_over_shards(sums, list(self.parameters.values()))))


class Worth:
    """The metric, on some samples, of models that have some parameters' change and the base's values of all others."""

    def __init__(self, path: ChangePath, objective: Objective, metric: Metric, batches: Iterable[Any]) -> None:
        self.path, self.measure = path, Measure(metric, objective)
        self.samples = passages(batches, objective, None, 1 << 30)
        self.device = next(path.model.parameters()).device
        path.move_to(0.0)
        for index, passage in enumerate(self.samples):
            self.measure.keep_anchor(path.model, index, move_batch(passage.batch, self.device))

    def move(self, names: set[str]) -> None:
        """Moves the model there."""
        self.path.write(lambda name, base, present: present if name in names else base)

    def of(self, names: set[str]) -> float:
        """The metric there."""
        self.move(names)
        total = count = 0.0
        for index, passage in enumerate(self.samples):
            sums, counts = self.measure.by_sample(self.path.model, index, move_batch(passage.batch, self.device))
            total, count = total + float(sums.sum()), count + float(counts.sum())
        return total / count


class Bench:
    """Measures the model as it stands: the metric on held-out samples, loss and divergence on other text."""

    def __init__(
        self,
        path: ChangePath,
        objective: Objective,
        metric: Metric,
        held_out: Iterable[Any],
        collateral: Iterable[Any] | None,
        samples_per_pass: int | None,
    ) -> None:
        self.model, self.device = path.model, next(path.model.parameters()).device
        together = samples_per_pass or 1 << 30
        self.held_out = passages(held_out, objective, None, together)
        self.collateral = [] if collateral is None else passages(collateral, objective, None, together)
        self.measure, self.loss = Measure(metric, objective), Measure("loss", objective)
        self.divergence = Measure("kl", objective) if tells_distributions(objective) else None
        path.move_to(0.0)
        self._keep(self.measure, self.held_out)
        if self.divergence is not None:
            self._keep(self.divergence, self.collateral)
        self.base, self.counts = self._values(self.measure, self.held_out)
        self.base_loss, self.loss_counts = self._values(self.loss, self.collateral)
        path.move_to(1.0)
        self.now, _ = self._values(self.measure, self.held_out)
        self.base_value, self.value = (float(v.sum() / self.counts.sum()) for v in (self.base, self.now))
        self.base_collateral = float(self.base_loss.sum() / self.loss_counts.sum()) if self.collateral else None
        self.pairs: dict[str, dict[str, Any]] = {}
        self.finetune = self.point("finetune", 1.0, 1.0)

    def point(self, method: str, share: float, factor: float) -> dict[str, Any]:
        """What the model as it stands recovers and harms."""
        values, _ = self._values(self.measure, self.held_out)
        counts = resampled(len(values))
        gain, whole = values - self.base, self.now - self.base
        if method == "attribution" and share < 1:
            self._remember(f"recovered/{share:.4g}", self.held_out, gain, whole)
        moved = float(whole.sum()) != 0
        low, high = interval_of((counts @ gain) / (counts @ whole)) if moved and len(values) > 1 else (None, None)
        point: dict[str, Any] = {
            "method": method,
            "share": share,
            "factor": factor,
            "value": float(values.sum() / self.counts.sum()),
            "recovered": float(gain.sum() / whole.sum()) if moved else None,
            "low": low,
            "high": high,
        }
        if self.collateral:
            losses, _ = self._values(self.loss, self.collateral)
            counts = resampled(len(losses))
            harm = losses - self.base_loss
            if method == "finetune":
                self._remember("harm", self.collateral, harm, self.loss_counts)
            low, high = interval_of((counts @ harm) / (counts @ self.loss_counts)) if len(harm) > 1 else (None, None)
            total = self.loss_counts.sum()
            point |= {"harm": float(harm.sum() / total), "harm_low": low, "harm_high": high}
            if self.divergence is not None:
                divergences, _ = self._values(self.divergence, self.collateral)
                point["kl"] = float(divergences.sum() / total)
        return point

    def recovered(self) -> float:
        """What the model as it stands recovers, where the finetune changed something."""
        values, _ = self._values(self.measure, self.held_out)
        return float((values - self.base).sum() / (self.now - self.base).sum())

    def _remember(self, metric: str, samples: Sequence[Passage], above: Tensor, below: Tensor) -> None:
        """Keeps what a number is of each sample; one below which everything is 0 is none."""
        keys = [key for passage in samples for key in sample_keys(passage.batch)]
        found = per_sample(keys, above.tolist(), below.tolist()) if float(below.sum()) != 0 else None
        if found is not None:
            self.pairs[metric] = found

    def _keep(self, measure: Measure, samples: Sequence[Any]) -> None:
        for index, passage in enumerate(samples):
            measure.keep_anchor(self.model, index, move_batch(passage.batch, self.device))

    def _values(self, measure: Measure, samples: Sequence[Any]) -> tuple[Tensor, Tensor]:
        found = [
            measure.by_sample(self.model, index, move_batch(passage.batch, self.device))
            for index, passage in enumerate(samples)
        ]
        empty = torch.zeros(0, dtype=torch.float64)
        sums, counts = (torch.cat([empty, *(pair[place] for pair in found)]) for place in (0, 1))
        return sums, counts
