"""The ``goldy`` command."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
import yaml

import lightning_goldy
from lightning_goldy.cli import COMMANDS, main
from lightning_goldy.training import recipes as bundle
from lightning_goldy.training.recipes import all_recipes, find_recipe
from tests.house import ROOT

TINY = ["--model.model.n_layer=1", "--model.model.n_embd=8", "--model.model.n_head=1"]
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def text(here):
    (here / "text.txt").write_text("to be or not to be, that is the question. " * 60)
    recipe = yaml.safe_load(find_recipe("text_from_scratch").text)
    recipe["trainer"] |= {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    recipe["data"]["init_args"] |= {"block_size": 16, "batch_size": 2, "probe_size": 16, "source": "text.txt"}
    (here / "run.yaml").write_text(yaml.safe_dump(recipe))
    return ["--config", "run.yaml", *TINY, *QUIET]


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(
        f" {name} " in shown
        for name in ("fit", "validate", "test", "analyze", "basin", "plasticity", "recipes", "report", "demo")
    )


def test_help_fits_on_one_screen_and_tells_every_command_once(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["reprot", "run"], "unknown 'reprot'; did you mean report? there are: demo, fit,"),
        (["masks", "shwo", "a"], "unknown 'shwo'; did you mean show? there are: show, compare, combine"),
        (["report", "run", "--jsn"], "unrecognized arguments: --jsn; did you mean --json?"),
        (["masks", "compare", "a", "b", "--scopes", "global"], "--scopes global; did you mean --scope?"),
        (["recipes", "list", "--zzz"], "unrecognized arguments: --zzz\n"),
        (["fit", "--trainer.max_stepz", "3"], "--trainer.max_stepz 3; did you mean --trainer.max_steps?"),
        (["--hlep"], "unrecognized arguments: --hlep; did you mean --help?"),
        (["doctor", "m", "--quux", "x"], "unrecognized arguments: --quux x\n"),
    ],
)
def test_a_misspelt_word_names_the_nearest(capsys, words, told):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_no_words_at_all_list_the_commands(capsys):
    assert main([]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert all(f"  {name} " in told.err for name in COMMANDS)


@pytest.mark.parametrize(("command", "actions"), [("masks", "show, compare, combine"), ("data", "convert, show")])
def test_a_command_without_its_action_names_the_actions(capsys, command, actions):
    with pytest.raises(SystemExit) as exit_:
        main([command])
    assert exit_.value.code == 2
    assert f"goldy {command}: error: say what to do: {actions}" in capsys.readouterr().err


def test_a_misspelt_callback_names_the_nearest(here, capsys):
    callback = {"class_path": "lightning_goldy.callbacks.GoldenSnapshoot"}
    (here / "run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", "run.yaml"])
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert "lightning_goldy.callbacks has no 'GoldenSnapshoot'; did you mean 'GoldenSnapshot'? Valid: Act" in told
    assert len(told.splitlines()) == 1


def test_a_misspelt_callback_of_the_package_itself_names_the_nearest_callback(here, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--trainer.callbacks+=lightning_goldy.GoldenParametrs"])
    assert exit_.value.code == 2
    assert "did you mean lightning_goldy.callbacks.GoldenParameters?" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--trainer.callbacks+=TaylorDif"], ["--config", "run.yaml"]])
def test_a_callback_without_its_path_names_the_path(here, capsys, words):
    callback = {"class_path": "TaylorDif", "init_args": {"n_samples": 3}}
    (here / "run.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *words])
    assert exit_.value.code == 2
    told = "TaylorDif is no path of a class; did you mean lightning_goldy.callbacks.TaylorDiff?"
    assert told in capsys.readouterr().err


def test_an_option_of_a_class_that_is_misspelt_names_the_nearest(capsys):
    recipe = str(ROOT / "recipes" / "atlas_edit.yaml")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", recipe, "--model.optimiser.learning_rate", "1"])
    assert exit_.value.code == 2
    assert "unknown 'optimiser'; did you mean 'optimizer'?" in capsys.readouterr().err


def test_exit_codes_are_those_that_the_docs_tell(here):
    """0: done; 1: an error that nobody foresaw, with its trace; 2: a reason in one line."""
    assert main(["recipes"]) == 0
    assert main(["report", "nowhere"]) == 2
    for words in (["report", "nowhere"], ["fit", "--config", "atlas_edit.yaml"]):
        shown = []
        for debug in ([], ["--debug"]):
            command = [sys.executable, "-m", "lightning_goldy.cli", *words, *debug]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            # A reason that one line tells is that with its trace, too.
            assert ended.returncode == 2
            assert ("Traceback" in ended.stderr) is bool(debug)
            shown.append(ended.stderr.splitlines())
        assert shown[0][-1] == shown[1][-1]
    code = "from lightning_goldy import cli; cli._recipes = lambda options: 1 / 0; cli.main(['recipes'])"
    unforeseen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert unforeseen.returncode == 1
    assert "ZeroDivisionError" in unforeseen.stderr
    page = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text()
    assert set(re.findall(r"^\| (\d+) \|", page, re.M)) == {"0", "1", "2"}


@pytest.mark.parametrize("words", [[], ["--trainer.max_steps=3"]])
def test_a_training_without_a_model_says_what_gives_one(here, capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", *words])
    assert exit_.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.endswith("model; give --config recipes/NAME.yaml (`goldy recipes` lists them), or --model CLASS")


def test_debug_shows_the_trace_and_leaves_none_in_the_environment(here, monkeypatch, capsys):
    monkeypatch.delenv("GOLDY_TRACEBACK", raising=False)
    # A process group puts a hook in its place that writes the rank before each line.
    monkeypatch.setattr(sys, "excepthook", lambda *error: print("[rank0]: Traceback", file=sys.stderr))
    assert main(["report", "nowhere", "--debug"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].startswith("goldy: run directory nowhere does not exist")
    assert "GOLDY_TRACEBACK" not in os.environ
    assert main(["report", "nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_reader_that_has_enough_is_no_error():
    # More than a pipe holds, or the reader's end would come after the last write.
    code = "import sys; from lightning_goldy import cli; cli._recipes = lambda options: print('x\\n' * 200_000); "
    code += "sys.exit(cli.main(['recipes']))"
    words = ["bash", "-o", "pipefail", "-c", f'{sys.executable} -c "{code}" | head -1']
    ended = subprocess.run(words, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"x\n", b"")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"lightning_goldy {lightning_goldy.__version__}"


def test_light_commands_load_neither_torch_nor_lightning():
    code = (
        "import sys; from lightning_goldy.cli import main; main(['recipes', 'list']); "
        "print(bool({'torch', 'lightning', 'lightning.pytorch', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "False"


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_recipes_are_listed_with_their_commands(capsys, words):
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for recipe in all_recipes():
        assert any(line.split()[:2] == [recipe.name, "goldy"] for line in lines), recipe.name


def test_a_recipe_is_shown_as_it_is(capsys):
    assert main(["recipes", "show", "atlas_edit"]) == 0
    assert capsys.readouterr().out == find_recipe("atlas_edit").text


def test_an_unknown_recipe_suggests(capsys):
    assert main(["recipes", "show", "atlas_edits"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'atlas_edit'?" in message
    assert "golden_snapshot" in message


def test_copies_go_where_the_commands_look(here, capsys):
    assert main(["recipes", "copy", "atlas_edit"]) == 0
    assert main(["recipes", "copy", "golden_snapshot"]) == 0
    assert main(["recipes", "copy", "run_report", "elsewhere"]) == 0
    found = sorted(str(path.relative_to(here)) for path in here.rglob("*.yaml"))
    assert found == ["callbacks/golden_snapshot.yaml", "elsewhere/run_report.yaml", "recipes/atlas_edit.yaml"]
    assert (here / "recipes/atlas_edit.yaml").read_text() == find_recipe("atlas_edit").text


def test_copying_never_overwrites_unless_told(here, capsys):
    (here / "recipes").mkdir()
    target = here / "recipes" / "atlas_edit.yaml"
    target.write_text("mine")
    assert main(["recipes", "copy", "atlas_edit"]) == 2
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "mine"
    assert main(["recipes", "copy", "atlas_edit", "--force"]) == 0
    assert target.read_text() != "mine"


def test_the_wheels_files_come_before_the_repositorys(tmp_path, monkeypatch):
    package = tmp_path / "site" / "lightning_goldy"
    (package / "_bundled" / "recipes").mkdir(parents=True)
    (package / "_bundled" / "recipes" / "one.yaml").write_text("# goldy fit")
    monkeypatch.setattr(bundle.lightning_goldy, "__file__", str(package / "__init__.py"))
    assert [recipe.name for recipe in all_recipes()] == ["one"]
    (package / "_bundled" / "recipes" / "one.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="carries no recipes"):
        all_recipes()


def test_report(here, capsys):
    row = {"format": 1, "analysis": "tiny", "name": "tiny", "step": 1, "epoch": 0, "trigger": "end"}
    row |= {"metrics": {"count": 3}, "result": {}, "cost": {"seconds": 0.1}, "files": {}}
    (here / "run" / "goldy" / "tiny").mkdir(parents=True)
    (here / "run" / "goldy" / "tiny" / "results.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["report", "run", "--output", "page.html"]) == 0
    assert Path(capsys.readouterr().out.strip()).name == "page.html"
    assert "tiny" in (here / "page.html").read_text()


def test_a_report_of_nothing_is_a_short_message(here, capsys):
    assert main(["report", "nowhere"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("goldy: ")
    assert "nowhere" in error
    assert "Traceback" not in error


def test_fit_makes_one_directory_per_run_with_its_configuration(text, here):
    for _ in range(2):
        assert main(["fit", *text]) == 0
    runs = sorted((here / "runs" / "text_from_scratch").iterdir())
    assert [run.name for run in runs] == ["version_0", "version_1"]
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        assert config["model"]["init_args"]["model"]["n_layer"] == 1
        assert (run / "checkpoints" / "step=2" / "model.safetensors").is_file()


def test_without_a_logger_configurations_lie_side_by_side(text, here):
    for _ in range(3):
        assert main(["fit", *text, "--trainer.logger=false", "--trainer.callbacks=null"]) == 0
    assert {path.name for path in here.glob("config*.yaml")} == {"config.yaml", "config-1.yaml", "config-2.yaml"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_validate_takes_a_checkpoint(text, here, capsys):
    main(["fit", *text])
    checkpoint = next(here.rglob("*.ckpt"))
    assert main(["validate", *text, "--ckpt_path", str(checkpoint)]) == 0
    assert "val/loss" in capsys.readouterr().out


class Other(L.LightningModule):
    """A module of one's own."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.layer = torch.nn.Linear(width, 258)

    def training_step(self, batch, batch_idx):
        return self.layer.weight.square().sum()

    def validation_step(self, batch, batch_idx):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_any_module_can_be_trained(text, here):
    config = yaml.safe_load((here / "run.yaml").read_text())
    config["model"] = {"class_path": f"{__name__}.Other", "init_args": {"width": 2}}
    config["trainer"] |= {"callbacks": [], "limit_val_batches": 0}
    (here / "other.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "other.yaml", *QUIET]) == 0


def test_overlays_add_to_the_callbacks_of_a_recipe(text, here):
    for name in ("golden_snapshot", "golden_parameters"):
        main(["recipes", "copy", name])
        text += ["--config", f"callbacks/{name}.yaml"]
    assert main(["fit", *text, "--trainer.log_every_n_steps=1"]) == 0
    run = here / "runs" / "text_from_scratch" / "version_0"
    assert {path.parent.name for path in run.rglob("results.jsonl")} == {"golden_snapshot", "golden_parameters"}
    assert (run / "checkpoints" / "step=2.ckpt").is_file(), "the recipe's own callback is gone"


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("recipes/atlas_edit.yaml", "bring it with: goldy recipes copy atlas_edit"),
        ("recipes/atlas_edt.yaml", "does not exist; did you mean atlas_edit? `goldy recipes` lists them"),
    ],
)
def test_a_recipe_that_is_not_here_says_how_to_get_it_in_a_line(here, capsys, path, told):
    assert main(["fit", "--config", path]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"goldy: {path} ")
    assert told in line


def test_unknown_options_end_with_a_message(here, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--model.schedule.name=cosin", "--model.model=gpt2"])
    assert exit_.value.code == 2
    assert "cosine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["basin", "x", "--config", "y", "--directions", "10"],
            "--directions; did you mean --n-directions? Options of",
        ),
        (["analyze", "x", "--config", "y", "--promt=Chad"], "unrecognized option --promt; did you mean --prompt?"),
        (
            ["plasticity", "--level", "0.5"],
            "did you mean --levels? Options of the configuration: --data, --model, --tr",
        ),
    ],
)
def test_a_misspelt_option_is_told_apart_from_one_of_the_configuration(capsys, words, told):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert f"usage: goldy {words[0]}" in error


def test_the_command_line_is_put_back(text, here):
    before = list(sys.argv)
    main(["fit", *text])
    assert sys.argv == before


def test_a_console_without_a_letter_ends_no_command(here):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(shown):
        assert main(["recipes", "list"]) == 0
        print("bl\u00f6ck")
    shown.flush()
    assert shown.buffer.getvalue().endswith(b"bl?ck\n")


def test_without_the_extra_the_report_names_it(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "altair", None)
    assert main(["report", "nowhere"]) == 2
    assert capsys.readouterr().err == 'goldy: figures need altair: pip install "lightning-goldy[report]"\n'
