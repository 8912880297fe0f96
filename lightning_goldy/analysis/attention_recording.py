"""One forward pass with every layer's attention pattern shown, whatever attention kernel the model uses."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention_entropy import UnreadableAttentionError, recorded_attention
from lightning_goldy.core.architecture import Architecture, UnsupportedArchitectureError
from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import Objective, accepts, left_padding_positions

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
