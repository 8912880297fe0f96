"""The house stays one that a newcomer finds his way in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import house
from tests.house import Import


@pytest.fixture(scope="module")
def known() -> dict[str, Path]:
    return house.modules()


@pytest.fixture(scope="module")
def edges(known: dict[str, Path]) -> list[Import]:
    return house.imports(known)


def test_imports_point_one_way(edges: list[Import]) -> None:
    assert len(edges) > 100
    assert house.wrong_arrows(edges) == []


def test_no_folders_import_one_another(edges: list[Import], known: dict[str, Path]) -> None:
    assert house.cycles(edges, known) == []


def test_no_modules_import_one_another(edges: list[Import]) -> None:
    assert house.circles(edges) == []
    one, back = Import("p.a", "p.b", False), Import("p.b", "p.a", True)
    assert house.circles([one, back]) == [["p.a", "p.b"]]
    assert house.circles([Import("p.a", "p.b", False, typed=True), back]) == []


def test_the_package_holds_nothing_else() -> None:
    assert house.strays() == []


def test_a_wrong_arrow_is_seen() -> None:
    edges = [Import("lightning_goldy.core.space", "lightning_goldy.analysis.change", True)]
    assert house.wrong_arrows(edges) == ["lightning_goldy.core.space imports lightning_goldy.analysis.change"]


def test_a_cycle_is_seen() -> None:
    known = {
        f"p.{folder}.{name}": Path(f"p/{folder}/{name}.py") for folder, name in (("a", "x"), ("b", "y"), ("c", "z"))
    }
    edges = [
        Import("p.a.x", "p.b.y", True),
        Import("p.b.y", "p.c.z", True),
        Import("p.c.z", "p.a.x", False),
    ]
    assert house.cycles(edges, known) == [["p.a", "p.b", "p.c"]]
    assert house.cycles(edges[:2], known) == []


# What has been reached, so that it only falls.
MOST_SERVED_ONCE = 15


def test_files_hold_whole_concepts(edges: list[Import], known: dict[str, Path]) -> None:
    single = house.served_once(edges, known)
    assert len(single) <= MOST_SERVED_ONCE, single
    assert len(known) <= 195


def test_no_file_is_too_long_and_no_folder_crowded(known: dict[str, Path]) -> None:
    lengths = house.line_counts(known)
    assert {module: lines for module, lines in lengths.items() if lines > 800} == {}
    assert {folder: count for folder, count in house.folder_sizes(known).items() if count > 20} == {}


def test_the_root_holds_what_users_import(known: dict[str, Path]) -> None:
    at_root = {path.stem for path in known.values() if path.parent.name == house.PACKAGE}
    assert at_root == house.AT_ROOT
