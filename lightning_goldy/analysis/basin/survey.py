"""Basin volumes of several sets of samples at several cutoffs, measured so that later ones compare with earlier."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from torch import nn

from lightning_goldy.analysis.basin.bridge import BridgeSettings
from lightning_goldy.analysis.basin.kronecker import KroneckerFisher, KroneckerPreconditioner, kronecker_fisher
from lightning_goldy.analysis.basin.preconditioners import NoLowerBoundError, tuned_preconditioner
from lightning_goldy.analysis.basin.result import VolumeResult
from lightning_goldy.analysis.basin.saddle import BridgeResult
from lightning_goldy.analysis.basin.volume import Estimator, Method, basin_volume, check_region
from lightning_goldy.analysis.divergence import shortened
from lightning_goldy.analysis.gradients import linear_layers
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import is_tensor_parallel
from lightning_goldy.core.space import ParameterSpace, Selection
from lightning_goldy.core.vector import Preconditioner

_SPLIT = "under tensor parallelism no process sees a layer whole"
PreconditionerName = Literal["none", "adam", "best", "kronecker"]
Make: TypeAlias = Callable[[float], Preconditioner]
"""A preconditioner from its damping."""
Proposals: TypeAlias = Preconditioner | Mapping[str, Preconditioner | None] | None

ONLY_SPLIT = "probe"
"""What the samples are called when there is nothing to tell them from; metrics then carry no name of a split."""

# Few, and not those of the volume itself: the damping must not be chosen by the directions that it is judged by.
_PILOT_DIRECTIONS = 2


@dataclass(kw_only=True)
class VolumeSurvey:
    """Measures volumes of a model; keeps the sigma and the damping that it began with.

    Args:
        n_directions: Directions per volume.
        cutoffs: Mean divergences at the boundary, nats per target; kept in ascending order.
        preconditioner: ``none``, ``adam`` for the optimizer's second moments, ``kronecker`` for the Fisher information
            of each split's own samples in Kronecker factors, ``best`` for the best of all that there are.
        sigma: A number, ``first`` to keep the root mean square of the first analysis, or None to take it anew.
        n_samples: Samples used of each split; all without.
        selection: Which parameters move.
        estimator: How a volume is estimated.
        method: ``rays``, or ``bridge`` or ``auto`` for the volume itself beside that lower bound.
        bridge: How the bridge is walked.

    Raises:
        ValueError: An argument is unknown or out of range.
    """

    n_directions: int
    cutoffs: Sequence[float]
    preconditioner: PreconditionerName = "none"
    sigma: float | Literal["first"] | None = "first"
    n_samples: int | None = None
    selection: Selection = Selection()  # noqa: RUF009 - frozen
    estimator: Estimator = Estimator()  # noqa: RUF009 - frozen
    method: Method = "rays"
    bridge: BridgeSettings = BridgeSettings()  # noqa: RUF009 - frozen
    kept_sigma: float | None = field(default=None, init=False)
    kept_eps: float | None = field(default=None, init=False)
    kept_kronecker_eps: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if not self.cutoffs or len(set(self.cutoffs)) < len(self.cutoffs):
            raise ValueError(f"cutoff must be a number or a list of different ones; got {list(self.cutoffs)}")
        if isinstance(self.sigma, str) and self.sigma != "first":
            raise ValueError(f"sigma is a number, 'first' or None; got {self.sigma!r}")
        self.kept_sigma = None if isinstance(self.sigma, str) else self.sigma
        for cutoff in self.cutoffs:
            check_region(self.n_directions, cutoff, self.kept_sigma)
        require_choice("preconditioner", self.preconditioner, get_args(PreconditionerName))
        if self.preconditioner != "none" and self.estimator.measure == "sphere":
            raise ValueError(f"measure='sphere' takes no preconditioner; got preconditioner={self.preconditioner!r}")
        require_choice("method", self.method, get_args(Method))
        if self.method == "bridge" and self.estimator.measure != "gaussian":
            raise ValueError(f"method='bridge' needs measure='gaussian'; got measure={self.estimator.measure!r}")
        if self.n_samples is not None:
            require_at_least("n_samples", self.n_samples, 1)
        self.cutoffs = tuple(sorted(self.cutoffs))

    @property
    def needs_adam(self) -> bool:
        """Whether the optimizer's moments are asked for."""
        return self.preconditioner in ("adam", "best")

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected part of a model.

        Raises:
            SpaceError: It is empty, or a pattern matches nothing.
            ValueError: The preconditioner is ``kronecker``, and there is nothing in it that has Kronecker factors, or
                tensor parallelism splits the layers.
        """
        space = self.selection.space(model)
        if self.preconditioner == "kronecker" and is_tensor_parallel(model):
            raise ValueError(f"preconditioner='kronecker': {_SPLIT}: use another preconditioner, FSDP2 or replicas")
        if self.preconditioner == "kronecker" and not any(name in space for name in linear_layers(model)):
            raise ValueError(
                "preconditioner='kronecker' needs the weight of a linear layer (nn.Linear or Conv1D) that serves "
                f"nowhere else; none of the {len(space)} selected parameters of {type(model).__name__} is one: widen "
                "the selection, or use another preconditioner"
            )
        return space

    def measure(
        self,
        model: nn.Module,
        objective: Objective,
        splits: Mapping[str, Sequence[Any]],
        *,
        adam: Make | None = None,
        bridged: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> BasinVolumes:
        """Measures every split at every cutoff.

        Args:
            model: The anchor; comes back as it was.
            objective: Where the targets are.
            splits: Batches by name.
            adam: Makes the optimizer's preconditioner from a damping; None measures without one.
            bridged: Whether a bridge that ``method`` asks for is walked this time.
            progress: Called with (directions done, directions in all).

        Raises:
            ValueError: An estimate is not possible; see :func:`~lightning_goldy.analysis.basin_volume`.
        """
        make = adam if self.needs_adam else None
        space = self.space(model)
        layered = any(name in space for name in linear_layers(model))
        if layered and self.preconditioner == "best" and is_tensor_parallel(model):
            layered = False
            warnings.warn(f"{_SPLIT}: of the best proposals the Kronecker factors are left out", stacklevel=2)
        fisher_too = self.preconditioner == "kronecker" or (self.preconditioner == "best" and layered)
        walks = 1 + (make is not None) + layered if self.preconditioner == "best" else 1
        count = len(splits) * len(self.cutoffs) * self.n_directions * walks
        work = _Work(self, model, objective, space, count, progress, sigma=self.kept_sigma)
        length = self.estimator.max_seq_len
        samples = {split: shortened(batches, objective, self.n_samples, length) for split, batches in splits.items()}
        volumes: dict[str, tuple[VolumeResult, ...]] = {}
        bridges: dict[str, tuple[BridgeResult, ...]] = {}
        tuned: dict[str, Preconditioner] = {}
        for split, batches in samples.items():
            fisher = work.fisher(batches) if fisher_too else None
            if make is not None and "adam" not in tuned:
                tuned |= self._tuned(work, batches, make, "adam")
            if fisher is not None:
                # Of each split its own.
                tuned.pop("kronecker", None)
                tuned |= self._tuned(work, batches, partial(_damped, fisher), "kronecker")
            proposals: Proposals = {"none": None, **tuned}
            if not tuned or self.preconditioner != "best":
                proposals = next(iter(tuned.values()), None)
            volumes[split] = tuple(work.volume(batches, cutoff, proposals) for cutoff in self.cutoffs)
            if bridged and self.method != "rays":
                walked = [work.bridge(batches, cutoff) for cutoff in self.cutoffs]
                bridges |= {split: kept} if (kept := tuple(bridge for bridge in walked if bridge is not None)) else {}
        if self.sigma == "first":
            self.kept_sigma = work.sigma
        adam_eps = self.kept_eps if self.preconditioner != "kronecker" else self.kept_kronecker_eps
        return BasinVolumes(
            volumes=volumes,
            batches={split: len(batches) for split, batches in samples.items()},
            preconditioner=self.preconditioner,
            eps=adam_eps if self.preconditioner in (*tuned, "best") else None,
            kronecker_eps=self.kept_kronecker_eps if self.preconditioner == "best" else None,
            n_samples=self.n_samples,
            bridges=bridges,
            cost=work.cost,
        )

    def _tuned(self, work: _Work, batches: Sequence[Any], make: Make, name: str) -> dict[str, Preconditioner]:
        """The preconditioner with the damping of the first analysis; none where no damping gives a lower bound."""
        kept = self.kept_kronecker_eps if name == "kronecker" else self.kept_eps
        if kept is not None:
            return {name: make(kept)}
        try:
            tuned = tuned_preconditioner(
                make, lambda proposal: work.volume(batches, self.cutoffs[0], proposal, pilot=True)
            )
        except NoLowerBoundError as error:
            warnings.warn(f"{error}; the volume is measured without a preconditioner", stacklevel=2)
            return {}
        if name == "kronecker":
            self.kept_kronecker_eps = tuned.eps
        else:
            self.kept_eps = tuned.eps
        return {name: tuned.preconditioner}

    def state(self) -> dict[str, float | None]:
        """What later analyses must keep, for a checkpoint."""
        return {"sigma": self.kept_sigma, "eps": self.kept_eps, "kronecker_eps": self.kept_kronecker_eps}

    def load(self, state: Mapping[str, float | None]) -> None:
        """Takes up the state of an interrupted run; a sigma that was given stays."""
        if self.sigma == "first":
            self.kept_sigma = state["sigma"]
        self.kept_eps, self.kept_kronecker_eps = state["eps"], state.get("kronecker_eps")
        if self.preconditioner == "kronecker" and "kronecker_eps" not in state:  # of a checkpoint from before
            self.kept_kronecker_eps = self.kept_eps


def _damped(fisher: KroneckerFisher, eps: float) -> Preconditioner:
    return KroneckerPreconditioner(fisher, eps=eps)


@dataclass
class _Work:
    """One analysis: what all of its volumes share, and what they cost."""

    survey: VolumeSurvey
    model: nn.Module
    objective: Objective
    space: ParameterSpace
    total: int
    progress: Callable[[int, int], None] | None
    sigma: float | None
    done: int = 0
    cost: Cost = field(default=Cost())

    def volume(
        self, batches: Sequence[Any], cutoff: float, proposals: Proposals, *, pilot: bool = False
    ) -> VolumeResult:
        estimator = self.survey.estimator
        result = basin_volume(
            self.model,
            batches,
            self.objective,
            n_directions=_PILOT_DIRECTIONS if pilot else self.survey.n_directions,
            cutoff=cutoff,
            sigma=self.sigma,
            preconditioner=proposals,
            estimator=replace(estimator, seed=estimator.seed + 1) if pilot else estimator,
            space=self.space,
            progress=None if pilot else self._tell,
        )
        self.cost += result.cost
        if not pilot:
            # All volumes of one analysis share the first one's, measured or given.
            self.sigma = result.sigma
        return result

    def bridge(self, batches: Sequence[Any], cutoff: float) -> BridgeResult | None:
        """None where ``auto`` finds that no bridge can be walked here."""
        result = basin_volume(
            self.model,
            batches,
            self.objective,
            n_directions=1,
            cutoff=cutoff,
            sigma=self.sigma,
            estimator=self.survey.estimator,
            space=self.space,
            method=self.survey.method,
            bridge=self.survey.bridge,
            progress=self.progress,
        )
        self.cost += result.cost
        return result if isinstance(result, BridgeResult) else None

    def fisher(self, batches: Sequence[Any]) -> KroneckerFisher:
        seed = self.survey.estimator.seed
        fisher = kronecker_fisher(self.model, batches, self.objective, space=self.space, seed=seed)
        self.cost += fisher.cost
        return fisher

    def _tell(self, done: int, total: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(min(self.done, self.total), self.total)


@dataclass(frozen=True)
class BasinVolumes(AnalysisResult):
    """The volumes of one analysis.

    Args:
        volumes: By split, one for each cutoff, ascending.
        batches: By split, in how many batches its samples lie.
        preconditioner: What was asked for.
        eps: Damping of the preconditioner, in units of the mean; None as long as there was none.
        n_samples: Samples asked for of each split; None for all.
        kronecker_eps: With ``best`` that of the Kronecker factors, ``eps`` being that of the optimizer's moments.
        bridges: By split, the volumes by a bridge, one for each cutoff; empty where none was walked.
        cost: Passes of the model, in samples, with those of the pilot, of the anchor and of the Fisher information.
    """

    analysis = "basin_volume"

    volumes: Mapping[str, tuple[VolumeResult, ...]]
    batches: Mapping[str, int]
    preconditioner: PreconditionerName
    eps: float | None = None
    n_samples: int | None = None
    kronecker_eps: float | None = None
    bridges: Mapping[str, tuple[BridgeResult, ...]] = field(default_factory=dict)
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def sigma(self) -> float:
        """Standard deviation of the measure, parameter units; all volumes share it."""
        return self._first.sigma

    @property
    def fits(self) -> list[dict[str, Any]]:
        """The line through each split's volumes by cutoff, where there are several."""
        names = ("scaling_exponent_fit", "intercept", "learning_coefficient_slope")
        fits = []
        for split, results in self.volumes.items():
            numbers = fit_exponents([one.cutoff for one in results], [one.log_volume for one in results])
            if numbers is not None:
                fits.append({"split": split, **dict(zip(names, numbers, strict=True))})
        return fits

    def metrics(self) -> dict[str, float | None]:
        """The numbers of each volume, with one name per split and cutoff, and the slopes over the cutoffs."""
        metrics: dict[str, float | None] = {}
        for split, label, result in self._labelled():
            metrics |= {_tag(name, split, label): value for name, value in result.metrics().items()}
        for split, label, bridge in self._labelled_bridges():
            metrics |= {_tag(f"bridge_{name}", split, label): value for name, value in bridge.metrics().items()}
        for fit in self.fits:
            for name in ("scaling_exponent_fit", "learning_coefficient_slope"):
                metrics[_tag(name, fit["split"], fit["split"])] = fit[name]
        if self.kronecker_eps is not None:
            metrics["kronecker_eps"] = self.kronecker_eps
        return metrics | {"sigma": self.sigma, "eps": self.eps}

    def details(self) -> dict[str, Any]:
        """Every volume with its directions, the fits, and the settings."""
        labelled = list(self._labelled())
        return {
            "n_directions": self._first.n_directions,
            "n_samples": self.n_samples,
            "cutoffs": [result.cutoff for result in next(iter(self.volumes.values()))],
            "measure": self._first.measure,
            "dimension": self._first.dimension,
            "sigma": self.sigma,
            "eps": self.eps,
            "preconditioner": self.preconditioner,
            "preconditioner_used": ", ".join(dict.fromkeys(result.preconditioner for _, _, result in labelled)),
            "volumes": [
                {"split": split, "label": label, "batches": self.batches[split], **result.details()}
                for split, label, result in labelled
            ],
            "fits": self.fits,
            "bridges": [
                {"split": split, "label": label, **bridge.details()}
                for split, label, bridge in self._labelled_bridges()
            ],
        }

    @property
    def _first(self) -> VolumeResult:
        return next(iter(self.volumes.values()))[0]

    def _labelled(self) -> Iterator[tuple[str, str, VolumeResult]]:
        for split, results in self.volumes.items():
            for result in results:
                yield split, split if len(results) == 1 else f"{split}-{float(result.cutoff)!r}", result

    def _labelled_bridges(self) -> Iterator[tuple[str, str, BridgeResult]]:
        for split, results in self.bridges.items():
            for result in results:
                yield split, split if len(results) == 1 else f"{split}-{float(result.cutoff)!r}", result


def _tag(name: str, split: str, label: str) -> str:
    if split == ONLY_SPLIT:
        label = label.removeprefix(ONLY_SPLIT).removeprefix("-")
    return f"{name}/{label}" if label else name


def fit_exponents(cutoffs: Sequence[float], log_volumes: Sequence[float]) -> tuple[float, float, float] | None:
    r"""The straight line through log-volumes over log-cutoffs, and its slope at the small end.

    .. math:: \log V(\epsilon) \approx a + \lambda \log \epsilon

    Args:
        cutoffs: Different, ascending, nats.
        log_volumes: One each, nats.

    Returns:
        The slope by least squares, the intercept a (nats), and the slope between the two smallest cutoffs; None with
        fewer than two volumes, or when one is not finite.

    Example:
        >>> [round(value, 6) for value in fit_exponents([0.01, 0.1], [-10.0, -10.0 + 3 * math.log(10)])]
        [3.0, 3.815511, 3.0]
    """
    if len(cutoffs) < 2 or not all(map(math.isfinite, log_volumes)):
        return None
    x, y = np.log(np.asarray(cutoffs, dtype=np.float64)), np.asarray(log_volumes, dtype=np.float64)
    centred = x - x.mean()
    slope = float(centred @ y / (centred @ centred))
    return slope, float(y.mean() - slope * x.mean()), float((y[1] - y[0]) / (x[1] - x[0]))
