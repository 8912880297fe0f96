"""Attention weights recorded under any kernel, and the entropy of their rows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention.rows import additive_mask, entropies, over_keys, visible_keys
from lightning_goldy.core.architecture import Architecture, UnsupportedArchitectureError
from lightning_goldy.core.architecture.gates import BatchMismatchError
from lightning_goldy.core.batches import batch_tensors, map_batch
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import Objective, accepts, left_padding_positions

Sink = Callable[[nn.Module, Tensor, Tensor | None], None]
"""``sink(attention module, weights [B, H, Tq, Tk], additive mask [B, 1, Tq, Tk])``"""

_NAME = "goldy_recorded"
_SINK: ContextVar[Sink] = ContextVar("attention sink")


class UnreadableAttentionError(UnsupportedArchitectureError):
    """A model's attention patterns cannot be read.

    Args:
        reason: Which model, and why; the message adds what the importance of heads can be had from instead.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; use a strategy that needs gradients or losses only: magnitude, taylor, ablation, random"


@contextmanager
def recorded_attention(model: nn.Module, sink: Sink) -> Iterator[None]:
    """Shows every attention pattern to a function, computed by the family's own eager attention.

    Args:
        model: A transformers model or anything that contains one; its implementation is restored after.
        sink: Called once per attention function, in order.

    Raises:
        UnreadableAttentionError: The model does not take its attention function from ``AttentionInterface``.
    """
    _register()
    owner: Any = next((part for part in model.modules() if hasattr(part, "set_attn_implementation")), None)
    if owner is None:
        raise UnreadableAttentionError(
            f"{model_class(model)} is no transformers model, so its attention patterns cannot be read"
        )
    configs = _configurations(model)
    before = [config._attn_implementation_internal for config in configs]
    token = _SINK.set(sink)
    try:
        # The only change of shape that it makes is in configurations, so a sharded model stays as it is.
        owner.set_attn_implementation(_NAME)
        if any(config._attn_implementation_internal != _NAME for config in configs):
            _refuse(owner)
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation
        _SINK.reset(token)


def row_entropies(weights: Tensor, mask: Tensor | None, queries: Tensor | None) -> Tensor:
    r"""Mean normalised entropy of each head's attention rows, sample by sample.

    .. math:: \frac{1}{|R|} \sum_{t \in R} \frac{-\sum_s a_{ts} \log a_{ts}}{\log n_t}

    where n_t is how many keys query t sees and R are the queries that are no padding and see at least two.

    Args:
        weights: Attention weights, shape ``[B, H, Tq, Tk]``.
        mask: As for :func:`~lightning_goldy.analysis.attention.rows.visible_keys`.
        queries: True where a query is no padding, shape ``[B, Tq]``; None when none is.

    Returns:
        Shape ``[B, H]``, a fraction in [0, 1] (1 is uniform attention) where rows add up to 1, which they do not beside
        an attention sink; NaN for samples without such a row.

    Example:
        >>> row_entropies(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]), None, None).item()
        0.5
    """
    weights = over_keys(weights, mask)
    n_visible = visible_keys(weights, mask).sum(dim=-1)  # [B, Tq]
    rows = n_visible > 1 if queries is None else (n_visible > 1) & queries
    shares = entropies(weights.float()) / n_visible.clamp_min(2).log()[:, None]  # [B, H, Tq]
    count = rows.sum(dim=-1, keepdim=True)  # [B, 1]
    return torch.where(rows[:, None], shares, 0.0).sum(dim=-1) / torch.where(count > 0, count, torch.nan)


class EntropyRecorder:
    """Gathers the entropies of one forward pass, layer by layer.

    Args:
        architecture: Whose attention modules are told apart.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core.architecture.describe import describe_architecture
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> recorder = EntropyRecorder(describe_architecture(model))
        >>> with recorder.watching(model, {"input_ids": torch.tensor([[1, 2, 3]])}), torch.no_grad():
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> [tuple(layer.shape) for layer in recorder.entropies()]
        [(1, 2), (1, 2)]
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._layers = {id(part): block.index for block in architecture.blocks for part in block.attention.modules()}
        self._found: dict[int, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module, batch: Any) -> Iterator[None]:
        """Records the forward pass of a batch, whose ``attention_mask`` says which queries are padding.

        Raises:
            BatchMismatchError: When the model is called with another number of rows.
        """
        n_samples = batch_length(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        queries = mask != 0 if mask is not None and mask.ndim == 2 else None
        self._found.clear()

        def sink(module: nn.Module, weights: Tensor, additive: Tensor | None) -> None:
            layer = self._layers.get(id(module))
            if layer is not None:
                if len(weights) != n_samples:
                    raise BatchMismatchError(f"{n_samples} samples gave attention of shape {tuple(weights.shape)}")
                self._found[layer] = row_entropies(weights.detach(), additive, queries)

        with recorded_attention(model, sink):
            yield

    def entropies(self) -> list[Tensor]:
        """Entropies of each layer, shape ``[B, H]`` each.

        Raises:
            UnreadableAttentionError: A layer computed its attention in another way.
        """
        for block in self._architecture.blocks:
            if block.index not in self._found:
                _refuse(block.attention, f" in {block.attention_name!r}")
        return [self._found[block.index] for block in self._architecture.blocks]


def batch_length(batch: Any) -> int:
    """Number of samples of a batch.

    Raises:
        ValueError: The batch holds no tensor, or tensors of different lengths.
    """
    shapes = [tuple(tensor.shape) for tensor in batch_tensors(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"a batch's tensors must share their first dimension; found shapes {shapes}")
    return shapes[0][0]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _recorded)
    # Without a mask function of its own, the mask would be None and attention silently not causal.
    AttentionMaskInterface.register(_NAME, eager_mask)


def _recorded(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    # The family's own: it knows of soft caps, sinks and groups. FSDP2 puts a class of its own before the family's.
    homes = (sys.modules.get(parent.__module__) for parent in type(module).__mro__)
    found: Iterator[Any] = (getattr(home, "eager_attention_forward", None) for home in homes)
    eager = next((function for function in found if function is not None), None)
    if eager is None:
        return _refuse(module)
    attention_mask = additive_mask(attention_mask, query.dtype)
    output = eager(module, query, key, value, attention_mask, **options)
    _SINK.get()(module, output[1], attention_mask)
    return output


def _configurations(model: nn.Module) -> list[Any]:
    found = (getattr(part, "config", None) for part in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())


def _refuse(module: Any, where: str = "") -> Any:
    raise UnreadableAttentionError(
        f"{model_class(module)} ignores set_attn_implementation{where}, so its attention patterns cannot be read"
    )


LayerSink = Callable[[int, Tensor, "Tensor | None"], None]
"""``sink(layer, weights [B, H, T, T], additive mask [B, 1, T, T])``"""


def show_patterns(
    model: nn.Module,
    architecture: Architecture,
    batch: Any,
    objective: Objective | None,
    sink: LayerSink,
    *,
    layers: Collection[int] | None = None,
) -> None:
    """Runs the model once on a batch and shows each layer's pattern as soon as it exists.

    Args:
        model: In evaluation mode.
        architecture: Its blocks.
        batch: On the model's device.
        objective: Calls the model; None calls it with everything of the batch but its labels.
        sink: Called once per layer, in order; it must not keep more than it needs.
        layers: Only these; all by default.

    Raises:
        UnsupportedArchitectureError: The patterns of a layer cannot be read.
        ValueError: A layer ran more than once.
    """
    wanted = {block.index for block in architecture.blocks} if layers is None else set(layers)
    owners = {id(part): block.index for block in architecture.blocks for part in block.attention.modules()}
    seen: set[int] = set()

    def show(module: nn.Module, weights: Tensor, mask: Tensor | None) -> None:
        layer = owners.get(id(module))
        if layer is None or layer not in wanted:
            return
        if layer in seen:
            raise ValueError(
                f"layer {layer} ran its attention twice in one pass over a batch; its rows must go through together"
            )
        seen.add(layer)
        sink(layer, weights.detach(), mask)

    try:
        with recorded_attention(model, show), torch.no_grad():
            _call(model, batch, objective)
    except UnreadableAttentionError as error:
        raise UnsupportedArchitectureError(
            f"{error.reason}; attention can be read of transformers families that take their attention function from "
            "AttentionInterface, such as gpt2, llama, gpt_neox, qwen3, gemma3_text, bert"
        ) from error
    missing = sorted(wanted - seen)
    if missing:
        raise UnsupportedArchitectureError(
            f"{model_class(model)}: layers {missing} computed their attention in another way than through "
            "AttentionInterface, so their patterns cannot be read"
        )


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """The batch where the model's parameters are."""
    device = next(model.parameters()).device
    return map_batch(batch, lambda tensor: tensor.to(device))


def _call(model: nn.Module, batch: Any, objective: Objective | None) -> None:
    if objective is not None:
        objective.loss(model, batch)
        return
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    mask = inputs.get("attention_mask")
    if mask is not None and "position_ids" not in inputs and accepts(model, "position_ids"):
        inputs.update(left_padding_positions(mask))
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    model(**inputs)
