"""Makes a model structurally smaller: closed heads are cut out of the attention projections."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_goldy.analysis.compact_files import Compaction, CompactSaver, Cut
from lightning_goldy.core.architecture import Architecture, Block, HeadProjection, UnsupportedArchitectureError
from lightning_goldy.core.gates import Head, HeadGates
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.registry import Registry
from lightning_goldy.core.sharding import is_sharded

Resize = Callable[[Block, int, int], None]
"""``resize(block, n_heads, n_key_value_heads)`` tells a block's attention modules how many heads they have now."""

COMPACTIONS: Registry[Resize] = Registry("family that compact can resize")
register_compaction = COMPACTIONS.register


def compact(model: nn.Module) -> Any:
    """A structurally smaller copy of a gated model, whose closed heads are cut out of q, k, v and o.

    Whole key/value groups go where all their heads are closed. Within the groups that stay every group must keep the
    same number of query heads, so some closed heads may stay with output columns of zero. A layer whose heads are all
    closed keeps one such group. Layers may keep different numbers of heads. Trainable gates are multiplied into the
    output columns. The logits equal the gated model's to rounding, and the model given is not changed.

    The copy's ``save_pretrained`` writes a folder that plain transformers loads, with a card (``README.md``) that says
    which heads went: smaller when every layer keeps the same number of heads and the family's configuration has a
    ``head_dim`` to say so with, otherwise in full shape with zeros where heads were cut.

    A static key/value cache, which is sized from the configuration, needs layers of one size.

    Args:
        model: A transformers model with :class:`~lightning_goldy.core.gates.HeadGates`, or a module that contains one.

    Returns:
        The copy, of the same class, without gates and gradients.

    Raises:
        ValueError: The model has no gates, has adapters (merge them first), or is sharded (gather it first).
        UnsupportedArchitectureError: The family's attention modules cannot be resized.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> HeadGates(model).disable([(0, 1)])
        >>> smaller = compact(model)
        >>> [tuple(block.attn.c_proj.weight.shape) for block in smaller.transformer.h]
        [(4, 8), (8, 8)]
        >>> compaction_of(smaller).removed
        ((0, 1),)
    """
    gates = _checked(model)
    resize = COMPACTIONS[gates.architecture.family]
    # Gradients and the graph need not be copied.
    gradients = [parameter.grad for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.grad = None
        smaller = copy.deepcopy(model)
    finally:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
    own = HeadGates.of(smaller)
    assert own is not None
    own.remove()
    plans = [_plan(block, set(own.closed)) for block in own.architecture.blocks]
    cuts: list[Cut] = []
    with torch.no_grad():
        for block, plan in zip(own.architecture.blocks, plans, strict=True):
            _silence(block, plan, own)
            cuts += _cut_block(block, plan)
            resize(block, len(plan.heads), len(plan.groups))
    sizes = tuple((len(plan.heads), len(plan.groups)) for plan in plans)
    record = Compaction(
        family=own.architecture.family,
        heads_before=own.heads_per_layer,
        heads_after=tuple(heads for heads, _ in sizes),
        closed=own.closed,
        removed=tuple(head for head in own.closed if head[1] not in plans[head[0]].heads),
        cuts=tuple(cuts),
        smaller=_say_so(smaller, own.architecture, sizes),
    )
    saver = CompactSaver(smaller, record)
    # On the instance, so that whatever saves the model saves it in a form that can be loaded.
    smaller.save_pretrained = saver  # type: ignore[assignment]
    return smaller


def compaction_of(model: nn.Module) -> Compaction:
    """What :func:`compact` cut out of this model.

    Raises:
        ValueError: The model was not made by it.
    """
    saver = getattr(model, "save_pretrained", None)
    if not isinstance(saver, CompactSaver):
        raise ValueError(f"{model_class(model)} was not made by compact()")
    return saver.record


@dataclass(frozen=True)
class _Plan:
    """What a block keeps: key/value groups, query heads (as many in each group), and which of these are closed."""

    groups: tuple[int, ...]
    heads: tuple[int, ...]
    silent: tuple[int, ...]


def _checked(model: nn.Module) -> HeadGates:
    gates = HeadGates.of(model)
    if gates is None:
        raise ValueError("the model has no gates, so no head is closed; prune_heads makes them")
    if any(hasattr(part, "peft_config") for part in model.modules()):
        raise ValueError("the model has adapters; merge them first with merge_and_unload(), and close the heads again")
    if any(map(is_sharded, model.parameters())):
        raise ValueError("the model is sharded over processes; gather its weights into a plain model first")
    if gates.architecture.family not in COMPACTIONS:
        raise UnsupportedArchitectureError(
            f"{model_class(model)} ({gates.architecture.family!r}): heads can be cut out of "
            f"{', '.join(sorted(COMPACTIONS))}; add a family with @register_compaction"
        )
    for block in gates.architecture.blocks:
        for projection in _projections(block):
            projection.head_slice(0)  # refuses packed weights
    return gates


def _plan(block: Block, closed: set[Head]) -> _Plan:
    opened = {
        group: [head for head in block.query_heads(group) if (block.index, head) not in closed]
        for group in range(block.n_key_value_heads)
    }
    groups = tuple(group for group, heads in opened.items() if heads) or (0,)
    size = max(1, *(len(opened[group]) for group in groups))
    kept: list[int] = []
    for group in groups:
        spare = [head for head in block.query_heads(group) if head not in opened[group]]
        kept += sorted(opened[group] + spare[: size - len(opened[group])])
    return _Plan(groups, tuple(kept), tuple(head for head in kept if (block.index, head) in closed))


def _silence(block: Block, plan: _Plan, gates: HeadGates) -> None:
    """What gates multiply goes into the output columns."""
    for head in plan.heads:
        for part in block.output_slice(head):
            if head in plan.silent:
                part.of(part.parameter).zero_()
            elif gates.values is not None:
                part.of(part.parameter).mul_(gates.values[block.index, head])


def _cut_block(block: Block, plan: _Plan) -> list[Cut]:
    kept: dict[str, set[int]] = {}
    where: dict[str, tuple[nn.Module, int]] = {}
    roles = (
        (block.query, plan.heads),
        (block.key, plan.groups),
        (block.value, plan.groups),
        (block.output, plan.heads),
    )
    for projection, heads in roles:
        for owner, name, dim in projection.axes:
            where[name] = (owner, dim)
            kept.setdefault(name, set())
        for head in heads:
            for part in projection.head_slice(head):
                kept[part.name] |= set(range(part.start, part.start + part.length))
    cuts = []
    for name, indices in kept.items():
        owner, dim = where[name]
        leaf = name.rpartition(".")[2]
        parameter: nn.Parameter = getattr(owner, leaf)
        index = torch.tensor(sorted(indices))
        if len(index) == parameter.shape[dim]:
            continue
        cuts.append(Cut(name, dim, index, parameter.shape[dim]))
        part_kept = parameter.detach().index_select(dim, index.to(parameter.device)).contiguous()
        setattr(owner, leaf, nn.Parameter(part_kept, requires_grad=parameter.requires_grad))
    for projection in _projections(block):
        _rename_widths(projection.module)
    return cuts


def _projections(block: Block) -> list[HeadProjection]:
    return [block.query, block.key, block.value, block.output]


def _rename_widths(module: nn.Module) -> None:
    weight: Any = module.weight
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    else:
        module.nx, module.nf = weight.shape


def _say_so(model: nn.Module, architecture: Architecture, sizes: Iterable[tuple[int, int]]) -> bool:
    """Writes the head counts into the configuration where the family builds the same shapes from it."""
    config = getattr(model, "config", None)
    if config is None or len(set(sizes)) != 1:
        return False
    ((n_heads, n_groups),) = set(sizes)
    changed = copy.deepcopy(config)
    try:
        changed.num_attention_heads = n_heads
        if hasattr(config, "num_key_value_heads"):
            changed.num_key_value_heads = n_groups
        changed.head_dim = architecture.head_dim
        with torch.device("meta"):
            built = type(model)(changed)
    except (ValueError, AttributeError, TypeError, RuntimeError, ZeroDivisionError):
        return False
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if {name: value.shape for name, value in built.state_dict().items()} != shapes:
        return False
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        if hasattr(changed, name):
            setattr(config, name, getattr(changed, name))
    return True


@register_compaction("gpt2")
def _gpt2(block: Block, n_heads: int, n_groups: int) -> None:
    block.attention.num_heads = n_heads  # type: ignore[assignment]
    block.attention.split_size = n_heads * block.output.layout.head_dim  # type: ignore[assignment]


@register_compaction("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi")
def _llama(block: Block, n_heads: int, n_groups: int) -> None:
    block.attention.num_key_value_groups = n_heads // n_groups  # type: ignore[assignment]


@register_compaction("phi3")
def _phi3(block: Block, n_heads: int, n_groups: int) -> None:
    attention: Any = block.attention
    attention.num_key_value_groups, attention.num_key_value_heads = n_heads // n_groups, n_groups
    # It reads the number of query heads from the configuration, which all layers share.
    attention.config = LayerConfig(attention.config, n_heads)


@register_compaction("gpt_neox")
def _gpt_neox(block: Block, n_heads: int, n_groups: int) -> None:
    """It reads the number of heads from the activations."""


@register_compaction("opt")
def _opt(block: Block, n_heads: int, n_groups: int) -> None:
    block.attention.num_heads = n_heads  # type: ignore[assignment]


@register_compaction("bert", "roberta")
def _bert(block: Block, n_heads: int, n_groups: int) -> None:
    inner: Any = block.attention.self
    inner.num_attention_heads, inner.all_head_size = n_heads, n_heads * inner.attention_head_size


class LayerConfig:
    """A configuration as one layer sees it: everything is the model's, but for the number of heads.

    Example:
        >>> from types import SimpleNamespace
        >>> shared = SimpleNamespace(num_attention_heads=8, hidden_size=64)
        >>> layer = LayerConfig(shared, 3)
        >>> layer.num_attention_heads, layer.hidden_size
        (3, 64)
    """

    def __init__(self, config: Any, num_attention_heads: int) -> None:
        self._config = config
        self.num_attention_heads = num_attention_heads

    def __getattr__(self, name: str) -> Any:
        # Copies and pickles are filled after they are made, and ask for other names before.
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)
