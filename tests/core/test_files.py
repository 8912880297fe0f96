from __future__ import annotations

import builtins
import importlib.util
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_goldy.core import files
from lightning_goldy.core.files import atomic_path, atomic_write

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
