from __future__ import annotations

import builtins
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from lightning_goldy.core import files
from lightning_goldy.core.files import (
    RowError,
    append_row,
    atomic_path,
    atomic_write,
    filter_rows,
    read_rows,
    repair_rows,
)

# Whole or absent


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


def _failing(function: Callable, nth: int, error: type[BaseException], *, after: bool = False) -> Callable:
    calls = iter(range(1_000))

    def wrapped(*args, **kwargs):
        failing = next(calls) == nth
        if failing and not after:
            raise error("no space left on device")
        result = function(*args, **kwargs)
        if failing:
            raise error("no space left on device")
        return result

    return wrapped


class _Stubborn:
    """A file that writes half and then fails."""

    def __init__(self, file, error: type[BaseException]) -> None:
        self.file, self.error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise self.error("no space left on device")


def _break(patch: pytest.MonkeyPatch, step: str, error: type[BaseException]) -> None:
    name, _, when = step.partition(" ")
    if name == "open":
        opened = builtins.open
        if when == "fails":
            patch.setattr(builtins, "open", _failing(opened, 0, error))
        else:
            patch.setattr(builtins, "open", lambda *args, **kwargs: _Stubborn(opened(*args, **kwargs), error))
    elif name == "fsync":
        # The first is the file's, the second its folder's.
        patch.setattr(os, "fsync", _failing(os.fsync, 0 if when == "file" else 1, error))
    elif name == "replace":
        patch.setattr(os, "replace", _failing(os.replace, 0, error, after=when == "after"))
    elif name == "descriptor":
        patch.setattr(os, "open", _failing(os.open, int(when), error))


STEPS = {
    "open fails": False,
    "open half": False,
    "descriptor 0": False,
    "fsync file": False,
    "replace before": False,
    "replace after": True,
    "descriptor 1": True,
    "fsync folder": True,
}


@pytest.mark.parametrize("error", [OSError, Killed])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_old_or_new_and_nothing_else(
    tmp_path: Path, step: str, existing: bool, error: type[BaseException]
) -> None:
    target = tmp_path / "results.txt"
    if existing:
        target.write_bytes(b"old content")
    with pytest.MonkeyPatch.context() as patch:
        _break(patch, step, error)
        with pytest.raises(error, match="no space left"):
            atomic_write(target, "new content")
    if STEPS[step]:
        assert target.read_bytes() == b"new content"
    elif existing:
        assert target.read_bytes() == b"old content"
    assert [path.name for path in tmp_path.iterdir()] == ([target.name] if existing or STEPS[step] else [])


def test_the_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}") if sys.platform == "linux" else ""
        events.append(("fsync", "folder" if path == str(tmp_path) else "file"))
        if path != str(tmp_path) and path:
            assert Path(path).read_bytes() == b"whole"
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        events.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    atomic_write(tmp_path / "a", b"whole")
    names = [event for event, _ in events]
    assert names == ["fsync", "replace", "fsync"]
    if sys.platform == "linux":
        assert [what for _, what in events] == ["file", "a", "folder"]


def test_a_block_that_raises_leaves_the_target_alone(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_bytes(b"old")

    def write_half() -> None:
        with atomic_path(target) as temporary:
            temporary.write_bytes(b"half of the ne")
            raise Killed

    with pytest.raises(Killed):
        write_half()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_are_made_and_text_is_utf8(tmp_path: Path) -> None:
    path = atomic_write(tmp_path / "a" / "b" / "c.txt", "Zürich ∇θ\n")
    assert path.read_bytes() == "Zürich ∇θ\n".encode()
    assert atomic_write(str(path), b"\x00\xff") == path
    assert path.read_bytes() == b"\x00\xff"


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        atomic_write(tmp_path / "file" / "below" / "x.txt", "text")
    with pytest.raises(OSError, match="file"):
        atomic_write(tmp_path / "file" / "x.txt", "text")
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    # The module alone, so that the process starts at once.
    target, size = tmp_path / "target", 200_000
    atomic_write(target, b"a" * size)
    program = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("files", {files.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("ready", flush=True)
while True:
    for letter in (b"b", b"c"):
        module.atomic_write({str(target)!r}, letter * {size})
"""
    assert importlib.util.find_spec("lightning_goldy.core.files") is not None
    for delay in (0.0, 0.003, 0.01, 0.03, 0.05):
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        content = target.read_bytes()
        assert len(content) == size
        assert len(set(content)) == 1


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step": 2}}', b"\x00\x00\x00", '{"a": "é'.encode()[:-1], b"[" * 100_000]
)
def test_a_torn_last_line_can_be_left_out(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert files.read_rows(path, torn="drop") == [{"step": 1}]
    with pytest.raises(files.RowError, match="line 2: not JSON"):
        files.read_rows(path)
    assert files.repair_rows(path) == len(torn)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_no_row_is_lost_for_what_json_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    files.append_row(
        path, {"text": "half \ud800", "count": np.int64(3), "loss": np.float32(0.5), "nan": torch.tensor(math.nan)}
    )
    assert files.read_rows(path) == [{"text": "half ?", "count": 3, "loss": 0.5, "nan": None}]


# Files of JSON lines

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def without_non_finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    return [without_non_finite(item) for item in value] if isinstance(value, list) else value


@given(
    st.lists(
        st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), json_values, max_size=3),
        max_size=4,
    )
)
@settings(max_examples=40, deadline=None)
def test_rows_come_back_with_null_for_what_is_not_finite(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "results.jsonl"
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == [without_non_finite(row) for row in rows]
    if rows:
        lines = path.read_bytes().split(b"\n")
        assert len(lines) == len(rows) + 1
        assert lines[-1] == b""


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\n", "\r\n"])
def test_characters_that_end_lines_elsewhere_do_not_cut_a_row(tmp_path: Path, separator: str) -> None:
    row = {"answer": f"one{separator}two"}
    append_row(tmp_path / "r.jsonl", row)
    append_row(tmp_path / "r.jsonl", {"next": 1})
    assert read_rows(tmp_path / "r.jsonl") == [row, {"next": 1}]


def test_no_file_and_an_empty_file_have_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []
    (tmp_path / "empty.jsonl").touch()
    assert read_rows(tmp_path / "empty.jsonl") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"loss": 1', "not JSON"),
        (b"", "not JSON"),
        (b"[1, 2]", "a row is an object; this is list"),
        (b"3", "a row is an object; this is int"),
        (b'{"name": "\xff\xfe"}', "not JSON"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": 2}\n' + line + b'\n{"c": 3}\n')
    for action in (lambda: read_rows(path), lambda: filter_rows(path, lambda row: False)):
        with pytest.raises(RowError) as error:
            action()
        assert str(error.value).startswith(f"{path}, line 3: {message}")
    assert path.read_bytes().count(b"\n") == 4


def test_filtering_drops_rows_and_leaves_the_file_alone_when_all_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for step in range(6):
        append_row(path, {"step": step, "loss": math.nan, "name": "ä"})
    before, inode = path.read_bytes(), path.stat().st_ino
    filter_rows(path, lambda row: True)
    assert path.stat().st_ino == inode
    filter_rows(path, lambda row: row["step"] % 2 == 0)
    assert [row["step"] for row in read_rows(path)] == [0, 2, 4]
    assert path.read_bytes().splitlines() == before.splitlines()[::2]
    filter_rows(path, lambda row: False)
    assert path.read_bytes() == b""
    filter_rows(tmp_path / "none.jsonl", lambda row: False)
    assert not (tmp_path / "none.jsonl").exists()


def test_a_failed_append_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    append_row(path, {"step": 1})

    write = os.write

    def full(descriptor: int, line: bytes) -> int:
        return write(descriptor, line[:5])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="5 of a row's 12 bytes"):
            append_row(path, {"step": 2})
    assert read_rows(path) == [{"step": 1}]
    append_row(path, {"step": 2})
    assert [row["step"] for row in read_rows(path)] == [1, 2]


def test_a_row_of_something_else_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_row(path, {"step": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        append_row(path, {"model": object()})
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("earlier", [0, 2])
def test_a_line_torn_at_any_byte_leaves_whole_rows(tmp_path: Path, earlier: int) -> None:
    path = tmp_path / "results.jsonl"
    rows = [{"step": step, "name": "ä\u2028\U0001f600", "values": [0.5, None]} for step in range(earlier + 1)]
    for row in rows:
        append_row(path, row)
    whole = path.read_bytes()
    start = whole.removesuffix(b"\n").rfind(b"\n") + 1
    for end in range(start, len(whole) + 1):
        path.write_bytes(whole[:end])
        cut = repair_rows(path)
        # All but the newline is there: a whole row.
        kept = earlier + (end >= len(whole) - 1)
        assert read_rows(path) == rows[:kept]
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:kept])
        assert cut == (end - start if kept == earlier else 0)
        append_row(path, {"step": "next"})
        assert read_rows(path) == [*rows[:kept], {"step": "next"}]
    assert repair_rows(tmp_path / "none.jsonl") == 0
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize("last", [b"\0\0\0\0", b"\0\0\n", b"[1]\n", b'{"step": 2}{"s\n'])
def test_a_last_line_that_is_no_row_is_cut_off(tmp_path: Path, last: bytes) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"step": 1}\n' + last)
    assert repair_rows(path) == len(last)
    assert path.read_bytes() == b'{"step": 1}\n'


def test_appending_is_one_write_that_leaves_the_file_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, lines, write = tmp_path / "results.jsonl", [], os.write

    def counting(descriptor: int, line: bytes) -> int:
        lines.append(line)
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", counting)
    for step in range(3):
        append_row(path, {"step": step})
    inode = path.stat().st_ino
    append_row(path, {"step": 3})
    assert lines == [b'{"step": %d}\n' % step for step in range(4)]
    assert path.stat().st_ino == inode


def test_numbers_are_kept_exactly(tmp_path: Path) -> None:
    row = {"value": 0.1 + 0.2, "tiny": 5e-324, "large": 2**60, "nested": [(1.5, math.inf)]}
    append_row(tmp_path / "r.jsonl", row)
    text = (tmp_path / "r.jsonl").read_text()
    assert json.loads(text) == {"value": 0.1 + 0.2, "tiny": 5e-324, "large": 2**60, "nested": [[1.5, None]]}
    assert "NaN" not in text
    assert "Infinity" not in text
