"""Steering: texts that a model writes with a direction added to its residual stream, as strongly as fluency allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.activations.differences import ActivationDifferencesResult
from lightning_goldy.analysis.attribution.path import ChangePath
from lightning_goldy.analysis.continuations import Prompt, continued_batch, encode_prompts
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture import describe_architecture
from lightning_goldy.core.base import Base
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import model_class, require_positive
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.sharding import inside_parallel

State = Literal["base", "present"]
STRENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class SteeredTexts(AnalysisResult):
    """What two states of a model write, plain and steered.

    Args:
        layer: The block after which the difference was added (to the base) or taken away (from the present model).
        prompts: As text.
        texts: One record per state and prompt: ``state``, ``prompt``, ``plain``, ``steered``, ``strength`` (multiples
            of the mean difference; 0 where none keeps the text fluent), ``plain_fluency`` and ``fluency`` (mean
            log-probability of the text under the same state unsteered, nats per token), ``plain_repetition`` and
            ``repetition`` (share of the pairs of neighbouring tokens that stood in the text before).
        tolerance: Nats per token that a steered text may be less likely than the plain one.
        cost: Forward passes.
    """

    analysis: ClassVar[str] = "steered_texts"

    layer: int
    prompts: tuple[str, ...]
    texts: tuple[dict[str, Any], ...]
    tolerance: float
    cost: Cost = field(default=Cost(), compare=False)

    def details(self) -> dict[str, Any]:
        """The texts."""
        return {"layer": self.layer, "tolerance": self.tolerance, "texts": [dict(text) for text in self.texts]}

    def metrics(self) -> dict[str, float | None]:
        """The strengths that were used, in the mean by state."""
        found: dict[str, float | None] = {}
        for state in ("base", "present"):
            strengths = [text["strength"] for text in self.texts if text["state"] == state]
            found[f"strength/{state}"] = math.fsum(strengths) / len(strengths) if strengths else None
        return found

    def headline(self) -> str:
        """How strongly each state can be steered before its texts are no longer fluent."""
        base, present = (self._strengths_of(state) for state in ("base", "present"))
        return (
            f"texts stay fluent with {base} times the difference after block {self.layer} added to the base, and "
            f"{present} times it taken from the finetuned model, in the mean over prompts ({len(self.prompts)})"
        )

    def _strengths_of(self, state: str) -> str:
        """The mean strength of a state, and between what those of its prompts lie."""
        held = [float(text["strength"]) for text in self.texts if text["state"] == state]
        mean = math.fsum(held) / len(held) if held else 0.0
        return f"{mean:.3g}" if len(held) < 2 else f"{mean:.3g} ({min(held):.3g} to {max(held):.3g})"


def repetition(ids: Sequence[int]) -> float:
    """Share of the pairs of neighbouring tokens that stood in the text before; 0 of a text without a pair.

    Example:
        >>> repetition([7, 7, 7, 7, 7]), repetition([1, 2, 3]), repetition([1])
        (0.75, 0.0, 0.0)
    """
    pairs = [*pairwise(ids)]
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


@contextmanager
def steered(block: nn.Module, direction: Tensor, strength: float = 1.0) -> Iterator[None]:
    """Adds a direction to what a block hands on, at every position.

    Args:
        block: The block's module.
        direction: Shape ``[width]``.
        strength: What it is multiplied with.

    Example:
        >>> layer = nn.Identity()
        >>> with steered(layer, torch.ones(2), 3.0):
        ...     layer(torch.zeros(1, 2)).tolist()
        [[3.0, 3.0]]
    """

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        whole = output if isinstance(output, Tensor) else output[0]
        if whole.shape[-1] != len(direction):
            raise ValueError(f"the direction has width {len(direction)}, and the stream {whole.shape[-1]}")
        moved = whole + (strength * direction).to(whole.device, whole.dtype)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])

    hook = block.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


def steer_texts(
    model: nn.Module,
    base: Base,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    differences: ActivationDifferencesResult,
    *,
    layer: int | None = None,
    tolerance: float = 1.0,
    repeats: float = 0.5,
    strengths: Sequence[float] = STRENGTHS,
    max_new_tokens: int = 40,
    do_sample: bool = False,
    temperature: float = 0.7,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SteeredTexts:
    r"""Texts by the base with the mean activation difference added, and by the finetuned model with it taken away.

    .. math:: h_\ell \leftarrow h_\ell \pm a\, \delta_\ell, \qquad
        \tfrac1T \log p(y^{\text{plain}}) - \tfrac1T \log p(y^{(a)}) \le \text{tolerance}

    Strengths are tried in ascending order until the first whose text the same model, unsteered, no longer finds about
    as likely as its own, or that repeats itself, which every model finds likely; a is the one before it, or 0, the
    plain text, where already the first is too strong. So strengths are no free choice, and what is shown is not noise.
    The difference is the mean over all positions but the first, and is added at every position. The model comes back
    as it was.

    Args:
        model: The finetuned model, a causal language model of transformers.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        tokenizer: Turns text into ids and back.
        prompts: Texts, or token ids of shape ``[T]``.
        differences: Of :func:`activation_differences`, of the same two states.
        layer: The block; by default the one where the difference is clearest.
        tolerance: Nats per token.
        repeats: Share of the pairs of neighbouring tokens that may have stood in the text before, a fraction; where the
            plain text repeats itself more, as much as that.
        strengths: Multiples of the difference that are tried, ascending.
        max_new_tokens: Longest text, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing.
        seed: Decides the draws; prompt i uses seed + i.
        progress: Called with (texts done, texts in all).

    Raises:
        ValueError: An argument is out of range, the layer was not measured, nothing differs there, or the differences
            are of another model.

    Source: Minder et al. 2025 (arXiv 2510.13900), section 4.
    """
    model = inside_parallel(model)
    require_positive("tolerance and strengths", [tolerance])
    if not 0 <= repeats <= 1:
        raise ValueError(f"repeats must lie in [0, 1]; got {repeats}")
    strengths = require_positive("strengths", strengths)
    layer = differences.layers[differences.clearest] if layer is None else layer
    if isinstance(prompts, str):
        raise ValueError(f"prompts is a list of texts; got one text, {prompts!r}")
    if layer not in differences.layers:
        raise ValueError(f"layer {layer} was not measured; there are {list(differences.layers)}")
    direction = differences.means[differences.layers.index(layer), -1]
    if not bool(direction.any()):
        raise ValueError(f"nothing differs from the base after block {layer}, so there is no direction to steer by")
    blocks = describe_architecture(model).blocks
    if layer >= len(blocks):
        raise ValueError(
            f"the differences are of block {layer}, and this {model_class(model)} has {len(blocks)} blocks"
        )
    block = blocks[layer].module
    ids = encode_prompts(model, tokenizer, prompts, max_new_tokens, temperature)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
    if do_sample:
        settings["temperature"] = temperature
    writer = _Steering(model, tokenizer, block, direction, sorted(strengths), tolerance, repeats, settings)
    texts: list[dict[str, Any]] = []
    shown = [text if isinstance(text, str) else tokenizer.decode(text.tolist()) for text in prompts]
    with preserved(model), torch.no_grad(), ChangePath(model, base) as path:
        states: tuple[tuple[State, float, float], ...] = (("base", 0.0, 1.0), ("present", 1.0, -1.0))
        for state, place, sign in states:
            path.move_to(place)
            for index, prompt in enumerate(ids):
                texts.append({"state": state, "prompt": shown[index], **writer.write(prompt, sign, seed + index)})
                if progress is not None:
                    progress(len(texts), 2 * len(ids))
    return SteeredTexts(layer, tuple(shown), tuple(texts), tolerance, Cost(forwards=writer.passes))


@dataclass
class _Steering:
    model: Any
    tokenizer: Any
    block: nn.Module
    direction: Tensor
    strengths: Sequence[float]
    tolerance: float
    repeats: float
    settings: dict[str, Any]
    passes: int = 0

    def write(self, prompt: Tensor, sign: float, seed: int) -> dict[str, Any]:
        """The plain text, and the one steered most strongly that is still fluent."""
        plain = self._generate(prompt, seed)
        fluent, again = self._fluency(prompt, plain), repetition(plain.tolist())
        best = {"steered": self._decoded(plain), "strength": 0.0, "fluency": fluent, "repetition": again}
        for strength in self.strengths:
            with steered(self.block, self.direction, sign * strength):
                text = self._generate(prompt, seed)
            fluency, repeated = self._fluency(prompt, text), repetition(text.tolist())
            if fluency < fluent - self.tolerance or repeated > max(self.repeats, again):
                break
            best = {"steered": self._decoded(text), "strength": strength, "fluency": fluency, "repetition": repeated}
        return {"plain": self._decoded(plain), "plain_fluency": fluent, "plain_repetition": again, **best}

    def _generate(self, prompt: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        end = pad if pad is not None else getattr(self.tokenizer, "eos_token_id", None)
        whole = self.model.generate(
            prompt[None], attention_mask=torch.ones_like(prompt[None]), pad_token_id=end, **self.settings
        )
        answer = whole[0, len(prompt) :]
        self.passes += len(answer)
        return answer

    def _fluency(self, prompt: Tensor, answer: Tensor) -> float:
        """Mean log-probability of an answer by the unsteered model, nats per token."""
        self.passes += 1
        return float(CausalLMObjective().log_probs(self.model, continued_batch(prompt, answer))[0])

    def _decoded(self, answer: Tensor) -> str:
        return str(self.tokenizer.decode(answer.tolist(), skip_special_tokens=True))
