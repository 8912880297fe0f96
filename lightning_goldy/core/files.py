"""Files that are whole or absent, whenever the process dies, and strict readers of what others may have written."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

MOST_DEPTH = 100
"""Levels of lists and objects that JSON may be nested; what walks through it goes that deep."""

_MOST_LETTERS = 4000
# A number that may lie beyond what a float holds; only then is every number looked at.
_LARGE_EXPONENTS = re.compile(r"e\+?0*\d{3}"), re.compile(r"E\+?0*\d{3}")


def printable(text: str) -> str:
    r"""The text with control characters spelt out, so that it can steer no terminal.

    Example:
        >>> printable("a\n\x1b[31mb")
        'a↵\\x1b[31mb'
    """
    shown = text.replace("\r\n", "\n").replace("\n", "↵")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def percentage(share: float | None, digits: int = 0) -> str:
    """A share as everything that is printed has it, with a space before the sign.

    Args:
        share: Of 1; None where there is none.
        digits: After the point.

    Example:
        >>> percentage(0.4225), percentage(0.4225, 2), percentage(None)
        ('42 %', '42.25 %', '-')
    """
    return "-" if share is None else f"{100 * share:.{digits}f} %"


class PlainError(ValueError):
    r"""An error about what was read: one line that steers no terminal, whatever names and values of a file it quotes.

    Args:
        message: Lines are joined, control characters spelt out, and the middle of a very long one left out.

    Example:
        >>> str(PlainError("no parameter\n  '\x1b[2Jweight'"))
        "no parameter '\\x1b[2Jweight'"
    """

    def __init__(self, message: object = "") -> None:
        text = printable(" ".join(line.strip() for line in str(message).split("\n")))
        if len(text) > _MOST_LETTERS:
            text = f"{text[: _MOST_LETTERS // 2]} ... {text[-_MOST_LETTERS // 2 :]}"
        super().__init__(text)


class StoreError(PlainError):
    """A file is not what it should be; the message names the file and the first difference."""


_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)(::|:/)")


class RowError(PlainError):
    """A file of JSON lines holds something else; the message names the file and the line."""


def parse_json(text: str | bytes, *, constants: Literal["error", "float"] = "error") -> Any:
    """What strict JSON says, in numbers that a float holds and no deeper than 100 levels.

    Args:
        text: The whole document; bytes are UTF-8.
        constants: Whether NaN and Infinity are an error, or the floats that other writers mean by them.

    Raises:
        ValueError: It is no UTF-8 or no JSON, says NaN or infinity, names a key of an object twice, or holds a number
            or a depth beyond these.

    Example:
        >>> parse_json('{"step": 3}')
        {'step': 3}
        >>> parse_json('{"step": 1, "step": 2}')
        Traceback (most recent call last):
        ValueError: an object has the key 'step' twice
        >>> parse_json("[1e999]")
        Traceback (most recent call last):
        ValueError: the number 1e999 is larger than any float
    """
    text = text.decode("utf-8") if isinstance(text, bytes) else text
    hooks: dict[str, Any] = {}
    constant: Callable[[str], Any] = float if constants == "float" else _no_constant
    if _may_overflow(text):
        hooks = {
            "parse_int": lambda digits: _bounded(digits, int),
            "parse_float": lambda digits: _bounded(digits, float),
        }
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=constant, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested too deeply, beyond {MOST_DEPTH} levels") from error
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MOST_DEPTH):
        inner = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        # Most lists of a row hold numbers alone, which the set of their types tells without a look at each.
        nests = (items for items in inner if not _NESTS.isdisjoint(map(type, items)))
        level = [item for items in nests for item in items if isinstance(item, (dict, list))]
        if not level:
            return value
    raise ValueError(f"nested too deeply, beyond {MOST_DEPTH} levels")


_NESTS = frozenset((dict, list))


def _may_overflow(text: str) -> bool:
    """Whether a number may have 200 digits or an exponent of three, by what is fast on rows of megabytes."""
    # A run of 199 digits covers one of these blocks; to count digits from each one on takes most of the time.
    digits = any(text[start : start + 100].isdigit() for start in range(0, len(text) - 99, 100))
    return digits or any(pattern.search(text) for pattern in _LARGE_EXPONENTS)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r:.60} twice")
    return fields


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _bounded(digits: str, kind: type[int] | type[float]) -> int | float:
    # float() reads any number of digits; int() of too many takes long or is refused.
    if not math.isfinite(float(digits)):
        shown = digits if len(digits) <= 40 else f"{digits[:20]}... of {len(digits)} digits"
        raise ValueError(f"the number {shown} is larger than any float")
    return kind(digits)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Says which file an error of the system is about, where it does not say itself, as when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is None:
            error.args = (f"{path}: {error}",)
        elif error.filename is None:
            error.filename = str(path)
        raise


def without_scheme(path: str | Path) -> str:
    """An address of this machine's file system, as fsspec writes it, as a path.

    Example:
        >>> without_scheme("file:///runs/a"), without_scheme(Path("file:///runs/a")), without_scheme("s3://bucket")
        ('/runs/a', '/runs/a', 's3://bucket')
    """
    text = str(path)
    for scheme in ("file:", "local:"):
        if text.startswith(f"{scheme}/"):
            # What has been a path in between has lost two of three slashes.
            return text.removeprefix(scheme).removeprefix("//")
    return text


def parents_of(path: str | Path, most: int) -> list[Path]:
    """The innermost folders that a file lies in, and then those of the file that a link leads to.

    Args:
        path: The file.
        most: Folders of each.

    Example:
        >>> [str(folder) for folder in parents_of("/runs/a/last.ckpt", 2)]
        ['/runs/a', '/runs']
    """
    places = (Path(path).absolute(), Path(path).resolve())
    return list(dict.fromkeys(parent for place in places for parent in list(place.parents)[:most]))


def require_local(path: str | Path, of: str = "the target") -> Path:
    """A place as a path of this machine's file system; ``file://`` is one.

    Args:
        path: A path, or an address as fsspec reads it.
        of: What lies there, for the message.

    Raises:
        ValueError: It is an address of another storage.

    Example:
        >>> require_local("s3://bucket/runs", "the output")
        Traceback (most recent call last):
        ValueError: the output is s3://bucket/runs, but files are written to a local file system only: ...
    """
    text = without_scheme(path)
    # A path has lost one of the slashes; a folder of such a name that is there is one.
    if (address := _ADDRESS.match(text)) and not Path(address[0].rstrip("/")).is_dir():
        raise ValueError(
            f"{of} is {text}, but files are written to a local file system only: give a local folder (for a training, "
            "a local default_root_dir and first logger; checkpoints and further loggers may be elsewhere), and copy "
            "it when the work is done"
        )
    return Path(os.path.expanduser(text))


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the target's folder that becomes the target when the block ends well.

    The content is flushed to the disk before the rename and the rename after it, so the target is always either what
    it was or whole. When the block raises, the temporary file goes away.

    Args:
        path: Target; its folder is made when missing.

    Raises:
        OSError: The folder cannot be written, or the disk is full; the message names the file.
        ValueError: The path is an address of another storage.
    """
    path = require_local(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with _named(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if os.name == "posix":
        # Windows cannot open folders and needs no such call.
        with _named(path):
            _sync(path.parent)


def link_file(source: str | Path, target: str | Path) -> bool:
    """Gives a file a second name, under which it stays when the first one goes.

    Args:
        source: The file.
        target: Replaced when it exists; its folder is made when missing.

    Returns:
        Whether it has; not where there is no such file, or the file system has no such links.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     first, second = Path(folder, "a"), Path(folder, "b", "c")
        ...     link_file(first, second), atomic_write(first, "text") and link_file(first, second), second.read_text()
        (False, True, 'text')
    """
    if not Path(source).is_file():
        return False
    try:
        with atomic_path(target) as temporary:
            os.link(source, temporary)
    except OSError:
        return False
    return True


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


def read_rows(
    path: str | Path,
    *,
    torn: Literal["error", "drop"] = "error",
    check: Callable[[dict[str, Any]], str | None] | None = None,
) -> list[dict[str, Any]]:
    """Reads a file of JSON lines; a missing file has no rows.

    Args:
        path: The file.
        torn: Whether a last line that a killed process left unfinished is an error, or left out.
        check: What is wrong with a row, in words; None where nothing is.

    Raises:
        RowError: A line is not a JSON object, or the check finds a fault; or no file is there but something else.
    """
    path = Path(path)
    content = _content(path)
    rows = []
    # Bytes, and only this separator: str.splitlines also cuts at characters that JSON leaves inside strings.
    if torn == "drop":
        content = content[: len(content) - _torn(content)]
    lines = content.removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines if lines != [b""] else [], 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise RowError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise RowError(f"{path}, line {number}: a row is an object; this is {type(row).__name__}")
        fault = check(row) if check is not None else None
        if fault:
            raise RowError(f"{path}, line {number}: {fault}")
        rows.append(row)
    return rows


def append_row(path: str | Path, row: Mapping[str, Any]) -> None:
    """Adds a row to the end of a file of JSON lines, by one write that is on the disk when this returns.

    What the file holds already is not touched, so a row costs the same in a long file as in a short one. A process that
    is killed within the write leaves a torn last line, which :func:`repair_rows` takes away.

    Raises:
        OSError: The row could not be written whole; the file, which the message names, is as it was before.
        TypeError: The row is not JSON-able; nothing is written.
    """
    # Text can hold half a surrogate pair, which UTF-8 cannot; no row is lost for it.
    line, path = to_json_line(row).encode("utf-8", "replace") + b"\n", require_local(path)
    made = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            with _named(path):
                written = os.write(descriptor, line)
                if written != len(line):
                    raise OSError(errno.ENOSPC, f"{written} of a row's {len(line)} bytes could be written", str(path))
                os.fsync(descriptor)
        except BaseException:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)
    if made and os.name == "posix":
        _sync(path.parent)


def repair_rows(path: str | Path) -> int:
    """Takes a torn last line off a file of JSON lines, whole or not at all; a whole one gets the newline that it lacks.

    Returns:
        Bytes that were cut off; 0 where the file is whole or missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = atomic_write(f"{folder}/rows.jsonl", b'{"step": 1}' + bytes([10]) + b'{"step": 2, "lo')
        ...     repair_rows(path), read_rows(path)
        (15, [{'step': 1}])
    """
    path = Path(path)
    content = _content(path)
    cut = _torn(content)
    if cut:
        atomic_write(path, content[:-cut])
    elif content and not content.endswith(b"\n"):
        atomic_write(path, content + b"\n")
    return cut


def _content(path: Path) -> bytes:
    """All of a file of rows; nothing where there is none."""
    if not path.exists():
        return b""
    if not path.is_file():
        raise RowError(f"{path}: rows are in a file; this is {'a folder' if path.is_dir() else 'no file'}")
    return path.read_bytes()


def _torn(content: bytes) -> int:
    """Bytes of the last line, where it is no whole row."""
    last = content[content.removesuffix(b"\n").rfind(b"\n") + 1 :]
    try:
        whole = not last or isinstance(parse_json(last), dict)
    except ValueError:
        whole = False
    return 0 if whole else len(last)


def filter_rows(
    path: str | Path,
    keep: Callable[[dict[str, Any]], bool],
    *,
    check: Callable[[dict[str, Any]], str | None] | None = None,
) -> None:
    """Drops the rows that ``keep`` refuses; the file is left alone when it keeps all.

    Args:
        path: The file.
        keep: Whether a row stays.
        check: What is wrong with a row, in words; None where nothing is.

    Raises:
        RowError: A line is not a JSON object, or ``check`` finds a fault in one.
    """
    rows = read_rows(path, check=check)
    kept = [row for row in rows if keep(row)]
    if len(kept) != len(rows):
        atomic_write(path, "".join(to_json_line(row) + "\n" for row in kept))


def to_json_line(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: a non-finite number becomes null, which every reader understands.

    Example:
        >>> to_json_line({"loss": float("nan"), "steps": [1, 2.5]})
        '{"loss": null, "steps": [1, 2.5]}'
    """
    return json.dumps(finite(row), allow_nan=False, ensure_ascii=False)


def finite(value: Any) -> Any:
    """What JSON gives back of a value: non-finite numbers are None, tuples are lists, keys are texts.

    Example:
        >>> finite({1: (0.5, float("inf"))})
        {'1': [0.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if getattr(value, "ndim", None) == 0:
        # A number of NumPy or torch.
        return finite(value.item())
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
