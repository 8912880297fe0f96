"""The Taylor approximation as a model, worked through in parts of a batch.

Order n carries n + 1 values of every activation (2^n where forward mode is nested), and about as many on the way to the
next, so :func:`parts_of_order` cuts a batch into 2^n.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.precision import float64_throughout
from lightning_goldy.core.autodiff import (
    Substituted,
    call_with,
    directional_derivatives,
    forward_mode,
    polynomial,
    trainable_values,
)
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.batches import batch_tensors, map_batch
from lightning_goldy.core.naming import require_number, suggestion
from lightning_goldy.core.objective import (
    IGNORE_INDEX,
    CausalLMObjective,
    ClassifierObjective,
    Objective,
    TargetLogits,
    TokenObjective,
)
from lightning_goldy.core.sharding import inside_parallel, is_sharded
from lightning_goldy.core.vector import ParameterVector

# What a language model takes one row per sample of; an argument beside these is about the whole batch.
_BY_SAMPLE = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels")
_ABOUT_POSITIONS = ("logits_to_keep", "cache_position")


def parts_of_order(order: int, *, gradients: bool = False) -> int:
    """Parts of a batch in which derivatives along a line need about the activations of an evaluation forward of it all.

    Args:
        order: Of the derivatives.
        gradients: Whether a backward pass follows, whose graph holds more than a forward.
    """
    return int(2 ** (order + gradients))


def batch_parts(batch: Any, objective: Objective, count: int) -> Iterator[Any]:
    """The samples of a batch that have targets, in at most so many parts.

    A batch stays whole where parts might not add up to it: under any other objective than next-token prediction and
    classification, and where its tensors do not share their first dimension.

    Example:
        >>> import torch
        >>> batch = {"input_ids": torch.zeros(5, 3, dtype=torch.long)}
        >>> [len(part["input_ids"]) for part in batch_parts(batch, CausalLMObjective(), 2)]
        [3, 2]
    """
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in batch_tensors(batch)}
    kept = _with_targets(batch, objective) if len(lengths) == 1 else None  # [B]
    if kept is None or len(kept) < 2 or lengths != {len(kept)} or not kept.any():
        yield batch
        return
    rows = kept.nonzero().flatten()
    for start, stop in _bounds(len(rows), count):
        chosen = slice(start, stop) if len(rows) == len(kept) else rows[start:stop]
        yield map_batch(batch, itemgetter(chosen))


def logits_by_parts(
    model: nn.Module,
    logits: Callable[[Sequence[Any], Mapping[str, Any]], Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    count: int,
) -> Tensor:
    """A language model's logits from those of at most so many parts of its arguments; whole for any other call.

    Args:
        model: Names the arguments.
        logits: Gives the logits for some of the samples, [B, ...].
        args: Positional arguments for the whole batch.
        kwargs: Named ones.
        count: Of parts.
    """
    named = _language_arguments(model, args, kwargs)
    rows = _length(named)
    if rows < 2:
        return logits(args, kwargs)
    whole: Tensor | None = None
    for start, stop in _bounds(rows, count):
        part = logits((), {name: _cut(name, value, rows, slice(start, stop)) for name, value in named.items()})
        if not part.ndim or len(part) != stop - start:  # not one row per sample
            return logits(args, kwargs)
        if whole is None:  # filled in place, because joining would hold everything twice
            whole = part.new_empty(rows, *part.shape[1:])
        whole[start:stop] = part
    assert whole is not None
    return whole


def _bounds(rows: int, count: int) -> Iterator[tuple[int, int]]:
    size = -(-rows // count)
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def _with_targets(batch: Any, objective: Objective) -> Tensor | None:
    """Which samples have a target; None under an objective of whose targets nothing is known."""
    # A part without a target would be refused. A subclass may see targets elsewhere.
    if type(objective) is ClassifierObjective:
        labels = batch.get("labels") if isinstance(batch, Mapping) else batch[-1]
        return labels != IGNORE_INDEX if isinstance(labels, Tensor) and labels.ndim == 1 else None
    if isinstance(objective, TokenObjective) and isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return (batch["labels"] != IGNORE_INDEX).any(dim=1) if batch["labels"].ndim == 2 else None
    if type(objective) is not CausalLMObjective or not isinstance(batch, Mapping) or "input_ids" not in batch:
        return None
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    labels = ids if batch.get("labels") is None else batch["labels"]
    if labels.ndim != 2 or (mask is not None and mask.shape != labels.shape):
        return None
    valid = labels[:, 1:] != IGNORE_INDEX  # [B, T-1]
    if mask is not None:
        valid = valid & (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
    return valid.any(dim=1)


def _language_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, or none where one is not known to a language model."""
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    names = list(inspect.signature(inner.forward).parameters)
    if len(args) > len(names):
        return {}
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    for name, value in named.items():
        plain = value is None or isinstance(value, (bool, int, str))
        if not plain and not (isinstance(value, Tensor) and name in (*_BY_SAMPLE, *_ABOUT_POSITIONS)):
            return {}
    return named


def _length(named: Mapping[str, Any]) -> int:
    """The number of samples, or 0 where arguments disagree about it."""
    first = next((named[name] for name in ("input_ids", "inputs_embeds") if named.get(name) is not None), None)
    if first is None or first.ndim < 2:
        return 0
    tensors = [named[name] for name in _BY_SAMPLE if isinstance(named.get(name), Tensor)]
    return len(first) if all(tensor.ndim and len(tensor) in (1, len(first)) for tensor in tensors) else 0


def _cut(name: str, value: Any, rows: int, part: slice) -> Any:
    if name in _BY_SAMPLE and isinstance(value, Tensor) and len(value) == rows:
        return value[part]
    return value


HIGHEST_ORDER = 3
By = Literal["block", "tensor"]
"""What a step is attributed to."""


def check_orders(orders: Sequence[int], by: str | None) -> tuple[int, ...]:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is out of range.
    """
    if isinstance(orders, (str, bytes)) or not isinstance(orders, Iterable):
        raise ValueError(f"orders is a list of whole numbers, as [1, 2]; got {orders!r:.60}")
    for order in orders:
        require_number("each of orders", order, whole=True)
    found = tuple(sorted(set(orders)))
    for order in found:
        if not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"orders lie between 1 and {HIGHEST_ORDER}; got {order}")
    if 1 not in found:
        raise ValueError(f"orders must hold 1, by which the regime is told; got {list(orders)}")
    if by is not None and by not in get_args(By):
        raise ValueError(f"unknown by={by!r}; {suggestion(str(by), get_args(By))}")
    return found


def require_differences(orders: Sequence[int]) -> None:
    """Checks that a sharded model can be expanded to these orders.

    Raises:
        ValueError: It cannot.
    """
    if max(orders) > 2:
        raise ValueError(
            f"orders={list(orders)}: a sharded model has no forward mode, and differences along the step give orders "
            "1 and 2; leave order 3 out, or keep the model whole on each rank (DDPStrategy)"
        )


class TaylorApproximation(Substituted):
    r"""A callable like the model, whose logits are those of its Taylor expansion around a base.

    .. math:: f_n(x) = \sum_{k \le n} \frac{1}{k!} \frac{d^k}{dt^k} f(\theta_0 + t (\theta - \theta_0); x) \Big|_0

    with theta the model's present values at each call, so that it follows a training, or values that are given. Use it
    where a model is evaluated: ``objective.loss(TaylorApproximation(model, base, order=1), batch)``. A language model's
    arguments are worked through in 2^n parts of whole samples, which bounds the memory; any other call goes at once.

    Args:
        model: The model; its values are read at each call.
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        order: n, from 1 to 3.
        parameters: theta; the model's present values by default.

    Raises:
        ValueError: The order is out of range.
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.
        ForwardModeError: At a call, a layer has no forward mode.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> base = ParameterVector.of(model)
        >>> _ = model.weight.data.mul_(3)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(TaylorApproximation(model, base, order=1)(x), model(x))  # linear in its parameters
        True
    """

    def __init__(self, model: nn.Module, base: Base, order: int, *, parameters: ParameterVector | None = None) -> None:
        model = inside_parallel(model)
        super().__init__(model, {})
        if not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order must lie between 1 and {HIGHEST_ORDER}; got {order}")
        if any(map(is_sharded, model.parameters())):
            raise ValueError("a sharded model has no forward-mode derivatives; expand the loss with taylor_diff")
        start = base_of(base, model).vector(model)
        if parameters is not None:
            start.space.require_same(parameters.space)
        # In tuples, as the model is, so that nothing becomes part of this module.
        self._base, self._given = (start,), (parameters,)
        self.order = order

    @property
    def wrapped(self) -> nn.Module:
        """The model as it was given."""
        return self._model[0]

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the expansion's logits; a tensor where the model gives one."""
        model, base, given = self._model[0], self._base[0], self._given[0]
        present: Mapping[str, Tensor] = base.space.resolve(model) if given is None else given
        delta = {name: present[name].detach() - value for name, value in base.items()}
        # Without graphs: a parameter outside the base would have one kept for nothing.
        others = trainable_values(model)
        kinds: list[Any] = []

        def expand(some: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
            def logits(parameters: Mapping[str, Tensor]) -> Tensor:
                output = call_with(model, {**others, **parameters}, some, named)
                kinds.append(type(output))
                return output if isinstance(output, Tensor) else output.logits

            with float64_throughout(model), forward_mode(model):
                return polynomial(directional_derivatives(logits, dict(base), delta, self.order))

        found = logits_by_parts(model, expand, args, kwargs, parts_of_order(self.order))
        return found if issubclass(kinds[-1], Tensor) else kinds[-1](logits=found)


def losses_of_logits(target: TargetLogits, expansion: Sequence[Tensor]) -> list[float]:
    """Derivatives of the loss along the step from those of the logits, by the chain rule on their polynomial."""

    def loss(where: dict[str, Tensor]) -> Tensor:
        return dataclasses.replace(target, logits=polynomial(expansion, where["t"])).loss()

    zero = {"t": torch.zeros((), dtype=expansion[0].dtype, device=expansion[0].device)}
    found = directional_derivatives(loss, zero, {"t": torch.ones_like(zero["t"])}, len(expansion) - 1)
    return [float(value) for value in found]


def farthest_within(targets: Tensor, expansion: Sequence[Tensor], errors: Sequence[Tensor]) -> list[Tensor]:
    """The expansion of logits that lies within the errors and is worst for the second derivative of their loss.

    With the probabilities p and the targets y it is f1' (diag p - p p') f1 + (p - y)' f2.
    """
    value, slope, bend, *others = expansion
    probs = torch.softmax(value, dim=-1)
    steep = probs * (slope - (probs * slope).sum(-1, keepdim=True))
    residual = probs.scatter_add(-1, targets[:, None], -torch.ones_like(probs[:, :1]))
    moved = [slope + errors[1].abs() * steep.sign(), bend + errors[2].abs() * residual.sign()]
    return [value, *moved, *others]
