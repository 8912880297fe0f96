"""How much of a finetune's change survives when attention is frozen and MLPs are linear."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import counted_forwards, divergence_sum, own_share
from lightning_goldy.analysis.linearized.variants import FrozenAttention, Intervention, TangentModel, variant_parts
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture.adapters import Line, base_within, line_from
from lightning_goldy.core.architecture.families import eager_attention
from lightning_goldy.core.autodiff import Substituted
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_choice, suggestion
from lightning_goldy.core.objective import FunctionObjective, Objective, objective_for
from lightning_goldy.core.sharding import Replicas, inside_parallel
from lightning_goldy.core.vector import ParameterVector

Explanation = Literal["frozen_attention", "linear_mlp", "linear_mlp_current", "both", "tangent"]

LABELS: Mapping[str, str] = {
    "frozen_attention": "attention frozen",
    "linear_mlp": "MLPs linear",
    "linear_mlp_current": "MLPs linear in their parameters",
    "both": "attention frozen, MLPs linear",
    "tangent": "all linear (tangent)",
}


@dataclass(frozen=True)
class SurvivingChange(AnalysisResult):
    r"""What one variant of the model keeps of the change.

    With f_0, f_t and f_v the logits at target positions of the base, the present model and the variant:

    Args:
        variant: Which one.
        loss: Its loss L_v, nats.
        loss_share: (L_v - L_0) / (L_t - L_0), a fraction: 1 where the whole change survives, 0 where none does; it may
            lie outside. None where the loss has not changed.
        logit_share: <f_v - f_0, f_t - f_0> / ||f_t - f_0||^2, likewise. None without logits or without change.
        relative_error: ||f_t - f_v|| / ||f_t - f_0||: 0 where the variant is the present model. None without logits.
        kl_divergence: Mean KL(p_t || p_v), nats. None without logits.
        top1_agreement: Share of the positions where both prefer the same token, a fraction. None without logits.
    """

    variant: str
    loss: float
    loss_share: float | None
    logit_share: float | None
    relative_error: float | None
    kl_divergence: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class ExplainedChange(AnalysisResult):
    """What of a finetune's change survives in each variant of the model.

    Args:
        base_loss: L(theta_0), nats.
        loss: L(theta_t), nats.
        variants: One record per variant, in the order asked for.
        step_norm: ||Delta||, parameter units.
        n_targets: Target positions.
        cost: Passes of the model, those of its variants and of the base included.
        space: ``merged`` or ``adapters``; None of a model without adapters.
    """

    analysis: ClassVar[str] = "explain_change"

    base_loss: float
    loss: float
    variants: tuple[dict[str, Any], ...]
    step_norm: float
    n_targets: int
    cost: Cost = dataclasses.field(default=Cost(), compare=False)
    space: str | None = None

    @property
    def change(self) -> float:
        """L(theta_t) - L(theta_0), nats."""
        return self.loss - self.base_loss

    @property
    def records(self) -> tuple[SurvivingChange, ...]:
        """The variants as records."""
        return tuple(SurvivingChange(**variant) for variant in self.variants)

    def of(self, variant: Explanation) -> SurvivingChange:
        """The record of one variant.

        Raises:
            ValueError: It was not asked for.
        """
        records = {record.variant: record for record in self.records}
        if variant not in records:
            raise ValueError(f"there is no variant {variant!r}; {suggestion(variant, records)}")
        return records[variant]

    def metrics(self) -> dict[str, float | None]:
        """Scalars by name, as a callback logs them."""
        metrics: dict[str, float | None] = {"base_loss": self.base_loss, "loss": self.loss, "change": self.change}
        for field in dataclasses.fields(SurvivingChange)[1:]:
            for variant in self.variants:
                if variant[field.name] is not None:
                    metrics[f"{field.name}/{variant['variant']}"] = variant[field.name]
        return metrics

    def details(self) -> dict[str, Any]:
        """The variants, the losses and the length of the step."""
        numbers = {name: getattr(self, name) for name in ("step_norm", "base_loss", "loss", "n_targets")}
        told = {} if self.space is None else {"space": self.space}
        return {"variants": [dict(variant) for variant in self.variants], **numbers, **told}

    def table(self) -> str:
        """The variants as lines of text: loss in nats, shares of the change in percent.

        Example:
            >>> each = {"variant": "both", "loss": 1.5, "loss_share": 0.5, "logit_share": None, "relative_error": None}
            >>> each |= {"kl_divergence": None, "top1_agreement": None}
            >>> print(ExplainedChange(2.0, 1.0, (each,), 0.1, 8).table().splitlines()[-1])
            attention frozen, MLPs linear   1.5000   50.0        -        -        -
        """
        head = f"{'':31} {'loss':>6} {'loss %':>6} {'logits %':>8} {'error %':>8} {'KL':>8}"
        lines = [head, f"{'base':31} {self.base_loss:6.4f}", f"{'present':31} {self.loss:6.4f}"]
        for each in self.records:
            shares = [_percent(each.loss_share, 6), _percent(each.logit_share, 8), _percent(each.relative_error, 8)]
            divergence = f"{'-':>8}" if each.kl_divergence is None else f"{each.kl_divergence:8.2g}"
            lines.append(f"{LABELS[each.variant]:31} {each.loss:6.4f} {' '.join(shares)} {divergence}")
        return "\n".join(lines)


def _percent(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{100 * value:{width}.1f}"


def explain_change(
    model: nn.Module,
    base: Base,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    variants: Sequence[Explanation] = ("frozen_attention", "linear_mlp", "both"),
    space: str = "merged",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> ExplainedChange:
    r"""How much of a finetune's change in loss and logits survives with attention frozen, with linear MLPs, with both.

    .. math:: \frac{L_v - L_0}{L_t - L_0}, \qquad
        \frac{\langle f_v - f_0, f_t - f_0 \rangle}{\lVert f_t - f_0 \rVert^2}

    for each variant v of the present model. What survives with attention frozen did not need other patterns; what
    survives with linear MLPs needed no nonlinearity of theirs beyond the base's. Shares of different variants do not
    add up. All are computed with the family's eager attention, so that kernels do not differ. The model comes back as
    it was. On several ranks the batches are shared out; every rank must call.

    Args:
        model: The finetuned model, plain.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        batches: Batches that the objective understands, the same on every rank.
        objective: The loss; next-token prediction by default.
        variants: ``frozen_attention``, ``linear_mlp`` (at the base's inputs), ``linear_mlp_current`` (at the present
            inputs), ``both`` (the first two together), ``tangent`` (everything linear).
        space: Of a model with adapters ``merged``, linear in the weights that they come to, or ``adapters``.
        progress: Called with (batches done, batches in all) on this rank.
        split_over_ranks: Whether to share batches out over the ranks of an initialised process group.

    Returns:
        Losses, and shares by variant.

    Raises:
        UnsupportedArchitectureError: A variant of this family cannot be made; the message names the part.
        ValueError: A variant is unknown or named twice, the model sharded, there is no batch, a value is not finite, or
            the space is unknown.
        SpaceError: The base is of another model.
        AdapterError: There is no line through the model's merged weights.
        TypeError: It cannot be a base.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> base = ParameterVector.of(model)
        >>> with torch.no_grad():
        ...     _ = model.transformer.h[1].mlp.c_proj.weight.mul_(9)  # behind the last attention
        >>> found = explain_change(model, base, [{"input_ids": torch.tensor([[1, 2, 3]])}])
        >>> found.of("frozen_attention").loss_share, found.of("frozen_attention").relative_error
        (1.0, 0.0)
    """
    check_variants(variants)
    model = inside_parallel(model)
    objective = objective_for(model, objective)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with (
        preserved(model),
        replicas.together("explain_change"),
        line_from(model, base_within(base, model, space), space) as line,
    ):
        start = line.start
        made = {name: variant_parts(name, model, start) for name in variants}
        frozen = any(isinstance(part, FrozenAttention) for parts in made.values() for part in parts)
        sums: dict[str, float] = defaultdict(float)
        with torch.no_grad(), counted_forwards(model, sums), eager_attention(model) if frozen else nullcontext():
            for batch in own_share(list(batches), model, replicas, progress):
                _add_batch(sums, _Measured(model, start, objective, batch), made)
        total: dict[str, float] = defaultdict(float)
        for part in replicas.gather_objects(dict(sums)):
            for name, value in part.items():
                total[name] += value
    return _result(total, variants, line)


def check_variants(variants: Sequence[str]) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: A variant is unknown or named twice, or none is named.
    """
    for name in variants:
        require_choice("variant", name, get_args(Explanation))
    if not variants or len(set(variants)) < len(variants):
        raise ValueError(f"variants must name each of some variants once; got {list(variants)}")


@dataclass(frozen=True, eq=False)
class _Measured:
    """One batch and what measures it."""

    model: nn.Module
    start: ParameterVector
    objective: Objective
    batch: Any

    def __call__(self, model: nn.Module) -> tuple[float, int, Tensor | None]:
        """Mean loss, what it is a mean over, and the logits where there are any."""
        if isinstance(self.objective, FunctionObjective) and self.objective.logits is None:
            return float(self.objective.loss(model, self.batch)), sample_count(self.batch), None
        target = self.objective.logits_and_targets(model, self.batch)
        # In float64, or the change of a short finetune's loss would be a few units of its last place.
        target = dataclasses.replace(target, logits=target.logits.double())
        own = isinstance(self.objective, FunctionObjective)  # whose loss need not be that of the targets
        loss = self.objective.loss(model, self.batch) if own else target.loss()
        return float(loss), len(target.targets), target.logits


def _add_batch(sums: dict[str, float], measure: _Measured, made: Mapping[Explanation, tuple[nn.Module, ...]]) -> None:
    """Adds a batch's sums: losses times numbers of targets, and what is compared in logits."""
    loss, weight, logits = measure(measure.model)
    base_loss, _, base_logits = measure(Substituted(measure.model, measure.start))
    sums["loss"] += weight * loss
    sums["base_loss"] += weight * base_loss
    sums["n_targets"] += weight
    if logits is not None and base_logits is not None:
        change = logits - base_logits
        log_probs = torch.log_softmax(logits, dim=-1)
        sums["in_logits"] += weight
        sums["change_square"] += float(change.square().sum())
    for name, parts in made.items():
        with ExitStack() as stack:
            for part in parts:
                if isinstance(part, Intervention):
                    stack.enter_context(part)
            own, _, predicted = measure(parts[0] if isinstance(parts[0], TangentModel) else measure.model)
        sums[f"loss/{name}"] += weight * own
        if logits is None or base_logits is None or predicted is None:
            continue
        sums[f"residual/{name}"] += float((logits - predicted).square().sum())
        sums[f"aligned/{name}"] += float(((predicted - base_logits) * change).sum())
        sums[f"divergence/{name}"] += divergence_sum(log_probs, predicted)
        sums[f"agreed/{name}"] += int((logits.argmax(-1) == predicted.argmax(-1)).sum())


def _result(sums: Mapping[str, float], variants: Sequence[Explanation], line: Line) -> ExplainedChange:
    count = int(sums["n_targets"])
    if not count:
        raise ValueError("there is no batch to explain a change on")
    loss, base_loss = sums["loss"] / count, sums["base_loss"] / count
    for what, value in (("present loss", loss), ("base's loss", base_loss)):
        if not math.isfinite(value):
            raise ValueError(f"the {what} is {value}: there is no change to explain")
    records = []
    for name in variants:
        own = sums[f"loss/{name}"] / count
        share = (own - base_loss) / (loss - base_loss) if loss != base_loss else None
        records.append({"variant": name, "loss": own, "loss_share": share, **_in_logits(sums, name)})
    cost = Cost(forwards=int(sums["forwards"]))
    return ExplainedChange(base_loss, loss, tuple(records), line.step_norm, count, cost, line.space)


def _in_logits(sums: Mapping[str, float], name: Explanation) -> dict[str, float | None]:
    if not sums["in_logits"]:
        return dict.fromkeys(("logit_share", "relative_error", "kl_divergence", "top1_agreement"))
    square = sums["change_square"]
    return {
        "logit_share": sums[f"aligned/{name}"] / square if square else None,
        "relative_error": math.sqrt(sums[f"residual/{name}"] / square) if square else 0.0,
        "kl_divergence": sums[f"divergence/{name}"] / sums["n_targets"],
        "top1_agreement": sums[f"agreed/{name}"] / sums["n_targets"],
    }
