"""Records of any source: files of JSON, JSON lines or a table, datasets, the embedded atlas."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_goldy.data.facts import load_countries
from lightning_goldy.data.names import unknown_name
from lightning_goldy.data.readers.formats import Container
from lightning_goldy.data.readers.records import Record, RecordError, shown
from lightning_goldy.data.sources import datasets_library, is_dataset_name, is_saved_dataset

ATLAS = "atlas"
"""The source of that name is the embedded table; ``./atlas`` is a file."""

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}

Entry = Record | RecordError


@dataclass(frozen=True)
class Rows:
    """The records of a source, and those that cannot be read.

    Args:
        entries: One by one.
        container: What they came in.
        source: What messages call it.
    """

    entries: Iterable[Entry]
    container: Container
    source: str


def open_rows(source: object, *, split: str | None = None, container: Container | None = None) -> Rows:
    """The records of a source.

    Args:
        source: ``atlas``; a file; the folder of a saved dataset; a dataset's name on the hub, ``NAME`` or
            ``NAME:CONFIG``; splits by name; or rows, each a mapping.
        split: The split of a dataset; by default ``train``, or the only one.
        container: What a file holds; told from its name and its first character by default.

    Raises:
        FileNotFoundError: No such source.
        ImportError: It needs the datasets library, which is not there.
        ValueError: It cannot be read, or has no such split.
    """
    if isinstance(source, str) and source == ATLAS:
        countries = ({"country": country} for country in load_countries())
        return Rows(_records(countries, ATLAS, "country"), "atlas", ATLAS)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if path.is_file():
            if split is not None:
                raise ValueError(f"split={split!r} is for datasets; {path} is a file")
            return _file_rows(path, container)
        return _dataset_rows(_load_dataset(path, str(source), split), str(source), split)
    return _dataset_rows(source, "the dataset", split)


def _file_rows(path: Path, container: Container | None) -> Rows:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    suffix = path.suffix.lower()
    container = container or (
        "csv" if suffix in _TABLES else "lines" if suffix in _LINES else _json_container(text, path)
    )
    if container == "csv":
        return Rows(_table_records(text, str(path), _TABLES.get(suffix, ",")), container, str(path))
    if container == "lines":
        return Rows(_line_records(text, str(path)), container, str(path))
    return Rows(_records(_json_list(text, path), str(path), "record"), container, str(path))


def _json_container(text: str, path: Path) -> Container:
    start = text.lstrip()[:1]
    if start == "[":
        return "json"
    if start not in ("{", ""):
        kinds = ", ".join((".json", *_LINES, *_TABLES))
        raise ValueError(f"{path} begins with {start!r}, so it is no JSON; the files that can be read are {kinds}")
    # An object over several lines is no line, and no list either: the list's reader says what it found.
    return "lines" if not start or _is_object(text.lstrip().split("\n", 1)[0]) else "json"


def _is_object(line: str) -> bool:
    try:
        return isinstance(_json(line), dict)
    except ValueError:
        return False


def _json_list(text: str, path: Path) -> list[Any]:
    try:
        rows = _json(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if isinstance(rows, list):
        return rows
    found = f"one object with {', '.join(rows) or 'nothing'}" if isinstance(rows, dict) else shown(rows)
    raise ValueError(f"{path}: expected a list of records; found {found}")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _line_records(text: str, source: str) -> Iterator[Entry]:
    # Only this separator: str.splitlines also cuts at characters that JSON leaves inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = _json(line)
            except ValueError as error:
                yield RecordError(f"{source}, line {number}: not JSON: {error}", "not JSON")
            else:
                yield _entry(row, source, f"line {number}")


def _table_records(text: str, source: str, delimiter: str) -> Iterator[Entry]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise ValueError(
                f"{source}, line 1: the columns need names, each its own; found {', '.join(map(repr, header))}"
            )
        start = lines.line_num + 1
        for cells in lines:
            if len(cells) == len(header):
                yield Record(dict(zip(header, cells, strict=True)), source, f"line {start}")
            elif cells:
                problem = f"expected {len(header)} cells; found {len(cells)}"
                yield RecordError(f"{source}, line {start}: {problem}", "another number of cells than columns")
            start = lines.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{source}, line {lines.line_num}: not a table: {error}") from error


def _records(rows: Iterable[object], source: str, what: str) -> Iterator[Entry]:
    for number, row in enumerate(rows, start=1):
        yield _entry(row, source, f"{what} {number}")


def _entry(row: object, source: str, label: str) -> Entry:
    if isinstance(row, Mapping):
        return Record(row, source, label)
    message = f"{source}, {label}: expected an object with id, question, answer or other fields; found {shown(row)}"
    return RecordError(message, "no object")


def _dataset_rows(dataset: Any, source: str, split: str | None) -> Rows:
    if isinstance(dataset, Mapping):
        only = next(iter(dataset)) if len(dataset) == 1 else "train"
        name = only if split is None else split
        if name not in dataset:
            raise ValueError(f"{source}: {unknown_name('split', name, map(str, dataset))}")
        source, dataset = f"{source}, split {name}", dataset[name]
    elif split is not None:
        raise ValueError(f"split={split!r} needs splits by name; {source} has none")
    if isinstance(dataset, str | bytes) or not isinstance(dataset, Iterable):
        raise ValueError(f"a source is a path, the name of a dataset, or rows; found {shown(dataset)}")
    return Rows(_records(dataset, source, "row"), "rows", source)


def _load_dataset(path: Path, source: str, split: str | None) -> Any:
    if is_saved_dataset(path):
        return datasets_library().load_from_disk(str(path))
    files = (".json", *_LINES, *_TABLES)
    if path.exists() or path.is_absolute() or path.suffix.lower() in files or not is_dataset_name(source):
        raise FileNotFoundError(
            f"{str(path)!r} is not a file (looked in {Path.cwd()}). A source is a file ({', '.join(files)}), the folder"
            f" of a saved dataset, a dataset's name on the hub (name or name:config), or {ATLAS!r}"
        )
    name, _, config = source.partition(":")
    library = datasets_library()
    try:
        return {split or "train": library.load_dataset(name, config or None, split=split or "train")}
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither a file in {Path.cwd()} nor a dataset that can be loaded: {error}"
        ) from error
