"""Defaults that follow: overlays say what Python does, settings may be dicts, few samples are used and told."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings

import pytest
import yaml

from lightning_goldy import callbacks
from lightning_goldy.callbacks import (
    BasinVolume,
    ChangeAttribution,
    GoldenParameters,
    HeadPlasticity,
    ReverseGoldenParameters,
)
from lightning_goldy.callbacks.base import AnalysisCallback
from lightning_goldy.report.descriptions import Description
from lightning_goldy.training.recipes import all_recipes
from tests.callbacks.training import fit

OVERLAYS = [recipe for recipe in all_recipes() if recipe.kind == "callbacks" and recipe.name not in ("light", "full")]


def defaults(kind) -> dict:
    """By name, those of base classes that options are passed on to included."""
    found: dict = {}
    for base in reversed(kind.__mro__):
        if "__init__" in vars(base) and base is not object:
            found |= {
                name: parameter.default
                for name, parameter in inspect.signature(base.__init__).parameters.items()
                if parameter.default is not parameter.empty
            }
    return found


def plain(value):
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda overlay: overlay.name)
def test_overlays_and_python_have_the_same_defaults(overlay):
    for entry in yaml.safe_load(overlay.text)["trainer"]["callbacks+"]:
        module, _, name = entry["class_path"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        known = defaults(kind)
        for option, value in entry.get("init_args", {}).items():
            expected = plain(known[option])
            if isinstance(value, dict):
                value = {**expected, **{key: plain(item) for key, item in value.items()}}
            assert plain(value) == expected, f"{overlay.name}: {option} is {value!r}, in Python {known[option]!r}"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (HeadPlasticity, {"scoring": {"n_samples": 2}, "regrowth": {"fraction": 0.0}}),
        (BasinVolume, {"estimator": {"seed": 3}, "selection": {"include": ["*mlp*"]}}),
        (ChangeAttribution, {"learn": {"steps": 3}}),
        (ReverseGoldenParameters, {"search": {"rounds": 3}, "generations": {"prompts": ["a"]}}),
    ],
)
def test_settings_may_be_dicts_and_others_are_refused(kind, options):
    kind(**options)
    for option in options:
        with pytest.raises(ValueError, match=f"unknown option {option}.nothing; choose from"):
            kind(**{option: {"nothing": 1}})
        with pytest.raises(TypeError, match=f"{option} must be .* or a dict of its fields; got int"):
            kind(**{option: 3})


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
@pytest.mark.parametrize("kind", [GoldenParameters, ReverseGoldenParameters, BasinVolume])
def test_fewer_samples_than_wanted_are_used_and_told(tmp_path, kind):
    options = {"n_directions": 1} if kind is BasinVolume else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(tmp_path, [kind(at=["end"], **options)], max_epochs=1)
    assert any("n_samples=16, but the probe holds only 4 samples: those are used" in str(each.message) for each in told)


def test_log_scalars_is_checked():
    with pytest.raises(ValueError, match="log_scalars"):
        GoldenParameters(log_scalars="few")
    assert issubclass(GoldenParameters, AnalysisCallback)
    assert Description("", "", "", headline=("loss",)).is_headline("loss")


ALL = [getattr(callbacks, name) for name in callbacks.__all__ if name not in ("AnalysisContext", "Findings")]
ANYTHING = ("objective", "source", "pieces")  # Their forms are many, and read when the training starts.


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind is not AnalysisCallback], ids=lambda kind: kind.__name__)
def test_what_no_option_can_be_is_refused_by_name(kind):
    for option in inspect.signature(kind.__init__).parameters:
        if option in ("self", "options", *ANYTHING):
            continue
        for wrong in (object(), float("nan")):
            with pytest.raises((ValueError, TypeError), match=option.split("_")[0]):
                kind(**{option: wrong})


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("control", "no"), ("include", "mlp"), ("exclude", "bias"), ("last_layers", 0), ("last_layers", 1.5),
        ("last_layers", "2"), ("check", 1), ("large", "yes"), ("name", 3), ("model_attribute", 3), ("probe", "a.txt"),
    ],
)  # fmt: skip
def test_options_are_checked_when_they_are_given(option, wrong):
    with pytest.raises(ValueError, match=rf"{option} (must be|is a) .*; got .*{wrong}"):
        GoldenParameters(**{option: wrong})
