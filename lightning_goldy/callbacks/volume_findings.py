"""Basin volumes as metrics, and as a row that can be redrawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.volume_survey import Measured, Survey, VolumeSurvey

ONLY_SPLIT = "probe"
"""What the samples are called when there is nothing to tell them from; metrics then carry no name of a split."""

_LOGGED = (
    "log_volume",
    "lower_bound",
    "interval_low",
    "interval_high",
    "bits_per_parameter",
    "spread",
    "effective_sample_size",
    "scaling_exponent",
    "tolerance",
    "unbounded",
    "evaluations",
)
_PER_DIRECTION = ("estimates", "radii", "props", "deltas", "slopes", "log_integral", "sensitivities", "evaluations")
_PER_VOLUME = (
    "preconditioner",
    "sigma",
    "cutoff",
    "dimension",
    "measure",
    "seed",
    "first_direction",
    "anchor_cost",
    "rtol",
    "max_radius",
    "extra_evaluations",
)


def volume_findings(settings: VolumeSurvey, survey: Survey) -> Row:
    """What to log and to save of an analysis.

    Args:
        settings: What measured.
        survey: What was found.

    Returns:
        Metrics with one name per split and cutoff, and the row.
    """
    fits = _fits(survey.volumes)
    data = {
        "n_directions": settings.n_directions,
        "n_samples": settings.n_samples,
        "cutoffs": list(settings.cutoffs),
        "measure": settings.estimator.measure,
        "dimension": survey.volumes[0].result.dimension,
        "sigma": survey.sigma,
        "eps": survey.eps,
        "preconditioner": settings.preconditioner,
        "preconditioner_used": _used(survey.volumes),
        "volumes": [_record(volume) for volume in survey.volumes],
        "fits": fits,
    }
    return Row("basin_volume", _metrics(survey, fits), data, cost=Cost(forwards=survey.forwards))


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


def _metrics(survey: Survey, fits: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {}
    for volume in survey.volumes:
        numbers = volume.result.summary()
        for name in _LOGGED:
            metrics[_tag(name, volume.split, volume.label)] = numbers[name]
    for fit in fits:
        for name in ("scaling_exponent_fit", "learning_coefficient_slope"):
            metrics[_tag(name, fit["split"], fit["split"])] = fit[name]
    metrics["sigma"] = survey.sigma
    metrics["eps"] = survey.eps
    return metrics


def _tag(name: str, split: str, label: str) -> str:
    if split == ONLY_SPLIT:
        label = label.removeprefix(ONLY_SPLIT).removeprefix("-")
    return f"{name}/{label}" if label else name


def _record(volume: Measured) -> dict[str, Any]:
    result = volume.result
    record: dict[str, Any] = {"split": volume.split, "label": volume.label, "batches": volume.batches}
    record |= {name: getattr(result, name) for name in _PER_VOLUME}
    record |= {name: value for name, value in result.summary().items() if name in _LOGGED}
    # How long it took is no part of a result: a resumed run must give the rows of an uninterrupted one.
    record["proposals"] = {
        name: {key: value for key, value in numbers.items() if key != "seconds"}
        for name, numbers in result.proposals.items()
    }
    # The summary's number of evaluations gives way to the list, one per direction.
    record["total_evaluations"] = result.total_evaluations
    return record | {name: getattr(result, name).tolist() for name in _PER_DIRECTION}


def _fits(volumes: Sequence[Measured]) -> list[dict[str, Any]]:
    fits = []
    for split in dict.fromkeys(volume.split for volume in volumes):
        mine = [volume.result for volume in volumes if volume.split == split]
        found = fit_exponents([each.cutoff for each in mine], [each.log_volume for each in mine])
        if found is not None:
            slope, intercept, smallest = found
            fits.append(
                {
                    "split": split,
                    "scaling_exponent_fit": slope,
                    "intercept": intercept,
                    "learning_coefficient_slope": smallest,
                }
            )
    return fits


def _used(volumes: Sequence[Measured]) -> str:
    names = dict.fromkeys(volume.result.preconditioner for volume in volumes)
    return ", ".join(names)
