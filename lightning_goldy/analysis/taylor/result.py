"""What the comparison of a finetune with its Taylor expansion found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lightning_goldy.analysis.result import AnalysisResult, Cost

Regime = Literal["unchanged", "lazy", "weakly nonlinear", "nonlinear"]
By = Literal["block", "tensor"]

LAZY = 0.1
"""Relative error of the first order below which the step is called lazy."""
NONLINEAR = 0.5
"""Relative error of the first order from which on it is called nonlinear."""


@dataclass(frozen=True)
class OrderFit(AnalysisResult):
    """What the expansion of one order predicts.

    Args:
        order: k.
        loss: Predicted loss at the present parameters, nats.
        residual: Actual minus predicted loss, nats.
        relative_error: In function space, ||f_t - f_k|| / ||f_t - f_0|| over the logits at target positions; None where
            only the loss was expanded.
        kl_divergence: Mean KL(p_t || p_k), nats; None likewise.
        top1_agreement: Share of the positions where both prefer the same token, a fraction; None likewise.
    """

    order: int
    loss: float
    residual: float
    relative_error: float | None
    kl_divergence: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class TaylorDiffResult(AnalysisResult):
    r"""A finetune's step compared with its expansion around the base.

    Args:
        base_loss: L(theta_0), nats.
        loss: L(theta_t), nats.
        fits: By order.
        first_order: The gradient's share, g . Delta, nats.
        second_order: Half the curvature along the step, Delta' H Delta / 2, nats; None when only order 1 was asked for.
        step_norm: ||Delta||, from the base of the expansion, parameter units.
        gradient_norm: ||g|| at the base, nats per unit; NaN without shares, and along merged weights, whose gradient
            is never made.
        loss_shares: Part of g . Delta of each group of parameters, nats; they add up to ``first_order``.
        function_shares: Part of J Delta of each group, <J Delta_b, J Delta> / ||J Delta||^2, fractions that add up to
            1; empty where only the loss was expanded.
        route: ``forward`` (exact forward-mode derivatives) or ``differences`` (central differences along the step: what
            a model without forward mode or a sharded one allows; gradients are exact).
        error: Estimated error of ``second_order`` by the second route, nats; 0 for exact derivatives.
        n_targets: Target positions.
        by: What the groups of parameters are; None without shares.
        cost: Passes of the model; one that carries derivatives along the step counts once.
        space: ``merged`` or ``adapters``; None of a model without adapters.
        precision: Of a model that computes below float32: its ``dtype``, or float32 where memory allowed the expansion
            to be made in that; ``training`` then tells the model's own.
        interval: 95 % interval of the nonlinearity over samples, by the jackknife; None where only the loss was
            expanded, there are fewer than two samples, or nothing changed.
        n_samples: How many samples the interval is over; None where only the loss was expanded.
    """

    analysis: ClassVar[str] = "taylor_diff"

    base_loss: float
    loss: float
    fits: tuple[dict[str, Any], ...]
    first_order: float
    second_order: float | None
    step_norm: float
    gradient_norm: float
    loss_shares: dict[str, float]
    function_shares: dict[str, float]
    route: str
    error: float
    n_targets: int
    by: By | None = "block"
    cost: Cost = field(default=Cost(), compare=False)
    space: str | None = None
    precision: dict[str, Any] | None = None
    interval: tuple[float, float] | None = None
    n_samples: int | None = None

    @property
    def change(self) -> float:
        """L(theta_t) - L(theta_0), nats."""
        return self.loss - self.base_loss

    @property
    def second_to_first(self) -> float | None:
        """Size of the second-order term over that of the first."""
        if self.second_order is None or not self.first_order:
            return None
        return abs(self.second_order / self.first_order)

    @property
    def orders(self) -> tuple[OrderFit, ...]:
        """The fits as records."""
        return tuple(OrderFit(**fit) for fit in self.fits)

    @property
    def nonlinearity(self) -> float:
        """Relative error of the first order: in function space where that was measured, else in the loss's change."""
        if not self.step_norm:
            return 0.0
        first = next(fit for fit in self.orders if fit.order == 1)
        if first.relative_error is not None:
            return first.relative_error
        return abs(first.residual / self.change) if self.change else math.inf

    @property
    def regime(self) -> Regime:
        """``lazy`` below a nonlinearity of 0.1, ``nonlinear`` from 0.5 on, ``weakly nonlinear`` between."""
        if not self.step_norm:
            return "unchanged"
        if self.nonlinearity < LAZY:
            return "lazy"
        return "weakly nonlinear" if self.nonlinearity < NONLINEAR else "nonlinear"

    def metrics(self) -> dict[str, float | None]:
        """Losses, the terms, norms and the nonlinearity, and by order what is predicted."""
        names = (
            *("base_loss", "loss", "change", "first_order", "second_order", "second_to_first"),
            *("step_norm", "gradient_norm", "nonlinearity"),
        )
        found = {name: getattr(self, name) for name in names}
        for fit in self.fits:
            found |= {f"{name}/order{fit['order']}": value for name, value in fit.items() if name != "order"}
        return found

    def details(self) -> dict[str, Any]:
        """The fits, the regime with its thresholds, the shares, and how the terms were found."""
        optional = ("space", "precision", "interval", "n_samples")
        names = ("regime", "loss_shares", "function_shares", "by", "route", "error", "n_targets")
        return {
            "fits": [dict(fit) for fit in self.fits],
            "thresholds": {"lazy": LAZY, "nonlinear": NONLINEAR},
            **{name: getattr(self, name) for name in names},
            **{name: told for name in optional if (told := getattr(self, name)) is not None},
        }

    def headline(self) -> str:
        """The regime, and the actual and the predicted change."""
        told = "" if self.interval is None else f", 95 % interval {self.interval[0]:.3g} to {self.interval[1]:.3g}"
        return (
            f"the step is {self.regime} (nonlinearity {self.nonlinearity:.3g}{told}): the loss changed by "
            f"{self.change:.4g} nats, its first order predicts {self.first_order:.4g}"
        )
