"""Weights that compute without gates what a gated model computes: what plain transformers loads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lightning_goldy.core.gates import HeadGates


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
    closed, copied = set(gates.closed), set()
    for layer, head in gates.heads:
        if (layer, head) not in closed and gates.values is None:
            continue
        factor = 0.0 if (layer, head) in closed or gates.values is None else float(gates.values[layer, head])
        # One factor of a product is enough: the weight itself, and of an adapter the side that sees the heads.
        for part in gates.architecture.blocks[layer].output_slice(head):
            if part.name not in copied:
                result[part.name] = result[part.name].clone()
                copied.add(part.name)
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
    rows = [
        f"| {layer} | {size} | {', '.join(str(head) for at, head in gates.closed if at == layer) or 'none'} |"
        for layer, size in enumerate(gates.heads_per_layer)
    ]
    where = (
        "Their columns of the output projections are zero, so the logits are those of the model with its gates."
        if in_weights
        else "These weights do not close them: call `HeadGates(model).disable(heads)` once loaded."
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [attention-head-pruning]",
            "---",
            "",
            "# Closed attention heads",
            "",
            f"{len(gates.closed)} of {len(gates.heads)} attention heads were closed as this was saved. {where}",
            "",
            "| layer | heads | closed |",
            "|---|---|---|",
            *rows,
            "",
            "Layers and heads count from 0.",
            "",
        ]
    )
