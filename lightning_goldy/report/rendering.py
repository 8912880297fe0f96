"""Specifications as PNG files and the script that draws them on a page, made in a process of their own.

The library that draws, vl-convert, holds a JavaScript engine: about 100 MB and some threads, after which a forked child
hangs. So it is never loaded into the training. One helper process is started at the first figure, serves all that
follow, and ends with this process or when it is told to.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import importlib.util
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

# The child sees the modules that its parent sees, wherever they come from, and nothing of this package.
_CHILD = """
import sys
sys.path[:] = sys.argv[1:]
import json, struct
source, target = sys.stdin.buffer, sys.stdout.buffer
def answer(status, content):
    target.write(struct.pack("<BQ", status, len(content)) + content)
    target.flush()
while head := source.read(8):
    try:
        import vl_convert
        request = json.loads(source.read(struct.unpack("<Q", head)[0]))
        versions = vl_convert.get_vegalite_versions()
        version = ([v for v in versions if v.split(".")[0] == request["major"]] or versions)[-1]
        if request["task"] == "script":
            answer(0, vl_convert.javascript_bundle(vl_version=version).encode())
        else:
            answer(0, vl_convert.vegalite_to_png(
                request["spec"], vl_version=version, scale=request["scale"], allowed_base_urls=[]
            ))
    except Exception as error:
        answer(1, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
"""
_SECONDS = 120.0


class RenderError(RuntimeError):
    """A figure could not be drawn; the message holds the reason."""


def png_of(spec: Mapping[str, Any], scale: float = 1.0) -> bytes:
    r"""Draws a Vega-Lite specification.

    Args:
        spec: With its data; nothing is fetched from elsewhere.
        scale: Pixels per unit of the specification's sizes.

    Raises:
        ImportError: altair or vl-convert is not installed.
        RenderError: The specification cannot be drawn.

    Example:
        >>> png_of({"data": {"values": [{"a": 1}]}, "mark": "point", "encoding": {"x": {"field": "a"}}})[:4]
        b'\x89PNG'
    """
    return _RENDERER.ask({"task": "png", "spec": spec, "scale": scale})


@functools.cache
def page_script() -> str:
    """The script with vega, vega-lite and vega-embed that draws specifications on a page, about 0.9 MB.

    Raises:
        ImportError: altair or vl-convert is not installed.
        RenderError: It cannot be made.
    """
    return _RENDERER.ask({"task": "script"}).decode()


def narrower(chart: Mapping[str, Any], excess: float) -> dict[str, Any] | None:
    """A chart whose plots shrink, or of which fewer stand side by side; the page's script does the same.

    Args:
        chart: Without data.
        excess: Units by which it is too wide.

    Returns:
        The chart; None where it fits or neither helps.

    Example:
        >>> chart = {"concat": [{"width": 300}, {"width": 300}], "columns": 2}
        >>> narrower(chart, 260)["concat"], narrower(chart, 400)["columns"], narrower({"width": {"step": 9}}, 50)
        ([{'width': 170}, {'width': 170}], 1, None)
    """
    if excess <= 0:
        return None
    made: dict[str, Any] = copy.deepcopy(dict(chart))
    panel = made["spec"] if "facet" in made and "column" not in made["facet"] else made
    parts: list[dict[str, Any]] = made.get("concat") or [panel]
    columns = min(made.get("columns", len(parts)), len(parts))
    widths: list[Any] = [part.get("width") for part in parts]
    if not all(isinstance(width, (int, float)) for width in widths):
        made["columns"] = columns - 1
        return made if columns > 1 else None
    # Plots that would be slivers go below each other, each with the names that its neighbour told.
    sliver = columns > 1 and sum(widths[:columns]) - excess < 110 * columns
    _stack(made, names=sliver)
    if sliver:
        made["columns"] = 1
        return made
    widest = max(sum(widths[at : at + columns]) for at in range(0, len(widths), columns))
    left = max(200 if columns == 1 else 60 * columns, widest - excess)
    for part in parts:
        part["width"] = min(part["width"], int(part["width"] * left / widest))
    return None if made == chart else made


def _stack(value: Any, *, names: bool) -> None:
    """Entries of legends on top below each other, and where asked for the names beside every plot."""
    if isinstance(value, dict):
        legend, across = value.get("legend"), value.get("y")
        if isinstance(legend, dict) and legend.get("orient") == "top":
            legend |= {"columns": 1, "labelLimit": 240}
        if names and isinstance(across, dict) and isinstance(across.get("axis"), dict):
            across["axis"]["labels"] = True
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _stack(inner, names=names)


def require_drawing() -> None:
    """Checks that figures can be drawn, without loading what draws them.

    Raises:
        ImportError: altair or vl-convert is not installed; the message says how to install them.
    """
    for module, package in (("altair", "altair"), ("vl_convert", "vl-convert-python")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f'figures need {package}: pip install "lightning-goldy[report]"')


class _Renderer:
    """The helper process, started when it is first needed and again when it has died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: Mapping[str, Any]) -> bytes:
        require_drawing()
        from altair import SCHEMA_VERSION

        try:
            content = json.dumps({**request, "major": SCHEMA_VERSION.lstrip("v").partition(".")[0]}, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"the specification is not JSON: {error}") from error
        with self._lock:
            for _ in range(2):
                process = self._alive()
                try:
                    status, answer = _exchange(process, content.encode())
                    break
                except (OSError, EOFError):
                    # Killed from outside, for memory for example; a new one may do better.
                    self._end()
            else:
                raise RenderError(f"the process that draws figures died twice, the last time with {process.returncode}")
        if status:
            raise RenderError(f"the figure could not be drawn: {answer.decode('utf-8', 'replace')}")
        return answer

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # An interrupt from the keyboard is for the training, which may still draw while it ends.
                start_new_session=True,
            )
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def close(self) -> None:
        """Ends the helper process; the next figure starts another."""
        with self._lock:
            self._end()

    def forget(self) -> None:
        """In a forked child: leaves the parent's helper process to the parent."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            _OF_PARENTS.append(process)
            for pipe in (process.stdin, process.stdout):
                os.close(pipe.fileno())  # type: ignore[union-attr]


def _exchange(process: subprocess.Popen[bytes], content: bytes) -> tuple[int, bytes]:
    source, target = process.stdout, process.stdin
    assert source is not None
    assert target is not None
    limit = threading.Timer(_SECONDS, process.kill)
    limit.daemon = True
    limit.start()
    try:
        target.write(struct.pack("<Q", len(content)) + content)
        target.flush()
        head = source.read(9)
        if len(head) < 9:
            raise EOFError
        status, length = struct.unpack("<BQ", head)
        answer = source.read(length)
        if len(answer) < length:
            raise EOFError
    finally:
        limit.cancel()
        limit.join()
    return status, answer


# Never collected: their pipes are closed already, and they are not this process's children.
_OF_PARENTS: list[subprocess.Popen[bytes]] = []
_RENDERER = _Renderer()
atexit.register(_RENDERER.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_RENDERER.forget)
