"""``goldy analyze``."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
import yaml
from torch import nn

from lightning_goldy.analysis.activations import activation_differences
from lightning_goldy.analysis.attention import AttentionMaps, AttentionStatistics, attention_maps, attention_statistics
from lightning_goldy.analysis.change import ParameterDistributionResult, parameter_distribution, weight_change
from lightning_goldy.analysis.circuits import TrackedCircuit, TrackingOptions, circuit_overlap, track_circuit
from lightning_goldy.analysis.continuations import Continuations, continue_prompts
from lightning_goldy.analysis.linearized import ExplainedChange, explain_change
from lightning_goldy.analysis.taylor import TaylorDiffResult, taylor_diff
from lightning_goldy.cli import main
from lightning_goldy.commands.analyze import PARTS
from lightning_goldy.commands.checkpoints import find_base, read_saved
from lightning_goldy.core import ParameterVector
from lightning_goldy.core.architecture import HeadGates
from lightning_goldy.core.architecture.adapters import base_values
from lightning_goldy.core.base import BaseParameters, base_of
from lightning_goldy.core.files import StoreError
from lightning_goldy.core.objective import CausalLMObjective, ClassifierObjective
from lightning_goldy.core.store import fingerprint, load_vectors, save_vectors
from lightning_goldy.data import AtlasDataModule, split_of_task
from lightning_goldy.data.prompt_pairs import pairs_of_tasks
from lightning_goldy.training.models import build_model, complete_config, write_pretrained
from lightning_goldy.training.module import GoldyModule

TINY = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 64}
DATA = {"edits": 5, "batch_size": 8, "probe_size": 8}
NAMES = (
    "change_attribution",
    "taylor_diff",
    "explain_change",
    "parameter_distribution",
    "activation_differences",
    "attention_tracker",
    "continuations",
)
PROMPTS = ["The capital of <b>France", "Chad"]
# Two short runs in one process share a folder for checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with a golden snapshot, its checkpoints at steps 3 and 6, and the folder that it began with."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    data = AtlasDataModule(**DATA)
    write_pretrained(build_model(complete_config(TINY, data.tokenizer)), folder / "base", tokenizer=data.tokenizer)
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"filename": "{step}", "every_n_epochs": 1, "save_top_k": -1},
    }
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "run"},
    }
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_goldy.GoldyModule",
            "init_args": {"model": str(folder / "base"), "optimizer": {"learning_rate": 0.01}},
        },
        "data": {"class_path": "lightning_goldy.data.AtlasDataModule", "init_args": DATA},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": logger,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning_goldy.callbacks.GoldenSnapshot"}, saver],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "run.yaml")]) == 0
    return folder


@pytest.fixture(scope="module")
def analyzed(trained, tmp_path_factory):
    """The whole command once, with prompts from both places, and what it printed."""
    folder = tmp_path_factory.mktemp("analyzed")
    (folder / "prompts.txt").write_text(f"{PROMPTS[1]}\n\n")
    words = ["--prompt", PROMPTS[0], "--prompts", folder / "prompts.txt", "--max-new-tokens", "4"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        out = analyze(trained, *words, output=str(folder / "out"))
    return out, shown.getvalue()


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """An empty folder to work in. Figures take longest, and one run with them is enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_goldy.commands.analyze.draw_figures", lambda row, **_: {})
    return tmp_path


@pytest.fixture
def only(monkeypatch):
    """Leaves of the analyses those that a test looks at."""
    return lambda *names: monkeypatch.setattr(
        "lightning_goldy.commands.analyze.PARTS", {name: PARTS[name] for name in names}
    )


def checkpoint_of(trained, step=6):
    return trained / "run/version_0/checkpoints" / f"step={step}.ckpt"


def analyze(trained, *words, checkpoint=None, output="out"):
    path = checkpoint or checkpoint_of(trained)
    arguments = [str(path), "--config", str(trained / "run.yaml"), "--output", output, *map(str, words)]
    assert main(["analyze", *arguments]) == 0
    return Path(output)


def row_of(folder, name):
    (line,) = (folder / "goldy" / name / "results.jsonl").read_text().splitlines()
    return json.loads(line)


def result_of(kind, folder, name, file="result"):
    return kind.from_json((folder / "goldy" / name / f"{file}.json").read_text())


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def model_of(path):
    return GoldyModule(str(path)).model.eval()


def test_results_are_those_of_the_functions(trained, analyzed):
    out, shown = analyzed
    model, base = model_of(checkpoint_of(trained).with_suffix("")), ParameterVector.of(model_of(trained / "base"))
    data = AtlasDataModule(**DATA)
    batches, tokenizer = list(data.probe_dataloader()), data.tokenizer

    expansion, expected = result_of(TaylorDiffResult, out, "taylor_diff"), taylor_diff(model, base, batches)
    assert vars(expansion) == vars(expected)
    assert expansion.step_norm > 0.1
    explained = result_of(ExplainedChange, out, "explain_change")
    assert explained == explain_change(model, base, batches)
    assert [each.variant for each in explained.records] == ["frozen_attention", "linear_mlp", "both"]
    shape = result_of(ParameterDistributionResult, out, "parameter_distribution")
    assert shape == parameter_distribution(model, BaseParameters(base))
    statistics = result_of(AttentionStatistics, out, "attention_tracker")
    wanted = attention_statistics(model, batches, base=base)
    for name in wanted.names:
        assert torch.equal(statistics.statistic(name).nan_to_num(-1.0), wanted.statistic(name).nan_to_num(-1.0))
    assert float(statistics.drift.max()) > 0
    for number, prompt in enumerate(PROMPTS, 1):
        batch = tokenizer(prompt, return_tensors="pt")
        maps = result_of(AttentionMaps, out, "attention_tracker", f"maps-prompt-{number}")
        for found, pattern in zip(maps.patterns, attention_maps(model, batch).patterns, strict=True):
            assert torch.equal(found, pattern)
        before = result_of(AttentionMaps, out, "attention_tracker", f"base_maps-prompt-{number}")
        for found, pattern in zip(
            before.patterns, attention_maps(model_of(trained / "base"), batch).patterns, strict=True
        ):
            assert torch.equal(found, pattern)
    written = result_of(Continuations, out, "continuations")
    assert written == continue_prompts(model, tokenizer, PROMPTS, base=base, max_new_tokens=4)
    assert written.present != written.base

    for name in NAMES:
        row = row_of(out, name)
        assert (row["analysis"], row["step"], row["epoch"], row["trigger"]) == (name, 6, 1, "checkpoint")
        assert summary_of(out)["metrics"][name] == row["metrics"]
    assert row_of(out, "taylor_diff")["metrics"]["change"] == expansion.change
    assert row_of(out, "explain_change")["metrics"]["loss_share/both"] == explained.of("both").loss_share
    assert row_of(out, "attention_tracker")["metrics"]["drift"] == statistics.mean("drift")
    snapshot = trained / "run/version_0/goldy/golden_snapshot/base.safetensors"
    assert f"base: the run's golden snapshot, {snapshot}\n" in shown
    assert "left out" not in shown
    assert all(
        text in shown for text in ("What the checkpoint changed", "What survives of the change", expansion.regime)
    )


def test_figures_and_page_show_them(analyzed):
    out, _ = analyzed
    figures = sorted(path.name for path in (out / "figures").iterdir())
    assert figures == [
        "activation_differences-layers.png",
        "activation_differences-positions.png",
        "attention_tracker-differences.png",
        "attention_tracker-heads.png",
        "attention_tracker-patterns.png",
        "attention_tracker-scales.png",
        "attention_tracker-singular_values.png",
        "change_attribution-heads.png",
        "change_attribution-neurons.png",
        "change_attribution-places.png",
        "explain_change-survival.png",
        "parameter_distribution-blocks.png",
        "taylor_diff-prediction.png",
        "taylor_diff-shares.png",
    ]
    assert all((out / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    page = (out / "report.html").read_text()
    titles = ("Taylor expansion around the base", "What the change needed", "Shape of the change", "Attention heads")
    assert all(f"<h2>{title}" in page for title in (*titles, "What it writes"))
    assert "&lt;b&gt;France" in page
    assert "<b>France" not in page
    assert not list(out.rglob("*.partial"))


def test_without_a_prompt_the_probe_is_shown_and_nothing_written(trained, here, capsys):
    out = analyze(trained, "--n-samples", "3")
    assert summary_of(out)["left_out"] == {"continuations": "no prompt was given (--prompt or --prompts)"}
    told = capsys.readouterr().out
    assert "left out: continuations, because no prompt was given" in told
    # The headlines with interval and null, and the words.
    change = r"^change_attribution: the loss changed by \S+ \[\S+, \S+\]: .* \[\S+ %, \S+ %\] of it"
    assert re.search(change, told, re.MULTILINE)
    assert re.search(r"^activation_differences: after block \d the .* \(another text moves it by", told, re.MULTILINE)
    row = row_of(out, "attention_tracker")
    (prompt,) = row["result"]["prompts"]
    assert prompt["name"] == "probe"
    assert row["result"]["n_samples"] == 3
    data = AtlasDataModule(**DATA)
    (batch,) = data.probe_dataloader()
    cut = {key: value[:3] for key, value in batch.items()}
    expected = taylor_diff(
        model_of(checkpoint_of(trained).with_suffix("")), ParameterVector.of(model_of(trained / "base")), [cut]
    )
    assert result_of(TaylorDiffResult, out, "taylor_diff").loss == expected.loss


def test_the_circuit_of_a_task_is_found_beside_the_bases(trained, here, only, capsys):
    only("circuit_tracker", "parameter_distribution")
    out = analyze(trained, "--circuits", "atlas", "--circuit-pairs", "4")
    data, model = AtlasDataModule(**DATA), model_of(checkpoint_of(trained).with_suffix(""))
    pairs, others = split_of_task("atlas", 4, tokenizer=data.tokenizer)
    base = TrackingOptions().find(model_of(trained / "base"), pairs)
    expected = track_circuit(model, pairs, held_out=others, base=base)
    assert row_of(out, "circuit_tracker")["result"]["curve"]["n_shared"] == 0
    assert result_of(TrackedCircuit, out, "circuit_tracker").metrics() == expected.metrics()
    assert row_of(out, "circuit_tracker")["metrics"]["overlap"] < 1
    assert (out / "goldy/circuit_tracker/circuit.graphml").read_text() == expected.circuit.to_graphml()
    assert "<h2>The circuit that carries the behaviour" in (out / "report.html").read_text()
    assert "1 % of the edges keep of the behaviour" in capsys.readouterr().out
    # A finetune of another seed, the base moved at random, is the noise of the overlap.
    other = model_of(trained / "base")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    other.save_pretrained(trained / "other")
    options = ("--circuits", "atlas", "--circuit-pairs", "4", "--circuit-noise", str(trained / "other"))
    options += ("--circuit-beside", "induction")
    row = row_of(analyze(trained, *options, output="noise"), "circuit_tracker")
    seed = TrackingOptions().find(other, pairs)
    noise = circuit_overlap(base, expected.circuit, seed=seed).noise
    assert row["metrics"]["overlap_noise"] == noise < 1
    beside = pairs_of_tasks(["induction"], 4, tokenizer=data.tokenizer, vocabulary=model.config.vocab_size)
    curve = track_circuit(model, pairs, held_out=others, others=beside).curve
    assert row["metrics"]["faithfulness_other_task"] == float(curve.others[-1, 0])
    assert f"{noise:.2f} between two seeds" in row["headline"]
    # Nothing is made, and nothing said to be left out, where none was asked for.
    assert not (analyze(trained, output="none") / "goldy/circuit_tracker").exists()
    assert "left out: circuit_tracker" not in capsys.readouterr().out


def test_traces_in_the_activations_are_those_of_the_function_in_words(trained, here, only):
    only("activation_differences")
    out = analyze(trained)
    data, model = AtlasDataModule(**DATA), model_of(checkpoint_of(trained).with_suffix(""))
    other, tokenizer = list(data.collateral_dataloader()), data.tokenizer
    held = [{name: value[:64] for name, value in batch.items()} for batch in other]
    expected = activation_differences(model, ParameterVector.of(model_of(trained / "base")), held, n_samples=64)
    row = row_of(out, "activation_differences")
    assert row["metrics"]["stream_change"] == pytest.approx(expected.metrics()["stream_change"], rel=1e-5)
    assert row["result"]["n_samples"] == 64
    told = row["result"]["spelled"][0]
    assert told["words"] == [tokenizer.decode([token]) for token in expected.spelled[0]["promoted"]]


def test_drawn_continuations_follow_the_seed(trained, here, only):
    only("continuations")
    words = ["--prompt", "Chad", "--max-new-tokens", "6", "--temperature", "1.5", "--seed"]
    out = analyze(trained, *words, "3")
    data = AtlasDataModule(**DATA)
    expected = continue_prompts(
        model_of(checkpoint_of(trained).with_suffix("")),
        data.tokenizer,
        ["Chad"],
        base=ParameterVector.of(model_of(trained / "base")),
        max_new_tokens=6,
        do_sample=True,
        temperature=1.5,
        seed=3,
    )
    found = result_of(Continuations, out, "continuations")
    assert found == expected
    other = result_of(Continuations, analyze(trained, *words, "4", output="other"), "continuations")
    assert other.present != found.present


def change_to(checkpoint, base):
    """||theta(checkpoint) - theta(base)||, from pretrained folders."""
    first, second = (dict(model_of(each).named_parameters()) for each in (checkpoint, base))
    return sum(float((first[name] - second[name]).detach().double().square().sum()) for name in first) ** 0.5


@pytest.mark.parametrize(
    ("base", "reference"),
    [
        ("base", "base"),
        ("run/version_0", "base"),
        ("run/version_0/goldy/golden_snapshot", "base"),
        ("run/version_0/goldy/golden_snapshot/base.safetensors", "base"),
        ("run/version_0/checkpoints/step=3.ckpt", "run/version_0/checkpoints/step=3"),
        ("run/version_0/checkpoints/step=3", "run/version_0/checkpoints/step=3"),
    ],
)
def test_a_base_may_be_any_saved_form(trained, base, reference):
    module, saved = GoldyModule(str(trained / "base")), read_saved(checkpoint_of(trained))
    found = find_base(trained / base, saved, module, module.model, CausalLMObjective())
    assert found.source.startswith(str(trained / base))
    wanted = ParameterVector.of(model_of(trained / reference))
    assert all(torch.equal(value, wanted[name]) for name, value in found.values.vector(module.model).items())


def test_a_base_may_be_given_for_a_checkpoint_alone(trained, here, only):
    only("taylor_diff")
    shutil.copy(checkpoint_of(trained), here / "alone.ckpt")
    base = checkpoint_of(trained, 3)
    out = analyze(trained, "--base", base, checkpoint="alone.ckpt")
    expected = change_to(checkpoint_of(trained).with_suffix(""), base.with_suffix(""))
    assert row_of(out, "taylor_diff")["metrics"]["step_norm"] == pytest.approx(expected, rel=1e-6)
    assert summary_of(out)["base"] == str(base)


def test_a_folder_of_weights_finds_the_snapshot_of_its_run(trained, analyzed, here, only):
    only("taylor_diff")
    one = analyze(trained, checkpoint=checkpoint_of(trained).with_suffix(""), output="one")
    two = analyzed[0]
    assert summary_of(one)["base"] == summary_of(two)["base"]
    assert row_of(one, "taylor_diff")["metrics"] == row_of(two, "taylor_diff")["metrics"]
    assert row_of(one, "taylor_diff")["step"] == 6


def changed(trained, path, **fields):
    """A copy of the checkpoint in which the snapshot's state has other fields, or no callback any state."""
    saved = torch.load(checkpoint_of(trained), weights_only=True)
    if fields:
        saved["callbacks"]["GoldenSnapshot[golden_snapshot]"] |= fields
    else:
        del saved["callbacks"]
    torch.save(saved, path)
    return path


def test_without_a_snapshot_the_pretrained_model_is_the_base(trained, analyzed, here, capsys, only):
    only("taylor_diff")
    out = analyze(trained, checkpoint=changed(trained, here / "alone.ckpt"))
    expected = f"the pretrained model {trained / 'base'} as the configuration builds it"
    assert expected in summary_of(out)["base"]
    assert f"base: {expected}, for no golden snapshot lies beside the checkpoint\n" in capsys.readouterr().out
    assert row_of(out, "taylor_diff")["metrics"] == row_of(analyzed[0], "taylor_diff")["metrics"]


def test_a_snapshot_that_is_gone_is_recognised_by_its_hash_or_missed(trained, here, capsys):
    lost = changed(trained, here / "lost.ckpt", folder="gone")
    out = analyze(trained, checkpoint=lost, output="same")
    assert "which has the snapshot's hash" in summary_of(out)["base"]
    other = analyze(
        trained, f"--model.model={checkpoint_of(trained, 3).with_suffix('')}", checkpoint=lost, output="other"
    )
    reasons = summary_of(other)["left_out"]
    assert set(reasons) == set(NAMES) - {"attention_tracker"}
    assert all("has another hash; give --base" in reasons[name] for name in reasons if name != "continuations")
    assert not (other / "goldy/taylor_diff").exists()
    assert "left out: taylor_diff, because there is no base" in capsys.readouterr().out


def test_without_a_base_attention_and_continuations_stand_alone(trained, here):
    config = json.dumps(complete_config(TINY, AtlasDataModule(**DATA).tokenizer))
    out = analyze(
        trained,
        f"--model.model={config}",
        *("--prompt", "Chad", "--max-new-tokens", "2"),
        checkpoint=changed(trained, here / "alone.ckpt"),
    )
    assert "the configuration names no pretrained model; give --base" in summary_of(out)["base"]
    assert set(summary_of(out)["metrics"]) == {"attention_tracker", "continuations"}
    assert result_of(AttentionStatistics, out, "attention_tracker").drift is None
    written = result_of(Continuations, out, "continuations")
    assert (written.base, written.agreement, written.kl_per_token) == (None, None, None)
    assert not list((out / "goldy/attention_tracker").glob("base_maps*"))
    page = (out / "report.html").read_text()
    assert "<h2>What it writes" in page
    assert re.search(r'<th scope="col"[^>]*>checkpoint</th>', page)
    assert '<th scope="col">base</th>' not in page


def test_what_begins_at_random_is_no_base(trained, here):
    saved = read_saved(changed(trained, here / "alone.ckpt"))

    def source(module, objective):
        found = find_base(None, saved, module, getattr(module, "model", module), objective)
        assert found.values is None
        return found.source

    adapted = GoldyModule(str(trained / "base"), lora={"rank": 2})
    assert "new adapters begin at random" in source(adapted, CausalLMObjective())
    # In merged weights they add nothing, so that the pretrained model is the base.
    merged = find_base(None, saved, adapted, adapted.model, CausalLMObjective(), "merged")
    assert merged.values is not None
    assert "the pretrained model" in merged.source
    assert weight_change(adapted.model, GoldyModule(str(trained / "base"), lora={"rank": 2}).model).delta_norm == 0
    given = find_base(trained / "base", saved, adapted, adapted.model, CausalLMObjective(), "merged")
    assert given.values is not None
    assert given.source == str(trained / "base")
    # With the new adapters, so that it can be run.
    assert given.values.space.names == merged.values.space.names
    assert base_values(adapted.model, given.values).space.names == merged.values.space.names
    other = GoldyModule(str(trained / "base"))
    with torch.no_grad():
        other.model.transformer.h[0].attn.c_attn.weight.mul_(2)
    write_pretrained(other.model, here / "other")
    elsewhere = find_base(here / "other", saved, adapted, adapted.model, CausalLMObjective(), "merged")
    assert elsewhere.values is not None
    assert elsewhere.values.laid_on == {}
    expected = weight_change(GoldyModule(str(trained / "base")).model, other.model).delta_norm
    assert weight_change(adapted.model, elsewhere.values).delta_norm == pytest.approx(expected)
    classifier = GoldyModule(str(trained / "base"), objective="classifier")
    assert "a new head begins at random" in source(classifier, ClassifierObjective())

    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = nn.Linear(2, 2)

    assert "nothing tells whether Own begins with pretrained weights" in source(Own(), ClassifierObjective())


def test_the_run_is_left_alone(trained, here):
    before = sorted(path.relative_to(trained) for path in trained.rglob("*"))
    assert main(["analyze", str(checkpoint_of(trained)), "--config", str(trained / "run.yaml")]) == 0
    assert sorted(path.relative_to(trained) for path in trained.rglob("*")) == before
    assert [path.name for path in here.iterdir()] == ["runs"]
    assert (here / "runs/analyze/version_0/summary.json").is_file()


def test_what_one_analysis_cannot_do_leaves_the_others(trained, here, capsys, monkeypatch):
    def refuse(*args, **options):
        raise ValueError("no derivative")

    monkeypatch.setitem(PARTS, "taylor_diff", refuse)
    tokenizer = AtlasDataModule(**DATA).tokenizer
    model = build_model(
        complete_config({"model_type": "bloom", "hidden_size": 8, "n_layer": 1, "n_head": 2}, tokenizer)
    )
    write_pretrained(model, here / "bloom", tokenizer=tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    write_pretrained(model, here / "moved", tokenizer=tokenizer)
    words = ["moved", "--config", str(trained / "run.yaml"), "--model.model=bloom", "--output", "out"]
    # The family's patterns cannot be read.
    assert main(["analyze", *words, "--prompt", "Chad", "--max-new-tokens", "2"]) == 2
    message = capsys.readouterr().err
    assert "goldy: taylor_diff failed: " in message
    assert "What the others found is in out" in message
    summary = summary_of(here / "out")
    assert set(summary["failed"]) == {"taylor_diff"}
    assert set(summary["left_out"]) == {"attention_tracker", "explain_change"}
    assert "Bloom" in summary["left_out"]["attention_tracker"]
    assert set(summary["metrics"]) == {
        *("change_attribution", "parameter_distribution", "activation_differences", "continuations")
    }
    assert (here / "out/report.html").is_file()


def refuse(capsys, trained, *words, checkpoint=None, output="out"):
    path = checkpoint or checkpoint_of(trained)
    arguments = [str(path), "--config", str(trained / "run.yaml"), "--output", output, *map(str, words)]
    assert main(["analyze", *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("goldy: ")
    assert "Traceback" not in message
    assert not list(Path(output).glob("goldy/*/result.json"))
    return message


def test_what_is_no_checkpoint_or_another_models_is_refused(trained, here, capsys):
    assert "no checkpoint at nowhere.ckpt" in refuse(capsys, trained, checkpoint="nowhere.ckpt")
    torch.save({"state_dict": {"model.x": torch.zeros(1)}}, here / "misfit.ckpt")
    assert "does not fit the configuration's GoldyModule" in refuse(capsys, trained, checkpoint="misfit.ckpt")
    data = AtlasDataModule(**DATA)
    write_pretrained(build_model(complete_config({**TINY, "n_embd": 4}, data.tokenizer)), "other")
    assert "does not fit the configuration's GoldyModule" in refuse(
        capsys, trained, "--model.model=other", "--data.tokenizer=words", "--base", here / "other"
    )
    assert "has shape" in refuse(capsys, trained, "--base", "other")


def test_heads_that_were_closed_are_analysed_closed_by_every_command(trained, here, only):
    only("taylor_diff")
    model = model_of(trained / "base")
    saved = torch.load(checkpoint_of(trained), weights_only=True)
    closing = HeadGates(model)
    closing.disable([(0, 1), (1, 0)])
    for name, heads in (("closed", closing.closing.tolist()), ("open", [[0, 0], [0, 0]])):
        saved["callbacks"]["HeadPlasticity[head_plasticity]"] = {"plasticity": {"closing": heads}}
        torch.save(saved, here / f"{name}.ckpt")
    # One after the other into one module, as `goldy basin` does: the second opens what the first has closed.
    module = SimpleNamespace(on_load_checkpoint=lambda _: None, load_state_dict=lambda _: None, state_dict=dict)
    for name, heads in (("closed", ((0, 1), (1, 0))), ("open", ()), ("closed", ((0, 1), (1, 0)))):
        read_saved(here / f"{name}.ckpt").load_into(module, model)
        assert HeadGates.of(model).closed == heads
    norms = [
        row_of(analyze(trained, checkpoint=here / f"{name}.ckpt", output=name), "taylor_diff")["metrics"]
        for name in ("closed", "open")
    ]
    assert norms[0] != norms[1]


def test_bases_that_are_none_are_refused(trained, here, capsys):
    assert "no base at nowhere" in refuse(capsys, trained, "--base", "nowhere")
    (here / "empty").mkdir()
    assert "neither a vector file, a .ckpt, nor a folder" in refuse(capsys, trained, "--base", "empty")
    # Another run has left its snapshot where that of the checkpoint was.
    run = here / "run/version_0"
    shutil.copytree(trained / "run/version_0/goldy/golden_snapshot", run / "goldy/golden_snapshot")
    (run / "checkpoints").mkdir()
    stranger = changed(
        trained, run / "checkpoints/a.ckpt", base_hash="0" * 32, folder=str(run / "goldy/golden_snapshot")
    )
    assert "is not the snapshot that" in refuse(capsys, trained, checkpoint=stranger)


def test_bad_options_are_refused(trained, here, capsys):
    assert "n_samples=99, but the probe holds only 8" in refuse(capsys, trained, "--n-samples", "99")
    assert "n_samples must be at least 1; got 0" in refuse(capsys, trained, "--n-samples", "0")
    assert "max_new_tokens must be at least 1; got 0" in refuse(capsys, trained, "--max-new-tokens", "0")
    assert "temperature must be positive" in refuse(capsys, trained, "--temperature", "0")
    assert "prompt 2 of 2 is empty" in refuse(capsys, trained, "--prompt", "a", "--prompt", "")
    long = refuse(capsys, trained, "--prompt", "Chad", "--max-new-tokens", "64")
    assert "prompt 0 has 1 tokens; with max_new_tokens=64 that exceeds the model's 64 positions" in long
    assert "no file of prompts at none.txt" in refuse(capsys, trained, "--prompts", "none.txt")
    (here / "blank.txt").write_text("\n \n")
    assert "blank.txt holds no prompt" in refuse(capsys, trained, "--prompts", "blank.txt")
    (here / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    assert "bytes.txt is not UTF-8 text" in refuse(capsys, trained, "--prompts", "bytes.txt")
    (here / "taken/goldy/taylor_diff").mkdir(parents=True)
    (here / "taken/goldy/taylor_diff/results.jsonl").write_text("{}\n")
    assert "holds results already" in refuse(capsys, trained, output="taken")


@pytest.fixture
def unfrozen(trained, here):
    """The run as one that began with its last block frozen: the base in two files; a checkpoint may know only one."""
    run = here / "unfrozen/version_0"
    folder = run / "goldy/golden_snapshot"
    (run / "checkpoints").mkdir(parents=True)
    folder.mkdir(parents=True)
    whole, _ = load_vectors(trained / "run/version_0/goldy/golden_snapshot/base.safetensors")
    late = [name for name in whole if ".h.1." in name]
    parts = {"base.safetensors": [name for name in whole if name not in late]}
    parts["base-added-step=00000003-0.safetensors"] = late
    hashes, model = {}, model_of(trained / "base")
    for file, names in parts.items():
        space = whole.space.subspace(names)
        vector = ParameterVector(space, {name: whole[name] for name in space})
        hashes[file] = fingerprint(vector)
        save_vectors(folder / file, vector, kind="values", model=model, step=3, base_hash=hashes[file])
    # What else lies there is no base.
    save_vectors(folder / "previous-step=00000003.safetensors", 2 * whole, kind="values", model=model, step=3)
    first = hashes.pop("base.safetensors")
    for name, added in (("early", {}), ("late", hashes)):
        changed(trained, run / f"checkpoints/{name}.ckpt", base_hash=first, base_added=added, folder=str(folder))
    return run, whole, late


def test_what_became_trainable_is_read_with_the_base(trained, here, unfrozen, only):
    run, whole, late = unfrozen
    module = GoldyModule(str(trained / "base"))
    # The model as it is built may freeze what the run came to train.
    for parameter in module.model.transformer.h[1].parameters():
        parameter.requires_grad_(False)

    def found(checkpoint, given=None):
        saved = read_saved(run / f"checkpoints/{checkpoint}.ckpt")
        return find_base(given, saved, module, module.model, CausalLMObjective()).values.vector(module.model)

    folder = run / "goldy/golden_snapshot"
    for base in (
        found("late"),
        *(found("early", place) for place in (run, folder, folder / "base.safetensors")),
        base_of(folder, module.model, whole.space).vector(module.model),
    ):
        assert set(base) == set(whole)
        assert all(torch.equal(base[name], value) for name, value in whole.items())
    # By the first checkpoint the last block had not been trained.
    assert set(found("early")) == set(whole) - set(late)
    only("parameter_distribution")
    early = analyze(trained, checkpoint=run / "checkpoints/early.ckpt", output="early")
    tensors = row_of(early, "parameter_distribution")["result"]["tensors"]
    assert {row["name"] for row in tensors} == set(whole) - set(late)
    added = folder / "base-added-step=00000003-0.safetensors"
    shutil.copy(folder / "previous-step=00000003.safetensors", folder / "base-added-step=00000004-0.safetensors")
    with pytest.raises(StoreError, match="hold different values of"):
        found("early", folder)
    added.unlink()
    with pytest.raises(StoreError, match=r"added-step=00000003-0\.safetensors, a part of .* is gone; give --base"):
        found("late")


def test_heads_are_closed_in_the_part_that_they_were_closed_in(trained, here):
    class Two(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.draft = model_of(trained / "base"), model_of(trained / "base")

    module = Two()
    state = {
        "HeadPlasticity[a]": {"plasticity": {"closing": [[0, 1], [0, 0]]}, "model_attribute": "draft"},
        "HeadPlasticity[b]": {"plasticity": {"closing": [[0, 0], [1, 0]]}, "model_attribute": None},
    }
    saved = {"state_dict": module.state_dict(), "callbacks": state, "global_step": 1}
    torch.save(saved, here / "two.ckpt")
    for _ in range(2):
        read_saved(here / "two.ckpt").load_into(module, module.model)
        assert HeadGates.of(module.draft).closed == ((0, 1),)
        assert HeadGates.of(module.model).closed == ((1, 0),)
