"""What an Adam-like optimizer knows about the curvature: its moments, matched with a model's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_goldy.core.sharding import align, is_sharded, scatter_like
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector

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
            name: each.values.to(torch.promote_types(each.values.dtype, torch.float32)) * each.factor
            for name, each in moments.items()
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
    found = sorted(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(
            f"an optimizer's state has the keys 'state' and 'param_groups'; this one is {found}. A Lightning "
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
        values = _in_layout_of(parameter, _moment(inner, name, state, order), name)
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


def _moment(optimizer: Optimizer, name: str, state: Mapping[str, Any], order: Literal[1, 2]) -> Tensor:
    moment, owner = _MOMENTS[order], type(optimizer).__name__
    if not any(optimizer.state.values()):
        raise ValueError(f"the {owner} has no state for {name!r} or any other parameter: it has made no step yet")
    if not state:
        raise ValueError(
            f"the {owner} has no state for {name!r}, but for others: it never received a gradient; leave it out with "
            "exclude="
        )
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
