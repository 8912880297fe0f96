"""A run directory as data: the rows of every analysis, the training curves, the settings."""

from __future__ import annotations

import contextlib
import csv
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lightning_goldy.core.files import StoreError, parse_json
from lightning_goldy.core.store import read_header
from lightning_goldy.report.descriptions import position_of
from lightning_goldy.report.figures import ReportError, Row

# Words of a tag that say where and how often a quantity was logged, not what it is.
_PLACES = {"train", "training", "val", "valid", "validation", "test", "step", "epoch"}
_FIRST = (("loss",), ("perplexity", "ppl"), ("accuracy", "acc"))
_MOST_POINTS = 2000
_ROWS = "results.jsonl"
# What a float counts one by one.
_MOST_STEPS = 2**53


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
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file, restval="", restkey="")
        try:
            if "step" not in (reader.fieldnames or ()):
                return {}, [f"{path.name} has no column 'step'; it is left out of the curves."]
            lines = list(reader)
        except csv.Error as error:
            return {}, [
                f"{path.name}, line {reader.line_num}, is not of a table ({error}); it is left out of the curves."
            ]
    return _points_of(lines, path.name)


def _points_of(lines: Iterable[Mapping[str, str]], name: str) -> tuple[dict[str, Curve], list[str]]:
    points: dict[str, list[tuple[int, float]]] = {}
    bad = 0
    for line in lines:
        step = _number(line["step"])
        if step is None or not abs(step) < _MOST_STEPS:
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
    notes = [f"{bad} cells of {name} are not numbers; they are left out of the curves."] if bad else []
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


FORMAT = 2
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "analysis": str,
    "step": int,
    "epoch": int,
    "trigger": str,
    "metrics": Mapping,
    "result": Mapping,
    "headline": str,
    "cost": Mapping,
}
_NAMES = {str: "text", int: "an integer", Mapping: "an object"}
_COSTS = ("seconds", "forwards", "backwards", "model_evaluations", "peak_memory_bytes")


@dataclass(frozen=True)
class AnalysisRows:
    """The rows of one analysis of a run.

    Args:
        name: Name of the instance, which is its folder's.
        analysis: Class of analysis.
        path: The ``results.jsonl``.
        rows: Ordered by step; one for each step, trigger and kind of weights.
        lines: Line number of each row in the file.
    """

    name: str
    analysis: str
    path: Path
    rows: tuple[Row, ...]
    lines: tuple[int, ...]

    def defined(self) -> AnalysisRows:
        """Those rows that hold numbers; the others tell only that the training has left nothing to measure."""
        pairs = zip(self.rows, self.lines, strict=True)
        known = [(row, line) for row, line in pairs if not row["result"].get("undefined")]
        return replace(self, rows=tuple(row for row, _ in known), lines=tuple(line for _, line in known))

    def where(self, index: int) -> str:
        """File and line of a row."""
        return f"{self.path}, line {self.lines[index]}"


@dataclass(frozen=True)
class Run:
    """Everything that the report tells.

    Args:
        directory: Log directory of the run.
        analyses: Those with at least one row, in the order of the page.
        training: Curves that the training logged.
        settings: File name to text of the files with the run's settings.
        model_class: Class name of the finetuned model, when some file of the run tells it.
        notes: What a reader has to know about the sources.
        waiting: Callbacks that were attached and have no row yet: name of the instance to its class, if that is told.
    """

    directory: Path
    analyses: tuple[AnalysisRows, ...]
    training: TrainingCurves
    settings: Mapping[str, str]
    model_class: str | None
    notes: tuple[str, ...]
    waiting: Mapping[str, str] = field(default_factory=dict)

    @property
    def last_step(self) -> int:
        """The last step that the run's rows or curves know."""
        rows = [row["step"] for analysis in self.analyses for row in analysis.rows]
        return max([*rows, *(curve.steps[-1] for curve in self.training.curves.values())])


def read_run(run_directory: str | os.PathLike[str]) -> Run:
    """Reads a run directory, its ``goldy`` folder, or a directory with several runs (the newest is taken).

    Args:
        run_directory: For example ``lightning_logs/version_3``.

    Raises:
        ReportError: The directory is missing, holds no analyses, or a file in it cannot be read.
    """
    goldy, notes = _find_results(Path(run_directory))
    analyses = []
    for path in sorted(goldy.glob(f"*/{_ROWS}")):
        rows, row_notes = _read_rows(path)
        notes += row_notes
        if rows is None:
            notes.append(f"{path.parent.name} has not written a result yet.")
        else:
            analyses.append(rows)
    if not analyses:
        why = "; ".join(["nothing has been analysed yet", *(note.rstrip(".") for note in notes)])
        raise ReportError(f"{goldy}: no results.jsonl in its folders has a row; {why}")
    # A run that was killed in an analysis leaves the folders of those that were still to come.
    told = {rows.name for rows in analyses}
    begun = [path for path in sorted(goldy.glob("*/.run.json")) if path.parent.name not in told]
    waiting = {path.parent.name: _callback_of(path) for path in begun}
    notes += [f"{name} has not written a result yet." for name in waiting if not (goldy / name / _ROWS).exists()]
    analyses.sort(key=lambda rows: (position_of(rows.analysis), rows.name))
    training = read_curves(goldy.parent)
    files = [goldy.parent / name for name in ("config.yaml", "hparams.yaml")]
    settings = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()}
    model_class, header_notes = _find_model_class(goldy)
    all_notes = (*notes, *header_notes, *training.notes)
    return Run(goldy.parent, tuple(analyses), training, settings, model_class, all_notes, waiting)


def _callback_of(notes: Path) -> str:
    """Class of the callback that a folder's notes tell of; nothing where they do not."""
    try:
        known = parse_json(notes.read_bytes())
    except (OSError, ValueError):
        return ""
    return str(known.get("callback", "")) if isinstance(known, Mapping) else ""


def upgraded(row: Row) -> Row:
    """A row of format 1 as one of format 2; any other row as it is.

    The lines of the run so far, which rows of format 1 hold, are left out, as the rows before it tell them. Its number
    of evaluations had a unit that differed between analyses, so it stays under its own name, ``model_evaluations``.

    Example:
        >>> cost = {"seconds": 0.5, "model_evaluations": 12, "peak_memory_bytes": 1024}
        >>> old = {"format": 1, "analysis": "taylor_diff", "result": {"regime": "lazy", "trajectory": {}}, "cost": cost}
        >>> upgraded(old)["result"], upgraded(old)["cost"]["model_evaluations"], upgraded(old)["cost"]["forwards"]
        ({'regime': 'lazy'}, 12, None)
    """
    if row.get("format") != 1 or not all(isinstance(row.get(name), Mapping) for name in ("result", "cost")):
        return row
    result = _without_history(str(row.get("analysis")), row["result"])
    cost = {"forwards": None, "backwards": None, **row["cost"]}
    return {**row, "format": FORMAT, "result": result, "headline": "", "cost": cost}


def _find_results(directory: Path) -> tuple[Path, list[str]]:
    if not directory.is_dir():
        state = "is not a directory" if directory.exists() else "does not exist"
        raise ReportError(f"run directory {directory} {state}")
    # `.` has neither a name nor a parent.
    directory = directory.resolve()
    for goldy in (directory / "goldy", directory):
        if any(goldy.glob("*/results.jsonl")):
            return goldy, []
    found: dict[Path, int] = {}
    for depth in ("*", "*/*", "*/*/*"):
        for path in directory.glob(f"{depth}/goldy/*/results.jsonl"):
            goldy = path.parent.parent
            found[goldy] = max(found.get(goldy, 0), path.stat().st_mtime_ns)
    if not found:
        raise ReportError(
            f"{directory}: no analyses here; looked for goldy/*/results.jsonl in it and three levels below. Give the "
            "log directory of a run, such as lightning_logs/version_0"
        )
    newest = max(found, key=lambda goldy: (found[goldy], _natural(str(goldy))))
    which = f"the newest of {len(found)} runs" if len(found) > 1 else "the only run"
    return newest, [f"This is {newest.parent.relative_to(directory)}, {which} with analyses in {directory.name}."]


def _natural(text: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _read_rows(path: Path) -> tuple[AnalysisRows | None, list[str]]:
    if not path.is_file():
        raise ReportError(f"{path}: rows are in a file; this is {'a folder' if path.is_dir() else 'no file'}")
    notes: list[str] = []
    kept: dict[tuple[int, str, Any], tuple[int, Row]] = {}
    count = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, constants="float")  # shown as gaps
            except ValueError as error:
                if not line.endswith(b"\n"):
                    # The writer was stopped in the middle.
                    notes.append(f"Line {number} of {path.parent.name}/{path.name}, the last, is torn; it is left out.")
                    break
                raise ReportError(f"{path}, line {number}: not JSON: {error}") from error
            row = _checked(row, f"{path}, line {number}")
            count += 1
            kept[row["step"], row["trigger"], row.get("weights")] = number, row
    if not kept:
        return None, notes
    if count > len(kept):
        notes.append(f"{path.parent.name} holds {count - len(kept)} results that were computed again; the last counts.")
    numbered = sorted(kept.values(), key=lambda item: (item[1]["step"], item[0]))
    numbers, rows = zip(*numbered, strict=True)
    for number, row in numbered:
        if row["analysis"] != rows[0]["analysis"]:
            raise ReportError(f"{path}, line {number}: {row['analysis']!r} among rows of {rows[0]['analysis']!r}")
    return AnalysisRows(path.parent.name, rows[0]["analysis"], path, rows, numbers), notes


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise ReportError(f"{where}: a row must be an object, got {type(row).__name__}")
    if row.get("format") not in (1, FORMAT):
        raise ReportError(
            f"{where}: format {row.get('format')!r:.60} is unknown; this version reads formats 1 and {FORMAT}"
        )
    if row["format"] == 1:
        row.setdefault("headline", "")
    for name, kind in _FIELDS.items():
        if name not in row:
            raise ReportError(f"{where}: {name!r} is missing")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ReportError(f"{where}: {name!r} must be {_NAMES[kind]}, got {row[name]!r:.60}")  # type: ignore[index]
    for name in ("step", "epoch"):
        if abs(row[name]) >= _MOST_STEPS:
            raise ReportError(f"{where}: {name!r} is no number that a training reaches, got {row[name]!r:.60}")
    numbers = {f"metrics.{name}": value for name, value in row["metrics"].items()}
    numbers |= {f"cost.{name}": row["cost"].get(name) for name in _COSTS}
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ReportError(f"{where}: {name!r} must be a number or null, got {value!r:.60}")
    return upgraded(row)


def _find_model_class(goldy: Path) -> tuple[str | None, list[str]]:
    notes: list[str] = []
    for path in sorted(goldy.glob("*/*.safetensors")):
        try:
            return read_header(path).model_class, notes
        except StoreError:
            notes.append(f"{path.relative_to(goldy)} is not a readable tensor file.")
    return None, notes


def _without_history(analysis: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A result of format 1 as one of format 2, which holds its own step only.

    Args:
        analysis: As its rows are called.
        result: Of a row of format 1.

    Example:
        >>> _without_history("attention_tracker", {"spectra": [{"prompt": "a", "steps": [0, 5], "values": [[1], [2]]}]})
        {'spectra': [{'prompt': 'a', 'values': [2]}]}
    """
    if analysis in ("taylor_diff", "basin_volume", "coupling_drift", "variant_losses"):
        return {name: value for name, value in result.items() if name != "trajectory"}
    if analysis == "attention_tracker" and "spectra" in result:
        try:
            latest = [{"prompt": line["prompt"], "values": line["values"][-1]} for line in result["spectra"]]
        except (TypeError, LookupError):
            # The figure that needs them says what is wrong with them.
            return dict(result)
        return {**result, "spectra": latest}
    # The parts of head plasticity are put together by their steps, so those that hold the whole run do no harm.
    return dict(result)
