"""What users' code imported by a former name still works, and says what the name is."""

from __future__ import annotations

import importlib
import sys

import pytest

import lightning_goldy


@pytest.mark.parametrize("former", sorted(lightning_goldy._MOVED))
def test_a_former_module_is_the_present_one(former: str) -> None:
    present = importlib.import_module(f"lightning_goldy.{lightning_goldy._MOVED[former]}")
    sys.modules.pop(f"lightning_goldy.{former}", None)
    with pytest.warns(DeprecationWarning, match=f"is {present.__name__} now"):
        module = importlib.import_module(f"lightning_goldy.{former}")
    public = [name for name in vars(present) if not name.startswith("_")]
    assert public
    assert all(getattr(module, name) is getattr(present, name) for name in public)
    with pytest.raises(AttributeError):
        _ = module.no_such_name


def test_a_class_of_a_configuration_is_found() -> None:
    sys.modules.pop("lightning_goldy.variants", None)
    with pytest.warns(DeprecationWarning, match="training.variants now"):
        from lightning_goldy.variants import VariantsModule
    assert VariantsModule.__module__ == "lightning_goldy.training.variants"


def test_a_module_that_never_was_is_an_error() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("lightning_goldy.no_such_module")
