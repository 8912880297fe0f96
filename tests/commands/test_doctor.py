"""``goldy doctor``: versions, what works on a model, and the forecast of each callback."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM, ViTConfig

from lightning_goldy.cli import main
from lightning_goldy.commands.doctor import SHAPES, Question, build_shape, planned, works_on
from lightning_goldy.core.objective import CausalLMObjective
from tests.references.models import build
from tests.references.scaling_table import PATH, render, render_shape

OVERLAY = """trainer:
  max_steps: 40
  callbacks+:
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: lightning_goldy.callbacks.GoldenParameters
      init_args: {n_samples: 6, every_n_steps: 10}
    - class_path: lightning_goldy.callbacks.RunReport
data:
  init_args: {batch_size: 3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=53, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(OVERLAY)
    return tmp_path


def test_a_model_is_tried_and_the_configured_callbacks_are_planned(folder, capsys):
    assert main(["doctor", "model", "--config", "run.yaml", "--length", "16"]) == 0
    told = capsys.readouterr().out
    assert torch.__version__ in told
    assert "GPT2LMHeadModel" in told
    assert "forecast: 40 steps, batches of 3 x 16 tokens" in told
    (line,) = [line for line in told.splitlines() if line.strip().startswith("golden_parameters")]
    # 40 steps, every 10 of them and at the end, which is one of these; each sample with its control of random tokens.
    assert (line.split()[1:3], line.split()[5 if line.split()[4] == "s" else 4]) == (["12", "12"], "4")
    assert "reverse_golden_parameters" not in told
    assert "analyses:" in told


@pytest.mark.parametrize("meta", [[], ["--meta"]], ids=["timed", "meta"])
def test_the_forecast_is_of_what_a_budget_leaves(folder, capsys, meta):
    (folder / "run.yaml").write_text(OVERLAY.replace("n_samples: 6, every_n_steps: 10", "n_samples: 16, budget: 1e-5"))
    assert main(["doctor", "model", "--recipe", "run.yaml", "--length", "16", *meta]) == 0
    told = capsys.readouterr().out
    assert re.search(r"golden_parameters: n_samples=\d+, by its budget", told)
    (line,) = [line for line in told.splitlines() if line.strip().startswith("golden_parameters ")]
    assert int(line.split()[1]) < 2 * 16


def test_what_the_size_of_a_model_leaves_out_is_told(folder, capsys, monkeypatch):
    monkeypatch.setattr("lightning_goldy.callbacks.preflight.LARGE", 10)
    (folder / "run.yaml").write_text(OVERLAY.replace("GoldenParameters", "ReverseGoldenParameters"))
    assert main(["doctor", "model", "--config", "run.yaml", "--length", "16", "--meta"]) == 0
    assert "refused: reverse_golden_parameters:" in capsys.readouterr().out


def test_without_values_nothing_is_allocated(folder, capsys):
    assert main(["doctor", "model", "--meta", "--length", "16", "--steps", "100"]) == 0
    told = capsys.readouterr().out
    for words in ("2 heads in 1 blocks", "training steps", "reverse_golden_parameters"):
        assert words in told


def test_a_padding_token_is_not_looked_for_where_there_are_no_values(folder, capsys):
    config = folder / "model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": 1}))
    assert main(["doctor", "model", "--meta", "--length", "16"]) == 0
    assert "forecast" in capsys.readouterr().out


def test_samples_are_no_longer_than_the_models_positions(folder, capsys):
    assert main(["doctor", "model", "--meta"]) == 0
    assert "x 64 tokens" in capsys.readouterr().out
    assert main(["doctor", "model", "--meta", "--length", "65"]) == 2
    assert "samples of 65 tokens do not fit GPT2LMHeadModel, which has 64 positions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "9"], "name a model (a folder, or a name on the hub), or a shape with --shape 8b; one of both"),
        (["model", "--shape", "8b"], "one of both"),
        (["--shape", "9b"], "unknown shape '9b'; Valid: 1b, 8b, 70b"),
        (["model", "--steps", "0"], "steps must be at least 1; got 0"),
        (["nowhere", "--meta"], "'nowhere' has no configuration to plan with"),
        (["model", "--config", "none.yaml"], "--config none.yaml does not exist; `goldy recipes` lists those of the"),
        (["model", "--config", "atlas_edit"], "bring it with: goldy recipes copy atlas_edit"),
        (["model", "--config", "empty.yaml"], "empty.yaml: no analysis callback is attached"),
        (["model", "--config", "odd.yaml"], "lightning_goldy.callbacks.GoldenParameters"),
    ],
)
def test_faults_are_one_line(folder, capsys, arguments, message):
    (folder / "empty.yaml").write_text("trainer: {}\n")
    (folder / "odd.yaml").write_text(OVERLAY.replace("n_samples: 6", "n_samples: 0"))
    assert main(["doctor", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line


def test_versions_and_devices_need_no_model(capsys):
    assert main(["doctor"]) == 0
    told = capsys.readouterr()
    assert "torch" in told.out
    assert "goldy doctor MODEL" in told.out
    assert not told.err


def test_why_an_analysis_does_not_work_is_told():
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    told = works_on(Broken(), CausalLMObjective(), meta=False)
    assert told["attention"].startswith("does not: ")
    assert told["golden, reverse golden"].startswith("does not: ")
    assert told["change, distribution"] == "works: 2 trainable tensors"
    assert set(works_on(build("llama").eval(), CausalLMObjective(), meta=False).values()) >= {"works"}


def test_shapes_have_their_parameters():
    for name, billions in (("1b", 1.24), ("8b", 8.03)):
        model = build_shape(name)
        assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == billions
        assert all(parameter.is_meta for parameter in model.parameters())
    plan, speeds = planned(build_shape("1b"), CausalLMObjective(), Question(shape="1b", length=64))
    assert speeds is None
    assert plan.activations > 1e5
    assert plan.n_layers == 16


def test_the_page_of_scaling_is_what_is_forecast():
    assert render_shape("1b") in PATH.read_text()


@pytest.mark.slow
def test_the_whole_page_of_scaling_is_what_is_forecast():
    assert set(SHAPES) == {"1b", "8b", "70b"}
    assert render() == PATH.read_text()


def test_in_a_pipe_names_of_callbacks_are_whole_and_empty_columns_left_out(folder, capsys):
    assert main(["doctor", "model", "--meta", "--length", "16"]) == 0
    told = capsys.readouterr().out
    assert {"reverse_golden_parameters", "activation_differences"} <= set(told.split())
    heading = next(line for line in told.splitlines() if line.split()[:1] == ["callback"])
    assert "sent" not in heading.split()
    assert max(map(len, told.splitlines())) <= 130


def planned_lines(told: str) -> list[str]:
    return [line.split()[0] for line in told.partition("forecast: ")[2].splitlines()[2:] if line.startswith(" ")]


def test_what_does_not_work_on_a_model_is_not_planned(folder, capsys):
    """A model without attention and MLPs ended with the reason of one analysis, and no forecast of any."""
    sizes = {"vocab_size": 53, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    MambaForCausalLM(MambaConfig(**sizes)).save_pretrained(folder / "mamba")
    assert main(["doctor", "mamba", "--length", "8", "--steps", "3"]) == 0
    told = capsys.readouterr().out
    assert "does not: cannot describe MambaForCausalLM" in told
    assert "golden_parameters" in planned_lines(told)
    assert not {"attention_tracker", "knowledge_coupling", "circuit_tracker"} & set(planned_lines(told))
    # What is asked for is told.
    (folder / "run.yaml").write_text(
        OVERLAY.replace("GoldenParameters", "KnowledgeCoupling").replace("n_samples: 6,", "")
    )
    assert main(["doctor", "mamba", "--config", "run.yaml", "--length", "8"]) == 0
    assert "knowledge_coupling: no forecast: cannot describe MambaForCausalLM" in capsys.readouterr().out


def test_a_preset_beside_a_recipe_is_planned_once(folder, capsys):
    (folder / "preset.yaml").write_text(OVERLAY.replace("n_samples: 6", "n_samples: 3"))
    assert main(["doctor", "model", "--config", "run.yaml", "--config", "preset.yaml", "--length", "16"]) == 0
    (line,) = re.findall(r"^ *golden_parameters +(\d+)", capsys.readouterr().out, re.MULTILINE)
    assert line == "12"


@pytest.mark.parametrize("end", ["SequenceClassification", "TokenClassification", "MaskedLM"])
def test_a_model_is_planned_as_what_it_is(folder, capsys, end):
    """A classifier was loaded as a language model, with a random head."""
    config = BertConfig(vocab_size=53, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config.num_labels = 3
    getattr(transformers, f"BertFor{end}")(config).save_pretrained(folder / "bert")
    for more in ([], ["--meta"]):
        assert main(["doctor", "bert", "--length", "8", *more]) == 0
        told = capsys.readouterr().out
        assert f"BertFor{end}, " in told
        assert more or f"works: {53 if end == 'MaskedLM' else 3} classes" in told
        # What is told answer by answer, and along the stream of a decoder, is neither tried nor planned.
        for analysis in ("coupling", "circuits"):
            (line,) = re.findall(rf"^ *{analysis} +(.*?) *$", told, re.MULTILINE)
            assert re.match("does not: (coupling asks|circuits (asks|are those of)) a causal language model", line)
        assert not re.search("^ *(knowledge_coupling|circuit_tracker) ", told, re.MULTILINE)


def test_a_model_without_tokens_is_refused_on_one_line(folder, capsys):
    ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(folder / "vit")
    assert main(["doctor", "vit"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert re.match(r"goldy: 'vit' is a ViTForImageClassification; models are planned here whose names end in", line)
    assert len(line) < 300


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ("3", r"trainer.callbacks holds 3; a callback is its class_path"),
        ("[{init_args: {}}]", r"trainer.callbacks holds \{'init_args': \{\}\}"),
        (
            "[{class_path: lightning_goldy.callbacks.TaylorDiff, init_args: {order: 1}}]",
            r"TaylorDiff: unknown 'order'; did you mean 'orders'",
        ),
        ("[lightning_goldy.callbacks.TaylorDif]", r"has no 'TaylorDif'; did you mean 'TaylorDiff'"),
        (
            "[{class_path: lightning_goldy.callbacks.TaylorDiff, init_args: {n_samples: abc}}]",
            r"n_samples: Expected a <class 'int'>. Got value: abc",
        ),
    ],
)
def test_callbacks_that_cannot_be_read_are_told_on_one_line(folder, capsys, callbacks, match):
    (folder / "bad.yaml").write_text(f"trainer: {{callbacks: {callbacks}}}")
    assert main(["doctor", "model", "--config", "bad.yaml"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert re.search(match, line)
    assert "Subtypes" not in line


def test_callbacks_can_be_names_alone(folder, capsys):
    names = "[ModelCheckpoint, lightning_goldy.callbacks.RunReport, lightning_goldy.callbacks.GoldenParameters]"
    (folder / "names.yaml").write_text(f"trainer: {{callbacks: {names}}}")
    assert main(["doctor", "model", "--config", "names.yaml", "--length", "8"]) == 0
    assert planned_lines(capsys.readouterr().out) == ["golden_parameters"]


def test_what_a_run_would_warn_of_and_refuse_is_told(folder, capsys, monkeypatch):
    arguments = ["doctor", "model", "--config", "run.yaml", "--length", "8", "--steps", "1000"]
    monkeypatch.setattr("lightning_goldy.callbacks.preflight._WORTH_TELLING", 0.0)
    monkeypatch.setattr("lightning_goldy.callbacks.preflight._SHARE", 0.0)
    assert main(arguments) == 0
    assert "warning: the analyses take about" in capsys.readouterr().out
    monkeypatch.setattr("lightning_goldy.commands.doctor.available_memory", lambda: 10)
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert "golden_parameters" in told.out
    assert "a run would be refused: beside the training golden_parameters needs" in told.err
    # Of another machine nothing is known.
    assert main([*arguments, "--meta"]) == 0
