"""What can carry a change: the strongest elements, and units as a whole (heads, MLP neurons, token rows, the rest)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import interval_of, resampled
from lightning_goldy.analysis.attribution.path import ChangePath
from lightning_goldy.analysis.result import Row
from lightning_goldy.core.architecture import Block, HeadProjection, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.architecture.adapters import merged_name
from lightning_goldy.core.architecture.families import is_projection, projection_width
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import block_of, canonical_name, kind_of
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import gather, like, local, local_box, scatter_like, sum_over_shards
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector, random_direction, reduce_tensors

if TYPE_CHECKING:
    from lightning_goldy.analysis.attribution.attribution import ChangeAttributionResult

UnitKind = Literal["head", "key_value", "neuron", "row", "rest"]
Pieces = Literal["elements", "units", "tensors", "blocks"]

# Units of a group that a row names.
_TOP = 20

Margins = Mapping[str, tuple[Tensor, ...]]
"""Per parameter one vector for each of its dimensions: the sums over all others, float64, on the CPU."""


@dataclass(frozen=True)
class UnitPart:
    """Where the units of a group lie in one parameter.

    Unit u has ``length`` indices from ``offset + u // run * stride + u % run * length``.

    Args:
        name: Canonical name of the parameter.
        dim: The dimension that the units divide.
        offset: Where unit 0 begins.
        stride: Indices from one unit, or one run of units, to the next.
        length: Indices of one unit.
        run: Units that lie side by side before the next stride.
    """

    name: str
    dim: int
    offset: int
    stride: int
    length: int
    run: int = 1

    def places(self, count: int) -> Tensor:
        """Indices along the dimension, shape ``[count, length]``."""
        units = torch.arange(count)[:, None]
        starts = self.offset + units // self.run * self.stride + units % self.run * self.length
        return starts + torch.arange(self.length)


@dataclass(frozen=True)
class UnitGroup:
    """Units of one kind at one place, numbered from 0.

    Args:
        kind: What they are.
        place: The block, or the parameter of rows and of the rest.
        count: How many there are.
        parts: Where they lie; together all that belongs to them.

    Example:
        >>> group = UnitGroup("row", "embed.weight", 3, (UnitPart("embed.weight", 0, 0, 1, 1),))
        >>> group.sums({"embed.weight": (torch.tensor([1.0, 2.0, 4.0]), torch.tensor([7.0]))}).tolist()
        [1.0, 2.0, 4.0]
    """

    kind: UnitKind
    place: str
    count: int
    parts: tuple[UnitPart, ...]

    def sums(self, margins: Margins) -> Tensor:
        """What each unit holds of the margins' tensors, shape ``[count]``, float64."""
        return sum(
            (margins[part.name][part.dim][part.places(self.count)].sum(1) for part in self.parts),
            torch.zeros(self.count, dtype=torch.float64),
        )

    def size(self, space: ParameterSpace) -> int:
        """Elements of one unit."""
        shapes = ((space.shape(part.name), part) for part in self.parts)
        return sum(math.prod(shape) // shape[part.dim] * part.length for shape, part in shapes)


def model_units(model: nn.Module, space: ParameterSpace) -> tuple[UnitGroup, ...]:
    """Every element of a space in exactly one unit.

    A head has its slices of the query and the output projection, a key/value group those of keys and values, a neuron
    its rows of the projections into the MLP and its column of the one out of it, a row is that of one token in an
    embedding or an unembedding. What belongs to none of these (norms, shared biases, experts, parts that could not be
    told apart) is of ``rest``, a unit for each parameter.

    Args:
        model: The model.
        space: Of its parameters.

    Returns:
        The groups, in order of depth.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> units = model_units(model, ParameterSpace.of(model))
        >>> [(group.kind, group.count) for group in units if group.kind != "rest"]
        [('head', 2), ('key_value', 2), ('neuron', 32), ('row', 11), ('row', 16)]
    """
    groups: list[UnitGroup] = []
    taken: set[tuple[str, int]] = set()
    for block in _described(model):
        for group in (*_heads(block, space), *_neurons(model, block)):
            # A space of merged weights has the names that they have without adapters.
            told = [
                replace(part, name=part.name if part.name in space else merged_name(part.name)) for part in group.parts
            ]
            parts = tuple(part for part in told if part.name in space)
            if parts:
                place = merged_name(f"{group.place}.").removesuffix(".")
                groups.append(UnitGroup(group.kind, place, group.count, parts))
                taken.update((part.name, part.dim) for part in parts)
    divided = {name for name, _ in taken}
    for name, shape in zip(space.names, space.shapes, strict=True):
        if name in divided:
            groups.extend(_remainder(name, shape, [group for group in groups if group.kind != "rest"]))
        elif kind_of(name) in ("embedding", "head") and len(shape) == 2:
            groups.append(UnitGroup("row", name, shape[0], (UnitPart(name, 0, 0, 1, 1),)))
        else:
            groups.append(UnitGroup("rest", name, 1, (UnitPart(name, 0, 0, 1, shape[0] if shape else 1),)))
    return tuple(groups)


def unit_mask(
    space: ParameterSpace, groups: Sequence[UnitGroup], chosen: Iterable[Tensor | Sequence[bool]]
) -> ParameterMask:
    """The mask of some units.

    Args:
        space: The parameters that the groups are of.
        groups: The groups.
        chosen: For each group which of its units, booleans of shape ``[count]``.

    Example:
        >>> layer = nn.Embedding(3, 2)
        >>> space = ParameterSpace.of(layer)
        >>> groups = (UnitGroup("row", "weight", 3, (UnitPart("weight", 0, 0, 1, 1),)),)
        >>> unit_mask(space, groups, [[True, False, True]])["weight"].tolist()
        [[True, True], [False, False], [True, True]]
    """
    masks = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in zip(space.names, space.shapes, strict=True)}
    for group, flags in zip(groups, chosen, strict=True):
        wanted = torch.as_tensor(flags, dtype=torch.bool)
        for part in group.parts if bool(wanted.any()) else ():
            mask = masks[part.name]
            if mask.ndim:
                mask.index_fill_(part.dim, part.places(group.count)[wanted].flatten(), True)
            else:
                mask.fill_(True)
    return ParameterMask(space, masks)


def margins_of(tensor: Tensor) -> tuple[Tensor, ...]:
    """The sums of a whole tensor over all dimensions but one, for each; float64, on the CPU.

    Example:
        >>> [margin.tolist() for margin in margins_of(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))]
        [[3.0, 7.0], [4.0, 6.0]]
    """
    if not tensor.ndim:
        return (tensor.detach().double().reshape(1).cpu(),)
    dims = range(tensor.ndim)
    return tuple(
        tensor.detach().sum([other for other in dims if other != dim], dtype=torch.float64).cpu()
        if tensor.ndim > 1
        else tensor.detach().double().cpu()
        for dim in dims
    )


class HeadSums:
    """What heads and key/value groups contribute, of each passage, summed while a gradient is at hand.

    Args:
        groups: Of all units.
        parameters: That move, by canonical name.
        n_passages: How many.
        device: Where the gradients are.
    """

    def __init__(
        self, groups: Sequence[UnitGroup], parameters: Mapping[str, nn.Parameter], n_passages: int, device: torch.device
    ) -> None:
        self.groups = {place: group for place, group in enumerate(groups) if group.kind in ("head", "key_value")}
        self.parameters = parameters
        parts = [(group, part) for group in self.groups.values() for part in group.parts]
        self._dims = {part.name: part.dim for _, part in parts}
        ends = itertools.accumulate(parameters[name].shape[dim] for name, dim in self._dims.items())
        self._begins = dict(zip(self._dims, itertools.chain([0], ends), strict=False))
        lengths = [parameters[name].shape[dim] for name, dim in self._dims.items()]
        self._margins = torch.zeros(sum(lengths), dtype=torch.float64, device=device)
        """Of the present passage the sums at each index of the dimension that heads divide, of all parameters."""
        self._references = [parameters[part.name] for group, part in parts for _ in range(group.count)]
        owners = torch.full((sum(lengths),), len(self._references))
        first = 0
        for group, part in parts:
            places = self._begins[part.name] + part.places(group.count)
            owners[places] = torch.arange(first, first + group.count)[:, None].expand_as(places)
            first += group.count
        self._owners = owners.to(device)
        """Of each of these indices the column that it belongs to; behind the last where it belongs to none."""
        self._columns = torch.zeros(n_passages, len(self._references), dtype=torch.float64)
        self.found = self._columns
        """What all processes found, a column for each unit of each part."""

    def __contains__(self, name: str) -> bool:
        """Whether a parameter has parts of heads."""
        return name in self._dims

    def clear(self) -> None:
        """Forgets all passages."""
        self._columns.zero_()

    def take(self, name: str, piece: slice, gradient: Tensor, change: Tensor) -> Tensor:
        """Adds gradient times change of whole rows of a parameter, flat; returns the sum of all, a scalar."""
        (_, *inner), offsets = local_box(self.parameters[name])
        dim, row = self._dims[name], math.prod(inner)
        products = (gradient * change).view(-1, *inner)
        found = products.sum([other for other in range(products.ndim) if other != dim] or None) if inner else products
        start = self._begins[name] + offsets[dim] + (piece.start // row if dim == 0 else 0)
        self._margins[start : start + len(found)] += found
        return found.sum()

    def keep(self, index: int, scale: float) -> None:
        """Adds what was taken to a passage, so many times."""
        sums = self._margins.new_zeros(len(self._references) + 1).index_add_(0, self._owners, self._margins)
        self._columns[index] += scale * sums[:-1].cpu()
        self._margins.zero_()

    def over_shards(self) -> Tensor:
        """The columns of this process's passages, of all shards."""
        columns = self._columns.to(self._margins.device).T.unbind()
        summed = sum_over_shards(columns, self._references)
        return torch.stack(summed, dim=1).cpu() if summed else self._columns

    def of(self, place: int) -> dict[str, Tensor]:
        """Of the group at a place what its units contribute in each passage, as ``passages``; of others nothing."""
        if place not in self.groups:
            return {}
        before = (group for number, group in self.groups.items() if number < place)
        first, group = sum(one.count * len(one.parts) for one in before), self.groups[place]
        columns = self.found[:, first : first + group.count * len(group.parts)]
        return {"passages": columns.unflatten(1, (len(group.parts), group.count)).sum(1)}


def intervals_over(sums: Tensor, weights: Tensor) -> list[tuple[float, float] | tuple[None, None]]:
    """95 % percentile bootstrap intervals, over passages, of sums over them; nothing of a single one.

    Args:
        sums: Of each passage and place, shape ``[passages, places]``.
        weights: What each passage counts for, shape ``[passages]``.

    Example:
        >>> intervals_over(torch.tensor([[1.0, 0.5], [1.0, 0.5]]).double(), torch.tensor([0.5, 0.5]).double())
        [(2.0, 2.0), (1.0, 1.0)]
    """
    if len(weights) < 2:
        return [(None, None)] * sums.shape[1]
    counts = resampled(len(weights))
    drawn = (counts @ sums) / (counts @ weights)[:, None]  # [resamples, places]
    return [interval_of(column) for column in drawn.T]


def _described(model: nn.Module) -> tuple[Block, ...]:
    try:
        return describe_architecture(model).blocks
    except UnsupportedArchitectureError:
        return ()


def _heads(block: Block, space: ParameterSpace) -> Iterator[UnitGroup]:
    try:
        projections: dict[UnitKind, list[HeadProjection]] = {"head": [block.output], "key_value": []}
        if block.query_key_value is not None:
            projections["head"].insert(0, block.query)
            projections["key_value"] = [block.key, block.value]
    except UnsupportedArchitectureError:
        return
    for kind, members in projections.items():
        parts = tuple(part for projection in members for part in _head_parts(projection, space))
        if parts:
            yield UnitGroup(kind, block.name, members[0].layout.n_heads, parts)


def _head_parts(projection: HeadProjection, space: ParameterSpace) -> Iterator[UnitPart]:
    layout = projection.layout
    for _, name, dim in projection.axes:
        # Heads divide a merged weight whatever the form of its adapter, as DoRA.
        if not projection.obstacle or (name not in space and merged_name(name) in space):
            yield UnitPart(name, dim, layout.offset, layout.stride or layout.head_dim, layout.head_dim, layout.run)


def _neurons(model: nn.Module, block: Block) -> Iterator[UnitGroup]:
    """The inner width of an MLP with one output projection; of experts and what could not be told, none."""
    try:
        writers = block.mlp_writers if block.has_mlp else ()
    except UnsupportedArchitectureError:
        return
    if len(writers) != 1 or not is_projection(writers[0].module):
        return
    writer = writers[0]
    width = projection_width(writer.module, "in")
    names = {id(module): canonical_name(name) for name, module in model.named_modules()}
    writing = set(writer.module.modules())
    parts = [UnitPart(f"{writer.name}.weight", _side(writer.module, "in"), 0, 1, 1)]
    for part in block.mlp_parts:
        for module in part.module.modules():
            if module in writing or not is_projection(module) or hasattr(module, "base_layer"):
                continue
            out = projection_width(module, "out")
            # Gate and up projections are often one module, a half each.
            for half in range(out // width) if out in (width, 2 * width) else ():
                for parameter, dim in (("weight", _side(module, "out")), ("bias", 0)):
                    if module._parameters.get(parameter) is not None:
                        parts.append(UnitPart(f"{names[id(module)]}.{parameter}", dim, half * width, 1, 1))
    yield UnitGroup("neuron", block.name, width, tuple(parts))


def _side(module: nn.Module, side: Literal["in", "out"]) -> int:
    """Linear keeps its weight as out x in, Conv1D as in x out."""
    base = getattr(module, "base_layer", module)
    return int((side == "in") == isinstance(base, nn.Linear))


def _remainder(name: str, shape: torch.Size, groups: Sequence[UnitGroup]) -> Iterator[UnitGroup]:
    """The indices of a divided parameter that no unit has, run by run."""
    parts = [(part, group.count) for group in groups for part in group.parts if part.name == name]
    dim = parts[0][0].dim
    free = torch.ones(shape[dim], dtype=torch.bool)
    for part, count in parts:
        free[part.places(count).flatten()] = False
    edges = torch.diff(torch.cat([torch.zeros(1), free.float(), torch.zeros(1)]))
    starts, stops = ((edges == value).nonzero().flatten().tolist() for value in (1, -1))
    for start, stop in zip(starts, stops, strict=True):
        yield UnitGroup("rest", name, 1, (UnitPart(name, dim, start, 1, stop - start),))


def block_name(place: str) -> str:
    """The block that a group's place belongs to: itself, or that of its parameter.

    Example:
        >>> block_name("transformer.h.3"), block_name("transformer.h.3.ln_1.weight")
        ('transformer.h.3', 'transformer.h.3')
    """
    return place if place.rpartition(".")[2].isdigit() else block_of(place)


def chosen_masks(
    attribution: ChangeAttributionResult,
    space: ParameterSpace,
    model: nn.Module,
    pieces: Pieces,
    shares: Sequence[float],
) -> Iterable[tuple[float, ParameterMask]]:
    """Masks of whole units, tensors or blocks, those first that contribute most by element, up to each share.

    Args:
        attribution: Of the model's change.
        space: Of its elements.
        model: Whose units they are.
        pieces: ``units``, ``tensors`` or ``blocks``.
        shares: Ascending shares of all elements.

    Yields:
        The share that the mask really has, and the mask; once where two shares allow the same pieces.
    """
    groups = model_units(model, space)
    labels, values, sizes = [], [], []
    for group, row in zip(groups, attribution.units, strict=True):
        place = group.place if pieces == "blocks" else ""
        for unit, value in enumerate(row["values"].tolist()):
            labels.append(block_name(place) if place else f"{group.kind} {group.place} {unit}")
            values.append(value)
            sizes.append(group.size(space))
    if pieces == "tensors":
        labels, sizes = list(space.names), list(map(math.prod, space.shapes))
        values = list(attribution.by_tensor.values())
    totals: dict[str, list[float]] = {}
    for label, value, size in zip(labels, values, sizes, strict=True):
        held = totals.setdefault(label, [0.0, 0])
        held[0] += value
        held[1] += size
    sign = math.copysign(1.0, attribution.change)
    order = sorted(totals, key=lambda label: -sign * totals[label][0] / totals[label][1])
    last = -1
    for share in shares:
        room, count = share * space.numel, 0
        for label in order:
            room -= totals[label][1]
            if room < 0 and count:
                break
            count += 1
        if count != last:
            last, inside = count, set(order[:count])
            mask = _piece_mask(space, groups, pieces, inside)
            yield mask.density, mask


def _piece_mask(space: ParameterSpace, groups: Sequence[UnitGroup], pieces: Pieces, inside: set[str]) -> ParameterMask:
    if pieces == "tensors":
        shapes = zip(space.names, space.shapes, strict=True)
        return ParameterMask(space, {name: torch.full(shape, name in inside) for name, shape in shapes})
    flags = [
        [
            (block_name(g.place) if pieces == "blocks" else f"{g.kind} {g.place} {unit}") in inside
            for unit in range(g.count)
        ]
        for g in groups
    ]
    return unit_mask(space, groups, flags)


def strongest(scores: ParameterVector, change: float, share: float) -> ParameterMask:
    """Exactly a share of the elements, those that contribute most in the direction of the change.

    Args:
        scores: What each element contributes.
        change: Its sign is that of the wanted contributions.
        share: A fraction in (0, 1]; at least one element.

    Example:
        >>> from torch import nn
        >>> from lightning_goldy.core.space import ParameterSpace
        >>> space = ParameterSpace.of(nn.Linear(4, 1, bias=False))
        >>> scores = ParameterVector(space, {"weight": torch.tensor([[1.0, -3.0, -2.0, 0.0]])})
        >>> strongest(scores, -4.0, 0.5)["weight"].tolist()
        [[False, True, True, False]]
    """
    return ParameterMask.of_vector((scores if change >= 0 else -scores).top_k(100 * share, scope="global"))


def levels_of(scores: Mapping[str, Tensor], shares: Sequence[float], *, sign: float = 1.0) -> dict[str, Tensor]:
    """The first of ascending shares whose strongest hold each element, or their number where none does.

    Args:
        scores: By parameter, plain or sharded; they are multiplied by the sign for a while.
        shares: Ascending fractions of all elements.
        sign: That of the scores that are strongest.

    Returns:
        Whole tensors of uint8 on the CPU.

    Example:
        >>> levels_of({"a": torch.tensor([4.0, 1.0, 3.0, 2.0])}, [0.25, 0.5])["a"].tolist()
        [0, 2, 1, 2]
    """
    directed, numel = list(scores.values()), sum(score.numel() for score in scores.values())
    parts = [local(score) for score in directed]
    if sign < 0:
        for part in parts:
            part.neg_()
    levels = [torch.full_like(part, len(shares), dtype=torch.uint8) for part in parts]
    for place in reversed(range(len(shares))):
        for level, inside in zip(levels, select_largest(directed, max(1, round(shares[place] * numel))), strict=True):
            level.masked_fill_(inside, place)
    if sign < 0:
        for part in parts:
            part.neg_()
    found = zip(scores, directed, levels, strict=True)
    return {name: gather(like(score, level)).cpu() for name, score, level in found}


def unread_levels(path: ChangePath, name: str, shares: tuple[float, ...], seed: int) -> dict[str, Tensor]:
    """The shares that hold each element, of a baseline that asks no sample."""
    if name == "magnitude":
        references = path.parameters.items()
        return levels_of({n: like(p.detach(), path.change(n).abs()) for n, p in references}, shares)
    # Drop-and-rescale has the same elements as the random baseline, so that what differs is the rescaling.
    direction = random_direction(path.space, seed, module=None if path.weight_space == "merged" else path.model)
    return levels_of({name: tensor.clone() for name, tensor in direction.items()}, shares)


def mask_links(
    scores: ParameterVector, masks: Mapping[str, ParameterVector], *, change: float
) -> tuple[dict[str, Any], ...]:
    r"""What masks have to do with contributions: the share inside, beside that inside a random mask of equal size.

    .. math::
        E\Big[\sum_{j \in M} A_j\Big] = \sum_t \frac{k_t}{n_t} A_t, \qquad
        \mathrm{Var} = \sum_t \frac{k_t (n_t - k_t)}{n_t - 1} \Big(\frac{1}{n_t} \sum_{j \in t} A_j^2
        - \frac{A_t^2}{n_t^2}\Big)

    of k_t elements drawn from the n_t of each tensor t.

    Args:
        scores: What each element contributes.
        masks: By name; elements that a mask's space lacks are outside of it.
        change: The whole change of the metric, whose sign the strongest contributions have.

    Returns:
        For each mask its name (``mask``), its share of the elements (``elements``) and of the contributions
        (``attribution``), what a random mask with as many of each tensor would hold (``null``, with ``null_low`` and
        ``null_high``, 95 % of such masks), and the Jaccard index with the mask of equally many strongest elements
        (``jaccard``, and ``jaccard_null`` of such a random mask).

    Raises:
        SpaceError: A mask is of parameters that have no scores.

    Example:
        >>> from torch import nn
        >>> from lightning_goldy.core.space import ParameterSpace
        >>> space = ParameterSpace.of(nn.Linear(4, 1, bias=False))
        >>> scores = ParameterVector(space, {"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0]])})
        >>> golden = ParameterVector(space, {"weight": torch.tensor([[True, False, True, False]])})
        >>> link = mask_links(scores, {"golden": golden}, change=10.0)[0]
        >>> link["attribution"], link["null"], round(link["jaccard"], 3), round(link["jaccard_null"], 3)
        (0.6, 0.5, 0.333, 0.333)
    """
    tensors = list(scores.values())
    sums = reduce_tensors(tensors, torch.sum)
    squares = reduce_tensors(tensors, lambda x: x @ x)
    total, rows = math.fsum(sums) or math.nan, []
    for label, mask in masks.items():
        scores.space.subspace(mask.space.names).require_same(mask.space)
        marked = [
            scatter_like(
                score, gather(mask[name]) if name in mask.space else torch.zeros(score.shape, dtype=torch.bool)
            )
            for name, score in scores.items()
        ]
        counts = [int(count) for count in reduce_tensors(marked, torch.sum)]
        inside = math.fsum(reduce_tensors(tensors, torch.dot, marked))
        variance, expected, shared = 0.0, 0.0, 0.0
        strong = _strongest_flags(tensors, sum(counts), change)
        both = math.fsum(reduce_tensors(strong, torch.dot, marked))
        for score, count, part, square, taken in zip(
            tensors, counts, sums, squares, reduce_tensors(strong, torch.sum), strict=True
        ):
            size = score.numel()
            expected += count / size * part
            shared += count / size * taken
            variance += count * (size - count) / max(size - 1, 1) * max(square / size - (part / size) ** 2, 0.0)
        spread = 1.96 * math.sqrt(variance) / abs(total)
        whole = 2 * sum(counts)
        rows.append(
            {
                "mask": label,
                "elements": sum(counts) / scores.space.numel,
                "attribution": inside / total,
                "null": expected / total,
                "null_low": expected / total - spread,
                "null_high": expected / total + spread,
                "jaccard": both / (whole - both) if whole else 1.0,
                "jaccard_null": shared / (whole - shared) if whole else 1.0,
            }
        )
    return tuple(rows)


def _strongest_flags(scores: Sequence[Tensor], count: int, change: float) -> list[Tensor]:
    """The so many largest scores of the change's sign, in the scores' layouts."""
    if not count:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    directed = list(scores) if change >= 0 else [-score for score in scores]
    return [like(score, flags) for score, flags in zip(scores, select_largest(directed, count), strict=True)]


def unit_row(unit: Mapping[str, Any], weights: Tensor | None = None) -> dict[str, Any]:
    """A group of units for a row: of heads all with intervals, of others the strongest and sums by rank.

    ``ranks`` are the sums over the strongest unit by absolute value, the 2 behind it, the next 4, 8, ...; they add up
    to the group's total however many units there are; ``sizes`` are those of the absolute values.

    Args:
        unit: Its ``kind``, ``place`` and ``values``, and of heads ``passages``.
        weights: What each passage counts for; without them there are no intervals.

    Example:
        >>> found = unit_row({"kind": "neuron", "place": "h.0", "values": torch.tensor([1.0, -4.0, 2.0, 0.5])})
        >>> found["top"][0], found["ranks"], found["sizes"]
        ([1, -4.0], [-4.0, 3.0, 0.5], [4.0, 3.0, 0.5])
    """
    values: Tensor = unit["values"]
    row = {"kind": unit["kind"], "place": unit["place"], "count": len(values), "total": float(values.sum())}
    if unit["kind"] in ("head", "key_value"):
        spans = [(None, None)] * len(values) if weights is None else intervals_over(unit["passages"], weights)
        low, high = (list(ends) for ends in zip(*spans, strict=True))
        return {**row, "values": values.tolist(), "low": low, "high": high}
    order = values.abs().argsort(descending=True, stable=True)
    parts = values[order].split(rank_sizes(len(values)))
    ranks = {"ranks": [float(part.sum()) for part in parts], "sizes": [float(part.abs().sum()) for part in parts]}
    return {**row, "top": [[place, float(values[place])] for place in order[:_TOP].tolist()], **ranks}


def rank_sizes(count: int) -> list[int]:
    """How many units each step of ranks has: 1, 2, 4, 8, ... until all have one.

    Example:
        >>> rank_sizes(10)
        [1, 2, 4, 3]
    """
    return [min(1 << step, count + 1 - (1 << step)) for step in range(count.bit_length())]


def rows_in_words(row: Row, tokenizer: Any) -> Row:
    """A row of change attribution with the tokens of embedding rows in words, too.

    Args:
        row: Of :class:`~lightning_goldy.analysis.attribution.ChangeAttributionResult`, or of one that holds it.
        tokenizer: Of the model.
    """
    units = [
        {**unit, "words": [tokenizer.decode([place]) for place, _ in unit["top"]]} if unit["kind"] == "row" else unit
        for unit in row.result["units"]
    ]
    return row.extended(result={"units": units})


def unit_groups(result: ChangeAttributionResult, model: nn.Module) -> tuple[UnitGroup, ...]:
    """The groups that the result's units are of, as they lie in a model of the same shapes."""
    return model_units(model, element_space(result, model))


def element_space(result: ChangeAttributionResult, model: nn.Module) -> ParameterSpace:
    """The space of the result's elements."""
    held = result.levels or result.scores
    return held.space if held is not None else ParameterSpace.of(model).subspace(result.names)
