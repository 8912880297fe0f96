"""Scalars, figures and histograms to whatever loggers a run has, told apart by what they can do."""

from __future__ import annotations

import functools
import io
import logging
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from lightning_goldy.report.figures import Figure

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
    """Logs a figure as a PNG image to the loggers that can take one.

    Args:
        loggers: TensorBoard, Weights & Biases, MLflow and Comet take images.
        tag: Name under which it appears.
        figure: As :func:`~lightning_goldy.report.figures.draw_figures` gives it. It is drawn once, and only when there
            is a logger that takes it.
        step: Training step.

    Returns:
        Class names of the loggers that cannot take figures; each is also told once in the log.

    Raises:
        TypeError: It is something else, for example a figure of another library.

    Example:
        >>> from lightning_goldy.report.figures import Figure
        >>> log_figure([object()], "goldy/golden", Figure({"mark": "point"}), 10)
        ['object']
    """
    if not hasattr(figure, "png"):
        raise TypeError(
            f"figure {tag!r} is a {type(figure).__module__}.{type(figure).__qualname__}; give a "
            "lightning_goldy.report.Figure, as a function under register_figure returns it"
        )
    draw = functools.cache(figure.png)
    return _refusing(loggers, "figures", lambda logger: _take_figure(logger, tag, draw, step))


def figure_loggers(loggers: Iterable[Any]) -> list[Any]:
    """The loggers that can take figures; each of the others is told once in the log.

    Args:
        loggers: Those of the run.

    Example:
        >>> figure_loggers([object()])
        []
    """

    def takes(logger: Any) -> bool:
        try:
            places = logger, getattr(logger, "experiment", None)
        except Exception:  # noqa: BLE001 - a service may raise anything, and is told of when it is written to
            return True
        names = "_get_file_writer", "add_image", "log_image"
        return hasattr(places[0], "log_image") or any(hasattr(places[1], name) for name in names)

    taking = [(logger, takes(logger)) for logger in loggers]
    _refusing([logger for logger, able in taking if not able], "figures", lambda logger: False)
    return [logger for logger, able in taking if able]


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

    def take(logger: Any) -> bool:
        writer: Any = getattr(logger, "experiment", None)
        if not hasattr(writer, "add_histogram_raw"):
            return False
        if bins is None:
            writer.add_histogram(tag, plain, global_step=step)
        else:
            writer.add_histogram_raw(tag, **_moments(*bins), global_step=step)
        return True

    return _refusing(loggers, "histograms", take)


def log_text(loggers: Iterable[Any], tag: str, text: str, step: int) -> list[str]:
    """Logs Markdown to the loggers that can take text (TensorBoard, Weights & Biases, MLflow).

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

    def take(logger: Any) -> bool:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "add_text"):
            writer.add_text(tag, text, global_step=step)
        elif hasattr(logger, "log_text"):
            # Weights & Biases shows tables.
            logger.log_text(tag, columns=["text"], data=[[text]], step=step)
        elif hasattr(writer, "log_text") and getattr(logger, "run_id", None) is not None:
            writer.log_text(logger.run_id, text, artifact_file=f"{tag}/step={step:08d}.md")
        else:
            return False
        return True

    return _refusing(loggers, "text", take)


def log_hyperparameters(loggers: Iterable[Any], told: Mapping[str, str], own: Mapping[str, Any]) -> None:
    """Tells loggers what a run is, so that runs can be sorted by it and by their latest numbers.

    TensorBoard's table of hyperparameters gets the run's own as well; it keeps the first of a run, so this has to come
    before Lightning's, which has the one column ``hp_metric``, always -1. Other loggers have the run's own already.

    Args:
        loggers: Those of the run.
        told: What is added: base, data, precision.
        own: The run's hyperparameters, nested as Lightning has them.

    Example:
        >>> log_hyperparameters([object()], {"goldy/precision": "32-true"}, {})
    """
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if hasattr(writer, "_get_file_writer"):
            from torch.utils.tensorboard.summary import hparams

            _, start, _ = hparams({**told, **_flat(own)}, {})
            writer._get_file_writer().add_summary(start)
            if hasattr(logger, "_default_hp_metric"):
                # Or Lightning writes the constant as a scalar of the run.
                logger._default_hp_metric = False
            if isinstance(getattr(logger, "hparams", None), dict):
                # Written to hparams.yaml, where the page finds them.
                logger.hparams.update(told)
        elif hasattr(logger, "log_hyperparams"):
            logger.log_hyperparams(dict(told))


def log_columns(
    loggers: Iterable[Any], told: Mapping[str, str], own: Mapping[str, Any], columns: Sequence[str]
) -> None:
    """Names the scalars that are columns of TensorBoard's table of runs, in their order; other loggers show them all.

    TensorBoard keeps the first that a run is given, and has no place for a number that never came: this belongs to the
    end of a run. Until then its columns are all scalars, by name.

    Args:
        loggers: Those of the run.
        told: As it was given to :func:`log_hyperparameters`.
        own: As it was given there.
        columns: Tags of the scalars.

    Example:
        >>> log_columns([object()], {"goldy/precision": "32-true"}, {}, ["goldy/taylor_diff/loss"])
    """
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if columns and hasattr(writer, "_get_file_writer"):
            from torch.utils.tensorboard.summary import hparams

            experiment, _, end = hparams({**told, **_flat(own)}, dict.fromkeys(columns, 0.0))
            for summary in (experiment, end):
                writer._get_file_writer().add_summary(summary)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by paths of names; what is no number or text as it is printed."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def log_layout(loggers: Iterable[Any], layout: Mapping[str, Mapping[str, Any]]) -> None:
    """Arranges custom scalars in the loggers that can (TensorBoard); the others show their scalars by name anyway.

    Args:
        loggers: Those of the run.
        layout: Category to chart to its kind and its tags.

    Example:
        >>> log_layout([object()], {})
    """
    for logger in loggers:
        writer: Any = getattr(logger, "experiment", None)
        if layout and hasattr(writer, "add_custom_scalars"):
            writer.add_custom_scalars(layout)


def _refusing(loggers: Iterable[Any], what: str, take: Callable[[Any], bool]) -> list[str]:
    refused = [type(logger).__name__ for logger in loggers if not take(logger)]
    for name in refused:
        _tell_once(name, what)
    return refused


def _take_figure(logger: Any, tag: str, draw: Callable[[], bytes], step: int) -> bool:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "_get_file_writer"):
        _add_to_tensorboard(experiment, tag, draw(), step)
    elif hasattr(experiment, "add_image"):
        experiment.add_image(tag, np.asarray(_decoded(draw())), global_step=step, dataformats="HWC")
    elif hasattr(logger, "log_image"):
        # Weights & Biases.
        logger.log_image(tag, [_decoded(draw())], step=step)
    elif hasattr(experiment, "log_image") and getattr(logger, "run_id", None) is not None:
        # MLflow's client keeps images as files of a run.
        experiment.log_image(logger.run_id, _decoded(draw()), artifact_file=f"{tag}/step={step:08d}.png")
    elif hasattr(experiment, "log_image"):
        # Comet.
        experiment.log_image(_decoded(draw()), name=tag, step=step)
    else:
        return False
    return True


def _add_to_tensorboard(writer: Any, tag: str, png: bytes, step: int) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    # Bytes 16 to 24 of a PNG are its width and height. The writer's own `add_image` would pack the pixels again.
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _decoded(png: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(png))


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
    # A warning per logger, however many kinds it cannot take.
    level = logging.INFO if logger in _warned else logging.WARNING
    _warned.add(logger)
    told = "%s cannot take %s; they are left out there. The result files hold the numbers."
    _messages.log(level, told, logger, what)


_warned: set[str] = set()
