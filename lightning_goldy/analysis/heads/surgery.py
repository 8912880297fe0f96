"""Cuts attention heads by closing their gates, and grows them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.heads.optimizer import ParameterRows, head_rows, owned_parts, reset_moments
from lightning_goldy.core.architecture import Head, HeadError, HeadGates, HeadProjection, ParameterSlice
from lightning_goldy.core.base import Base, BaseParameters, base_of
from lightning_goldy.core.naming import require_at_least, require_choice, suggestion
from lightning_goldy.core.sharding import gather, is_sharded, local, scatter_like, unshard_guard
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector, fill_direction_

Edit = tuple[ParameterSlice, Callable[[Tensor], Tensor]]
"""A slice, and its new value made from the whole parameter."""

Initialisation = Literal["golden", "zero", "copy", "noise"]
Moments = Literal["keep", "reset"]


def prune_heads(
    model: nn.Module,
    heads: Iterable[Head],
    *,
    optimizer: Any = None,
    moments: Moments = "keep",
    min_heads_per_layer: int = 1,
) -> HeadGates:
    """Closes the gates of heads; their weights stay where they are.

    Nothing trains a closed head through the loss; hold a :class:`~lightning_goldy.analysis.HeadFreeze`
    while training, so that weight decay and momenta do not move it either.

    Args:
        model: The model; it gets gates when it has none.
        heads: (layer, head) pairs, open ones, the first to go first.
        optimizer: One or several, whose state ``moments`` is about.
        moments: ``keep`` the optimizer's state of the heads' weights, or ``reset`` it to zero.
        min_heads_per_layer: Heads that must stay open in every layer that loses one.

    Returns:
        The model's gates.

    Raises:
        HeadError: A head does not exist, is named twice or closed already, or too few would stay open in a layer.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> prune_heads(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11)), [(0, 1)]).closed
        ((0, 1),)
    """
    require_choice("moments", moments, get_args(Moments))
    existing = HeadGates.of(model)
    gates = existing or HeadGates(model)
    try:
        cut = gates.check(heads)
        _check_open(gates, cut, min_heads_per_layer)
        if moments == "reset" and optimizer is not None:
            unshard_guard(model)
            reset_moments(head_rows(gates.architecture, cut, {*gates.closed, *cut}), optimizer)
    except BaseException:
        if existing is None:
            gates.remove()
        raise
    gates.disable(cut)
    return gates


@torch.no_grad()
def regrow_heads(
    model: nn.Module,
    heads: Iterable[Head],
    *,
    initialisation: Initialisation = "golden",
    base: Base | None = None,
    optimizer: Any = None,
    moments: Moments = "reset",
    donors: Mapping[Head, Head] | None = None,
    noise_scale: float = 1.0,
    seed: int = 0,
) -> HeadGates:
    """Gives closed heads new weights and opens their gates.

    A head's weights are its query rows and output columns, and its key/value group's rows if all of the group is
    closed; rows that an open head uses are never touched.

    - ``golden``: the values of the base.
    - ``zero``: output columns of zero, everything else as it was; the model computes what it did with the head closed,
      and the output columns learn from the first step.
    - ``copy``: query (and key and value) rows of an open head of the layer, output columns of zero. The function is
      kept likewise; halving the output columns between both would keep it too, but two heads that are equal in
      everything receive equal gradients and never part.
    - ``noise``: normal numbers in the standard deviation that the same projection has over the layer's heads. The
      function changes.

    Optimizer moments that start again at zero while Adam's step count goes on make the first updates up to
    (1 - beta1) / sqrt(1 - beta2) times the learning rate, 3.2 by default.

    Args:
        model: Has :class:`HeadGates`.
        heads: (layer, head) pairs, closed ones.
        initialisation: Where the weights come from.
        base: For ``golden``: a model, a vector, base parameters or a saved file; see
            :func:`~lightning_goldy.core.base.base_of`.
        optimizer: One or several, whose state ``moments`` is about.
        moments: ``reset`` the optimizer's state of these weights to zero, or ``keep`` what it was at the cut.
        donors: For ``copy``: the open head of the same layer that each head copies; by default the open heads of the
            layer in order, each once.
        noise_scale: For ``noise``: multiple of the layer's standard deviation.
        seed: For ``noise``; the values do not depend on the layout of the parameters or the number of ranks.

    Returns:
        The model's gates.

    Raises:
        HeadError: The model has no gates; a head does not exist, is named twice or open; a donor is missing, closed, in
            another layer, or named for two heads.
        ValueError: An argument is unknown, out of range or missing; the base lacks a parameter; or frozen weights, such
            as those below an adapter, would have to change.

    Source: zero and golden regrowth: Evci et al. 2020, "Rigging the Lottery", section 3.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
        >>> _ = prune_heads(model, [(0, 1)])
        >>> regrow_heads(model, [(0, 1)], initialisation="zero").closed
        ()
        >>> model.transformer.h[0].attn.c_proj.weight[4:].any().item()
        False
    """
    require_choice("initialisation", initialisation, get_args(Initialisation))
    require_choice("moments", moments, get_args(Moments))
    gates = HeadGates.of(model)
    if gates is None:
        raise HeadError("the model has no gates, so no head is closed")
    grown = gates.check(heads)
    for head in grown:
        if head not in gates.closed:
            raise HeadError(f"head {head} is open; closed are {list(gates.closed)}")
    unshard_guard(model)
    rows = head_rows(gates.architecture, grown, gates.closed)
    if initialisation == "golden":
        _restore(model, rows, base)
    else:
        edits = {
            "zero": lambda: _zeroed(gates, grown),
            "copy": lambda: _copied(gates, grown, donors or {}),
            "noise": lambda: _noised(gates, grown, noise_scale, seed),
        }[initialisation]
        _apply(list(edits()), initialisation)
    if moments == "reset" and optimizer is not None:
        reset_moments(rows, optimizer)
    # Inside autocast a low-precision copy of the old weight may be cached.
    torch.clear_autocast_cache()
    gates.enable(grown)
    return gates


def _zeroed(gates: HeadGates, grown: tuple[Head, ...]) -> Iterator[Edit]:
    for layer, head in grown:
        for part in gates.architecture.blocks[layer].output_slice(head):
            yield part, lambda whole, part=part: torch.zeros_like(part.of(whole))  # type: ignore[misc]


def _copied(gates: HeadGates, grown: tuple[Head, ...], donors: Mapping[Head, Head]) -> Iterator[Edit]:
    chosen = _donors(gates, grown, donors)
    for head, role, index in owned_parts(gates.architecture, grown, gates.closed):
        if role == "output":
            continue
        block, (_, donor) = gates.architecture.blocks[head[0]], chosen[head]
        projection = getattr(block, role)
        source = donor if role == "query" else block.key_value_head(donor)
        for part, other in zip(projection.head_slice(index), projection.head_slice(source), strict=True):
            yield part, lambda whole, other=other: other.of(whole).clone()  # type: ignore[misc]
    yield from _zeroed(gates, grown)


def _donors(gates: HeadGates, grown: tuple[Head, ...], given: Mapping[Head, Head]) -> dict[Head, Head]:
    """One open head of the same layer for each head."""
    chosen = dict(zip(given, gates.check(given.values()), strict=True))
    for head in grown:
        if head not in chosen:
            free = (other for other in gates.opened if other[0] == head[0] and other not in chosen.values())
            donor = next(free, None)
            if donor is None:
                raise HeadError(
                    f"no open head of layer {head[0]} is left for {head} to copy: two copies of one head receive equal "
                    "gradients and stay equal; grow fewer heads at once, or use another initialisation"
                )
            chosen[head] = donor
    for head, donor in chosen.items():
        if head not in grown or donor[0] != head[0] or donor not in gates.opened:
            raise HeadError(f"donors: {donor} for {head} must be an open head of the layer of a head that grows")
    return chosen


def _noised(gates: HeadGates, grown: tuple[Head, ...], scale: float, seed: int) -> Iterator[Edit]:
    for (layer, _), role, index in owned_parts(gates.architecture, grown, gates.closed):
        projection = getattr(gates.architecture.blocks[layer], role)
        for place, part in enumerate(projection.head_slice(index)):
            yield part, partial(_noise, part=part, projection=projection, place=place, scale=scale, seed=seed)


def _noise(
    whole: Tensor, *, part: ParameterSlice, projection: HeadProjection, place: int, scale: float, seed: int
) -> Tensor:
    heads = [projection.head_slice(head)[place].of(whole) for head in range(projection.layout.n_heads)]
    spread = torch.cat([head.reshape(-1) for head in heads]).double().std(correction=0)
    draw = torch.empty(whole.shape, dtype=torch.float32)
    fill_direction_(draw, part.name, seed)
    return (part.of(draw).to(whole.device) * (scale * spread)).to(whole.dtype)


def _apply(edits: list[Edit], initialisation: str) -> None:
    by_parameter: dict[str, list[Edit]] = {}
    for edit in edits:
        by_parameter.setdefault(edit[0].name, []).append(edit)
    for name, mine in by_parameter.items():
        if not mine[0][0].parameter.requires_grad:
            raise ValueError(
                f"{initialisation!r} would change {name}, which is frozen: training could not grow the head from it, "
                "and an adapter would not save it; use initialisation='golden'"
            )
    for mine in by_parameter.values():
        parameter = mine[0][0].parameter
        whole = gather(parameter)
        # All are worked out first, for the noise's deviation is that of the values before.
        values = [function(whole) for _, function in mine]
        for (part, _), value in zip(mine, values, strict=True):
            part.of(whole).copy_(value)
        if is_sharded(parameter):
            local(parameter).copy_(local(scatter_like(parameter, whole)))


def _restore(model: nn.Module, rows: list[ParameterRows], base: Base | None) -> None:
    if base is None:
        raise ValueError(
            "initialisation='golden' takes the weights from base=; pass BaseParameters, a vector, a model or a file"
        )
    wanted = {row.name: row for row in rows}
    # What was frozen when the base was taken has not moved since.
    trained = [name for name, row in wanted.items() if row.parameter.requires_grad]
    space = None
    if isinstance(base, (ParameterVector, BaseParameters)):
        for name in trained:
            if name not in base.space:
                raise ValueError(f"the base lacks {name!r}; {suggestion(name, base.space.names)}")
    else:
        space = ParameterSpace.of(model).subspace(trained)
    for change in base_of(base, model, space).changes(model):
        if change.name in wanted:
            row = wanted[change.name]
            row.write(row.parameter, row.read(change.base).to(row.parameter.dtype))


def _check_open(gates: HeadGates, cut: tuple[Head, ...], least: int) -> None:
    require_at_least("min_heads_per_layer", least, 1)
    opened = gates.opened
    for head in cut:
        if head not in opened:
            raise HeadError(f"head {head} is closed already")
    for layer in {layer for layer, _ in cut}:
        left = sum(at == layer for at, _ in opened) - sum(at == layer for at, _ in cut)
        if left < least:
            raise HeadError(
                f"layer {layer} would keep {left} of {gates.heads_per_layer[layer]} heads; "
                f"min_heads_per_layer={least} must stay open"
            )
