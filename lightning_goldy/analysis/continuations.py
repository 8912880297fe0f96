"""Continuations of prompts by several variants of a model, token by token and drawn, and how far they agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import AnchoredDivergence
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import MaskedModel
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.sharding import is_sharded, local, scatter_like
from lightning_goldy.core.store import require_boolean
from lightning_goldy.core.vector import ParameterVector, substituted

Prompt = str | Tensor
"""Text, or token ids of shape ``[T]``."""


@dataclass(frozen=True)
class Continuations(AnalysisResult):
    """Continuations of each prompt by the present model and, where there is a base, by the base.

    Args:
        prompts: As text.
        present: Continuations by the present model.
        base: Continuations by the base, drawn with the same seeds; None without a base.
        agreement: Share of positions with the same token, a fraction of the longer continuation, per prompt; None
            without a base.
        kl_per_token: Mean KL(p_t || p_0) along the present model's continuation, nats per token, per prompt; None
            without a base.
    """

    analysis: ClassVar[str] = "continuations"

    prompts: tuple[str, ...]
    present: tuple[str, ...]
    base: tuple[str, ...] | None
    agreement: tuple[float, ...] | None
    kl_per_token: tuple[float, ...] | None

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able entry per prompt."""
        nothing = (None,) * len(self.prompts)
        compared = (self.base or nothing, self.agreement or nothing, self.kl_per_token or nothing)
        columns = zip(self.prompts, self.present, *compared, strict=True)
        names = ("prompt", "present", "base", "agreement", "kl_per_token")
        return [dict(zip(names, values, strict=True)) for values in columns]

    def metrics(self) -> dict[str, float | None]:
        """Means over the prompts; without a base their number alone."""
        found: dict[str, float | None] = {"prompts": len(self.prompts)}
        for name in ("agreement", "kl_per_token"):
            values = getattr(self, name)
            if values is not None:
                found[name] = math.fsum(values) / len(values)
        return found

    def details(self) -> dict[str, Any]:
        """The entries of the prompts."""
        return {"continuations": self.rows()}


def continue_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    base: BaseParameters | ParameterVector | None = None,
    max_new_tokens: int = 50,
    do_sample: bool = False,
    temperature: float = 0.7,
    seed: int = 0,
) -> Continuations:
    r"""Continues each prompt with the present model and with the base, from the same random state.

    .. math:: \frac1T \sum_t \mathrm{KL}\big(p_{\theta_t}(\cdot \mid x, y_{<t}) \,\|\,
        p_{\theta_0}(\cdot \mid x, y_{<t})\big), \qquad y \text{ the present model's continuation of } x

    The prompts are continued one by one, so nothing is padded, and each has a seed of its own, so that its continuation
    does not depend on the others. The model comes back as it was, to the bit. On several ranks every rank does all.

    Args:
        model: A causal language model of transformers, or anything with its ``generate``.
        tokenizer: Turns text into ids and back.
        prompts: Texts, or token ids of shape ``[T]``.
        base: theta_0.
        max_new_tokens: Longest continuation, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing, > 0.
        seed: Decides the draws; prompt i uses seed + i.

    Returns:
        Texts, and with a base agreement and divergence, per prompt.

    Raises:
        ValueError: An argument is out of range, there is no prompt, one has no token or does not fit, or a divergence
            is not finite.
        TypeError: The model cannot generate.
        SpaceError: The base is of another model.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=258, n_positions=16))
        >>> base = ParameterVector.of(model)
        >>> found = continue_prompts(model, byte_tokenizer(), ["2+2="], base=base, max_new_tokens=4)
        >>> found.agreement, found.kl_per_token, found.present == found.base
        ((1.0,), (0.0,), True)
    """
    ids = encode_prompts(model, tokenizer, prompts, max_new_tokens, temperature)
    settings = generation_settings(tokenizer, max_new_tokens, do_sample, temperature)
    with preserved(model), torch.no_grad():
        present = [continuation(model, each, seed + index, settings) for index, each in enumerate(ids)]
        texts = _decoded(tokenizer, present)
        known = tuple(
            prompt if isinstance(prompt, str) else tokenizer.decode(each.tolist())
            for prompt, each in zip(prompts, ids, strict=True)
        )
        if base is None:
            return Continuations(known, texts, None, None, None)
        batches = [continued_batch(prompt, answer) for prompt, answer in zip(ids, present, strict=True)]
        anchors = [AnchoredDivergence(model, [batch], CausalLMObjective()) for batch in batches]
        with substituted(model, base if isinstance(base, ParameterVector) else base.vector(model)):
            before = [continuation(model, each, seed + index, settings) for index, each in enumerate(ids)]
            divergences = [anchor(model) for anchor in anchors]
    for index, value in enumerate(divergences):
        if not math.isfinite(value):
            raise ValueError(f"prompt {index}: the divergence from the base is {value} nats, not finite")
    same = tuple(agreement(*pair) for pair in zip(present, before, strict=True))
    return Continuations(known, texts, _decoded(tokenizer, before), same, tuple(divergences))


def encode_prompts(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], max_new_tokens: int, temperature: float
) -> list[Tensor]:
    """The prompts' token ids on the model's device, each int64 of shape ``[T]``, once all has been checked.

    Args:
        model: What is to continue them.
        tokenizer: Turns text into ids.
        prompts: Texts, or token ids of shape ``[T]``.
        max_new_tokens: Longest continuation, tokens.
        temperature: Of the drawing, > 0.

    Raises:
        ValueError: A number is out of range, there is no prompt, or one has no token or leaves no room.
        TypeError: The model cannot generate.
    """
    check_generation_arguments(max_new_tokens, temperature)
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"{type(model).__name__} has no generate(), so it cannot continue prompts")
    ids = [_encoded(tokenizer, prompt, index) for index, prompt in enumerate(prompts)]
    if not ids:
        raise ValueError("there is no prompt to continue")
    _require_room(model, ids, max_new_tokens)
    device = next(model.parameters()).device
    return [each.to(device) for each in ids]


def generation_settings(tokenizer: Any, max_new_tokens: int, do_sample: bool, temperature: float) -> dict[str, Any]:
    """Arguments of ``generate``.

    Args:
        tokenizer: Names the token that ``generate`` pads with.
        max_new_tokens: Longest continuation, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    padding = pad if pad is not None else getattr(tokenizer, "eos_token_id", None)
    drawn = {"temperature": temperature} if do_sample else {}
    return {"max_new_tokens": max_new_tokens, "do_sample": do_sample, **drawn, "pad_token_id": padding}


def continuation(model: Any, ids: Tensor, seed: int, settings: dict[str, Any]) -> Tensor:
    """What the model writes after a prompt, shape ``[new tokens]``; torch's global generator is set to the seed.

    Args:
        model: With ``generate``.
        ids: The prompt's token ids, shape ``[T]``.
        seed: Of the drawing.
        settings: Of :func:`generation_settings`.
    """
    torch.manual_seed(seed)
    prompt = ids[None]  # [1, T]
    found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)  # [1, T + new]
    return found[0, len(ids) :]


def continued_batch(prompt: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """A batch of one in which the continuation's tokens are the targets.

    Args:
        prompt: Token ids, shape ``[T]``.
        answer: Token ids, shape ``[new]``.

    Example:
        >>> continued_batch(torch.tensor([1, 2]), torch.tensor([3]))["labels"].tolist()
        [[-100, -100, 3]]
    """
    labels = torch.cat([torch.full_like(prompt, IGNORE_INDEX), answer])
    return {"input_ids": torch.cat([prompt, answer])[None], "labels": labels[None]}  # [1, T + new]


def agreement(first: Tensor, second: Tensor) -> float:
    """Share of positions with the same token, of the longer of two continuations, a fraction.

    Example:
        >>> agreement(torch.tensor([1, 2, 3, 4]), torch.tensor([1, 5, 3]))
        0.5
    """
    shorter = min(len(first), len(second))
    same = int((first[:shorter] == second[:shorter]).sum())
    return same / max(len(first), len(second), 1)


def check_generation_arguments(max_new_tokens: int, temperature: float) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is out of range.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}; do_sample=False is its limit 0")


def _decoded(tokenizer: Any, answers: Sequence[Tensor]) -> tuple[str, ...]:
    return tuple(tokenizer.decode(each.tolist(), skip_special_tokens=True) for each in answers)


def _encoded(tokenizer: Any, prompt: Prompt, index: int) -> Tensor:
    ids = torch.tensor(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt.detach().flatten()
    if not len(ids):
        raise ValueError(f"prompt {index} is {prompt!r}: it has no token to continue from")
    return ids.long()


def _require_room(model: nn.Module, ids: Sequence[Tensor], max_new_tokens: int) -> None:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for index, each in enumerate(ids):
        if longest is not None and len(each) + max_new_tokens > longest:
            raise ValueError(
                f"prompt {index} has {len(each)} tokens; with max_new_tokens={max_new_tokens} that exceeds the model's "
                f"{longest} positions"
            )


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
