"""Which weights an analysis sees: those that the optimizer moves, or those that something puts in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_goldy.analysis.result import Row
from lightning_goldy.core.architecture import HeadGates
from lightning_goldy.core.architecture.adapters import AdapterError, adapted_layers
from lightning_goldy.core.architecture.blocks import without_adapters
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import canonical_name
from lightning_goldy.core.sharding import Replicas, align, gather, is_sharded, local, scatter_like, unshard_guard
from lightning_goldy.core.space import ParameterSpace, known_parameters, plain_parameters
from lightning_goldy.core.vector import ParameterVector, reduce_tensors

Weights = Literal["training", "averaged", "replaced"]
"""``training``: as the optimizer left them; ``averaged``: of Lightning's weight averaging; ``replaced``: of others."""

# WeightAveraging came with Lightning 2.6.
_AVERAGING: tuple[type, ...] = tuple(
    kind
    for name in ("WeightAveraging", "StochasticWeightAveraging")
    if (kind := getattr(lightning_callbacks, name, None)) is not None
)
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
# Elements looked at at a time, on the CPU so few that they stay in its cache, and what their places are multiplied by.
_CACHED, _CHUNK, _PLACE = 1 << 16, 1 << 20, 0x9E3779B1
FROZEN_FILE = "frozen.safetensors"
"""What a golden snapshot calls the file of the frozen weights that adapters lie on."""
KEPT_FROZEN = 1 << 24
"""Elements of frozen weights below adapters that a base keeps without being asked to."""
# So many units of its last place may a weight's sum and square move by rounding, as where adapters are merged and taken
# out.
_ROUNDED = 2


def weights_mark(model: nn.Module) -> str:
    """A hash of this process's parameters and saved buffers, and after a ``/`` one of the closed heads.

    Args:
        model: Read where it is; one pass over its memory.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = weights_mark(layer)
        >>> with torch.no_grad():
        ...     layer.bias[0] += 1
        >>> before == weights_mark(layer), before.partition("/")[2] == weights_mark(layer).partition("/")[2]
        (False, True)
    """
    unshard_guard(model)
    gates = HeadGates.of(model)
    marks = (_hashed(_held(model)), _hashed({} if gates is None else {"closing": gates.closing}))
    return "/".join(marks)


def undefined_weights(model: nn.Module) -> str:
    """Which weights the training has left that are no numbers, in words; empty where all are finite. A collective.

    Args:
        model: What is trained of it is looked at, one pass over its memory.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> undefined_weights(layer)
        ''
        >>> _ = layer.bias.data.fill_(float("nan"))
        >>> undefined_weights(layer)
        'the weights of bias are not finite'
    """
    parts = {name: local(value.detach()) for name, value in model.named_parameters() if value.requires_grad}
    parts = {name: part for name, part in parts.items() if part.numel() and part.is_floating_point()}
    ends = [torch.stack(part.aminmax()).isfinite().all() for part in parts.values()]
    finite = torch.stack([end.to(ends[0].device) for end in ends]).tolist() if ends else []
    mine = next((canonical_name(name) for name, known in zip(parts, finite, strict=True) if not known), None)
    found = next((name for name in Replicas.world().gather_objects(mine) if name is not None), None)
    return "" if found is None else f"the weights of {found} are not finite"


def undefined_row(model: nn.Module) -> tuple[Row, dict[str, Any], dict[str, Any]] | None:
    """A row that says why nothing is measured, where the training has left weights that are no numbers.

    Such a training goes on, or ends, as it would without an analysis. A collective.

    Args:
        model: As of :func:`undefined_weights`.

    Returns:
        The row, no vectors and no histograms; None where all weights are finite.

    Example:
        >>> import warnings
        >>> layer = nn.Linear(2, 2)
        >>> undefined_row(layer) is None
        True
        >>> _ = layer.bias.data.fill_(float("nan"))
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     print(undefined_row(layer)[0].headline)
        undefined: the weights of bias are not finite
    """
    told = undefined_weights(model)
    if not told:
        return None
    rank_zero_warn(f"analyses are undefined from here on, and training goes on: {told}")
    return Row("", {}, {"undefined": told}, f"undefined: {told}"), {}, {}


def _held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that a checkpoint would hold, by canonical name."""
    tensors: dict[str, Tensor] = {canonical_name(name): value for name, value in module.named_parameters()}
    for prefix, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and name not in child._non_persistent_buffers_set:
                tensors[canonical_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return tensors


@torch.no_grad()
def _hashed(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    sums = [(name, _checksum(local(tensor))) for name, tensor in tensors.items()]
    for name, pair in sums:
        digest.update(f"{name}{pair.tolist()}".encode())
    return digest.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of the elements' bits, and one in which places count; integers that wrap around are exact everywhere."""
    flat = _bits(tensor)
    size = min(flat.numel(), _CACHED if flat.device.type == "cpu" else _CHUNK)
    total = torch.zeros(2, dtype=torch.int64, device=flat.device)
    places = torch.arange(size, device=flat.device) * _PLACE + 1
    for start in range(0, flat.numel(), size or 1):
        piece = flat[start : start + size].long()
        plain = piece.sum()
        # Those of the first piece, moved on by so many places.
        total += torch.stack([plain, (piece * places[: len(piece)]).sum() + plain * (start * _PLACE)])
    return total


def kind_of_weights(trainer: L.Trainer, *, trained: bool) -> Weights:
    """What a row calls its weights.

    Args:
        trainer: Its callbacks may average weights.
        trained: Whether they are as the optimizer left them.
    """
    if trained:
        return "training"
    averages = any(isinstance(callback, _AVERAGING) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return "averaged" if averages else "replaced"


@contextmanager
def weights_in(checkpoint: Mapping[str, Any], pl_module: nn.Module) -> Iterator[bool]:
    """Gives the module the weights of a checkpoint that is about to be written, for the length of a ``with`` block.

    A callback or the module may have put others into it than the module has, such as averages. What the checkpoint
    leaves out or holds in another form stays as it is. Sharded weights are compared one by one with what the checkpoint
    holds of them, in shards or whole on any of the processes; every process calls.

    Args:
        checkpoint: With its final ``state_dict``.
        pl_module: The LightningModule, to whose names it refers.

    Yields:
        Whether they differ from the module's own.
    """
    unshard_guard(pl_module)
    state = {
        canonical_name(name): value
        for name, value in (checkpoint.get("state_dict") or {}).items()
        if isinstance(value, Tensor)
    }
    held = _held(pl_module)
    fitting = {name: state[name] for name, own in held.items() if name in state and _fits(name, own, state[name])}
    other = {
        name: saved
        for name, saved in fitting.items()
        if not (is_sharded(held[name]) or is_sharded(saved) or _same(held[name], saved))
    }
    other |= _other_shards({name: own for name, own in held.items() if is_sharded(own)}, fitting)
    # A collective: the analysis inside is one of all ranks.
    differ = any(Replicas.world().gather_objects(bool(other)))
    before = {name: local(held[name]).clone() for name in other}
    try:
        _write(held, other)
        yield differ
    finally:
        _write(held, before)


def _fits(name: str, own: Tensor, saved: Tensor) -> bool:
    if saved.shape != own.shape:
        rank_zero_warn(
            f"the checkpoint holds {name} in shape {tuple(saved.shape)}, the module in {tuple(own.shape)}; the "
            "module's own is analysed"
        )
    return saved.shape == own.shape


def _other_shards(held: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of what is saved of sharded tensors with other values than they have; a collective.

    Args:
        held: The sharded tensors, of the same names in the same order on every process.
        saved: Whole, on some processes or all, or in shards.
    """
    if not held:
        return {}
    world = Replicas.world()
    holders = world.gather_objects({name: is_sharded(saved[name]) for name in held if name in saved})
    parts, differing = {}, set()
    for name, own in held.items():
        forms = [rank.get(name) for rank in holders]
        if all(forms):
            parts[name] = local(align(saved[name], own))
            same = _same(local(own), parts[name])
        else:
            # One tensor at a time; those that hold it compare.
            whole = gather(own) if False in forms else own
            same = name not in saved or is_sharded(saved[name]) or _same(whole, saved[name])
        if not same:
            differing.add(name)
    differing = set().union(*world.gather_objects(differing))
    for name in (name for name in held if name in differing and name not in parts):
        parts[name] = _scattered(held[name], saved.get(name), next(i for i, rank in enumerate(holders) if name in rank))
    return {name: parts[name] for name in held if name in differing}


def _scattered(own: Tensor, saved: Tensor | None, source: int) -> Tensor:
    """This process's part of a tensor that the process ``source`` holds whole; a collective."""
    device = local(own).device
    if saved is None or Replicas.world().rank != source:
        whole = torch.empty(own.shape, dtype=own.dtype, device=device)
    else:
        whole = saved.detach().to(device, own.dtype, copy=True)
    dist.broadcast(whole, source)
    return local(scatter_like(own.detach(), whole))


def _write(held: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    if values:
        # Inside autocast a low-precision copy of the old weight may be cached and would be used in its place.
        torch.clear_autocast_cache()
    with torch.no_grad():
        for name, value in values.items():
            local(held[name]).copy_(value)


def _same(own: Tensor, saved: Tensor) -> bool:
    own, saved = own.detach(), saved.detach()
    if own.data_ptr() == saved.data_ptr() and own.shape == saved.shape and own.dtype == saved.dtype:
        return True
    # A checkpoint in a lower precision holds the same weights, rounded.
    return own.shape == saved.shape and torch.equal(_bits(own.to(saved.device, saved.dtype)), _bits(saved))


@contextmanager
def adapters_apart(model: nn.Module) -> Iterator[list[str]]:
    """Takes merged adapters of PEFT out of the weights for the length of a ``with`` block.

    The forward of a merged layer does not use its adapters, so no loss would depend on what is trained. Afterwards the
    merged weights have the bits that they had.

    Args:
        model: The model.

    Yields:
        What to say of it; nothing where no adapter is merged.
    """
    merged: Any = [child for child in model.modules() if getattr(child, "merged_adapters", None)]
    merged = [child for child in merged if callable(getattr(child, "unmerge", None))]
    kept = [(child, list(child.merged_adapters), _held(child.get_base_layer())) for child in merged]
    before = [{name: local(tensor).clone() for name, tensor in held.items()} for _, _, held in kept]
    try:
        with torch.no_grad():
            for child in merged:
                child.unmerge()
        torch.clear_autocast_cache()
        yield [f"the adapters that are merged in {len(merged)} layers were taken apart"] if merged else []
    finally:
        for (child, adapters, held), values in zip(kept, before, strict=True):
            child.merged_adapters[:] = adapters
            _write(held, values)


@contextmanager
def as_compared(trainer: L.Trainer, callback: Any, model: nn.Module) -> Iterator[list[str]]:
    """Gives an analysis the weights that the model computes with under the names that they had, for a ``with`` block.

    Bases follow what has moved although it was frozen; merged adapters are taken apart; parameters that have come to
    be computed of others (pruning, weight norm) are plain.

    Args:
        trainer: Its callbacks may keep bases.
        callback: Whose analysis it is.
        model: Of the analysis.

    Yields:
        What to say of it.
    """
    notes: list[str] = []
    for keeper in trainer.callbacks:  # type: ignore[attr-defined]
        if callable(follow := getattr(keeper, "follow", None)):
            notes += follow(trainer, model, callback)
    changes = callback.name if callback.changes_training else ""
    with adapters_apart(model) as apart, plain_parameters(model, callback._trained, changes=changes) as plain:
        yield [*notes, *apart, *plain]


@dataclass
class Frozen:
    """What is not trained, as it was when a base was taken.

    Of weights that adapters lie on the merged weights are made. Who merges adapters into them and begins adapters anew
    (ReLoRA) moves the base of those.

    Args:
        sums: Sum and sum of squares of every frozen parameter and of every saved buffer of numbers, by canonical name.
        below: Those that adapters lie on.
        kept: Their values; None where they are too many to keep.
    """

    sums: dict[str, tuple[float, float]]
    below: tuple[str, ...]
    kept: BaseParameters | None = None

    @classmethod
    def of(cls, model: nn.Module, *, keep: bool | None = None) -> Frozen:
        """Looks at a model; all ranks call.

        Args:
            model: As a base of it is taken.
            keep: Whether to keep the weights that adapters lie on; None where they are few.

        Example:
            >>> layer = nn.Linear(2, 1).requires_grad_(False)
            >>> Frozen.of(layer).moved(layer)
            ((), ())
        """
        unshard_guard(model)
        held = _frozen_tensors(model)
        ids = {
            id(parameter)
            for layer in adapted_layers(model).values()
            if not getattr(layer, "merged_adapters", None)
            for parameter in without_adapters(layer).parameters()
        }
        below = {name: tensor for name, tensor in held.items() if id(tensor) in ids}
        few = sum(tensor.numel() for tensor in below.values()) <= KEPT_FROZEN
        kept = None
        if below and (few if keep is None else keep):
            kept = BaseParameters(ParameterVector.of(model, ParameterSpace.of_tensors(below)))
        return cls({name: _sums(tensor) for name, tensor in held.items()}, tuple(below), kept)

    def moved(self, model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What has other values by more than rounding, of what adapters lie on and of the rest; all ranks call.

        Weights that adapters are merged into for the time being are left out.
        """
        unshard_guard(model)
        present = _frozen_tensors(model)
        merged = {
            id(parameter)
            for layer in adapted_layers(model).values()
            if any(getattr(part, "merged_adapters", None) for part in layer.modules())
            for parameter in layer.parameters()
        }
        names = set()
        for name, (total, square) in self.sums.items():
            if name in present and id(present[name]) not in merged:
                now, unit = _sums(present[name]), _ROUNDED * torch.finfo(present[name].dtype).eps
                if abs(now[0] - total) > unit * square**0.5 or abs(now[1] - square) > unit * square:
                    names.add(name)
        names = set().union(*Replicas.world().gather_objects(names))
        return tuple(name for name in self.below if name in names), tuple(sorted(names.difference(self.below)))

    def follow(
        self,
        model: nn.Module,
        base: BaseParameters,
        grow: Callable[[ParameterVector], Any],
        *,
        merged: bool,
        who: str,
        source: Callable[[ParameterSpace], ParameterVector] | None = None,
    ) -> list[str]:
        """Has a base hold what adapters lie on as soon as it has moved; all ranks call.

        Args:
            model: As it is now.
            base: Which was taken with this.
            grow: Adds values to it.
            merged: Whether merged weights are asked for; else nothing that adapters lie on matters.
            who: Who asks, for the message.
            source: Reads values of the base from elsewhere.

        Returns:
            What to say of it.

        Raises:
            AdapterError: It has moved, and its base is not known.
        """
        below, others = self.moved(model)
        notes = []
        lacking = [name for name in self.below if name not in base.space] if below and merged else []
        if lacking:
            present = known_parameters(model)
            space = ParameterSpace.of_tensors({name: present[name] for name in lacking})
            if self.kept is not None:
                grow(ParameterVector(space, {n: v for n, v in self.kept.vector(model).items() if n in space}))
            elif source is not None:
                grow(source(space))
            else:
                raise AdapterError(
                    f"{who}: {_some(below)}, which adapters lie on, changed although frozen (adapters were merged into "
                    "it, as in ReLoRA?), so the change of merged weights cannot be told: GoldenSnapshot(frozen=True) "
                    "keeps such weights, and space='adapters' looks at the adapters alone"
                )
        if below and merged:
            notes.append(
                f"{_some(below)} changed although frozen, below adapters: the change is from the values at the start"
            )
        if others:
            notes.append(
                f"{_some(others)} changed although not trained: no part of the change, and the base has it as it is"
            )
        return notes


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not trained and saved buffers, as far as they are of numbers with a point."""
    held = {name: tensor for name, tensor in _held(model).items() if not tensor.requires_grad}
    return {name: tensor for name, tensor in held.items() if tensor.is_floating_point() and tensor.element_size() > 1}


def _sums(tensor: Tensor) -> tuple[float, float]:
    value = tensor.detach()
    return reduce_tensors([value], torch.sum)[0], reduce_tensors([value], lambda x: x @ x)[0]


def write_pages(trainer: L.Trainer) -> None:
    """Has the reports of a trainer written with what there is, before work that may not come to its end."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if callable(write := getattr(callback, "write_page", None)):
            write(trainer)


def tell_last(trainer: L.Trainer, listener: type) -> None:
    """Has a trainer tell its callbacks of every checkpoint and of the end when nobody else changes weights any more.

    Lightning's own hooks come in the order of the callbacks, and before those of the LightningModule; weights-only
    checkpoints have none for callbacks. The strategy comes last: it writes what the checkpoint holds by then, also when
    a callback fails.

    Args:
        trainer: Whose strategy is listened to, once.
        listener: Class of the callbacks with ``when_saved`` and ``when_finished``.
    """
    strategy: Any = trainer.strategy
    if getattr(strategy, "_goldy_tells", False):
        return
    strategy._goldy_tells = True
    save, end = strategy.save_checkpoint, strategy.on_train_end

    def callbacks() -> list[Any]:
        return [callback for callback in trainer.callbacks if isinstance(callback, listener)]  # type: ignore[attr-defined]

    def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **options: Any) -> None:
        failure: Exception | None = None
        try:
            for callback in callbacks():
                try:
                    callback.when_saved(trainer, trainer.lightning_module, checkpoint)
                except Exception as error:  # noqa: BLE001 - raised again once the file is written
                    failure = failure or error
        finally:
            save(checkpoint, *args, **options)
        if failure is not None:
            raise failure

    def on_train_end() -> None:
        for callback in callbacks():
            if "end" in callback.at:
                write_pages(trainer)
            callback.when_finished(trainer, trainer.lightning_module)
        end()

    strategy.save_checkpoint, strategy.on_train_end = save_checkpoint, on_train_end
