"""Every recipe and every overlay runs by the command in its first line."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil

import pytest
import yaml
from jsonargparse import ArgumentParser

from lightning_goldy.cli import main
from lightning_goldy.data import AtlasDataModule, byte_tokenizer, load_countries, relations
from lightning_goldy.training.models import build_model, complete_config, write_pretrained
from lightning_goldy.training.recipes import all_recipes
from tests.references.common import one_pixel

TINY = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 512}
TINY_GEMMA = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Shapes that take minutes here; everything else of their recipes stays.
REDUCED = {
    "gpt2_from_scratch": {"n_layer": 1, "n_head": 2, "n_embd": 8},
    "gemma_from_scratch": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "head_dim": 4,
        "query_pre_attn_scalar": 4,
    },
    "transformer_from_scratch": {"n_layer": 2, "n_embd": 16},
    "text_from_scratch": {"n_layer": 2, "n_embd": 16},
    "head_plasticity": {"n_layer": 2, "n_embd": 16},
}
# Texts in short blocks, and questions about every eighth country: what runs on them is the same.
SHORT_TEXT = ("--data.block_size=64", "--data.batch_size=4")
COUNTRIES = load_countries()[::8]
SMALL = {
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 1,
        "max_steps": -1,
        "limit_train_batches": 2,
        "limit_val_batches": 1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": 1,
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
}
RECIPES = all_recipes()
# Pictures take half of a small run; the tests of the report draw each kind, and here one run draws all of its own.
DRAWN = "transformer_from_scratch"


@pytest.fixture(scope="module")
def few_countries():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(relations, "load_countries", lambda: COUNTRIES)
        yield


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, few_countries):
    """A folder with copies of all files, and small stand-ins for what their commands read."""
    folder = tmp_path_factory.mktemp("workplace")
    for recipe in RECIPES:
        (folder / recipe.kind).mkdir(exist_ok=True)
        (folder / recipe.kind / recipe.path.name).write_text(recipe.text)
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (folder / "text.txt").write_text("to be or not to be, that is the question. " * 400)
    pairs = [{"question": f"what is {n} + {n}?", "answer": str(2 * n)} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    # A folder of that name goes before the hub.
    for name, config, tokenizer in (
        ("gpt2", TINY, byte_tokenizer()),
        ("google/gemma-3-270m", TINY_GEMMA, byte_tokenizer()),
        ("runs/demo/base", TINY, AtlasDataModule().tokenizer),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_pretrained(build_model(complete_config(config, tokenizer)), folder / name, tokenizer=tokenizer)
    return folder


@pytest.fixture
def workplace(stand_ins, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(stand_ins, tmp_path, dirs_exist_ok=True)


def _arguments(recipe):
    words = shlex.split(recipe.first_line)
    assert words[:2] == ["goldy", "fit"], f"{recipe.path}: the first line is not the command that launches it"
    assert f"{recipe.kind}/{recipe.path.name}" in words
    stand_in = "pairs.jsonl" if "--data.path" in words else "text.txt"
    reduced = [f"--model.model.{key}={value}" for key, value in REDUCED.get(recipe.name, {}).items()]
    short = SHORT_TEXT if "--data.source" in words else ()
    return [*(stand_in if word == "FILE" else word for word in words[1:]), "--config", "small.yaml", *reduced, *short]


def _callbacks_of(recipe):
    found = yaml.safe_load(recipe.text)["trainer"].get("callbacks+", [])
    return {callback["class_path"].rpartition(".")[2] for callback in found}


# One run has their callbacks all at once.
TOGETHER = _callbacks_of(next(each for each in RECIPES if each.name == "full"))
OF_ONE = [
    each for each in RECIPES if each.kind == "callbacks" and each.name != "light" and _callbacks_of(each) < TOGETHER
]


@pytest.mark.parametrize("recipe", OF_ONE, ids=lambda recipe: recipe.name)
def test_the_first_line_of_a_callback_gives_a_run_with_it(recipe, workplace, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*_arguments(recipe), "--print_config"])
    assert ended.value.code in (None, 0)
    shown = yaml.safe_load(capsys.readouterr().out)
    attached = {callback["class_path"].rpartition(".")[2] for callback in shown["trainer"]["callbacks"]}
    assert _callbacks_of(recipe) <= attached


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(
            each,
            id=f"{each.kind}/{each.name}",
            marks=pytest.mark.slow if each in OF_ONE else (),
        )
        for each in RECIPES
        if each.name != "head_plasticity_sweep"
    ],
)
def test_the_first_line_runs(recipe, workplace, monkeypatch):
    arguments = _arguments(recipe)
    if recipe.name != DRAWN:
        monkeypatch.setattr("lightning_goldy.report.figures.png_of", one_pixel)
    assert main(arguments) == 0
    run = next((workplace / "runs").glob("*/version_0"))
    assert list(run.glob("events.out.tfevents.*"))
    assert list(run.glob("checkpoints/step=2.ckpt"))
    assert list(run.glob("checkpoints/step=2/*.safetensors"))
    saved = yaml.safe_load((run / "config.yaml").read_text())
    attached = [callback["class_path"].rpartition(".")[2] for callback in saved["trainer"]["callbacks"]]
    wanted = [
        yaml.safe_load(path.read_text())
        for path in workplace.glob("*/*.yaml")
        if f"{path.parent.name}/{path.name}" in arguments
    ]
    for config in wanted:
        for callback in config["trainer"].get("callbacks+", config["trainer"].get("callbacks", [])):
            assert callback["class_path"].rpartition(".")[2] in attached


def test_the_sweeps_first_line_runs(workplace):
    recipe = next(each for each in RECIPES if each.name == "head_plasticity_sweep")
    words = shlex.split(recipe.first_line)
    assert words[:4] == ["goldy", "plasticity", "--config", "recipes/head_plasticity_sweep.yaml"]
    arguments = ["text.txt" if word == "FILE" else word for word in words[1:]]
    reduced = ["--config", "small.yaml", "--trainer.limit_train_batches=8", "--strategies", "random", "--levels", "0.5"]
    reduced += ["--seeds", "0", "--model.model.n_embd=16", "--data.block_size=32"]
    assert main([*arguments, *reduced]) == 0
    (row,) = (workplace / "runs/plasticity/version_0/goldy/plasticity_sweep/results.jsonl").read_text().splitlines()
    (run,) = json.loads(row)["result"]["runs"]
    assert (run["strategy"], run["heads"], run["open_heads"]) == ("random", 16, 8)


PRESETS = ("light", "full")


@pytest.mark.parametrize(
    "recipe",
    [each for each in RECIPES if each.kind == "callbacks" and each.name not in PRESETS],
    ids=lambda recipe: recipe.name,
)
def test_an_overlay_adds_the_callback_of_its_name_and_shows_every_option(recipe):
    (callback,) = yaml.safe_load(recipe.text)["trainer"]["callbacks+"]
    module, _, name = callback["class_path"].rpartition(".")
    assert "_".join(re.findall("[A-Z][a-z]*", name)).lower() == recipe.name
    kind = getattr(importlib.import_module(module), name)
    parser = ArgumentParser()
    options = {name.rpartition(".")[2] for name in parser.add_class_arguments(kind, "made", fail_untyped=False)}
    needless = set() if getattr(kind, "needs_probe", True) else {"objective", "probe"}
    given = callback.get("init_args", {})
    assert set(given) == options - needless
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
    assert isinstance(instantiate(parser.parse_object({"made": given})).made, kind)


@pytest.mark.filterwarnings("ignore:n_samples=.*, but the probe holds only")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(each, id=each.name, marks=() if each.name == "text_finetune" else pytest.mark.slow)
        for each in RECIPES
        if each.kind == "recipes" and each.name != "head_plasticity_sweep"
    ],
)
def test_every_recipe_passes_the_checks_with_a_preset(recipe, preset, workplace, monkeypatch, capsys):
    """Recipes of text were refused for want of pieces of knowledge."""

    def passed(*_):
        raise ValueError("all checks have passed")

    monkeypatch.setattr("lightning_goldy.callbacks.base.AnalysisCallback.begin", passed)
    assert main([*_arguments(recipe), "--config", f"callbacks/{preset}.yaml"]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("goldy: ")]
    assert told == "goldy: all checks have passed"


def test_presets_hold_every_callback_that_only_looks():
    names = {}
    for preset in PRESETS:
        recipe = next(each for each in RECIPES if each.name == preset)
        found = yaml.safe_load(recipe.text)["trainer"]["callbacks+"]
        names[preset] = [callback["class_path"].rpartition(".")[2] for callback in found]
        shares = [callback.get("init_args", {}).get("budget", 0.0) for callback in found]
        assert (sum(shares) < 0.05 and all(shares)) if preset == "light" else not any(shares)
    own = "HeadPlasticity", "FinetuneComparison", "ExactResume", "RunReport"
    overlays = {"".join(map(str.title, each.name.split("_"))) for each in RECIPES if each.kind == "callbacks"}
    assert set(names["full"]) == overlays - {*own, *map(str.title, PRESETS)}
    # A search through the model, and what is only for the decoders that are described, must be asked for.
    assert set(names["light"]) == set(names["full"]) - {"ReverseGoldenParameters", "CircuitTracker"}


def test_recipes_say_where_their_logs_go():
    for recipe in RECIPES:
        if recipe.kind == "recipes":
            trainer = yaml.safe_load(recipe.text)["trainer"]
            assert trainer["logger"]["init_args"]["name"] == recipe.name
            kinds = [callback["class_path"].rpartition(".")[2] for callback in trainer["callbacks"]]
            assert {"LearningRateMonitor", "ModelCheckpoint"} <= set(kinds)
