"""Preconditioners of the directions: diagonal, from an optimizer's second moments, and tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_goldy.analysis.basin.result import VolumeResult
from lightning_goldy.core.naming import require_choice
from lightning_goldy.core.sharding import align, is_sharded, local, scatter_like
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector, reduce_tensors

_MOMENTS = {1: "exp_avg", 2: "exp_avg_sq"}


class Moment(NamedTuple):
    r"""A parameter's moment as its optimizer holds it.

    Args:
        values: In the layout of the parameter; not a copy.
        factor: What corrects the bias, :math:`1 / (1 - \beta^t)`; 1 where the optimizer states no ``betas`` or counts
            no steps.
        step: The optimizer's own count, when it is a tensor: it changes in place with every step.
    """

    values: Tensor
    factor: float
    step: Tensor | None


def adam_curvature(
    optimizer: Any, space: ParameterSpace, *, module: nn.Module, order: Literal[1, 2] = 2
) -> ParameterVector:
    r"""A copy of an optimizer's bias-corrected moments, for use after further steps.

    .. math:: \hat v_t = \frac{v_t}{1 - \beta_2^t} \approx \overline{g^2}, \qquad \hat m_t = \frac{m_t}{1 - \beta_1^t}

    Args:
        optimizer: A torch optimizer whose state has ``exp_avg`` and ``exp_avg_sq``, or Lightning's wrapper of one.
        space: Which parameters; the optimizer must hold all of them.
        module: The model whose parameters the optimizer holds.
        order: 2 for the mean squared gradient, 1 for the mean gradient, which keeps its sign.

    Returns:
        One tensor per parameter, in its layout, at least float32.

    Raises:
        SpaceError: The module lacks a parameter of the space.
        ValueError: No step has been made, the optimizer keeps no such moment, or it does not hold a parameter of the
            space.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization" (2015), section 3.
    """
    moments = optimizer_moments(optimizer, space, module, order)
    with torch.no_grad():
        copies = {
            name: moment.values.to(torch.promote_types(moment.values.dtype, torch.float32)) * moment.factor
            for name, moment in moments.items()
        }
    return ParameterVector(space, copies)


def adam_curvature_from_state(
    state_dict: Mapping[str, Any],
    optimizer: Optimizer,
    *,
    space: ParameterSpace,
    module: nn.Module,
    order: Literal[1, 2] = 2,
) -> ParameterVector:
    """The same from a saved optimizer: one of a checkpoint's ``optimizer_states``, read with ``weights_only=True``.

    A saved optimizer numbers its parameters, so a fresh optimizer that was built over the module as for the training
    (by the same ``configure_optimizers``) says which is which. It is left with the loaded state.

    Args:
        state_dict: What ``optimizer.state_dict()`` gave.
        optimizer: Fresh, over the parameters of ``module`` in the order of the training; overwritten.
        space: Which parameters.
        module: The model.
        order: As for :func:`adam_curvature`.

    Raises:
        ValueError: The optimizer has made steps already, the state does not fit it, or as for :func:`adam_curvature`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> trained, fresh = (torch.optim.AdamW(model.parameters()) for _ in range(2))
        >>> model(torch.tensor([[1.0, 4.0]])).sum().backward()
        >>> trained.step()
        >>> space = ParameterSpace.of(model)
        >>> adam_curvature_from_state(trained.state_dict(), fresh, space=space, module=model)["weight"]
        tensor([[ 1., 16.]])
    """
    inner = _unwrapped(optimizer)
    given = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"an optimizer's state has the keys 'state' and 'param_groups'; this one is {given}. A Lightning "
            "checkpoint has a list of such states under 'optimizer_states'"
        )
    if any(inner.state.values()):
        raise ValueError(
            f"the {type(inner).__name__} has state already, which loading would overwrite; pass a fresh one"
        )
    inner.load_state_dict(dict(state_dict))
    return adam_curvature(inner, space, module=module, order=order)


def optimizer_moments(
    optimizer: Any, space: ParameterSpace, module: nn.Module, order: Literal[1, 2]
) -> dict[str, Moment]:
    """The moments as the optimizer holds them, by name, without a copy.

    Args:
        optimizer: As for :func:`adam_curvature`.
        space: Which parameters.
        module: The model whose parameters the optimizer holds.
        order: 2 for the mean squared gradient, 1 for the mean gradient.

    Raises:
        ValueError: As for :func:`adam_curvature`.
    """
    if order not in _MOMENTS:
        raise ValueError(f"order is 1 (mean gradient) or 2 (mean squared gradient); got {order!r}")
    inner = _unwrapped(optimizer)
    parameters = space.resolve(module)
    groups = {id(parameter): group for group in inner.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in parameters.items() if id(parameter) not in groups]
    if missing:
        raise ValueError(
            f"the {type(inner).__name__} does not hold {missing[0]!r} ({len(missing)} of the space's {len(space)} "
            "parameters); leave them out of the space, or pass the module whose parameters it was built with"
        )
    moments = {}
    for name, parameter in parameters.items():
        state = inner.state.get(parameter, {})
        values = _in_layout_of(parameter, _moment(inner, name, parameter, order), name)
        step = state.get("step")
        factor = _bias_correction(inner, name, state, groups[id(parameter)], order)
        moments[name] = Moment(values, factor, step if isinstance(step, Tensor) else None)
    return moments


def _unwrapped(optimizer: Any) -> Optimizer:
    # Lightning's wrapper takes on the class of what it wraps, so only the attribute tells.
    while not hasattr(optimizer, "state") or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        if not hasattr(optimizer, "optimizer"):
            raise ValueError(f"a torch optimizer, or a wrapper of one, is needed; got {type(optimizer).__name__}")
        optimizer = optimizer.optimizer
    return optimizer


def _moment(optimizer: Optimizer, name: str, parameter: nn.Parameter, order: Literal[1, 2]) -> Tensor:
    moment, owner, state = _MOMENTS[order], type(optimizer).__name__, optimizer.state.get(parameter, {})
    if not any(optimizer.state.values()):
        raise ValueError(f"the {owner} has no state for {name!r} or any other parameter: it has made no step yet")
    if not state:
        return torch.zeros_like(parameter.detach())  # never a gradient: what the loss does not use
    if moment not in state:
        raise ValueError(
            f"the {owner} keeps no {moment!r} for {name!r}; it has {sorted(map(str, state))}. Use an optimizer of the "
            "Adam family, or diagonal_preconditioner with a curvature of your own"
        )
    return state[moment].detach()


def _bias_correction(
    optimizer: Optimizer, name: str, state: Mapping[str, Any], group: Mapping[str, Any], order: Literal[1, 2]
) -> float:
    step, betas = state.get("step", group.get("step")), group.get("betas")
    if step is None or betas is None:
        return 1.0
    if float(step) < 1:
        raise ValueError(f"the {type(optimizer).__name__} has made no step yet for {name!r}: its moments are empty")
    return 1 / (1 - float(betas[order - 1]) ** float(step))


def _in_layout_of(parameter: Tensor, moment: Tensor, name: str) -> Tensor:
    if moment.shape != parameter.shape:
        raise ValueError(
            f"{name}: the optimizer's moment has shape {tuple(moment.shape)}, the parameter {tuple(parameter.shape)}; "
            "a state that was loaded belongs to parameters in another order or to another model"
        )
    if is_sharded(parameter) and not is_sharded(moment):
        return scatter_like(parameter.detach(), moment)
    return align(moment, parameter)


EpsUnit = Literal["mean", "absolute"]
P = TypeVar("P")

# A side of the grid is left after this many candidates in a row that are worse than the best.
_WORSE = 2


class DiagonalPreconditioner:
    """What :func:`diagonal_preconditioner` makes; the scales of a slice are computed when they are asked for.

    Args:
        curvature: h, held by reference.
        eps: Damping in units of ``eps_unit``; held as absolute, in the unit of |h| to the exponent.
        exponent: Dimensionless.
        eps_unit: ``mean`` or ``absolute``.
        name: Shown in results.
        moments: Where the curvature is an optimizer's; gives the factors that it stands multiplied by.

    Raises:
        ValueError: An argument is out of range, or a scale is not finite: the curvature is not, or it is zero and
            ``eps`` is too.
    """

    whole_tensors: bool = False

    def __init__(
        self,
        curvature: ParameterVector,
        *,
        eps: float,
        exponent: float,
        name: str,
        eps_unit: EpsUnit = "absolute",
        moments: Mapping[str, Moment] | None = None,
    ) -> None:
        check_damping(eps, eps_unit)
        if not (math.isfinite(exponent) and exponent > 0):
            raise ValueError(f"exponent must be finite and above 0; got {exponent}")
        self.name, self.space, self.exponent = name, curvature.space, exponent
        self._curvature, self._moments = curvature, moments or {}
        if eps_unit == "mean" and eps:
            eps *= math.fsum(self._sums(lambda h: h.pow(exponent).sum())) / self.space.numel
            if eps == 0:
                raise ValueError(f"the curvature of {name!r} is zero everywhere: there is nothing to scale by")
        self.eps = eps
        self._versions = {parameter: self._version(parameter) for parameter in curvature}
        self.log_mean = -math.fsum(self._sums(lambda h: h.pow(exponent).add(eps).log().sum())) / self.space.numel

    def apply(self, name: str, direction: Tensor, start: int) -> Tensor:
        """P u for a slice of one parameter.

        Args:
            name: Canonical parameter name.
            direction: Elements ``[start, start + length)`` of this process's flattened part of u, shape ``[length]``;
                overwritten.
            start: The slice's first element.

        Returns:
            The same tensor.

        Raises:
            RuntimeError: The curvature was changed in place since the volume was normalised, as by an optimizer step.
        """
        tensor = self._curvature[name]
        if self._version(name) != self._versions[name]:
            raise RuntimeError(
                f"the curvature of {name} has changed since the preconditioner {self.name!r} was made from it, perhaps "
                "by an optimizer step; make a new one, or make it from a copy"
            )
        part = local(tensor).reshape(-1)[start : start + direction.numel()]
        dtype = torch.promote_types(part.dtype, direction.dtype)
        # Divided by the geometric mean before the power is taken, so that tiny curvatures do not underflow.
        unit = self._factor(name) * math.exp(self.log_mean / self.exponent)
        scale = part.to(direction.device, dtype).abs().mul_(unit)
        scale = scale.sqrt_() if self.exponent == 0.5 else scale.pow_(self.exponent)
        return direction.div_(scale.add_(self.eps * math.exp(self.log_mean)))

    def _version(self, name: str) -> tuple[int, ...]:
        # A fused optimizer writes moments without counting a version, but it counts one of its steps.
        step = self._moments[name].step if name in self._moments else None
        tensors = [local(tensor) for tensor in (self._curvature[name], step) if tensor is not None]
        return tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)

    def _factor(self, name: str) -> float:
        return self._moments[name].factor if name in self._moments else 1.0

    def _sums(self, function: Callable[[Tensor], Tensor]) -> list[float]:
        """Sums a function of |h| over each tensor, float64, over all shards; every process raises or none."""
        sums = []
        for name, tensor in self._curvature.items():
            factor = self._factor(name)
            (total,) = reduce_tensors([tensor], lambda chunk, factor=factor: function(chunk.abs().mul_(factor)))
            if not math.isfinite(total):
                zeros = "zeros, and eps is 0; take eps > 0" if total == -math.inf else "NaN or infinite elements"
                raise ValueError(f"no scales for {name}: its curvature holds {zeros}")
            sums.append(total)
        return sums


def diagonal_preconditioner(
    curvature: ParameterVector,
    *,
    eps: float,
    exponent: float = 0.5,
    eps_unit: EpsUnit = "mean",
    name: str = "diagonal",
) -> DiagonalPreconditioner:
    r"""Scales each element by a power of its curvature, leaving volumes as they are.

    .. math::
        (P u)_i = \frac{s_i}{\exp \overline{\log s}}\, u_i, \qquad
        s_i = \frac{1}{|h_i|^{q} + \varepsilon\, \overline{|h|^{q}}}

    With h the diagonal of the Hessian and q = 1/2 a quadratic cost is the same in every direction. The curvature is
    held by reference and no scale is stored; a sum over the space is made here, in float64, a collective when the
    tensors are sharded.

    Args:
        curvature: h, in the layout of the parameters; only magnitudes count. Must not change while the result is used.
        eps: Damping, at least 0: a share of the mean of |h|^q over the space, or with ``eps_unit="absolute"`` in the
            unit of |h|^q itself.
        exponent: q, above 0.
        eps_unit: ``mean`` does not depend on the scale of the curvature; ``absolute``.
        name: Shown in results.

    Returns:
        A preconditioner that works on flat slices, its log-determinant 0.

    Raises:
        ValueError: An argument is out of range, or a scale is not finite; the tensor is named.

    Source: Scherlis and Belrose, "Estimating the Probability of Sampling a Trained Neural Network at Random" (2025).

    Example:
        >>> space = ParameterSpace.of(nn.Linear(2, 1, bias=False))
        >>> curvature = ParameterVector(space, {"weight": torch.tensor([[1.0, 16.0]])})
        >>> diagonal_preconditioner(curvature, eps=0).apply("weight", torch.ones(2), 0)
        tensor([2.0000, 0.5000])
    """
    return DiagonalPreconditioner(curvature, eps=eps, exponent=exponent, name=name, eps_unit=eps_unit)


def adam_preconditioner(
    optimizer: Any,
    space: ParameterSpace,
    *,
    module: nn.Module,
    eps: float = 1.0,
    exponent: float = 0.5,
    order: Literal[1, 2] = 2,
    eps_unit: EpsUnit = "mean",
    name: str = "adam",
) -> DiagonalPreconditioner:
    r"""A diagonal preconditioner whose curvature is what an Adam-like optimizer holds already.

    .. math:: h = \frac{v_t}{1 - \beta_2^t} \approx \overline{g^2}

    Nothing is copied: use it before the optimizer's next step.

    Args:
        optimizer: A torch optimizer whose state has ``exp_avg`` and ``exp_avg_sq``, or Lightning's wrapper of one.
        space: Which parameters; the optimizer must hold all of them.
        module: The model whose parameters the optimizer holds.
        eps: Damping in units of ``eps_unit``, as for :func:`diagonal_preconditioner`.
        exponent: q, above 0.
        order: 2 for the mean squared gradient (also under AMSGrad, whose running maximum remembers the start of the
            training), 1 for the magnitude of the mean gradient.
        eps_unit: ``mean`` or ``absolute``.
        name: Shown in results.

    Raises:
        SpaceError: The module lacks a parameter of the space.
        ValueError: No step has been made, the optimizer keeps no such moment or does not hold a parameter of the space,
            or an argument is out of range.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> model(torch.tensor([[1.0, 4.0]])).sum().backward()
        >>> optimizer.step()
        >>> P = adam_preconditioner(optimizer, ParameterSpace.of(model), module=model, eps=0)
        >>> P.apply("weight", torch.ones(2), 0)
        tensor([2.0000, 0.5000])
    """
    moments = optimizer_moments(optimizer, space, module, order)
    curvature = ParameterVector(space, {parameter: moment.values for parameter, moment in moments.items()})
    settings: dict[str, Any] = {"eps": eps, "exponent": exponent, "eps_unit": eps_unit, "name": name}
    return DiagonalPreconditioner(curvature, **settings, moments=moments)


class NoLowerBoundError(ValueError):
    """With every damping the region is unbounded along some direction, as where nothing moves the model so far."""


class TunedPreconditioner(NamedTuple):
    """The preconditioner with the highest lower bound, and all that were tried.

    Args:
        preconditioner: The best.
        eps: Its damping.
        results: By damping, in the order of the trials.
    """

    preconditioner: Any
    eps: float
    results: dict[float, VolumeResult]

    @property
    def evaluations(self) -> int:
        """Cost evaluations that all trials took together."""
        return sum(result.total_evaluations for result in self.results.values())


def tuned_preconditioner(
    make: Callable[[float], P],
    bound: Callable[[P], VolumeResult],
    *,
    candidates: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0),
) -> TunedPreconditioner:
    """Chooses the damping whose volume estimate has the highest lower bound.

    The candidates are tried from the middle outwards; a side is left once two in a row were worse than the best so far.
    The choice favours luck a little: estimate the volume itself along other directions than those of ``bound``.

    Args:
        make: A preconditioner for a damping.
        bound: A volume estimate with it, along few directions, the same for all candidates.
        candidates: Dampings in the unit that ``make`` takes, distinct, in any order.

    Returns:
        The preconditioner, its damping, and the results; a lower bound of NaN (an unbounded direction) is never chosen.

    Raises:
        ValueError: The candidates are none, negative or repeated.
        NoLowerBoundError: All lower bounds are NaN.
    """
    grid = sorted(candidates)
    if not grid or len(set(grid)) < len(grid) or not all(math.isfinite(eps) and eps >= 0 for eps in grid):
        raise ValueError(f"candidates are distinct dampings of at least 0; got {list(candidates)}")
    middle = len(grid) // 2
    results: dict[float, VolumeResult] = {}
    best: tuple[float, P] | None = None
    # The middle opens the first side, so that it is tried once.
    for side in (grid[middle:], grid[:middle][::-1]):
        worse = 0
        for eps in side:
            preconditioner = make(eps)
            results[eps] = bound(preconditioner)
            value = results[eps].lower_bound
            if not math.isnan(value) and (best is None or value > results[best[0]].lower_bound):
                best, worse = (eps, preconditioner), 0
                continue
            worse += 1
            if worse == _WORSE and best is not None:
                break
    if best is None:
        raise NoLowerBoundError(f"no damping of {grid} gives a lower bound: along each some direction is unbounded")
    return TunedPreconditioner(best[1], best[0], results)


def check_damping(eps: float, eps_unit: str) -> None:
    """Checks a damping before there is a curvature.

    Raises:
        ValueError: It is out of range, or its unit is unknown.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and at least 0; got {eps}")
    require_choice("eps_unit", eps_unit, get_args(EpsUnit))
