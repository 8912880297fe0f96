"""Models without their closed heads: compacted modules, their files, and state that closes them anywhere."""

from __future__ import annotations

import copy
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import Architecture, Block, Head, HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.files import atomic_write
from lightning_goldy.core.naming import Registry, model_class
from lightning_goldy.core.sharding import is_sharded

CARD = "README.md"


@dataclass(frozen=True, eq=False)
class Cut:
    """What stayed of one parameter: ``index`` of ``size`` along dimension ``dim``."""

    name: str
    dim: int
    index: Tensor
    size: int

    def expanded(self, tensor: Tensor) -> Tensor:
        """The parameter in full shape, zero where it was cut.

        Example:
            >>> import torch
            >>> Cut("weight", 0, torch.tensor([1]), 3).expanded(torch.ones(1, 2)).tolist()
            [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
        """
        shape = list(tensor.shape)
        shape[self.dim] = self.size
        return tensor.new_zeros(shape).index_copy_(self.dim, self.index.to(tensor.device), tensor)


@dataclass(frozen=True)
class Compaction:
    """What was cut out of a model.

    Args:
        family: The model's family.
        heads_before: Heads of each layer before.
        heads_after: Heads of each layer after.
        closed: Heads whose gates were closed.
        removed: Those that are gone; the other closed ones stay with output columns of zero.
        cuts: What stayed of each parameter that was cut.
        smaller: Whether the saved model is smaller; otherwise it has its full shape, with zeros.
    """

    family: str
    heads_before: tuple[int, ...]
    heads_after: tuple[int, ...]
    closed: tuple[Head, ...]
    removed: tuple[Head, ...]
    cuts: tuple[Cut, ...]
    smaller: bool

    def card(self) -> str:
        """The model card, in Markdown."""
        silent = tuple(head for head in self.closed if head not in self.removed)
        rows = [
            (layer, before, after, _named(self.removed, layer), _named(silent, layer))
            for layer, (before, after) in enumerate(zip(self.heads_before, self.heads_after, strict=True))
        ]
        form = (
            "The weights are saved in the smaller shape; the configuration has the new number of heads."
            if self.smaller
            else "The weights are saved in their full shape, with zeros where heads were cut, because a configuration "
            f"of {self.family!r} cannot describe what is left. The logits are the same."
        )
        told = (
            f"{len(self.closed)} of {sum(self.heads_before)} attention heads were closed, and {len(self.removed)} of "
            "them cut out of the query, key, value and output projections."
        )
        header = ("layer", "heads before", "heads kept", "heads cut", "closed heads kept as zeros")
        return _card("Pruned attention heads", [told, form], header, rows, "as in the model before")


@dataclass(eq=False)
class CompactSaver:
    """The ``save_pretrained`` of a compacted model.

    Args:
        model: The compacted model.
        record: What was cut.
    """

    model: nn.Module
    record: Compaction

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Writes weights and configuration that ``from_pretrained`` loads, and the card ``README.md``.

        Args:
            save_directory: The folder; files of the same names are replaced, each at once.
            is_main_process: Whether this process writes.
            state_dict: The compacted model's own, when it was gathered elsewhere.
            push_to_hub: Not supported; push the folder.
            **options: As for ``PreTrainedModel.save_pretrained``.

        Raises:
            TypeError: The model is not a transformers model.
            ValueError: ``push_to_hub`` was asked for.
        """
        save = getattr(type(self.model), "save_pretrained", None)
        if save is None:
            raise TypeError(
                f"{type(self.model).__name__} has no save_pretrained; compact the transformers model inside"
            )
        if push_to_hub:
            raise ValueError("push_to_hub: save a compacted model to a folder, then push the folder")
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        if not self.record.smaller:
            for cut in self.record.cuts:
                state[cut.name] = cut.expanded(state[cut.name])
        if not is_main_process:
            return
        folder = Path(save_directory)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            save(self.model, str(partial), state_dict=state, **options)
            atomic_write(partial / CARD, self.record.card())
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(partial.iterdir()):
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
        model: A transformers model with :class:`~lightning_goldy.core.architecture.HeadGates`, or a module that
            contains one.

    Returns:
        The copy, of the same class, without gates and gradients.

    Raises:
        ValueError: The model has no gates, has adapters (merge them first), or is sharded (gather it first).
        UnsupportedArchitectureError: The family's attention modules cannot be resized.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
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
        for projection in (block.query, block.key, block.value, block.output):
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
    for module in (projection.module for projection, _ in roles):
        weight: Any = module.weight
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = weight.shape
        else:
            module.nx, module.nf = weight.shape
    return cuts


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


@torch.no_grad()
def gated_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    r"""A state in which the gates are multiplied into the attention output projections.

    .. math:: O_{:, h} \leftarrow \xi_h O_{:, h}

    with O the columns of head h and ξ its gate, 0 where it is closed: the logits are those of the gated model.

    Args:
        model: With gates or without.
        state: Whole tensors by the names of ``model.state_dict()``; not changed.

    Returns:
        The state, with copies of the tensors that the gates change.

    Raises:
        UnsupportedArchitectureError: Which weights belong to a head is not known.
        KeyError: The state lacks an output projection.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=4, vocab_size=5, n_positions=4))
        >>> HeadGates(model).disable([(0, 1)])
        >>> gated_state(model, model.state_dict())["transformer.h.0.attn.c_proj.weight"].abs().sum(1).bool().tolist()
        [True, True, False, False]
    """
    result = dict(state)
    gates = HeadGates.of(model)
    if gates is None:
        return result
    closed = set(gates.closed)
    for layer, head in gates.heads:
        if (layer, head) not in closed and gates.values is None:
            continue
        factor = 0.0 if (layer, head) in closed or gates.values is None else float(gates.values[layer, head])
        # One factor of a product is enough: the weight itself, and of an adapter the side that sees the heads.
        for part in gates.architecture.blocks[layer].output_slice(head):
            if result[part.name] is state[part.name]:
                result[part.name] = result[part.name].clone()
            result[part.name][part.index].mul_(factor)
    return result


def gates_card(model: nn.Module, *, in_weights: bool = True) -> str | None:
    """What a reader of saved weights must know of closed heads, in Markdown.

    Args:
        model: With gates or without.
        in_weights: Whether the weights are those of :func:`gated_state`.

    Returns:
        The card; None where no head is closed.
    """
    gates = HeadGates.of(model)
    if gates is None or not gates.closed:
        return None
    rows = [(layer, size, _named(gates.closed, layer)) for layer, size in enumerate(gates.heads_per_layer)]
    where = (
        "Their columns of the output projections are zero, so the logits are those of the model with its gates."
        if in_weights
        else "These weights do not close them: call `HeadGates(model).disable(heads)` once loaded."
    )
    told = f"{len(gates.closed)} of {len(gates.heads)} attention heads were closed as this was saved. {where}"
    return _card("Closed attention heads", [told], ("layer", "heads", "closed"), rows)


def _named(heads: Iterable[Head], layer: int) -> str:
    return ", ".join(str(head) for at, head in heads if at == layer) or "none"


def _card(
    title: str, paragraphs: Iterable[str], header: Sequence[str], rows: Iterable[Sequence[object]], more: str = ""
) -> str:
    """A model card with a table of layers, in Markdown."""
    table = [f"| {' | '.join(map(str, line))} |" for line in (header, *rows)]
    table.insert(1, "|---" * len(header) + "|")
    parts = [
        "---\nlibrary_name: transformers\ntags: [attention-head-pruning]\n---",
        f"# {title}",
        *paragraphs,
        "\n".join(table),
        f"Layers and heads count from 0{', ' * bool(more)}{more}.",
    ]
    return "\n\n".join(parts) + "\n"
