"""The house stays one that a newcomer finds his way in."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import house, integration
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
    assert len(known) <= 180


def test_no_file_is_too_long_and_no_folder_crowded(known: dict[str, Path]) -> None:
    lengths = house.line_counts(known)
    assert {module: lines for module, lines in lengths.items() if lines > 800} == {}
    assert {folder: count for folder, count in house.folder_sizes(known).items() if count > 20} == {}


def test_the_root_holds_what_users_import(known: dict[str, Path]) -> None:
    at_root = {path.stem for path in known.values() if path.parent.name == house.PACKAGE}
    assert at_root == house.AT_ROOT


PLACES = [place for places in integration.PLACES.values() for place in places]
STAYING = [place for places in integration.STAYS.values() for place in places]


@pytest.mark.parametrize("place", [*PLACES, *STAYING])
def test_places_of_integration_tests_are_there(place: str) -> None:
    file, _, function = place.partition("::")
    assert (house.ROOT / file).exists()
    if function:
        assert f"def {function.partition('[')[0]}(" in (house.ROOT / file).read_text(encoding="utf-8")


def test_of_each_kind_one_stays_with_the_fast_tests() -> None:
    for place in STAYING:
        assert not integration.is_listed(place)
        assert place.startswith(tuple(PLACES)), f"{place} is not listed, so it need not stay"
    assert integration.is_listed("tests/recipes/test_recipes.py::test_x")
    assert not integration.is_listed("tests/core/test_space.py::test_x")


def test_an_integration_test_is_never_slow() -> None:
    def item(place: str, *markers: str) -> SimpleNamespace:
        own = list(markers)
        return SimpleNamespace(
            nodeid=place,
            own=own,
            get_closest_marker=lambda name: name if name in own else None,
            add_marker=lambda marker: own.append(marker.name),
        )

    marked = [item("tests/recipes/a.py::b"), item("tests/recipes/a.py::c", "slow"), item("tests/core/a.py::d")]
    for one in marked:
        integration.mark(one)  # type: ignore[arg-type]
    assert [one.own for one in marked] == [["integration"], ["slow"], []]
    with pytest.raises(pytest.UsageError, match="marked slow and integration"):
        integration.mark(item("tests/core/a.py::d", "slow", "integration"))  # type: ignore[arg-type]


def test_every_test_that_is_not_slow_runs_before_a_merge() -> None:
    steps = (house.ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"make test", "make test-integration"} <= set(steps)
    make = (house.ROOT / "Makefile").read_text(encoding="utf-8")
    commands = dict(re.findall(r"^(test[\w-]*): .*\n\t(.*)$", make, re.M))
    assert "-m" not in commands["test"].partition("pytest")[2]
    assert "-m integration" in commands["test-integration"]
    settings = (house.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "-m 'not slow and not gpu and not integration'" in settings
