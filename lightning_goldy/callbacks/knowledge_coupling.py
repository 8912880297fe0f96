"""Watches how pieces of knowledge are coupled and what the finetune does to each, on a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_deprecation
from torch import nn

from lightning_goldy.analysis.coupling import CouplingResult, knowledge_coupling
from lightning_goldy.analysis.coupling_drift import coupling_drift
from lightning_goldy.analysis.coupling_passes import OnError
from lightning_goldy.analysis.coupling_selection import Layers, check_selection
from lightning_goldy.analysis.coupling_statistics import CouplingStatistics, check_thresholds, coupling_statistics
from lightning_goldy.analysis.finetune_ripple import finetune_ripple
from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.attention_prompts import find_tokenizer
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import BASE_FILE
from lightning_goldy.callbacks.knowledge_findings import KnowledgeState, knowledge_findings
from lightning_goldy.callbacks.knowledge_pieces import PieceSource, WatchedPieces, drawn, find_pieces
from lightning_goldy.callbacks.store import AnalysisProgress
from lightning_goldy.callbacks.subject import find_objective
from lightning_goldy.callbacks.training_base import TrainingBase
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import substituted


class KnowledgeCoupling(AnalysisCallback[KnowledgeState]):
    """What else the finetune touches: coupling of facts, its drift, and the predicted and actual change of each fact.

    Logs how far the cosines between the facts' gradients have moved from the base, statistics of both, the change of
    every answer's log-probability since the base beside the first-order prediction g . Delta, how they agree for edited
    and for untouched facts, and which untouched facts moved most. The base is that of a ``GoldenSnapshot`` where there
    is one, else it is kept in a file.

    Args:
        pieces: A file of pieces, ``atlas``, or a list of them; by default the data module's.
        edits: Ids of the pieces that the finetune teaches; by default the atlas's edited facts, or the data module's
            ``train_pieces``.
        select: Whose gradients are compared: ``mlp_output``, ``attention_output``, or patterns of parameter names.
        layers: Only blocks ``(a, b)``, from a up to but not including b; or ``last:4``.
        n_pieces: At most so many pieces, half of them edited where there are enough; None for all.
        seed: Decides which pieces.
        template: The prompt, with ``{question}``; by default the data module's.
        moderate: Cosine from which a pair is moderately coupled.
        high: Cosine from which it is highly coupled.
        thresholds: Deprecated: the two in one list, in either order.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> KnowledgeCoupling(n_pieces=1)
        Traceback (most recent call last):
        ValueError: n_pieces must be at least 2, or None for all pieces; got 1
    """

    needs_probe = False
    analysis = "coupling_drift"

    def __init__(
        self,
        pieces: PieceSource = None,
        *,
        edits: Sequence[str] | None = None,
        select: str | Sequence[str] = "mlp_output",
        layers: Layers = None,
        n_pieces: int | None = 256,
        seed: int = 0,
        template: str | None = None,
        moderate: float = 0.1,
        high: float = 0.4,
        thresholds: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_selection(select, layers)
        if n_pieces is not None and n_pieces < 2:
            raise ValueError(f"n_pieces must be at least 2, or None for all pieces; got {n_pieces}")
        if thresholds is not None:
            if (moderate, high) != (0.1, 0.4):
                raise ValueError(f"thresholds cannot be given beside moderate and high; got {thresholds}")
            moderate, high = _in_order(thresholds)
        check_thresholds(moderate=moderate, high=high)
        if isinstance(edits, str):
            raise ValueError(f"edits is a list of ids; got the text {edits!r}, write [{edits!r}]")
        self.pieces, self.edits, self.select, self.layers = pieces, edits, select, layers
        self.n_pieces, self.seed, self.template = n_pieces, seed, template
        self.moderate, self.high = moderate, high
        self._training_base = TrainingBase(None)
        self._base: BaseParameters
        self._watched: WatchedPieces
        self._before: tuple[CouplingResult, CouplingStatistics]
        self._unreported = 0

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Finds the pieces and the base, and takes the base's coupling, so that what cannot work fails here."""
        objective = find_objective(trainer.lightning_module, model, self.objective)
        if not isinstance(objective, CausalLMObjective):
            raise ValueError(
                f"{self.name} asks a causal language model; the objective of {type(model).__name__} is "
                f"{type(objective).__name__}"
            )
        watched = find_pieces(trainer, self.pieces, self.edits, self.template)
        self._watched = drawn(watched, self.n_pieces, self.seed)
        if find_tokenizer(trainer) is None:
            module = type(trainer.lightning_module).__name__
            raise ValueError(f"{self.name} needs a tokenizer: neither {module} nor its data module has one")
        assert self._store is not None
        if self._resumed and self._previous_folder is not None and self._training_base.has_file:
            self._store.carry(Path(self._previous_folder) / BASE_FILE)
        trainer.strategy.barrier()
        self._base = self._training_base.find(trainer, model, ParameterSpace.of(model), self.folder)
        with (
            undisturbed(trainer, trainer.lightning_module),
            AnalysisProgress(trainer, self.name) as progress,
            substituted(model, self._base.vector(model)),
        ):
            coupling = self._coupling(trainer, model, progress, on_error="raise")
        self._before = coupling, self._statistics(coupling)
        self._unreported = 3 * len(coupling)

    def compute(self, context: AnalysisContext) -> KnowledgeState:
        """Takes the present coupling, and what became of each piece since the base."""
        # A piece that is known by heart may have no gradient left; it is listed among the failures.
        coupling = self._coupling(context.trainer, context.model, _half(context.progress, 0), on_error="nan")
        if len(coupling.failed) == len(coupling):
            why = coupling.failed[0]["reason"]
            raise ValueError(f"none of the {len(coupling)} pieces has a gradient at step {context.step}: {why}")
        ripple = finetune_ripple(
            context.model,
            self._base,
            self._watched.pieces,
            tokenizer=find_tokenizer(context.trainer),
            classes=self._watched.classes,
            template=self._watched.template,
            progress=_half(context.progress, 1),
        )
        drift = coupling_drift(self._before[0], coupling, self._watched.classes)
        return KnowledgeState(coupling, self._statistics(coupling), drift, ripple, self._before[0])

    def describe(self, result: KnowledgeState, context: AnalysisContext) -> Row:
        """Drift, agreement and changes by class as metrics; points, matrix and the most moved facts for the figures."""
        unreported, self._unreported = self._unreported, 0
        row = knowledge_findings(result, self._before, self._watched)
        return row.extended(cost=Cost(forwards=unreported))

    def state_dict(self) -> dict[str, Any]:
        """Adds the hash of the base."""
        return {**super().state_dict(), "base_hash": self._training_base.hash}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._training_base = TrainingBase(state_dict["base_hash"])

    def _coupling(
        self, trainer: L.Trainer, model: nn.Module, progress: Callable[[int, int], None], *, on_error: OnError
    ) -> CouplingResult:
        return knowledge_coupling(
            model,
            self._watched.pieces,
            tokenizer=find_tokenizer(trainer),
            template=self._watched.template,
            select=self.select,
            layers=self.layers,
            on_error=on_error,
            progress=progress,
        )

    def _statistics(self, coupling: CouplingResult) -> CouplingStatistics:
        return coupling_statistics(coupling, moderate=self.moderate, high=self.high)


def _in_order(thresholds: Sequence[float]) -> tuple[float, float]:
    if len(thresholds) != 2:
        raise ValueError(f"thresholds are two cosines; got {thresholds}; write moderate and high instead")
    moderate, high = sorted(thresholds)
    rank_zero_deprecation(
        f"thresholds of KnowledgeCoupling is deprecated; write moderate: {moderate:g}, high: {high:g}", stacklevel=5
    )
    return moderate, high


def _half(progress: Callable[[int, int], None], which: int) -> Callable[[int, int], None]:
    """The first or the second half of a bar."""
    return lambda done, total: progress(which * total + done, 2 * total)
