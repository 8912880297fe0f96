"""Masks: sets of parameter elements, with the operations of sets, and models in which such a set is zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_goldy.core.files import StoreError
from lightning_goldy.core.naming import block_of, require_choice
from lightning_goldy.core.selection import select_largest, true_positions
from lightning_goldy.core.sharding import gather, like, local, unshard_guard
from lightning_goldy.core.space import ParameterSpace, SpaceError
from lightning_goldy.core.store import load_vectors, read_header, require_boolean, save_vectors
from lightning_goldy.core.vector import ParameterVector, random_direction

Scope = Literal["tensor", "global"]


def check_scope(scope: str) -> None:
    """Checks that a share is one of each ``tensor``, or of all elements together (``global``).

    Raises:
        ValueError: The scope is unknown.
    """
    require_choice("scope", scope, get_args(Scope))


def jaccard(first: ParameterVector, second: ParameterVector) -> float:
    """Intersection over union of two masks, a fraction; 1 when both are empty.

    Args:
        first: Boolean, plain or sharded.
        second: Of the same space.

    Raises:
        SpaceError: The masks belong to different spaces.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(2, 1, bias=False))
        >>> a, b = (ParameterVector(space, {"weight": torch.tensor([row])}) for row in ([True, False], [True, True]))
        >>> jaccard(a, b)
        0.5
    """
    either = sum(first.zip_with(second, torch.logical_or).count())
    return sum(first.zip_with(second, torch.logical_and).count()) / either if either else 1.0


@dataclass(frozen=True)
class BlockDensity:
    """What a mask holds of one block.

    Args:
        block: Its name, or the part of the model outside all blocks.
        count: Elements in the mask.
        numel: Elements in all.
    """

    block: str
    count: int
    numel: int

    @property
    def density(self) -> float:
        """Share of the block's elements, a fraction; 0 for an empty block."""
        return self.count / self.numel if self.numel else 0.0


class ParameterMask(ParameterVector):
    """A set of parameter elements: one boolean tensor per parameter of a space.

    ``&``, ``|``, ``^``, ``~`` and ``-`` are those of sets; two masks of different spaces raise. All of it works on
    plain and on sharded tensors; counts are global, so every process must call.

    Args:
        space: The parameters that the tensors belong to.
        tensors: Name to boolean tensor, in the parameter's own layout (plain or DTensor).

    Raises:
        SpaceError: A name is missing or unknown, or a shape differs.
        ValueError: A tensor is not boolean.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(2, 2, bias=False))
        >>> top = ParameterMask(space, {"weight": torch.tensor([[True, True], [False, False]])})
        >>> left = ParameterMask(space, {"weight": torch.tensor([[True, False], [True, False]])})
        >>> (top & left).total, (top | left).density, (top - left).indices()["weight"].tolist()
        (1, 0.75, [1])
        >>> top.chance_corrected_overlap(left)
        0.0
    """

    def __init__(self, space: ParameterSpace, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(space, tensors)
        for name, tensor in self.items():
            require_boolean(tensor, name)

    @classmethod
    def of_vector(cls, vector: ParameterVector) -> ParameterMask:
        """A boolean vector, such as ``top_k`` and ``load_vectors`` give, as a mask; without copies."""
        return cls(vector.space, dict(vector))

    @classmethod
    def random(
        cls, space: ParameterSpace, counts: Mapping[str, int] | float, *, seed: int = 0, module: nn.Module | None = None
    ) -> ParameterMask:
        """Elements drawn uniformly, without replacement, from each tensor.

        Args:
            space: The parameters.
            counts: How many of each tensor, or one percentage of every tensor, in (0, 100].
            seed: The mask is a function of the seed, the names and the counts, whatever the number of processes.
            module: When given, the mask takes the layout of its parameters.

        Raises:
            ValueError: A count is not between 0 and the tensor's size, or a percentage out of range.

        Example:
            >>> space = ParameterSpace.of(nn.Linear(10, 10))
            >>> ParameterMask.random(space, {"weight": 7, "bias": 0}, seed=1).count()
            [7, 0]
        """
        direction = random_direction(space, seed, module=module)
        if not isinstance(counts, Mapping):
            return cls.of_vector(direction.top_k(counts))
        tensors = {}
        for name, scores in direction.items():
            count, numel = counts[name], scores.numel()
            if not 0 <= count <= numel:
                raise ValueError(f"{name}: a count lies between 0 and the {numel} elements; got {count}")
            chosen = select_largest([scores], count)[0] if count else torch.zeros_like(local(scores), dtype=torch.bool)
            tensors[name] = like(scores, chosen)
        return cls(space, tensors)

    @classmethod
    def from_indices(cls, space: ParameterSpace, indices: Mapping[str, Tensor]) -> ParameterMask:
        """The mask of flat row-major indices; a tensor that is not named holds none.

        Raises:
            SpaceError: The space lacks a name.
            ValueError: Indices are no integers, or lie outside their tensor.
        """
        for name in indices:
            space.index(name)
        tensors = {}
        for name, shape in zip(space.names, space.shapes, strict=True):
            mask = torch.zeros(math.prod(shape), dtype=torch.bool)
            found = torch.as_tensor(indices.get(name, torch.empty(0, dtype=torch.long))).cpu()
            if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
                raise ValueError(f"{name}: indices are integers; got {found.dtype}")
            outside = found[(found < 0) | (found >= mask.numel())]
            if outside.numel():
                raise ValueError(f"{name}: index {int(outside.flatten()[0])} lies outside the {mask.numel()} elements")
            mask[found.long().flatten()] = True
            tensors[name] = mask.view(shape)
        return cls(space, tensors)

    @classmethod
    def from_dense(cls, space: ParameterSpace, tensors: Mapping[str, Tensor]) -> ParameterMask:
        """The mask of whole or sparse boolean tensors; a tensor that is not named holds none.

        Raises:
            SpaceError: The space lacks a name, or a shape differs.
            ValueError: A tensor is not boolean.
        """
        for name, tensor in tensors.items():
            space.index(name)
            require_boolean(tensor, name)
        empty = {name: torch.zeros(space.shape(name), dtype=torch.bool) for name in space if name not in tensors}
        return cls(space, {**{name: tensor.to_dense() for name, tensor in tensors.items()}, **empty})

    @classmethod
    def load(cls, path: str | Path, module: nn.Module | None = None) -> ParameterMask:
        """Reads a mask file.

        Args:
            path: What :meth:`save` or a callback wrote.
            module: When given, the file is checked against it, and each tensor takes the layout of its parameter.

        Raises:
            StoreError: The file is missing, truncated, no mask, or of another model.
        """
        header = read_header(path)
        if header.kind != "mask":
            raise StoreError(f"{path}: holds {header.kind}, not a mask")
        return cls.of_vector(load_vectors(path, module)[0])

    def save(self, path: str | Path, *, model: nn.Module | str, step: int | None = None, write: bool = True) -> Path:
        """Writes a mask file: a bit per element, or the indices where fewer than 1 in 32 are set.

        Args:
            path: Target file.
            model: The module that the mask belongs to, or its class name.
            step: Optimizer steps at which it was taken.
            write: Whether this process writes; with shards every process must call.
        """
        return save_vectors(path, self, kind="mask", model=model, step=step, write=write)

    def __and__(self, other: ParameterVector) -> ParameterMask:
        return self._with(other, torch.logical_and)

    def __or__(self, other: ParameterVector) -> ParameterMask:
        return self._with(other, torch.logical_or)

    def __xor__(self, other: ParameterVector) -> ParameterMask:
        return self._with(other, torch.logical_xor)

    def __sub__(self, other: ParameterVector) -> ParameterMask:
        return self._with(other, lambda mine, theirs: torch.logical_and(mine, torch.logical_not(theirs)))

    def __invert__(self) -> ParameterMask:
        return ParameterMask.of_vector(self.map(torch.logical_not))

    def _with(self, other: ParameterVector, function: Callable[[Tensor, Tensor], Tensor]) -> ParameterMask:
        return ParameterMask.of_vector(self.zip_with(other, function))

    @property
    def total(self) -> int:
        """Number of elements in the mask."""
        return sum(self.count())

    @property
    def density(self) -> float:
        """Share of the space's elements, a fraction."""
        return self.total / self.space.numel

    def block_summary(self) -> tuple[BlockDensity, ...]:
        """Counts by block, in the space's order."""
        counts: dict[str, list[int]] = {}
        for name, shape, count in zip(self.space.names, self.space.shapes, self.count(), strict=True):
            held = counts.setdefault(block_of(name), [0, 0])
            held[0] += count
            held[1] += math.prod(shape)
        return tuple(BlockDensity(block, count, numel) for block, (count, numel) in counts.items())

    jaccard = jaccard
    iou = jaccard

    def chance_overlap(self, other: ParameterVector, *, scope: Scope = "tensor") -> float:
        r"""Size of the intersection expected of two random masks of the same sizes, in elements.

        .. math::
            E = \sum_t \frac{a_t \, b_t}{n_t}

        over tensors t (``scope="tensor"``), or with all of them as one (``global``).

        Raises:
            SpaceError: The masks belong to different spaces.
            ValueError: The scope is unknown.
        """
        self.space.require_same(other.space)
        return math.fsum(a * b / n for a, b, n in self._sizes(other, scope) if n)

    def chance_corrected_overlap(self, other: ParameterVector, *, scope: Scope = "tensor") -> float | None:
        r"""How much more two masks share than chance, against the most that their sizes allow.

        .. math::
            \frac{|A \cap B| - E}{\sum_t \min(a_t, b_t) - E}

        0 at chance, 1 when one holds the other, negative when they avoid each other; None when sizes leave no choice,
        as with a full or an empty mask.

        Args:
            other: A mask of the same space.
            scope: Whether chance keeps the number of elements of each ``tensor``, or only of all (``global``).

        Raises:
            SpaceError: The masks belong to different spaces.
            ValueError: The scope is unknown.
        """
        expected = self.chance_overlap(other, scope=scope)
        room = math.fsum([*(min(a, b) for a, b, _ in self._sizes(other, scope)), -expected])
        # What a full mask expects is what it gets, but for the rounding of the division.
        return ((self & other).total - expected) / room if room > 1e-9 * max(1.0, expected) else None

    def _sizes(self, other: ParameterVector, scope: Scope) -> list[tuple[int, int, int]]:
        check_scope(scope)
        sizes = [*zip(self.count(), other.count(), map(math.prod, self.space.shapes), strict=True)]
        if scope == "tensor":
            return sizes
        first, second, numel = (sum(column) for column in zip(*sizes, strict=True))
        return [(first, second, numel)]

    def indices(self) -> dict[str, Tensor]:
        """Flat row-major indices of each tensor's elements, ascending int64 on the CPU."""
        return {name: gather(tensor).cpu().reshape(-1).nonzero().flatten() for name, tensor in self.items()}

    def to_dense(self) -> dict[str, Tensor]:
        """Whole boolean tensors on the CPU, by name."""
        return {name: gather(tensor).cpu() for name, tensor in self.items()}

    def to_sparse_coo(self) -> dict[str, Tensor]:
        """Whole boolean tensors in torch's coalesced COO layout on the CPU, for interchange."""
        return {name: tensor.to_sparse_coo().coalesce() for name, tensor in self.to_dense().items()}


# Where fewer than 1 in so many elements are marked, their positions fill less than a bit for every element.
_FEW = 32


def require_masks(masks: Mapping[str, ParameterVector], space: ParameterSpace) -> None:
    """Refuses masks by name that belong to no part of a space, before anything is measured with them.

    Args:
        masks: By the name that a result tells them by.
        space: Of what is measured.

    Raises:
        ValueError: One is no mask, or they have no names.
        SpaceError: One has other parameters.

    Example:
        >>> require_masks({"golden": 3}, ParameterSpace.of(nn.Linear(2, 1)))
        Traceback (most recent call last):
        ValueError: the mask 'golden' is a ParameterMask or a boolean vector; got int
    """
    if not isinstance(masks, Mapping):
        raise ValueError(f"masks is a mapping of names to masks; got {type(masks).__name__}")
    for label, mask in masks.items():
        if not isinstance(mask, ParameterVector):
            raise ValueError(f"the mask {label!r} is a ParameterMask or a boolean vector; got {type(mask).__name__}")
        try:
            space.subspace(ParameterMask.of_vector(mask).space.names).require_same(mask.space)
        except (SpaceError, ValueError) as error:
            raise type(error)(f"the mask {label!r}: {error}") from error


class Positions(NamedTuple):
    """Marked elements of one tensor, where they are few enough to be listed.

    Args:
        flat: Their flat positions, ascending.
        shape: Of the tensor.
    """

    flat: Tensor
    shape: torch.Size

    def dense(self) -> Tensor:
        """The boolean tensor.

        Example:
            >>> Positions(torch.tensor([0, 3]), torch.Size([2, 2])).dense().tolist()
            [[True, False], [False, True]]
        """
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.flat.device)
        mask[self.flat] = True
        return mask.view(self.shape)


def marked(parts: Sequence[Tensor], shape: torch.Size) -> Tensor | Positions:
    """One tensor of a mask from flat positions in parts that share none: as positions where they are few.

    Example:
        >>> marked([torch.tensor([9]), torch.tensor([2])], torch.Size([99])).flat.tolist()
        [2, 9]
        >>> marked([torch.tensor([1])], torch.Size([2])).tolist()
        [False, True]
    """
    flat = torch.cat(list(parts))
    if _FEW * len(flat) < math.prod(shape):
        return Positions(flat.sort().values, shape)
    return Positions(flat, shape).dense()


class PackedMask(Mapping[str, Tensor]):
    """Boolean tensors by name that fill a bit per element, or their positions where few are marked.

    Each is unpacked when it is asked for, so that a search can hold many masks and only one tensor of them in full. On
    an accelerator those with many marks stay as they are.

    Args:
        parts: Name and boolean tensor, or positions of few elements, one after the other; none is held.

    Example:
        >>> packed = PackedMask([("w", torch.tensor([[True, False], [False, True]]))])
        >>> packed["w"].tolist(), packed.count("w")
        ([[True, False], [False, True]], 2)
    """

    def __init__(self, parts: Iterable[tuple[str, Tensor | Positions]]) -> None:
        self._parts: dict[str, tuple[Tensor, torch.Size, torch.device, int]] = {}
        self._bits: set[str] = set()
        self._positions: set[str] = set()
        for name, part in parts:
            self._parts[name] = self._packed(name, part)

    def _packed(self, name: str, part: Tensor | Positions) -> tuple[Tensor, torch.Size, torch.device, int]:
        if isinstance(part, Positions):
            if _FEW * len(part.flat) < math.prod(part.shape):
                return self._listed(name, part)
            part = part.dense()
        count = int(np.count_nonzero(part.numpy()) if part.device.type == "cpu" else part.count_nonzero())
        if _FEW * count < part.numel():
            return self._listed(name, Positions(flat_positions({name: part}, name), part.shape))
        if part.device.type != "cpu":
            return part, part.shape, part.device, count
        self._bits.add(name)
        return torch.from_numpy(np.packbits(part.reshape(-1).numpy())), part.shape, part.device, count

    def _listed(self, name: str, part: Positions) -> tuple[Tensor, torch.Size, torch.device, int]:
        self._positions.add(name)
        packed = part.flat.int() if math.prod(part.shape) < 1 << 31 else part.flat
        return packed, part.shape, packed.device, len(packed)

    def __getitem__(self, name: str) -> Tensor:
        packed, shape, device, _ = self._parts[name]
        if name in self._bits:
            return torch.from_numpy(np.unpackbits(packed.numpy(), count=math.prod(shape)).view(np.bool_)).view(shape)
        if name in self._positions:
            flat = torch.zeros(math.prod(shape), dtype=torch.bool, device=device)
            flat[packed.long()] = True
            return flat.view(shape)
        return packed

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def count(self, name: str) -> int:
        """Marked elements of one tensor."""
        return self._parts[name][3]

    def replaced(self, parts: Mapping[str, Tensor] | Iterable[tuple[str, Tensor | Positions]]) -> PackedMask:
        """The mask with other tensors in the place of those of these names; all others are shared.

        Args:
            parts: Name to boolean tensor, or one pair (also of positions) after the other, of which none is held.

        Example:
            >>> packed = PackedMask([("a", torch.tensor([True])), ("b", torch.tensor([True, False]))])
            >>> other = packed.replaced({"b": torch.tensor([False, True])})
            >>> list(other), other["b"].tolist(), packed["b"].tolist()
            (['a', 'b'], [False, True], [True, False])
        """
        other, packed = PackedMask(()), PackedMask(parts.items() if isinstance(parts, Mapping) else parts)
        other._parts = {**self._parts, **packed._parts}
        other._bits = (self._bits - packed.keys()) | packed._bits
        other._positions = (self._positions - packed.keys()) | packed._positions
        return other

    def shares(self, other: PackedMask, name: str) -> bool:
        """Whether both hold the same tensor of that name, not a copy."""
        return self._parts[name][0] is other._parts[name][0]

    def index(self, name: str) -> Tensor:
        """What picks the marked elements: their flat positions where they are few, else the boolean tensor."""
        return self._parts[name][0].long() if name in self._positions else self[name]


def _picked(part: Tensor, mask: PackedMask, name: str) -> tuple[Tensor, Tensor]:
    """A view of a tensor and what picks its marked elements there."""
    index = mask.index(name)
    if index.dtype == torch.bool:
        return part, index
    return (part.view(-1), index) if part.is_contiguous() else (part, mask[name])


def flat_positions(mask: Mapping[str, Tensor], name: str) -> Tensor:
    """Flat positions of the marked elements of one tensor of a mask, ascending, int64.

    Example:
        >>> flat_positions({"w": torch.tensor([[True, False], [False, True]])}, "w").tolist()
        [0, 3]
    """
    if isinstance(mask, PackedMask) and (index := mask.index(name)).dtype != torch.bool:
        return index
    flat = mask[name].reshape(-1)
    return torch.from_numpy(true_positions(flat.numpy())) if flat.device.type == "cpu" else flat.nonzero().flatten()


class MaskedModel:
    """Sets masked elements to zero in place, and copies the values back at the end of the ``with`` block.

    Only the values of masked elements are kept meanwhile.

    Args:
        model: Its parameters are changed.
        space: Those that masks are of.

    Example:
        >>> linear = nn.Linear(2, 1, bias=False)
        >>> before = linear.weight.detach().clone()
        >>> with MaskedModel(linear, ParameterSpace.of(linear)) as masked:
        ...     masked.zero({"weight": torch.tensor([[True, False]])})
        ...     zeroed = linear.weight.tolist()
        >>> zeroed == [[0.0, before[0, 1].item()]], torch.equal(linear.weight, before)
        (True, True)
    """

    def __init__(self, model: nn.Module, space: ParameterSpace) -> None:
        self.model, self.space = model, space
        self.parameters = space.resolve(model)
        # By tensor the mask that is in force and the values under it.
        self._kept: dict[str, tuple[PackedMask, Tensor]] = {}

    @torch.no_grad()
    def zero(self, mask: Mapping[str, Tensor] | None) -> None:
        """Sets to zero what the mask (this process's part of each tensor) marks, and nothing else; None for nothing."""
        unshard_guard(self.model)
        wanted = mask if mask is None or isinstance(mask, PackedMask) else PackedMask(mask.items())
        for name, parameter in self.parameters.items():
            part = local(parameter)
            if wanted is not None and name in self._kept and wanted.shares(self._kept[name][0], name):
                continue
            self._restore(name, part)
            if wanted is None:
                self._kept.pop(name, None)
                continue
            target, index = _picked(part, wanted, name)
            # Kept before they are zeroed, so that an interruption between the two loses nothing.
            self._kept[name] = wanted, target[index]
            target[index] = 0
        # Inside autocast a low-precision copy of the old weight may be cached and would be used in its place.
        torch.clear_autocast_cache()

    def value(self, name: str) -> Tensor:
        """A parameter as it was, this process's part; a copy where elements of it are zero at present."""
        part = local(self.parameters[name])
        if name not in self._kept:
            return part
        whole = part.clone()
        self._restore(name, whole)
        return whole

    def multiply_(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor (this process's part) times the parameter as it was, in its place; the parameter is not copied."""
        if name not in self._kept:
            return tensor.mul_(local(self.parameters[name]))
        mask, values = self._kept[name]
        target, index = _picked(tensor, mask, name)
        inside = target[index] * values
        tensor.mul_(local(self.parameters[name]))
        target[index] = inside
        return tensor

    def _restore(self, name: str, part: Tensor) -> None:
        if name in self._kept:
            mask, values = self._kept[name]
            target, index = _picked(part, mask, name)
            target[index] = values

    def __enter__(self) -> MaskedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.zero(None)
