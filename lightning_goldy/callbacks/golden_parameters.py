"""Runs the golden parameter analysis on a schedule, and tells how its mask moves from one time to the next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.change import change_inside
from lightning_goldy.analysis.golden import (
    GoldenResult,
    ReverseGoldenResult,
    check_golden_arguments,
    golden_parameters,
)
from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.mask import ParameterMask, Scope
from lightning_goldy.core.space import ParameterSpace

MaskT = TypeVar("MaskT", GoldenResult, ReverseGoldenResult)


class MaskCallback(AnalysisCallback[MaskT]):
    """Base of callbacks that find a mask: tells what it has to do with the last mask and with the change.

    Args:
        **options: Of :class:`AnalysisCallback`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._mask: ParameterMask | None = None
        self._mask_file: str | None = None

    @abstractmethod
    def space(self, model: nn.Module) -> ParameterSpace:
        """The parameters whose elements may be marked."""

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks the selection, and takes up the last mask of a run that is resumed."""
        self.space(model)
        if self._resumed and self._mask_file is not None:
            trainer.strategy.barrier()
            self._mask = ParameterMask.load(self.folder / self._mask_file)

    def describe(self, result: MaskT, context: AnalysisContext) -> Row:
        """Adds what the mask has to do with the last mask and with the change."""
        snapshot = find_snapshot(context.trainer)
        share = None if snapshot is None else change_inside(context.model, snapshot.base, result.mask)
        metrics = {
            "jaccard_previous": None if self._mask is None else result.mask.jaccard(self._mask),
            "delta_share": share,
            "delta_share_over_density": share / result.density if share is not None and result.count else None,
        }
        self._mask = result.mask
        self._mask_file = f"mask-step={context.step:08d}.safetensors"
        return result.row().extended(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Adds the name of the last mask's file."""
        return {**super().state_dict(), "mask_file": self._mask_file}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._mask_file = state_dict["mask_file"]


class GoldenParameters(MaskCallback[GoldenResult]):
    """Which parameters sample after sample depends on, and how much of the change they carry.

    Logs count, density, density over chance, Jaccard index with the previous mask and, when a ``GoldenSnapshot`` runs
    beside it, the share of the squared change inside the mask. Saves the mask.

    Args:
        top_k_percent: Share that each sample marks, percent in (0, 100].
        score: ``gradient``, ``taylor``, ``fisher`` or a registered score of yours.
        scope: The share of each ``tensor``, or of all elements together (``global``).
        quorum: Share of the samples that must agree, a fraction in (0, 1].
        n_samples: Probe samples used.
        include: Glob patterns of parameter names.
        exclude: Glob patterns taken out again.
        last_layers: Only the last blocks: a fraction, or their number.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> GoldenParameters(top_k_percent=0)
        Traceback (most recent call last):
        ValueError: top_k_percent must lie in (0, 100]; got 0
    """

    def __init__(
        self,
        top_k_percent: float = 5.0,
        *,
        score: str = "gradient",
        scope: Scope = "tensor",
        quorum: float = 1.0,
        n_samples: int | None = 16,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        last_layers: float | int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_golden_arguments(top_k_percent, score, scope, quorum, n_samples)
        self.top_k_percent, self.score, self.scope, self.quorum = top_k_percent, score, scope, quorum
        self.n_samples = n_samples
        self.include, self.exclude, self.last_layers = include, exclude, last_layers

    def probe_samples(self) -> int | None:
        """The samples that vote."""
        return self.n_samples

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected parameters."""
        return ParameterSpace.of(model, self.include, self.exclude, self.last_layers)

    def compute(self, context: AnalysisContext) -> GoldenResult:
        """Finds the golden parameters of the probe."""
        return golden_parameters(
            context.model,
            context.probe,
            context.objective,
            top_k_percent=self.top_k_percent,
            score=self.score,
            scope=self.scope,
            quorum=self.quorum,
            n_samples=self.n_samples,
            space=self.space(context.model),
            progress=context.progress,
        )
