"""The notebooks run from above to below, each in a folder of its own, and are pages of the documentation."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.house import ROOT
from tests.references.doc_blocks import registered_for_a_while

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}


def cells_of(name: str) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    notebook = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def run_notebook(name: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "__main__"}
    with registered_for_a_while():
        for number, (kind, text) in enumerate(cells_of(name)):
            if kind == "code":
                exec(compile(text, f"{name}.ipynb, cell {number}", "exec", dont_inherit=True), names)
    return names


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("attach", ("report.html", "goldy/taylor_diff/results.jsonl", "goldy/golden_snapshot/base.safetensors")),
        ("read_a_result", ("of the elements are golden", "What kind of change is it?", "95 % interval")),
        ("own_analysis", ('"analysis":"notebook_probe_loss"', '"step":6')),
    ],
)
def test_a_notebook_runs(
    name: str,
    told: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run_notebook(name)
    shown = capsys.readouterr().out.replace('": ', '":')
    for words in told:
        assert words in shown


def test_all_notebooks_are_run() -> None:
    assert set(NOTEBOOKS) == {"attach", "read_a_result", "own_analysis"}
    for path in NOTEBOOKS.values():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{path}: outputs are made by whoever runs it"


def test_an_analysis_takes_less_than_forty_lines() -> None:
    (first, *_) = [text for kind, text in cells_of("own_analysis") if kind == "code"]
    assert "AnalysisCallback[" in first
    assert len([line for line in first.splitlines() if line.strip()]) < 40


def test_notebooks_become_part_of_their_page() -> None:
    hook = runpy.run_path(str(ROOT / "docs" / "notebook_pages.py"))["on_page_markdown"]
    source = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="notebooks.md"))
    made = hook(source, page=page, config={"docs_dir": str(ROOT / "docs")}, files=None)
    for name in NOTEBOOKS:
        assert f"notebooks/{name}.ipynb" in source
        for kind, text in cells_of(name):
            expected = f"```python\n{text}\n```" if kind == "code" else re.sub(r"^#", "##", text, flags=re.M)
            assert expected in made
    assert hook("text", page=page, config={"docs_dir": str(ROOT / "docs")}, files=None) == "text"
