"""Files that are whole or absent, whenever the process dies."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


class StoreError(ValueError):
    """A file is not what it should be; the message names the file and the first difference."""


class RowError(ValueError):
    """A file of JSON lines holds something else; the message names the file and the line."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the target's folder that becomes the target when the block ends well.

    The content is flushed to the disk before the rename and the rename after it, so the target is always either what
    it was or whole. When the block raises, the temporary file goes away.

    Args:
        path: Target; its folder is made when missing.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        # Windows cannot open folders and needs no such call.
        _sync(path.parent)


def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Writes a whole file at once.

    Args:
        path: Target; its folder is made when missing.
        data: Bytes, or text written as UTF-8.

    Returns:
        The path.

    Raises:
        OSError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     atomic_write(f"{folder}/a/b.txt", "whole").read_text()
        'whole'
    """
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
    return Path(path)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; a missing file has no rows.

    Raises:
        RowError: A line is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    # Bytes, and only this separator: str.splitlines also cuts at characters that JSON leaves inside strings.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines if lines != [b""] else [], 1):
        try:
            row = json.loads(line.decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise RowError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RowError(f"{path}, line {number}: a row is an object; this is {type(row).__name__}")
        rows.append(row)
    return rows


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a file of JSON lines, rewriting the file so that no line is ever torn."""
    path = Path(path)
    before = path.read_bytes() if path.exists() else b""
    atomic_write(path, before + to_json_line(row).encode() + b"\n")


def filter_rows(path: str | Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops the rows that ``keep`` refuses; the file is left alone when it keeps all."""
    rows = read_rows(path)
    kept = [row for row in rows if keep(row)]
    if len(kept) != len(rows):
        atomic_write(path, "".join(to_json_line(row) + "\n" for row in kept))


def to_json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: a non-finite number becomes null, which every reader understands.

    Example:
        >>> to_json_line({"loss": float("nan"), "steps": [1, 2.5]})
        '{"loss": null, "steps": [1, 2.5]}'
    """
    return json.dumps(_finite(row), allow_nan=False, ensure_ascii=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
