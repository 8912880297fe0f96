"""Derivatives of a model along a line in parameter space, right also where they are nested."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from lightning_goldy.core.composed import composed_functions, without_checkpoints
from lightning_goldy.core.composed import nested_derivatives as nested_derivatives
from lightning_goldy.core.isolation import require_unscaled
from lightning_goldy.core.naming import bare_name, canonical_name, model_class, require_at_least
from lightning_goldy.core.space import trainable_parameters

# What torch says where it has no forward mode.
_NO_FORWARD_MODE = (
    *("forward AD", "forward mode", "forward-mode", "functorch", "ZeroTensors", "the jvp function"),
    *("doesn't have storage", "invalid python storage", "(vjp, jvp, grad, etc) transform"),
)
# Custom functions whose derivatives through their forward were compared with differences, and agreed.
_COMPARED: set[tuple[str, str]] = set()
# Central differences have a step of so much of the parameters' norm where they check, and may be so far from exact.
_CHECK_STEP, _CHECK_ERROR = 1e-3, 0.05


class ForwardModeError(RuntimeError):
    """A model has no forward-mode derivatives, or wrong ones; says where and why."""


@contextmanager
def forward_mode(model: nn.Module) -> Iterator[None]:
    """Says which layer of a model has no forward mode, where one inside has none.

    Args:
        model: Whose layers are named.

    Raises:
        ForwardModeError: Inside, an operation has no forward-mode derivative.

    Example:
        >>> class Distances(nn.Module):
        ...     def forward(self, x):
        ...         return torch.cdist(x, x)
        >>> model = nn.Sequential(nn.Identity(), Distances())
        >>> try:
        ...     with forward_mode(model):
        ...         _ = torch.func.jvp(model, (torch.eye(2),), (torch.eye(2),))
        ... except ForwardModeError as error:
        ...     print(error)
        Sequential has no forward-mode derivative in '1' (Distances): torch has none of _cdist_forward
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, (ForwardModeError, torch.OutOfMemoryError)):
            raise
        if not any(phrase in str(error) for phrase in _NO_FORWARD_MODE):
            raise
        layer = _layer_of(error.__traceback__, model)
        operation = re.search(r"forward AD with (\S+) that", str(error))
        told = str(error).splitlines()[0] if operation is None else f"torch has none of {operation[1]}"
        raise ForwardModeError(f"{model_class(model)} has no forward-mode derivative{layer}: {told}") from error


def _layer_of(traceback: TracebackType | None, model: nn.Module) -> str:
    """The innermost of a model's modules that was running."""
    names = {id(module): name for name, module in model.named_modules() if name}
    found = ""
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if id(running) in names:
            found = f" in {names[id(running)]!r} ({type(running).__name__})"
        traceback = traceback.tb_next
    return found


def directional_derivatives(
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    order: int,
) -> tuple[Tensor, ...]:
    r"""Value and derivatives of a function of parameters along a line.

    .. math:: \frac{d^k}{dt^k} f(\theta + t \Delta) \Big|_{t=0}, \qquad k = 0, \dots, n

    By forward mode nested n times; first order costs about 4 forward passes, second 11, third 35. Custom functions are
    differentiated through their forward; the first time that one is met, the first derivative is compared with central
    differences, which costs 4 forward passes.

    Args:
        function: Takes parameters by name, returns a tensor.
        parameters: Where: theta.
        direction: Along what: Delta, by the same names; parameters that it lacks stay.
        order: n, at least 0.

    Returns:
        n + 1 tensors of the function's shape.

    Raises:
        ValueError: The order is negative, or the direction names what is no parameter.
        ForwardModeError: A custom function hides its derivative from forward mode.

    Example:
        >>> cube = lambda p: p["x"] ** 3
        >>> [float(d) for d in directional_derivatives(cube, {"x": torch.tensor(2.0)}, {"x": torch.tensor(1.0)}, 3)]
        [8.0, 12.0, 12.0, 6.0]
    """
    require_at_least("order", order, 0)
    unknown = [name for name in direction if name not in parameters]
    if unknown:
        raise ValueError(f"the direction names {unknown[0]!r}, which is no parameter of the function")
    values = {name: value.detach() for name, value in parameters.items()}
    steps = {name: step.detach().to(values[name].dtype) for name, step in direction.items()}

    def moving(moved: dict[str, Tensor]) -> Tensor:
        return function({**values, **moved})

    # Without gradients some functions, such as SiLU, lose their nested forward derivatives.
    with nested_derivatives(), torch.enable_grad(), composed_functions() as composed:
        start = {name: values[name] for name in steps}
        found = tuple(part.detach() for part in _derivatives(moving, steps, order)(start))
    if order:
        require_seen(composed, moving, start, steps, found[1])
    return found


def require_seen(
    composed: Sequence[str],
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    derivative: Tensor,
) -> None:
    """Compares a first derivative with central differences, unless its custom functions are known to be right.

    Args:
        composed: Names of the custom functions that were differentiated through their forward.
        function: Of the parameters that the direction names.
        parameters: Where.
        direction: Along what.
        derivative: What forward mode found.

    Raises:
        ForwardModeError: They differ by more than a twentieth, beyond rounding.
    """
    met = {(name, derivative.device.type) for name in composed} - _COMPARED
    size, length = (float(sum(t.detach().double().square().sum() for t in d.values())) for d in (parameters, direction))
    if not met or not length:
        return
    step = _CHECK_STEP * (size / length) ** 0.5 if size else 1.0
    slope: Tensor | float = 0.0
    with torch.no_grad(), nested_derivatives():
        for place, weight in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
            moved = {name: value + (place * step) * direction[name].detach() for name, value in parameters.items()}
            value = function(moved).double()
            slope = slope + weight * value
    noise = 30 * torch.finfo(derivative.dtype).eps * float(value.norm())
    expected = float(torch.as_tensor(slope).norm())
    apart = float((step * derivative.detach().double() - slope).norm())
    if apart > _CHECK_ERROR * expected + noise:
        names = ", ".join(sorted(name for name, _ in met))
        raise ForwardModeError(
            f"the forward-mode derivative through the custom function {names} is not that of its values: it is "
            f"{apart / max(expected, 1e-300):.2g} of the derivative away from central differences"
        )
    if noise <= expected / 2:
        _COMPARED.update(met)


def difference_derivatives(
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    order: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""The same derivatives from values at 7 places along the line, where there is no forward mode.

    .. math:: f^{(k)} \approx \sum_{j=-3}^{3} w_{kj} f(\theta + j h \Delta), \qquad h = \min(0.3, \epsilon^{1/7})

    with the weights that are exact for polynomials of degree 6, and :math:`\epsilon` the precision of the function.

    Args:
        function: Takes parameters by name, returns a tensor.
        parameters: Where: theta.
        direction: Along what: Delta, by the same names; parameters that it lacks stay.
        order: n, from 0 to 3.

    Returns:
        n + 1 tensors in float64, and how far off each may be: what the 5 inner places say less what all 7 say, the
        farther by what rounding adds up to.

    Example:
        >>> x = {"x": torch.tensor(2.0, dtype=torch.float64)}
        >>> found, errors = difference_derivatives(lambda p: p["x"] ** 3, x, {"x": torch.ones(())}, 2)
        >>> [round(float(value), 6) for value in found], max(map(float, errors)) < 1e-6
        ([8.0, 12.0, 12.0], True)
    """
    values = {name: value.detach() for name, value in parameters.items()}
    steps = {name: step.detach().to(values[name].dtype) for name, step in direction.items()}
    with torch.no_grad(), nested_derivatives():
        middle = function(dict(values))
        step = min(0.3, torch.finfo(middle.dtype).eps ** (1 / 7))
        wide, narrow = _weights(3, step, order), _weights(2, step, order)
        found, fewer = ([middle.double() * weights[0] for weights in stencil] for stencil in (wide, narrow))
        for place in (-3, -2, -1, 1, 2, 3):
            moved = {name: values[name] + (place * step) * way for name, way in steps.items()}
            value = function({**values, **moved}).double()
            for sums, stencil in ((found, wide), (fewer, narrow)):
                for total, weights in zip(sums, stencil, strict=True):
                    total.add_(value, alpha=weights.get(place, 0.0))
    # Rounding inside a network adds up to a few units of its outputs' last place.
    size = 4 * torch.finfo(middle.dtype).eps * middle.double().abs()
    errors = []
    for inner, outer, weights in zip(fewer, found, wide, strict=True):
        apart = inner - outer
        errors.append(apart + torch.copysign(size * math.hypot(*weights.values()), apart))
    return tuple(found), tuple(errors)


def _weights(reach: int, step: float, order: int) -> list[dict[int, float]]:
    """For each derivative at 0 the weights of the values at so many steps to both sides."""
    places = range(-reach, reach + 1)
    # A polynomial's coefficients from its values; the k-th derivative is k! of them.
    powers = torch.linalg.inv(torch.vander(torch.tensor(places, dtype=torch.float64), increasing=True))
    return [
        {place: float(weight) * math.factorial(k) / step**k for place, weight in zip(places, powers[k], strict=True)}
        for k in range(order + 1)
    ]


def polynomial(coefficients: Sequence[Tensor], t: Tensor | float = 1.0) -> Tensor:
    r"""The Taylor polynomial of given derivatives, :math:`\sum_k f^{(k)} t^k / k!`, summed from the highest power.

    Example:
        >>> float(polynomial([torch.tensor(1.0), torch.tensor(1.0), torch.tensor(1.0)]))
        2.5
    """
    total = coefficients[-1]
    for power in range(len(coefficients) - 1, 0, -1):
        total = coefficients[power - 1] + total * (t / power)
    return total


def call_with(
    model: nn.Module, parameters: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Calls a model with other values for some of its parameters, tied ones included.

    Without gradient checkpoints, which would recompute with the model's own values.

    Args:
        model: Any module.
        parameters: By canonical name.
        args: Positional arguments of its forward.
        kwargs: Named ones.
    """
    own = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    for name, parameter in list(own.items()):
        own.setdefault(bare_name(name), parameter)
    given = {id(own[name]): value for name, value in parameters.items()}
    # Once for each module, also where it stands under several names: what is swapped in twice is not all swapped back.
    values = {
        f"{path}.{name}" if path else name: given[id(parameter)]
        for path, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in given
    }
    with without_checkpoints(), _unscaled(model):
        return functional_call(model, values, tuple(args), dict(kwargs), tie_weights=False)


@contextmanager
def _unscaled(model: nn.Module) -> Iterator[None]:
    """Keeps a model from dividing its weights in place at its first call in evaluation mode, as RWKV does."""
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "layers_are_rescaled")]
    before = [(config, config.rescale_every) for config in configs]
    require_unscaled(model)
    try:
        for config, _ in before:
            config.rescale_every = 0
        yield
    finally:
        for config, every in before:
            config.rescale_every = every


class Substituted(nn.Module):
    """A model that computes with given parameter values, for code that calls a model.

    Args:
        model: The model; its own values are not read for the names given.
        parameters: Values by canonical name; may carry derivatives.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        # In a tuple and a plain dict, so that neither becomes part of this module.
        self._model = (model,)
        self._values = dict(parameters)
        self.training = model.training

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model[0].config

    @property
    def wrapped(self) -> nn.Module:
        """The model as it was given."""
        return self._model[0]

    def get_base_model(self) -> nn.Module:
        """The model, whose forward names the arguments."""
        model = self._model[0]
        return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model with the values."""
        return call_with(self._model[0], self._values, args, kwargs)


def trainable_values(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters by canonical name, tied ones once, without their graph."""
    return {name: parameter.detach() for name, parameter in trainable_parameters(model)}


def _derivatives(
    function: Callable[[dict[str, Tensor]], Tensor], steps: dict[str, Tensor], order: int
) -> Callable[[dict[str, Tensor]], tuple[Tensor, ...]]:
    if order == 0:
        return lambda where: (function(where),)
    lower = _derivatives(function, steps, order - 1)

    def higher(where: dict[str, Tensor]) -> tuple[Tensor, ...]:
        # Along the same step every time, so that parameters and step are used as they are and never copied.
        values, tangents = jvp(lower, (where,), (steps,))[:2]
        return (*values, tangents[-1])

    return higher
