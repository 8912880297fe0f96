"""Basin volumes of several sets of samples at several cutoffs, measured so that later ones compare with earlier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from lightning_goldy.analysis.basin.preconditioners import tuned_preconditioner
from lightning_goldy.analysis.basin.result import Measure, VolumeResult
from lightning_goldy.analysis.basin.volume import basin_volume, check_volume_arguments
from lightning_goldy.analysis.divergence import Cache, check_cache
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.directions import Preconditioner
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.space import ParameterSpace

PreconditionerName = Literal["none", "adam", "best"]


@dataclass(frozen=True)
class Selection:
    """Which parameters move.

    Args:
        include: Glob patterns of parameter names.
        exclude: Glob patterns taken out again.
        last_layers: Only the last blocks: a fraction, or their number.

    Example:
        >>> Selection(exclude=["bias"]).space(nn.Linear(2, 1)).names
        ('weight',)
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    last_layers: float | int | None = None

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected part of a model.

        Raises:
            SpaceError: It is empty, or a pattern matches nothing.
        """
        return ParameterSpace.of(model, self.include, self.exclude, self.last_layers)


@dataclass(frozen=True)
class Estimator:
    """How a volume is estimated; the same for all that are to compare.

    Args:
        measure: ``gaussian`` for the probability under N(0, sigma^2 I), ``uniform`` for the volume itself, ``sphere``
            for the probability on the sphere through the weights.
        seed: Decides the directions; every analysis walks along the same ones.
        rtol: Relative tolerance of the evaluated divergence; a tenth of it is left.
        max_evaluations: Evaluations per direction before an error.
        max_seq_len: Use only the first so many tokens of each sample.
        cache: Where the anchor's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Estimator(rtol=2.0)
        Traceback (most recent call last):
        ValueError: rtol must lie in (0, 1); got 2.0
    """

    measure: Measure = "gaussian"
    seed: int = 0
    rtol: float = 1e-2
    max_evaluations: int = 40
    max_seq_len: int | None = None
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        check_volume_arguments(1, 1.0, None, self.measure, self.rtol, self.max_evaluations)
        check_cache(self.cache, None)


# Few, and not those of the volume itself: the damping must not be chosen by the directions that it is judged by.
_PILOT_DIRECTIONS = 2


class Measured(NamedTuple):
    """One volume.

    Args:
        split: Name of the samples.
        label: The same, with the cutoff where there are several.
        batches: Forward passes that one evaluation takes.
        result: The volume.
    """

    split: str
    label: str
    batches: int
    result: VolumeResult


class Survey(NamedTuple):
    """The volumes of one analysis.

    Args:
        volumes: By split, then by cutoff.
        sigma: Standard deviation of the measure, parameter units.
        eps: Damping of the preconditioner, in units of the mean; None as long as there was none.
        forwards: Forward passes spent, with those of the pilot and of the anchor.
    """

    volumes: tuple[Measured, ...]
    sigma: float
    eps: float | None
    forwards: int


class VolumeSurvey:
    """Measures volumes of a model; keeps the sigma and the damping that it began with.

    Args:
        n_directions: Directions per volume.
        cutoffs: Mean divergences at the boundary, nats per target; ascending.
        preconditioner: ``none``, ``adam`` for the optimizer's second moments, ``best`` for the better of both.
        sigma: A number, ``first`` to keep the root mean square of the first analysis, or None to take it anew.
        n_samples: Samples used of each split; all without.
        selection: Which parameters move.
        estimator: How a volume is estimated.

    Raises:
        ValueError: An argument is unknown or out of range.
    """

    def __init__(
        self,
        *,
        n_directions: int,
        cutoffs: Sequence[float],
        preconditioner: PreconditionerName,
        sigma: float | Literal["first"] | None,
        n_samples: int | None,
        selection: Selection,
        estimator: Estimator,
    ) -> None:
        if not cutoffs or len(set(cutoffs)) < len(cutoffs):
            raise ValueError(f"cutoff must be a number or a list of different ones; got {list(cutoffs)}")
        if isinstance(sigma, str) and sigma != "first":
            raise ValueError(f"sigma is a number, 'first' or None; got {sigma!r}")
        given = None if isinstance(sigma, str) else sigma
        for cutoff in cutoffs:
            check_volume_arguments(n_directions, cutoff, given, estimator.measure, estimator.rtol, 1)
        if preconditioner not in get_args(PreconditionerName):
            choices = suggestion(str(preconditioner), get_args(PreconditionerName))
            raise ValueError(f"unknown preconditioner {preconditioner!r}; {choices}")
        if preconditioner != "none" and estimator.measure == "sphere":
            raise ValueError(f"measure='sphere' takes no preconditioner; got preconditioner={preconditioner!r}")
        if n_samples is not None and n_samples < 1:
            raise ValueError(f"n_samples must be at least 1; got {n_samples}")
        self.n_directions, self.cutoffs, self.n_samples = n_directions, tuple(sorted(cutoffs)), n_samples
        self.preconditioner, self.sigma = preconditioner, sigma
        self.selection, self.estimator = selection, estimator
        self.kept_sigma: float | None = given
        self.kept_eps: float | None = None

    def measure(
        self,
        model: nn.Module,
        objective: Objective,
        splits: Mapping[str, Sequence[Any]],
        *,
        adam: Callable[[float], Preconditioner] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Survey:
        """Measures every split at every cutoff.

        Args:
            model: The anchor; comes back as it was.
            objective: Where the targets are.
            splits: Batches by name.
            adam: Makes the optimizer's preconditioner from a damping; None measures without one.
            progress: Called with (directions done, directions in all).

        Raises:
            ValueError: An estimate is not possible; see :func:`~lightning_goldy.analysis.basin_volume`.
        """
        work = _Work(self, model, objective, self.selection.space(model), progress)
        sigma = self.kept_sigma
        proposals: Preconditioner | dict[str, Preconditioner | None] | None = None
        if adam is not None and self.preconditioner != "none":
            tuned = self._tuned(work, next(iter(splits.values())), adam, sigma)
            proposals = {"none": None, "adam": tuned} if self.preconditioner == "best" else tuned
        work.total = len(splits) * len(self.cutoffs) * self.n_directions * (2 if isinstance(proposals, dict) else 1)
        volumes = []
        for split, batches in splits.items():
            for cutoff in self.cutoffs:
                result = work.volume(batches, cutoff, proposals, sigma)
                # All volumes of one analysis share the first one's, measured or given.
                sigma = result.sigma
                label = split if len(self.cutoffs) == 1 else f"{split}-{float(cutoff)!r}"
                volumes.append(Measured(split, label, work.count(batches), result))
        assert sigma is not None
        if self.sigma == "first":
            self.kept_sigma = sigma
        return Survey(tuple(volumes), sigma, None if proposals is None else self.kept_eps, work.forwards)

    def _tuned(
        self,
        work: _Work,
        batches: Sequence[Any],
        adam: Callable[[float], Preconditioner],
        sigma: float | None,
    ) -> Preconditioner:
        if self.kept_eps is None:

            def bound(proposal: Preconditioner) -> VolumeResult:
                return work.volume(batches, self.cutoffs[0], proposal, sigma, pilot=True)

            found = tuned_preconditioner(adam, bound)
            self.kept_eps = found.eps
            return found.preconditioner
        return adam(self.kept_eps)

    def state(self) -> dict[str, float | None]:
        """What later analyses must keep, for a checkpoint."""
        return {"sigma": self.kept_sigma, "eps": self.kept_eps}

    def load(self, state: Mapping[str, float | None]) -> None:
        """Takes up the state of an interrupted run; a sigma that was given stays."""
        if self.sigma == "first":
            self.kept_sigma = state["sigma"]
        self.kept_eps = state["eps"]


class _Work:
    """One analysis: what all of its volumes share, and what they cost."""

    def __init__(
        self,
        survey: VolumeSurvey,
        model: nn.Module,
        objective: Objective,
        space: ParameterSpace,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.survey, self.model, self.objective, self.space = survey, model, objective, space
        self.progress = progress
        self.done, self.total, self.forwards = 0, 0, 0

    def volume(
        self,
        batches: Sequence[Any],
        cutoff: float,
        proposals: Preconditioner | dict[str, Preconditioner | None] | None,
        sigma: float | None,
        *,
        pilot: bool = False,
    ) -> VolumeResult:
        survey, options = self.survey, dataclasses.asdict(self.survey.estimator)
        if pilot:
            options["seed"] += 1
        result = basin_volume(
            self.model,
            batches,
            self.objective,
            cutoff=cutoff,
            preconditioner=proposals,
            sigma=sigma,
            n_directions=_PILOT_DIRECTIONS if pilot else survey.n_directions,
            val_size=survey.n_samples,
            space=self.space,
            progress=None if pilot else self._advance,
            **options,
        )
        # The anchor's own predictions are made once, and again with every evaluation when none are kept. Every proposal
        # has one evaluation more, on the first batch alone: the anchor's second run.
        each = 2 if survey.estimator.cache == "none" else 1
        again = max(1, len(result.proposals))
        self.forwards += (1 + each * result.total_evaluations) * self.count(batches) + each * again
        return result

    def count(self, batches: Sequence[Any]) -> int:
        """How many of the batches the first ``n_samples`` samples lie in."""
        left = math.inf if self.survey.n_samples is None else self.survey.n_samples
        used = 0
        for batch in batches:
            if left <= 0:
                break
            left -= len(next(batch_tensors(batch)))
            used += 1
        return used

    def _advance(self, done: int, total: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)
