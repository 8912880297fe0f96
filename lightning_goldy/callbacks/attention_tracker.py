"""Tracks what every attention head looks at, on a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention import AttentionMaps, AttentionStatistics, attention_maps, attention_statistics
from lightning_goldy.analysis.attention.maps import NameTokens
from lightning_goldy.analysis.attention.rows import Tokens
from lightning_goldy.analysis.attention.statistics import STATISTICS, check_statistics_arguments
from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.vector import ParameterVector, substituted

PROBE = "probe"
"""What the prompt is called that is taken from the probe when none is given."""

PromptTexts = Mapping[str, "str | Sequence[int]"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it.

    Args:
        name: Part of tags and headings.
        batch: ``input_ids`` and ``attention_mask`` of shape ``[1, T]``, on the CPU.
        n_tokens: Length before it was cut.
    """

    name: str
    batch: dict[str, Tensor]
    n_tokens: int


def check_prompts(prompts: PromptTexts) -> None:
    """Checks names and contents before there is a tokenizer.

    Raises:
        ValueError: A name cannot be part of a tag, or a prompt is empty.
    """
    if not prompts:
        raise ValueError("prompts= names no prompt; leave it out to show the probe's first sample")
    for name, content in prompts.items():
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"prompt names become parts of tags: letters, digits, '-' and '_' only; got {name!r}")
        text = isinstance(content, str)
        if not text and not all(isinstance(each, int) and not isinstance(each, bool) for each in content):
            raise ValueError(f"prompt {name!r} is a text or a list of token ids; got {content!r:.60}")
        if not len(content):
            raise ValueError(f"prompt {name!r} is empty")


def find_prompts(
    trainer: L.Trainer, model: nn.Module, given: PromptTexts | None, probe: Sequence[Any], max_tokens: int
) -> tuple[Prompt, ...]:
    """The prompts with the run's tokenizer, each cut to its first tokens; by default the probe's first sample.

    Raises:
        ValueError: A text needs a tokenizer and there is none, or a token is unknown to the model.
    """
    if given is None:
        tokens = Tokens.of(probe[0])
        # Without its padding, which the model does not see either.
        return (_prompt(PROBE, tokens.ids[0][tokens.valid[0]].tolist(), max_tokens),)
    tokenizer = find_tokenizer(trainer)
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    size = None if embeddings is None else getattr(embeddings(), "num_embeddings", None)
    prompts = []
    for name, content in given.items():
        if isinstance(content, str) and tokenizer is None:
            raise ValueError(
                f"prompt {name!r} is a text, but neither {type(trainer.lightning_module).__name__} nor its data module "
                "has a tokenizer; give token ids instead"
            )
        ids = tokenizer(content).input_ids if isinstance(content, str) else list(content)
        if not ids:
            raise ValueError(f"prompt {name!r} has no tokens")
        wrong = [each for each in ids if each < 0 or (size is not None and each >= size)]
        if wrong:
            raise ValueError(f"prompt {name!r}: token {wrong[0]} is unknown to the model, which has {size} tokens")
        prompts.append(_prompt(name, ids, max_tokens))
    return tuple(prompts)


def find_tokenizer(trainer: L.Trainer) -> Any:
    """The LightningModule's tokenizer, or the data module's; None when there is neither."""
    module: Any = trainer.lightning_module
    own = getattr(module, "tokenizer", None)
    return own if own is not None else getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]


def token_namer(tokenizer: Any) -> NameTokens | None:
    r"""Turns ids into labels that can be read: a space before a word is a dot, a line break is written out.

    Example:
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> token_namer(byte_tokenizer())([65, 32, 10])
        ['A', '·', '\\n']
    """
    if tokenizer is None:
        return None

    def name(ids: Sequence[int]) -> list[str]:
        texts = [str(tokenizer.decode([each])) for each in ids]
        return [text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·") or "∅" for text in texts]

    return name


def _prompt(name: str, ids: list[int], max_tokens: int) -> Prompt:
    kept = torch.tensor([ids[:max_tokens]])
    return Prompt(name, {"input_ids": kept, "attention_mask": torch.ones_like(kept)}, len(ids))


# Statistics that tell heads of a kind apart; the strongest head of each is shown unless others are chosen.
KINDS = ("previous_token", "induction", "duplicate_token", "first_token")


@dataclass(frozen=True)
class Shown:
    """One prompt's patterns, and the base's."""

    prompt: Prompt
    maps: AttentionMaps
    base: AttentionMaps | None


@dataclass(frozen=True)
class Attention:
    """What one analysis found.

    Args:
        statistics: Of all heads, over the probe.
        shown: Patterns of the prompts.
        passes: Forward passes.
    """

    statistics: AttentionStatistics
    shown: tuple[Shown, ...]
    passes: int


def attention_findings(found: Attention, *, heads: Sequence[tuple[int, int]] | None, singular_values: int) -> Row:
    """What to log and to save of an analysis.

    Args:
        found: The analysis.
        heads: The (layer, head) pairs whose patterns are kept; None for the strongest head of each kind.
        singular_values: How many of each head's pattern are kept.

    Returns:
        Means over heads, the strongest head's values, drift and entropy by layer; and the row.
    """
    statistics = found.statistics
    chosen = strongest_heads(statistics) if heads is None else list(heads)
    data: dict[str, Any] = {
        "n_samples": statistics.n_samples,
        "queries": {name: int(count) for name, count in zip(STATISTICS, statistics.queries[0], strict=True)},
        "statistics": {name: statistics.statistic(name).tolist() for name in statistics.names},
        "heads": [list(pair) for pair in chosen],
        "prompts": [_attention_findings_prompt(shown, chosen, singular_values) for shown in found.shown],
    }
    data["spectra"] = [_spectrum(prompt) for prompt in data["prompts"]]
    cost = Cost(forwards=found.passes)
    return Row("attention_tracker", _metrics(statistics, found.shown), data, cost=cost)


def strongest_heads(statistics: AttentionStatistics) -> list[tuple[int, int]]:
    """The (layer, head) pair that is strongest of each kind, without repetition.

    Args:
        statistics: Of all heads.
    """
    strongest = [statistics.strongest(name) for name in KINDS]
    return list(dict.fromkeys(pair for pair in strongest if pair is not None))


def _metrics(statistics: AttentionStatistics, shown: Sequence[Shown]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {name: statistics.mean(name) for name in statistics.names}
    peaks = ("previous_token", "induction", "duplicate_token", *(["drift"] if statistics.drift is not None else []))
    for name in peaks:
        pair = statistics.strongest(name)
        metrics[f"{name}_max"] = None if pair is None else float(statistics.statistic(name)[pair])
    for name in ("entropy", "drift"):
        if name in statistics.names:
            for layer, row in enumerate(statistics.statistic(name)):
                metrics[f"{name}/layer_{layer}"] = float(row.nanmean())
    for each in shown:
        values = each.maps.singular_values(1)
        metrics[f"largest_singular_value/{each.prompt.name}"] = float(values.nanmean())
    return metrics


def _attention_findings_prompt(shown: Shown, chosen: Sequence[tuple[int, int]], singular_values: int) -> dict[str, Any]:
    maps = []
    for layer, head in chosen:
        base = None if shown.base is None else _rounded(shown.base.pattern(layer, head), 4)
        weights = _rounded(shown.maps.pattern(layer, head), 4)
        maps.append({"layer": layer, "head": head, "weights": weights, "base": base})
    return {
        "name": shown.prompt.name,
        "n_tokens": shown.prompt.n_tokens,
        "tokens": list(shown.maps.token_names()),
        "singular_values": _rounded(shown.maps.singular_values(singular_values), 6),
        "maps": maps,
    }


def _spectrum(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Each singular value, a mean over the heads."""
    values = np.asarray(prompt["singular_values"], dtype=np.float64)  # [layers, heads, top]
    known = np.isfinite(values)
    counts = known.sum(axis=(0, 1))
    sums = np.where(known, values, 0.0).sum(axis=(0, 1))
    means = [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]
    return {"prompt": prompt["name"], "values": means}


def _rounded(values: Tensor, digits: int) -> Any:
    # Enough for a figure, in a third of the characters.
    return values.double().round(decimals=digits).tolist()


class AttentionTracker(AnalysisCallback[Attention]):
    """What every attention head looks at, and how far that has moved from the base.

    Logs entropy, distance, the mass on the first token, on the diagonal and on the previous token, induction and
    duplicate-token scores; with a ``GoldenSnapshot`` beside it the drift from the base's patterns (Jensen-Shannon); the
    largest singular values of each head's pattern; and the patterns of chosen heads on chosen prompts.

    Args:
        prompts: Texts or lists of token ids by name; by default the first sample of the probe.
        heads: The [layer, head] pairs whose patterns are shown, or ``all``; by default the strongest head of each kind
            at the first analysis, for the whole run.
        n_samples: Probe samples used for the statistics.
        drift: Whether to compare with the base of a ``GoldenSnapshot``, at twice the cost.
        max_tokens: Longer prompts are cut.
        singular_values: How many are kept of each head's pattern.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> AttentionTracker(max_tokens=0)
        Traceback (most recent call last):
        ValueError: max_tokens must be at least 1; got 0
    """

    def __init__(
        self,
        prompts: Mapping[str, str | list[int]] | None = None,
        *,
        heads: Sequence[Sequence[int]] | Literal["all"] | None = None,
        n_samples: int | None = 16,
        drift: bool = True,
        max_tokens: int = 24,
        singular_values: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_statistics_arguments(n_samples)
        for argument, value in (("max_tokens", max_tokens), ("singular_values", singular_values)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1; got {value}")
        if prompts is not None:
            check_prompts(prompts)
        self.prompts, self.heads = prompts, _pairs(heads)
        self.n_samples, self.drift = n_samples, drift
        self.max_tokens, self.singular_values = max_tokens, singular_values
        self._shown: tuple[Prompt, ...] = ()
        self._strongest: list[tuple[int, int]] | None = None

    def probe_samples(self) -> int | None:
        """The samples that the statistics are taken over."""
        return self.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Tries every prompt once, so that a model, token or head that cannot be shown fails before the first step."""
        if not self._goes_on:
            self._strongest = None
        self._shown = find_prompts(trainer, model, self.prompts, self._batches, self.max_tokens)
        with undisturbed(trainer, trainer.lightning_module):
            for prompt in self._shown:
                known = attention_maps(model, prompt.batch).heads
        for pair in self.heads if isinstance(self.heads, tuple) else ():
            if pair not in known:
                last = known[-1]
                raise ValueError(
                    f"heads: there is no head {pair[1]} in layer {pair[0]}; layers go from 0 to {last[0]}, the last "
                    f"one's heads from 0 to {last[1]}"
                )

    def compute(self, context: AnalysisContext) -> Attention:
        """Measures the probe and records the prompts, with the present parameters and with the base's."""
        base = self._base(context)
        statistics = attention_statistics(
            context.model,
            context.probe,
            context.objective,
            base=base,
            n_samples=self.n_samples,
            progress=context.progress,
        )
        name_tokens = token_namer(find_tokenizer(context.trainer))
        shown = []
        for prompt in self._shown:
            before = None
            if base is not None:
                with substituted(context.model, base):
                    before = attention_maps(context.model, prompt.batch, name_tokens=name_tokens)
            shown.append(Shown(prompt, attention_maps(context.model, prompt.batch, name_tokens=name_tokens), before))
        passes = statistics.passes + len(shown) * (1 if base is None else 2)
        return Attention(statistics, tuple(shown), passes)

    def describe(self, result: Attention, context: AnalysisContext) -> Row:
        """Means over heads as metrics; every head's statistics, patterns and singular values for the figures."""
        if self._strongest is None:
            # The same heads over the whole run, so that the figures compare.
            self._strongest = strongest_heads(result.statistics)
        heads = result.shown[0].maps.heads if self.heads == "all" else self.heads or self._strongest
        return attention_findings(result, heads=heads, singular_values=self.singular_values)

    def state_dict(self) -> dict[str, Any]:
        """Adds the heads that the first analysis chose."""
        return {**super().state_dict(), "heads": self._strongest}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        heads = state_dict.get("heads")
        self._strongest = None if heads is None else [(layer, head) for layer, head in heads]

    def _base(self, context: AnalysisContext) -> ParameterVector | None:
        snapshot = find_snapshot(context.trainer)
        return snapshot.base.vector(context.model) if self.drift and snapshot is not None else None


def _pairs(heads: Sequence[Sequence[int]] | str | None) -> tuple[tuple[int, int], ...] | Literal["all"] | None:
    if heads is None or heads == "all":
        return heads  # type: ignore[return-value]
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else () for pair in heads]
    if isinstance(heads, str) or not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"heads is 'all' or a list of [layer, head] pairs; got {heads!r}")
    return tuple(dict.fromkeys((int(layer), int(head)) for layer, head in pairs))
