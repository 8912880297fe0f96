"""Where in a model the gradients of answers lie: their norms layer by layer, by plain backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.coupling import example_batch
from lightning_goldy.analysis.coupling_pieces import Pieces, joined_batch, piece_samples
from lightning_goldy.analysis.coupling_selection import Layers, Select, check_selection, selected_parameters
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import block_of
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.pieces import QUESTION_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def layer_gradient_norms(
    model: nn.Module,
    pieces: Pieces,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    template: str = QUESTION_TEMPLATE,
    select: Select = "mlp_output",
    layers: Layers = None,
) -> dict[str, Tensor]:
    r"""Norms of the gradients of the answers' log-probabilities, by block.

    .. math:: \lVert g_i^l \rVert, \qquad \lVert g_i \rVert^2 = \sum_l \lVert g_i^l \rVert^2

    One ordinary backward pass per piece, so for a few pieces only: the way that ``knowledge_coupling`` avoids, and a
    check on it. The model comes back as it was.

    Args:
        model: A plain module.
        pieces: As for ``knowledge_coupling``.
        tokenizer: The model's, for knowledge pieces.
        objective: What to differentiate; next-token prediction by default.
        template: The prompt of a knowledge piece.
        select: As for ``knowledge_coupling``.
        layers: As for ``knowledge_coupling``.

    Returns:
        By block, in the model's order, a tensor of shape ``[N]``, float64, nats per parameter unit.

    Raises:
        ValueError: A piece cannot be tokenised, or an argument is malformed.
        SpaceError: The selection matches no parameter.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> found = layer_gradient_norms(GPT2LMHeadModel(config), [{"input_ids": torch.tensor([[1, 2, 3]])}])
        >>> list(found), found["transformer.h.1"].shape
        (['transformer.h.0', 'transformer.h.1'], torch.Size([1]))
    """
    check_selection(select, layers)
    objective = objective or CausalLMObjective()
    samples = piece_samples(pieces, tokenizer=tokenizer, objective=objective, template=template)
    for index, reason in samples.failures.items():
        raise ValueError(f"{samples.name(index)}: {reason}")
    columns: dict[str, list[float]] = {}
    with preserved(model):
        parameters = selected_parameters(model, select, layers, sample_batch=example_batch(model, samples))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        device = next(model.parameters()).device
        for sample in samples.samples:
            log_prob = objective.log_probs(model, joined_batch([sample], device)).sum()
            squares = _squares(log_prob, parameters)
            for block, square in squares.items():
                columns.setdefault(block, []).append(square**0.5)
    return {block: torch.tensor(values, dtype=torch.float64) for block, values in columns.items()}


def _squares(log_prob: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    names: Sequence[str] = list(parameters)
    gradients = torch.autograd.grad(log_prob, [parameters[name] for name in names], materialize_grads=True)
    found: dict[str, float] = {}
    for name, gradient in zip(names, gradients, strict=True):
        block = block_of(name)
        found[block] = found.get(block, 0.0) + float(gradient.double().square().sum())
    return found
