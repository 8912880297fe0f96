"""How many elements a mask and the pool of its search may have, and the exact selections within that."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_goldy.core.mask import PackedMask, Positions, Scope, check_scope, flat_positions, marked
from lightning_goldy.core.naming import Registry, require_kinds, require_number
from lightning_goldy.core.selection import kth_largest, select_largest, select_largest_of_each
from lightning_goldy.core.sharding import Replicas, gather, is_sharded, like, local, scatter_like, sum_over_shards
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import elements_in, require_finite

Mask = dict[str, Tensor]

# Channels of each end of a matrix whose crossings may make the largest activations.
_CHANNELS = 4
# So many times as many exchanges are looked at as are asked for, since the next question may be of more.
_AHEAD = 4
# What stays of mean gains each time.
_MEMORY = 0.8
# What lies beside a mask is kept where it is no more than 1 in so many of its group's elements.
_KEPT = 16


class Element(NamedTuple):
    """One element of a parameter: its flat position in the whole tensor."""

    name: str
    position: int


class Scored(NamedTuple):
    """An element and its score."""

    element: Element
    score: float


class Outside:
    """The largest scores beside one mask, of every group: looked for once, and then among what was found.

    Example:
        >>> outside, scores, held = Outside(), [torch.arange(48.0)], [torch.tensor([47])]
        >>> [part.tolist() for part in outside.largest(0, 3, scores, held)[0]]
        [[44, 45, 46]]
        >>> [part.tolist() for part in outside.largest(0, 2, [], [])[0]]
        [[45, 46]]
    """

    def __init__(self) -> None:
        self._found: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def count(self, group: int) -> int:
        """How many of a group are known."""
        return sum(map(len, self._found[group][0])) if group in self._found else 0

    def largest(
        self, group: int, count: int, flats: Sequence[Tensor], held: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Flat positions in each tensor, ascending, and values; ties to the earlier tensor and the smaller position.

        Args:
            group: Which group.
            count: Elements; no more than there are beside the mask.
            flats: All scores of the group, which are not looked at where so many are known.
            held: Flat positions of the mask in each.
        """
        if count > self.count(group):
            found = _largest_outside(flats, held, count)
            if _KEPT * count > sum(map(Tensor.numel, flats)):
                return found
            self._found[group] = found
        elif not count:
            return [where[:0] for where in held], [flat[:0] for flat in flats]
        positions, values = self._found[group]
        if count == self.count(group):
            return positions, values
        chosen = select_largest(values, count)
        return (
            [where[mask] for where, mask in zip(positions, chosen, strict=True)],
            [value[mask] for value, mask in zip(values, chosen, strict=True)],
        )


class Budget:
    """How many elements a mask may have, by tensor or in all, and the selections within it.

    Args:
        parameters: Name to parameter.
        top_k_percent: Share of the elements, percent in (0, 100].
        scope: The share of each ``tensor``, or of all elements together (``global``).
        experts: Tensors that are stacks of so many experts, each of which has the share of its own.

    Example:
        >>> budget = Budget({"a": torch.zeros(10), "b": torch.zeros(4)}, 20, "tensor")
        >>> budget.sizes(), budget.sizes(0.5), Budget({"a": torch.zeros(10), "b": torch.zeros(4)}, 20, "global").sizes()
        ([2, 1], [1, 1], [3])
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        top_k_percent: float,
        scope: Scope,
        experts: Mapping[str, int] | None = None,
    ) -> None:
        self.layouts = {name: parameter.detach() for name, parameter in parameters.items()}
        names = list(self.layouts)
        self.groups = [names] if scope == "global" else [[name] for name in names]
        """Names of the tensors that share a budget."""
        self.stacks = [1] if scope == "global" else [(experts or {}).get(name, 1) for name in names]
        """Experts of each group, 1 where it is no stack; sizes are of one of them."""
        self._group_of = {name: index for index, group in enumerate(self.groups) for name in group}
        elements = [sum(self.layouts[name].numel() for name in group) for group in self.groups]
        self.numels = [count // stack for count, stack in zip(elements, self.stacks, strict=True)]
        """Elements of each group, of a stack those of one expert."""
        self._whole = [elements_in(top_k_percent, numel) for numel in self.numels]

    def sizes(self, share: float = 1.0) -> list[int]:
        """Elements of each group at this share of the budget, rounded half up, at least one."""
        return [max(1, math.floor(share * size + 0.5)) for size in self._whole]

    def pools(self, sizes: list[int], factor: float) -> list[int]:
        """Elements of each group's pool, rounded up; at most all."""
        return [min(numel, math.ceil(factor * size - 1e-9)) for size, numel in zip(sizes, self.numels, strict=True)]

    def largest(self, scores: Mapping[str, Tensor], sizes: list[int]) -> Mask:
        """Marks exactly so many elements of each group, the largest, ties to the smaller index."""
        return dict(self.selections(scores, sizes))

    def selections(self, scores: Mapping[str, Tensor], sizes: list[int]) -> Iterator[tuple[str, Tensor]]:
        """As :meth:`largest`, tensor by tensor; scores are asked for one group at a time."""
        for group, size, stack in zip(self.groups, sizes, self.stacks, strict=True):
            yield from self._chosen(group, [scores[name] for name in group], size, stack)

    def _chosen(
        self, group: Sequence[str], scores: Sequence[Tensor], size: int, stack: int
    ) -> Iterator[tuple[str, Tensor]]:
        laid_out = [like(self.layouts[name], part) for name, part in zip(group, scores, strict=True)]
        return zip(group, largest_of(laid_out, size, stack), strict=True)

    def total(self, sizes: list[int]) -> int:
        """Elements in all, every expert of a stack counted."""
        return sum(size * stack for size, stack in zip(sizes, self.stacks, strict=True))

    def reselected(
        self, scores: Mapping[str, Tensor], mask: Mapping[str, Tensor], sizes: list[int], pools: list[int]
    ) -> Mask:
        """The best of a pool that holds the masked elements and the best others, exactly so many of each group.

        Args:
            scores: Larger is better; finite.
            mask: The present one.
            sizes: Elements to mark of each group.
            pools: Elements of each pool, at least the size to be marked.
        """
        chosen = dict(self.reselections(scores, mask, sizes, pools))
        return {**mask, **{n: part.dense() if isinstance(part, Positions) else part for n, part in chosen.items()}}

    def reselections(
        self,
        scores: Mapping[str, Tensor],
        mask: Mapping[str, Tensor],
        sizes: list[int],
        pools: list[int],
        outside: Outside | None = None,
    ) -> Iterator[tuple[str, Tensor | Positions]]:
        """As :meth:`reselected`, tensor by tensor, without what stays; scores and mask are asked for by group.

        Args:
            scores: Larger is better; finite.
            mask: The present one.
            sizes: Elements to mark of each group.
            pools: Elements of each pool, at least the size to be marked.
            outside: What is known of the same scores beside the same mask, which is read and added to.
        """
        outside = Outside() if outside is None else outside
        masked = self.counts(mask)
        groups = zip(self.groups, sizes, pools, masked, self.stacks, strict=True)
        for index, (group, size, pool, count, stack) in enumerate(groups):
            # At most pool - count others come in, so the best of the masked stay whatever happens.
            kept = size - (pool - count)
            if kept == count == size:
                continue
            chosen = [scores[name] for name in group]
            if kept <= 0:
                yield from self._chosen(group, chosen, size, stack)
            elif stack == 1 and not any(map(is_sharded, map(self.layouts.__getitem__, group))):
                held = [flat_positions(mask, name) for name in group]
                came = outside.largest(index, size - kept, [part.reshape(-1) for part in chosen], held)
                yield from zip(group, _reselected(chosen, held, came, kept), strict=True)
            else:
                stay = [mask[name] for name in group]
                if kept < count:
                    inside = [part.where(held, -math.inf) for part, held in zip(chosen, stay, strict=True)]
                    stay = [best for _, best in self._chosen(group, inside, kept, stack)]
                    del inside
                chosen = [part.masked_fill(held, math.inf) for part, held in zip(chosen, stay, strict=True)]
                yield from self._chosen(group, chosen, size, stack)

    def exchanges(
        self,
        scores: Mapping[str, Tensor],
        mask: Mapping[str, Tensor],
        most: list[int],
        total: int,
        promises: dict[int, tuple[int, Tensor]] | None = None,
        outside: Outside | None = None,
    ) -> list[int]:
        """How many elements each group should exchange, so that those exchanges are made that promise most.

        An exchange takes the best element outside the mask for the worst inside of the same group, the second best for
        the second worst, and so on; it promises the difference of their scores, which must be positive.

        Args:
            scores: Larger is better; finite.
            mask: The present one.
            most: Exchanges of each group at most.
            total: Of all groups together, of a stack counted for one expert; stacks get their share whatever they
                promise, for all experts exchange alike.
            promises: By group how many exchanges were looked at with the same scores and mask and what they promise,
                which is read and added to: fewer are a part of it.
            outside: What is known of the same scores beside the same mask, which is read and added to.

        Example:
            >>> budget = Budget({"a": torch.zeros(4), "b": torch.zeros(4)}, 25, "tensor")
            >>> scores = {"a": torch.tensor([1.0, 2.0, 0.0, 0.0]), "b": torch.tensor([1.0, 9.0, 0.0, 0.0])}
            >>> first = torch.tensor([True, False, False, False])
            >>> budget.exchanges(scores, {"a": first, "b": first}, [1, 1], 1)
            [0, 1]
        """
        if total >= sum(most):
            return most
        if len(self.groups) == 1:
            return [total]
        promises = {} if promises is None else promises
        outside = Outside() if outside is None else outside
        promised: list[Tensor | None] = []
        for index, (group, limit, stack) in enumerate(zip(self.groups, most, self.stacks, strict=True)):
            count = min(limit, total)
            if stack > 1 or not count:
                promised.append(None)
                continue
            if index not in promises or promises[index][0] < count:
                # No more than are known, unless that is too few: all scores would be looked at for them.
                ahead = max(count, min(_AHEAD * count, outside.count(index) or _AHEAD * count))
                promises[index] = ahead, self._promised(scores[group[0]], mask, group[0], ahead, outside)
            promised.append(promises[index][1][:count])
        known = [each for each in promised if each is not None and len(each)]
        joined = torch.cat(known) if known else torch.zeros(1)
        least = kth_largest(joined, min(total, len(joined)))
        return [
            int(limit * total / sum(most))
            if stack > 1
            else 0
            if each is None
            else int(((each >= least) & (each > 0)).sum())
            for each, limit, stack in zip(promised, most, self.stacks, strict=True)
        ]

    def _promised(self, part: Tensor, mask: Mapping[str, Tensor], name: str, count: int, outside: Outside) -> Tensor:
        """What so many exchanges within a tensor promise, the best first; none less than 0."""
        flat, held = self.whole(name, part).reshape(-1), self.positions(mask, name)
        worst = flat[held].sort().values[:count]
        most = min(count, flat.numel() - len(held), len(worst))
        best = outside.largest(self._group_of[name], most, [flat], [held])[1][0].sort(descending=True).values
        return (best - worst[: len(best)]).clamp(min=0)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """A tensor of which this is this process's part; a collective where it is sharded."""
        return gather(like(self.layouts[name], part))

    def positions(self, mask: Mapping[str, Tensor], name: str) -> Tensor:
        """Flat positions of the marked elements in the whole tensor, ascending."""
        if is_sharded(self.layouts[name]):
            return self.whole(name, mask[name]).reshape(-1).nonzero().flatten()
        return flat_positions(mask, name)

    def slot(self, element: Element) -> tuple[int, int]:
        """The group, and in a stack the expert, whose budget an element is of."""
        index = self._group_of[element.name]
        stack = self.stacks[index]
        return index, element.position // self.numels[index] if stack > 1 else 0

    def strongest(
        self, scores: Mapping[str, Tensor], count: int, mask: Mapping[str, Tensor] | None = None
    ) -> list[Scored]:
        """So many elements with the largest scores of every tensor, without those of a mask; the largest first."""
        found = []
        for name in self.layouts:
            flat = self.whole(name, scores[name]).reshape(-1)
            if mask is not None:
                flat = flat.index_fill(0, self.positions(mask, name), -math.inf)
            best = flat.topk(min(count, flat.numel()))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found += [Scored(Element(name, place), value) for place, value in pairs if value > -math.inf]
        return sorted(found, key=lambda each: -each.score)

    def pairs(
        self, scores: Mapping[str, Tensor], mask: Mapping[str, Tensor], count: int
    ) -> list[tuple[Element, Element]]:
        """Exchanges of single elements that promise most: the best outside for the worst inside of the same slot."""
        worst: dict[tuple[int, int], list[Scored]] = {}
        for held in self.marked(mask, scores):
            worst.setdefault(self.slot(held.element), []).append(held)
        taken: Counter[tuple[int, int]] = Counter()
        found = []
        for best in self.strongest(scores, count, mask):
            slot = self.slot(best.element)
            if taken[slot] < len(worst[slot]):
                held = worst[slot][taken[slot]]
                taken[slot] += 1
                if best.score > held.score:
                    found.append((best.score - held.score, best.element, held.element))
        return [(best, held) for _, best, held in sorted(found, key=lambda each: -each[0])[:count]]

    def marked(self, mask: Mapping[str, Tensor], scores: Mapping[str, Tensor] | None = None) -> list[Scored]:
        """The elements of a mask, those with the smallest scores first; without scores in their order."""
        found = []
        for name in self.layouts:
            where = self.positions(mask, name)
            flat = None if scores is None else self.whole(name, scores[name]).reshape(-1)
            values = [0.0] * len(where) if flat is None else flat[where].tolist()
            pairs = zip(where.tolist(), values, strict=True)
            found += [Scored(Element(name, place), value) for place, value in pairs]
        return sorted(found, key=lambda each: each.score)

    def changed(self, mask: PackedMask, added: Iterable[Element], removed: Iterable[Element] = ()) -> PackedMask:
        """The mask with some elements more and others less."""
        wanted: dict[str, list[tuple[int, bool]]] = {}
        for elements, value in ((removed, False), (added, True)):
            for element in elements:
                wanted.setdefault(element.name, []).append((element.position, value))
        parts = {}
        for name, places in wanted.items():
            layout = self.layouts[name]
            whole = self.whole(name, mask[name]).reshape(-1).clone()
            for place, value in places:
                whole[place] = value
            parts[name] = local(scatter_like(layout, whole.view(layout.shape)))
        return mask.replaced(parts)

    def laid_out(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts in the layouts of their parameters."""
        return {name: like(self.layouts[name], part) for name, part in parts.items()}

    def counts(self, mask: Mapping[str, Tensor]) -> list[int]:
        """Marked elements of each group, of a stack those of one expert: a budget marks equally many of all."""
        held = mask if isinstance(mask, PackedMask) else PackedMask(mask.items())
        parts = [torch.tensor(held.count(name), device=local(layout).device) for name, layout in self.layouts.items()]
        counts = dict(zip(self.layouts, sum_over_shards(parts, list(self.layouts.values())), strict=True))
        groups = zip(self.groups, self.stacks, strict=True)
        return [sum(int(counts[name]) for name in group) // stack for group, stack in groups]


class MeanGains:
    r"""What masking each element adds, averaged over the masks that it was asked of.

    .. math:: v \leftarrow \beta v + (1 - \beta) \frac{s}{\sum_{i \in m \cap G} |s_i|}, \qquad \beta = 0.8

    A gain to first order says little of an element by itself, for it depends on what else is masked; one that is large
    under many masks belongs to what they share. Gains are larger by orders where more is masked, and by others in each
    tensor, so that what is averaged is each one's share of its group G, those that have a budget together: no mask
    decides alone which elements of a group stay.

    Args:
        budget: Knows the layouts and the groups.

    Example:
        >>> means = MeanGains(Budget({"a": torch.zeros(2)}, 50, "tensor"))
        >>> means.add({"a": torch.tensor([4.0, 1.0])}, {"a": torch.tensor([True, False])})
        >>> [round(value, 3) for value in means.values["a"].tolist()]
        [0.2, 0.05]
    """

    def __init__(self, budget: Budget) -> None:
        self._layouts, self._groups = budget.layouts, budget.groups
        self.values: dict[str, Tensor] = {}
        """This process's part of each tensor."""

    def add(self, gains: Mapping[str, Tensor], mask: Mapping[str, Tensor], *, weight: float = 1 - _MEMORY) -> None:
        """Takes the gains at a mask in, which are left as they are; the weight is of the new ones."""
        device = next(iter(gains.values())).device.type
        # Some accelerators have no float64.
        dtype = torch.float32 if device == "mps" else torch.float64
        inside = [part[mask[name]].abs().sum(dtype=dtype) for name, part in gains.items()]
        sums = sum_over_shards(inside, [self._layouts[name] for name in gains])
        totals = dict(zip(gains, map(float, sums), strict=True))
        for group in self._groups:
            total = sum(totals[name] for name in group)
            for name in group:
                mean = self.values.setdefault(name, torch.zeros_like(gains[name]))
                mean.mul_(1 - weight).add_(gains[name], alpha=weight / total if total > 0 else 0.0)


class ComputedScores(Mapping[str, Tensor]):
    """Tensors by name that are computed each time that they are asked for, so that only one of them exists."""

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def finite_scores(scores: Mapping[str, Tensor], what: str, budget: Budget) -> Mapping[str, Tensor]:
    """The same scores, each held against what is no number when it is asked for."""

    def checked(name: str) -> Tensor:
        part = scores[name]
        require_finite(budget.laid_out({name: part}), what)
        return part

    return ComputedScores(scores, checked)


def largest_of(scores: Sequence[Tensor], k: int, stack: int) -> list[Tensor]:
    """The k largest of all tensors together, or of each expert of a single one that is a stack."""
    return select_largest(scores, k) if stack == 1 else [select_largest_of_each(scores[0], k)]


def _reselected(
    scores: Sequence[Tensor], held: Sequence[Tensor], came: tuple[Sequence[Tensor], Sequence[Tensor]], kept: int
) -> list[Tensor | Positions]:
    """The best so many of those held, whatever their value, and as many of the others as come in, all together.

    Args:
        scores: Plain tensors.
        held: Flat positions in each, ascending.
        came: Flat positions, ascending, and values of as many of the best others as there are places beside those kept.
        kept: How many of those held are marked in any case.
    """
    stay, positions = list(held), list(came[0])
    if kept < sum(map(len, held)):
        inside = [part.reshape(-1)[where] for part, where in zip(scores, held, strict=True)]
        best = select_largest(inside, kept)
        stay = [where[mask] for where, mask in zip(held, best, strict=True)]
        rivals = []
        for index, (where, values, mask, others) in enumerate(zip(held, inside, best, came[1], strict=True)):
            joined = torch.cat([where[~mask], positions[index]])
            # Ascending, so that ties go to the smaller position.
            order = joined.argsort()
            positions[index] = joined[order]
            rivals.append(torch.cat([values[~mask], others])[order])
        places = sum(map(len, came[0]))
        chosen = select_largest(rivals, places) if places else [part < -math.inf for part in rivals]
        positions = [where[mask] for where, mask in zip(positions, chosen, strict=True)]
    parts = zip(stay, positions, scores, strict=True)
    return [marked([where, other], part.shape) for where, other, part in parts]


def _largest_outside(flats: Sequence[Tensor], held: Sequence[Tensor], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Flat positions, ascending, and values of the largest so many beside those held; the tensors come back."""
    values = [flat[where] for flat, where in zip(flats, held, strict=True)]
    # They are set aside rather than left out of a copy of all scores.
    try:
        for flat, where in zip(flats, held, strict=True):
            flat[where] = -math.inf
        masks = select_largest(flats, count)
    finally:
        for flat, where, value in zip(flats, held, values, strict=True):
            flat[where] = value
    positions = [flat_positions({"": mask}, "") for mask in masks]
    return positions, [flat[where] for flat, where in zip(flats, positions, strict=True)]


def counts_by_expert(masks: Mapping[str, Tensor], experts: Mapping[str, int]) -> tuple[int, ...]:
    """Marked elements of each tensor, of a stack those of each expert.

    Example:
        >>> counts_by_expert({"a": torch.tensor([[True, False], [True, True]])}, {"a": 2})
        (1, 2)
    """
    parts = (part for name, mask in masks.items() for part in mask.reshape(experts.get(name, 1), -1))
    # Of one dimension, which is several times as fast as one by one of two.
    return tuple(int(part.count_nonzero()) for part in parts)


def expert_sizes(space: ParameterSpace, experts: Mapping[str, int]) -> list[int]:
    """Elements of each tensor, of a stack those of each expert."""
    counts = [experts.get(name, 1) for name in space.names]
    numels = map(math.prod, space.shapes)
    return [numel // count for numel, count in zip(numels, counts, strict=True) for _ in range(count)]


@contextmanager
def largest_activations(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The largest magnitude of every channel that goes into a matrix, and of every one that comes out, over all passes.

    Args:
        model: Its passes in the ``with`` block are watched.
        parameters: Name to parameter; those that layers multiply their input by are looked at.

    Yields:
        By name the channels of the matrix's first dimension, and of its second.
    """
    names = {id(parameter): name for name, parameter in parameters.items() if parameter.ndim == 2}
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def noting(name: str, shape: tuple[int, int], first_is_output: bool) -> Callable[..., None]:
        def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            ends = (output, *inputs[:1]) if first_is_output else (*inputs[:1], output)
            plain = all(isinstance(end, Tensor) and end.ndim and end.numel() for end in ends)
            # Of layers that tensor parallelism splits by outputs a process has only its own, of another width.
            if plain and tuple(end.shape[-1] for end in ends) == shape:
                sizes = [gather(end).abs().reshape(-1, end.shape[-1]).amax(dim=0).float() for end in ends]
                before = found.get(name, sizes)
                found[name] = torch.maximum(before[0], sizes[0]), torch.maximum(before[1], sizes[1])

        return note

    with ExitStack() as hooks:
        for module in model.modules():
            weight = getattr(module, "weight", None)
            name = names.get(id(weight))
            if isinstance(weight, Tensor) and name is not None and not isinstance(module, nn.Embedding):
                shape = (weight.shape[0], weight.shape[1])
                hook = noting(name, shape, isinstance(module, nn.Linear))
                hooks.callback(module.register_forward_hook(hook).remove)
        yield found


def crossings(
    seen: Mapping[str, tuple[Tensor, Tensor]], parameters: Mapping[str, Tensor], replicas: Replicas
) -> list[Element]:
    """Elements that carry the largest inputs to the largest outputs, those with the largest share in one first.

    Args:
        seen: What :func:`largest_activations` saw on this replica.
        parameters: Name to parameter.
        replicas: Whose samples count together.
    """
    parts = replicas.gather_objects({name: tuple(end.cpu() for end in ends) for name, ends in seen.items()})
    found = []
    for name, parameter in parameters.items():
        ends = [part[name] for part in parts if name in part]
        if not ends:
            continue
        first, second = (torch.stack(end).amax(dim=0) for end in zip(*ends, strict=True))
        rows, columns = (end.topk(min(_CHANNELS, len(end))).indices for end in (first, second))
        weights = gather(parameter)[rows.to(parameter.device)][:, columns.to(parameter.device)].abs().float().cpu()
        shares = weights * (first[rows] / first.median())[:, None] * (second[columns] / second.median())
        for row, line in zip(rows.tolist(), shares.tolist(), strict=True):
            for column, share in zip(columns.tolist(), line, strict=True):
                found.append(Scored(Element(name, row * parameter.shape[1] + column), share))
    return [each.element for each in sorted(found, key=lambda each: -each.score) if math.isfinite(each.score)]


Strategy = Callable[[int, float], float]
"""``strategy(iteration, improvement)``: the pool's size divided by the budget's, from the iteration (0, 1, ...) and the
growth of the divergence in the iteration before, nats."""


@dataclass(frozen=True)
class Fluctuation:
    """The settings that strategies share; each reads those that it names.

    Args:
        amplitude: How far the pool grows beyond the budget, a fraction of it.
        frequency: Oscillations per iteration.
        momentum: Share of its velocity that a moving pool keeps, in [0, 1).
        temperature: Of the exploration, nats: improvements far above it end the exploration.
        inflation_step: Factor of the pool after an iteration without improvement, at least 1.
        decay_factor: Factor of the pool after an improvement, or of the temperature each iteration, in (0, 1].
        max_inflation_factor: Largest pool, as a multiple of the budget, at least 1.
        min_delta: Smallest growth of the divergence that counts as an improvement, nats.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> Fluctuation(momentum=1.0)
        Traceback (most recent call last):
        ValueError: momentum must lie in [0, 1); got 1.0
    """

    amplitude: float = 0.3
    frequency: float = 0.1
    momentum: float = 0.8
    temperature: float = 1.0
    inflation_step: float = 1.2
    decay_factor: float = 0.9
    max_inflation_factor: float = 2.0
    min_delta: float = 0.01

    def __post_init__(self) -> None:
        require_kinds(type(self), {name: value for name, value in vars(self).items() if not isinstance(value, float)})
        ranges = {
            "amplitude": (self.amplitude >= 0, ">= 0"),
            "frequency": (self.frequency >= 0, ">= 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "temperature": (self.temperature > 0, "> 0"),
            "inflation_step": (self.inflation_step >= 1, ">= 1"),
            "decay_factor": (0 < self.decay_factor <= 1, "in (0, 1]"),
            "max_inflation_factor": (self.max_inflation_factor >= 1, ">= 1"),
            "min_delta": (self.min_delta >= 0, ">= 0"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid or not math.isfinite(getattr(self, name)):
                lie = "must lie" if wanted.startswith("in") else "must be"
                raise ValueError(f"{name} {lie} {wanted}; got {getattr(self, name)}")

    def strategy(self, name: str, seed: int = 0) -> Strategy:
        """The strategy of this name at its first iteration, kept between no more than the budget and the largest pool.

        Args:
            name: Of a registered strategy.
            seed: Decides the random ones.

        Raises:
            ValueError: The name is unknown; the valid ones are listed.

        Example:
            >>> wave = Fluctuation(frequency=0.25).strategy("adaptive_sinusoidal")
            >>> [round(wave(iteration, 0.0), 3) for iteration in range(4)]
            [1.15, 1.3, 1.15, 1.0]
        """
        factor = STRATEGIES[name](self, random.Random(seed))

        def bounded(iteration: int, improvement: float) -> float:
            value = factor(iteration, improvement)
            if not math.isfinite(value):
                raise ValueError(f"strategy {name!r} gave a pool of {value} times the budget at iteration {iteration}")
            return min(self.max_inflation_factor, max(1.0, value))

        return bounded


STRATEGIES: Registry[Callable[[Fluctuation, random.Random], Strategy]] = Registry("strategy")
register_strategy = STRATEGIES.register


@register_strategy("none")
def plain_greedy(settings: Fluctuation, generator: random.Random) -> Strategy:
    """The pool is the budget, so nothing that is masked comes out again: plain greedy growth."""
    return lambda iteration, improvement: 1.0


@register_strategy("adaptive_sinusoidal")
def adaptive_sinusoidal(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A wave whose height follows the improvement.

    .. math:: 1 + \tfrac a2 (1 + \tanh \Delta) (1 + \sin 2 \pi f t)
    """

    def factor(iteration: int, improvement: float) -> float:
        height = settings.amplitude * (1 + math.tanh(improvement)) / 2
        return 1 + height * (1 + math.sin(2 * math.pi * settings.frequency * iteration))

    return factor


@register_strategy("momentum_based")
def momentum_based(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A pool with inertia, which grows while the divergence does and shrinks when it stagnates.

    .. math:: v_t = \mu v_{t-1} \pm (1 - \mu), \qquad e_t = e_{t-1} + a v_t, \qquad e_0 = a
    """
    excess, velocity = settings.amplitude, 0.0

    def factor(iteration: int, improvement: float) -> float:
        nonlocal excess, velocity
        if iteration:
            push = 1.0 if improvement > settings.min_delta else -1.0
            velocity = settings.momentum * velocity + (1 - settings.momentum) * push
            excess = max(0.0, excess + settings.amplitude * velocity)
        return 1 + excess

    return factor


@register_strategy("exploration_decay")
def exploration_decay(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""Noise that cools down, and that an improvement silences.

    .. math:: 1 + 2 a u_t \, e^{-|\Delta| / T_t}, \qquad u_t \sim U(0, 1), \quad T_t = T d^t
    """

    def factor(iteration: int, improvement: float) -> float:
        cooled = settings.temperature * settings.decay_factor**iteration
        quiet = math.exp(-min(abs(improvement) / cooled, 700.0))
        return 1 + 2 * settings.amplitude * generator.random() * quiet

    return factor


@register_strategy("harmonic_oscillator")
def harmonic_oscillator(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A damped spring around the budget, let go at the amplitude.

    .. math:: v_t = \mu v_{t-1} - (2 \pi f)^2 x_{t-1}, \qquad x_t = x_{t-1} + v_t, \qquad \text{factor} = 1 + |x_t|
    """
    place, velocity = settings.amplitude, 0.0

    def factor(iteration: int, improvement: float) -> float:
        nonlocal place, velocity
        if iteration:
            # Faster than one radian per iteration, the steps would be longer than the swing.
            stiffness = min(1.0, (2 * math.pi * settings.frequency) ** 2)
            velocity = settings.momentum * velocity - stiffness * place
            place += velocity
        return 1 + abs(place)

    return factor


@register_strategy("chaos_driven")
def chaos_driven(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""The logistic map in its chaotic regime.

    .. math:: c_t = 3.8 \, c_{t-1} (1 - c_{t-1}), \qquad \text{factor} = 1 + 2 a c_t
    """
    state = 0.1 + 0.8 * generator.random()

    def factor(iteration: int, improvement: float) -> float:
        nonlocal state
        state = 3.8 * state * (1 - state)
        return 1 + 2 * settings.amplitude * state

    return factor


@register_strategy("inflation")
def inflation(settings: Fluctuation, generator: random.Random) -> Strategy:
    """The pool inflates by a step while nothing improves, and decays towards the budget while something does."""
    size = 1 + settings.amplitude

    def factor(iteration: int, improvement: float) -> float:
        nonlocal size
        if iteration:
            improved = improvement > settings.min_delta
            size *= settings.decay_factor if improved else settings.inflation_step
            size = min(settings.max_inflation_factor, max(1.0, size))
        return size

    return factor


def check_search_arguments(top_k_percent: float, scope: str, strategy: str) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    require_number("top_k_percent", top_k_percent)
    elements_in(top_k_percent, 1)
    STRATEGIES[strategy]
    check_scope(scope)
