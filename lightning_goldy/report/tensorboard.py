"""Scalars, figures and histograms to whatever loggers a run has, told apart by what they can do."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_messages = logging.getLogger(__name__)


def log_scalars(loggers: Iterable[Any], metrics: Mapping[str, float | None], step: int) -> None:
    """Logs scalars to every logger; a metric that does not exist (None) is left out, as loggers know no null.

    Args:
        loggers: Lightning's loggers, or anything with ``log_metrics(metrics, step=...)``.
        metrics: Name to number.
        step: Training step.

    Example:
        >>> class Printing:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> log_scalars([Printing()], {"goldy/count": 3, "goldy/jaccard": None}, 10)
        10 {'goldy/count': 3.0}
    """
    numbers = {name: float(value) for name, value in metrics.items() if value is not None}
    if numbers:
        for logger in loggers:
            logger.log_metrics(numbers, step=step)


def log_figure(loggers: Iterable[Any], tag: str, figure: Figure, step: int) -> list[str]:
    """Logs a matplotlib figure to the loggers that can take one, and then closes it: the figure is empty afterwards.

    Args:
        loggers: TensorBoard (``experiment.add_figure``), Weights & Biases (``log_image``), MLflow and Comet
            (``experiment.log_figure``) take figures.
        tag: Name under which it appears.
        figure: Not used again.
        step: Training step.

    Returns:
        Class names of the loggers that cannot take figures; each is also told once in the log.

    Example:
        >>> from matplotlib.figure import Figure
        >>> log_figure([object()], "goldy/golden", Figure(), 10)
        ['object']
    """
    try:
        refused = [type(logger).__name__ for logger in loggers if not _take_figure(logger, tag, figure, step)]
    finally:
        pyplot = sys.modules.get("matplotlib.pyplot")
        if pyplot is not None:
            pyplot.close(figure)
        figure.clear()
    for name in refused:
        _tell_once(name, "figures")
    return refused


def log_histogram(
    loggers: Iterable[Any], tag: str, values: ArrayLike | tuple[ArrayLike, ArrayLike], step: int
) -> list[str]:
    """Logs a distribution to the loggers that can take one (TensorBoard).

    Args:
        loggers: Those of the run.
        tag: Name under which it appears.
        values: The values themselves, or a tuple (edges, counts) of a histogram with bins + 1 edges.
        step: Training step.

    Returns:
        Class names of the loggers that cannot take histograms; each is also told once in the log.

    Raises:
        ValueError: Edges and counts do not belong together, or there are no values.

    Example:
        >>> log_histogram([object()], "goldy/change", ([-3.0, -2.0, -1.0], [4, 1]), 10)
        ['object']
    """
    bins = _bins(*values) if isinstance(values, tuple) and len(values) == 2 else None
    plain = np.asarray(values, dtype=np.float64) if bins is None else None
    if plain is not None and not plain.size:
        raise ValueError(f"histogram {tag!r} has no values")
    refused = []
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if not hasattr(writer, "add_histogram_raw"):
            refused.append(type(logger).__name__)
            _tell_once(type(logger).__name__, "histograms")
        elif bins is None:
            writer.add_histogram(tag, plain, global_step=step)
        else:
            writer.add_histogram_raw(tag, **_moments(*bins), global_step=step)
    return refused


def log_text(loggers: Iterable[Any], tag: str, text: str, step: int) -> list[str]:
    """Logs Markdown to the loggers that can take text (TensorBoard).

    Args:
        loggers: Those of the run.
        tag: Name under which it appears.
        text: Markdown; what comes from a model or from data must be escaped already.
        step: Training step.

    Returns:
        Class names of the loggers that cannot take text; each is also told once in the log.

    Example:
        >>> log_text([object()], "goldy/generations", "| prompt |", 10)
        ['object']
    """
    refused = []
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_text"):
            writer.add_text(tag, text, global_step=step)
        else:
            refused.append(type(logger).__name__)
            _tell_once(type(logger).__name__, "text")
    return refused


def _take_figure(logger: Any, tag: str, figure: Figure, step: int) -> bool:
    if hasattr(logger, "log_image"):
        logger.log_image(tag, [figure], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):
        experiment.add_figure(tag, figure, global_step=step, close=False)
        return True
    if hasattr(experiment, "log_figure"):
        if getattr(logger, "run_id", None) is not None:
            # MLflow's client keeps figures as files of a run.
            experiment.log_figure(logger.run_id, figure, f"{tag}/step={step:08d}.png")
        else:
            experiment.log_figure(figure_name=tag, figure=figure, step=step)
        return True
    return False


def _bins(edges: ArrayLike, counts: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    edge, count = np.asarray(edges, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if edge.ndim != 1 or count.ndim != 1 or not count.size or edge.size != count.size + 1:
        raise ValueError(f"a histogram needs one edge more than counts, got {edge.size} edges and {count.size} counts")
    if not np.isfinite(edge).all() or (np.diff(edge) <= 0).any():
        raise ValueError("the edges of a histogram must be finite and ascending")
    return edge, count


def _moments(edges: NDArray[np.float64], counts: NDArray[np.float64]) -> dict[str, Any]:
    middles = (edges[1:] + edges[:-1]) / 2
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": int(counts.sum()),
        "sum": float((counts * middles).sum()),
        "sum_squares": float((counts * middles**2).sum()),
        # TensorBoard takes the right edge of every bin; the first begins at the minimum.
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": counts.tolist(),
    }


@functools.cache
def _tell_once(logger: str, what: str) -> None:
    _messages.warning("%s cannot take %s; they are left out there. The result files hold the numbers.", logger, what)
