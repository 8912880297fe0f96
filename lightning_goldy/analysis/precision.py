"""In what precision a model computes, what rounding alone makes of a number, and computing in float32 for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_goldy.analysis.result import Row
from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.sharding import is_sharded, local
from lightning_goldy.core.store import available_memory

# Of free memory a copy in float32 may take so much; the rest is for what is computed with it.
_SHARE_OF_MEMORY = 0.6
_CHUNK = 1 << 20


def low_precision(model: nn.Module) -> dict[str, Any] | None:
    r"""The precision in which a model computes here, where that is below float32; None where it is not.

    Args:
        model: Its weights and the autocast in force on their device decide.

    Returns:
        ``dtype``; ``by``, one of ``autocast``, ``weights`` and ``mixed precision of FSDP2``; and ``epsilon``, the gap
        between 1 and the next number.

    Example:
        >>> low_precision(nn.Linear(2, 2)) is None
        True
        >>> low_precision(nn.Linear(2, 2).bfloat16())
        {'dtype': 'bfloat16', 'by': 'weights', 'epsilon': 0.0078125}
    """
    parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if not parameters:
        return None
    kind, by = parameters[0].device.type, "weights"
    dtype = max((parameter.dtype for parameter in parameters), key=lambda dtype: torch.finfo(dtype).eps)
    if torch.is_autocast_enabled(kind):
        dtype, by = torch.get_autocast_dtype(kind), "autocast"
    elif any(map(is_sharded, parameters)) and (policy := _dtype_of_shards(model)) is not None:
        dtype, by = policy, "mixed precision of FSDP2"
    epsilon = torch.finfo(dtype).eps
    if epsilon <= torch.finfo(torch.float32).eps:
        return None
    return {"dtype": str(dtype).removeprefix("torch."), "by": by, "epsilon": epsilon}


def _dtype_of_shards(model: nn.Module) -> torch.dtype | None:
    """What FSDP2 casts parameters to for a pass; None where it leaves them as they are."""
    for child in model.modules():
        state_of: Any = getattr(child, "_get_fsdp_state", None)
        policy = getattr(state_of(), "_mp_policy", None) if callable(state_of) else None
        if getattr(policy, "param_dtype", None) is not None:
            return policy.param_dtype  # type: ignore[union-attr]
    return None


def rounding_of(base: Tensor, delta: Tensor, precision: Mapping[str, Any]) -> Tensor:
    r"""What storing weights in a precision does to them: sums over the elements of one tensor.

    .. math:: \sum_j \frac{u_j^2}{12}, \qquad \#\{j : 0 < |\Delta_j| < u_j / 2\}, \qquad
        u_j = \epsilon \, 2^{\lfloor \log_2 |\theta_j| \rfloor}

    u is the gap between neighbouring numbers; an error that is uniform within half of it on both sides has the variance
    u^2 / 12, and a change below half of it is lost where the weight is rounded.

    Args:
        base: The weights; of shards this process's part.
        delta: Their change, likewise.
        precision: As :func:`low_precision` tells it.

    Returns:
        The two sums, shape ``[2]``, float64.

    Example:
        >>> one, step = torch.ones(1), torch.tensor([0.001])
        >>> rounding_of(one, step, {"dtype": "bfloat16", "epsilon": 2.0**-7}).tolist() == [2.0**-14 / 12, 1.0]
        True
    """
    smallest = torch.finfo(getattr(torch, precision["dtype"])).smallest_normal
    sums = torch.zeros(2, dtype=torch.float64, device=local(base).device)
    flats = [local(tensor).reshape(-1) for tensor in (base, delta)]
    for start in range(0, flats[0].numel(), _CHUNK):
        values, steps = (flat[start : start + _CHUNK].double().abs() for flat in flats)
        _, exponents = torch.frexp(values.clamp(min=smallest))
        gaps = torch.ldexp(torch.full_like(values, precision["epsilon"]), exponents - 1)
        sums += torch.stack([gaps.square().sum() / 12, ((steps > 0) & (steps < gaps / 2)).sum().double()])
    return sums


def marked(model: nn.Module, metrics: Mapping[str, float | None]) -> dict[str, Any] | None:
    """The mark of what was computed below float32, with the floor of a loss beside it; None where nothing was.

    A loss is rounded to about epsilon times itself: differences below ``loss_floor`` (nats) may be rounding alone.

    Args:
        model: As it computed.
        metrics: Of the result; ``loss`` is looked at.
    """
    mark, loss = low_precision(model), metrics.get("loss")
    if mark is not None and loss is not None:
        mark["loss_floor"] = mark["epsilon"] * abs(loss)
    return mark


def with_precision(row: Row, model: nn.Module, *, ran: bool = True) -> Row:
    """A row with the mark of a precision below float32, which the result may have told already.

    Args:
        row: Of an analysis of the model.
        model: As it computed.
        ran: Whether the analysis ran the model; what looks at weights alone computes nothing in autocast's precision.
    """
    kind = next(model.parameters()).device.type
    with torch.autocast(kind, enabled=False) if not ran else nullcontext():
        mark = marked(model, row.metrics)
    if "precision" in row.result or mark is None:
        return row
    return row.extended(result={"precision": mark}).noted(precision_note(mark, row.metrics))


def precision_note(mark: Mapping[str, Any], metrics: Mapping[str, float | None]) -> str:
    """What to know of a result with a mark.

    Example:
        >>> mark = {"dtype": "bfloat16", "by": "weights", "epsilon": 0.0078125, "loss_floor": 0.02}
        >>> precision_note(mark, {"loss": 2.5, "change": -0.001})
        'computed in bfloat16 (weights); differences of the loss below 0.02 nats may be rounding, as this change may'
    """
    told = f"computed in {mark['dtype']} ({mark['by']})"
    floor, change = mark.get("loss_floor"), metrics.get("change")
    if floor is None:
        return told
    below = ", as this change may" if change is not None and abs(change) < floor else ""
    return f"{told}; differences of the loss below {floor:.2g} nats may be rounding{below}"


@contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Lets a model of lower precision compute in float32 for the length of a ``with`` block, where memory allows.

    Its weights and buffers are put aside and come back as they were, bit for bit; autocast is off inside. A sharded
    model, and one whose copy in float32 would not fit, stays as it is.

    Args:
        model: Without gradients, as inside :func:`~lightning_goldy.core.isolation.preserved`.

    Yields:
        Whether what would have been computed in a lower precision is computed in float32.

    Example:
        >>> model = nn.Linear(2, 2).bfloat16()
        >>> with in_float32(model) as raised:
        ...     inside = model.weight.dtype
        >>> raised, inside, model.weight.dtype
        (True, torch.float32, torch.bfloat16)
    """
    if low_precision(model) is None or any(map(is_sharded, model.parameters())) or not _fits(model):
        yield False
        return
    narrow = [value for value in model.parameters() if _is_narrow(value)]
    kept = [value.data for value in narrow]
    buffers = [
        (child, name, value)
        for child in model.modules()
        for name, value in child._buffers.items()
        if value is not None and _is_narrow(value)
    ]
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.promote_types(default, torch.float32))
        for value in narrow:
            value.data = value.data.float()
        for child, name, buffer in buffers:
            child._buffers[name] = buffer.float()
        with torch.autocast(next(model.parameters()).device.type, enabled=False):
            yield True
    finally:
        torch.set_default_dtype(default)
        for value, data in zip(narrow, kept, strict=True):
            value.data = data
        for child, name, buffer in buffers:
            child._buffers[name] = buffer


def widened(batch: Any) -> Any:
    """A batch with its low-precision tensors in float32."""
    return map_batch(batch, lambda tensor: tensor.float() if _is_narrow(tensor) else tensor)


def _is_narrow(value: Tensor) -> bool:
    return value.is_floating_point() and 1 < value.element_size() < 4


def _fits(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return sum(4 * value.numel() for value in model.parameters() if _is_narrow(value)) <= _SHARE_OF_MEMORY * free


@contextmanager
def float64_throughout(model: nn.Module) -> Iterator[bool]:
    """Keeps what a float64 model computes in float64 inside a ``with`` block, where its code asks for float32.

    Families compute norms, softmax and positions in float32 whatever the weights are. Beside float64 weights such casts
    are rounding of 1e-7 that values at two close places do not share: a second difference through them is noise. A
    model of any other precision computes as ever.

    Args:
        model: Whose parameters say whether it is one of float64.

    Yields:
        Whether it is.

    Example:
        >>> with float64_throughout(nn.Linear(2, 2).double()) as wide:
        ...     inside = torch.softmax(torch.zeros(2, dtype=torch.float64).float(), dim=0, dtype=torch.float32).dtype
        >>> wide, inside
        (True, torch.float64)
    """
    dtypes = {value.dtype for value in model.parameters() if value.is_floating_point()}
    wide = dtypes == {torch.float64}
    with _Uncast() if wide else nullcontext():
        yield wide


class _Uncast(TorchFunctionMode):
    """Reads float64 where an operation is asked for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        wide: Any = Tensor.double if func is Tensor.float else func
        return wide(*given, **named)
