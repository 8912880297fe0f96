"""The docs name what exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.house import ROOT, layer_of, modules

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


def shown_in_the_api() -> set[str]:
    pages = (DOCS / "api").rglob("*.md")
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.M)}


def test_the_api_has_every_package_and_what_users_import() -> None:
    shown = shown_in_the_api()
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


def test_the_api_shows_every_public_name() -> None:
    # Commands are told of by their help, names of an earlier package by the message that each gives.
    told = [name for name in modules() if layer_of(name) not in ("commands", "cli", "compat")]
    everything = {name: importlib.import_module(name) for name in told}
    shown = {
        id(found)
        for name in shown_in_the_api()
        for public, found in vars(everything[name]).items()
        if public in getattr(everything[name], "__all__", ()) or getattr(found, "__module__", "") == name
    }
    exported = {
        f"{name}.{public}": getattr(module, public)
        for name, module in everything.items()
        for public in getattr(module, "__all__", ())
    }
    assert len(exported) > 300
    assert [public for public, found in exported.items() if id(found) not in shown] == []


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


def test_the_house_on_one_page_is_the_house() -> None:
    text = (DOCS / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "lightning_goldy"
    folder, named = package, 0
    for token in re.findall(r"`([\w./]+)`", text):
        if "/" not in token and not token.endswith(".py"):
            continue
        # A file without its folder lies beside the one that is named before it.
        places = [package / token, ROOT / token] if "/" in token else [folder / token]
        assert any(place.exists() for place in places), f"architecture.md names {token}, which is not there"
        folder, named = places[0].parent, named + 1
    assert named > 30
    # Classes, functions and options are named as the code has them, in their modules where a dotted name tells these.
    words = {word for token in re.findall(r"`(\w+(?:\.\w+)*)(?:\([^`]*\))?`", text) for word in token.split(".")}
    declared = {
        name
        for path in [*package.rglob("*.py"), *(ROOT / "tests").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        for name in (getattr(node, "name", None), getattr(node, "arg", None))
    }
    folders = {path.stem for path in package.rglob("*")}
    unknown = words - declared - folders - {"results", "jsonl"}
    assert not unknown, f"architecture.md names {sorted(unknown)}, which the code has not"


def test_the_tree_of_the_house_is_that_of_the_package() -> None:
    tree = re.findall(r"```\nlightning_goldy/\n(.*?)```", (DOCS / "architecture.md").read_text(encoding="utf-8"), re.S)[
        0
    ]
    layers = set(re.findall(r"(?:^|\s{2,})(\w+)/(?=\s)", tree.split("architecture/")[0] + tree, re.M))
    top = {path.parent.name for path in (ROOT / "lightning_goldy").glob("*/__init__.py")}
    assert top <= layers
    below = {path.parent.name for path in (ROOT / "lightning_goldy" / "analysis").glob("*/__init__.py")}
    assert below <= set(re.findall(r"(\w+)/", tree))
    known = {path.name for path in (ROOT / "lightning_goldy").rglob("*")}
    assert set(re.findall(r"(\w+(?:\.py|(?=/)))", tree)) <= known
