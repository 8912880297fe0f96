"""The straight line between a base and a finetune: models moved along it, and what is measured and written of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import interval_of, per_sample, resampled
from lightning_goldy.analysis.divergence import precise, shortened
from lightning_goldy.analysis.taylor.approximation import batch_parts
from lightning_goldy.core.architecture.adapters import (
    WeightSpace,
    adapted_layers,
    base_within,
    chosen_space,
    merged_state,
    merged_weights,
)
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.batches import move_batch, sample_count, sample_keys, take_samples
from lightning_goldy.core.files import StoreError, parse_json
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import canonical_name, model_class, require_number
from lightning_goldy.core.objective import FunctionObjective, Objective
from lightning_goldy.core.sharding import gather, inside_parallel, like, local, sum_over_shards, unshard_guard
from lightning_goldy.core.space import ParameterSpace, trainable_parameters
from lightning_goldy.core.store import fingerprint, open_tensors, pack_mask, unpack_mask, write_tensors
from lightning_goldy.core.vector import ParameterVector

MetricName = Literal["loss", "log_prob", "kl"]
Metric = MetricName | Callable[[nn.Module, Any], Tensor]
"""What a change is attributed of; a function gives the mean of a batch's samples, a scalar with a graph."""

# Elements worked on at a time: on a CPU few enough to stay in a core's cache and for float32 sums, on a GPU few enough
# for the memory.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 24
CHANGE_KEY = "goldy_change"


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


def _named_passages(name: str, batches: Iterable[Any], objective: Objective, together: int) -> list[Passage]:
    """As :func:`passages` of all samples, whose errors tell which of several arguments they are of."""
    try:
        return passages(batches, objective, None, together)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


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
        self.model, self._given = inside_parallel(model), base
        model = self.model
        self._space = within if isinstance(within, ParameterSpace) else None
        named = within if isinstance(within, str) else "merged" if within is None else "adapters"
        self.weight_space = chosen_space(model, named)
        """``merged`` or ``adapters``; None of a model without adapters."""

    def __enter__(self) -> ChangePath:
        given, model, within = self._given, self.model, self.weight_space
        merged = within == "merged" and self._space is None
        start = base_within(given, model) if merged else base_of(given, model, self._space)
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
        # By their bits, for -0.0 equals the 0.0 that it would come back as.
        bits = torch.int32 if step.dtype == torch.float32 else torch.int64
        spoiled = ((base + step).view(bits) != present.view(bits)).reshape(-1).nonzero().flatten()
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
        """The change of one parameter, flat, so many whole rows at a time with their place, in at least float32."""
        row = math.prod(self.starts[name].shape[1:])
        base, step = self.starts[name].reshape(-1), self._steps.get(name)
        size = max((_CPU_CHUNK if base.device.type == "cpu" else _GPU_CHUNK) // max(row, 1), 1) * max(row, 1)
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
        self.held_out = _named_passages("held_out", held_out, objective, together)
        self.collateral = [] if collateral is None else _named_passages("collateral", collateral, objective, together)
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


def graft(model: nn.Module, base: Base, mask: ParameterVector, *, factor: float = 1.0) -> dict[str, Tensor]:
    r"""The state of a model that has a part of its change, :math:`\theta_0 + a 1_S \Delta`.

    Args:
        model: The finetuned model; it stays as it is.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        mask: S, boolean, of the parameters that changed, or of the weights that adapters come to; others stay where
            they are now.
        factor: a; with 1 the elements of the mask are those of the model bit for bit.

    Raises:
        ValueError: The factor is not finite, or the mask not boolean.

    Returns:
        A state dict for ``load_state_dict``, on the CPU, whole on every rank of a sharded model; of merged weights that
        of the model that ``merge_and_unload()`` gives.

    Example:
        >>> from lightning_goldy.core.mask import ParameterMask
        >>> layer, before = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> mask = ParameterMask(ParameterSpace.of(layer), {"weight": torch.tensor([[True, False]])})
        >>> state = graft(layer, before, mask)
        >>> state["weight"][0, 0] == layer.weight[0, 0], state["weight"][0, 1] == before.weight[0, 1]
        (tensor(True), tensor(True))
    """
    require_number("factor", factor)
    state, model, mask = {}, inside_parallel(model), ParameterMask.of_vector(mask)
    with ChangePath(model, base, _within(model, mask)) as path:
        path.space.subspace(mask.space.names)  # names what is unknown
        owners = {id(path.parameters[name]): name for name in mask.space}
        merged = path.weight_space == "merged"
        for name, value in (merged_state(model) if merged else model.state_dict(keep_vars=True)).items():
            known = owners.get(id(value))
            whole = gather(value.detach()).cpu()
            if known is not None:
                before = gather(like(value.detach(), path.starts[known])).cpu()
                inside = gather(mask[known]).cpu()
                after = whole if factor == 1.0 else precise(before) + factor * (precise(whole) - precise(before))
                whole = torch.where(inside, after.to(whole.dtype), before.to(whole.dtype))
            # A copy, for the model's own values stay where they are.
            state[name] = whole.clone()
    return state


def _within(model: nn.Module, mask: ParameterVector) -> ParameterSpace | WeightSpace:
    """The mask's space where it is of what is trained, and else that of merged weights."""
    trained = dict(trainable_parameters(model))
    return mask.space if all(name in trained for name in mask.space) or not adapted_layers(model) else "merged"


def save_change(
    path: str | Path, model: nn.Module, base: Base, mask: ParameterVector, *, note: Mapping[str, Any] | None = None
) -> Path:
    """Writes the masked part of a model's change: which elements, their values, and the base that they belong on.

    With them go the buffers that the model saves, such as running statistics, which every graft has as they are now.
    Parameters outside the mask's space are those of the base.

    Args:
        path: Target file, safetensors.
        model: The finetuned model, plain.
        base: Its base.
        mask: Boolean, of the parameters that changed.
        note: JSON-able remarks for the header, such as what the graft recovers.

    Example:
        >>> import tempfile
        >>> from lightning_goldy.core.mask import ParameterMask
        >>> layer, before = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        >>> mask = ParameterMask(ParameterSpace.of(layer), {"weight": torch.tensor([[True, False]])})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_change(f"{folder}/change.safetensors", layer, before, mask)
        ...     _ = apply_change(before, path)
        >>> before.weight[0, 0] == layer.weight[0, 0], before.weight[0, 1] == layer.weight[0, 1]
        (tensor(True), tensor(False))
    """
    model = inside_parallel(model)
    stored: dict[str, Tensor] = {}
    encodings = {}
    within = _within(model, mask)
    whole = within if isinstance(within, str) else "adapters" if adapted_layers(model) else None
    with ChangePath(model, base, whole) as way:
        way.space.subspace(mask.space.names)  # names what is unknown
        for name, flags in mask.items():
            if bool(flags.any()):
                inside = gather(flags).cpu()
                stored[f"{name}.where"], encodings[name] = pack_mask(inside, name)
                stored[f"{name}.values"] = gather(way.parameters[name]).cpu()[inside].contiguous()
        starts = {name: like(way.parameters[name].detach(), way.starts[name]) for name in mask.space}
        base_hash = fingerprint(ParameterVector(mask.space, starts))
        rest, buffers = _beside(model, way, mask.space)
        stored |= {f"{name}.buffer": value for name, value in buffers.items()}
    header = {
        "model_class": model_class(model),
        "base_hash": base_hash,
        "rest_hash": _hash_of(rest),
        "names": list(mask.space.names),
        "encodings": encodings,
        "buffers": list(buffers),
        "note": dict(note or {}),
    }
    return write_tensors(path, stored, {CHANGE_KEY: json.dumps(header)})


def apply_change(model: nn.Module, path: str | Path, *, check: bool = True) -> dict[str, Any]:
    """Gives a base model the elements that :func:`save_change` kept, in place, and the buffers.

    Args:
        model: The base, plain.
        path: The file.
        check: Whether the model must be the very base that the change belongs on, also in what has not changed.

    Returns:
        The note that was saved with it.

    Raises:
        StoreError: The file holds no change, is broken, or is of another model or base; the model is then as it was.
    """
    model = inside_parallel(model)
    with open_tensors(path) as file:
        header = _change_header(path, file.metadata() or {})
        own = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
        missing = next((name for name in header["names"] if name not in own), None)
        if missing is not None:
            raise StoreError(f"{path}: the change is of {missing!r}, which this {model_class(model)} has not")
        if check:
            _require_base(own, path, header, model)
        buffers = _changed_buffers(model, path, file, header["buffers"])
        changed: dict[str, tuple[Tensor, Tensor]] = {}
        for name, encoding in header["encodings"].items():
            parameter = own.get(name)
            if parameter is None:
                raise StoreError(f"{path}: the change is of {name!r}, which this {model_class(model)} has not")
            packed, values = file.get_tensor(f"{name}.where"), file.get_tensor(f"{name}.values")
            where = unpack_mask(packed, parameter.shape, encoding, f"{path}: {name}")
            if int(where.count_nonzero()) != values.numel() or values.dtype != parameter.dtype:
                raise StoreError(
                    f"{path}: {name} has {values.numel()} values of {values.dtype} for "
                    f"{int(where.count_nonzero())} elements of {parameter.dtype}"
                )
            changed[name] = (where, values)
    with torch.no_grad():
        for name, (where, values) in changed.items():
            own[name][where.to(own[name].device)] = values.to(own[name].device)
        for buffer, value in buffers:
            buffer.copy_(value)
    return dict(header["note"])


def _beside(model: nn.Module, way: ChangePath, inside: ParameterSpace) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's parameters outside a space, as the base has them, and copies of the buffers that it saves."""
    owners = {id(parameter): name for name, parameter in way.parameters.items()}
    state = merged_state(model) if way.weight_space == "merged" else model.state_dict(keep_vars=True)
    rest: dict[int, tuple[str, Tensor]] = {}
    buffers = {}
    for name, value in state.items():
        known = owners.get(id(value))
        if known in inside or not isinstance(value, Tensor):
            continue
        if known is not None:
            rest[id(value)] = known, like(value.detach(), way.starts[known])
        elif isinstance(value, nn.Parameter):
            rest.setdefault(id(value), (canonical_name(name), value.detach()))
        else:
            buffers[canonical_name(name)] = gather(value.detach()).cpu().clone(memory_format=torch.contiguous_format)
    return dict(rest.values()), buffers


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of tensors in the order of their names; of none an empty text."""
    return fingerprint(_vector_of({name: tensors[name] for name in sorted(tensors)})) if tensors else ""


def _require_base(own: Mapping[str, Tensor], path: str | Path, header: Mapping[str, Any], model: nn.Module) -> None:
    """Refuses parameters that are not those of the base that a change belongs on."""
    names, told = header["names"], model_class(model)
    if fingerprint(_vector_of({name: own[name] for name in names})) != header["base_hash"]:
        raise StoreError(
            f"{path}: this {told} is not the base that the change belongs on, by the hash of its "
            "values; apply_change(..., check=False) puts the elements in all the same"
        )
    rest = {name: value for name, value in own.items() if name not in set(names)}
    if header["rest_hash"] in (None, _hash_of(rest)):
        return
    tied = {name: first for name, first in _ties(model).items() if first in names}
    if tied and header["rest_hash"] == _hash_of({**rest, **{name: own[first] for name, first in tied.items()}}):
        name, first = next(iter(tied.items()))
        raise StoreError(
            f"{path}: the change moves {first!r} and leaves {name!r} as it was, as adapters of the one alone do, and "
            f"this {told} ties the two, so that both would move; untie them first: give {name!r} a parameter of its "
            "own, torch.nn.Parameter(weight.detach().clone()), and set config.tie_word_embeddings = False"
        )
    raise StoreError(
        f"{path}: this {told} is the base in the {len(names)} parameters that the change is of, and another one "
        f"in the {len(rest)} others, by the hash of their values; apply_change(..., check=False) puts the elements "
        "in all the same"
    )


def _ties(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are others, with the name that those have first."""
    first: dict[int, str] = {}
    named = [(canonical_name(name), value) for name, value in model.named_parameters(remove_duplicate=False)]
    known = [(name, first.setdefault(id(value), name)) for name, value in named]
    return {name: owner for name, owner in known if name != owner}


def _vector_of(tensors: Mapping[str, Tensor]) -> ParameterVector:
    held = {name: value.detach() for name, value in tensors.items()}
    return ParameterVector(ParameterSpace.of_tensors(held), held)


def _changed_buffers(
    model: nn.Module, path: str | Path, file: Any, names: Sequence[str]
) -> list[tuple[Tensor, Tensor]]:
    """A model's buffers with the values that a file of :func:`save_change` has for them."""
    own = {canonical_name(name): value for name, value in model.state_dict(keep_vars=True).items()}
    pairs = []
    for name in names:
        value, buffer = file.get_tensor(f"{name}.buffer"), own.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            held = "none" if buffer is None else f"{tuple(buffer.shape)}, {buffer.dtype}"
            raise StoreError(
                f"{path}: buffer {name!r} is {tuple(value.shape)}, {value.dtype}; this {model_class(model)} has {held}"
            )
        pairs.append((buffer, value))
    return pairs


def _change_header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if CHANGE_KEY not in metadata:
        raise StoreError(f"{path}: holds no sparse change; save_change and `goldy graft` write such files")
    try:
        header = parse_json(metadata[CHANGE_KEY])
        header = {"rest_hash": None, "buffers": [], **header}
        names, encodings, note = header["names"], header["encodings"], header["note"]
        right = (
            isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and isinstance(encodings, dict)
            and all(name in names and isinstance(encoding, str) for name, encoding in encodings.items())
            and isinstance(note, dict)
            and isinstance(header["base_hash"], str)
            and isinstance(header["rest_hash"], str | None)
            and isinstance(header["buffers"], list)
            and all(isinstance(name, str) for name in header["buffers"])
        )
    except (ValueError, LookupError, TypeError) as error:
        raise StoreError(f"{path}: its header is broken ({error})") from error
    if not right:
        raise StoreError(f"{path}: its header is not that of a sparse change")
    return dict(header)
