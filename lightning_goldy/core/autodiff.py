"""Derivatives of a model along a line in parameter space, right also where they are nested."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.func import functional_call, jvp

from lightning_goldy.core.composed import Composed, composed_functions, without_checkpoints
from lightning_goldy.core.composed import nested_derivatives as nested_derivatives
from lightning_goldy.core.naming import bare_name, canonical_name, model_class, require_at_least
from lightning_goldy.core.space import trainable_parameters
from lightning_goldy.core.tasks import require_unscaled

# What torch says where it has no forward mode.
_NO_FORWARD_MODE = (
    *("forward AD", "forward mode", "forward-mode", "functorch", "ZeroTensors", "the jvp function"),
    *("doesn't have storage", "invalid python storage", "(vjp, jvp, grad, etc) transform"),
)
# Custom functions whose derivatives through their forward were compared with differences, and agreed.
_COMPARED: set[tuple[str, str]] = set()
# The second step of derivatives from values is so many times shorter; where the two differ by x in the derivative
# above, so much of x times the first step may be hidden in the one below.
_FINER, _HIDDEN_BEND = 4, 0.25
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
    place = ""
    while traceback is not None:
        running = traceback.tb_frame.f_locals.get("self")
        if id(running) in names:
            place = f" in {names[id(running)]!r} ({type(running).__name__})"
        traceback = traceback.tb_next
    return place


def directional_derivatives(
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    order: int,
) -> tuple[Tensor, ...]:
    r"""Value and derivatives of a function of parameters along a line.

    .. math:: \frac{d^k}{dt^k} f(\theta + t \Delta) \Big|_{t=0}, \qquad k = 0, \dots, n

    From the second order on, tensors carry all n derivatives through the model (see :class:`Jet`), which costs about
    (n + 1)(n + 2) / 2 products for each of the model's. At first order, and where an operation cannot carry them, by
    forward mode nested n times: about 4 forward passes, 11 at second order, 35 at third. Custom functions are
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
        carried = _carried_derivatives(moving, start, steps, order) if order > 1 else None
        derivatives = carried or tuple(part.detach() for part in _derivatives(moving, steps, order)(start))
    if order:
        require_seen(composed, moving, start, steps, derivatives[1])
    return derivatives


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
    if not met:
        return
    size, length = (float(sum(t.detach().double().square().sum() for t in d.values())) for d in (parameters, direction))
    if not length:
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
        functions = sorted(name for name, _ in met if not name.endswith(")"))
        where = f"the custom function {', '.join(functions)}"
        if not functions:
            where = f"numbers that are taken out of tensors, by item() or numpy(), in {sorted(met)[0][0]}"
        raise ForwardModeError(
            f"the forward-mode derivative through {where} is not that of its values: it is "
            f"{apart / max(expected, 1e-300):.2g} of the derivative away from central differences"
        )
    if noise <= expected / 2:
        # What becomes of a number is another matter every time.
        _COMPARED.update((name, device) for name, device in met if not name.endswith(")"))


def difference_derivatives(
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    order: int,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    r"""The same derivatives from values at 13 places along the line, where there is no forward mode.

    .. math:: f^{(k)} \approx \sum_{j=-3}^{3} w_{kj} f(\theta + j h \Delta), \qquad h = \min(0.3, \epsilon^{1/7})

    with the weights that are exact for polynomials of degree 6, and :math:`\epsilon` the precision of the function; and
    once more with h / 4. Of each element the step is taken at which 5 places and 7 agree better. A function that bends
    nearer to the base than the places lie has no derivative that values could tell: two steps then do not agree, in the
    derivative or in the next higher one, and the error says so.

    Args:
        function: Takes parameters by name, returns a tensor.
        parameters: Where: theta.
        direction: Along what: Delta, by the same names; parameters that it lacks stay.
        order: n, from 0 to 3.

    Returns:
        n + 1 tensors in float64, and how far off each may be, with the sign of what the 5 inner places say less what
        all 7 say: that, what rounding adds up to, and twice what the two steps differ by beyond rounding, also in the
        derivative above, whose bend this one cannot see.

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
        coarse, fine = (_Stencil(middle, scale, order) for scale in (step, step / _FINER))
        for stencil in (coarse, fine):
            for place in (-3, -2, -1, 1, 2, 3):
                moved = {name: values[name] + (place * stencil.step) * way for name, way in steps.items()}
                stencil.add(place, function({**values, **moved}))
    return _agreed(coarse, fine, order)


class _Stencil:
    """Derivatives from values at 7 places with one step between them, and from the 5 inner ones.

    Args:
        middle: The value at the base.
        step: Between the places, as a part of the whole step.
        order: Of the highest derivative that is wanted; one more is kept.
    """

    def __init__(self, middle: Tensor, step: float, order: int) -> None:
        self.step = step
        self._weights = [_weights(3, step, order + 1), _weights(2, step, order + 1)]
        self.wide, self._narrow = ([middle.double() * row[0] for row in rows] for rows in self._weights)
        self._largest, self._unit = middle.double().abs(), torch.finfo(middle.dtype).eps

    def add(self, place: int, value: Tensor) -> None:
        """Takes in the value at a place."""
        self._largest = torch.maximum(self._largest, value.double().abs())
        for sums, rows in zip((self.wide, self._narrow), self._weights, strict=True):
            for total, row in zip(sums, rows, strict=True):
                total.add_(value.double(), alpha=row.get(place, 0.0))

    def rounding(self, order: int) -> Tensor:
        """What rounding adds to a derivative: inside a network a few units of the last place of its values."""
        return 4 * self._unit * math.hypot(*self._weights[0][order].values()) * self._largest

    def apart(self, order: int) -> Tensor:
        """What the inner places say of a derivative less what all say, farther by rounding."""
        apart = self._narrow[order] - self.wide[order]
        return apart + torch.copysign(self.rounding(order), apart)


def _agreed(coarse: _Stencil, fine: _Stencil, order: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The derivatives of the step that is better by its own account, and how far off each may be."""
    beyond = [
        torch.relu((coarse.wide[k] - fine.wide[k]).abs() - coarse.rounding(k) - fine.rounding(k))
        for k in range(order + 2)
    ]
    better, errors = [], []
    for k in range(order + 1):
        ours, other = coarse.apart(k), fine.apart(k)
        finer = other.abs() < ours.abs()
        better.append(torch.where(finer, fine.wide[k], coarse.wide[k]))
        apart = torch.where(finer, other, ours)
        # A kink at the base halves the jump of this derivative, and has the next one grow as the step shrinks.
        hidden = torch.zeros_like(apart) if k == 0 else _HIDDEN_BEND * coarse.step * beyond[k + 1]
        errors.append(apart + torch.copysign(2 * beyond[k] + hidden, apart))
    return tuple(better), tuple(errors)


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


def _carried_derivatives(
    function: Callable[[dict[str, Tensor]], Tensor], start: dict[str, Tensor], steps: dict[str, Tensor], order: int
) -> tuple[Tensor, ...] | None:
    """The derivatives by :class:`Jet`; None where an operation cannot carry them, as nested forward mode may tell."""
    higher = (None,) * (order - 1)
    try:
        output = function({name: Jet((value, steps[name], *higher)) for name, value in start.items()})
        parts = output.parts if isinstance(output, Jet) else (output, *(None,) * order)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 - whatever it is, the other way meets it too, or has none
        return None
    value = parts[0]
    assert value is not None
    return tuple(torch.zeros_like(value) if part is None else part.detach() for part in parts)


class Jet(Tensor):
    r"""A tensor with its derivatives along a line, which operations carry on by the rule of Leibniz.

    .. math:: (fg)^{(k)} = \sum_j \binom{k}{j} f^{(k-j)} g^{(j)}, \qquad
        \frac{d^k}{dt^k} h(x(t)) \text{ by nested forward mode through } h \text{ alone}

    Nested forward mode of a whole model holds every first derivative n times and multiplies it as often; here products
    with weights are made once each. What changes a tensor in place is refused.

    Attributes:
        parts: Value and derivatives of order 1 to n; None for zero.

    Example:
        >>> x = Jet((torch.tensor([2.0]), torch.tensor([1.0]), None))
        >>> [part.tolist() for part in (x * x * x).parts]
        [[8.0], [12.0], [12.0]]
    """

    parts: tuple[Any, ...]
    carries_derivatives = True

    @staticmethod
    def __new__(cls, parts: Sequence[Tensor | None]) -> Jet:
        """A tensor of the value's shape, dtype and device, without memory of its own."""
        value = parts[0]
        assert value is not None
        made: Jet = Tensor._make_wrapper_subclass(
            cls, value.size(), strides=value.stride(), dtype=value.dtype, device=value.device
        )
        made.parts = tuple(parts)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carries the derivatives through one operation."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":
                return _attribute(func, args[0])
            if func is Tensor.requires_grad_:
                return args[0]
            inplace = name.endswith("_") and not name.startswith("_")
            if inplace or name in _CHANGING or kwargs.get("out") is not None:
                raise NotImplementedError(f"{name} changes a tensor that carries derivatives")
            if name == "detach":
                # The derivative is that of the values.
                return args[0]
            if name in ("item", "tolist", "numpy", "__float__", "__int__"):
                raise NotImplementedError(f"{name} takes a number out of a tensor, without its derivatives")
            if name in ("__bool__", "__index__"):
                return func(args[0].parts[0], *args[1:], **kwargs)
            rule = _rule(name, args, kwargs)
            return _through(func, args, kwargs) if rule is None else rule(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuses what reaches below torch's functions, and would not see the derivatives."""
        raise NotImplementedError(f"{func} does not see the derivatives that a tensor carries")


_CHANGING = {
    "__setitem__",
    "__set__",
    "__delete__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")),
}
# The same operation on every derivative: linear in the first argument, and the others carry none.
_LINEAR = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "t", "swapaxes", "movedim", "contiguous"),
    *("clone", "to", "float", "double", "half", "bfloat16", "type_as", "expand", "expand_as", "unsqueeze", "squeeze"),
    *("__getitem__", "select", "narrow", "index_select", "gather", "roll", "flip", "repeat", "repeat_interleave"),
    *("sum", "mean", "neg", "__neg__", "split", "chunk", "unbind", "tensor_split", "masked_select"),
}
_PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply", "matmul", "__matmul__", "mm", "bmm"}
_SUMS = {"add", "__add__", "sub", "__sub__"}
_Rule = Callable[[Any, Any, Any], Any]


def _rule(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Rule | None:
    """The rule of an operation; None for the general one."""
    if any(isinstance(value, Jet) for value in pytree.tree_leaves(kwargs)):
        return None
    first, others = args[0], args[1:]
    if name in _LINEAR and isinstance(first, Jet):
        return None if any(isinstance(value, Jet) for value in pytree.tree_leaves(others)) else _linear_map
    if name in ("cat", "concat", "stack") and isinstance(first, (tuple, list)):
        return _joined
    if len(args) == 2 and name in _PRODUCTS:
        return _product
    if len(args) == 2 and name in _SUMS:
        return _sum
    if name in ("div", "__truediv__") and len(args) == 2 and not isinstance(args[1], Jet) and not kwargs:
        return _linear_map
    if name == "linear":
        return _affine
    if name == "addmm" and not kwargs:
        return _addmm
    if name == "embedding" and len(args) > 1 and isinstance(args[1], Jet) and not isinstance(first, Jet):
        plain = all(kwargs.get(option) in (None, False) for option in ("max_norm", "scale_grad_by_freq", "sparse"))
        return _embedded if plain and len(args) == 2 else None
    if name in ("square", "pow", "__pow__") and isinstance(first, Jet) and (*others, *kwargs.values()) in ((), (2,)):
        return lambda func, args, kwargs: _product(torch.mul, (args[0], args[0]), {})
    return None


def _attribute(getter: Any, jet: Jet) -> Any:
    name = getattr(getter.__self__, "__name__", "")
    if name in ("T", "mT", "H", "mH", "real", "imag"):
        return Jet([None if part is None else getattr(part, name) for part in jet.parts])
    if name == "data":
        return jet
    found = getter(jet.parts[0])
    if isinstance(found, Tensor):
        raise NotImplementedError(f"the attribute {name} of a tensor that carries derivatives")
    return found


def _parts(value: Any, order: int) -> tuple[Any, ...]:
    return value.parts if isinstance(value, Jet) else (value, *(None,) * order)


def _order(*values: Any) -> int:
    return max(len(value.parts) for value in values if isinstance(value, Jet)) - 1


def _is_smooth(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _linear_map(func: Any, args: Any, kwargs: Any) -> Any:
    mapped: list[Any] = [None if part is None else func(part, *args[1:], **kwargs) for part in args[0].parts]
    if isinstance(mapped[0], Tensor):
        return Jet(mapped) if _is_smooth(mapped[0]) else mapped[0]
    count = len(mapped[0])
    return tuple(Jet([None if part is None else part[index] for part in mapped]) for index in range(count))


def _embedded(func: Any, args: Any, kwargs: Any) -> Jet:
    return Jet([None if part is None else func(args[0], part, **kwargs) for part in args[1].parts])


def _joined(func: Any, args: Any, kwargs: Any) -> Jet:
    order = _order(*args[0])
    rows = [_parts(value, order) for value in args[0]]
    joined: list[Tensor | None] = []
    for k in range(order + 1):
        if all(row[k] is None for row in rows):
            joined.append(None)
            continue
        filled = [torch.zeros_like(row[0]) if row[k] is None else row[k] for row in rows]
        joined.append(func(filled, *args[1:], **kwargs))
    return Jet(joined)


def _sum(func: Any, args: Any, kwargs: Any) -> Jet:
    order = _order(*args)
    first, second = (_parts(value, order) for value in args)
    sums = [func(first[0], second[0], **kwargs)]
    zero = torch.zeros((), dtype=sums[0].dtype, device=sums[0].device)
    for left, right in zip(first[1:], second[1:], strict=True):
        if left is None and right is None:
            sums.append(None)
            continue
        part = left if right is None else func(zero if left is None else left, right, **kwargs)
        sums.append(part.to(sums[0].dtype).expand(sums[0].shape))
    return Jet(sums)


def _product(func: Any, args: Any, kwargs: Any, *, value: Tensor | None = None) -> Jet:
    order = _order(*args)
    first, second = (_parts(value, order) for value in args)
    found: list[Any] = [func(first[0], second[0], **kwargs) if value is None else value, *(None,) * order]
    # With a matrix on the right the rows of all derivatives are multiplied at once.
    stacks = isinstance(second[0], Tensor) and second[0].ndim == 2 and func not in (torch.mul, Tensor.mul)
    stacks = stacks and getattr(func, "__name__", "") in ("matmul", "__matmul__", "mm", "linear") and first[0].ndim > 1
    for j, right in enumerate(second):
        places = [k for k in range(max(j, 1), order + 1) if right is not None and first[k - j] is not None]
        if not places:
            continue
        lefts = [first[k - j] for k in places]
        if stacks and len(lefts) > 1:
            stacked = torch.matmul if func is not torch.nn.functional.linear else func
            products = list(stacked(torch.stack(lefts), right))
        else:
            products = [func(left, right, **kwargs) for left in lefts]
        for k, product in zip(places, products, strict=True):
            weighted = product * math.comb(k, j) if 0 < j < k else product
            found[k] = weighted if found[k] is None else found[k] + weighted
    return Jet(found)


def _affine(func: Any, args: Any, kwargs: Any) -> Jet:
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    return _with_bias(func, func(*_values(args), **kwargs), args[:2], bias)


def _addmm(func: Any, args: Any, kwargs: Any) -> Jet:
    return _with_bias(torch.matmul, func(*_values(args)), args[1:], args[0])


def _with_bias(func: Any, value: Tensor, factors: Sequence[Any], bias: Any) -> Jet:
    """A product and a sum whose value is the model's own, fused or not."""
    if not any(isinstance(factor, Jet) for factor in factors):
        jet = _sum(torch.add, (torch.zeros_like(value), bias), {})
    else:
        jet = _product(func, factors, {}, value=value)
        jet = jet if bias is None else _sum(torch.add, (jet, bias), {})
    return Jet((value, *jet.parts[1:]))


def _values(args: Sequence[Any]) -> list[Any]:
    return [value.parts[0] if isinstance(value, Jet) else value for value in args]


def _through(func: Any, args: Any, kwargs: Any) -> Any:
    """Any operation, by forward mode nested through it alone."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    order = _order(*leaves)

    def call(values: Sequence[Tensor]) -> Any:
        filled = list(leaves)
        for index, value in zip(places, values, strict=True):
            filled[index] = value
        positional, named = pytree.tree_unflatten(filled, structure)
        return func(*positional, **named)

    with Composed():
        values = tuple(leaves[index].parts[0] for index in places)
        results, layout = pytree.tree_flatten(call(values))
        smooth = [index for index, leaf in enumerate(results) if isinstance(leaf, Tensor) and _is_smooth(leaf)]
        if not smooth:
            return pytree.tree_unflatten(results, layout)

        def derive(*parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
            if len(parts) == 1:
                found = pytree.tree_leaves(call(parts[0]))
                return (tuple(found[index] for index in smooth),)
            lower, tangents = jvp(derive, parts[:-1], parts[1:])[:2]
            return (*lower, tangents[-1])

        filled = [
            tuple(
                torch.zeros_like(leaves[index].parts[0]) if leaves[index].parts[k] is None else leaves[index].parts[k]
                for index in places
            )
            for k in range(order + 1)
        ]
        derivatives = derive(*filled)
    for column, index in enumerate(smooth):
        results[index] = Jet((results[index], *(part[column].detach() for part in derivatives[1:])))
    return pytree.tree_unflatten(results, layout)
