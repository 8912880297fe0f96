"""Puts notebooks into the pages that name them, as mkdocs reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MARK = re.compile(r"^<!-- notebook: (.+\.ipynb) -->$", re.M)


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """The page with each notebook's texts, a level below its headings, and code in the place of the mark."""
    folder = Path(config["docs_dir"], page.file.src_uri).parent
    return MARK.sub(lambda found: _rendered(folder / found[1]), markdown)


def _rendered(path: Path) -> str:
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts.append(f"```python\n{text}\n```" if is_code else re.sub(r"^#", "##", text, flags=re.M))
    return "\n\n".join(parts)
