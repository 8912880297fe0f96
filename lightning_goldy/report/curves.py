"""Training curves of a run directory: TensorBoard event files and the CSV logger's table."""

from __future__ import annotations

import contextlib
import csv
import logging
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Words of a tag that say where and how often a quantity was logged, not what it is.
_PLACES = {"train", "training", "val", "valid", "validation", "test", "step", "epoch"}
_FIRST = (("loss",), ("perplexity", "ppl"), ("accuracy", "acc"))
_MOST_POINTS = 2000


@dataclass(frozen=True)
class Curve:
    """One logged scalar.

    Args:
        steps: Ascending training steps.
        values: One number each; NaN where one was logged.
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class TrainingCurves:
    """Everything that the training itself logged.

    Args:
        curves: Tag to curve.
        seconds: Time between the first and the last event, or None without event files.
        notes: What a reader has to know about the sources.
    """

    curves: dict[str, Curve]
    seconds: float | None
    notes: tuple[str, ...]

    def by_quantity(self) -> dict[str, dict[str, Curve]]:
        """Curves of one quantity together: loss, perplexity and accuracy first, then the others."""
        groups: dict[str, dict[str, Curve]] = {}
        for tag in sorted(self.curves):
            groups.setdefault(quantity_of(tag), {})[tag] = self.curves[tag]
        return dict(sorted(groups.items(), key=lambda item: (_rank(item[0]), item[0])))


def quantity_of(tag: str) -> str:
    """What a tag measures, without the words for where and how often.

    Example:
        >>> quantity_of("train_loss_epoch"), quantity_of("val/token_accuracy"), quantity_of("lr-AdamW/pg1")
        ('loss', 'token accuracy', 'lr AdamW pg1')
    """
    words = [word for word in re.split(r"[/_.\-\s]+", tag) if word]
    return " ".join(word for word in words if word.lower() not in _PLACES) or tag


def read_curves(directory: Path) -> TrainingCurves:
    """Reads the curves; the analyses' own scalars (``goldy/...``) are left to their result files.

    Args:
        directory: Log directory of a run.
    """
    curves, seconds, notes = _event_curves(directory)
    table = directory / "metrics.csv"
    if table.is_file():
        from_table, table_notes = _table_curves(table)
        curves, notes = {**from_table, **curves}, notes + table_notes
    return TrainingCurves({tag: _thinned(curve) for tag, curve in curves.items()}, seconds, tuple(notes))


def _event_curves(directory: Path) -> tuple[dict[str, Curve], float | None, list[str]]:
    files = sorted(directory.glob("events.out.tfevents.*"))
    points: dict[str, list[tuple[int, float]]] = {}
    seconds: float | None = None
    for file in files:
        scalars, duration = _read_events(file)
        # Every file is one launch; the time between two launches is not the run's.
        seconds = duration if seconds is None else seconds + (duration or 0.0)
        for tag, events in scalars.items():
            # A resumed run goes back to its checkpoint: what an earlier launch logged after that is void.
            points[tag] = [point for point in points.get(tag, []) if point[0] < events[0][0]] + events
    notes = ["The TensorBoard event files hold no scalars."] if files and seconds is None else []
    return {tag: _curve(events) for tag, events in points.items() if not _foreign(tag)}, seconds, notes


def _read_events(file: Path) -> tuple[dict[str, list[tuple[int, float]]], float | None]:
    from tensorboard.backend.event_processing import event_accumulator

    keep = {event_accumulator.SCALARS: 0, event_accumulator.IMAGES: 1, event_accumulator.HISTOGRAMS: 1}
    accumulator = event_accumulator.EventAccumulator(str(file), size_guidance=keep)
    with _quiet("tensorboard"):
        accumulator.Reload()
    scalars, times = {}, []
    for tag in accumulator.Tags()[event_accumulator.SCALARS]:
        events = accumulator.Scalars(tag)
        times += [events[0].wall_time, events[-1].wall_time]
        scalars[tag] = [(event.step, event.value) for event in events]
    return scalars, max(times) - min(times) if times else None


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a library's chatter out of the console of the run that writes the report."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _table_curves(path: Path) -> tuple[dict[str, Curve], list[str]]:
    points: dict[str, list[tuple[int, float]]] = {}
    bad = 0
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file, restval="", restkey="")
        if "step" not in (reader.fieldnames or ()):
            return {}, [f"{path.name} has no column 'step'; it is left out of the curves."]
        for line in reader:
            step = _number(line["step"])
            if step is None or not math.isfinite(step):
                bad += 1
                continue
            for tag, text in line.items():
                if not text or _foreign(tag):
                    continue
                value = _number(text)
                if value is None:
                    bad += 1
                else:
                    points.setdefault(tag, []).append((int(step), value))
    notes = [f"{bad} cells of {path.name} are not numbers; they are left out of the curves."] if bad else []
    return {tag: _curve(pairs) for tag, pairs in points.items()}, notes


def _foreign(tag: str) -> bool:
    return not tag or tag in ("step", "epoch", "hp_metric") or tag.startswith("goldy/")


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def _curve(points: Iterable[tuple[int, float]]) -> Curve:
    # A resumed run logs some steps again; the later value is the one that training went on from.
    merged = dict(points)
    steps = sorted(merged)
    return Curve(tuple(steps), tuple(float(merged[step]) for step in steps))


def _thinned(curve: Curve) -> Curve:
    """Keeps the lowest and the highest point of every bucket, so that no spike disappears."""
    count = len(curve.steps)
    if count <= _MOST_POINTS:
        return curve
    values = np.asarray(curve.values)
    kept = {0, count - 1}
    for bucket in np.array_split(np.arange(count), _MOST_POINTS // 2):
        # argmin of a bucket with a NaN is that NaN: it shows as the gap that it is.
        kept |= {int(bucket[values[bucket].argmin()]), int(bucket[values[bucket].argmax()])}
    order = sorted(kept)
    return Curve(tuple(curve.steps[index] for index in order), tuple(curve.values[index] for index in order))


def _rank(quantity: str) -> int:
    words = quantity.lower().split()
    return next((rank for rank, names in enumerate(_FIRST) if any(name in words for name in names)), len(_FIRST))
