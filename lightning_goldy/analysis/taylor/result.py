"""What the comparison of a finetune with its Taylor expansion found."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lightning_goldy.analysis.agreement import per_sample, ratio_interval
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture.adapters import Line
from lightning_goldy.core.naming import block_of

Regime = Literal["unchanged", "lazy", "weakly nonlinear", "nonlinear"]
By = Literal["block", "tensor"]
Kind = Literal[
    "loss",
    "derivative",
    "loss share",
    "function share",
    "function change",
    "residual",
    "divergence",
    "agreed",
    "difference",
]

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
        samples: What the nonlinearity is of each of them; None likewise.
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
    samples: dict[str, Any] | None = field(default=None, compare=False)

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
            **({} if self.samples is None else {"per_sample": dict.fromkeys(self._nonlinear, self.samples)}),
        }

    @property
    def _nonlinear(self) -> tuple[str, ...]:
        """Names of the metrics that are the nonlinearity."""
        return ("nonlinearity", "relative_error/order1")

    def headline(self) -> str:
        """The regime, and the actual and the predicted change."""
        told = "" if self.interval is None else f", 95 % interval {self.interval[0]:.3g} to {self.interval[1]:.3g}"
        return (
            f"the step is {self.regime} (nonlinearity {self.nonlinearity:.3g}{told}): the loss changed by "
            f"{self.change:.4g} nats, its first order predicts {self.first_order:.4g}"
        )


@dataclass
class Sums:
    """Sums over the batches of one process or of all.

    Args:
        kinds: By kind and by tensor or order. Times the number of targets: ``loss``, at the present parameters, nats;
            ``derivative``, of the loss along the step at the base, by order; ``loss share``, g . Delta by tensor.
            Over the targets: ``function share``, <J Delta_b, J Delta> by tensor; ``function change``, ||f_t - f_0||^2;
            and by order ``residual``, the squared distance of the logits from the prediction, ``divergence``,
            KL(p_t || p_k), nats, and ``agreed``, positions where both prefer the same class. ``difference`` of two
            estimates of the curvature along the step, thrice the error of the better one, times the number of targets.
        n_targets: Number of targets (of samples, where an objective has no targets).
        cost: Passes of the model.
        gradient_norm: ||g|| of the mean loss at the base.
        samples: Of each sample the squared distance of its logits from the first order's, and from the base's.
        keys: Of these samples.
    """

    kinds: dict[Kind, defaultdict[Any, float]] = field(default_factory=dict)
    n_targets: int = 0
    cost: Cost = field(default_factory=Cost)
    gradient_norm: float = math.nan
    samples: list[list[float]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    def of(self, kind: Kind) -> dict[Any, float]:
        """The sums of a kind by tensor or order; empty where there are none."""
        return dict(self.kinds.get(kind, {}))

    def mean(self, kind: Kind, key: Any = None) -> float:
        """One sum per target."""
        return self.kinds[kind][key] / self.n_targets

    def add(self, kind: Kind, values: Iterable[tuple[Any, float]], weight: float = 1) -> None:
        """Adds values by tensor or order, each times the weight."""
        sums = self.kinds.setdefault(kind, defaultdict(float))
        for key, value in values:
            sums[key] += weight * value

    def merge(self, other: Sums) -> None:
        """Adds what another process found."""
        for kind, sums in other.kinds.items():
            self.add(kind, sums.items())
        self.n_targets, self.cost = self.n_targets + other.n_targets, self.cost + other.cost
        self.samples, self.keys = self.samples + other.samples, self.keys + other.keys


def result_of(
    sums: Sums, orders: tuple[int, ...], by: By | None, names: Sequence[str], line: Line, *, route: str
) -> TaylorDiffResult:
    """The result that sums over all samples make."""
    columns = tuple(zip(*sums.samples, strict=True)) if sums.samples and 1 in orders else None
    loss, predicted, factor = sums.mean("loss"), sums.mean("derivative", 0), 1.0
    fits = []
    for order in range(1, max(orders) + 1):
        factor *= order
        predicted += sums.mean("derivative", order) / factor
        if order in orders:
            fit = {"order": order, "loss": predicted, "residual": loss - predicted}
            fits.append({**fit, **_function_fit(sums, order)})
    # The backward pass of the logits gives <J Delta_b, J Delta>, whose sum is ||J Delta||^2.
    shares = sums.of("function share")
    whole = math.fsum(shares.values())
    of_loss = {name: share / sums.n_targets for name, share in sums.of("loss share").items()}
    return TaylorDiffResult(
        base_loss=sums.mean("derivative", 0),
        loss=loss,
        fits=tuple(fits),
        first_order=sums.mean("derivative", 1),
        second_order=sums.mean("derivative", 2) / 2 if max(orders) > 1 else None,
        step_norm=line.step_norm,
        # Of places on the line it would be another quantity.
        gradient_norm=math.nan if line.space == "merged" else sums.gradient_norm,
        loss_shares=_grouped(of_loss, by, names, line),
        function_shares=_grouped({name: share / whole for name, share in shares.items() if whole}, by, names, line),
        route=route,
        error=abs(sums.mean("difference")) / 3 / 2 if sums.of("difference") else 0.0,
        n_targets=sums.n_targets,
        by=by,
        cost=sums.cost,
        space=line.space,
        interval=None if columns is None else ratio_interval(*columns, power=0.5),
        n_samples=len(sums.samples) or None,
        samples=None if columns is None else per_sample(sums.keys, *columns, power=0.5),
    )


def _function_fit(sums: Sums, order: int) -> dict[str, float | None]:
    if order not in sums.of("residual"):
        return dict.fromkeys(("relative_error", "kl_divergence", "top1_agreement"))
    residual, change = sums.of("residual")[order], sums.of("function change")[None]
    return {
        "relative_error": math.sqrt(residual / change) if change else 0.0,
        "kl_divergence": sums.mean("divergence", order),
        "top1_agreement": sums.mean("agreed", order),
    }


def _grouped(shares: Mapping[str, float], by: By | None, names: Sequence[str], line: Line) -> dict[str, float]:
    """Shares by tensor or by block, in the order of the model: a backward pass finds the last one first."""
    groups: dict[str, float] = {}
    for name in names if by else ():
        if name in shares:
            group = line.told(name) if by == "tensor" else block_of(line.told(name))
            groups[group] = groups.get(group, 0.0) + shares[name]
    return groups
