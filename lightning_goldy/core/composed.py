"""What torch lacks in forward mode or gets wrong where it is nested, composed of operations that it has right."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# Attention scores held at a time: so many for each element of the queries, and not fewer than the second.
_SCORES_PER_QUERY = 2
_SCORES = 1 << 18


@contextmanager
def nested_derivatives() -> Iterator[None]:
    """Makes derivatives of any order right inside a ``with`` block, or has them refused.

    Fused attention has no forward-mode derivative, so attention runs in its plain form, a piece of the queries at a
    time, so that its patterns do not fill the memory; neither have products over groups (mixtures of experts), gates
    and weight norms. The fused normalisations, ``linalg.solve`` and others have a derivative that is silently wrong
    when it is nested. All of them are composed of what torch has right, norms in at least float32 as the fused ones
    compute. A custom ``autograd.Function`` is differentiated through the operations of its forward. Gradient
    checkpoints and hooks that ask for gradients of activations (``enable_input_require_grads``) are set aside: they
    decide what a backward pass keeps and change no value. What a forward detaches (the norms of DoRA) is differentiated
    like the rest, for the derivatives are those of the values.

    Raises:
        NotImplementedError: Inside, at an operation whose derivative would be silently wrong: one of a library, which
            forward mode takes for a constant, or one that torch gets wrong and that is not composed.

    Example:
        >>> with nested_derivatives():
        ...     normalised = F.layer_norm(torch.tensor([1.0, 3.0]), (2,))
        >>> [round(value, 4) for value in normalised.tolist()]
        [-1.0, 1.0]
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(without_checkpoints())
        stack.enter_context(functions_by_parts())
        stack.enter_context(Composed())
        yield


@contextmanager
def without_checkpoints() -> Iterator[None]:
    """Sets gradient checkpoints aside: what runs inside keeps its activations and is not recomputed.

    Checkpoints cannot run in forward mode, and a checkpoint that is recomputed after a model has its own parameters
    back recomputes with those.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> x = torch.tensor(2.0)
        >>> with without_checkpoints():
        ...     _, change = torch.func.jvp(lambda x: checkpoint(torch.square, x, use_reentrant=True), (x,), (x,))
        >>> float(change)
        8.0
    """
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction, module._checkpoint_without_reentrant_generator
    module.CheckpointFunction, module._checkpoint_without_reentrant_generator = _NoCheckpoint, _once
    try:
        yield
    finally:
        module.CheckpointFunction, module._checkpoint_without_reentrant_generator = before


@contextmanager
def without_reentrant_checkpoints() -> Iterator[None]:
    """Has reentrant gradient checkpoints run as the others, which give gradients of single tensors, too.

    Example:
        >>> from torch.utils.checkpoint import checkpoint
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> with without_reentrant_checkpoints():
        ...     (gradient,) = torch.autograd.grad(checkpoint(torch.square, x, use_reentrant=True), [x])
        >>> float(gradient)
        4.0
    """
    module: Any = torch.utils.checkpoint
    before = module.CheckpointFunction
    module.CheckpointFunction = _PlainCheckpoint
    try:
        yield
    finally:
        module.CheckpointFunction = before


class _PlainCheckpoint:
    """In the place of a reentrant checkpoint, one that is not."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return torch.utils.checkpoint.checkpoint(
            function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
        )


class _NoCheckpoint:
    """In the place of a reentrant checkpoint."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _once(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


@contextmanager
def functions_by_parts(*, backward: bool = False) -> Iterator[None]:
    """Has custom functions without a derivative of their own for forward mode run as what their forward is made of.

    Args:
        backward: Whether also where their own backward would serve, which need not be the derivative of their values.
    """
    function: Any = torch.autograd.Function
    own = function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        carried = any(getattr(value, "carries_derivatives", False) for value in args)
        plain = not (backward or carried or torch._C._are_functorch_transforms_active())
        if plain or cls.jvp is not function.jvp:
            return own.__get__(None, cls)(*args, **kwargs)
        _composed_functions.append(f"{cls.__module__}.{cls.__qualname__}")
        if cls.setup_context is not function.setup_context:
            return cls.forward(*args, **kwargs)
        return cls.forward(_Context(args), *args, **kwargs)

    function.apply = classmethod(apply)
    try:
        yield
    finally:
        function.apply = own


_composed_functions: list[str] = []


@contextmanager
def composed_functions() -> Iterator[list[str]]:
    """Gathers the names of the custom functions that were differentiated through their forward, and where numbers left.

    Their derivatives are right where the forward consists of torch's operations; a kernel of its own hides them. So do
    numbers that are taken out of a tensor (``item``, ``numpy``), told by function and line, unless they only serve to
    look at.
    """
    names: list[str] = []
    at = len(_composed_functions)
    try:
        yield names
    finally:
        names.extend(dict.fromkeys(_composed_functions[at:]))
        del _composed_functions[at:]


@contextmanager
def undetached() -> Iterator[None]:
    """Has a backward pass go through what a forward detaches, so that its gradient is the derivative of the values.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> with undetached():
        ...     square = x * x.detach()
        >>> float(torch.autograd.grad(square, x)[0])
        4.0
    """
    with _Undetached():
        yield


class _Undetached(TorchFunctionMode):
    """Gives back what was to be detached."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DETACHING and args[0].requires_grad:
            return args[0]
        if func in _OUT_OF_TORCH and args[0].requires_grad:
            # It may have been detached, and to numbers that makes no difference.
            args = (args[0].detach(), *args[1:])
        return func(*args, **(kwargs or {}))


class _SignAndLog(NamedTuple):
    sign: Tensor
    logabsdet: Tensor


class _Context:
    """In the place of a custom function's context, for a forward without a backward."""

    def __init__(self, args: Sequence[Any]) -> None:
        self.needs_input_grad = tuple(isinstance(value, Tensor) and value.is_floating_point() for value in args)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_dirty(self, *tensors: Tensor) -> None:
        """Says nothing that matters to forward mode."""

    mark_non_differentiable = mark_dirty

    def set_materialize_grads(self, value: bool) -> None:
        """Says nothing that matters to forward mode."""


class Composed(TorchFunctionMode):
    """Replaces operations by what they are made of, and refuses those whose derivative would be silently wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        composed = _COMPOSED.get(func)
        if composed is not None:
            return composed(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            if func in _DETACHING:
                return args[0]
            if func in _OUT_OF_TORCH and _differentiable(args[0]):
                return _taken_out(func, *args, **kwargs)
            # Asked by a hook; functorch itself asks where it has allowed it.
            if func is Tensor.requires_grad_ and not torch._C._functorch.get_inplace_requires_grad_allowed():
                return args[0]
            library = _library_operation(func)
            if library in _OF_LIBRARIES:
                return _OF_LIBRARIES[library](*args, **kwargs)
            if library is not None and any(map(_differentiable, (*args, *kwargs.values()))):
                raise NotImplementedError(f"forward mode takes {library}, an operation of a library, for a constant")
            name = getattr(func, "__name__", "").split(".")[0]
            if name in _WRONG or (name in _REDUCING and _multiplies(*args, **kwargs)):
                raise NotImplementedError(f"torch's nested forward-mode derivative of {name} is wrong")
        return func(*args, **kwargs)


def _taken_out(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Numbers of a tensor's values; whether the derivative misses them is told as of a custom function."""
    carried: Any = torch._C._functorch
    if carried.is_functorch_wrapped_tensor(tensor):
        frame = sys._getframe(2)
        _composed_functions.append(f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})")
    while carried.is_functorch_wrapped_tensor(tensor):
        tensor = carried.get_unwrapped(tensor)
    with temporarily_clear_interpreter_stack():
        return func(tensor.detach(), *args, **kwargs)


def _library_operation(func: Any) -> str | None:
    """The name of an operation that is not torch's own; None for those that are."""
    if isinstance(func, torch._ops.OpOverload):
        name = f"{func.namespace}::{func._opname}"
    elif isinstance(func, torch._ops.OpOverloadPacket):
        name = str(func._qualified_op_name)
    else:
        return None
    return None if name.startswith(("aten::", "prims::")) else name


def _multiplies(*args: Any, **kwargs: Any) -> bool:
    return any(isinstance(value, str) and value == "prod" for value in (*args, *kwargs.values()))


def _differentiable(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_differentiable, value))
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _layout(input: Tensor) -> torch.memory_format:
    last = input.ndim == 4 and not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _wide(input: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy in at least float32, laid out as the fused operation lays out its result, which what follows may view."""
    return input.to(torch.promote_types(input.dtype, torch.float32)).contiguous(memory_format=layout)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = _wide(input, torch.contiguous_format)
    centred = wide - wide.mean(dims, keepdim=True)
    return _scaled(centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps), weight, bias).to(input.dtype)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    wide = _wide(input, _layout(input))
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
    wide = _wide(input, _layout(input))
    groups = wide.reshape(len(input), num_groups, -1)  # [N, C, ...] -> [N, groups, C / groups x ...]
    centred = groups - groups.mean(-1, keepdim=True)
    normal = (centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)).reshape(input.shape)
    normal = normal.contiguous(memory_format=_layout(input))
    each = (1, -1) + (1,) * (input.ndim - 2)  # one weight per channel
    scale = None if weight is None else weight.view(each)
    return _scaled(normal, scale, None if bias is None else bias.view(each)).to(input.dtype)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    each = (1, -1) + (1,) * (input.ndim - 2)  # one of each per channel
    wide = _wide(input, _layout(input))
    if training or running_mean is None or running_var is None:
        if running_mean is not None and momentum is not None:
            # The fused one moves the running statistics, which carry no derivative.
            F.batch_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
        dims = [dim for dim in range(input.ndim) if dim != 1]
        centred = wide - wide.mean(dims, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    else:
        normal = (wide - running_mean.view(each)) * torch.rsqrt(running_var.view(each) + eps)
    scale, shift = (None if tensor is None else tensor.view(each) for tensor in (weight, bias))
    return _scaled(normal, scale, shift).to(input.dtype)


def _torch_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    if running_mean is not None:
        F.instance_norm(input.detach(), running_mean, running_var, None, None, True, momentum, eps)
    return _group_norm(input.contiguous(), input.shape[1], weight, bias, eps)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    dims = [other for other in range(v.ndim) if other != dim % v.ndim] if dim != -1 else None
    return v * (g * torch.rsqrt(v.square().sum(dims, keepdim=dims is not None)))


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
        whole = F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        return _by_position(whole, query)
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
    return _by_position(torch.cat(pieces, dim=-2), query)  # [..., L, D]


def _by_position(output: Tensor, query: Tensor) -> Tensor:
    """Laid out as fused attention lays out its output where heads lie inside of positions: as the queries."""
    inside = query.ndim == 4 and not query.is_contiguous() and query.transpose(1, 2).is_contiguous()
    return output.transpose(1, 2).contiguous().transpose(1, 2) if inside else output


def _grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if offs is None:
        product = torch.bmm(mat_a, mat_b)
    else:
        ends = offs.tolist()
        places = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        if mat_a.ndim == 2 and mat_b.ndim == 3:  # rows by group, [S, K] and [G, K, N] -> [S, N]
            parts = [mat_a[place] @ mat_b[group] for group, place in enumerate(places)]
            parts.append(mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[-1]))
            product = torch.cat(parts)
        elif mat_a.ndim == 3:  # columns by group, [G, M, K] and [K, S] -> [M, S]
            parts = [mat_a[group] @ mat_b[:, place] for group, place in enumerate(places)]
            parts.append(mat_b.new_zeros(mat_a.shape[1], mat_b.shape[1] - ends[-1]))
            product = torch.cat(parts, dim=1)
        else:  # sums by group, [M, S] and [S, N] -> [G, M, N]
            product = torch.stack([mat_a[:, place] @ mat_b[place] for place in places])
    product = product if bias is None else product + bias
    return product if out_dtype is None else product.to(out_dtype)


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **settings: Any,
) -> Tensor:
    classes = linear_weight.shape[:-1]
    logits = F.linear(input, linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten())
    logits = logits.unflatten(-1, classes)
    if ignore_index is not None:
        settings["ignore_index"] = ignore_index
    return F.cross_entropy(logits, target, **settings)


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    found = F.relu6(input + 3) / 6
    return input.copy_(found) if inplace else found


def _soft_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    losses = F.softplus(-target * input)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _solve(matrix: Tensor, right_side: Tensor, *, left: bool = True, out: Tensor | None = None) -> Tensor:
    vector = right_side.ndim == 1 or (matrix.ndim - 1 == right_side.ndim and right_side.shape == matrix.shape[:-1])
    right = right_side.unsqueeze(-1) if vector else right_side
    found = torch.linalg.inv(matrix) @ right if left else right @ torch.linalg.inv(matrix)
    found = found.squeeze(-1) if vector else found
    return found if out is None else out.copy_(found)


def _solve_ex(
    matrix: Tensor, right_side: Tensor, *, left: bool = True, check_errors: bool = False, out: Any = None
) -> tuple[Tensor, Tensor]:
    info = torch.zeros(matrix.shape[:-2], dtype=torch.int32, device=matrix.device)
    return _solve(matrix, right_side, left=left), info


def _tensorsolve(
    matrix: Tensor, right_side: Tensor, dims: Sequence[int] | None = None, *, out: Tensor | None = None
) -> Tensor:
    moved = matrix if dims is None else matrix.movedim(tuple(dims), tuple(range(matrix.ndim - len(dims), matrix.ndim)))
    shape = moved.shape[right_side.ndim :]
    return _solve(moved.reshape(right_side.numel(), math.prod(shape)), right_side.flatten()).reshape(shape)


def _det(matrix: Tensor, *, out: Any = None) -> Tensor:
    factors, pivots = torch.linalg.lu_factor(matrix)
    return factors.diagonal(dim1=-2, dim2=-1).prod(-1) * _parity(pivots)


def _logdet(matrix: Tensor) -> Tensor:
    sign, logarithm = _slogdet(matrix)
    return torch.where(sign < 0, torch.nan, logarithm)


def _parity(pivots: Tensor) -> Tensor:
    swaps = (pivots != torch.arange(1, pivots.shape[-1] + 1, device=pivots.device)).sum(-1)
    return 1 - 2 * (swaps % 2)


def _slogdet(matrix: Tensor, *, out: Any = None) -> Any:
    factors, pivots = torch.linalg.lu_factor(matrix)
    diagonal = factors.diagonal(dim1=-2, dim2=-1)  # [..., N]
    sign = diagonal.sign().prod(-1) * _parity(pivots)
    return _SignAndLog(sign.detach(), diagonal.abs().log().sum(-1))


def _cumprod(values: Tensor, dim: int, *, dtype: torch.dtype | None = None, out: Any = None) -> Tensor:
    """Products of spans that double in length."""
    values = values if dtype is None else values.to(dtype)
    if not values.is_floating_point() or not values.dim():
        return values.cumprod(dim)
    length, span = values.shape[dim], 1
    while span < length:
        rest = values.narrow(dim, span, length - span) * values.narrow(dim, 0, length - span)
        values, span = torch.cat([values.narrow(dim, 0, span), rest], dim), 2 * span
    return values.clone() if length < 2 else values


def _cholesky_inverse(factor: Tensor, upper: bool = False, *, out: Any = None) -> Tensor:
    unit = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.cholesky_solve(unit.expand(factor.shape), factor, upper=upper)


def _without_kernel(recurrent: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer without the kernels that have no forward mode."""

    def call(*args: Any, **kwargs: Any) -> Any:
        kernels: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn]
        enabled = [kernel.enabled for kernel in kernels]
        try:
            for kernel in kernels:
                kernel.enabled = False
            return recurrent(*args, **kwargs)
        finally:
            for kernel, before in zip(kernels, enabled, strict=True):
                kernel.enabled = before

    return call


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    normal = normal if weight is None else normal * weight
    return normal if bias is None else normal + bias


_COMPOSED: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _torch_batch_norm,
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    torch._weight_norm: _weight_norm,
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
    F.soft_margin_loss: _soft_margin_loss,
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.tensorsolve: _tensorsolve,
    torch.linalg.slogdet: _slogdet,
    torch.slogdet: _slogdet,
    Tensor.slogdet: _slogdet,
    **dict.fromkeys((torch.linalg.det, torch.det, Tensor.det), _det),
    **dict.fromkeys((torch.logdet, Tensor.logdet), _logdet),
    **dict.fromkeys((torch.cumprod, Tensor.cumprod), _cumprod),
    **dict.fromkeys((torch.cholesky_inverse, Tensor.cholesky_inverse), _cholesky_inverse),
    # Not in every version of torch.
    **{
        getattr(module, name): function
        for module, name, function in (
            (torch, "_grouped_mm", _grouped_mm),
            (F, "grouped_mm", _grouped_mm),
            (F, "linear_cross_entropy", _linear_cross_entropy),
        )
        if hasattr(module, name)
    },
    **{getattr(torch, name): _without_kernel(getattr(torch, name)) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
# By these a forward takes out of its derivative what its value depends on.
_DETACHING = frozenset({torch.detach, Tensor.detach, Tensor.data.__get__})  # type: ignore[attr-defined]
# By these it takes numbers, which no derivative follows.
_OUT_OF_TORCH = frozenset(
    {Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.__array__, Tensor.__float__, Tensor.__complex__}
)
# What libraries have and forward mode does not see, by what they are made of.
_OF_LIBRARIES: dict[str | None, Callable[..., Any]] = {"transformers::grouped_mm_fallback": _grouped_mm}
# Wrong where they multiply.
_REDUCING = frozenset({"scatter_reduce", "scatter_reduce_"})
# Rare ones are refused, by name, and the parts of composed ones where they are called themselves.
_WRONG = frozenset(
    {
        *("linalg_householder_product", "orgqr", "triangular_solve", "as_strided_scatter", "cumprod_"),
        "special_i1",  # at zero
        *("native_layer_norm", "native_group_norm", "native_batch_norm", "_native_batch_norm_legit"),
        *("_batch_norm_with_update", "_linalg_solve_ex", "_linalg_det", "_linalg_slogdet"),
    }
)
