"""The notebooks run from above to below, each in a folder of its own, and are pages of the documentation."""

from __future__ import annotations

import base64
import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.house import ROOT
from tests.references.doc_blocks import registered_for_a_while

NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))}


def cells_of(name: str) -> list[tuple[str, str]]:
    """Kind and text of each cell."""
    notebook = json.loads(NOTEBOOKS[name].read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


PAGES = runpy.run_path(str(ROOT / "docs" / "notebook_pages.py"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("attach", ("report.html", "goldy/taylor_diff/results.jsonl", "What did this finetune change?")),
        ("read_a_result", ("of the elements are golden", "What kind of change is it?", "95 % interval")),
        ("own_analysis", ("notebook_probe_loss 6 step", "The loss on the probe went from")),
    ],
)
def test_a_notebook_runs_and_shows_what_its_code_gives(
    name: str, told: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with registered_for_a_while():
        outputs = PAGES["outputs_of"]([text for kind, text in cells_of(name) if kind == "code"], name)
    shown = "\n".join(output.get("text", "") for cell in outputs for output in cell)
    for words in told:
        assert words in shown
    # Nothing of the place and the moment that a site is built in.
    for passing in (str(tmp_path), str(Path.home()), "seconds", "MB", " s "):
        assert passing not in shown, shown
    pictures = [output["png"] for cell in outputs for output in cell if "png" in output]
    assert len(pictures) == (name == "read_a_result")
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)


def test_all_notebooks_are_run() -> None:
    assert set(NOTEBOOKS) == {"attach", "read_a_result", "own_analysis"}
    for path in NOTEBOOKS.values():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert not cell.get("outputs"), f"{path}: outputs are made by whoever runs it"


def test_an_analysis_takes_less_than_forty_lines() -> None:
    (first, *_) = [text for kind, text in cells_of("own_analysis") if kind == "code"]
    assert "AnalysisCallback[" in first
    assert len([line for line in first.splitlines() if line.strip()]) < 40


def test_notebooks_become_part_of_their_page_with_their_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = PAGES["on_page_markdown"]
    # What they give is the business of the test above.
    executed = lambda name, codes: [[{"text": f"{name} {number}"}, {"png": "AA"}] for number, _ in enumerate(codes)]  # noqa: E731
    monkeypatch.setitem(hook.__globals__, "_executed", executed)
    source = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="notebooks.md"))
    made = hook(source, page=page, config={"docs_dir": str(ROOT / "docs")}, files=None)
    for name in NOTEBOOKS:
        assert f"notebooks/{name}.ipynb" in source
        number = 0
        for kind, text in cells_of(name):
            expected = re.sub(r"^#", "##", text, flags=re.M)
            if kind == "code":
                output = f'```text title="Output"\n{name} {number}\n```'
                expected, number = f"```python\n{text}\n```\n\n{output}\n\n<img ", number + 1
            assert expected in made
    assert hook("text", page=page, config={"docs_dir": str(ROOT / "docs")}, files=None) == "text"


def test_outputs_come_from_a_process_and_a_folder_of_their_own(tmp_path: Path) -> None:
    codes = ("import os\nword = 'a'\nprint(word)", "word * 3", "os.listdir()", "word = 'b'")
    assert PAGES["_executed"]("small", codes) == [[{"text": "a\n"}], [{"text": "'aaa'"}], [{"text": "[]"}], []]
    with pytest.raises(
        RuntimeError, match=r"(?s)notebook small does not run:.*small\.ipynb, code cell 1.*ZeroDivision"
    ):
        PAGES["_executed"]("small", ("x = 0", "1 / x"))
