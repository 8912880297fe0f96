"""One gate per attention head, at the input of the attention output projection."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture.blocks import Architecture
from lightning_goldy.core.architecture.describe import describe_architecture
from lightning_goldy.core.naming import model_class, require_choice
from lightning_goldy.core.sharding import modules_of

Head = tuple[int, int]
"""A head: (layer, head), both from 0."""


class HeadError(ValueError):
    """A head does not exist, is named twice, or must not be closed or opened now; the message names it."""


def check_heads(heads: Iterable[Head], heads_per_layer: tuple[int, ...]) -> tuple[Head, ...]:
    """The heads as pairs of integers, in the given order.

    Args:
        heads: (layer, head) pairs.
        heads_per_layer: Number of heads of each layer.

    Raises:
        HeadError: A head is no such pair, does not exist, or is named twice.

    Example:
        >>> check_heads([(0, 1), (2, 0)], (2, 2))
        Traceback (most recent call last):
        lightning_goldy.core.architecture.gates.HeadError: there is no head (2, 0): the model has 2 layers ...
    """
    checked: dict[Head, None] = {}
    for pair in heads:
        parts = tuple(pair) if isinstance(pair, (tuple, list)) else ()
        if len(parts) != 2 or not all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
            raise HeadError(f"a head is a pair (layer, head) of integers; got {pair!r}")
        layer, head = parts
        if not (0 <= layer < len(heads_per_layer) and 0 <= head < heads_per_layer[layer]):
            raise HeadError(f"there is no head {parts}: the model has {described_heads(heads_per_layer)}, from 0")
        if parts in checked:
            raise HeadError(f"head {parts} is named twice")
        checked[layer, head] = None
    return tuple(checked)


def described_heads(sizes: tuple[int, ...]) -> str:
    """How many heads a model has, for messages.

    Example:
        >>> described_heads((4, 4)), described_heads((4, 3))
        ('2 layers of 4 heads', '2 layers of 4, 3 heads')
    """
    if len(set(sizes)) == 1:
        return f"{len(sizes)} layers of {sizes[0]} heads"
    return f"{len(sizes)} layers of {', '.join(map(str, sizes))} heads"


_NO_HEAD = -1


class BatchMismatchError(RuntimeError):
    """Per-sample gates met activations of another number of samples."""


class HeadGates(nn.Module):
    r"""Opens and closes attention heads without touching the model's weights or the names in its state dict.

    .. math:: \text{output} = W_O \, [\, \xi_1 z_1; \dots; \xi_H z_H \,] + b

    where z_h is what head h computed and :math:`\xi_h` its gate, 1 when open and 0 when closed. It works below any
    attention kernel, under gradient checkpointing, with a key/value cache, under LoRA, DistributedDataParallel and
    FSDP2. A layer whose gates are all open is left alone, bit for bit. Attach gates after adapters were added.

    Gates are found again by :meth:`of`, copied with the model by ``copy.deepcopy``, and stay until :meth:`remove`. They
    have a ``state_dict`` of their own; the model's keeps its keys. As a module of a LightningModule
    (``self.gates = HeadGates(self.model)``) they are saved with it.

    Args:
        model: A model or anything that contains one; its ``torch.compile`` must come after.
        kind: ``buffer`` for gates of 0 and 1; ``parameter`` for trainable ones (``values``, float32, from 1), of which
            the closed are 0 whatever their value. DistributedDataParallel averages the gradient of ``values`` only if
            the gates are part of the module that it wraps.
        architecture: The model's description; found when None. That of a decoder alone gates the decoder's heads.
        sample_batch: What a model of an unregistered family can be called with to find its heads; made up when None.

    Raises:
        HeadError: The model has gates already.
        UnsupportedArchitectureError: The model has no attention that could be found.
        ValueError: ``kind`` is unknown, or the model is compiled, whose code would not call the gates.

    Source: Michel et al. 2019, "Are Sixteen Heads Really Better than One?", section 2.2.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
        >>> gates = HeadGates(model)
        >>> gates.disable([(0, 1)])
        >>> gates.closed, gates.opened, HeadGates.of(model) is gates
        (((0, 1),), ((0, 0), (1, 0), (1, 1)), True)
    """

    closing: Tensor

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: Literal["buffer", "parameter"] = "buffer",
        architecture: Architecture | None = None,
        sample_batch: Any = None,
    ) -> None:
        super().__init__()
        require_choice("kind of gates", kind, ("buffer", "parameter"))
        parts = modules_of(model)
        if any("_orig_mod" in part._modules or part._compiled_call_impl is not None for part in parts):
            raise ValueError(f"{model_class(model)} is compiled: compiled code would not call the gates; gate it first")
        if HeadGates.of(model) is not None:
            raise HeadError(f"{model_class(model)} has gates already: HeadGates.of(model) finds them")
        # In a tuple, so that the blocks' modules do not become modules of the gates.
        self._described = (architecture or describe_architecture(model, sample_batch=sample_batch),)
        # Refuses attention that could not be told; a layer without attention has no head.
        described = {block.index for block in self.architecture.attention_blocks}
        self._sizes = tuple(block.n_heads * (block.index in described) for block in self.architecture.blocks)
        device = next(model.parameters()).device
        # Hooks of validation run in inference mode, whose tensors could not be written to later.
        with torch.inference_mode(False):
            closing = torch.full((len(self._sizes), max(self._sizes)), _NO_HEAD, device=device)
            for layer, size in enumerate(self._sizes):
                closing[layer, :size] = 0
            # When each head was closed: the n-th closing is n, an open head 0, and where there is no head -1.
            self.register_buffer("closing", closing)
            self.values = nn.Parameter(torch.ones(closing.shape, device=device)) if kind == "parameter" else None
        self._order: dict[Head, int] = {}
        self._factors: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}
        self._measured: Tensor | None = None
        for layer, block in enumerate(self.architecture.blocks):
            if block.has_attention:
                block.attention_output.register_forward_pre_hook(_LayerGate(self, layer))

    @staticmethod
    def of(model: nn.Module) -> HeadGates | None:
        """The gates of a model, None when it has none."""
        hooks = (hook for module in modules_of(model) for hook in module._forward_pre_hooks.values())
        return next((hook.gates for hook in hooks if isinstance(hook, _LayerGate)), None)

    @property
    def architecture(self) -> Architecture:
        """The description of the gated model."""
        return self._described[0]

    @property
    def heads_per_layer(self) -> tuple[int, ...]:
        """Number of heads of each layer, closed ones included."""
        return self._sizes

    @property
    def heads(self) -> tuple[Head, ...]:
        """All heads, by layer."""
        return tuple((layer, head) for layer, size in enumerate(self._sizes) for head in range(size))

    @property
    def closed(self) -> tuple[Head, ...]:
        """The closed heads, by layer."""
        return tuple(sorted(self._order))

    @property
    def opened(self) -> tuple[Head, ...]:
        """The open heads, by layer."""
        return tuple(head for head in self.heads if head not in self._order)

    @property
    def last_closed(self) -> tuple[Head, ...]:
        """The closed heads, the one closed last first; of heads closed together, the last named first."""
        return tuple(sorted(self._order, key=lambda head: -self._order[head]))

    def disable(self, heads: Iterable[Head]) -> None:
        """Closes heads, in this order; those that are closed already keep their place.

        Raises:
            HeadError: A head does not exist or is named twice.
        """
        for head in self.check(heads):
            if head not in self._order:
                self._order[head] = max(self._order.values(), default=0) + 1
        self._write()

    def enable(self, heads: Iterable[Head]) -> None:
        """Opens heads; those that are open already stay so.

        Raises:
            HeadError: A head does not exist or is named twice.
        """
        for head in self.check(heads):
            self._order.pop(head, None)
        self._write()

    def check(self, heads: Iterable[Head]) -> tuple[Head, ...]:
        """The heads as pairs of integers, in the given order.

        Raises:
            HeadError: A head does not exist or is named twice.
        """
        return check_heads(heads, self._sizes)

    @contextmanager
    def closing_only(self, heads: Iterable[Head]) -> Iterator[None]:
        """Closes exactly these heads for the length of a ``with`` block."""
        before, self._order = self._order, {head: place for place, head in enumerate(self.check(heads), 1)}
        self._factors.clear()
        try:
            yield
        finally:
            self._order = before
            self._factors.clear()

    @contextmanager
    def measured(self, n_samples: int) -> Iterator[Tensor]:
        r"""Gates as a leaf of the graph, one set per sample, for :math:`\partial L_i / \partial \xi_h`.

        Args:
            n_samples: Rows of the batches that the model is called with inside.

        Yields:
            Gates of shape ``[n_samples, layers, heads]``, float32, of the present values (0 where closed), which
            require a gradient. A closed head has one too.

        Raises:
            BatchMismatchError: When the model is called with another number of rows.
        """
        present = torch.ones_like(self.closing, dtype=torch.float32) if self.values is None else self.values.detach()
        present = present.masked_fill(self._closed_mask(present.device), 0)
        self._measured = present.expand(n_samples, -1, -1).clone().requires_grad_()
        try:
            yield self._measured
        finally:
            self._measured = None

    def remove(self) -> None:
        """Takes the gates off the model, which then computes with all heads again."""
        for block in self.architecture.attention_blocks:
            hooks = block.attention_output._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _LayerGate) and hook.gates is self]:
                del hooks[key]

    def apply_to(self, layer: int, heads: Tensor) -> Tensor:
        """The concatenated heads of a layer, shape ``[..., heads * head_dim]``, each times its gate, dtype kept."""
        layout = self.architecture.blocks[layer].output.layout
        if heads.shape[-1] != layout.n_heads * layout.head_dim:
            raise HeadError(
                f"{self.architecture.blocks[layer].attention_output_name!r} was called with width {heads.shape[-1]}, "
                f"not {layout.n_heads} heads x {layout.head_dim}: under tensor parallelism heads cannot be gated"
            )
        if self._measured is not None:
            return _gated_by_sample(heads, self._measured[:, layer, : layout.n_heads], layout.head_dim)
        if self.values is None:
            factor = self._factor(layer, heads)
            return heads if factor is None else heads * factor
        gates = self.values[layer].masked_fill(self._closed_mask(self.values.device)[layer], 0)[: layout.n_heads]
        return heads * gates.to(heads.device, heads.dtype).repeat_interleave(layout.head_dim)

    def _factor(self, layer: int, heads: Tensor) -> Tensor | None:
        """The gates of a layer, shape [heads * head_dim]; None when all are open."""
        closed = [head for at, head in self._order if at == layer]
        if not closed:
            return None
        key = (layer, heads.device, heads.dtype)
        if key not in self._factors:
            layout = self.architecture.blocks[layer].output.layout
            gates = torch.ones(layout.n_heads, dtype=heads.dtype)
            gates[closed] = 0
            # Outside inference mode, or a later backward pass could not use it.
            with torch.inference_mode(False):
                self._factors[key] = gates.repeat_interleave(layout.head_dim).to(heads.device)
        return self._factors[key]

    def _closed_mask(self, device: torch.device) -> Tensor:
        mask = torch.zeros(self.closing.shape, dtype=torch.bool)
        for head in self._order:
            mask[head] = True
        return mask.to(device)

    def _write(self) -> None:
        self._factors.clear()
        order = self.closing.detach().clamp(max=0)
        for head, place in self._order.items():
            order[head] = place
        with torch.no_grad():
            self.closing.copy_(order)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}closing")
        if saved is not None:
            sizes = tuple(int(row) for row in (saved != _NO_HEAD).sum(dim=1))
            if sizes != self._sizes:
                raise HeadError(
                    f"the saved gates are of {described_heads(sizes)}, the model has {described_heads(self._sizes)}; "
                    "gates cannot be carried over to a model with other heads"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._order = {
            (layer, head): place
            for layer, row in enumerate(self.closing.tolist())
            for head, place in enumerate(row)
            if place > 0
        }
        self._factors.clear()

    def extra_repr(self) -> str:
        """How many heads are closed."""
        return f"{len(self._order)} of {len(self.heads)} heads closed"


class _LayerGate:
    """The hook of one layer; a class, so that gates are found again, and copied with the model."""

    def __init__(self, gates: HeadGates, layer: int) -> None:
        self.gates = gates
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        gated = self.gates.apply_to(self.layer, args[0])
        return None if gated is args[0] else (gated, *args[1:])


def _gated_by_sample(heads: Tensor, gates: Tensor, head_dim: int) -> Tensor:
    n_samples, n_heads = gates.shape
    if heads.shape[0] % n_samples or heads.shape[0] == 0:
        raise BatchMismatchError(f"gates of {n_samples} samples met activations of shape {tuple(heads.shape)}")
    parts = heads.reshape(n_samples, -1, n_heads, head_dim)  # [B, T, H x D] -> [B, T, H, D]
    weights = gates.to(heads.device, heads.dtype)[:, None, :, None]  # [B, 1, H, 1]
    return (parts * weights).reshape(heads.shape)
