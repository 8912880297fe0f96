"""The docs name what exists."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house import ROOT, modules

DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"]
SETTINGS = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "callbacks").glob("*.yaml"))]


def listed(entry: Any) -> list[str]:
    if isinstance(entry, dict):
        entry = list(entry.values())
    return [entry] if isinstance(entry, str) else [page for item in entry for page in listed(item)]


def test_every_page_is_in_the_navigation() -> None:
    # The configuration of the site alone, without the tags that name functions of its plugins.
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = listed(yaml.safe_load(text)["nav"])
    assert sorted(pages) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_the_api_has_every_package_and_what_users_import() -> None:
    shown = {
        name for page in (DOCS / "api").rglob("*.md") for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.M)
    }
    layers = ("analysis", "callbacks", "core", "data", "optim", "report", "training")
    packages = {
        name
        for name, path in modules().items()
        if path.name == "__init__.py" and name.count(".") >= 1 and name.split(".")[1] in layers
    }
    # Their parts are shown one by one.
    packages -= {"lightning_goldy.analysis", "lightning_goldy.training", "lightning_goldy.report.topics"}
    assert packages <= shown
    assert shown <= set(modules())


@pytest.mark.parametrize("page", [*PAGES, *SETTINGS], ids=lambda page: str(page.relative_to(ROOT)))
def test_dotted_names_exist(page: Path) -> None:
    for name in sorted(set(re.findall(r"\blightning_goldy(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))):
        if (ROOT / name.replace(".", "/")).suffix in (".yaml", ".csv"):
            continue
        assert resolve(name) is not None, f"{page}: {name}"


def resolve(name: str) -> Any:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        if module not in modules():
            continue
        found: Any = importlib.import_module(module)
        for part in parts[cut:]:
            found = getattr(found, part, None)
        return found
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page}: {target}"
