"""Files of JSON lines."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lightning_goldy.core.files import RowError, append_row, filter_rows, read_rows, repair_rows

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
