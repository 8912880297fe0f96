from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis import PromptPairs, TrackingOptions, track_circuit
from lightning_goldy.callbacks import CircuitTracker, GoldenSnapshot
from lightning_goldy.data import byte_tokenizer, induction_pairs, split_of_task
from lightning_goldy.data.prompt_pairs import pairs_of_tasks
from lightning_goldy.report import draw_figures
from tests.callbacks.training import Finetune, TokenData, fit


def test_it_logs_and_writes_what_the_function_finds(tmp_path) -> None:
    tracker = CircuitTracker("induction", n_pairs=3, sizes=[0.05, 0.3], at=["start", "end"])
    _, module, _ = fit(tmp_path, [GoldenSnapshot(), tracker], max_epochs=1)
    first, last = [json.loads(line) for line in (tracker.folder / "results.jsonl").read_text().splitlines()]
    pairs, others = split_of_task("induction", 3, vocabulary=module.model.config.vocab_size)
    expected = track_circuit(module.model, pairs, TrackingOptions(sizes=(0.05, 0.3)), held_out=others)
    assert "on other prompts than chose the edges" in last["headline"]
    assert last["result"]["curve"]["n_shared"] == 0
    assert {"faithfulness_5_percent", "faithfulness_30_percent", "completeness", "overlap"} <= set(last["metrics"])
    for name, value in expected.metrics().items():
        wanted = None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)
        assert last["metrics"][name] == wanted, name
    # At the start the model is its base.
    assert first["metrics"]["overlap"] == 1.0
    assert set(draw_figures(last, [first, last])) == {"graph", "faithfulness", "emergence", "run"}
    told = json.loads((tracker.folder / last["files"]["json"]).read_text())
    assert len(told["edges"]) == expected.circuit.n_edges
    root = ElementTree.fromstring((tracker.folder / last["files"]["graphml"]).read_text())
    space = "{http://graphml.graphdrawing.org/xmlns}"
    nodes = {node.get("id") for node in root.iter(f"{space}node")}
    edges = [(edge.get("source"), edge.get("target")) for edge in root.iter(f"{space}edge")]
    assert len(edges) == sum(len(edge["targets"]) for edge in told["edges"])
    assert {end for edge in edges for end in edge} <= nodes


def test_what_cannot_work_is_refused_before_the_first_step(tmp_path) -> None:
    with pytest.raises(ValueError, match="unknown task 'fact'"):
        CircuitTracker("fact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="task 'atlas' is made of words and needs a tokenizer"):
        fit(tmp_path, [CircuitTracker("atlas")])
    far = PromptPairs(((3, 10_000),), ((3, 4),), ((5,),), ((6,),), names=("too far",))
    with pytest.raises(ValueError, match="prompt 'too far' has tokens beyond the model's"):
        fit(tmp_path / "b", [CircuitTracker(pairs=far)])
    with pytest.raises(ValueError, match="unknown method 'eig'"):
        CircuitTracker("induction", method="eig")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no slope at the clean run"):
        CircuitTracker("induction", metric="kl", method="eap")
    for sizes in (0.1, "0.1"):
        with pytest.raises(ValueError, match="sizes is a list of shares of all edges; got"):
            CircuitTracker("induction", sizes=sizes)  # type: ignore[arg-type]


def test_prompts_that_measure_may_be_given_or_be_those_that_choose(tmp_path) -> None:
    pairs, others = split_of_task("induction", 3, vocabulary=20)
    for place, (options, n_shared) in enumerate(
        (({"pairs": pairs, "held_out": others}, 0), ({"pairs": pairs}, 3), ({"n_pairs": 2, "held_out": False}, 2))
    ):
        tracker = CircuitTracker("induction", **options)  # type: ignore[arg-type]
        fit(tmp_path / str(place), [tracker], max_epochs=1)
        (row,) = map(json.loads, (tracker.folder / "results.jsonl").read_text().splitlines())
        assert row["result"]["curve"]["n_shared"] == n_shared
    for wrong in ({"pairs": ["a"]}, {"held_out": [("a", "b")]}, {"seed": 1.5}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} (are PromptPairs|is a whole number).*; got"):
            CircuitTracker("induction", **wrong)  # type: ignore[arg-type]
    far = PromptPairs(((3, 10_000),), ((3, 4),), ((5,),), ((6,),), names=("too far",))
    with pytest.raises(ValueError, match="prompt 'too far' has tokens beyond the model's"):
        fit(tmp_path / "far", [CircuitTracker(pairs=pairs, held_out=far)])


def test_circuits_of_other_tasks_are_found_on_their_prompts(tmp_path) -> None:
    pairs = induction_pairs(20, 3, seed=7)
    tracker = CircuitTracker(pairs=pairs, other_tasks=["induction"], n_pairs=3, sizes=[0.3], n_random=1, at=["end"])
    _, module, _ = fit(tmp_path, [tracker], max_epochs=1)
    (row,) = [json.loads(line) for line in (tracker.folder / "results.jsonl").read_text().splitlines()]
    others = pairs_of_tasks(["induction"], 3, vocabulary=module.model.config.vocab_size)
    expected = track_circuit(module.model, pairs, TrackingOptions(sizes=(0.3,), n_random=1), others=others)
    assert row["result"]["curve"]["others"]["induction"] == pytest.approx(
        expected.curve.others[:, 0].tolist(), abs=1e-4
    )
    assert row["metrics"]["faithfulness_other_task"] == pytest.approx(float(expected.curve.others.max()), abs=1e-4)
    for tasks, told in (
        ("induction", "other_tasks is a list of tasks; got 'induction'"),
        (["fact"], "unknown other_tasks 'fact'"),
        (["induction"], "other_tasks are other tasks than 'induction', each once"),
        (["atlas", "atlas"], "other_tasks are other tasks than 'induction', each once"),
    ):
        with pytest.raises(ValueError, match=told):
            CircuitTracker("induction", other_tasks=tasks)  # type: ignore[arg-type]


def test_means_over_prompts_have_prompts_of_one_length(tmp_path) -> None:
    tracker = CircuitTracker("indirect_object", n_pairs=3, ablation="mean", method="eap", at=["start"])
    data = TokenData()
    data.tokenizer = byte_tokenizer()
    fit(tmp_path, [tracker], module=Wide, data=data, max_epochs=1)
    (row,) = map(json.loads, (tracker.folder / "results.jsonl").read_text().splitlines())
    assert row["result"]["curve"]["ablation"] == "mean"
    assert row["result"]["curve"]["n_shared"] == 0


class Wide(Finetune):
    """With room for words in bytes."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 300, "n_positions": 128}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes))
