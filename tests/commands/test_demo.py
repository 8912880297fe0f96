"""``goldy demo`` in its reduced form, and its parts."""

from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_goldy import callbacks
from lightning_goldy.callbacks import AnalysisCallback, FinetuneComparison, RunReport, VariantLosses
from lightning_goldy.cli import main
from lightning_goldy.commands import demo
from lightning_goldy.commands.demo import AtlasKnowledge, DemoSettings, analysis_callbacks, share_known
from lightning_goldy.data import country_facts, one_hop_questions
from lightning_goldy.report.run import read_run
from lightning_goldy.training.module import GoldyModule


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightning_goldy"


def test_the_demo_uses_every_callback_that_only_watches():
    public = [getattr(callbacks, name) for name in callbacks.__all__]
    kinds = {each for each in public if inspect.isclass(each) and issubclass(each, AnalysisCallback)}
    # These two compare trainings of a special module or with a special optimizer, which the demo's is not.
    kinds -= {VariantLosses, FinetuneComparison}
    expected = {kind for kind in kinds if not inspect.isabstract(kind) and not kind.changes_training} | {RunReport}
    assert {type(callback) for callback in analysis_callbacks(10)} == expected


@pytest.mark.slow
def test_loggers_get_at_most_forty_scalars_of_all_callbacks_that_only_look(tmp_path):
    # What the model knows does not matter here, so it has learned nothing.
    settings = replace(DemoSettings.fast(), finetuning_epochs=1, every_n_steps=2)
    module = GoldyModule(settings.model_config, tokenizer=settings.pretraining_data().tokenizer)
    trainer, _ = demo._finetune(settings, module.save_pretrained(tmp_path / "base"), tmp_path)
    run = read_run(trainer.log_dir)
    events = EventAccumulator(trainer.log_dir, size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("goldy/")]
    assert {tag.split("/")[1] for tag in tags} == {analysis.name for analysis in run.analyses}
    assert len(run.analyses) == 11
    assert 11 <= len(tags) <= 40
    # What each cost is in its rows.
    assert not [tag for tag in tags if "/cost/" in tag]
    assert all(row["cost"]["seconds"] > 0 for analysis in run.analyses for row in analysis.rows)


@pytest.mark.slow
def test_the_reduced_demo_from_the_command_line(cache, tmp_path, capsys):
    directory = tmp_path / "demo"
    assert main(["demo", "--fast", "--directory", str(directory)]) == 0
    lines = capsys.readouterr().out.rstrip().splitlines()
    report = directory / "finetune" / "version_0" / "report.html"
    assert lines[-1] == f"report: {report}   TensorBoard: tensorboard --logdir {directory}"
    assert "golden" in report.read_text()
    assert [path.name for path in cache.iterdir()] == [f"demo-{DemoSettings.fast().pretraining_hash}"]

    tokenizer = AutoTokenizer.from_pretrained(directory / "base")
    settings = DemoSettings.fast()
    facts = settings.pretraining_data().facts
    questions = [(each.prompt, each.answer) for each in one_hop_questions(facts)]
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    assert share_known(base, tokenizer, questions) >= settings.target >= 0.95

    edited = [(each.prompt, each.answer) for each in one_hop_questions(settings.finetuning_data().edited_facts)]
    finetuned = AutoModelForCausalLM.from_pretrained(next(report.parent.glob("checkpoints/step=*/")))
    assert share_known(base, tokenizer, edited) == 0.0
    assert share_known(finetuned, tokenizer, edited) >= 0.6

    events = EventAccumulator(str(report.parent), size_guidance={"scalars": 0}).Reload()
    known = [event.value for event in events.Scalars("known/edited")]
    assert len(known) == 2
    assert known[1] == pytest.approx(share_known(finetuned, tokenizer, edited))
    assert len([tag for tag in events.Tags()["scalars"] if tag.startswith("goldy/")]) <= 40

    _check_second_run(directory, report, finetuned)


def _check_second_run(directory, report, finetuned):
    """From the cache, the demo comes to the same model."""
    again = demo.run_demo(directory, fast=True)
    assert again == directory / "finetune" / "version_1" / "report.html"
    assert report.is_file()
    assert len(list((directory / "pretrain").iterdir())) == 1
    second = AutoModelForCausalLM.from_pretrained(next(again.parent.glob("checkpoints/step=*/")))
    for name, value in finetuned.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_pretraining_that_fails_says_how_far_it_came(cache, tmp_path, monkeypatch, capsys):
    hopeless = replace(DemoSettings.fast(), max_epochs=8, pretraining_rate=1e-6)
    monkeypatch.setattr(DemoSettings, "fast", classmethod(lambda cls, seed=0: hopeless))
    assert main(["demo", "--fast", "--directory", str(tmp_path / "demo")]) == 2
    assert "knows 0.0 % of the one-hop facts, not 98 %" in capsys.readouterr().err
    assert not cache.exists() or not list(cache.iterdir()), "a model that knows nothing was cached"


def test_the_cache_is_keyed_by_what_decides_the_base():
    settings = DemoSettings()
    same = replace(settings, edits=3, finetuning_rate=1.0, finetuning_epochs=1, rehearsal=0.0, every_n_steps=1)
    assert same.pretraining_hash == settings.pretraining_hash
    for change in ({"seed": 1}, {"n_layer": 3}, {"countries": 9}, {"target": 0.96}):
        assert replace(settings, **change).pretraining_hash != settings.pretraining_hash, change


def test_another_version_has_another_cache(monkeypatch):
    before = DemoSettings().pretraining_hash
    monkeypatch.setattr("lightning_goldy.__version__", "9.9.9")
    assert DemoSettings().pretraining_hash != before


def test_the_cache_directory_honours_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_directory() == tmp_path / "lightning_goldy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.cache_directory() == tmp_path / "home" / ".cache" / "lightning_goldy"


def test_the_whole_demo_is_about_the_whole_atlas():
    assert len(DemoSettings().pretraining_data().facts) == len(country_facts())
    reduced = DemoSettings.fast()
    assert len(reduced.pretraining_data().facts) == 4 * reduced.countries
    assert len(reduced.finetuning_data().edited_facts) == reduced.edits


def test_knowledge_stops_on_a_group_that_exists():
    with pytest.raises(ValueError, match="'two_hop'; the groups are one_hop"):
        AtlasKnowledge({"one_hop": []}, None, stop=("two_hop", 0.5))


@pytest.mark.slow
def test_the_whole_demo(cache, tmp_path, capsys):
    assert main(["demo", "--directory", str(tmp_path / "demo")]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("report: ")
