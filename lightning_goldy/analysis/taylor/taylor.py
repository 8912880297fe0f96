"""How far a finetuned model is from a small step: its Taylor expansion around the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.analysis.taylor.approximation import HIGHEST_ORDER
from lightning_goldy.analysis.taylor.terms import Expansion, Sums
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import block_of, suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective, map_batch
from lightning_goldy.core.sharding import Replicas, is_sharded, unshard_guard

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
        gradient_norm: ||g|| at the base, nats per unit; NaN without shares.
        loss_shares: Part of g . Delta of each group of parameters, nats; they add up to ``first_order``.
        function_shares: Part of J Delta of each group, <J Delta_b, J Delta> / ||J Delta||^2, fractions that add up to
            1; empty where only the loss was expanded.
        route: ``forward`` (exact forward-mode derivatives) or ``differences`` (exact gradients, central differences
            along the step: what a sharded model allows).
        error: Estimated error of ``second_order`` by the second route, nats; 0 for exact derivatives.
        n_targets: Target positions.
        by: What the groups of parameters are; None without shares.
        cost: Passes of the model; one that carries derivatives along the step counts once.
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
        names = ("regime", "loss_shares", "function_shares", "by", "route", "error", "n_targets")
        return {
            "fits": [dict(fit) for fit in self.fits],
            "thresholds": {"lazy": LAZY, "nonlinear": NONLINEAR},
            **{name: getattr(self, name) for name in names},
        }

    def headline(self) -> str:
        """The regime, and the actual and the predicted change."""
        return (
            f"the step is {self.regime} (nonlinearity {self.nonlinearity:.3g}): the loss changed by {self.change:.4g} "
            f"nats, its first order predicts {self.first_order:.4g}"
        )


def taylor_diff(
    model: nn.Module,
    base: Base,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    orders: Sequence[int] = (1, 2),
    by: By | None = "block",
    function_space: bool = True,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> TaylorDiffResult:
    r"""Compares a finetuned model with its Taylor expansion around the base, in loss and in function space.

    .. math:: f_k = \sum_{j \le k} \frac{1}{j!} \frac{d^j}{dt^j} f(\theta_0 + t \Delta) \Big|_0, \qquad
        L_k \text{ likewise}, \qquad \Delta = \theta_t - \theta_0

    Derivatives are exact: nested forward mode along the step, in evaluation mode. On a sharded model, which has no
    forward mode, the loss alone is expanded, to order 2, from exact gradients at the base and central differences along
    the step. The model comes back as it was. On several ranks the batches are shared out; every rank must call.

    Forward mode holds 2^n values of every activation at order n, so a batch is worked through in so many parts of whole
    samples (twice as many with shares), whose sums are those of the batch. Under a FunctionObjective or an objective of
    your own a batch stays whole, because its loss need not be a sum over samples: give small batches there.

    Args:
        model: The finetuned model, plain or sharded with FSDP2.
        base: Where the expansion is made: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        batches: Batches that the objective understands, the same on every rank.
        objective: The loss; next-token prediction by default.
        orders: Orders of the expansion, from 1 to 3 (2 on a sharded model).
        by: Report shares by ``block``, by ``tensor``, or not (None), which saves a backward pass or two per batch and
            leaves the gradient's norm out.
        function_space: Whether to expand the logits too, or the loss alone.
        progress: Called with (batches done, batches in all) on this rank.
        split_over_ranks: Whether to share batches out over the ranks of an initialised process group.

    Returns:
        Losses, predictions, shares and the regime.

    Raises:
        ValueError: An order or ``by`` is out of range, there is no batch, or a value is not finite.
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.

    Source: linearisation as in Jacot et al. 2018 ("Neural Tangent Kernel"), Chizat et al. 2019 ("On Lazy Training").

    Example:
        >>> import torch
        >>> from lightning_goldy.core import FunctionObjective, ParameterVector
        >>> model = nn.Linear(1, 1, bias=False)
        >>> base = ParameterVector.of(model)
        >>> _ = model.weight.data.add_(0.5)
        >>> square = FunctionObjective(lambda model, x: model(x).square().mean())
        >>> found = taylor_diff(model, base, [torch.ones(2, 1)], square, function_space=False)
        >>> abs(found.fits[1]["residual"]) < 1e-6, round(found.second_order, 6)
        (True, 0.25)
    """
    orders = check_orders(orders, by)
    objective = objective or CausalLMObjective()
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    unshard_guard(model)
    sharded = any(map(is_sharded, model.parameters()))
    if sharded and (function_space or max(orders) > 2):
        function_space, orders = False, tuple(order for order in orders if order <= 2) or (1,)
    with preserved(model), replicas.together("taylor_diff"):
        start = base_of(base, model).vector(model)
        device = next(model.parameters()).device
        mine = [map_batch(batch, lambda tensor: tensor.to(device)) for batch in replicas.share(list(batches))]
        work = Expansion(model, start, mine, objective, orders, by is not None, function_space, replicas, progress)
        found = work.finite() if sharded else work.exact()
        step_norm = work.step.norm()
    return _result(found, orders, by, start.space.names, step_norm, route="differences" if sharded else "forward")


def check_orders(orders: Sequence[int], by: str | None) -> tuple[int, ...]:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is out of range.
    """
    found = tuple(sorted(set(orders)))
    for order in found:
        if not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"orders lie between 1 and {HIGHEST_ORDER}; got {order}")
    if 1 not in found:
        raise ValueError(f"orders must hold 1, by which the regime is told; got {list(orders)}")
    if by is not None and by not in get_args(By):
        raise ValueError(f"unknown by={by!r}; {suggestion(str(by), get_args(By))}")
    return found


def _result(
    sums: Sums, orders: tuple[int, ...], by: By | None, names: Sequence[str], step_norm: float, *, route: str
) -> TaylorDiffResult:
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
    return TaylorDiffResult(
        base_loss=sums.mean("derivative", 0),
        loss=loss,
        fits=tuple(fits),
        first_order=sums.mean("derivative", 1),
        second_order=sums.mean("derivative", 2) / 2 if max(orders) > 1 else None,
        step_norm=step_norm,
        gradient_norm=sums.gradient_norm,
        loss_shares=_grouped(
            {name: share / sums.n_targets for name, share in sums.of("loss share").items()}, by, names
        ),
        function_shares=_grouped({name: share / whole for name, share in shares.items() if whole}, by, names),
        route=route,
        error=abs(sums.mean("difference")) / 3 / 2 if sums.of("difference") else 0.0,
        n_targets=sums.n_targets,
        by=by,
        cost=sums.cost,
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


def _grouped(shares: Mapping[str, float], by: By | None, names: Sequence[str]) -> dict[str, float]:
    """Shares by tensor or by block, in the order of the model: a backward pass finds the last one first."""
    groups: dict[str, float] = {}
    for name in names if by else ():
        if name in shares:
            group = name if by == "tensor" else block_of(name)
            groups[group] = groups.get(group, 0.0) + shares[name]
    return groups
