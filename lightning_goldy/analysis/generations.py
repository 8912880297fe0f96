"""What a model writes with and without a mask: texts, token agreement, divergence per token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.continuations import (
    Prompt,
    agreement,
    check_generation_arguments,
    continuation,
    continued_batch,
    encode_prompts,
    generation_settings,
)
from lightning_goldy.analysis.divergence import AnchoredDivergence
from lightning_goldy.analysis.masked_divergence import MaskedModel
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.packing import require_boolean
from lightning_goldy.core.sharding import is_sharded, local, scatter_like
from lightning_goldy.core.vector import ParameterVector

__all__ = ["GenerationComparison", "Prompt", "agreement", "check_generation_arguments", "compare_generations"]


@dataclass(frozen=True)
class GenerationComparison(AnalysisResult):
    """Continuations of each prompt by the model and by the masked model.

    Args:
        prompts: As text.
        plain: Continuations by the whole model.
        masked: Continuations by the masked model, drawn with the same seeds.
        agreement: Share of positions with the same token, a fraction of the longer continuation, per prompt.
        kl_per_token: Mean divergence of the masked model from the whole one along the whole one's continuation, nats
            per token, per prompt.
        count: Masked elements.
        numel: Elements of the mask's space.
    """

    prompts: tuple[str, ...]
    plain: tuple[str, ...]
    masked: tuple[str, ...]
    agreement: tuple[float, ...]
    kl_per_token: tuple[float, ...]
    count: int
    numel: int

    @property
    def mean_agreement(self) -> float:
        """Mean over the prompts, a fraction."""
        return math.fsum(self.agreement) / len(self.agreement)

    @property
    def mean_kl_per_token(self) -> float:
        """Mean over the prompts, nats per token."""
        return math.fsum(self.kl_per_token) / len(self.kl_per_token)

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able entry per prompt."""
        columns = zip(self.prompts, self.plain, self.masked, self.agreement, self.kl_per_token, strict=True)
        names = ("prompt", "plain", "masked", "agreement", "kl_per_token")
        return [dict(zip(names, values, strict=True)) for values in columns]


def compare_generations(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    mask: ParameterVector,
    *,
    max_new_tokens: int = 100,
    do_sample: bool = True,
    temperature: float = 0.7,
    seed: int = 0,
) -> GenerationComparison:
    r"""Continues each prompt with the whole and with the masked model, from the same random state.

    .. math:: \frac1T \sum_t \mathrm{KL}\big(p_\theta(\cdot \mid x, y_{<t}) \,\|\,
        p_{\theta \odot (1 - m)}(\cdot \mid x, y_{<t})\big), \qquad y \sim p_\theta(\cdot \mid x)

    The prompts are continued one by one, so nothing is padded, and each has a seed of its own, so that its continuation
    does not depend on the others. The model comes back as it was, to the bit. On several ranks every rank does all.

    Args:
        model: A causal language model of transformers, or anything with its ``generate``.
        tokenizer: Turns text into ids and back.
        prompts: Texts, or token ids of shape ``[T]``.
        mask: Boolean; what it marks is set to zero.
        max_new_tokens: Longest continuation, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing, > 0.
        seed: Decides the draws; prompt i uses seed + i.

    Returns:
        Texts, agreement and divergence per prompt.

    Raises:
        ValueError: An argument is out of range, there is no prompt, one has no token or does not fit, the mask is not
            boolean, or a divergence is not finite.
        TypeError: The model cannot generate.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core import ParameterSpace
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=258, n_positions=16))
        >>> nothing = ParameterVector.of(model).map(torch.zeros_like).to(torch.bool)
        >>> compare_generations(model, byte_tokenizer(), ["2+2="], nothing, max_new_tokens=4).agreement
        (1.0,)
    """
    ids = encode_prompts(model, tokenizer, prompts, max_new_tokens, temperature)
    for name, tensor in mask.items():
        require_boolean(tensor, name)
    settings = generation_settings(tokenizer, max_new_tokens, do_sample, temperature)
    with preserved(model), torch.no_grad(), MaskedModel(model, mask.space) as zeroing:
        parts = {name: _part(mask[name], parameter) for name, parameter in zeroing.parameters.items()}
        plain = [continuation(model, each, seed + index, settings) for index, each in enumerate(ids)]
        batches = [continued_batch(prompt, answer) for prompt, answer in zip(ids, plain, strict=True)]
        anchors = [AnchoredDivergence(model, [batch], CausalLMObjective()) for batch in batches]
        zeroing.zero(parts)
        masked = [continuation(model, each, seed + index, settings) for index, each in enumerate(ids)]
        divergences = [anchor(model) for anchor in anchors]
    for index, value in enumerate(divergences):
        if not math.isfinite(value):
            raise ValueError(f"prompt {index}: the divergence of the masked model is {value} nats, not finite")
    return GenerationComparison(
        prompts=tuple(
            prompt if isinstance(prompt, str) else tokenizer.decode(each.tolist())
            for prompt, each in zip(prompts, ids, strict=True)
        ),
        plain=tuple(tokenizer.decode(each.tolist(), skip_special_tokens=True) for each in plain),
        masked=tuple(tokenizer.decode(each.tolist(), skip_special_tokens=True) for each in masked),
        agreement=tuple(agreement(*pair) for pair in zip(plain, masked, strict=True)),
        kl_per_token=tuple(divergences),
        count=sum(mask.count()),
        numel=mask.space.numel,
    )


def _part(mask: Tensor, parameter: Tensor) -> Tensor:
    whole = mask if is_sharded(mask) else scatter_like(parameter.detach(), mask)
    return local(whole).to(local(parameter).device)
