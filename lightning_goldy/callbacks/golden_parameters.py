"""Runs the golden parameter analysis on a schedule, and tells how its mask moves from one time to the next."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.change import change_inside
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_golden
from lightning_goldy.analysis.golden import (
    GoldenResult,
    ReverseGoldenResult,
    check_golden_arguments,
    golden_parameters,
    vocabulary_of,
)
from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext, try_gradients
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.core.architecture.adapters import chosen_space
from lightning_goldy.core.mask import ParameterMask, Scope
from lightning_goldy.core.naming import require_kinds
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace, Selection

MaskT = TypeVar("MaskT", GoldenResult, ReverseGoldenResult)


class MaskCallback(AnalysisCallback[MaskT]):
    """Base of callbacks that find a mask: tells what it has to do with the last mask and with the change.

    Args:
        **options: Of :class:`AnalysisCallback`.
    """

    def forget(self) -> None:
        """Drops the last masks."""
        super().forget()
        # By whose weights they were found with: a mask of averaged weights compares with another one of those.
        self._masks: dict[str, ParameterMask] = {}
        self._mask_files: dict[str, str] = {}

    def last_mask(self, weights: str) -> ParameterMask | None:
        """The last mask that was found with such weights (``training`` or ``averaged``); None before the first."""
        return self._masks.get(weights)

    @abstractmethod
    def space(self, model: nn.Module) -> ParameterSpace:
        """The parameters whose elements may be marked."""

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """A backward pass of one sample, of whose gradients masks are made."""
        try_gradients(model, self.space(model).resolve(model), objective, sample)

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks the selection, and takes up the last mask of a run that is resumed."""
        self.space(model)
        if self._resumed and self._mask_files:
            Replicas.world().meet(self.name)
            self._masks = {key: ParameterMask.load(self.folder / name) for key, name in self._mask_files.items()}

    def describe(self, result: MaskT, context: AnalysisContext) -> Row:
        """Adds what the mask has to do with the last mask of such weights, and with the change."""
        snapshot = find_snapshot(context.trainer)
        share = None if snapshot is None else change_inside(context.model, snapshot.base, result.mask)
        before = self._masks.get(context.weights)
        overlap = None if before is None else shared_jaccard(result.mask, before)
        # Masks are of what is trained, and of adapters there are no elements of merged weights.
        told = {"space": "adapters"} if chosen_space(context.model, "adapters") else {}
        row = result.row().extended(
            {
                "jaccard_previous": None if overlap is None else overlap.value,
                "delta_share": share,
                "delta_share_over_density": share / result.density if share is not None and result.count else None,
            },
            told,
        )
        self._masks[context.weights] = result.mask
        self._mask_files[context.weights] = context.file_name("mask")
        return row if overlap is None or not overlap.note else row.noted(overlap.note)

    def state_dict(self) -> dict[str, Any]:
        """Adds the names of the last masks' files."""
        files = {"mask_file": self._mask_files.get("training"), "mask_files": dict(self._mask_files)}
        return {**super().state_dict(), **files}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        # Earlier versions knew of no other weights than the training's.
        earlier = {} if state_dict.get("mask_file") is None else {"training": state_dict["mask_file"]}
        self._mask_files = dict(state_dict.get("mask_files", earlier))


@dataclass(frozen=True)
class SharedOverlap:
    """How much two masks overlap.

    Args:
        value: Jaccard index over the parameters that both cover; None where they cover none together.
        note: What to know where their parameters differ, else empty.
    """

    value: float | None
    note: str


def shared_jaccard(present: ParameterMask, before: ParameterMask) -> SharedOverlap:
    """Compares two masks on what their spaces share.

    Args:
        present: A mask.
        before: Another, perhaps of fewer or more parameters.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> whole = ParameterMask.random(ParameterSpace.of(layer), 50.0)
        >>> part = ParameterMask.random(ParameterSpace.of(layer, ["bias"]), 100.0)
        >>> shared_jaccard(whole, whole).note, shared_jaccard(whole, part)  # doctest: +ELLIPSIS
        ('', SharedOverlap(value=1.0, note='jaccard_previous is over the 1 parameters that both masks cover, ...'))
    """
    names = present.space.shared(before.space)
    if len(names) == len(present.space) == len(before.space):
        note = ""
    else:
        sizes = f"of {len(present.space)} of this and {len(before.space)} of the last"
        note = f"jaccard_previous is over the {len(names)} parameters that both masks cover, {sizes}"
    parts = [
        ParameterMask(present.space.subspace(names), {name: mask[name] for name in names}) for mask in (present, before)
    ]
    return SharedOverlap(parts[0].jaccard(parts[1]) if names else None, note)


class GoldenParameters(MaskCallback[GoldenResult]):
    """Which parameters sample after sample depends on, and how much of the change they carry.

    Logs the count, as a multiple of what shared rows and columns explain with its interval over the samples, and that
    of random tokens; the Jaccard index with the previous mask and, when a ``GoldenSnapshot`` runs beside it, the share
    of the squared change inside the mask. Saves the mask.

    Args:
        top_k_percent: Share that each sample marks, percent in (0, 100].
        score: ``gradient``, ``taylor``, ``fisher`` or a registered score of yours.
        scope: The share of each ``tensor``, or of all elements together (``global``).
        quorum: Share of the samples that must agree, a fraction in (0, 1].
        n_samples: Probe samples used.
        control: Whether to repeat it with random tokens of the same lengths, at the same cost once more.
        include: Glob patterns of parameter names.
        exclude: Glob patterns taken out again.
        last_layers: Only the last blocks: a fraction, or their number.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> GoldenParameters(top_k_percent=0)
        Traceback (most recent call last):
        ValueError: top_k_percent must lie in (0, 100]; got 0
    """

    dials: Mapping[str, int] = {"n_samples": 2}

    def __init__(
        self,
        top_k_percent: float = 5.0,
        *,
        score: str = "gradient",
        scope: Scope = "tensor",
        quorum: float = 1.0,
        n_samples: int | None = 16,
        control: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        last_layers: float | int | None = None,
        **options: Any,
    ) -> None:
        require_kinds(GoldenParameters.__init__, locals())
        super().__init__(**options)
        check_golden_arguments(top_k_percent, score, scope, quorum, n_samples)
        self.top_k_percent, self.score, self.scope, self.quorum = top_k_percent, score, scope, quorum
        self.n_samples, self.control = n_samples, control
        self.selection = Selection(include, exclude, last_layers)

    def probe_samples(self) -> int | None:
        """The samples that vote."""
        return self.n_samples

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected parameters."""
        return self.selection.space(model)

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A gradient of each sample, and a selection out of it."""
        options: dict[str, Any] = {"top_k_percent": self.top_k_percent, "whole": self.scope == "global"}
        options["control"] = self.control and vocabulary_of(plan.model) is not None
        return forecast_golden(plan, self.space(plan.model), self.n_samples, **options)

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
            n_samples=self.used_samples,
            space=self.space(context.model),
            control=self.control,
            progress=context.progress,
        )
