"""What a description of a model consists of: blocks, projections, stacked experts, and the weights of each head.

Every name is a dotted name within the model that was described, without what wrappers add (DistributedDataParallel,
``torch.compile``, activation checkpointing).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from lightning_goldy.core.naming import canonical_name, model_class, require_choice


class UnsupportedArchitectureError(ValueError):
    """The parts of a model could not be told apart; the message says which, and how to register them."""


def require_next_tokens(model: nn.Module, ids: Tensor, logits: Tensor, what: str) -> None:
    """Checks that a model has logits at every token, as a causal language model.

    Args:
        model: For the message.
        ids: Token ids, shape ``[B, T]``.
        logits: What it made of them.
        what: Whose need it is, for the message.

    Raises:
        UnsupportedArchitectureError: They are of another shape, such as a classifier's.

    Example:
        >>> require_next_tokens(nn.Linear(1, 1), Tensor([[1]]), Tensor([[1]]), "circuits")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        lightning_goldy.core.architecture.blocks.UnsupportedArchitectureError: circuits are those of a causal ...
    """
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise UnsupportedArchitectureError(
            f"{what} are those of a causal language model; {model_class(model)} gives logits of shape "
            f"{tuple(logits.shape)} for tokens of shape {tuple(ids.shape)}"
        )


@dataclass(frozen=True)
class NamedModule:
    """A module and its dotted name within the model."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class ParameterSlice:
    """The range ``start : start + length`` of dimension ``dim`` of one parameter.

    Args:
        name: Canonical dotted name of the parameter within the model.
        owner: The module that holds the parameter.

    Example:
        >>> part = ParameterSlice("proj.weight", nn.Linear(6, 2), dim=1, start=2, length=2)
        >>> part.of(part.parameter).shape, part.index
        (torch.Size([2, 2]), (slice(None, None, None), slice(2, 4, None)))
    """

    name: str
    owner: nn.Module
    dim: int
    start: int
    length: int

    @property
    def parameter(self) -> nn.Parameter:
        """The whole parameter, looked up now: sharding swaps the objects that a module holds."""
        return getattr(self.owner, self.name.rpartition(".")[2])

    @property
    def index(self) -> tuple[slice, ...]:
        """What to index a tensor of the parameter's shape with."""
        return (*[slice(None)] * self.dim, slice(self.start, self.start + self.length))

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor that has the parameter's shape (a value, gradient, mask, moment); a view."""
        return tensor.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class HeadLayout:
    """Where heads lie along a dimension: head h is ``head_dim`` indices from ``offset + h * stride``.

    For keys and values the heads are key/value groups. A stride of 0 stands for ``head_dim``. With a ``run`` above 1 so
    many heads lie side by side before the next stride: head h begins at
    ``offset + h // run * stride + h % run * head_dim``.
    """

    n_heads: int
    head_dim: int
    offset: int = 0
    stride: int = 0
    run: int = 1

    def start(self, head: int) -> int:
        """Where a head starts; an IndexError where there is no such head."""
        if not 0 <= head < self.n_heads:
            raise IndexError(f"head {head}: there are {self.n_heads} heads, 0 to {self.n_heads - 1}")
        return self.offset + head // self.run * (self.stride or self.head_dim) + head % self.run * self.head_dim


@dataclass(frozen=True)
class HeadProjection:
    """A projection, and which of its weights belong to which head.

    Args:
        name: Dotted name of the module.
        module: The projection as the block calls it (a LoRA layer where there is one).
        layout: Where the heads lie.
        axes: The owner, canonical parameter name and dimension of every tensor that the heads divide: the weight, then
            the bias of a query, key or value projection (an output bias belongs to no head), then LoRA factors.
        obstacle: Why heads cannot be cut out of this module's weights; empty when they can.
    """

    name: str
    module: nn.Module
    layout: HeadLayout
    axes: tuple[tuple[nn.Module, str, int], ...]
    obstacle: str = ""

    def head_slice(self, head: int) -> tuple[ParameterSlice, ...]:
        """Everything that one head owns here, the weight first.

        Args:
            head: The head; for keys and values, the key/value group.

        Returns:
            One slice per parameter. Zeroing all of them silences the head's part of this projection.

        Raises:
            IndexError: There is no such head.
            UnsupportedArchitectureError: The weights are packed, parametrized, or adapted by something other than LoRA.
        """
        start = self.layout.start(head)
        if self.obstacle:
            raise UnsupportedArchitectureError(f"the heads of {self.name!r} share weights: {self.obstacle}")
        return tuple(ParameterSlice(name, owner, dim, start, self.layout.head_dim) for owner, name, dim in self.axes)


@dataclass(frozen=True)
class QueryKeyValue:
    """The projections that make queries, keys and values; the same module three times where they are fused."""

    query: HeadProjection
    key: HeadProjection
    value: HeadProjection


@dataclass(frozen=True)
class Missing:
    """In the place of a part that a block lacks (``absent``), or that it has and that could not be told apart."""

    reason: str
    absent: bool = False


@dataclass(frozen=True)
class Attention:
    """The attention of a block.

    Args:
        name: Dotted name of the module.
        module: What contains the attention function and the output projection.
        output: The output projection; its input is the concatenation of the heads.
        n_key_value_heads: Number of key/value groups.
        query_key_value: The projections before attention; None where a probe could not tell them apart.
    """

    name: str
    module: nn.Module
    output: HeadProjection
    n_key_value_heads: int
    query_key_value: QueryKeyValue | None


@dataclass(frozen=True)
class MLP:
    """The MLP of a block.

    Args:
        parts: Its modules, in order of call: one in most families, ``fc1`` and ``fc2`` in OPT, ``intermediate`` and
            ``output`` (with the residual and its norm) in BERT.
        output: What makes its output: the output projection, or the whole mixture where there are experts.
        writers: The projections and the stacks of experts whose weights make that output, shared experts included.
        between: Of two parts what of the block makes the output projection's input from what the first part gives: the
            name of its activation, empty where nothing does, None where it is unknown.
    """

    parts: tuple[NamedModule, ...]
    output: NamedModule
    writers: tuple[NamedModule, ...]
    between: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Block:
    """One transformer block. Attention and MLP stand alone: what is missing is refused where it is asked for.

    Args:
        index: Position, from 0.
        name: Dotted name of the block.
        module: The block.
        attention_part: Its attention, or why there is none.
        mlp_part: Its MLP, or why there is none.
    """

    index: int
    name: str
    module: nn.Module
    attention_part: Attention | Missing
    mlp_part: MLP | Missing

    @property
    def has_attention(self) -> bool:
        """False for a block without attention, as hybrids have; one whose attention could not be told has it."""
        return not (isinstance(self.attention_part, Missing) and self.attention_part.absent)

    @property
    def has_mlp(self) -> bool:
        """False for a block without an MLP; one whose MLP could not be told has it."""
        return not (isinstance(self.mlp_part, Missing) and self.mlp_part.absent)

    def _attention(self) -> Attention:
        if isinstance(self.attention_part, Missing):
            raise UnsupportedArchitectureError(f"{self.name!r}: {self.attention_part.reason}")
        return self.attention_part

    def _mlp(self) -> MLP:
        if isinstance(self.mlp_part, Missing):
            raise UnsupportedArchitectureError(f"{self.name!r}: {self.mlp_part.reason}")
        return self.mlp_part

    @property
    def attention_name(self) -> str:
        """Dotted name of the attention module."""
        return self._attention().name

    @property
    def attention(self) -> nn.Module:
        """The module that contains the attention function and the output projection."""
        return self._attention().module

    @property
    def output(self) -> HeadProjection:
        """The attention output projection and its heads."""
        return self._attention().output

    @property
    def n_key_value_heads(self) -> int:
        """Number of key/value groups; 0 without attention."""
        return self._attention().n_key_value_heads if self.has_attention else 0

    @property
    def query_key_value(self) -> QueryKeyValue | None:
        """The projections before attention; None where a probe could not tell them apart."""
        return self._attention().query_key_value

    @property
    def attention_output(self) -> nn.Module:
        """The attention output projection as the block calls it; a forward pre-hook there sees the heads."""
        return self.output.module

    @property
    def attention_output_name(self) -> str:
        """Dotted name of the attention output projection."""
        return self.output.name

    @property
    def mlp_parts(self) -> tuple[NamedModule, ...]:
        """What makes up the MLP, in order of call."""
        return self._mlp().parts

    @property
    def mlp(self) -> nn.Module | None:
        """The one module that maps the MLP's input to its output; None where ``mlp_parts`` has several."""
        return self.mlp_parts[0].module if len(self.mlp_parts) == 1 else None

    @property
    def mlp_input(self) -> nn.Module:
        """The module whose input is the MLP's input, in every family."""
        return self.mlp_parts[0].module

    @property
    def mlp_output_part(self) -> NamedModule:
        """The MLP output projection; of a mixture of experts the whole mixture, routed and shared experts."""
        return self._mlp().output

    @property
    def mlp_output(self) -> nn.Module:
        """The module whose output is the MLP's (before dropout and norms) in every family."""
        return self.mlp_output_part.module

    @property
    def mlp_output_name(self) -> str:
        """Dotted name of ``mlp_output``."""
        return self.mlp_output_part.name

    @property
    def mlp_between(self) -> str | None:
        """What of the block stands between the two parts of an MLP; see :class:`MLP`."""
        return self._mlp().between

    @property
    def mlp_writers(self) -> tuple[NamedModule, ...]:
        """The projections and stacks of experts whose weights make the MLP's output: all of them, routed and shared."""
        return self._mlp().writers

    @property
    def query(self) -> HeadProjection:
        """The query projection."""
        return self._projections().query

    @property
    def key(self) -> HeadProjection:
        """The key projection; its heads are key/value groups."""
        return self._projections().key

    @property
    def value(self) -> HeadProjection:
        """The value projection; its heads are key/value groups."""
        return self._projections().value

    def _projections(self) -> QueryKeyValue:
        if self.query_key_value is None:
            what = f"the query, key and value projections of {self.attention_name!r} are fused or unusually named"
            raise UnsupportedArchitectureError(f"{what}: describe the family with @register_architecture")
        return self.query_key_value

    @property
    def n_heads(self) -> int:
        """Number of query heads of this block; 0 without attention."""
        return self.output.layout.n_heads if self.has_attention else 0

    def key_value_head(self, head: int) -> int:
        """The key/value group that serves a query head."""
        self.output.layout.start(head)  # refuses a head that does not exist
        return head // (self.n_heads // self.n_key_value_heads)

    def query_heads(self, group: int) -> range:
        """The query heads that a key/value group serves."""
        if not 0 <= group < self.n_key_value_heads:
            raise IndexError(f"key/value group {group} of {self.name!r}: there are {self.n_key_value_heads}, from 0")
        size = self.n_heads // self.n_key_value_heads
        return range(group * size, (group + 1) * size)

    def output_slice(self, head: int) -> tuple[ParameterSlice, ...]:
        """What one query head owns of the output projection."""
        return self.output.head_slice(head)


@dataclass(frozen=True)
class Architecture:
    """The transformer blocks of a model.

    Args:
        family: The configuration's ``model_type`` (the class name for a model without one).
        source: Whether the family is registered or was probed.
        blocks: In order of depth; of an encoder-decoder those of the encoder, then those of the decoder, whose
            attention to the encoder is no part of the description.
        n_heads: Query heads per block, as configured; a block whose heads were removed has its own ``n_heads``.
        n_key_value_heads: Key/value groups per block, as configured.
        head_dim: Width of one head at the input of the output projection.
        stacks: ``encoder`` and ``decoder`` of an encoder-decoder, as far as they are described.
    """

    family: str
    source: Literal["registry", "probe"]
    blocks: tuple[Block, ...]
    n_heads: int
    n_key_value_heads: int
    head_dim: int
    stacks: tuple[str, ...] = ()

    @property
    def attention_blocks(self) -> tuple[Block, ...]:
        """The blocks that have attention; an UnsupportedArchitectureError where none has or one could not be told."""
        blocks = tuple(block for block in self.blocks if block.has_attention)
        if not blocks:
            raise UnsupportedArchitectureError(
                f"no block of this {self.family!r} has attention: it has no heads and no attention patterns"
            )
        return tuple(block for block in blocks if block.attention is not None)

    @property
    def mlp_blocks(self) -> tuple[Block, ...]:
        """The blocks that have an MLP; an UnsupportedArchitectureError where none has or one could not be told."""
        blocks = tuple(block for block in self.blocks if block.has_mlp)
        if not blocks:
            raise UnsupportedArchitectureError(f"no block of this {self.family!r} has an MLP")
        return tuple(block for block in blocks if block.mlp_output is not None)

    def block_of(self, module: nn.Module) -> Block | None:
        """The block that contains a module (by identity), None for modules outside all blocks."""
        return next((block for block in self.blocks if any(part is module for part in block.module.modules())), None)


def require_stack(stack: str) -> None:
    """Checks the name of a stack.

    Raises:
        UnsupportedArchitectureError: It means a decoder's attention to its encoder.
        ValueError: It is no stack.
    """
    if "cross" in stack:
        raise UnsupportedArchitectureError(
            f"stack={stack!r}: a decoder's attention to its encoder is no part of a description, and neither its "
            "heads nor its patterns are analysed; stack is 'encoder' or 'decoder'"
        )
    require_choice("stack", stack, ("encoder", "decoder"))


_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
_OUTPUT = re.compile(r"down|w2|output|proj_out")


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters of which each expert has a slice along the first dimension, by their own names.

    A matrix per expert tells the stack; vectors per expert beside it are its biases. A router has rows alone.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
        >>> {name: tuple(value.shape) for name, value in stacked_parameters(MixtralExperts(config)).items()}
        {'gate_up_proj': (3, 12, 8), 'down_proj': (3, 8, 6)}
    """
    own = {name: value for name, value in module._parameters.items() if value is not None and value.ndim > 1}
    if all(value.ndim != 3 for value in own.values()):
        return {}
    counts = {value for name in _COUNTS if isinstance(value := getattr(module, name, None), int)}
    stacked = {name: value for name, value in own.items() if value.shape[0] in counts}
    return stacked if any(value.ndim == 3 for value in stacked.values()) else {}


def without_adapters(module: nn.Module) -> nn.Module:
    """The module below adapters, which PEFT nests where several parameters of one module are adapted."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts, adapted or not."""
    return bool(stacked_parameters(without_adapters(module)))


def output_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight that makes the output of a projection or of a stack of experts, below adapters; None without.

    Of several stacked matrices the one that is named so, or the last.
    """
    base = without_adapters(module)
    matrices = [(name, value) for name, value in stacked_parameters(base).items() if value.ndim == 3]
    if not matrices:
        return base._parameters.get("weight")
    return next((value for name, value in matrices if _OUTPUT.search(name)), matrices[-1][1])


def expert_counts(model: nn.Module) -> Mapping[str, int]:
    """How many experts each stacked parameter of a model holds, by canonical name.

    Example:
        >>> expert_counts(nn.Linear(2, 2))
        {}
    """
    return {
        canonical_name(f"{path}.{name}" if path else name): len(value)
        for path, module in model.named_modules()
        for name, value in stacked_parameters(module).items()
    }


def expert_of(name: str) -> tuple[str, int | None]:
    """The stack and the number of an expert that is named by it; the name itself and None of anything else.

    Example:
        >>> expert_of("experts.down_proj[12]"), expert_of("router.weight")
        (('experts.down_proj', 12), ('router.weight', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def of_expert(name: str, stack: Tensor) -> Tensor:
    """The part of a parameter that a name means: one expert of a stack, or all of it."""
    expert = expert_of(name)[1]
    return stack if expert is None else stack[expert]


def expert_names(names: Iterable[str], experts: Mapping[str, int]) -> tuple[str, ...]:
    """Parameters by name, a stack expert by expert.

    Args:
        names: Canonical names.
        experts: What :func:`expert_counts` gave.

    Example:
        >>> expert_names(["router.weight", "experts.down_proj"], {"experts.down_proj": 2})
        ('router.weight', 'experts.down_proj[0]', 'experts.down_proj[1]')
    """
    return tuple(
        row
        for name in names
        for row in ([f"{name}[{expert}]" for expert in range(experts[name])] if name in experts else [name])
    )
