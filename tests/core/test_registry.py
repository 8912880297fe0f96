from __future__ import annotations

import pytest

from lightning_goldy.core.naming import Registry


def test_entries_under_several_names_in_order() -> None:
    registry = Registry[object]("score")
    entry = object()
    assert registry.register("taylor", "first_order")(entry) is entry
    registry.register("fisher")(object())
    assert list(registry) == ["taylor", "first_order", "fisher"]
    assert len(registry) == 3
    assert registry["taylor"] is registry["first_order"] is entry
    assert "fisher" in registry
    assert "fishr" not in registry


def test_a_name_is_taken_once_and_a_refused_entry_leaves_nothing() -> None:
    registry = Registry[int]("score")
    registry.register("taylor")(1)
    with pytest.raises(ValueError, match="score 'taylor' is registered already"):
        registry.register("new", "taylor")(2)
    assert list(registry) == ["taylor"]
    assert registry["taylor"] == 1


def test_unknown_names_list_the_valid_ones() -> None:
    registry = Registry[int]("score")
    registry.register("taylor")(1)
    registry.register("fisher")(2)
    with pytest.raises(ValueError, match=r"^unknown score 'tailor'; did you mean 'taylor'\? Valid: taylor, fisher$"):
        registry["tailor"]


def test_an_entry_needs_a_name() -> None:
    with pytest.raises(ValueError, match="a score needs a name"):
        Registry[int]("score").register()
