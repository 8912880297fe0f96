"""Reads what the finetune left in the residual stream on unrelated text, on a schedule."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.activations import SteeredTexts, steer_texts
from lightning_goldy.analysis.activations.differences import (
    ActivationDifferencesResult,
    activation_differences,
    check_layers,
    check_texts,
    chosen_blocks,
    in_words,
    try_texts,
)
from lightning_goldy.analysis.continuations import encode_prompts
from lightning_goldy.analysis.forecast import Forecast, Plan, Run
from lightning_goldy.analysis.forecast.analyses import forecast_activations
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.naming import require_at_least, require_kinds, require_positive
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import is_sharded
from lightning_goldy.training.subject import find_collateral, find_tokenizer


@dataclass(frozen=True)
class ReadDifferences(AnalysisResult):
    """Activation differences, and texts that they steer.

    Args:
        differences: Of the unrelated text.
        texts: None where no prompt was given.
    """

    analysis: ClassVar[str] = "activation_differences"

    differences: ActivationDifferencesResult
    texts: SteeredTexts | None

    @property
    def cost(self) -> Cost:
        """Passes of both."""
        return self.differences.cost + (self.texts.cost if self.texts is not None else Cost())

    def metrics(self) -> dict[str, float | None]:
        """Those of the differences."""
        return self.differences.metrics()

    def details(self) -> dict[str, Any]:
        """Those of both, the texts under ``steering``."""
        details = self.differences.details()
        return details if self.texts is None else {**details, "steering": self.texts.details()}

    def headline(self) -> str:
        """That of the differences."""
        return self.differences.headline()


class ActivationDifferences(AnalysisCallback[ReadDifferences]):
    """What the finetune left in the residual stream on text that has nothing to do with it, and the words it spells.

    Logs how far the stream moved where that is clearest, against what another text moves it by, the agreement between
    two halves of the text, and the divergence of the predictions there. A ``GoldenSnapshot`` must be among the
    callbacks.

    Args:
        layers: Blocks after which to read, from 0; all by default.
        positions: Early positions of a text told apart.
        n_samples: Texts used.
        text: Batches of unrelated text; by default a ``collateral_dataloader()`` of the LightningModule or the data
            module, else the probe, which is the finetune's own text, and the row says so.
        prompts: Texts that the base continues with the difference added, and the finetuned model with it taken away;
            none by default. They need a tokenizer.
        max_new_tokens: Longest continuation, tokens.
        tolerance: Nats per token that a steered text may be less likely than a plain one.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> ActivationDifferences(positions=0)
        Traceback (most recent call last):
        ValueError: positions must be at least 1; got 0
    """

    compares = True
    dials: Mapping[str, Any] = {"n_samples": 8}

    def __init__(
        self,
        layers: Sequence[int] | None = None,
        *,
        positions: int = 5,
        n_samples: int = 64,
        text: Iterable[Any] | None = None,
        prompts: Sequence[str] = (),
        max_new_tokens: int = 40,
        tolerance: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        least = (("positions", positions, 1), ("n_samples", n_samples, 2), ("max_new_tokens", max_new_tokens, 1))
        for name, value, lowest in least:
            require_at_least(name, value, lowest)
        if layers is not None:
            check_layers(layers)
        require_positive("tolerance", [tolerance])
        if isinstance(prompts, str):
            raise ValueError(f"prompts is a list of texts; got one text, {prompts!r}")
        require_kinds(ActivationDifferences.__init__, locals())
        self.layers, self.positions, self.n_samples, self.text = layers, positions, n_samples, text
        self.prompts, self.max_new_tokens, self.tolerance = tuple(prompts), max_new_tokens, tolerance
        self._ahead: tuple[weakref.ref[L.Trainer], list[Any]] | None = None

    def forget(self) -> None:
        """Drops the text."""
        super().forget()
        self._text: list[Any] = []

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Two forward passes over the text, and the texts that are steered."""
        return forecast_activations(
            plan,
            n_samples=self.n_samples,
            layers=len(self.layers) if self.layers is not None else plan.n_layers,
            positions=self.positions,
            prompts=len(self.prompts),
            new_tokens=self.max_new_tokens,
        )

    def other_text(self, trainer: L.Trainer) -> list[Any]:
        """The text, which is read once: a forecast asks for it first, and some can be read no second time."""
        if self._ahead is None or self._ahead[0]() is not trainer:
            self._ahead = weakref.ref(trainer), find_collateral(trainer, self.text, self.n_samples)
        return self._ahead[1]

    def probe_samples(self) -> int | None:
        """None of the probe is asked for: it serves only where there is no other text, and as far as it goes."""
        return None

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Finds the base, the blocks and the text."""
        if find_snapshot(trainer) is None:
            raise ValueError(f"{self.name} compares with the golden snapshot: add GoldenSnapshot() to the callbacks")
        chosen_blocks(model, self.layers)
        if self.prompts and find_tokenizer(trainer) is None:
            raise ValueError(f"{self.name}: prompts are texts, and neither the module nor its data has a tokenizer")
        if self.prompts and any(map(is_sharded, model.parameters())):
            raise ValueError(f"{self.name}: a sharded model is not steered; leave prompts out")
        if self.prompts:
            encode_prompts(model, find_tokenizer(trainer), self.prompts, self.max_new_tokens, 1.0)
        self._text, self._ahead = self.other_text(trainer), None
        check_texts(self._text or self._batches, self.positions)

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """A forward pass of the text; where that is the probe, of the sample."""
        try_texts(model, self._text or [sample])

    def compute(self, context: AnalysisContext) -> ReadDifferences:
        """Reads the differences, and steers by them."""
        snapshot = find_snapshot(context.trainer)
        assert snapshot is not None
        texts = self._text or list(context.probe)
        found = activation_differences(
            context.model,
            snapshot.base,
            texts,
            layers=self.layers,
            positions=self.positions,
            n_samples=min(self.n_samples, sum(map(sample_count, texts))),
            progress=context.progress,
        )
        if not self.prompts or found.unchanged:
            return ReadDifferences(found, None)
        steered = steer_texts(
            context.model,
            snapshot.base,
            find_tokenizer(context.trainer),
            self.prompts,
            found,
            tolerance=self.tolerance,
            max_new_tokens=self.max_new_tokens,
            progress=context.progress,
        )
        return ReadDifferences(found, steered)

    def describe(self, result: ReadDifferences, context: AnalysisContext) -> Row:
        """The row, with tokens in words where there is a tokenizer."""
        row, tokenizer = result.row(), find_tokenizer(context.trainer)
        if not self._text:
            row = row.noted("the text is the probe, the finetune's own: give text=, or a collateral_dataloader()")
        return row if tokenizer is None else in_words(row, tokenizer)
