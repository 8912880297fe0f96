"""Tracks what every attention head looks at, on a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.attention import Prompt, TrackedAttention, attention_maps, track_attention
from lightning_goldy.analysis.attention.patterns import describe_stack
from lightning_goldy.analysis.attention.statistics import (
    DEFAULT_MEMORY,
    check_prompts,
    check_statistics_arguments,
    token_namer,
)
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_attention
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.architecture.blocks import require_stack
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import require_at_least, require_kinds
from lightning_goldy.training.subject import find_prompts, find_tokenizer


class AttentionTracker(AnalysisCallback[TrackedAttention]):
    """What every attention head looks at, and how far that has moved from the base.

    Logs entropy, distance, the mass on the first token, on the diagonal and on the previous token, induction and
    duplicate-token scores; with a ``GoldenSnapshot`` beside it the drift from the base's patterns (Jensen-Shannon); the
    largest singular values of each head's pattern; and the patterns of chosen heads on chosen prompts.

    Args:
        prompts: Texts or lists of token ids by name; by default the first sample of the probe.
        heads: The [layer, head] pairs whose patterns are shown, or ``all``; by default the strongest head of each kind
            at the first analysis, for the whole run.
        n_samples: Probe samples used for the statistics.
        stack: Of an encoder-decoder the ``encoder`` or the ``decoder``; prompts are the tokens of that stack, and the
            encoder beside a decoder's reads what it reads in the probe's first sample.
        drift: Whether to compare with the base of a ``GoldenSnapshot``, at twice the cost.
        max_tokens: Longer prompts are cut.
        singular_values: How many are kept of each head's pattern.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> AttentionTracker(max_tokens=0)
        Traceback (most recent call last):
        ValueError: max_tokens must be at least 1; got 0
    """

    compares = True
    dials: Mapping[str, int] = {"n_samples": 2}

    def __init__(
        self,
        prompts: Mapping[str, str | list[int]] | None = None,
        *,
        heads: Sequence[Sequence[int]] | Literal["all"] | None = None,
        n_samples: int | None = 16,
        stack: Literal["encoder", "decoder"] | None = None,
        drift: bool = True,
        max_tokens: int = 24,
        singular_values: int = 4,
        **options: Any,
    ) -> None:
        require_kinds(AttentionTracker.__init__, locals())
        super().__init__(**options)
        check_statistics_arguments(n_samples)
        for argument, value in (("max_tokens", max_tokens), ("singular_values", singular_values)):
            require_at_least(argument, value, 1)
        if prompts is not None:
            check_prompts(prompts)
        self.prompts, self.heads = prompts, _pairs(heads)
        if stack is not None:
            require_stack(stack)
        self.n_samples, self.stack, self.drift = n_samples, stack, drift
        self.max_tokens, self.singular_values = max_tokens, singular_values

    def forget(self) -> None:
        """Drops the prompts and heads that were shown."""
        super().forget()
        self._shown: tuple[Prompt, ...] = ()
        self._strongest: tuple[tuple[int, int], ...] | None = None

    def probe_samples(self) -> int | None:
        """The samples that the statistics are taken over."""
        return self.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Tries every prompt once, so that a model, token or head that cannot be shown fails before the first step."""
        if self.stack is not None:
            with undisturbed(trainer, trainer.lightning_module):
                describe_stack(model, self.stack)  # refuses a model without it, before its batches are looked into
        self._shown = find_prompts(trainer, model, self.prompts, self._batches, self.max_tokens, stack=self.stack)
        with undisturbed(trainer, trainer.lightning_module):
            for prompt in self._shown:
                known = attention_maps(model, prompt.batch, stack=self.stack).heads
        for pair in self.heads if isinstance(self.heads, tuple) else ():
            if pair not in known:
                last = known[-1]
                raise ValueError(
                    f"heads: there is no head {pair[1]} in layer {pair[0]}; layers go from 0 to {last[0]}, the last "
                    f"one's heads from 0 to {last[1]}"
                )

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A forward pass over the samples and the prompts, and one with the base's values."""
        return forecast_attention(
            plan,
            n_samples=self.n_samples,
            prompts=1 if self.prompts is None else len(self.prompts),
            max_tokens=self.max_tokens,
            drift=self.drift and plan.base,
            memory=DEFAULT_MEMORY,
        )

    def compute(self, context: AnalysisContext) -> TrackedAttention:
        """Measures the probe and records the prompts, with the present parameters and with the base's."""
        snapshot = find_snapshot(context.trainer)
        found = track_attention(
            context.model,
            context.probe,
            context.objective,
            prompts=self._shown,
            heads=self.heads or self._strongest,
            base=snapshot.base if self.drift and snapshot is not None else None,
            n_samples=self.used_samples,
            stack=self.stack,
            n_singular_values=self.singular_values,
            name_tokens=token_namer(find_tokenizer(context.trainer)),
            progress=context.progress,
        )
        if self.heads is None:
            # The same heads over the whole run, so that the figures compare.
            self._strongest = found.heads
        return found

    def state_dict(self) -> dict[str, Any]:
        """Adds the heads that the first analysis chose."""
        return {**super().state_dict(), "heads": self._strongest and [list(pair) for pair in self._strongest]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        heads = state_dict.get("heads")
        self._strongest = None if heads is None else tuple((layer, head) for layer, head in heads)


def _pairs(heads: Sequence[Sequence[int]] | str | None) -> tuple[tuple[int, int], ...] | Literal["all"] | None:
    if heads is None or heads == "all":
        return heads  # type: ignore[return-value]
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else () for pair in heads]
    if isinstance(heads, str) or not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"heads is 'all' or a list of [layer, head] pairs; got {heads!r}")
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in pairs))
