"""Continuations of prompts by two states of a model, token by token and drawn, and how far they agree."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import AnchoredDivergence
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture.adapters import base_run
from lightning_goldy.core.base import Base
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import MaskedModel
from lightning_goldy.core.naming import require_at_least
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.sharding import inside_parallel, is_sharded, local, scatter_like
from lightning_goldy.core.store import require_boolean
from lightning_goldy.core.vector import ParameterVector

Prompt = str | Tensor
"""Text, or token ids of shape ``[T]``."""


@dataclass(frozen=True)
class PromptComparison(AnalysisResult):
    """What two states of a model write after the same prompts; :class:`Continuations`, :class:`GenerationComparison`.

    A subclass has the fields that ``states`` names, with the texts, and ``agreement`` and ``kl_per_token``, by prompt.

    Args:
        prompts: As text.
    """

    states: ClassVar[tuple[str, str]]

    prompts: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able entry per prompt."""
        names = ("prompt", *self.states, "agreement", "kl_per_token")
        columns = [getattr(self, name) or (None,) * len(self.prompts) for name in ("prompts", *names[1:])]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    @property
    def prompts_mean(self) -> dict[str, float]:
        """Means of agreement and divergence over the prompts; nothing where nothing was compared."""
        columns = {name: getattr(self, name) for name in ("agreement", "kl_per_token")}
        return {name: math.fsum(values) / len(values) for name, values in columns.items() if values is not None}


@dataclass(frozen=True)
class Continuations(PromptComparison):
    """Continuations of each prompt by the present model and, where there is a base, by the base.

    Args:
        prompts: As text.
        present: Continuations by the present model.
        base: Continuations by the base, drawn with the same seeds; None without a base.
        agreement: Share of positions with the same token, a fraction of the longer continuation, per prompt; None
            without a base.
        kl_per_token: Mean KL(p_t || p_0) along the present model's continuation, nats per token, per prompt; None
            without a base.
        cost: Passes of the model, one per new token and two per prompt that is compared.
    """

    analysis: ClassVar[str] = "continuations"
    states: ClassVar[tuple[str, str]] = ("present", "base")

    present: tuple[str, ...]
    base: tuple[str, ...] | None
    agreement: tuple[float, ...] | None
    kl_per_token: tuple[float, ...] | None
    cost: Cost = field(default=Cost(), compare=False)

    def metrics(self) -> dict[str, float | None]:
        """Means over the prompts; without a base their number alone."""
        return {"prompts": len(self.prompts), **self.prompts_mean}

    def details(self) -> dict[str, Any]:
        """The entries of the prompts."""
        return {"continuations": self.rows()}


def continue_prompts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    base: Base | None = None,
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
        base: theta_0: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        max_new_tokens: Longest continuation, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing, > 0.
        seed: Decides the draws; prompt i uses seed + i.

    Returns:
        Texts, and with a base agreement and divergence, per prompt.

    Raises:
        ValueError: An argument is out of range, there is no prompt, one has no token or does not fit, or a divergence
            is not finite.
        TypeError: The model cannot generate, or the base is none.
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
    model = inside_parallel(model)
    writer = _Writer(model, tokenizer, prompts, seed, max_new_tokens, do_sample, temperature)
    before = None if base is None else base_run(model, base)
    return Continuations(**writer.compare(before, "the divergence from the base"))


@dataclass(frozen=True)
class GenerationComparison(PromptComparison):
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
        cost: Passes of the model, one per new token and two per prompt.
    """

    states: ClassVar[tuple[str, str]] = ("plain", "masked")

    plain: tuple[str, ...]
    masked: tuple[str, ...]
    agreement: tuple[float, ...]
    kl_per_token: tuple[float, ...]
    count: int
    numel: int
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def mean_agreement(self) -> float:
        """Mean over the prompts, a fraction."""
        return self.prompts_mean["agreement"]

    @property
    def mean_kl_per_token(self) -> float:
        """Mean over the prompts, nats per token."""
        return self.prompts_mean["kl_per_token"]


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
    writer = _Writer(model, tokenizer, prompts, seed, max_new_tokens, do_sample, temperature)
    for name, tensor in mask.items():
        require_boolean(tensor, name)
    parts = {}
    for name, parameter in mask.space.resolve(model).items():
        whole = mask[name] if is_sharded(mask[name]) else scatter_like(parameter.detach(), mask[name])
        parts[name] = local(whole).to(local(parameter).device)

    @contextmanager
    def masked() -> Iterator[None]:
        with MaskedModel(model, mask.space) as zeroing:
            zeroing.zero(parts)
            yield

    found = writer.compare(masked, "the divergence of the masked model")
    texts = {"plain": found.pop("present"), "masked": found.pop("base")}
    return GenerationComparison(**found, **texts, count=sum(mask.count()), numel=mask.space.numel)


@dataclass
class _Writer:
    """Prompts, once all has been checked, and how they are continued."""

    model: Any
    tokenizer: Any
    prompts: Sequence[Prompt]
    seed: int
    max_new_tokens: int
    do_sample: bool
    temperature: float

    def __post_init__(self) -> None:
        self.ids = encode_prompts(self.model, self.tokenizer, self.prompts, self.max_new_tokens, self.temperature)

    def compare(self, other: Callable[[], AbstractContextManager[Any]] | None, divergence: str) -> dict[str, Any]:
        """What the model writes, and what it writes within ``other``; the fields of :class:`Continuations`.

        Raises:
            ValueError: A divergence is not finite; it is named as the argument says.
        """
        before = same = divergences = None
        with preserved(self.model), torch.no_grad():
            present = self._write()
            passes = sum(map(len, present))
            if other is not None:
                batches = [continued_batch(*pair) for pair in zip(self.ids, present, strict=True)]
                anchors = [AnchoredDivergence(self.model, [batch], CausalLMObjective()) for batch in batches]
                with other():
                    before = self._write()
                    divergences = tuple(anchor(self.model) for anchor in anchors)
                passes += sum(map(len, before)) + 2 * len(anchors)
                same = tuple(agreement(*pair) for pair in zip(present, before, strict=True))
        for index, value in enumerate(divergences or ()):
            if not math.isfinite(value):
                raise ValueError(f"prompt {index}: {divergence} is {value} nats, not finite")
        known = zip(self.prompts, self.ids, strict=True)
        return {
            "prompts": tuple(text if isinstance(text, str) else self.tokenizer.decode(i.tolist()) for text, i in known),
            "present": self._decode(present),
            "base": None if before is None else self._decode(before),
            "agreement": same,
            "kl_per_token": divergences,
            "cost": Cost(forwards=passes),
        }

    def _write(self) -> list[Tensor]:
        """The new tokens after each prompt, shape ``[new]``; torch's global generator is set to a seed for each."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        settings = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.do_sample,
            **({"temperature": self.temperature} if self.do_sample else {}),
            "pad_token_id": pad if pad is not None else getattr(self.tokenizer, "eos_token_id", None),
        }
        answers = []
        for index, ids in enumerate(self.ids):
            torch.manual_seed(self.seed + index)
            prompt = ids[None]  # [1, T]
            whole = self.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)  # [1, T + new]
            answers.append(whole[0, len(ids) :])
        return answers

    def _decode(self, answers: Sequence[Tensor]) -> tuple[str, ...]:
        return tuple(self.tokenizer.decode(answer.tolist(), skip_special_tokens=True) for answer in answers)


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
        TypeError: The model cannot generate, or a prompt is neither text nor token ids.
    """
    check_generation_arguments(max_new_tokens, temperature)
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"{type(model).__name__} has no generate(), so it cannot continue prompts")
    if not prompts:
        raise ValueError("there is no prompt to continue")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", math.inf)
    found = []
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Tensor)):
            raise TypeError(f"prompt {index} is a text or a tensor of token ids; got {type(prompt).__name__}")
        if isinstance(prompt, str) and any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise ValueError(f"prompt {index} is {prompt!r}, which is no Unicode text: it has half of a surrogate pair")
        ids = torch.tensor(tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else prompt.detach().flatten()
        if not len(ids):
            raise ValueError(f"prompt {index} is {prompt!r}: it has no token to continue from")
        if len(ids) + max_new_tokens > (longest or math.inf):
            raise ValueError(
                f"prompt {index} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that exceeds the model's "
                f"{longest} positions"
            )
        found.append(ids.long().to(next(model.parameters()).device))
    return found


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
    require_at_least("max_new_tokens", max_new_tokens, 1)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite; got {temperature}; do_sample=False is its limit 0")
