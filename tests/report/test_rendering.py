from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_goldy.report import rendering
from lightning_goldy.report.rendering import RenderError, page_script, png_of, require_drawing

PNG = b"\x89PNG\r\n\x1a\n"
SPEC = {
    "data": {"values": [{"a": 1, "b": 2}, {"a": 2, "b": 1}]},
    "mark": "line",
    "encoding": {"x": {"field": "a", "type": "quantitative"}, "y": {"field": "b", "type": "quantitative"}},
}


# Its engine takes seconds of each helper to start, and how helpers live and die does not depend on it.
STUB = """
def get_vegalite_versions():
    return ["5.20", "6.1"]
def vegalite_to_png(spec, **options):
    return bytes([137]) + b"PNG\\r\\n\\x1a\\n" + repr(spec).encode()
"""


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Helpers that draw with a library without an engine."""
    (tmp_path / "vl_convert.py").write_text(STUB)
    rendering._RENDERER.close()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    rendering._RENDERER.close()


def helper() -> subprocess.Popen[bytes]:
    process = rendering._RENDERER._process
    assert process is not None
    return process


def test_a_specification_becomes_an_image_of_its_size() -> None:
    small, large = (png_of({**SPEC, "width": 100, "height": 50}, scale) for scale in (1.0, 2.0))
    assert small.startswith(PNG)
    widths = [int.from_bytes(png[16:20], "big") for png in (small, large)]
    assert widths[1] == pytest.approx(2 * widths[0], abs=2)


def test_one_process_serves_all_and_the_parent_loads_nothing(stub: Path) -> None:
    code = (
        "import sys, threading\n"
        f"sys.path.insert(0, {str(stub)!r})\n"
        "from lightning_goldy.report import rendering\n"
        f"rendering.png_of({SPEC!r})\n"
        "first = rendering._RENDERER._process.pid\n"
        f"rendering.png_of({SPEC!r})\n"
        "assert rendering._RENDERER._process.pid == first\n"
        "assert threading.active_count() == 1, threading.enumerate()\n"
        "print(first, 'vl_convert' in sys.modules)\n"
    )
    # From `-c` and with errors for everything that is left open.
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    pid, drawn_here = done.stdout.split()
    assert (drawn_here, done.stderr) == ("False", "")
    # It ends with the process that started it.
    assert not Path(f"/proc/{pid}").exists()


def test_the_helper_loads_neither_torch_nor_this_package() -> None:
    png_of(SPEC)
    loaded = Path(f"/proc/{helper().pid}/maps").read_text()
    assert "vl_convert" in loaded
    assert "torch" not in loaded


@pytest.mark.usefixtures("stub")
def test_a_helper_that_was_killed_is_replaced() -> None:
    png_of(SPEC)
    killed = helper().pid
    os.kill(killed, signal.SIGKILL)
    assert png_of(SPEC).startswith(PNG)
    assert helper().pid != killed


def test_one_that_dies_on_every_figure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = rendering._Renderer()
    monkeypatch.setattr(rendering, "_CHILD", "import sys; sys.stdin.buffer.read(1); sys.exit(3)")
    with pytest.raises(RenderError, match="died twice"):
        renderer.ask({"task": "script"})
    renderer.close()


def test_one_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = rendering._Renderer()
    monkeypatch.setattr(rendering, "_CHILD", "import time; time.sleep(600)")
    monkeypatch.setattr(rendering, "_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.raises(RenderError, match="died twice"):
        renderer.ask({"task": "script"})
    assert time.monotonic() - start < 20
    renderer.close()


def test_what_cannot_be_drawn_is_told_and_the_next_can() -> None:
    png_of(SPEC)
    pid = helper().pid
    with pytest.raises(RenderError, match="could not be drawn: ValueError"):
        png_of({"mark": {"type": "of nobody"}, "concat": 3})
    assert png_of(SPEC).startswith(PNG)
    assert helper().pid == pid


def test_nothing_is_fetched() -> None:
    spec = {**SPEC, "data": {"url": "https://example.invalid/data.csv"}}
    with pytest.raises(RenderError):
        png_of(spec)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
@pytest.mark.usefixtures("stub")
def test_a_forked_child_draws_with_a_helper_of_its_own() -> None:
    png_of(SPEC)
    own = helper().pid
    source, target = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            drawn = png_of(SPEC).startswith(PNG)
            os.write(target, f"{drawn} {helper().pid}".encode())
            rendering._RENDERER.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    drawn, other = os.read(source, 100).decode().split()
    os.close(source)
    os.close(target)
    assert drawn == "True"
    assert int(other) != own
    assert png_of(SPEC).startswith(PNG)
    assert helper().pid == own


def test_threads_take_turns() -> None:
    images: list[bytes] = []
    threads = [threading.Thread(target=lambda: images.append(png_of(SPEC))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(images) == 4
    assert set(images) == {png_of(SPEC)}


@pytest.mark.usefixtures("stub")
def test_a_closed_helper_is_started_again_as_a_second_fit_needs() -> None:
    png_of(SPEC)
    process = helper()
    rendering._RENDERER.close()
    assert process.poll() is not None
    assert png_of(SPEC).startswith(PNG)


def test_the_script_of_the_page_holds_the_interpreter() -> None:
    script = page_script()
    assert "vegaEmbed" in script
    assert "expressionInterpreter" in script
    assert "</script" not in script


@pytest.mark.parametrize(("module", "package"), [("altair", "altair"), ("vl_convert", "vl-convert-python")])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, module: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = rf'figures need {package}: pip install "lightning-goldy\[report\]"'
    with pytest.raises(ImportError, match=message):
        require_drawing()
    with pytest.raises(ImportError, match=message):
        png_of(SPEC)
