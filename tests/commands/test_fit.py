"""``goldy fit``: an error is a line, and one option of one callback can be changed."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as L
import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig

from lightning_goldy.cli import main
from lightning_goldy.commands.fit import SaveRunConfig, Traces, callback_changes, change_callbacks

SHAPE = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 32}


@pytest.fixture
def words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 20)
    (tmp_path / "bad.jsonl").write_text('{"question": "a?", "answer": "b"}\n{"question": 3}\n')
    callback = "lightning_goldy.callbacks.GoldenSnapshot"
    run = {
        "seed_everything": 0,
        "model": {"class_path": "lightning_goldy.GoldyModule", "init_args": {"model": SHAPE}},
        "data": {
            "class_path": "lightning_goldy.data.TextDataModule",
            "init_args": {"source": "text.txt", "tokenizer": "bytes", "block_size": 16, "probe_size": 2},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
            "callbacks": [
                {"class_path": callback, "init_args": {"name": name, "every_n_steps": 1}}
                for name in ("first", "second")
            ],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=259, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    ViTConfig().save_pretrained(tmp_path / "other")
    return ["fit", "--config", "run.yaml"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--model.optimizer.learnin_rate=3"], "'learnin_rate'; did you mean 'learning_rate'"),
        (["--trainer.nothing=3"], "nothing"),
        (
            ["--trainer.callbacks={class_path: lightning_goldy.callbacks.TaylorDiff, init_args: {every_n_step: 1}}"],
            "unknown 'every_n_step'; did you mean 'every_n_steps'",
        ),
        (["--model.model=./nowhere"], "model './nowhere' is no local folder"),
        (["--model.lora={rank: 2, target_modules: [nope]}"], "its linear layers are named"),
        (
            ["--data=lightning_goldy.data.KnowledgeDataModule", "--data.path=bad.jsonl", "--data.tokenizer=bytes"],
            "bad.jsonl",
        ),
        (["--callbacks.first.every_n_steps=abc"], "trainer.callbacks.every_n_steps: Expected a <class 'int'>. Got"),
        (
            ["--callbacks.first.log_scalars=3", "--callbacks.first.check=7"],
            "callbacks.check: Expected a <class 'bool'>",
        ),
        (["--model.lora={rank: abc}"], "rank: Expected a <class 'int'>. Got value: abc"),
        (["--model.model=cut"], "the folder 'cut' holds no loadable causal_lm model"),
        (["--model.model=other"], "the folder 'other' holds no loadable causal_lm model: Unrecognized"),
        (["--callbacks.third.at=[start]"], "no callbacks are called 'third'; there are: first, second"),
    ],
)
def test_an_error_is_a_line(words, capsys, more, told):
    try:
        code = main([*words, *more])
    except SystemExit as exit_:
        code = exit_.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("goldy: ")]
    assert code == 2
    assert len(lines) == 1
    assert told in lines[0]
    assert len(lines[0]) < 400


def refused_words(words, logger):
    callback = "{class_path: lightning_goldy.callbacks.AttentionTracker, init_args: {heads: [[7, 0]], n_samples: 2}}"
    more = [f"--trainer.logger={logger}", "--trainer.logger.save_dir=runs"] if logger else []
    return [*words, f"--trainer.callbacks+={callback}", *more]


@pytest.mark.parametrize("logger", ["TensorBoardLogger", "CSVLogger", None])
def test_a_refused_run_leaves_nothing(words, tmp_path, capsys, logger):
    before = {*tmp_path.rglob("*")}
    assert main(refused_words(words, logger)) == 2
    assert "there is no head 0 in layer 7" in capsys.readouterr().err
    assert {*tmp_path.rglob("*")} == before


def test_two_nameless_callbacks_of_one_file_are_refused_and_of_two_the_first_stays(words, capsys):
    """Which of two analyses that one file asks for is meant is the user's to say, and neither is left out."""
    kind = "lightning_goldy.callbacks.GoldenSnapshot"

    def attach(file, *every):
        listed = [{"class_path": kind, "init_args": {"every_n_steps": steps}} for steps in every]
        Path(file).write_text(yaml.safe_dump({"trainer": {"callbacks+": listed}}))
        return ["--config", file]

    assert main([*words, "--trainer.callbacks=[]", *attach("both.yaml", 1, 2)]) == 2
    assert "two callbacks are called 'golden_snapshot'" in capsys.readouterr().err
    one, other = attach("one.yaml", 1), attach("other.yaml", 2)
    assert main([*words, "--trainer.callbacks=[]", *one, *other, "--trainer.default_root_dir=here"]) == 0
    (rows,) = Path("here").rglob("golden_snapshot/results.jsonl")
    assert [json.loads(row)["step"] for row in rows.read_text().splitlines()] == [1, 2]


def test_a_refused_run_leaves_what_others_wrote(words, tmp_path):
    assert main([*words, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs"]) == 0
    assert (tmp_path / "runs/lightning_logs/version_0/config.yaml").is_file()
    before = {*tmp_path.rglob("*")}
    assert main(refused_words(words, "CSVLogger")) == 2
    assert {*tmp_path.rglob("*")} == before


@pytest.mark.parametrize("began", [False, True])
def test_what_is_no_trace_of_a_refusal_stays(tmp_path, began):
    trainer = L.Trainer(accelerator="cpu", logger=CSVLogger(tmp_path), callbacks=[SaveRunConfig(None, None)])
    traces = Traces()
    traces.note(trainer)
    folder = Path(trainer.logger.log_dir)
    folder.mkdir(parents=True)
    (folder / "hparams.yaml").write_text("a: 1")
    (folder / ("metrics.csv" if began else "weights.ckpt")).write_text("1")
    saver = next(each for each in trainer.callbacks if isinstance(each, SaveRunConfig))
    saver.began = began
    traces.withdraw()
    assert len(list(folder.iterdir())) == 2


def test_one_option_of_one_of_several_callbacks(words, tmp_path):
    assert main([*words, "--callbacks.second.every_n_steps", "2", "--callbacks.second.at=[start]"]) == 0
    steps = {}
    for path in tmp_path.glob("goldy_logs/version_0/goldy/*/results.jsonl"):
        steps[path.parent.name] = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == {"first": [1, 2], "second": [0, 2]}


def test_what_the_option_of_a_callback_must_be():
    with pytest.raises(ValueError, match=r"write --callbacks\.NAME\.OPTION VALUE"):
        callback_changes(["--callbacks.taylor_diff"])
    with pytest.raises(ValueError, match="2 callbacks are called 'A'"):
        change_callbacks([{"class_path": "x.A"}, {"class_path": "y.A"}], [("A", "at", [])])
