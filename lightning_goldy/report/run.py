"""A run directory as data: the rows of every analysis, the training curves, the settings."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_goldy.core.store import StoreError, read_header
from lightning_goldy.report.curves import TrainingCurves, read_curves
from lightning_goldy.report.descriptions import position_of
from lightning_goldy.report.history import without_history
from lightning_goldy.report.registry import ReportError, Row

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
        rows: Ordered by step; one for each step and trigger.
        lines: Line number of each row in the file.
    """

    name: str
    analysis: str
    path: Path
    rows: tuple[Row, ...]
    lines: tuple[int, ...]

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
    """

    directory: Path
    analyses: tuple[AnalysisRows, ...]
    training: TrainingCurves
    settings: Mapping[str, str]
    model_class: str | None
    notes: tuple[str, ...]


def read_run(run_directory: str | os.PathLike[str]) -> Run:
    """Reads a run directory, its ``goldy`` folder, or a directory with several runs (the newest is taken).

    Args:
        run_directory: For example ``lightning_logs/version_3``.

    Raises:
        ReportError: The directory is missing, holds no analyses, or a file in it cannot be read.
    """
    goldy, notes = _find_results(Path(run_directory))
    analyses = []
    for path in sorted(goldy.glob("*/results.jsonl")):
        rows, row_notes = _read_rows(path)
        notes += row_notes
        if rows is None:
            notes.append(f"{path.parent.name} has not written a result yet.")
        else:
            analyses.append(rows)
    if not analyses:
        raise ReportError(f"{goldy}: no results.jsonl in its folders has a row; nothing has been analysed yet")
    analyses.sort(key=lambda rows: (position_of(rows.analysis), rows.name))
    training = read_curves(goldy.parent)
    files = [goldy.parent / name for name in ("config.yaml", "hparams.yaml")]
    settings = {file.name: file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file()}
    model_class, header_notes = _find_model_class(goldy)
    all_notes = (*notes, *header_notes, *training.notes)
    return Run(goldy.parent, tuple(analyses), training, settings, model_class, all_notes)


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
    result = without_history(str(row.get("analysis")), row["result"])
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
    lines = path.read_bytes().split(b"\n")
    notes: list[str] = []
    kept: dict[tuple[int, str], tuple[int, Row]] = {}
    count = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                # Without a newline after it: the writer was stopped in the middle.
                notes.append(f"Line {number} of {path.parent.name}/{path.name}, the last, is torn; it is left out.")
                break
            raise ReportError(f"{path}, line {number}: not JSON: {error}") from error
        row = _checked(row, f"{path}, line {number}")
        count += 1
        kept[row["step"], row["trigger"]] = number, row
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
            f"{where}: format {row.get('format')!r} is unknown; this version reads formats 1 and {FORMAT}"
        )
    if row["format"] == 1:
        row.setdefault("headline", "")
    for name, kind in _FIELDS.items():
        if name not in row:
            raise ReportError(f"{where}: {name!r} is missing")
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ReportError(f"{where}: {name!r} must be {_NAMES[kind]}, got {row[name]!r:.60}")  # type: ignore[index]
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
