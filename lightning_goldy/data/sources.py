"""Where texts come from: a file, a folder, or a dataset."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_goldy.core.files import PlainError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
_TABLES = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(:[\w.-]+)?")
_MARKERS = ("dataset_dict.json", "state.json")


def check_source(source: str | Path) -> None:
    """See that a source can be one, without reading it.

    Raises:
        FileNotFoundError: It is no file or folder and cannot be a dataset's name either.
    """
    path = Path(source).expanduser()
    looks_like_path = path.is_absolute() or path.suffix.lower() in (*TEXT_SUFFIXES, *_TABLES)
    if not path.exists() and (looks_like_path or not is_dataset_name(str(source))):
        raise FileNotFoundError(
            f"{str(source)!r} does not exist (looked in {Path.cwd()}). A text source is a file, a folder of"
            f" {', '.join(TEXT_SUFFIXES)} files, a saved dataset, or a dataset's name on the hub (name or name:config)"
        )


def read_documents(source: str | Path) -> list[str]:
    """The documents of a source, without those that are empty.

    Args:
        source: A text file (one document); a folder (one document per text file, in the order of their paths); a
            folder that ``datasets`` saved or can load, or a name on the hub, optionally with a configuration
            (``name:config``): one document per row of the ``text`` column of its ``train`` split.

    Returns:
        At least one document.

    Raises:
        FileNotFoundError: No such source.
        ValueError: It has no text.
    """
    check_source(source)
    path = Path(source).expanduser()
    if path.is_file():
        texts: Iterable[str] = [read_text(path, newline="")]
    elif not path.is_dir():
        texts = _rows(load_from_hub(str(source), "train", "a file or folder"), source)
    elif is_saved_dataset(path):
        texts = _rows(datasets_library().load_from_disk(str(path)), source)
    else:
        texts = _read_folder(path)
    documents = [text for text in texts if text]
    if not documents:
        raise PlainError(f"{str(source)!r} holds no text: every document is empty")
    return documents


def _read_folder(folder: Path) -> Iterable[str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    texts = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    if texts:
        return [read_text(file, newline="") for file in texts]
    kinds = sorted({_TABLES[file.suffix.lower()] for file in files if file.suffix.lower() in _TABLES})
    if len(kinds) != 1:
        raise PlainError(
            f"the folder {str(folder)!r} holds neither text files ({', '.join(TEXT_SUFFIXES)}) nor tables of one kind"
            f" ({', '.join(_TABLES)})" + (f" but {' and '.join(kinds)}" if kinds else "")
        )
    tables = [str(file) for file in files if _TABLES.get(file.suffix.lower()) == kinds[0]]
    return _rows(datasets_library().load_dataset(kinds[0], data_files=tables, split="train"), folder)


def _rows(dataset: Any, source: str | Path) -> Iterable[str]:
    if isinstance(dataset, dict):
        if "train" not in dataset:
            raise PlainError(f"the dataset {str(source)!r} has no split 'train'. It has: {', '.join(dataset)}")
        dataset = dataset["train"]
    if "text" not in dataset.column_names:
        raise PlainError(f"the dataset {str(source)!r} has no column 'text'. It has: {', '.join(dataset.column_names)}")
    return [text or "" for text in dataset["text"]]


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
