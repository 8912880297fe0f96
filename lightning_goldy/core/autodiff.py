"""Derivatives of a model along a line in parameter space, right also where they are nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_goldy.core.naming import canonical_name, require_at_least
from lightning_goldy.core.space import trainable_parameters

# Attention scores held at a time: so many for each element of the queries, and not fewer than the second.
_SCORES_PER_QUERY = 2
_SCORES = 1 << 18


@contextmanager
def nested_derivatives() -> Iterator[None]:
    """Makes derivatives of any order right inside a ``with`` block.

    Fused attention has no forward-mode derivative, so attention runs in its plain form, a piece of the queries at a
    time, so that its patterns do not fill the memory. The fused normalisations have a derivative that is silently wrong
    when it is nested, so they are composed of means and square roots, in at least float32 as the fused ones compute.

    Example:
        >>> with nested_derivatives():
        ...     normalised = F.layer_norm(torch.tensor([1.0, 3.0]), (2,))
        >>> [round(value, 4) for value in normalised.tolist()]
        [-1.0, 1.0]
    """
    with sdpa_kernel(SDPBackend.MATH), _Composed():
        yield


def directional_derivatives(
    function: Callable[[dict[str, Tensor]], Tensor],
    parameters: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    order: int,
) -> tuple[Tensor, ...]:
    r"""Value and derivatives of a function of parameters along a line.

    .. math:: \frac{d^k}{dt^k} f(\theta + t \Delta) \Big|_{t=0}, \qquad k = 0, \dots, n

    By forward mode nested n times; first order costs about 4 forward passes, second 11, third 35.

    Args:
        function: Takes parameters by name, returns a tensor.
        parameters: Where: theta.
        direction: Along what: Delta, by the same names; parameters that it lacks stay.
        order: n, at least 0.

    Returns:
        n + 1 tensors of the function's shape.

    Raises:
        ValueError: The order is negative, or the direction names what is no parameter.

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
    with nested_derivatives(), torch.enable_grad():
        found = _derivatives(moving, steps, order)({name: values[name] for name in steps})
        return tuple(part.detach() for part in found)


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

    Args:
        model: Any module.
        parameters: By canonical name.
        args: Positional arguments of its forward.
        kwargs: Named ones.
    """
    names = {canonical_name(name): name for name, _ in model.named_parameters()}
    values = {names[name]: value for name, value in parameters.items()}
    return functional_call(model, values, tuple(args), dict(kwargs), tie_weights=True)


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


class _Composed(TorchFunctionMode):
    """Replaces fused normalisations by what they are made of, and attention by attention in pieces."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _COMPOSED.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = wide - wide.mean(dims, keepdim=True)
    return _scaled(centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps), weight, bias).to(input.dtype)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    small = torch.finfo(input.dtype).eps if eps is None else eps
    return _scaled(wide * torch.rsqrt(wide.square().mean(dims, keepdim=True) + small), weight, None).to(input.dtype)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    groups = wide.reshape(len(input), num_groups, -1)  # [N, C, ...] -> [N, groups, C / groups x ...]
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(input.shape)
    each = (1, -1) + (1,) * (input.ndim - 2)  # one weight per channel
    scale = None if weight is None else weight.view(each)
    return _scaled(normal, scale, None if bias is None else bias.view(each)).to(input.dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    length, keys = query.shape[-2], key.shape[-2]
    most = max(_SCORES, _SCORES_PER_QUERY * query.numel())
    rows = max(1, most * length * query.shape[-1] // max(query.numel() * keys, 1))
    # A graph would keep every piece; then pieces would only cost.
    recorded = query.requires_grad or key.requires_grad or value.requires_grad
    if rows >= length or recorded or dropout_p or (is_causal and attn_mask is not None):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    pieces = []
    for start in range(0, length, rows):
        piece = query[..., start : start + rows, :]  # [..., rows, D]
        seen, mask = keys, attn_mask
        if is_causal:  # later keys are masked for all of the piece
            seen = min(start + piece.shape[-2], keys)
            mask = torch.ones(piece.shape[-2], seen, dtype=torch.bool, device=query.device).tril(start)
        elif mask is not None and mask.shape[-2] > 1:
            mask = mask[..., start : start + rows, :]  # [..., rows, S]
        pieces.append(F.scaled_dot_product_attention(piece, key[..., :seen, :], value[..., :seen, :], mask, **options))
    return torch.cat(pieces, dim=-2)  # [..., L, D]


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


_COMPOSED: dict[Any, Callable[..., Tensor]] = {
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
