"""What is found on how much of a finetune's change survives in variants of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.naming import suggestion

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
    """

    analysis: ClassVar[str] = "explain_change"

    base_loss: float
    loss: float
    variants: tuple[dict[str, Any], ...]
    step_norm: float
    n_targets: int

    @property
    def change(self) -> float:
        """L(theta_t) - L(theta_0), nats."""
        return self.loss - self.base_loss

    @property
    def records(self) -> tuple[SurvivingChange, ...]:
        """The variants as records."""
        return tuple(SurvivingChange(**each) for each in self.variants)

    def of(self, variant: Explanation) -> SurvivingChange:
        """The record of one variant.

        Raises:
            ValueError: It was not asked for.
        """
        found = {each.variant: each for each in self.records}
        if variant not in found:
            raise ValueError(f"there is no variant {variant!r}; {suggestion(variant, found)}")
        return found[variant]

    def metrics(self) -> dict[str, float | None]:
        """Scalars by name, as a callback logs them."""
        found: dict[str, float | None] = {"base_loss": self.base_loss, "loss": self.loss, "change": self.change}
        for name in ("loss", "loss_share", "logit_share", "relative_error", "kl_divergence", "top1_agreement"):
            for each in self.variants:
                if each[name] is not None:
                    found[f"{name}/{each['variant']}"] = each[name]
        return found

    def details(self) -> dict[str, Any]:
        """The variants, the losses and the length of the step."""
        result = {"variants": [dict(each) for each in self.variants], "step_norm": self.step_norm}
        return {**result, "base_loss": self.base_loss, "loss": self.loss, "n_targets": self.n_targets}

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
