from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_goldy.analysis import coupling_drift, coupling_statistics, finetune_ripple, knowledge_coupling
from lightning_goldy.callbacks import ExactResume, GoldenSnapshot, KnowledgeCoupling
from lightning_goldy.callbacks.knowledge_coupling import WatchedPieces, drawn, find_pieces
from lightning_goldy.core import load_vectors
from lightning_goldy.core.store import StoreError
from lightning_goldy.core.vector import substituted
from lightning_goldy.data import KnowledgeDataModule, write_pieces
from lightning_goldy.data.readers import load_pieces
from lightning_goldy.report.figures import draw_figures
from lightning_goldy.report.topics.coupling import drift_lines
from tests.callbacks.knowledge import COUNTRIES, EDITED, PIECES, TOKENIZER, WORDS, AtlasFinetune, WordData, atlas
from tests.callbacks.training import Finetune, TokenData, differences, fit

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:.*exists and is not empty")


def rows_of(callback: KnowledgeCoupling) -> list[dict]:
    rows = [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("cost")
    return rows


def classes_of(callback: KnowledgeCoupling) -> dict[str, str]:
    return {piece.id: name for piece, name in zip(callback._watched.pieces, callback._watched.classes, strict=True)}


class WordFinetune(Finetune):
    """Of the small model, with a tokenizer of its own."""

    tokenizer = WORDS


@pytest.mark.parametrize(("snapshot", "tokens"), [(False, "answer"), (True, "answer_with_end")])
def test_it_logs_what_the_functions_find(tmp_path, snapshot, tokens) -> None:
    options = {"every_n_steps": 4, "moderate": 0.0, "high": 0.2} | ({} if tokens == "answer" else {"tokens": tokens})
    knowledge = KnowledgeCoupling(PIECES, edits=[PIECES[1].id], **options)
    callbacks = [GoldenSnapshot(every_n_epochs=1), knowledge] if snapshot else [knowledge]
    _, module, _ = fit(tmp_path, callbacks, data=WordData(), max_epochs=1)
    assert (knowledge.folder / "base.safetensors").is_file() is not snapshot

    base = load_vectors((callbacks[0] if snapshot else knowledge).folder / "base.safetensors", module.model)[0]
    classes = [("untouched", "edited")[place == 1] for place in range(len(PIECES))]
    with substituted(module.model, base):
        before = knowledge_coupling(module.model, PIECES, tokenizer=WORDS, tokens=tokens)
    now = knowledge_coupling(module.model, PIECES, tokenizer=WORDS, tokens=tokens)
    drift = coupling_drift(before, now, classes)
    ripple = finetune_ripple(module.model, base, PIECES, tokenizer=WORDS, classes=classes, measure=tokens)
    statistics = coupling_statistics(now, moderate=0.0, high=0.2)

    rows = rows_of(knowledge)
    assert [row["step"] for row in rows] == [4, 8]
    metrics, result = rows[-1]["metrics"], rows[-1]["result"]
    assert result["tokens"] == tokens
    expected = {
        "mean_absolute_difference": drift.mean_absolute_difference,
        "correlation": drift.correlation,
        "mean_absolute_difference/untouched_edited": drift.by_class["untouched_edited"],
        **ripple.metrics(),
        **statistics.metrics(),
    }
    for name, value in expected.items():
        assert metrics[name] == (None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)), name
    assert result["base_statistics"] == coupling_statistics(before, moderate=0.0, high=0.2).metrics()
    saved, header = load_vectors(knowledge.folder / rows[-1]["files"]["coupling"])
    assert header.kind == "result"
    assert torch.equal(saved["cosines"], now.cosines)
    assert torch.equal(saved["base_cosines"], before.cosines)
    assert torch.equal(saved["predicted"], ripple.predicted)
    assert torch.equal(saved["rank_after"], ripple.rank_after)

    lines = (knowledge.folder / "results.jsonl").read_text().splitlines()
    first, last = ({name: json.loads(line)["cost"][name] for name in ("forwards", "backwards")} for line in lines)
    # The first row tells of the base's too, which was taken before the training.
    assert vars(now.cost) == {"forwards": 6, "backwards": 6}
    assert last["backwards"] == now.cost.backwards
    assert {name: first[name] - last[name] for name in first} == vars(before.cost)
    assert rows[-1]["headline"].startswith("knowledge coupling: cosines moved by ")
    assert "untouched" in rows[-1]["headline"]

    order = sorted((place for place in range(5) if place != 1), key=lambda place: -abs(float(ripple.measured[place])))
    assert [each["id"] for each in result["moved"]] == [PIECES[place].id for place in order]
    assert result["moved"][0]["after"] == pytest.approx(float(ripple.after[order[0]]))
    drifted = drift_lines(rows)
    assert drifted.steps == (4, 8)
    assert drifted.measured["edited"][-1] == metrics["measured_change/edited"]
    drawn = draw_figures(rows[-1], rows[:-1])
    assert set(drawn) == {"prediction", "drift", "difference", "heat_map", "distribution"}


@pytest.mark.parametrize("snapshot", [False, True])
def test_resumed_equals_uninterrupted(tmp_path, snapshot) -> None:
    def callbacks(folder):
        knowledge = KnowledgeCoupling(every_n_steps=2)
        saver = ModelCheckpoint(
            folder, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
        )
        base = [GoldenSnapshot(every_n_epochs=1)] if snapshot else []
        return knowledge, [ExactResume(), *base, knowledge, saver]

    options = {"module": AtlasFinetune, "max_epochs": 2, "enable_checkpointing": True}
    whole, watchers = callbacks(tmp_path / "a")
    trainer, _, expected = fit(tmp_path / "whole", watchers, data=atlas(), **options)
    epoch = trainer.global_step // 2
    _, watchers = callbacks(tmp_path / "checkpoints")
    fit(tmp_path / "run", watchers, data=atlas(), max_steps=epoch + 2, **options)
    again, watchers = callbacks(tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / f"step={epoch}.ckpt"
    _, _, found = fit(tmp_path / "again", watchers, data=atlas(), ckpt_path=checkpoint, **options)
    found.pop("losses"), expected.pop("losses")
    assert differences(expected, found) == []
    assert rows_of(again) == rows_of(whole)
    for row in rows_of(again):
        name = row["files"]["coupling"]
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_a_resume_without_the_snapshot_is_refused(tmp_path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_on_train_epoch_end=True)
    callbacks = [GoldenSnapshot(), KnowledgeCoupling(PIECES), saver]
    fit(tmp_path / "run", callbacks, data=WordData(), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(StoreError, match="took its base from a GoldenSnapshot; attach it again"):
        fit(tmp_path / "again", [KnowledgeCoupling(PIECES)], data=WordData(), ckpt_path=tmp_path / "step=8.ckpt")


def test_the_atlas_tells_what_is_edited_and_what_is_rehearsed(tmp_path) -> None:
    knowledge, data = KnowledgeCoupling(), atlas()
    fit(tmp_path, [knowledge], module=AtlasFinetune, data=data, max_epochs=1)
    found = classes_of(knowledge)
    rehearsed = {f"{each.fact.subject}/{each.fact.relation}" for each in data.training_questions()} - set(EDITED)
    assert len(found) == 4 * len(COUNTRIES)
    assert {name for name, kind in found.items() if kind == "edited"} == set(EDITED)
    assert {name for name, kind in found.items() if kind == "rehearsed"} == rehearsed != set()
    answers = {piece.id: piece.answer for piece in knowledge._watched.pieces}
    assert answers["France/capital"] == "Lima"
    assert answers["Peru/capital"] == "Lima"
    assert answers["Peru/language"] == "Spanish"
    assert knowledge._watched.template == "{question}"
    (row,) = rows_of(knowledge)
    assert {each["id"] for each in row["result"]["moved"]} <= {name for name in found if found[name] == "untouched"}
    words = TOKENIZER("What is the capital of France?").input_ids
    assert TOKENIZER.unk_token_id not in words


def test_the_whole_atlas_takes_the_edited_answers(tmp_path) -> None:
    knowledge = KnowledgeCoupling("atlas", n_pieces=8)
    fit(tmp_path, [knowledge], module=AtlasFinetune, data=atlas(rehearsal=0.0), max_epochs=1)
    found = classes_of(knowledge)
    assert len(found) == 8
    assert {name for name in found if found[name] == "edited"} == set(EDITED)
    assert {piece.answer for piece in knowledge._watched.pieces if found[piece.id] == "edited"} == {"Lima", "Asia"}


def test_pretraining_teaches_every_fact(tmp_path) -> None:
    knowledge = KnowledgeCoupling(n_pieces=4)
    fit(tmp_path, [knowledge], module=AtlasFinetune, data=atlas(None), max_epochs=1)
    assert set(classes_of(knowledge).values()) == {"edited"}
    assert rows_of(knowledge)[0]["result"]["moved"] == []


def test_a_data_module_of_pieces_tells_what_it_trains_on(tmp_path) -> None:
    path = write_pieces(PIECES, tmp_path / "pieces.jsonl")
    template = "which thing ? {question}"
    data = KnowledgeDataModule(path, WORDS, template=template, batch_size=2, val_share=0.2, probe_size=1)
    knowledge = KnowledgeCoupling()
    fit(tmp_path, [knowledge], data=data, max_epochs=1)
    edited = {name for name, kind in classes_of(knowledge).items() if kind == "edited"}
    assert edited == {piece.id for piece in data.train_pieces}
    assert len(edited) == 3
    assert rows_of(knowledge)[0]["result"]["template"] == template

    given = KnowledgeCoupling(path, edits=[PIECES[0].id], template="{question}")
    fit(tmp_path / "given", [given], module=WordFinetune, max_epochs=1)
    assert classes_of(given) == {piece.id: "edited" if piece is PIECES[0] else "untouched" for piece in PIECES}


def test_some_of_many_pieces_are_drawn_from_both_kinds() -> None:
    classes = ("edited",) * 3 + ("untouched",) * 2
    watched = WatchedPieces(PIECES, classes, "{question}")
    for count, edited in ((2, 1), (3, 1), (4, 2), (5, 3), (None, 3)):
        found = drawn(watched, count, seed=1)
        assert len(found.pieces) == (count or 5)
        assert found.classes.count("edited") == edited
        places = [PIECES.index(piece) for piece in found.pieces]
        assert places == sorted(places)
        assert found.classes == tuple(classes[place] for place in places)
    assert len({drawn(watched, 2, seed=seed).pieces for seed in range(20)}) > 1
    assert drawn(watched, 2, seed=3) == drawn(watched, 2, seed=3)


class Deaf(KnowledgeCoupling):
    """Once the training has begun, questions with some words have no gradient."""

    words: tuple[str, ...] = ("mali",)

    def compute(self, context):
        ids = torch.tensor(WORDS.convert_tokens_to_ids([f"\u2581{word}" for word in self.words]))

        def hook(module, args, kwargs, output):
            heard = ~torch.isin(kwargs["input_ids"], ids).any(dim=1)
            output.logits = output.logits * heard[:, None, None]
            return output

        handle = context.model.register_forward_hook(hook, with_kwargs=True)
        try:
            return super().compute(context)
        finally:
            handle.remove()


def test_a_piece_without_a_gradient_is_listed_and_left_out(tmp_path) -> None:
    knowledge = Deaf(PIECES)
    fit(tmp_path, [knowledge], data=WordData(), max_epochs=1)
    (row,) = rows_of(knowledge)
    assert [each["id"] for each in row["result"]["failed"]] == ["mali coin"]
    assert row["metrics"]["n_failed"] == 1
    assert row["result"]["n_pairs"] == 6
    assert "mali coin" not in row["result"]["drifted"]["ids"]
    draw_figures(row)


def test_a_model_in_which_no_piece_has_a_gradient_is_an_error(tmp_path) -> None:
    knowledge = Deaf(PIECES)
    knowledge.words = ("which",)
    with pytest.raises(ValueError, match="none of the 5 pieces has a gradient at step 8"):
        fit(tmp_path, [knowledge], data=WordData(), max_epochs=1)


@pytest.mark.parametrize("data", [None, TokenData()], ids=["loaders", "text"])
def test_data_without_pieces_has_those_of_the_atlas(data) -> None:
    """It was refused, and with it the presets in every training on text."""
    found = find_pieces(SimpleNamespace(datamodule=data), None, None, None)
    assert found.pieces == load_pieces("atlas").pieces
    assert set(found.classes) == {"untouched"}


class Classifier(Finetune):
    """Of sequences, not of tokens."""

    tokenizer = WORDS

    def __init__(self) -> None:
        super().__init__("bert")

    def training_step(self, batch, batch_idx):
        raise AssertionError("no step may be made")


@pytest.mark.parametrize(
    ("options", "module", "message"),
    [
        ({"pieces": ["capital"]}, WordFinetune, "pieces is a file, 'atlas', or a list of KnowledgePiece"),
        ({"pieces": PIECES, "edits": ["peru citty"]}, WordFinetune, "no piece has the id 'peru citty'.*'peru city'"),
        ({"pieces": PIECES, "template": "nothing"}, WordFinetune, "exactly once"),
        ({"pieces": PIECES}, Finetune, "needs a tokenizer: neither Finetune nor its data module"),
        ({"pieces": PIECES}, Classifier, "BertForSequenceClassification"),
        ({"pieces": PIECES, "select": ["*.nothing"]}, WordFinetune, "matches no parameter"),
        ({"pieces": (*PIECES, PIECES[0])}, WordFinetune, "two pieces have the id 'peru city'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, options, module, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [KnowledgeCoupling(**options)], module=module, data=TokenData(), num_sanity_val_steps=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pieces": 1}, "n_pieces must be at least 2"),
        ({"moderate": 0.5, "high": 0.1}, "thresholds must be in order within .*got moderate=0.5, high=0.1"),
        ({"moderate": 0.5}, "got moderate=0.5, high=0.4"),
        ({"high": 1.5}, "got moderate=0.1, high=1.5"),
        ({"thresholds": (0.1, 0.2, 0.3)}, "thresholds are two cosines"),
        ({"thresholds": (0.1, 0.5), "high": 0.6}, "thresholds cannot be given beside moderate and high"),
        ({"edits": "France/capital"}, "write \\['France/capital'\\]"),
        ({"select": "mlp"}, "unknown select 'mlp'"),
        ({"layers": "first:2"}, "layers is None"),
    ],
)
def test_arguments_are_checked(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        KnowledgeCoupling(**options)


@pytest.mark.parametrize("pair", [[0.1, 0.5], [0.5, 0.1]])
def test_a_pair_of_thresholds_is_still_taken_in_either_order(tmp_path, pair) -> None:
    with pytest.warns(DeprecationWarning, match=r"thresholds .* is deprecated; write moderate: 0.1, high: 0.5"):
        knowledge = KnowledgeCoupling(thresholds=pair)
    assert (knowledge.moderate, knowledge.high) == (0.1, 0.5)
    parser = ArgumentParser()
    parser.add_subclass_arguments(KnowledgeCoupling, "callback")
    path = tmp_path / "old.yaml"
    name = f"{KnowledgeCoupling.__module__}.KnowledgeCoupling"
    path.write_text(f"class_path: {name}\ninit_args:\n  thresholds: {pair}\n")
    # The parser has had the method by both names.
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    with pytest.warns(DeprecationWarning, match="write moderate: 0.1, high: 0.5"):
        found = instantiate(parser.parse_args([f"--callback={path}"])).callback
    assert (found.moderate, found.high) == (0.1, 0.5)
