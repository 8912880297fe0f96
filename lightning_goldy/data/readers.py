"""From a file, a folder or a dataset to knowledge pieces, with a count of everything that was left out and why."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_goldy.core.files import PlainError, atomic_write, parse_json, to_json_line
from lightning_goldy.core.naming import unknown_name
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.formats import (
    FORMATS,
    Container,
    Form,
    Format,
    Reading,
    Record,
    RecordError,
    SkippedRecord,
    check_form,
    hop_question,
    recognised,
    shown,
    word,
)
from lightning_goldy.data.relations import load_countries

TEXT_SUFFIXES = (".txt", ".md", ".rst")
# Of these `datasets` reads the columns; of the others here the records are read.
_DATASETS = {".parquet": "parquet", ".arrow": "arrow"}
_KINDS = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_MARKERS = ("dataset_dict.json", "state.json")


def check_source(source: str | Path) -> None:
    """See that a source can be one, without reading it.

    Raises:
        FileNotFoundError: It is no file or folder and cannot be a dataset's name either.
    """
    path = Path(source).expanduser()
    looks_like_path = path.is_absolute() or path.suffix.lower() in (*TEXT_SUFFIXES, *_KINDS)
    if not path.exists() and (looks_like_path or not is_dataset_name(str(source))):
        raise FileNotFoundError(
            f"{str(source)!r} does not exist (looked in {Path.cwd()}). A text source is a file, a folder of"
            f" {', '.join(TEXT_SUFFIXES)} files, a saved dataset, or a dataset's name on the hub (name or name:config)"
        )


def holds_records(source: str | Path) -> bool:
    """Whether a source is a file of JSON, JSON lines or a table by its name, and so of questions and answers.

    Example:
        >>> holds_records("no_such.jsonl"), holds_records("no_such.txt")
        (False, False)
    """
    path = Path(source).expanduser()
    return path.is_file() and path.suffix.lower() in (".json", *_LINES, *_TABLES)


def read_documents(source: str | Path) -> list[str]:
    """The documents of a source, without those that are empty.

    Args:
        source: A text file (one document); a file of JSON, JSON lines or a table (one document per record, its field
            ``text``); a folder (one document per text file, in the order of their paths, or per record of its
            tables, where it has no text files); a folder that ``datasets``
            saved or can load, or a name on the hub, optionally with a configuration (``name:config``): one document per
            row of the ``text`` column of its ``train`` split.

    Returns:
        At least one document.

    Raises:
        FileNotFoundError: No such source.
        ValueError: It has no text, or a record without any.
    """
    check_source(source)
    path = Path(source).expanduser()
    if holds_records(path):
        texts: Iterable[str] = _record_texts(path)
    elif path.is_file() and path.suffix.lower() in _DATASETS:
        texts = _table_texts([path])
    elif path.is_file():
        texts = [read_text(path, newline="")]
    elif not path.is_dir():
        texts = _rows(load_from_hub(str(source), "train", "a file or folder"), source)
    elif is_saved_dataset(path):
        texts = _rows(_loaded(datasets_library().load_from_disk, str(path), source), source)
    else:
        texts = _read_folder(path)
    documents = [text for text in texts if text]
    if not documents:
        raise PlainError(f"{str(source)!r} holds no text: every document is empty")
    return documents


def _record_texts(path: Path) -> Iterator[str]:
    """The field ``text`` of each record of a file; a cell of a table may be as long as a document."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, path.stat().st_size))
    try:
        yield from map(_record_text, _file_rows(path, None).entries)
    finally:
        csv.field_size_limit(limit)


def _record_text(entry: Entry) -> str:
    if isinstance(entry, RecordError):
        raise entry
    if "text" not in entry.row:
        raise PlainError(
            f"{entry.source}, {entry.label}: has no field 'text'. It has: {', '.join(map(str, entry.row))}. "
            "Questions and answers are read by KnowledgeDataModule, and a file as it stands where it ends in "
            f"{', '.join(TEXT_SUFFIXES)}"
        )
    text = entry.row["text"]
    if not isinstance(text, str | None):
        raise entry.malformed("text", "text", text)
    return text or ""


def _read_folder(folder: Path) -> Iterable[str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    if texts:
        return [read_text(file, newline="") for file in texts]
    tables = [file for file in files if file.suffix.lower() in _KINDS]
    kinds = sorted({_KINDS[file.suffix.lower()] for file in tables})
    if len(kinds) != 1:
        raise PlainError(
            f"the folder {str(folder)!r} holds neither text files ({', '.join(TEXT_SUFFIXES)}) nor tables of one kind"
            f" ({', '.join(_KINDS)})" + (f" but {' and '.join(kinds)}" if kinds else "")
        )
    return _table_texts(tables) if kinds[0] in _DATASETS.values() else chain.from_iterable(map(_record_texts, tables))


def _table_texts(paths: Iterable[Path]) -> Iterator[str]:
    """The column ``text`` of files of which ``datasets`` reads the columns, file by file."""
    for path in paths:
        load = partial(datasets_library().load_dataset, data_files=[str(path)], split="train")
        yield from _rows(_loaded(load, _DATASETS[path.suffix.lower()], path), path)


def _loaded(load: Callable[[str], Any], name: str, source: str | Path) -> Any:
    """What ``datasets`` loads; its own errors do not tell of which file they are."""
    try:
        return load(name)
    except Exception as error:
        cause = error.__cause__ or error
        raise PlainError(f"{str(source)!r} cannot be read as a dataset: {cause}") from error


def _rows(dataset: Any, source: str | Path) -> Iterable[str]:
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise PlainError(f"the dataset {str(source)!r} has no split 'train'. It has: {', '.join(dataset)}")
        dataset = dataset["train"]
    if "text" not in dataset.column_names:
        raise PlainError(f"the dataset {str(source)!r} has no column 'text'. It has: {', '.join(dataset.column_names)}")
    for row, text in enumerate(dataset["text"]):
        if not isinstance(text, str | None):
            raise PlainError(f"{str(source)!r}, row {row}, column 'text': expected text; found {shown(text)}")
        yield text or ""


def read_text(path: Path, *, newline: str | None = None) -> str:
    """The text of a file in UTF-8.

    Args:
        path: The file.
        newline: None makes all line ends alike and drops a byte order mark; an empty text keeps the file's own.

    Raises:
        ValueError: It is no such text.
    """
    try:
        with path.open(encoding="utf-8-sig" if newline is None else "utf-8", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise PlainError(f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error


def load_from_hub(source: str, split: str, what: str) -> Any:
    """A split of a dataset on the hub, ``NAME`` or ``NAME:CONFIG``.

    Args:
        source: Its name.
        split: Which.
        what: What else the source could have been, for the message.

    Raises:
        FileNotFoundError: It cannot be loaded.
    """
    name, _, config = source.partition(":")
    try:
        return datasets_library().load_dataset(name, config or None, split=split)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source!r} is neither {what} in {Path.cwd()} nor a dataset that can be loaded: {error}"
        ) from error


def is_dataset_name(source: str) -> bool:
    """Whether a text can be a dataset's name on the hub, ``NAME`` or ``NAME:CONFIG``."""
    return _HUB_NAME.fullmatch(source) is not None


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder is one that ``datasets`` saved."""
    return any((folder / marker).is_file() for marker in _MARKERS)


def datasets_library() -> Any:
    """The datasets library.

    Raises:
        ImportError: It is not installed; the message tells how to.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "reading a dataset needs the datasets library: pip install 'lightning-goldy[datasets]'"
        ) from error
    return datasets


__all__ = [
    "FORMATS",
    "Form",
    "Format",
    "OnMalformed",
    "PieceSet",
    "Reading",
    "Record",
    "RecordError",
    "SkippedRecord",
    "hop_question",
    "load_pieces",
    "word",
    "write_pieces",
]


OnMalformed = Literal["error", "skip"]
Entry = Record | RecordError

ATLAS = "atlas"
"""The source of that name is the embedded table; ``./atlas`` is a file."""

_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_REPEATED = "piece that repeats an earlier question and its answer"
_CONTRADICTED = "piece that repeats an earlier question with another answer"


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


@dataclass(frozen=True)
class PieceSet:
    """Knowledge pieces of one source.

    Args:
        pieces: In the source's order; no id and no question occurs twice.
        skipped: How many records or pieces were left out, by reason.
        format: The name of the format.
        source: Where they are from.
        records: Records read, with those left out.
        incomplete: What pieces that were kept go without, by reason: a supporting sentence that the context lacks.
    """

    pieces: tuple[KnowledgePiece, ...]
    skipped: Mapping[str, int]
    format: str
    source: str
    records: int = 0
    incomplete: Mapping[str, int] = field(default_factory=dict)

    @property
    def groups(self) -> Counter[str]:
        """Pieces of each group."""
        return Counter(piece.group for piece in self.pieces if piece.group is not None)

    @property
    def hops(self) -> Counter[int]:
        """Pieces at each place of their group; composed questions have none."""
        return Counter(piece.hop for piece in self.pieces if piece.hop is not None)

    @property
    def categories(self) -> Counter[str]:
        """Pieces of each category."""
        return Counter(piece.category for piece in self.pieces if piece.category is not None)


def load_pieces(
    source: str | Path | Iterable[Any] | Rows,
    *,
    format: str = "auto",
    limit: int | None = None,
    split: str | None = None,
    form: Form = "question",
    whole_questions: bool | None = None,
    on_malformed: OnMalformed = "error",
) -> PieceSet:
    r"""Read knowledge pieces of any known format.

    A question that occurs again is left out and counted, with the same answer or another one: two pieces with one
    question are either the same piece or contradict each other. In the formats ``jsonl`` and ``csv`` it is an error.

    Args:
        source: A file of JSON, JSON lines or a table; ``"atlas"``; the folder of a saved dataset; a dataset's name on
            the hub, ``NAME`` or ``NAME:CONFIG``; or rows, each a mapping, such as a ``datasets.Dataset``; or what
            ``open_rows`` opened.
        format: One of ``FORMATS``, or ``"auto"`` to tell it from what the first record came in and its fields.
        limit: Stop after so many records that gave pieces, so that groups stay whole; None reads all.
        split: The split of a dataset; by default ``train``, or the only one.
        form: How a subject and a relation are worded, where a source has them: ``question`` or ``cloze``.
        whole_questions: Whether a question composed of several facts is a piece beside them, in formats with both;
            None leaves it to the format.
        on_malformed: ``error`` raises at the first faulty record, ``skip`` leaves it out and counts it.

    Returns:
        At least one piece.

    Raises:
        FileNotFoundError: No such source.
        ImportError: The source needs the datasets library, which is not there.
        ValueError: A faulty record, by source, record and field; a format that cannot be told; no piece at all; an
            argument that does not fit the format.

    Example:
        >>> rows = [{"Question": "Capital of Peru?", "answer": ["Lima"]}, {"Question": "Of Atlantis?", "answer": []}]
        >>> found = load_pieces(rows)
        >>> found.format, found.pieces[0].answer, found.skipped
        ('qa', 'Lima', {'record without an answer': 1})
        >>> load_pieces("atlas", form="cloze", limit=1).pieces[0].question
        'The capital of Afghanistan is'
    """
    if format != "auto" and format not in FORMATS:
        raise PlainError(unknown_name("format", format, ("auto", *FORMATS)))
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise PlainError(f"limit={limit!r} must be a whole number of at least 1, or None")
    check_form(form)
    if on_malformed not in get_args(OnMalformed):
        raise PlainError(unknown_name("on_malformed", on_malformed, get_args(OnMalformed)))
    rows = source if isinstance(source, Rows) else open_rows(source, split=split)
    entries = iter(rows.entries)
    if format == "auto":
        format, begun = _recognised(entries, rows, on_malformed)
        entries = chain(begun, entries)
    if (format == ATLAS) != (rows.container == "atlas"):
        raise PlainError(
            f"the format {ATLAS!r} and the source {ATLAS!r} go together; got {format!r} and {rows.source!r}"
        )
    chosen = FORMATS[format]
    collector = _Collector(chosen, _reading(chosen, format, form, whole_questions), on_malformed)
    used = 0
    while used != limit and (entry := next(entries, None)) is not None:
        used += collector.add(entry)
    if not collector.pieces:
        why = "; ".join(f"{reason}: {count}" for reason, count in collector.skipped.items())
        records = (
            f"none of its {collector.records} records gave one ({why})" if collector.records else "it has no records"
        )
        raise PlainError(f"{rows.source} holds no knowledge pieces: {records}")
    left_out, incomplete = dict(collector.skipped), dict(collector.incomplete)
    return PieceSet(tuple(collector.pieces), left_out, format, rows.source, collector.records, incomplete)


def write_pieces(pieces: Iterable[KnowledgePiece], path: str | Path) -> Path:
    r"""Write pieces as JSON lines that ``read_pieces`` and ``load_pieces`` read back as they were.

    Args:
        pieces: No id and no question may occur twice.
        path: The file; it is replaced as a whole, its folder is made when missing.

    Returns:
        The path.

    Raises:
        ValueError: A piece that could not be read back, an id or question that occurs twice, or no piece at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = write_pieces([KnowledgePiece("1", "Q?", "A", hop=1)], f"{folder}/pieces.jsonl")
        ...     path.read_text()
        '{"id": "1", "question": "Q?", "answer": "A", "hop": 1}\n'
    """
    collector = _Collector(FORMATS["jsonl"], Reading(), "error")
    lines = []
    for number, piece in enumerate(pieces, start=1):
        row = {key: value for key, value in asdict(piece).items() if value is not None}
        collector.add(Record(row, "the pieces", f"piece {number}"))
        if collector.pieces[-1] != piece:
            raise PlainError(f"piece {number} would be read back as {collector.pieces[-1]}; it is {piece}")
        lines.append(to_json_line(row) + "\n")
    if not lines:
        raise PlainError(f"there are no pieces to write to {path}")
    return atomic_write(path, "".join(lines))


@dataclass
class _Collector:
    """Pieces so far, and what was left out."""

    chosen: Format
    reading: Reading
    on_malformed: OnMalformed
    pieces: list[KnowledgePiece] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    incomplete: Counter[str] = field(default_factory=Counter)
    records: int = 0
    _ids: dict[str, str] = field(default_factory=dict)
    _questions: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, entry: Entry) -> bool:
        """Takes a record in; whether it gave a piece."""
        self.records += 1
        try:
            if isinstance(entry, RecordError):
                raise entry
            pieces = self.chosen.parse(entry, self.reading)
            self._check(pieces, entry)
        except (SkippedRecord, RecordError) as error:
            if isinstance(error, RecordError) and self.on_malformed == "error":
                raise
            self.skipped[error.reason if isinstance(error, RecordError) else str(error)] += 1
            return False
        kept = sum([self._keep(piece, entry.label) for piece in pieces])
        if kept:
            self.incomplete.update(entry.notes)
        return kept > 0

    def _check(self, pieces: list[KnowledgePiece], record: Record) -> None:
        names = Counter(piece.id for piece in pieces)
        for piece in pieces:
            if piece.id in self._ids or names[piece.id] > 1:
                raise self._repeated(record, "id", piece.id, self._ids.get(piece.id, record.label))
            if self.chosen.repeated == "error" and piece.question in self._questions:
                raise self._repeated(record, "question", piece.question, self._questions[piece.question][1])

    def _keep(self, piece: KnowledgePiece, label: str) -> bool:
        self._ids[piece.id] = label
        if piece.question in self._questions:
            same = self._questions[piece.question][0] == piece.answer
            self.skipped[_REPEATED if same else _CONTRADICTED] += 1
            return False
        self._questions[piece.question] = (piece.answer, label)
        self.pieces.append(piece)
        return True

    @staticmethod
    def _repeated(record: Record, key: str, value: str, first: str) -> RecordError:
        where = f"on {first}" if first.startswith("line") else f"in {first}"
        message = f"{record.place(key)}, field {key!r}: {value!r} already occurs {where}"
        return RecordError(message, f"field {key!r} repeats an earlier one")


def _reading(chosen: Format, name: str, form: Form, whole_questions: bool | None) -> Reading:
    if form == "cloze" and not chosen.relations:
        having = ", ".join(each for each in FORMATS if FORMATS[each].relations)
        raise PlainError(
            f"form='cloze' words a subject and a relation, which {name!r} lacks; these have them: {having}"
        )
    if whole_questions is not None and chosen.whole_questions is None:
        having = ", ".join(each for each in FORMATS if FORMATS[each].whole_questions is not None)
        raise PlainError(
            f"whole_questions={whole_questions} chooses between facts and the questions composed of them; records of"
            f" {name!r} are one or the other; these have both: {having}"
        )
    return Reading(form, bool(chosen.whole_questions if whole_questions is None else whole_questions))


def _recognised(entries: Iterator[Entry], rows: Rows, on_malformed: OnMalformed) -> tuple[str, list[Entry]]:
    """The format's name by the first record that can be read, and the records up to it."""
    begun = []
    for entry in entries:
        begun.append(entry)
        if isinstance(entry, Record):
            return recognised(entry.row, rows.container, rows.source), begun
        if on_malformed == "error":
            raise entry
    what = f"none of its {len(begun)} records can be read" if begun else "it has no records"
    raise PlainError(f"{rows.source} holds no knowledge pieces: {what}")


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
                raise PlainError(f"split={split!r} is for datasets; {path} is a file")
            return _file_rows(path, container)
        return _dataset_rows(_load_dataset(path, str(source), split), str(source), split)
    return _dataset_rows(source, "the dataset", split)


def _file_rows(path: Path, container: Container | None) -> Rows:
    text, suffix, source = read_text(path), path.suffix.lower(), str(path)
    if container is None:
        container = "csv" if suffix in _TABLES else "lines" if suffix in _LINES else _json_container(text, path)
    if container == "csv":
        return Rows(_table_records(text, source, _TABLES.get(suffix, ",")), container, source)
    if container == "lines":
        return Rows(_line_records(text, source), container, source)
    return Rows(_records(_json_list(text, path), source, "record"), container, source)


def _json_container(text: str, path: Path) -> Container:
    start = text.lstrip()[:1]
    if start == "[":
        return "json"
    if start not in ("{", ""):
        kinds = ", ".join((".json", *_LINES, *_TABLES))
        raise PlainError(f"{path} begins with {start!r}, so it is no JSON; the files that can be read are {kinds}")
    try:
        # An object over several lines is no line, and no list either: the list's reader says what it found.
        return "lines" if not start or isinstance(parse_json(text.lstrip().split("\n", 1)[0]), dict) else "json"
    except ValueError:
        return "json"


def _json_list(text: str, path: Path) -> list[Any]:
    try:
        rows = parse_json(text)
    except ValueError as error:
        raise PlainError(f"{path}: not JSON: {error}") from error
    if isinstance(rows, list):
        return rows
    found = f"one object with {', '.join(rows) or 'nothing'}" if isinstance(rows, dict) else shown(rows)
    raise PlainError(f"{path}: expected a list of records; found {found}")


def _line_records(text: str, source: str) -> Iterator[Entry]:
    # Only this separator: str.splitlines also cuts at characters that JSON leaves inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                yield RecordError(f"{source}, line {number}: not JSON: {error}", "not JSON")
            else:
                yield _entry(row, source, f"line {number}")


def _table_records(text: str, source: str, delimiter: str) -> Iterator[Entry]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header) or not all(name.strip() for name in header):
            raise PlainError(
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
        raise PlainError(f"{source}, line {lines.line_num}: not a table: {error}") from error


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
            raise PlainError(f"{source}: {unknown_name('split', name, map(str, dataset))}")
        source, dataset = f"{source}, split {name}", dataset[name]
    elif split is not None:
        raise PlainError(f"split={split!r} needs splits by name; {source} has none")
    if isinstance(dataset, str | bytes) or not isinstance(dataset, Iterable):
        raise PlainError(f"a source is a path, the name of a dataset, or rows; found {shown(dataset)}")
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
    return {split or "train": load_from_hub(source, split or "train", "a file")}
