"""Puts notebooks, with the outputs of their code, into the pages that name them, as mkdocs reads them.

The code runs while the site is built, each notebook in a process and an empty folder of its own; nothing of a run is
kept beside the notebooks, so that what a page shows is always what its code gives.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import functools
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MARK = re.compile(r"^<!-- notebook: (.+\.ipynb) -->$", re.M)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page with each notebook's texts, a level below its headings, code and outputs in the place of the mark."""
    folder = Path(config["docs_dir"], page.file.src_uri).parent
    return MARK.sub(lambda found: _rendered(folder / found[1]), markdown)


def outputs_of(codes: list[str], name: str) -> list[list[dict[str, str]]]:
    """Runs cells one after the other in this process, as a notebook would.

    Args:
        codes: Their texts.
        name: Of the notebook, for the trace of an error.

    Returns:
        Of each cell what it has printed, then its last expression: ``text`` or ``png`` (in base 64).
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, code in enumerate(codes):
        file = f"{name}.ipynb, code cell {number}"
        tree = ast.parse(code, file)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, file, "exec", dont_inherit=True), names)
            shown = None
            if isinstance(last, ast.Expr):
                shown = eval(compile(ast.Expression(last.value), file, "eval", dont_inherit=True), names)
        found = [{"text": printed.getvalue()}] if printed.getvalue().strip() else []
        if hasattr(shown, "_repr_png_"):
            found.append({"png": base64.b64encode(shown._repr_png_()).decode()})
        elif shown is not None:
            found.append({"text": repr(shown)})
        outputs.append(found)
    return outputs


@functools.cache
def _executed(name: str, codes: tuple[str, ...]) -> list[list[dict[str, str]]]:
    """What cells give in a process of their own, which knows nothing of the site's."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1", "COLUMNS": "72"}
    with tempfile.TemporaryDirectory() as folder:
        place = [sys.executable, str(Path(__file__).resolve()), name]
        given = json.dumps(codes)
        done = subprocess.run(place, cwd=folder, env=environment, input=given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"notebook {name} does not run:\n{done.stderr}")
    outputs: list[list[dict[str, str]]] = json.loads(done.stdout.splitlines()[-1])
    return outputs


def _rendered(path: Path) -> str:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    kinds = [cell["cell_type"] for cell in cells]
    outputs = iter(_executed(path.stem, tuple(text for text, kind in zip(texts, kinds, strict=True) if kind == "code")))
    parts = []
    for kind, text in zip(kinds, texts, strict=True):
        if kind == "code":
            parts += [f"```python\n{text}\n```", *map(_shown, next(outputs))]
        else:
            parts.append(re.sub(r"^#", "##", text, flags=re.M))
    return "\n\n".join(parts)


def _shown(output: dict[str, str]) -> str:
    if "png" in output:
        told = "The figure that the code above draws"
        return f'<img class="output" alt="{told}" src="data:image/png;base64,{output["png"]}">'
    return f'```text title="Output"\n{output["text"].rstrip()}\n```'


if __name__ == "__main__":
    print(json.dumps(outputs_of(json.load(sys.stdin), sys.argv[1])))
