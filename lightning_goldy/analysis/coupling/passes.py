"""Passes over pieces: each piece's gradient, read from one batched backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.coupling.gram import Rows, accurate, without_empty_rows
from lightning_goldy.analysis.gradients import exact_products, linear_layers
from lightning_goldy.analysis.result import Cost, counted_passes
from lightning_goldy.core.architecture.blocks import of_expert
from lightning_goldy.core.naming import canonical_name, require_at_least, require_choice, require_kinds
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import RankError, gather, is_sharded, local, unshard_guard

T = TypeVar("T")
OnError = Literal["raise", "nan"]
Progress = Callable[[int, int], None]
RECOVERABLE = (ValueError, IndexError, RuntimeError)
"""What one piece may raise where others go well."""


@dataclass(frozen=True)
class RunOptions:
    """How a coupling is computed.

    Args:
        chunk_size: Pieces in one pass; ``auto`` as many as their activations have room for.
        projection: Keep so many random combinations of each gradient only; all of it by default.
        seed: Of the projection.
        workspace: A folder for blocks of gradients that memory has no room for.
        memory_limit: Bytes that gradients may take in memory; half of what is available by default.
        on_error: ``raise``, or ``nan`` to list pieces that fail and leave their rows NaN.

    Raises:
        ValueError: An option is unknown or out of range.
    """

    chunk_size: int | Literal["auto"] = "auto"
    projection: int | None = None
    seed: int = 0
    workspace: str | Path | None = None
    memory_limit: int | None = None
    on_error: OnError = "raise"

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        if self.chunk_size != "auto" and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise ValueError(f"chunk_size is 'auto' or a number of pieces, at least 1; got {self.chunk_size!r}")
        for name, least in (("projection", 2), ("memory_limit", 1)):
            value = getattr(self, name)
            if value is not None:
                require_at_least(name, value, least)
        require_choice("on_error", self.on_error, get_args(OnError))


class CouplingError(ValueError):
    """Coupling cannot be computed for this model or piece; the message says which and why."""


class NotBatchedError(RuntimeError):
    """A layer sees something else than one row of inputs per piece."""


def made_passes(
    indices: Sequence[int],
    fits: Callable[[list[int], int], bool],
    run: Callable[[list[int]], T],
    *,
    on_memory: Callable[[], None] | None = None,
) -> Iterator[tuple[list[int], T | Exception]]:
    """Cuts pieces into passes of neighbours and makes them; a pass that fails is made again piece by piece.

    Args:
        indices: The pieces.
        fits: Whether a pass takes one piece more.
        run: Makes a pass.
        on_memory: Called where the memory did not suffice for a pass, which is halved; None lets that be an error.

    Yields:
        Of each pass its pieces and what came of it: an error of one piece alone.
    """
    chunks: list[list[int]] = []
    for index in indices:
        if chunks and fits(chunks[-1], index):
            chunks[-1].append(index)
        else:
            chunks.append([index])
    pending = chunks[::-1]
    while pending:
        chunk = pending.pop()
        outcome: T | Exception
        try:
            outcome = run(chunk)
        except torch.OutOfMemoryError:
            if len(chunk) == 1 or on_memory is None:
                raise
            on_memory()
            pending += [chunk[len(chunk) // 2 :], chunk[: len(chunk) // 2]]
            continue
        except (CouplingError, RankError):
            raise
        except RECOVERABLE as error:
            if len(chunk) > 1:
                pending += [[index] for index in chunk[::-1]]
                continue
            outcome = error
        yield chunk, outcome


class Footprint(NamedTuple):
    """Bytes that pieces need.

    Args:
        activations: Kept between forward and backward pass, per token.
        rows: Kept of gradients, per token.
        fixed: Kept of gradients that are stored as they are, per piece.
    """

    activations: float
    rows: float
    fixed: float


# Difference between a gradient and what a layer's inputs and outputs tell of it, as a share of its norm, that cannot be
# rounding any more.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_LOW_PRECISION_ROUNDING = 0.1


class Capture:
    """Gradients of pieces with respect to chosen tensors.

    Weights and biases of linear layers are read from activations. Others, and weights that are used otherwise than by
    calling their layer, are differentiated piece by piece.

    Args:
        model: In evaluation mode, within ``preserved``, which gives back the flags that this sets.
        objective: What to differentiate.
        parameters: The chosen tensors, by canonical name.
    """

    def __init__(self, model: nn.Module, objective: Objective, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.objective, self.parameters = model, objective, dict(parameters)
        self._held = list(model.parameters())
        self.sharded = any(map(is_sharded, self._held))
        self.device = next(iter(parameters.values())).device
        self._layers: dict[str, Tap] = {}
        self._taps: dict[str, Tap] = {}
        for name, module in linear_layers(model).items():
            bias = name.removesuffix("weight") + "bias"
            for chosen in (name, bias):
                if chosen in parameters:
                    self._layers[chosen] = self._taps.setdefault(name, Tap(name, module))
        self._batched, self._count = True, 1
        self.precision = torch.float32
        """What products of rows are made in; known after the probe."""
        self._freeze(self.direct)

    @property
    def direct(self) -> list[str]:
        """Tensors that are differentiated piece by piece."""
        return [name for name in self.parameters if name not in self._layers]

    @property
    def batched(self) -> bool:
        """Whether several pieces can share a pass."""
        return self._batched and not self.direct and all(tap.batch_first for tap in self._taps.values())

    @contextmanager
    def attached(self) -> Iterator[Callable[[], Cost]]:
        """With hooks on the layers, and one that counts the passes of this process."""
        with ExitStack() as stack:
            for tap in self._taps.values():
                stack.enter_context(tap.module.register_forward_hook(tap.hook, with_kwargs=True))
            yield stack.enter_context(counted_passes(self.model, lambda: self._count))

    def run(self, batch: Any, count: int, *, compare: bool = False) -> tuple[Tensor, dict[str, Rows]]:
        """One forward and backward pass.

        Args:
            batch: So many pieces, on the device.
            count: Their number.
            compare: Whether to compare what layers tell with the gradients that sharded parameters have.

        Returns:
            Mean log-probability of each piece's answer, shape ``[M]``, nats, and its gradient by tensor.

        Raises:
            NotBatchedError: The pieces must run one by one; ``batched`` says so from now on.
        """
        try:
            log_probs = self._differentiate(batch, count)
            if compare and self.sharded:
                self._compare_sharded()
            rows = {}
            for name, parameter in self.parameters.items():
                tap = self._layers.get(name)
                rows[name] = _flat_gradient(name, parameter) if tap is None else tap.gradient(name)
            return log_probs, rows
        except NotBatchedError:
            self._batched = False
            raise
        finally:
            for tap in self._taps.values():
                tap.begin(1)
            # Of sharded ones a first forward pass may put new parameters in the place of the old.
            for parameter in self.model.parameters() if self.sharded else self._held:
                parameter.grad = None
            # A low-precision copy of a weight that needs a gradient belongs to the graph that is gone.
            torch.clear_autocast_cache()

    def probe(self, batch: Any, n_tokens: int) -> Footprint:
        """Runs one piece, compares what layers tell with the gradients themselves, and measures what a piece needs.

        Args:
            batch: The piece, on the device.
            n_tokens: Its length.

        Raises:
            CouplingError: A tensor cannot be differentiated where the parameters are sharded.
        """
        if self.sharded:
            self._require_layers()
        with ExitStack() as stack:
            if not self.sharded:
                self._freeze(self.parameters)
                for name, tap in self._layers.items():
                    if tap.readable:
                        compare = partial(self._compare, name, tap)
                        hook = self.parameters[name].register_post_accumulate_grad_hook(compare)
                        stack.callback(hook.remove)
            counted = stack.enter_context(_counted_activations(self.model))
            _, rows = self.run(batch, 1, compare=True)
            counted_bytes = counted()
        self._freeze(self.direct)
        torch.clear_autocast_cache()
        if all(part.gradients.dtype == torch.float64 for part in rows.values()):
            self.precision = torch.float64
        in_rows = math.fsum(part.nbytes for part in rows.values() if part.inputs is not None)
        fixed = math.fsum(part.nbytes for part in rows.values() if part.inputs is None)
        return Footprint(counted_bytes / n_tokens, in_rows / n_tokens, fixed)

    def _require_layers(self) -> None:
        """Where parameters are sharded, their gradients are reduced over processes, not taken piece by piece."""
        if self.direct:
            raise CouplingError(
                f"the gradient of {self.direct[0]!r} cannot be taken piece by piece where parameters are sharded: only "
                "weights and biases of linear layers that are called can; select those, or use replicas"
            )

    def _differentiate(self, batch: Any, count: int) -> Tensor:
        self._count = count
        for tap in self._taps.values():
            tap.begin(count)
        log_probs = self.objective.log_probs(self.model, batch)
        if log_probs.shape != (count,):
            raise CouplingError(
                f"the objective gave log-probabilities of shape {tuple(log_probs.shape)} for {count} pieces"
            )
        if log_probs.requires_grad:
            log_probs.sum().backward()
        return log_probs.detach()

    def _freeze(self, trained: Any) -> None:
        """Gradients for these tensors alone; FSDP2 has planned which gradients it reduces."""
        if self.sharded:
            return
        chosen = {id(self.parameters[name]) for name in trained if self.parameters[name].is_floating_point()}
        for parameter in self._held:
            if parameter.requires_grad is not (id(parameter) in chosen):
                parameter.requires_grad_(id(parameter) in chosen)

    def _compare_sharded(self) -> None:
        unshard_guard(self.model)
        # A first forward pass may put new parameters in the place of the old.
        current = {canonical_name(name): parameter for name, parameter in self.model.named_parameters()}
        for name, tap in list(self._layers.items()):
            if current[name].grad is not None:
                self._compare(name, tap, current[name])
        self._require_layers()

    def _compare(self, name: str, tap: Tap, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = gather(parameter.grad), None
        with exact_products(gradient.device):
            told = _total(tap.gradient(name), tap.inputs_first)
            true = gradient.to(told.dtype)
            if self.sharded:  # reduced over processes with a factor that users may set
                told *= (true * told).sum() / told.square().sum().clamp(min=torch.finfo(told.dtype).tiny)
            low = gradient.dtype not in _ROUNDING or torch.is_autocast_enabled(gradient.device.type)
            tolerance = _LOW_PRECISION_ROUNDING if low else _ROUNDING[gradient.dtype]
            if (true - told).norm() > tolerance * true.norm():
                del self._layers[name]


class Tap:
    """Catches one linear layer's inputs and the gradients at its outputs, piece by piece.

    Args:
        name: Canonical name of the layer's weight.
        module: The layer.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        self.inputs_first = not isinstance(module, nn.Linear)
        self.readable = weight.is_floating_point()
        rows, columns = weight.shape
        self.widths = (rows, columns) if self.inputs_first else (columns, rows)  # (in, out)
        self.batch_first = True
        self.begin(1)

    def begin(self, count: int) -> None:
        """Forgets what was caught and expects so many pieces."""
        self.count = count
        self._caught: list[Rows] = []

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """A forward hook; where nothing before the layer needs a gradient, the graph begins at its output.

        Raises:
            CouplingError: The layer is split over processes.
            NotBatchedError: The first dimension is not that of the pieces.
        """
        if not torch.is_grad_enabled():
            return None  # no gradient would reach the weight either
        given = args[0] if args else next(iter(kwargs.values()))
        seen = given.shape[-1], output.shape[-1]
        if is_sharded(given) or (self.readable and seen != self.widths):
            raise CouplingError(
                f"the layer of {self.name} sees inputs and outputs of width {seen[0]} and {seen[1]} where its weight "
                f"is {self.widths[0]} to {self.widths[1]}; under tensor parallelism no process sees a layer whole: use "
                "FSDP2 or replicas"
            )
        self.widths = seen
        if given.shape[0] != self.count:
            self.batch_first = False
            if self.count > 1:
                raise NotBatchedError(f"the layer of {self.name} sees {given.shape[0]} rows of {self.count} pieces")
        if not output.requires_grad:
            # A leaf must not be written to in place, as the model may do with its output.
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(self._catch, given.detach(), given._version))
        return output

    def rows(self) -> Rows:
        """All that was caught: the gradient of the weight."""
        if not self._caught:
            weight = self.module._parameters["weight"]
            assert weight is not None
            dtype = weight.dtype if self.readable else torch.float32
            empty = [torch.zeros(self.count, 0, width, dtype=dtype, device=weight.device) for width in self.widths]
            return Rows(empty[1], empty[0])
        if len(self._caught) == 1:
            return self._caught[0]
        # One layer called several times: its gradient is the sum over calls.
        inputs = torch.cat([caught.inputs for caught in self._caught if caught.inputs is not None], dim=1)
        return Rows(torch.cat([caught.gradients for caught in self._caught], dim=1), inputs)

    def gradient(self, name: str) -> Rows:
        """The gradient of the weight, or of the bias, then of shape ``[M, d_out]``."""
        rows = self.rows()
        return rows if name == self.name else Rows(accurate(rows.gradients).sum(dim=1))

    def _catch(self, given: Tensor, version: int, gradient: Tensor) -> None:
        if given._version != version:
            raise CouplingError(f"the model writes over the input of the layer of {self.name} after its call")
        inputs = given.reshape(self.count, -1, self.widths[0])  # [M, T, d_in]
        self._caught.append(without_empty_rows(inputs, gradient.detach().reshape(self.count, -1, self.widths[1])))


def _total(rows: Rows, inputs_first: bool) -> Tensor:
    """The gradient of one piece in its tensor's shape."""
    b = accurate(rows.gradients[0])
    if rows.inputs is None:
        return b
    a = rows.inputs[0].to(b.dtype)
    return a.T @ b if inputs_first else b.T @ a


def _flat_gradient(name: str, parameter: nn.Parameter) -> Rows:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradient = gradient.to_dense() if gradient.layout is torch.sparse_coo else gradient
    return Rows(of_expert(name, gradient.detach()).reshape(1, -1))


@contextmanager
def _counted_activations(model: nn.Module) -> Iterator[Any]:
    """Bytes of what a graph keeps, parameters apart; a storage counts once."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters() if not is_sharded(parameter)}
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = local(tensor).untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: total
